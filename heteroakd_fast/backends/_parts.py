"""How a compiled backend cuts one call into runs of its kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..spec import EVALUATIONS, KD_DIVERGENCES, MIXES, PRESETS, TERMS, WEIGHT_AXES, LossSpec

__all__ = [
    "KERNEL_TERMS",
    "Part",
    "check_call",
    "compute_dtype",
    "most_pixels",
    "rows_of_chunk",
    "split",
    "unsupported",
]

# In the order in which kernels number them.
KERNEL_TERMS: Final = ("ce", "kd", "hetero", "feature")


@dataclass(frozen=True, eq=False)
class Part:
    """One run: the logits that learn, those they learn from, and the terms.

    `terms` goes from the kernel's name of a term to the call's, in the kernel's order, which is the
    order of saved gradients: `teacher_ce` is the run `ce` over the teacher's logits.
    """

    logits: Tensor
    teacher: Tensor | None
    terms: dict[str, str]
    spec: LossSpec

    @property
    def maps(self) -> bool:
        """Whether the maps of the call come from this run."""
        return self.spec.maps and self.teacher is not None

    def on_label_grid(self, target: Tensor) -> bool:
        return self.logits.shape[2:] == target.shape[1:]

    def all_on_label_grid(self, target: Tensor) -> bool:
        grids = [self.logits] if self.teacher is None else [self.logits, self.teacher]
        return all(logits.shape[2:] == target.shape[1:] for logits in grids)

    def places(self) -> tuple[int, int, int, int]:
        """Of each kernel term among the call's terms; -1 where it is not computed."""
        a, b, c, d = (
            self.spec.terms.index(self.terms[name]) if name in self.terms else -1
            for name in KERNEL_TERMS
        )
        return a, b, c, d

    def slots(self) -> tuple[int, int, int, int]:
        """Of each kernel term among those of this run; -1 where it is not computed."""
        order = list(self.terms)
        a, b, c, d = (order.index(name) if name in order else -1 for name in KERNEL_TERMS)
        return a, b, c, d


def split(
    student_logits: Tensor, teacher_logits: Tensor | None, spec: LossSpec
) -> tuple[Part | None, Part | None]:
    """The student's run, unless only the teacher is asked about, and that of `teacher_ce`."""
    own: dict[str, str] = {term: term for term in KERNEL_TERMS if term in spec.terms}
    needs_teacher = spec.maps or any(TERMS[term].needs_teacher for term in own)
    student = teacher = None
    if own or spec.maps:
        student = Part(student_logits, teacher_logits if needs_teacher else None, own, spec)
    if "teacher_ce" in spec.terms and teacher_logits is not None:
        teacher = Part(teacher_logits, None, {"ce": "teacher_ce"}, spec)
    return student, teacher


def unsupported(spec: LossSpec) -> str | None:
    """What kernels of every term cannot compute."""
    known = {*KERNEL_TERMS, "teacher_ce"}
    if not spec.terms or not known.issuperset(spec.terms):
        return f"it computes {', '.join(sorted(known))}, not {list(spec.terms)}."
    if len(set(spec.terms)) != len(spec.terms):
        return f"it computes a term once, not {list(spec.terms)}."
    return None


_CHOICES: Final = {
    "preset": PRESETS,
    "mix": MIXES,
    "evaluation": EVALUATIONS,
    "weight_axis": WEIGHT_AXES,
    "kd_divergence": KD_DIVERGENCES,
}
_LABELS: Final = (torch.int64, torch.int32, torch.uint8)


def check_call(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> None:
    """What a kernel would read out of bounds, or not notice, where the operator is called directly;
    `functional` has said it in better words before.

    Raises:
        ValueError: names the argument.
    """
    shape = student_logits.shape
    if len(shape) != 4 or target.dim() != 3 or target.shape[0] != shape[0]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)} for student_logits {tuple(shape)}, expected "
            "[B, H, W] for [B, C, h, w]"
        )
    if target.dtype not in _LABELS:
        raise ValueError(f"target: got {target.dtype}, expected int64, int32 or uint8")
    needs_teacher = spec.maps or any(TERMS[term].needs_teacher for term in spec.terms)
    if needs_teacher and teacher_logits is None:
        raise ValueError(f"teacher_logits: got None, {list(spec.terms)} need them")
    if teacher_logits is not None and (
        teacher_logits.dim() != 4 or teacher_logits.shape[:2] != shape[:2]
    ):
        raise ValueError(
            f"teacher_logits: got shape {tuple(teacher_logits.shape)} for student_logits "
            f"{tuple(shape)}, expected the same B and C"
        )
    if class_weight is not None and class_weight.shape != shape[1:2]:
        raise ValueError(f"class_weight: got shape {tuple(class_weight.shape)}, expected [C]")
    tensors = (teacher_logits, target, class_weight)
    if any(x is not None and x.device != student_logits.device for x in tensors):
        raise ValueError(f"student_logits: on {student_logits.device}, other arguments are not")
    for name, choices in _CHOICES.items():
        if getattr(spec, name) not in choices:
            raise ValueError(f"{name}: got {getattr(spec, name)!r}, expected one of {choices}")
    if not (spec.temperature > 0.0 and spec.tau > 0.0 and 0.0 <= spec.label_smoothing <= 1.0):
        raise ValueError(
            f"temperature, tau, label_smoothing: got {spec.temperature}, {spec.tau}, "
            f"{spec.label_smoothing}, expected > 0, > 0 and in [0, 1]"
        )


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def most_pixels(logits: int, labels: int, align_corners: bool) -> int:
    """The most pixels that a cell (what lies between neighbouring logits) has along an axis."""
    logits = max(logits, 1)
    if align_corners:
        return labels if logits == 1 or labels == 1 else -(-(labels - 1) // (logits - 1))
    return -(-labels // logits)


def rows_of_chunk(
    logits_size: tuple[int, int], label_size: tuple[int, int], align_corners: bool
) -> int:
    """Rows of cells that a warp or program of a GPU kernel walks down.

    Two: the edge between chunks costs half a row of saved gradients per row; more rows save little
    of it, and leave a longer tail where the last programs run alone. One where cells are large:
    they are few then, and warps would be idle. Never tuned: saved gradients have its shape.
    """
    high, wide = (
        most_pixels(n, labels, align_corners)
        for n, labels in zip(logits_size, label_size, strict=True)
    )
    return 1 if high * wide >= 64 else 2
