"""Grids of student, teacher and labels by name, and the same values in other layouts.

Names say what a kernel treats apart. CUDA and Triton kernels have a cell of logits per thread,
warps of 31 columns, chunks of rows and segments; CPU kernels have bands of 8 rows of logits and
vectors of up to 16 lanes.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Batch, make_batch
from torch import Tensor

Grid = tuple[int, int]


def _of(grid: Grid, size: Grid, teacher_grid: Grid | None = None, **more: Any) -> dict[str, Any]:
    return {"grid": grid, "teacher_grid": teacher_grid, "size": size, **more}


SMALL: dict[str, dict[str, Any]] = {
    "stride-2": _of((5, 6), (10, 12)),
    "stride-3": _of((3, 4), (9, 12)),
    "stride-4": _of((5, 6), (20, 24)),
    "large-ratio": _of((2, 3), (20, 36), batch=1),
    "downsampled": _of((20, 11), (9, 7), (9, 23)),
    "label-grid": _of((5, 8), (5, 8)),
    "label-grid-ragged": _of((5, 7), (5, 7)),
    "other-teacher": _of((4, 6), (13, 17), (8, 3)),
    "teacher-on-label-grid": _of((3, 4), (9, 11), (9, 11)),
    "student-on-label-grid": _of((9, 11), (9, 11), (3, 4)),
    "one-logit": _of((1, 1), (9, 7)),
    "one-row": _of((1, 5), (7, 11), (3, 1)),
    "one-row-of-labels": _of((3, 3), (1, 9)),
    "one-pixel": _of((3, 3), (1, 1)),
    "two-warps": _of((9, 40), (18, 80)),
    "several-programs": _of((20, 17), (40, 34), batch=1),
}
#: For compiled kernels: an interpreter takes seconds for each.
LARGE: dict[str, dict[str, Any]] = {
    "stride-8": _of((3, 4), (24, 32), batch=1),
    "uneven": _of((3, 5), (13, 17)),
    "half": _of((18, 70), (9, 35)),
    "only-width": _of((17, 9), (17, 36)),
    "only-height": _of((9, 35), (36, 35)),
    "ratio-7": _of((9, 33), (63, 231)),
    "label-grid-warps": _of((3, 300), (3, 300), batch=1),
    "several-warps": _of((9, 40), (27, 120)),
    "several-blocks": _of((20, 17), (60, 51), batch=1),
    "blocks": _of((17, 33), (67, 131)),
    # a teacher on a grid of its own
    "teacher-stride": _of((4, 4), (32, 32), (8, 8)),
    "teacher-finer": _of((5, 9), (20, 36), (40, 72)),
    "teacher-coarser": _of((20, 36), (40, 72), (3, 2)),
    "teacher-one-logit": _of((20, 36), (20, 36), (1, 1)),
    # sizes of one and two
    "one-pixel-each": _of((1, 1), (1, 1)),
    "one-logit-each": _of((1, 1), (19, 35)),
    "one-logit-of-student": _of((1, 1), (37, 41), (2, 3)),
    "one-row-each": _of((1, 19), (1, 76), (1, 7)),
    "one-row-upsampled": _of((1, 19), (5, 76), (1, 7)),
    "one-column-each": _of((9, 1), (36, 1), (5, 1)),
    "one-column-upsampled": _of((9, 1), (36, 9), (5, 1)),
    "one-label": _of((9, 17), (1, 1), (4, 4)),
    "two-columns": _of((3, 2), (12, 32)),
    # columns of two blocks of 16 lanes, the second one ragged; three bands
    "bands": _of((18, 19), (72, 76), (9, 5)),
    # one chunk and a ragged vector more, on the label grid
    "bands-label-grid": _of((3, 261), (3, 261)),
    "bands-uneven": _of((10, 37), (23, 61), (21, 11)),
    "bands-corners": _of((9, 13), (65, 97), (17, 25)),
    "bands-ragged": _of((17, 5), (69, 129)),
    # the last label rows read the last logits row twice
    "bands-of-one-column": _of((9, 1), (70, 1)),
    "bands-downsampled": _of((40, 50), (11, 13), (17, 90)),
    # a block is lanes x ratio columns: 256 pixels at ratio 16 and 16 lanes
    "ratio-16": _of((2, 16), (32, 256)),
    "ratio-16-ragged": _of((2, 17), (32, 272), (3, 5)),
    "ratio-16-just-short": _of((2, 15), (32, 240)),
    # beyond 64 label pixels per logit the CPU kernels compute in double
    "ratio-64": _of((2, 3), (128, 192)),
    "ratio-65": _of((2, 3), (130, 195)),
    "ratio-65-corners": _of((3, 3), (131, 131)),
    "ratio-65-of-height": _of((1, 20), (65, 20), (2, 20)),
    # integer ratios with align_corners
    "corners-9-769": _of((2, 97), (9, 769)),
    "corners-97-97": _of((13, 13), (97, 97), (25, 49)),
    # work for several threads
    "threads": _of((33, 40), (132, 160), (17, 20)),
    "threads-uneven": _of((33, 37), (101, 97), (65, 21)),
    "threads-label-grid": _of((40, 600), (40, 600)),
}
GEOMETRIES = SMALL | LARGE


def batch_of(geometry: str, **changes: Any) -> Batch:
    """float32 logits of 3 classes on the grids of that name, with at least one valid pixel each."""
    batch = make_batch(**{"classes": 3, "dtype": torch.float32, **GEOMETRIES[geometry], **changes})
    images = torch.arange(len(batch.target))[:, None, None]
    batch.target[:, :1, :1] = images % batch.student.shape[1]
    return batch


# --- layouts -------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "offset")


def arrange(dense: Tensor, layout: str) -> Tensor:
    """The same values, [B, C, h, w], in another layout, on the same device."""
    if layout == "channels_last":
        return dense.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # gaps in every dimension
        b, c, h, w = dense.shape
        return dense.new_full((b, c + 2, h + 1, 2 * w + 1), 77.0)[:, 1:-1, 1:, 1::2].copy_(dense)
    if layout == "permuted":
        return dense.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    if layout == "offset":
        return torch.cat((dense.flatten(), dense.flatten()))[dense.numel() :].view_as(dense)
    return dense.contiguous()


def arrange_labels(dense: Tensor, layout: str) -> Tensor:
    """The same labels, [B, H, W]; where there are gaps, bad labels are in them."""
    if layout == "sliced":
        b, h, w = dense.shape
        return dense.new_full((b, h + 2, 2 * w + 1), 77)[:, 1:-1, 1::2].copy_(dense)
    if layout == "permuted":
        return dense.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    return arrange(dense[:, None], layout)[:, 0]


def arranged(batch: Batch, layout: str, device: str = "cpu") -> Batch:
    """Moved first and arranged then: a copy between devices makes sliced tensors dense."""
    student, teacher, target = (tensor.to(device) for tensor in batch)
    return Batch(arrange(student, layout), arrange(teacher, layout), arrange_labels(target, layout))
