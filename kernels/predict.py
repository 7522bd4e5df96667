"""Argmax of bilinearly upsampled logits without the upsampled logits, stored or counted.

Pixels and cells as in `tiles.py`: a lane has a cell and R x S of its pixels at a time, and loads
the four corners of a class once for all of them; what it keeps per pixel is the largest value so
far and its class. Without the candidates of csrc/cpu/predict_kernel.h: a test that all threads of a
program agree about would cost about as much as it saves.

Cost per pixel and class at stride 4, R S = 16: an interpolation in the column shared by 4 pixels
and one in the row, a comparison, two selections: about 6 instructions, and a quarter of a load,
which finds three of four corners in a cache. Bytes: each logit once from memory for each row of
cells that it borders, each prediction (1 or 8 bytes) once. It is bound by arithmetic where there
are more than a few pixels per logit.

Counts are integers: atomic additions in any order give the same table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .interpolation import CORNERS, DIRECT, between
from .launch import _extent, _integer, _lanes, _reads_rows, device_of
from .tiles import checked_labels, offsets, on_label_grid, own_columns, pixels_of_step

__all__ = ["confusion_matrix", "predict"]


@triton.jit
def packed(z):
    """Infinities as numbers, so that no product is NaN; a NaN as twice the largest number."""
    largest = 2.0**1022 if z.dtype == tl.float64 else 2.0**126
    number = tl.minimum(tl.maximum(z, -largest), largest)
    return tl.where(z == z, number, 2 * largest)


@triton.jit(
    do_not_specialize=[
        "programs",
        "classes",
        "label_h",
        "label_w",
        "height",
        "width",
        "rows",
        "columns",
        "per_row",
        "logits_b",
        "logits_c",
        "logits_y",
        "target_b",
        "target_y",
        "target_x",
        "ignore_index",
    ]
)
def predict_pass(
    logits,  # [B, C, h, w]
    target,  # [B, H, W], where it counts
    out,  # [B, H, W] out; or where it counts [C, C] of label and prediction, added to
    report,  # int64 [4], added to where it counts: see labels.py
    programs,  # per image
    classes,
    label_h,
    label_w,
    height,
    width,
    rows,  # of cells
    columns,  # of all chunks
    per_row,
    logits_b,
    logits_c,
    logits_y,
    logits_x,
    target_b,
    target_y,
    target_x,
    ignore_index,
    SOURCE: tl.constexpr,
    COUNTS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SUB_R: tl.constexpr,
    SUB_C: tl.constexpr,
    TI: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    image = (tl.program_id(0) // programs).to(tl.int64)
    chunk, column, exists, _ = own_columns(
        tl.program_id(0) % programs, columns, per_row, 0, N, L, INT
    )
    logits += image * logits_b
    for at in range(TI * SUB_R * SUB_C):
        row = chunk * TI + at // (SUB_R * SUB_C)
        y, x, inside, top, bottom, left, right, fy, fx = pixels_of_step(
            tl.minimum(row, rows - 1),
            column,
            exists & (row < rows),
            at % (SUB_R * SUB_C),
            label_h,
            label_w,
            height,
            width,
            SOURCE,
            False,
            R,
            S,
            SUB_C,
            ALIGN_CORNERS,
            INT,
            FLOAT,
        )
        if SOURCE == DIRECT:
            o00, o01, o10, o11 = on_label_grid(y, x, logits_y, logits_x)
        else:
            o00, o01, o10, o11 = offsets(top, bottom, left, right, logits_y, logits_x)
        best = tl.full(inside.shape, float("-inf"), FLOAT)
        index = tl.zeros(inside.shape, tl.int32)
        plane = logits
        for c in range(classes):
            if SOURCE == DIRECT:
                z = packed(tl.load(plane + o00).to(FLOAT))
            else:
                z00 = packed(tl.load(plane + o00).to(FLOAT))
                z01 = packed(tl.load(plane + o01).to(FLOAT))
                z10 = packed(tl.load(plane + o10).to(FLOAT))
                z11 = packed(tl.load(plane + o11).to(FLOAT))
                # a NaN at one corner is one in the whole cell
                nan = 2.0**1023 if FLOAT == tl.float64 else 2.0**127
                most = tl.maximum(tl.maximum(z00, z01), tl.maximum(z10, z11))
                z00 = tl.where(most == nan, nan, z00)
                z01 = tl.where(most == nan, nan, z01)
                z10 = tl.where(most == nan, nan, z10)
                z11 = tl.where(most == nan, nan, z11)
                z = between(between(z00, z10, fy), between(z01, z11, fy), fx)
            better = z > best
            index = tl.where(better, c, index)
            best = tl.where(better, z, best)
            plane += logits_c
        if COUNTS:
            place = target + image * target_b + y.to(tl.int64) * target_y + x * target_x
            raw = tl.load(place, mask=inside, other=0).to(tl.int64)
            label, counts = checked_labels(raw, inside, classes, ignore_index)
            entry = tl.maximum(label, 0).to(tl.int64) * classes + index
            one = tl.full(inside.shape, 1, tl.int64)
            tl.atomic_add(out + entry, one, mask=label >= 0, sem="relaxed")
            valid = (label >= 0).to(tl.int64)
            bad = counts.to(tl.int64) - valid
            valid = tl.sum(tl.sum(tl.sum(tl.sum(valid, 3), 2), 1), 0)
            bad = tl.sum(tl.sum(tl.sum(tl.sum(bad, 3), 2), 1), 0)
            tl.atomic_add(report, valid, sem="relaxed")
            tl.atomic_add(report + 2, bad, sem="relaxed")
        else:
            place = out + (image * label_h + y) * label_w + x
            tl.store(place, index.to(out.dtype.element_ty), mask=inside)


def predict(
    logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """`Backend.predict`."""
    out = logits.new_empty((logits.shape[0], *size), dtype=dtype)
    _launch(logits, size, align_corners, out, out, out, 0, False)
    return out


def confusion_matrix(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """`Backend.confusion_matrix`; the report without a place."""
    classes = logits.shape[1]
    out = logits.new_zeros((classes, classes), dtype=torch.int64)
    report = logits.new_zeros(4, dtype=torch.int64)
    size = (target.shape[1], target.shape[2])
    _launch(logits, size, align_corners, target, out, report, ignore_index, True)
    return out, report


def _launch(
    logits: Tensor,
    size: tuple[int, int],
    align_corners: bool,
    target: Tensor,
    out: Tensor,
    report: Tensor,
    ignore_index: int,
    counts: bool,
) -> None:
    batch, classes, h, w = logits.shape
    source = int(DIRECT if (h, w) == size else CORNERS)
    key = "label-grid" if (h, w) == size else "double" if logits.dtype == torch.float64 else "light"
    tiling = config.tiling((h, w), size, align_corners, config.static_launch(key))
    rows, per_row = (size[0], -(-size[1] // tiling.S)) if (h, w) == size else (h + 1, w + 1)
    columns = -(-rows // tiling.TI) * per_row
    lanes = _lanes(logits.device)
    programs = -(-columns // (tiling.N * lanes))
    logits = _reads_rows(logits, source)
    largest = max(
        _extent(logits, (2, 3)),
        2 * (size[0] + 1) * (h + 1),  # numerators of positions
        2 * (size[1] + 1) * (w + 1),
        (columns + 2 * per_row) * (tiling.TI + 1),
    )
    with device_of(logits):
        predict_pass[(programs * batch,)](
            logits,
            target,
            out,
            report,
            programs,
            classes,
            *size,
            h,
            w,
            rows,
            columns,
            per_row,
            *logits.stride(),
            *target.stride(),
            ignore_index,
            SOURCE=source,
            COUNTS=counts,
            ALIGN_CORNERS=align_corners,
            **tiling._asdict(),
            L=lanes,
            INT=_integer(largest),
            FLOAT=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            num_warps=tiling.N,
        )
