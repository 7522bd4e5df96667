"""Public packages that compute a part of this.

Each is optional and imported only when it is about to run. None of them knows class maps: they
take rows of pixels, so that permuting [B, C, H, W] to rows and back is part of what they cost.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case
from ..inputs import IGNORE_INDEX, Inputs
from . import Forward, Provider
from .baselines import student_and_teacher, upsample

__all__ = ["PINNED", "providers"]

#: The versions that this file was written for; another one runs too, under its own name.
PINNED: Final[dict[str, str]] = {
    "liger-kernel": "0.8.5",
    "orda-kernel": "0.1.0",
    "cut-cross-entropy": "25.1.1",
    "quack-kernels": "0.6.5",
    "torchdistill": "1.1.5",
}


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def import_failure(module: str) -> str | None:
    """Why an installed package cannot be imported: most often a dependency that is not there."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package does when it is imported
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


def rows_of_logits(logits: Tensor) -> Tensor:
    """[B, C, H, W] -> [B*H*W, C] in float32, where the eager loss computes too.

    Always a copy: some kernels write the gradient over the logits that they are given.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.permute(0, 2, 3, 1)
    return rows.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 2)


def rows_of_features(features: Tensor) -> Tensor:
    """[B, D, h, w] -> [B*h*w, D] in their own dtype: what a fused projection is made for."""
    return features.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def full_resolution_rows(case: Case, inputs: Inputs) -> Tensor:
    student, _ = student_and_teacher(case, inputs)
    return rows_of_logits(upsample(student, case))


class TorchChunked:
    """PyTorch's own projection + cross entropy, a chunk of the rows at a time."""

    def __init__(self) -> None:
        self.name = f"torch linear_cross_entropy {torch.__version__.split('+')[0]}"

    def cannot(self, case: Case, device: str) -> str | None:
        if case.objective != "projection+ce":
            return "fuses a projection with the cross entropy of the same rows, nothing else"
        # The function alone came a release earlier than its chunks.
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return "needs PyTorch 2.13 or newer"
        return None

    def build(self, case: Case, inputs: Inputs) -> Forward:
        linear_cross_entropy: Any = F.linear_cross_entropy
        # Without options it would be a linear layer and a cross entropy, as in the baseline.
        options = torch.nn.LinearCrossEntropyOptions()
        target = inputs.target.flatten()

        def forward() -> Tensor:
            loss: Tensor = linear_cross_entropy(
                rows_of_features(inputs.student_features),
                inputs.weight,
                target,
                ignore_index=IGNORE_INDEX,
                options=options,
            )
            return loss

        return forward


class GpuPackage:
    """What the packages of GPU kernels have in common: when they cannot run."""

    distribution: str
    module: str
    objectives: ClassVar[dict[str, str | None]]
    """Those of its own reach; the text is a reason why even so it does not fit."""
    otherwise: str
    """The reason for every other objective."""
    needs: str

    def __init__(self) -> None:
        pinned = PINNED[self.distribution]
        self.name = f"{self.distribution} {installed(self.distribution) or pinned}"

    def cannot(self, case: Case, device: str) -> str | None:
        # What no installation changes comes first.
        if case.objective not in self.objectives:
            return self.otherwise
        if refusal := self.objectives[case.objective] or self.refuses(case):
            return refusal
        if device != "cuda":
            return self.needs
        if installed(self.distribution) is None:
            requirement = f"{self.distribution}=={PINNED[self.distribution]}"
            return f"{self.distribution} is not installed (pip install {requirement})"
        return import_failure(self.module)

    def refuses(self, case: Case) -> str | None:
        return None

    def build(self, case: Case, inputs: Inputs) -> Forward:
        raise NotImplementedError


class Liger(GpuPackage):
    distribution = "liger-kernel"
    module = "liger_kernel.transformers"
    objectives: ClassVar[dict[str, str | None]] = {
        "ce": None,
        "ce+kd": None,
        "projection+ce": None,
        "projection+ce+upsample": None,
    }
    otherwise = "has cross entropy and KL divergence, no HeteroAKD"
    needs = "needs Triton and a GPU"

    def build(self, case: Case, inputs: Inputs) -> Forward:
        liger: Any = importlib.import_module(self.module)
        target = inputs.target.flatten()
        if case.objective == "projection+ce":
            fused = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)

            def projected() -> Tensor:
                loss: Tensor = fused(
                    inputs.weight, rows_of_features(inputs.student_features), target
                )
                return loss

            return projected

        cross_entropy = liger.LigerCrossEntropyLoss(ignore_index=IGNORE_INDEX)
        # At beta = 0 this divergence is KL(teacher || student); unlike its KL loss, it knows
        # rows to leave out and divides by the number of the others.
        divergence = liger.LigerJSD(beta=0.0, ignore_index=IGNORE_INDEX)
        options = case.target.options
        temperature = options.get("temperature", 1.0)
        kd_weight = options.get("kd_weight", 0.0)

        def forward() -> Tensor:
            student = full_resolution_rows(case, inputs)
            if not kd_weight:
                loss: Tensor = cross_entropy(student, target)
                return loss
            with torch.no_grad():
                teacher = rows_of_logits(upsample(inputs.teacher_logits, case))
                log_p_t = F.log_softmax(teacher / temperature, dim=1)
            log_p_s = F.log_softmax(student / temperature, dim=1)
            kl = divergence(log_p_s, log_p_t, target)
            # Last, because it overwrites the rows.
            total: Tensor = cross_entropy(student, target) + kd_weight * temperature**2 * kl
            return total

        return forward


