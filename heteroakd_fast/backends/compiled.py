"""Backends `cpu` and `cuda`: the compiled library, whose operators have one schema for both.

Every term in one pass over each model's low-resolution logits, value and gradients together. Where
logits have a grid of their own, the gradient of each group of terms is kept, at that (low)
resolution, and `gradient` adds them up: a tensor of the logits' size per group, instead of a second
pass. Where they lie on the label grid, those tensors would be the largest of the step: nothing is
kept but the inputs, and `gradient` is a second pass that writes the sum once. `teacher_ce` is the
pass `ce` over the teacher's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..labels import check_label_report
from ..spec import groups_of
from ..terms import WITHOUT_TEACHER
from . import Call, Sums

__all__ = [
    "CPU",
    "CUDA",
    "CompiledBackend",
    "compute_dtype",
    "most_pixels",
    "rows_of_chunk",
    "slots_of_passes",
]


class CompiledBackend:
    """The compiled kernels of one type of device."""

    def __init__(
        self,
        name: str,
        unavailable: Callable[[], str | None],
        operators: Callable[[], Any] = _extension.operators,
        device: str | None = None,
    ) -> None:
        """operators, device: tests bring operators that run the same kernels elsewhere."""
        self.name = name
        self.unavailable = unavailable
        self.operators = operators
        self._device = device or name

    def devices(self) -> tuple[str, ...]:
        return (self._device,)

    def projects(self, structure: tuple[int, ...], classes: int, float64: bool) -> bool:
        return False

    def sums(self, call: Call) -> Sums:
        numerators, totals, denominators, report, maps, *saved = self.operators().sums(
            call.student,
            call.teacher,
            call.target,
            call.class_weight,
            call.pixel_weight,
            call.spec.vector(),
            call.spec.structure,
            call.wants[0],
            call.wants[3],
        )
        check_label_report(
            report,
            call.labels,
            call.pixel_weight,
            call.classes,
            call.spec.ignore_index,
            call.spec.unlabelled_index,
        )
        kept = [tensor for tensor, keeps in zip(saved, self._keeps(call), strict=True) if keeps]
        return Sums(numerators, totals, denominators, report[:2], maps, kept)

    def reads_inputs(self, call: Call) -> bool:
        return any(
            wanted and slots and not keeps
            for wanted, slots, keeps in zip(
                call.wants[::3],
                slots_of_passes(call.spec.structure),
                self._keeps(call),
                strict=True,
            )
        )

    def gradient(self, call: Call, grad_totals: Tensor, saved: list[Tensor]) -> list[Tensor | None]:
        remaining = iter(saved)
        kept = [next(remaining) if keeps else None for keeps in self._keeps(call)]
        found = self.operators().gradient(
            grad_totals.contiguous(),
            call.student,
            call.teacher,
            call.target,
            call.class_weight,
            call.pixel_weight,
            call.spec.vector(),
            *kept,
            call.spec.structure,
            call.wants[0],
            call.wants[3],
        )
        grads: list[Tensor | None] = [None] * 6
        for at, grad, logits, slots in zip(
            (0, 3),
            found,
            (call.student, call.teacher),
            slots_of_passes(call.spec.structure),
            strict=True,
        ):
            if call.wants[at] and logits is not None:
                grads[at] = grad if slots else torch.zeros_like(logits)
        return grads

    def saved_shapes(self, call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [
            ((slots, *self._saved_shape(call, logits)), compute_dtype(logits))
            for logits, slots, keeps in zip(
                (call.student, call.teacher),
                slots_of_passes(call.spec.structure),
                self._keeps(call),
                strict=True,
            )
            if keeps and logits is not None
        ]

    def _keeps(self, call: Call) -> tuple[bool, bool]:
        """Whether the student's pass and the teacher's keep gradients."""
        student, teacher = slots_of_passes(call.spec.structure)
        again = _on_label_grid(call, call.student) and (
            self.name != "cpu"
            or not _student_reads_teacher(call)
            or _on_label_grid(call, call.teacher)
        )
        return (
            call.wants[0] and student > 0 and not again,
            call.wants[3] and teacher > 0 and not _on_label_grid(call, call.teacher),
        )

    def predict(
        self, logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
    ) -> Tensor:
        prediction: Tensor = self.operators().predict(
            logits, *size, align_corners, dtype == torch.uint8
        )
        return prediction

    def confusion_matrix(
        self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        matrix, report = self.operators().confusion_matrix(
            logits, target, ignore_index, align_corners
        )
        return matrix, report

    def _saved_shape(self, call: Call, logits: Tensor) -> tuple[int, ...]:
        """On CUDA, of each group, image and class one row more than cells in every chunk of rows,
        because the last cell's bottom belongs to the next chunk's first logits."""
        batch, classes, height, width = logits.shape
        if self.name == "cpu":
            return batch, classes, height, width
        size = (call.labels.shape[1], call.labels.shape[2])
        rows = rows_of_chunk((height, width), size, call.spec.align_corners)
        return batch, classes, -(-(height + 1) // rows), rows + 1, width


def _on_label_grid(call: Call, logits: Tensor | None) -> bool:
    """Without labels, as in a `gradient` that reads none, nothing is."""
    if logits is None:
        return True
    return call.target is not None and logits.shape[2:] == call.target.shape[1:]


def _student_reads_teacher(call: Call) -> bool:
    alone = WITHOUT_TEACHER | {"teacher_ce"}
    return call.spec.maps or not alone.issuperset(groups_of(call.spec.structure))


@lru_cache(maxsize=256)
def slots_of_passes(structure: tuple[int, ...]) -> tuple[int, int]:
    """How many gradients the student's pass and the teacher's keep: one of each group of terms, but
    that hetero has its own (csrc/spec.h)."""
    groups = groups_of(structure)
    student = {group for name, group in groups.items() if name not in ("teacher_ce", "hetero")}
    return len(student) + ("hetero" in groups), int("teacher_ce" in groups)


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


CPU = CompiledBackend("cpu", _extension.unavailable)
CUDA = CompiledBackend("cuda", _extension.cuda_unavailable)
