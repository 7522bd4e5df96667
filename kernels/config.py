"""How many pixels a thread, rows a program, warps a program take: a small static table.

Shapes and terms decide, never a measurement made while training: every rank and every run gets the
same tiles, hence the same order of every sum.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from heteroakd_fast.backends.compiled import most_pixels
from heteroakd_fast.backends.compiled import rows_of_chunk as rows_of_program

__all__ = [
    "MANY_CLASSES",
    "Launch",
    "Tiling",
    "key_of",
    "most_pixels",
    "rows_of_program",
    "static_launch",
    "tiling",
]

#: From here on the labelled class's logit is read once per pixel instead of picked in the loop.
MANY_CLASSES: Final = 64


class Launch(NamedTuple):
    """How much a thread and a program take."""

    pixels: int
    """per thread, at most"""
    warps: int
    """per program"""


class Tiling(NamedTuple):
    """Names as in `tiles.py`."""

    R: int
    S: int
    SUB_R: int
    SUB_C: int
    TI: int
    N: int


# By what a call keeps per pixel, in registers. Read off machine code for sm_90 (docs/triton.md): 16
# pixels spend 15 % fewer instructions per pixel and class than 8, and fit in 255 registers if few
# numbers are kept.
_STATIC: Final = {
    "light": Launch(pixels=16, warps=2),
    "heavy": Launch(pixels=8, warps=2),
    "double": Launch(pixels=4, warps=2),
    "label-grid": Launch(pixels=4, warps=4),
}


def key_of(logits: Tensor, teacher: Tensor | None, target: Tensor, heavy: bool) -> str:
    """The row of the table for a run; heavy: whether its terms keep much per pixel."""
    if logits.shape[2:] == target.shape[1:]:
        return "label-grid"
    if logits.dtype == torch.float64:
        return "double"
    other_grid = teacher is not None and teacher.shape[2:] != logits.shape[2:]
    return "heavy" if heavy or other_grid else "light"


def static_launch(key: str) -> Launch:
    """The row of the table, the same for all numbers of classes and devices."""
    return _STATIC[key]


def tiling(
    logits_size: tuple[int, int],
    label_size: tuple[int, int],
    align_corners: bool,
    launch: Launch,
) -> Tiling:
    """The tiles for logits and labels of these sizes."""
    rows = rows_of_program(logits_size, label_size, align_corners)
    if logits_size == label_size:
        return Tiling(R=1, S=launch.pixels, SUB_R=1, SUB_C=1, TI=rows, N=launch.warps)
    high, wide = (
        most_pixels(n, labels, align_corners)
        for n, labels in zip(logits_size, label_size, strict=True)
    )
    r, s = _pixels_per_thread(high, wide, launch.pixels)
    return Tiling(R=r, S=s, SUB_R=-(-high // r), SUB_C=-(-wide // s), TI=rows, N=launch.warps)


def _pixels_per_thread(high: int, wide: int, limit: int) -> tuple[int, int]:
    """[R, S] for cells of high x wide pixels. What a step does per cell and not per pixel (loads,
    lane exchange, stores) costs about as much as six pixels."""
    sizes = [(r, s) for r in (1, 2, 4, 8) for s in (1, 2, 4, 8) if r * s <= limit]

    def cost(size: tuple[int, int]) -> tuple[int, int]:
        r, s = size
        return -(-high // r) * -(-wide // s) * (r * s + 6), -s

    return min(sizes, key=cost)
