"""Small calls that together reach every kernel, and what is checked of each: value and gradients
against the float64 oracle, equal bits from run to run, replays of a CUDA graph.

Expected values are computed on the CPU: nothing that a GPU computes is compared with another thing
that the same GPU computed, except where bits must be equal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.func import functional_call

from heteroakd_fast import HeteroAKDLoss, functional
from heteroakd_fast.output import DistillationOutput

from .stages import Details
from .timing import capture

__all__ = ["CALLS", "MODES", "Call", "check", "inputs_of", "outputs_of", "repeat"]

# cuBLAS asks for it in deterministic mode, and reads it when its handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HETERO: Final[dict[str, Any]] = {"hetero_weight": 1.0, "temperature": 2.0}
SPACE: Final = {**HETERO, "preset": "paper", "weight_axis": "space"}
EVERY: Final = {"teacher_ce_weight": 0.8, "kd_weight": 0.7, "hetero_weight": 0.6,
                "feature_weight": 0.5, "temperature": 1.5}  # fmt: skip
BF16: Final = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """A call of the loss on random logits, or with `depth` on features."""

    options: Mapping[str, Any]
    grid: tuple[int, int] = (9, 17)
    teacher_grid: tuple[int, int] | None = None
    """None: that of the student"""
    size: tuple[int, int] = (37, 67)
    classes: int = 19
    dtype: torch.dtype = torch.float32
    labels: torch.dtype = torch.int64
    channels_last: bool = False
    masked: bool = False
    """One class is -1e4 everywhere, and one logit far from the others: the exact fallbacks"""
    depth: int = 0
    backends: tuple[str, ...] = ("cuda", "triton")


LABEL_GRID: Final[dict[str, Any]] = {"grid": (13, 20), "size": (13, 20)}
GATHER: Final[dict[str, Any]] = {"grid": (4, 6), "teacher_grid": (8, 3), "size": (13, 17)}
PROJECTION: Final[dict[str, Any]] = {"depth": 24, "size": (9, 17), "backends": ("triton",)}
CALLS: Final[dict[str, Call]] = {
    # by cells
    "ce": Call({}),
    "ce+kd": Call({"kd_weight": 1.0, "temperature": 2.0}, labels=torch.uint8),
    "ce+hetero": Call(HETERO),
    "ce+kd+hetero": Call({**HETERO, "kd_weight": 0.3, "temperature": 1.7}, labels=torch.int32),
    "bfloat16": Call(HETERO, dtype=BF16),
    "float16": Call(HETERO, dtype=torch.float16),
    "channels_last": Call(HETERO, channels_last=True),
    "align_corners": Call({**HETERO, "align_corners": True}),
    "40 classes": Call(HETERO, classes=40),
    "150 classes": Call(HETERO, classes=150, grid=(5, 9), size=(17, 33)),
    "masked class": Call(HETERO, masked=True),
    # on the label grid
    "label grid, ce": Call({}, **LABEL_GRID),
    "label grid": Call(HETERO, **LABEL_GRID),
    "label grid, bfloat16": Call(HETERO, **LABEL_GRID, dtype=BF16),
    "label grid, 40 classes": Call(HETERO, **LABEL_GRID, classes=40),
    "label grid, ce, 60 classes": Call({}, **LABEL_GRID, classes=60),
    # by segments; Triton's other kernels
    "smoothed, class weights": Call({"label_smoothing": 0.1, "class_weight": True}),
    "two grids": Call({**HETERO, "kd_weight": 0.3}, **GATHER),
    "mix = logits": Call({**HETERO, "mix": "logits"}),
    "paper": Call({**HETERO, "preset": "paper"}),
    "paper, space": Call(SPACE),
    "reverse kd": Call({"kd_weight": 0.3, "kd_divergence": "reverse"}),
    "js": Call({"kd_weight": 1.3, "kd_divergence": "js", "kd_beta": 0.3}),
    "maps": Call({**HETERO, "return_maps": True}),
    "every term": Call(EVERY, **GATHER),
    "every term, bfloat16": Call(EVERY, **GATHER, dtype=BF16),
    "float64": Call(EVERY, dtype=torch.float64),
    "float64, space": Call(SPACE, dtype=torch.float64),
    "projection": Call(HETERO, **PROJECTION),
    "projection, bfloat16": Call(HETERO, **PROJECTION, dtype=BF16),
}


def inputs_of(call: Call, device: str, seed: int = 0) -> list[Tensor]:
    """Student, teacher, labels, and the weights of both projections: [B, C or D, h, w] twice,
    [B, H, W], [C, D] twice. Drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = [normal(2, call.depth or call.classes, *grid)
            for grid in (call.grid, call.teacher_grid or call.grid)]  # fmt: skip
    if call.masked:
        for logits in maps:
            logits[:, 1] = -1e4
            logits[0, 0, 2, 3] = -400.0
    target = torch.randint(0, call.classes, (2, *call.size), generator=generator)
    if call.masked:
        target[target == 1] = 0
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    tensors = [x.to(device, call.dtype, memory_format=layout) for x in maps]
    tensors.append(target.to(device, call.labels))
    if call.depth:
        scale = call.depth**-0.5
        tensors += [(scale * normal(call.classes, call.depth)).to(device, call.dtype)
                    for _ in range(2)]  # fmt: skip
    return tensors


