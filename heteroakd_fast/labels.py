"""Counting and checking labels without reading them twice and without stopping a GPU.

A report is int64: labelled pixels, pixels that terms of distillation count (the labelled and the
unlabelled ones), labels out of range, pixel weights out of range; on the CPU behind them the flat
indices of the first label and of the first weight out of range (-1 when there is none). Kernels
that read the labels anyway fill one on the way. A pixel of weight 0 is as one that is ignored.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from . import _extension
from ._checks import label_range
from ._environment import flag

__all__ = [
    "REPORT",
    "check_label_report",
    "check_synchronously",
    "checked_counts",
    "counted_pixels",
    "label_report",
    "nearest_labels",
]

#: The numbers that a report has on every device.
REPORT: Final = 4


def check_synchronously() -> bool:
    """Whether label ranges are to be checked at the price of waiting for the GPU."""
    return flag("HETEROAKD_CHECK_LABELS")


def checked_counts(
    target: Tensor,
    pixel_weight: Tensor | None,
    num_classes: int,
    ignore_index: int,
    unlabelled_index: int,
) -> Tensor:
    """Labelled pixels and pixels that terms of distillation count, int64[2], once they are checked.

    unlabelled_index: `ignore_index` where no pixel is unlabelled.

    Raises:
        ValueError: a label is outside [0, num_classes), or a weight negative or not finite; on a
            GPU only with `HETEROAKD_CHECK_LABELS=1`, a device-side assertion without.
    """
    options = (num_classes, ignore_index, unlabelled_index)
    report = label_report(target, pixel_weight, *options)
    check_label_report(report, target, pixel_weight, *options)
    return report[:2].clone()


def check_label_report(
    report: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    num_classes: int,
    ignore_index: int,
    unlabelled_index: int,
) -> None:
    """Raises on a report that found a label or a weight out of range; it may lack the place.

    Raises:
        ValueError: names the label, where it is, and the range; see `checked_counts` for GPUs.
    """
    if report.device.type != "cpu" and not check_synchronously():
        torch._assert_async(
            report[2] == 0, "target: a label is outside [0, C) and is not ignore_index"
        )
        if pixel_weight is not None:
            torch._assert_async(report[3] == 0, "pixel_weight: a weight is negative or not finite")
        return
    _, _, labels, weights, *places = report.tolist()
    if labels == weights == 0:
        return
    if not places:
        options = (num_classes, ignore_index, unlabelled_index)
        if pixel_weight is not None:  # as a kernel read them that found no place
            pixel_weight = pixel_weight.float()
        places = label_report(target, pixel_weight, *options)[REPORT:].tolist()
    _, height, width = target.shape
    first = places[0] if labels else places[1]
    b, y, x = first // (height * width), first // width % height, first % width
    if labels:
        label = int(target[b, y, x])
        raise ValueError(
            f"target: label {label} at (b={b}, y={y}, x={x}) is "
            f"{label_range(num_classes, ignore_index, unlabelled_index)}; {labels} such pixels. "
            f"Map the labels of your data set to class indices, or set ignore_index={label} if "
            "such pixels are to be left out."
        )
    assert pixel_weight is not None
    raise ValueError(
        f"pixel_weight: got {float(pixel_weight[b, y, x])} at (b={b}, y={y}, x={x}), expected "
        f"finite numbers >= 0; {weights} such pixels"
    )


def label_report(
    target: Tensor,
    pixel_weight: Tensor | None,
    num_classes: int,
    ignore_index: int,
    unlabelled_index: int,
) -> Tensor:
    """The report of `target` [B, H, W] (uint8, int32 or int64), int64[6] on its device."""
    if target.numel() == 0:  # whatever its other sizes
        return torch.tensor((0, 0, 0, 0, -1, -1), device=target.device)
    if target.device.type == "cpu" and _extension.loaded():
        report: Tensor = _extension.operators().label_report(
            target, pixel_weight, num_classes, ignore_index, unlabelled_index
        )
        return report
    labels = target.long().flatten()
    counted = labels != ignore_index
    labelled = (labels >= 0) & (labels < num_classes) & counted
    bad = [counted & ~labelled & (labels != unlabelled_index), torch.zeros_like(counted)]
    counted = counted & ~bad[0]
    if pixel_weight is not None:
        weights = pixel_weight.flatten()
        bad[1] = ~((weights >= 0) & (weights < torch.inf))
        labelled, counted = labelled & (weights != 0), counted & (weights != 0)
    counts = [mask.count_nonzero() for mask in (labelled, counted, *bad)]
    first = [
        torch.where(count > 0, mask.to(torch.uint8).argmax(), -1)
        for mask, count in zip(bad, counts[2:], strict=True)
    ]
    return torch.stack((*counts, *first))


def counted_pixels(target: Tensor, pixel_weight: Tensor | None, ignore_index: int) -> Tensor:
    """Which pixels are neither ignored nor of weight 0; bool, as `target`."""
    # int64: torch casts a number to the tensor's dtype, where it may become a class
    counted = target.long() != ignore_index
    return counted if pixel_weight is None else counted & (pixel_weight != 0)


def nearest_labels(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels, or weights, at `size` by nearest neighbour: row i reads row floor(i * H / h), as
    `interpolate(mode="nearest")` means it, in exact integer arithmetic."""
    height, width = target.shape[-2:]
    if (height, width) == size or target.numel() == 0:
        return target
    rows = torch.arange(size[0], device=target.device) * height // max(size[0], 1)
    columns = torch.arange(size[1], device=target.device) * width // max(size[1], 1)
    return target[:, rows[:, None], columns]
