"""What the backends of GPUs have in common: which runs a call takes, what they keep, the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..labels import check_synchronously, label_report, raise_bad_label
from ..spec import LossSpec
from . import ForwardResult
from ._parts import Part, check_call, compute_dtype, split, unsupported

__all__ = ["GpuBackend", "check_labels"]


class GpuBackend(ABC):
    """Every term in one pass from the low-resolution logits, forward and gradient together.

    As on the CPU, the gradient of each term's numerator is kept, unscaled, at the logits' (low)
    resolution, and backward adds them up; where the logits that learn have the label grid, nothing
    is kept and backward runs the pass again. `teacher_ce` is the pass `ce` over the teacher's
    logits. Nothing waits for the GPU: labels out of range are a device-side assertion.
    """

    name: str

    @abstractmethod
    def devices(self) -> tuple[str, ...]: ...

    @abstractmethod
    def unavailable(self) -> str | None: ...

    @abstractmethod
    def _forward(
        self,
        part: Part,
        target: Tensor,
        class_weight: Tensor | None,
        numerators: Tensor,
        denominators: Tensor,
        report: Tensor | None,
        maps: Tensor | None,
        compute_grad: bool,
    ) -> Tensor | None:
        """Writes the run's sums into [K] float64 tensors, the label report (int64 [2]: valid, out
        of range) and the maps; returns the gradients to keep, where there are any."""

    @abstractmethod
    def _saved_shape(self, part: Part, target: Tensor) -> tuple[int, ...]:
        """Of what `_forward` returns for logits with a grid of their own."""

    @abstractmethod
    def _backward(
        self, part: Part, target: Tensor, class_weight: Tensor | None, grad_numerators: Tensor
    ) -> Tensor:
        """The gradient of logits on the label grid."""

    @abstractmethod
    def _combine(self, part: Part, saved: Tensor, grad_numerators: Tensor) -> Tensor:
        """The gradient of other logits, from what was kept."""

    def unsupported(self, spec: LossSpec) -> str | None:
        return unsupported(spec)

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
            gradients = self._forward(
                part,
                target,
                class_weight,
                numerators,
                denominators,
                next(reports),
                maps if part.maps else None,
                wanted,
            )
            if gradients is not None:
                saved.append(gradients)
        check_labels(report, target, student_logits.shape[1], spec.ignore_index)
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
            (self._saved_shape(part, target), compute_dtype(part.logits))
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
                    else self._backward(part, target, class_weight, grad_numerators)
                )
            else:
                grads.append(self._combine(part, next(remaining), grad_numerators))
        return grads[0], grads[1]


def check_labels(report: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
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
