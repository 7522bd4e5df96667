"""Backend `cpu`: the compiled kernels of `csrc/cpu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from ..labels import raise_bad_label
from ..spec import LossSpec
from . import ForwardResult

__all__ = ["BACKEND"]

_TERMS = frozenset({"ce"})


class CpuBackend:
    """Upsampling and cross entropy in one pass, forward and gradient together.

    The gradient to the low-resolution logits is accumulated, unscaled, while the forward pass
    has each pixel's probabilities at hand; backward only scales it. That costs one tensor of the
    logits' own (low) resolution and saves every exponential of a second pass.
    """

    name = "cpu"
    backward_reads_inputs = False

    def unavailable(self) -> str | None:
        return _extension.unavailable()

    def unsupported(self, spec: LossSpec) -> str | None:
        missing = [term for term in spec.terms if term not in _TERMS]
        if missing:
            return f"it has no kernel yet for {', '.join(missing)}."
        if len(spec.terms) != 1:
            return f"it computes one term at a time, not {list(spec.terms)}."
        if spec.maps:
            return "it has no kernel yet for the maps."
        return None

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
        sums, labels, grad = _extension.operators().upsample_cross_entropy(
            student_logits,
            target,
            class_weight,
            spec.ignore_index,
            spec.align_corners,
            spec.label_smoothing,
            student_grad,
        )
        raise_bad_label(labels, target, student_logits.shape[1], spec.ignore_index)
        return ForwardResult(
            numerators=sums[:1].clone(),
            denominators=sums[1:].clone(),
            valid=labels[0].clone(),
            maps=student_logits.new_empty(0, dtype=_compute_dtype(student_logits)),
            saved=[grad] if student_grad else [],
        )

    def saved_shapes(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        shape = tuple(student_logits.shape)
        return [(shape, _compute_dtype(student_logits))] if student_grad else []

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
        if not student_grad:
            return None, None
        # Scaled in float32 and rounded once, into the logits' dtype and layout. Image by image:
        # torch would put a float32 copy of the whole result between the product and the rounding.
        grad = torch.empty_like(student_logits)
        for image, unscaled in zip(grad, saved[0], strict=True):
            torch.mul(unscaled, grad_numerators[0], out=image)
        return grad, None


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


BACKEND = CpuBackend()
