"""Backend `cpu`: the compiled kernels of `csrc/cpu`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .. import _extension
from ..labels import raise_bad_label
from ..spec import LossSpec
from . import ForwardResult
from ._parts import KERNEL_TERMS, Part, compute_dtype, split, unsupported

__all__ = ["BACKEND"]

# The numbers of csrc/cpu/pass.h, whose terms have the order of KERNEL_TERMS.
_KD_DIVERGENCES: Final = {"forward": 1, "reverse": 2, "js": 3}
_MIXES: Final = {"probs": 0, "logits": 1, "teacher": 2}


class CpuBackend:
    """Every term in one pass from the low-resolution logits, forward and gradient together.

    Where logits have a grid of their own, the gradient of each term's numerator is accumulated,
    unscaled, while the forward pass has each pixel's probabilities at hand; backward adds them up.
    That costs a tensor of the logits' own (low) resolution per term and saves a second pass.
    Where every grid is the label grid, those tensors would be the largest of the step: nothing is
    saved but the inputs, and backward is a second pass that writes the sum of all terms once.

    `teacher_ce` is the pass `ce` over the teacher's logits.
    """

    name = "cpu"

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def unavailable(self) -> str | None:
        return _extension.unavailable()

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
        student, teacher = split(student_logits, teacher_logits, spec)
        return (student_grad and student is not None and student.all_on_label_grid(target)) or (
            teacher_grad and teacher is not None and teacher.all_on_label_grid(target)
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
        fractions: dict[str, list[float]] = {}
        saved: list[Tensor] = []
        valid: Tensor | None = None
        maps = student_logits.new_empty(0, dtype=compute_dtype(student_logits))
        student, teacher = split(student_logits, teacher_logits, spec)
        for one, wanted in ((student, student_grad), (teacher, teacher_grad)):
            if one is None:
                continue
            sums, labels, pass_maps, gradients = _run(one, target, class_weight, wanted)
            raise_bad_label(labels, target, student_logits.shape[1], spec.ignore_index)
            by_term = sums.tolist()
            fractions |= {
                name: by_term[KERNEL_TERMS.index(term)] for term, name in one.terms.items()
            }
            valid = labels[0].clone()
            if one is student and spec.maps:
                maps = pass_maps
            if wanted and not one.all_on_label_grid(target):
                saved.append(gradients)
        assert valid is not None
        pairs = torch.tensor([fractions[term] for term in spec.terms], dtype=torch.float64)
        return ForwardResult(pairs[:, 0].clone(), pairs[:, 1].clone(), valid, maps, saved)

    def saved_shapes(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        student, teacher = split(student_logits, teacher_logits, spec)
        return [
            ((len(one.terms), *one.logits.shape), compute_dtype(one.logits))
            for one, wanted in ((student, student_grad), (teacher, teacher_grad))
            if wanted and one is not None and not one.all_on_label_grid(target)
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
        scales = dict(zip(spec.terms, grad_numerators.tolist(), strict=True))
        remaining = iter(saved)
        grads: list[Tensor | None] = []
        student, teacher = split(student_logits, teacher_logits, spec)
        for one, wanted, logits in (
            (student, student_grad, student_logits),
            (teacher, teacher_grad, teacher_logits),
        ):
            if not wanted or logits is None:
                grads.append(None)
            elif one is None:  # no term of this call reads them
                grads.append(torch.zeros_like(logits))
            elif target is not None and one.all_on_label_grid(target):
                grads.append(_run(one, target, class_weight, True, scales)[3])
            else:
                factors = [scales[name] for name in one.terms.values()]
                grads.append(
                    _extension.operators().combine_gradients(
                        next(remaining), torch.tensor(factors, dtype=torch.float64), logits
                    )
                )
        return grads[0], grads[1]


def _run(
    part: Part,
    target: Tensor,
    class_weight: Tensor | None,
    compute_grad: bool,
    scales: dict[str, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scales: gradients of the numerators by the call's names of its terms; then only the sum of
    the gradients is made."""
    spec = part.spec
    hetero = 1
    if spec.preset == "paper":
        hetero = 2 if spec.weight_axis == "class" else 3
    grad_numerators = None
    if scales is not None:
        by_term = [scales[part.terms[k]] if k in part.terms else 0.0 for k in KERNEL_TERMS]
        grad_numerators = torch.tensor(by_term, dtype=torch.float64)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _extension.operators().distillation(
        part.logits,
        part.teacher,
        target,
        class_weight,
        sum(1 << KERNEL_TERMS.index(term) for term in part.terms),
        _KD_DIVERGENCES[spec.kd_divergence],
        hetero,
        _MIXES[spec.mix],
        spec.evaluation == "discrepancy",
        spec.kd_beta,
        spec.temperature,
        spec.tau,
        spec.ignore_index,
        spec.align_corners,
        spec.label_smoothing,
        spec.maps and part.teacher is not None,
        compute_grad,
        grad_numerators,
    )
    return result


BACKEND = CpuBackend()
