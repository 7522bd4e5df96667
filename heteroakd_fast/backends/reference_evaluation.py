"""Evaluation by the backend `reference`: argmax of upsampled logits over bands of rows, in plain
PyTorch. Upsampled logits exist for one band at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..labels import label_report
from .compiled import compute_dtype

__all__ = ["confusion_matrix", "elements_of_band", "predict", "taps"]


def predict(
    logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """`Backend.predict`."""
    out = logits.new_empty((logits.shape[0], *size), dtype=dtype)
    for image, rows, winners in _bands(logits, size, align_corners):
        out[image, rows] = winners.to(dtype)
    return out


def confusion_matrix(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """`Backend.confusion_matrix`."""
    classes = logits.shape[1]
    # of each label, and in the last row of what is not counted, so that no size depends on data
    table = logits.new_zeros((classes + 1) * classes, dtype=torch.int64)
    one = table.new_ones(())
    for image, rows, winners in _bands(logits, (target.shape[1], target.shape[2]), align_corners):
        label = target[image, rows].long()
        counted = (label != ignore_index) & (label >= 0) & (label < classes)
        entry = torch.where(counted, label, classes) * classes + winners
        table.index_put_((entry.flatten(),), one, accumulate=True)
    matrix = table[:-classes].view(classes, classes).clone()
    return matrix, label_report(target, None, classes, ignore_index, ignore_index)


def _bands(
    logits: Tensor, size: tuple[int, int], align_corners: bool
) -> Iterator[tuple[int, slice, Tensor]]:
    """An image, some of its label rows, and their predictions [rows, W]."""
    batch, classes, height, width = logits.shape
    dtype = compute_dtype(logits)
    largest = largest_logit(dtype)
    left, right, fx = taps(width, size[1], align_corners, dtype, logits.device)
    top, bottom, fy = taps(height, size[0], align_corners, dtype, logits.device)
    # how many rows of logits a band may take is known without looking at data
    rows = max(1, min(elements_of_band(logits.device) // (classes * size[1]), size[0]))
    for image in range(batch):
        for y in range(0, size[0], rows):
            band = slice(y, y + rows)
            # infinities as numbers: 0 * inf would be NaN, which wins
            z = _mix(
                logits[image].index_select(1, top[band]).to(dtype).clamp_(-largest, largest),
                logits[image].index_select(1, bottom[band]).to(dtype).clamp_(-largest, largest),
                fy[band, None],
            )
            z = _mix(z.index_select(2, left), z.index_select(2, right), fx)
            yield image, band, z.argmax(0)


def elements_of_band(device: torch.device) -> int:
    """Of a band's upsampled logits. On a CPU a few such tensors fit the caches and are enough work
    for many threads; elsewhere a band takes longer than launching its kernels."""
    return 2**19 if device.type == "cpu" else 2**24


def _mix(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    return a + (b - a) * fraction


def taps(
    in_size: int, out_size: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each output position the two taps and the second one's share, as `F.interpolate` has
    them; the same tap twice where the share is 0. In exact integers, then rounded once."""
    position = torch.arange(out_size, device=device)
    if align_corners:
        step, origin, unit = (in_size - 1 if out_size > 1 else 0), 0, max(out_size - 1, 1)
    else:
        step, origin, unit = 2 * in_size, in_size - out_size, 2 * out_size
    source = (position * step + origin).clamp_(min=0)
    lower = (source // unit).clamp_(max=in_size - 1)
    rest = source - lower * unit
    upper = torch.where(rest > 0, lower + 1, lower).clamp_(max=in_size - 1)
    fraction = torch.where(upper > lower, rest.double() / unit, 0.0)
    return lower, upper, fraction.to(dtype)


def largest_logit(dtype: torch.dtype) -> float:
    """What larger logits count as; twice of it is still finite."""
    return 2.0**1022 if dtype == torch.float64 else 2.0**126
