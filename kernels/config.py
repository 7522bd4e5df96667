"""How many pixels a thread, rows a program, warps a program take: a small static table.

Shapes alone decide, never a measurement made while training: every rank and every run gets the
same tiles, hence the same order of every sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Tiling", "rows_per_chunk", "tiling"]


class Tiling(NamedTuple):
    """Names as in `tiles.py`."""

    R: int
    S: int
    SUB_R: int
    SUB_C: int
    TI: int
    N: int


def most_pixels(logits: int, labels: int, align_corners: bool) -> int:
    """The most pixels that a cell has along an axis."""
    if logits == 1 or labels == 1:
        return labels if align_corners else -(-labels // 2) if logits == 1 else 1
    if align_corners:
        return -(-(labels - 1) // (logits - 1))
    return -(-labels // logits)


def tiling(logits: Tensor, target: Tensor, align_corners: bool) -> Tiling:
    """The tiles for logits [B, C, h, w] and labels [B, H, W]."""
    h, w = logits.shape[2:]
    label_h, label_w = target.shape[1:]
    pixels = 4 if logits.dtype == torch.float64 else 16
    if (h, w) == (label_h, label_w):
        return Tiling(R=1, S=4, SUB_R=1, SUB_C=1, TI=4, N=4)
    high = most_pixels(h, label_h, align_corners)
    wide = most_pixels(w, label_w, align_corners)
    r, s = _pixels_per_thread(high, wide, pixels)
    return Tiling(R=r, S=s, SUB_R=-(-high // r), SUB_C=-(-wide // s), TI=4, N=4)


def _pixels_per_thread(high: int, wide: int, limit: int) -> tuple[int, int]:
    """[R, S] for cells of high x wide pixels. What a step does per cell and not per pixel (loads,
    lane exchange, stores) costs about as much as six pixels."""
    sizes = [(r, s) for r in (1, 2, 4, 8) for s in (1, 2, 4, 8) if r * s <= limit]

    def cost(size: tuple[int, int]) -> tuple[int, int]:
        r, s = size
        return -(-high // r) * -(-wide // s) * (r * s + 6), -s

    return min(sizes, key=cost)


def rows_per_chunk(rows: int, logits_h: int) -> int:
    """TI of a saved gradient with `rows` = chunks (TI + 1) rows over logits of height h."""
    for ti in (4,):
        chunks = -(-(logits_h + 1) // ti)
        if chunks * (ti + 1) == rows:
            return ti
    raise ValueError(f"saved gradient: {rows} rows are no chunks of {logits_h} rows of logits")
