"""Counting and checking labels without reading them twice and without stopping a GPU.

A report is int64[3]: valid pixels, labels out of range, and the flat index of the first of those
(-1 when there is none). Kernels that read the labels anyway fill one on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension
from ._checks import label_range
from ._environment import flag

__all__ = [
    "check_label_report",
    "check_synchronously",
    "count_valid",
    "label_report",
    "nearest_labels",
]


def check_synchronously() -> bool:
    """Whether label ranges are to be checked at the price of waiting for the GPU."""
    return flag("HETEROAKD_CHECK_LABELS")


def count_valid(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The number of labels that are not `ignore_index`, int64 scalar, once they are checked.

    Raises:
        ValueError: a label is outside [0, num_classes); on a GPU only with
            `HETEROAKD_CHECK_LABELS=1`, a device-side assertion without.
    """
    report = label_report(target, num_classes, ignore_index)
    check_label_report(report, target, num_classes, ignore_index)
    return report[0].clone()


def check_label_report(report: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises on a report that found a label out of range; it may lack the place.

    Raises:
        ValueError: names the label, where it is, and the range; see `count_valid` for GPUs.
    """
    if report.device.type != "cpu" and not check_synchronously():
        torch._assert_async(
            report[1] == 0, "target: a label is outside [0, C) and is not ignore_index"
        )
        return
    _, count, *place = report.tolist()
    if count == 0:
        return
    first = place[0] if place else int(label_report(target, num_classes, ignore_index)[2])
    _, height, width = target.shape
    b, y, x = first // (height * width), first // width % height, first % width
    label = int(target[b, y, x])
    raise ValueError(
        f"target: label {label} at (b={b}, y={y}, x={x}) is "
        f"{label_range(num_classes, ignore_index)}; {count} such pixels. "
        f"Map the labels of your data set to class indices, or set ignore_index={label} if such "
        "pixels are to be left out."
    )


def label_report(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The report of `target` [B, H, W] (uint8, int32 or int64), int64[3] on its device."""
    if target.numel() == 0:  # whatever its other sizes
        return torch.tensor((0, 0, -1), device=target.device)
    if target.device.type == "cpu" and _extension.loaded():
        report: Tensor = _extension.operators().label_report(target, num_classes, ignore_index)
        return report
    labels = target.long().flatten()
    valid = labels != ignore_index
    bad = valid & ((labels < 0) | (labels >= num_classes))
    count = bad.count_nonzero()
    first = torch.where(count > 0, bad.to(torch.uint8).argmax(), -1)
    return torch.stack((valid.count_nonzero() - count, count, first))


def nearest_labels(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels at `size` by nearest neighbour: row i reads row floor(i * H / h), as
    `interpolate(mode="nearest")` means it, in exact integer arithmetic."""
    height, width = target.shape[-2:]
    if (height, width) == size or target.numel() == 0:
        return target
    rows = torch.arange(size[0], device=target.device) * height // max(size[0], 1)
    columns = torch.arange(size[1], device=target.device) * width // max(size[1], 1)
    return target[:, rows[:, None], columns]
