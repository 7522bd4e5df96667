"""Public packages that compute a part of this.

Each is optional and imported only when it is about to run. None of them knows class maps: they
take rows of pixels, so that permuting [B, C, H, W] to rows and back is part of what they cost.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case
from ..inputs import IGNORE_INDEX, Inputs
from . import Forward, Provider
from .baselines import student_and_teacher, upsample

__all__ = ["PEERS", "providers"]

NO_HETERO: Final = "has cross entropy and KL divergence, no HeteroAKD"
FEATURES_ONLY: Final = "fuses a projection with the cross entropy of the same rows, nothing else"


@dataclass(frozen=True)
class Peer:
    """A package, what it computes, and why it does not do the rest."""

    distribution: str
    version: str
    """That this file was written for; another one runs too, under its own name"""
    module: str
    objectives: tuple[str, ...]
    otherwise: str
    """The reason for every other objective"""
    loss: Callable[[Any, Case, Inputs], Forward]
    """Of the imported module"""
    needs: str = "needs Triton and a GPU"
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    title: str = ""
    """For tables; the distribution where empty"""

    @property
    def name(self) -> str:
        title = self.title or self.distribution
        return f"{title} {_installed(self.distribution) or self.version}"

    def cannot(self, case: Case, device: str) -> str | None:
        # What no installation changes comes first.
        if case.objective not in self.objectives:
            return self.otherwise
        if case.dtype not in self.dtypes:
            return f"has gradients for features in {' and '.join(self.dtypes)} only"
        if device != "cuda" and self.needs:
            return self.needs
        if _installed(self.distribution) is None:
            requirement = f"{self.distribution}=={self.version}"
            return f"{self.distribution} is not installed (pip install {requirement})"
        return _import_failure(self.module)

    def build(self, case: Case, inputs: Inputs) -> Forward:
        return self.loss(importlib.import_module(self.module), case, inputs)


@cache
def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


@cache
def _import_failure(module: str) -> str | None:
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


def rows_of_features(inputs: Inputs) -> Tensor:
    """[B, D, h, w] -> [B*h*w, D] in their own dtype: what a fused projection is made for."""
    return inputs.student_features.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def full_resolution_rows(case: Case, inputs: Inputs) -> Tensor:
    return rows_of_logits(upsample(student_and_teacher(case, inputs)[0], case))


def _torch(functional: Any, case: Case, inputs: Inputs) -> Forward:
    """PyTorch's own projection + cross entropy, a chunk of the rows at a time."""
    # Without options it would be a linear layer and a cross entropy, as in the baseline.
    options = torch.nn.LinearCrossEntropyOptions()
    target = inputs.target.flatten()
    return lambda: functional.linear_cross_entropy(
        rows_of_features(inputs),
        inputs.weight,
        target,
        ignore_index=IGNORE_INDEX,
        options=options,
    )


def _liger(liger: Any, case: Case, inputs: Inputs) -> Forward:
    target = inputs.target.flatten()
    if case.objective == "projection+ce":
        fused = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
        return lambda: fused(inputs.weight, rows_of_features(inputs), target)

    cross_entropy = liger.LigerCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    # At beta = 0 this divergence is KL(teacher || student); unlike its KL loss, it knows
    # rows to leave out and divides by the number of the others.
    divergence = liger.LigerJSD(beta=0.0, ignore_index=IGNORE_INDEX)
    temperature = case.target.options.get("temperature", 1.0)
    kd_weight = case.target.options.get("kd_weight", 0.0)

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


def _orda(orda: Any, case: Case, inputs: Inputs) -> Forward:
    """The part of its distillation that needs no teacher."""
    target = inputs.target.flatten()

    def forward() -> Tensor:
        rows = rows_of_features(inputs)
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


def _cut(package: Any, case: Case, inputs: Inputs) -> Forward:
    target = inputs.target.flatten()
    # By default it drops gradients of blocks with only small probabilities.
    options = {"ignore_index": IGNORE_INDEX, "filter_eps": None}
    return lambda: package.linear_cross_entropy(
        rows_of_features(inputs), inputs.weight, target, **options
    )


PROJECTIONS: Final = ("projection+ce", "projection+ce+upsample")
PEERS: Final = (
    Peer(
        "torch",
        "2.13",
        "torch.nn.functional",
        PROJECTIONS[:1],
        FEATURES_ONLY,
        _torch,
        needs="",
        title="torch linear_cross_entropy",
    ),
    Peer(
        "liger-kernel",
        "0.8.5",
        "liger_kernel.transformers",
        ("ce", "ce+kd", *PROJECTIONS),
        NO_HETERO,
        _liger,
    ),
    # On the CPU it runs plain PyTorch that materializes the logits: the baseline again.
    Peer("orda-kernel", "0.1.0", "orda_kernel", PROJECTIONS[:1], FEATURES_ONLY, _orda),
    Peer(
        "cut-cross-entropy",
        "25.1.1",
        "cut_cross_entropy",
        PROJECTIONS[:1],
        FEATURES_ONLY,
        _cut,
        dtypes=("bfloat16", "float16"),
    ),
)


def providers() -> list[Provider]:
    # The function alone came a release earlier than its chunks.
    chunked = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return [one for one in PEERS if chunked or one.distribution != "torch"]
