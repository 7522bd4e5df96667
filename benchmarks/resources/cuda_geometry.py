"""How a call of the CUDA operators is cut into blocks: `Run::choose` of operators.cu, once more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

MOST_CHUNK_ROWS: Final = 2
WARP: Final = 32
WARPS: Final = 2
"""of a block, of every kernel that makes a pass"""
PARTIALS: Final = 8
_PLANE: Final = (MOST_CHUNK_ROWS + 1) * (WARP + 1)
"""floats of a class of a model in shared memory, staging.h"""
_SHARED: Final = 48 * 1024
_MOST_SHARED: Final = 99 * 1024

Grid = tuple[int, int]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Call:
    """Shapes of a call: B x C logits on `student` and `teacher` (None: not needed) under labels."""

    batch: int
    classes: int
    student: Grid
    labels: Grid
    teacher: Grid | None
    size: int = 4
    """bytes of a logit"""
    align_corners: bool = False

    @property
    def pixels(self) -> int:
        return self.batch * self.labels[0] * self.labels[1]

    @property
    def elements(self) -> int:
        return self.pixels * self.classes

    @property
    def models(self) -> int:
        return 2 if self.teacher else 1

    @property
    def student_logits(self) -> int:
        return self.batch * self.classes * self.student[0] * self.student[1]

    @property
    def input_bytes(self) -> int:
        """Both models' logits, and labels of int64."""
        other = self.teacher or (0, 0)
        logits = self.student_logits + self.batch * self.classes * other[0] * other[1]
        return logits * self.size + self.pixels * 8

    def most_pixels(self, axis: int) -> int:
        """of a cell"""
        logits, labels = self.student[axis], self.labels[axis]
        if self.align_corners:
            return labels if 1 in (logits, labels) else ceil_div(labels - 1, logits - 1)
        return ceil_div(labels, logits)

    @property
    def chunk_rows(self) -> int:
        """Rows of cells that a warp walks down: one where cells are large."""
        on_labels = self.student == self.labels
        large = self.most_pixels(0) * self.most_pixels(1) >= 64
        return 1 if large and not on_labels else MOST_CHUNK_ROWS


class Cut(NamedTuple):
    """Blocks of a pass."""

    chunks: int
    grid: int
    rows: int
    """of partial sums"""

    @property
    def partial_bytes(self) -> int:
        return self.rows * PARTIALS * 8


def cut_cells(call: Call, gradients: bool) -> Cut:
    height, width = call.student
    chunks = ceil_div(height + 1, call.chunk_rows)
    lanes = WARP - 1 if gradients else WARP
    programs = ceil_div(chunks * (width + 1), WARPS * lanes)
    return Cut(chunks, call.batch * programs, call.batch * programs * WARPS)


def cut_labels(call: Call, pixels: int) -> Cut:
    chunks = ceil_div(call.labels[0], call.chunk_rows)
    programs = ceil_div(chunks * ceil_div(call.labels[1], pixels), WARPS * WARP)
    return Cut(chunks, call.batch * programs, call.batch * programs * WARPS)


def saved_bytes(call: Call, cut: Cut, slots: int, size: int) -> int:
    planes = slots * call.batch * call.classes * cut.chunks
    return planes * (call.chunk_rows + 1) * call.student[1] * size


class Staged(NamedTuple):
    """Shared memory of a pass by cells."""

    blocks: int
    """of classes, each brought in for itself; 1: all are there once per chunk"""
    classes: float
    """of a block, on average"""
    bytes: int
    """of a block of threads"""


def stage(call: Call) -> Staged:
    fixed, each = 4 * (call.models + 1) * _PLANE, 4 * call.models * _PLANE
    most = (_SHARED // WARPS // 16 * 16 - fixed) // each
    blocks = ceil_div(call.classes, most)
    staged = ceil_div(call.classes, blocks)
    warp_bytes = ceil_div(fixed + staged * each, 16) * 16
    blocks = ceil_div(call.classes, staged)
    return Staged(blocks, call.classes / blocks, WARPS * warp_bytes)


def held_bytes(call: Call, pixels: int, size: int) -> int:
    """Shared memory of a pass by segments; 0: its pixels are not held there."""
    found = WARPS * WARP * call.classes * call.models * pixels * size
    return found if found <= _MOST_SHARED else 0


def label_grid_pixels(call: Call) -> int:
    """Neighbours that a thread of label_kernel has: `labels_grid`, labels_grid.cu."""
    found = call.classes * call.models * 4 * WARPS * WARP
    assert found <= _MOST_SHARED, "such a call goes by segments"
    return 4 if found * 4 <= 56 * 1024 else 1
