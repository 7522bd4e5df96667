"""Backend `cpu`: the compiled kernels of `csrc/cpu`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .. import _extension
from ..labels import raise_bad_label
from ..spec import TERMS, LossSpec
from . import ForwardResult

__all__ = ["BACKEND"]

# The order and the numbers of csrc/cpu/pass.h.
_TERMS: Final = ("ce", "kd", "hetero", "feature")
_KD_DIVERGENCES: Final = {"forward": 1, "reverse": 2, "js": 3}
_MIXES: Final = {"probs": 0, "logits": 1}


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

    def unavailable(self) -> str | None:
        return _extension.unavailable()

    def unsupported(self, spec: LossSpec) -> str | None:
        known = {*_TERMS, "teacher_ce"}
        if not spec.terms or not known.issuperset(spec.terms):
            return f"it computes {', '.join(sorted(known))}, not {list(spec.terms)}."
        if len(set(spec.terms)) != len(spec.terms):
            return f"it computes a term once, not {list(spec.terms)}."
        return None

    def backward_reads_inputs(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> bool:
        student, teacher = _passes(student_logits, teacher_logits, spec)
        return (student_grad and student is not None and student.on_label_grid(target)) or (
            teacher_grad and teacher is not None and teacher.on_label_grid(target)
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
        maps = student_logits.new_empty(0, dtype=_compute_dtype(student_logits))
        student, teacher = _passes(student_logits, teacher_logits, spec)
        for one, wanted in ((student, student_grad), (teacher, teacher_grad)):
            if one is None:
                continue
            sums, labels, pass_maps, gradients = one.run(target, class_weight, wanted)
            raise_bad_label(labels, target, student_logits.shape[1], spec.ignore_index)
            by_term = sums.tolist()
            fractions |= {name: by_term[_TERMS.index(term)] for name, term in one.terms.items()}
            valid = labels[0].clone()
            if one is student and spec.maps:
                maps = pass_maps
            if wanted and not one.on_label_grid(target):
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
        student, teacher = _passes(student_logits, teacher_logits, spec)
        return [
            ((len(one.terms), *one.logits.shape), _compute_dtype(one.logits))
            for one, wanted in ((student, student_grad), (teacher, teacher_grad))
            if wanted and one is not None and not one.on_label_grid(target)
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
        student, teacher = _passes(student_logits, teacher_logits, spec)
        for one, wanted, logits in (
            (student, student_grad, student_logits),
            (teacher, teacher_grad, teacher_logits),
        ):
            if not wanted or logits is None:
                grads.append(None)
            elif one is None:  # no term of this call reads them
                grads.append(torch.zeros_like(logits))
            elif target is not None and one.on_label_grid(target):
                grads.append(one.run(target, class_weight, True, one.by_term(scales))[3])
            else:
                factors = [scales[name] for name in one.terms]
                grads.append(
                    _extension.operators().combine_gradients(
                        next(remaining), torch.tensor(factors, dtype=torch.float64), logits
                    )
                )
        return grads[0], grads[1]


class _Pass:
    """One call of the kernel: the terms it computes, by the names that the spec has for them."""

    def __init__(
        self, logits: Tensor, teacher: Tensor | None, terms: dict[str, str], spec: LossSpec
    ) -> None:
        self.logits = logits
        self.teacher = teacher
        # in the kernel's order, which is the order of the saved gradients
        self.terms = dict(sorted(terms.items(), key=lambda item: _TERMS.index(item[1])))
        self.spec = spec

    def on_label_grid(self, target: Tensor) -> bool:
        """Whether every grid is the label grid, so that backward is a second pass."""
        grids = [self.logits] if self.teacher is None else [self.logits, self.teacher]
        return all(logits.shape[2:] == target.shape[1:] for logits in grids)

    def by_term(self, scales: dict[str, float]) -> Tensor:
        """The gradients of the numerators as the kernel takes them."""
        values = [0.0] * len(_TERMS)
        for name, term in self.terms.items():
            values[_TERMS.index(term)] = scales[name]
        return torch.tensor(values, dtype=torch.float64)

    def run(
        self,
        target: Tensor,
        class_weight: Tensor | None,
        compute_grad: bool,
        grad_numerators: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        spec = self.spec
        hetero = 1
        if spec.preset == "paper":
            hetero = 2 if spec.weight_axis == "class" else 3
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _extension.operators().distillation(
            self.logits,
            self.teacher,
            target,
            class_weight,
            sum(1 << _TERMS.index(term) for term in self.terms.values()),
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
            spec.maps and self.teacher is not None,
            compute_grad,
            grad_numerators,
        )
        return result


def _passes(
    student_logits: Tensor, teacher_logits: Tensor | None, spec: LossSpec
) -> tuple[_Pass | None, _Pass | None]:
    """The student's pass, unless only the teacher is asked about, and that of `teacher_ce`."""
    own = {term: term for term in spec.terms if term != "teacher_ce"}
    needs_teacher = spec.maps or any(TERMS[term].needs_teacher for term in own)
    student = teacher = None
    if own or spec.maps:
        student = _Pass(student_logits, teacher_logits if needs_teacher else None, own, spec)
    if "teacher_ce" in spec.terms and teacher_logits is not None:
        teacher = _Pass(teacher_logits, None, {"teacher_ce": "ce"}, spec)
    return student, teacher


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


BACKEND = CpuBackend()
