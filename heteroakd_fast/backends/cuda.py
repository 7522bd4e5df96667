"""Backend `cuda`: the compiled kernels of `csrc/cuda`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from .. import _extension
from ..labels import check_synchronously, label_report, raise_bad_label
from ..spec import LossSpec
from . import ForwardResult
from ._parts import Part, check_call, compute_dtype, split, unsupported

__all__ = ["BACKEND", "CudaBackend"]

# The numbers of csrc/cuda/pass.h.
_KD_DIVERGENCES: Final = {"forward": 1, "reverse": 2, "js": 3}
_MIXES: Final = {"probs": 0, "logits": 1}
_LARGE_CELL: Final = 64


class CudaBackend:
    """Every term in one pass from the low-resolution logits, forward and gradient together.

    As on the CPU, the gradient of each term's numerator is kept, unscaled, at the logits' (low)
    resolution, and backward adds them up; where the logits that learn have the label grid, nothing
    is kept and backward runs the pass again. `teacher_ce` is the pass `ce` over the teacher's
    logits. Nothing waits for the GPU: labels out of range are a device-side assertion.
    """

    name = "cuda"

    def __init__(
        self,
        operators: Callable[[], Any] = _extension.operators,
        device_types: tuple[str, ...] = ("cuda",),
    ) -> None:
        """Tests bring operators that run the same kernels elsewhere."""
        self.operators = operators
        self._device_types = device_types

    def devices(self) -> tuple[str, ...]:
        return self._device_types

    def unavailable(self) -> str | None:
        if "cuda" not in self._device_types:
            return None
        reason = _extension.unavailable()
        if reason is not None:
            return reason
        if not _extension.has_cuda():
            return (
                "the compiled extension was built without CUDA; rebuild with nvcc on the PATH and "
                "HETEROAKD_BUILD_CUDA=1."
            )
        if not torch.cuda.is_available():
            return "no CUDA device is visible to torch."
        return None

    def unsupported(self, spec: LossSpec) -> str | None:
        return unsupported(spec)

    def kernel(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
    ) -> dict[str, str]:
        """Name of the kernel that computes each term (and `maps`) of such a call."""
        chosen: dict[str, str] = {}
        for part in split(student_logits, teacher_logits, spec):
            if part is None:
                continue
            name: str = self.operators().cuda_kernel(
                part.logits,
                part.teacher,
                target,
                *part.places(),
                *_formulas(part),
                spec.align_corners,
                spec.label_smoothing,
                part.maps,
            )
            chosen |= dict.fromkeys(part.terms.values() or ("maps",), name)
        return chosen

    def backward_reads_inputs(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> bool:
        return any(
            wanted and part is not None and part.on_label_grid(target)
            for part, wanted in zip(
                split(student_logits, teacher_logits, spec),
                (student_grad, teacher_grad),
                strict=True,
            )
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> ForwardResult:
        check_call(student_logits, teacher_logits, target, class_weight, spec)
        numerators = student_logits.new_empty(len(spec.terms), dtype=torch.float64)
        denominators = torch.empty_like(numerators)
        report = student_logits.new_empty(2, dtype=torch.int64)
        dtype = compute_dtype(student_logits)
        maps = student_logits.new_empty((2, *target.shape) if spec.maps else 0, dtype=dtype)
        if target.numel() == 0 or student_logits.numel() == 0:
            saved = [
                torch.zeros(shape, dtype=kept, device=student_logits.device)
                for shape, kept in self.saved_shapes(
                    student_logits, teacher_logits, target, spec, student_grad, teacher_grad
                )
            ]
            nothing = report.zero_()[0]
            return ForwardResult(numerators.zero_(), denominators.zero_(), nothing, maps, saved)
        saved = []
        reports = iter((report, None))  # whichever run is first counts the labels
        for part, wanted in zip(
            split(student_logits, teacher_logits, spec), (student_grad, teacher_grad), strict=True
        ):
            if part is None:
                continue
            gradients = self.operators().cuda_forward(
                part.logits,
                part.teacher,
                target,
                class_weight,
                numerators,
                denominators,
                next(reports),
                maps if part.maps else None,
                *part.places(),
                *_options(part),
                wanted,
            )
            if wanted and not part.on_label_grid(target):
                saved.append(gradients)
        self._check_labels(report, target, student_logits.shape[1], spec.ignore_index)
        return ForwardResult(numerators, denominators, report[0].clone(), maps, saved)

    def saved_shapes(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [
            (_saved_shape(part, target), compute_dtype(part.logits))
            for part, wanted in zip(
                split(student_logits, teacher_logits, spec),
                (student_grad, teacher_grad),
                strict=True,
            )
            if wanted and part is not None and not part.on_label_grid(target)
        ]

    def backward(
        self,
        grad_numerators: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        class_weight: Tensor | None,
        saved: list[Tensor],
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        remaining = iter(saved)
        grad_numerators = grad_numerators.contiguous()
        grads: list[Tensor | None] = []
        for part, wanted, logits in zip(
            split(student_logits, teacher_logits, spec),
            (student_grad, teacher_grad),
            (student_logits, teacher_logits),
            strict=True,
        ):
            if not wanted or logits is None:
                grads.append(None)
            elif part is None or logits.numel() == 0:  # no term of this call reads them
                grads.append(torch.zeros_like(logits))
            elif target is not None and part.on_label_grid(target):
                grads.append(
                    torch.zeros_like(logits)
                    if target.numel() == 0
                    else self.operators().cuda_backward(
                        part.logits,
                        part.teacher,
                        target,
                        class_weight,
                        grad_numerators,
                        *part.places(),
                        *_options(part),
                    )
                )
            else:
                places = [spec.terms.index(name) for name in part.terms.values()]
                places += [-1] * (4 - len(places))
                grads.append(
                    self.operators().cuda_combine(next(remaining), grad_numerators, *places, logits)
                )
        return grads[0], grads[1]

    def _check_labels(
        self, report: Tensor, target: Tensor, num_classes: int, ignore_index: int
    ) -> None:
        """report: valid pixels and labels out of range; where these lie is looked for when there
        are some."""
        if report.device.type == "cpu" or check_synchronously():
            if int(report[1]) > 0:
                raise_bad_label(
                    label_report(target, num_classes, ignore_index),
                    target,
                    num_classes,
                    ignore_index,
                )
        else:
            torch._assert_async(
                report[1] == 0, "target: a label is outside [0, C) and is not ignore_index"
            )


def _formulas(part: Part) -> tuple[int, int, int]:
    """kd_divergence, hetero, mix."""
    spec = part.spec
    hetero = 1
    if spec.preset == "paper":
        hetero = 2 if spec.weight_axis == "class" else 3
    return _KD_DIVERGENCES[spec.kd_divergence], hetero, _MIXES[spec.mix]


def _options(part: Part) -> tuple[Any, ...]:
    """As the operators take them, from kd_divergence to label_smoothing."""
    spec = part.spec
    return (
        *_formulas(part),
        spec.evaluation == "discrepancy",
        spec.kd_beta,
        spec.temperature,
        spec.tau,
        spec.ignore_index,
        spec.align_corners,
        spec.label_smoothing,
    )


def _saved_shape(part: Part, target: Tensor) -> tuple[int, ...]:
    """Of each term, image and class one row more than cells in every chunk of rows, because the
    last cell's bottom belongs to the next chunk's first logits. Chunks are as csrc/cuda/pass.h has
    them: two rows, or one of large cells."""
    batch, classes, height, width = part.logits.shape
    align_corners = part.spec.align_corners
    pixels = _most_pixels(height, target.shape[1], align_corners) * _most_pixels(
        width, target.shape[2], align_corners
    )
    rows = 1 if pixels >= _LARGE_CELL else 2
    return len(part.terms), batch, classes, -(-(height + 1) // rows), rows + 1, width


def _most_pixels(logits: int, labels: int, align_corners: bool) -> int:
    """The most pixels that a cell has along an axis."""
    logits = max(logits, 1)
    if align_corners:
        return labels if logits == 1 or labels == 1 else -(-(labels - 1) // (logits - 1))
    return -(-labels // logits)


BACKEND = CudaBackend()