class Orda(GpuPackage):
    """Chunked projection + cross entropy, the part of its distillation that needs no teacher.

    On the CPU it runs plain PyTorch that materializes the logits. That is the baseline again
    under another name, so it is not measured there.
    """

    distribution = "orda-kernel"
    module = "orda_kernel"
    objectives: ClassVar[dict[str, str | None]] = {
        "projection+ce": None,
        # Logits could pass for features of an identity projection, and that matrix product and
        # its gradient would be what is measured.
        "ce": "starts from features and the weight of a projection, not from logits",
        "ce+kd": "starts from features and the weight of a projection, not from logits",
    }
    otherwise = "fuses a projection with losses of the same rows, without upsampling or HeteroAKD"
    needs = "needs Triton and a GPU; on the CPU it is plain PyTorch"

    def build(self, case: Case, inputs: Inputs) -> Forward:
        orda: Any = importlib.import_module(self.module)
        target = inputs.target.flatten()

        def forward() -> Tensor:
            rows = rows_of_features(inputs.student_features)
            # A teacher must be named. With both of its weights at zero its logits are never
            # computed, and the student's own rows serve without another allocation.
            teacher = orda.TiedTeacher(hidden=rows.detach(), mode="frozen")
            loss: Tensor = orda.distillation_loss(
                rows,
                inputs.weight,
                target,
                teacher,
                teacher_ce_weight=0.0,
                kl_weight=0.0,
                ignore_index=IGNORE_INDEX,
                backend="triton",  # raises where "auto" would fall back
            ).loss
            return loss

        return forward


class CutCrossEntropy(GpuPackage):
    distribution = "cut-cross-entropy"
    module = "cut_cross_entropy"
    objectives: ClassVar[dict[str, str | None]] = {"projection+ce": None}
    otherwise = "fuses a projection with the cross entropy of the same rows, nothing else"
    needs = "needs Triton and a GPU"

    def refuses(self, case: Case) -> str | None:
        if case.dtype not in ("bfloat16", "float16"):
            return "has gradients for features in bfloat16 and float16 only"
        return None

    def build(self, case: Case, inputs: Inputs) -> Forward:
        package: Any = importlib.import_module(self.module)
        target = inputs.target.flatten()

        def forward() -> Tensor:
            loss: Tensor = package.linear_cross_entropy(
                rows_of_features(inputs.student_features),
                inputs.weight,
                target,
                ignore_index=IGNORE_INDEX,
                # By default it drops gradients of blocks with only small probabilities.
                filter_eps=None,
            )
            return loss

        return forward


class Quack(GpuPackage):
    distribution = "quack-kernels"
    module = "quack"
    objectives: ClassVar[dict[str, str | None]] = {
        "ce": None,
        "projection+ce": None,
        "projection+ce+upsample": None,
    }
    otherwise = "has cross entropy, no distillation"
    needs = "needs an NVIDIA GPU"

    def refuses(self, case: Case) -> str | None:
        return self.needs if torch.version.hip is not None else None

    def build(self, case: Case, inputs: Inputs) -> Forward:
        quack: Any = importlib.import_module(self.module)
        target = inputs.target.flatten()

        def forward() -> Tensor:
            # Its chunked projection takes multiples of 8 classes only, and falls back to these
            # two steps, as here, for the 19, 21, 150 and 171 of segmentation. In float32 also
            # because its copies of 16 bits need an even number of classes.
            if case.objective == "projection+ce":
                logits = F.linear(rows_of_features(inputs.student_features), inputs.weight)
                rows = logits.to(torch.promote_types(logits.dtype, torch.float32))
            else:
                rows = full_resolution_rows(case, inputs)
            loss: Tensor = quack.cross_entropy(rows, target, ignore_index=IGNORE_INDEX)
            return loss

        return forward


class TorchDistill(GpuPackage):
    """Never runs; it stands in the tables because people will look for it there."""

    distribution = "torchdistill"
    module = "torchdistill.losses.mid_level"
    objectives: ClassVar[dict[str, str | None]] = {
        "ce+kd": "its KDLoss does not leave out ignored pixels from the divergence"
    }
    otherwise = "its KDLoss is plain PyTorch, cross entropy + KD only"
    needs = ""


def providers() -> list[Provider]:
    return [TorchChunked(), Liger(), Orda(), CutCrossEntropy(), Quack(), TorchDistill()]