def outputs_of(call: Call, tensors: list[Tensor], backend: str) -> list[Tensor]:
    """Loss, gradients of what learns, maps."""
    student, teacher, target, *weights = (x.detach() for x in tensors)
    options = {**call.options, "backend": backend}
    learns = [student.requires_grad_()]
    if "teacher_ce_weight" in options:
        learns.append(teacher.requires_grad_())
    if options.get("class_weight"):
        options["class_weight"] = torch.linspace(
            0.5, 1.5, call.classes, dtype=student.dtype, device=student.device
        )
    if weights:
        learns += [weight.requires_grad_() for weight in weights]
        out = _projected_loss(call, student, teacher, target, weights, backend)
    else:
        out = functional.distillation_loss(student, target, teacher, **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, learns), *(out.maps or {}).values()]


def _projected_loss(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weights: list[Tensor],
    backend: str,
) -> DistillationOutput:
    """At the features' resolution, with these weights of the 1x1 projections."""
    module = _module(call.classes, call.depth, backend, student.device, student.dtype)
    names = ("student_projector.conv.weight", "teacher_projector.conv.weight")
    parameters = {k: w[:, :, None, None] for k, w in zip(names, weights, strict=True)}
    final = student.new_zeros(2, call.classes, 1, 1)  # no term reads them
    features = {"student_features": student, "teacher_features": teacher}
    out: DistillationOutput = functional_call(module, parameters, (final, target), features)
    return out


@cache
def _module(
    classes: int, depth: int, backend: str, device: torch.device, dtype: torch.dtype
) -> HeteroAKDLoss:
    """Made once: while a CUDA graph is captured nothing may be copied to the GPU."""
    loss = HeteroAKDLoss(
        classes, depth, depth, ce_weight=0.0, kd_weight=0.0, resolution="logits", backend=backend,
        **HETERO,
    )  # fmt: skip
    for projector in (loss.student_projector, loss.teacher_projector):
        assert projector is not None
        assert projector.conv.bias is not None
        torch.nn.init.zeros_(projector.conv.bias)
    return loss.to(device, dtype)


def digest(outputs: list[Tensor]) -> str:
    """Of the bits."""
    found = hashlib.sha256()
    for tensor in outputs:
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """The contract's largest errors of a loss, and of gradients by the largest gradient; of 16 bits
    with one rounding of the result on top."""
    if dtype == torch.float64:
        return 1e-12, 1e-12
    return 2e-6, 1e-5 + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.001)


def check(call: Call, backend: str, device: str) -> Details:
    """Errors of loss and gradients (and maps), relative to the largest; memory that no kernel has
    written is NaN."""
    tensors = inputs_of(call, device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `empty` returns
    try:
        got = outputs_of(call, tensors, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    on_cpu = [x.cpu() if x.dtype == call.labels else x.cpu().double() for x in tensors]
    expected = outputs_of(call, on_cpu, "reference")
    errors = []
    for ours, wanted in zip(got, expected, strict=True):
        scale = wanted.abs().max()
        errors.append(float((ours.cpu().double() - wanted).abs().max() / scale))
    found = {"loss_error": errors[0], "gradient_error": max(errors[1:]), "bits": digest(got)}
    of_loss, of_gradient = tolerances(call.dtype)
    if not errors[0] <= of_loss:  # NaN is not
        found["failed"] = f"loss {float(got[0])}, expected {float(expected[0])}"
    elif not all(error <= of_gradient for error in errors[1:]):
        found["failed"] = f"gradients are wrong by {errors[1:]} of the largest"
    return found


def repeat(call: Call, backend: str, device: str) -> Details:
    """Bits of several runs, with other memory in between, and of replays of a captured graph with
    new values."""
    sets = [inputs_of(call, device, seed) for seed in range(2)]
    bits = [digest(outputs_of(call, tensors, backend)) for tensors in sets]
    found: Details = {"bits": bits[0]}
    for elements in (1, 12345, 1 << 20):
        garbage = torch.full((elements,), float("nan"), device=device)
        if digest(outputs_of(call, sets[0], backend)) != bits[0]:
            found["failed"] = "another run gives other bits"
        del garbage
    held = [tensor.clone() for tensor in sets[0]]
    replay, outputs = capture(lambda: outputs_of(call, held, backend), device)
    for tensors, wanted in zip(sets[::-1], bits[::-1], strict=True):
        for buffer, value in zip(held, tensors, strict=True):
            buffer.copy_(value)
        replay()
        if digest(outputs) != wanted:
            found.setdefault("failed", "a replay gives other bits than the call")
    return found


def once(call: Call, backend: str, device: str) -> Details:
    """Run it: for tools that look at what it does, and for the compiler."""
    outputs_of(call, inputs_of(call, device), backend)
    return {}


MODES: Final = {"check": check, "repeat": repeat, "once": once}
