"""Evaluation without full-resolution logits: `functional.predict` and `confusion_matrix`.

The operators `heteroakd_fast::predict` and `heteroakd_fast::confusion_matrix`, their fake kernels
and the public functions; the backends compute (`Backend.predict`, `Backend.confusion_matrix`). What
a prediction is, to the last bit: `docs/evaluation.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from . import backends
from ._checks import (
    LARGEST_SIZE,
    MAX_CLASSES,
    check_choice,
    check_device,
    check_flag,
    check_ignore_index,
    check_ignored_class,
    check_integer,
    check_side,
    check_target,
    check_tensor,
    plain_side,
    plain_tensor,
)
from .labels import check_label_report
from .projector import Projection, project

__all__ = ["confusion_matrix", "predict"]

#: uint8 holds no more classes.
_MOST_OF_UINT8: Final = 256
#: A structure for `backends.select`: the order of cross entropy alone, whose kernels are the kin of
#: these.
_STRUCTURE: Final = (255, 0, 0, 0, 0)

_library = torch.library.Library("heteroakd_fast", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
# [B, *size], uint8 if `bytes`, else int64.
_library.define(
    "predict(Tensor logits, SymInt[2] size, bool align_corners, bool bytes, str backend) -> Tensor",
    tags=_TAGS,
)
# int64 [C, C]; checks the labels.
_library.define(
    "confusion_matrix(Tensor logits, Tensor target, int ignore_index, bool align_corners, "
    "str backend) -> Tensor",
    tags=_TAGS,
)


def predict(
    logits: Tensor | Projection,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    dtype: torch.dtype = torch.uint8,
    backend: str | None = None,
) -> Tensor:
    """Return the class of the largest upsampled logit at every pixel.

    Equal to `F.interpolate(logits.float(), size, mode="bilinear",
    align_corners=align_corners).argmax(1)` except at pixels where the largest upsampled logits
    differ by less than their rounding (`docs/evaluation.md`); the compiled backends store nothing
    of full resolution but the result. No gradient, and no wait for a GPU.

    Args:
        logits: [B, C, h, w], float32, bfloat16, float16 or float64, any strides, 1 <= C <= 4096; or
            a `Projection` that makes them (its logits are stored, at their own resolution).
        size: (H, W) of the result, such as the label's or the original image's; larger or smaller
            than (h, w), or equal.
        align_corners: as in `torch.nn.functional.interpolate`; False by default.
        dtype: of the result, `torch.uint8` (default) or `torch.int64`. With more than 256 classes,
            which uint8 cannot hold, the result is int64 in any case.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None (default) leaves the choice to
            `use_backend`, the environment, and the device.

    Returns:
        [B, H, W], contiguous; of equal logits the first class wins.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    logits = _logits_of(logits)
    height, width = _check_size(size)
    check_flag(align_corners, "align_corners")
    if dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"dtype: got {dtype}, expected torch.uint8 or torch.int64")
    _check_grid(logits, (height, width))
    prediction: Tensor = torch.ops.heteroakd_fast.predict(
        logits,
        (height, width),
        align_corners,
        dtype == torch.uint8 and logits.shape[1] <= _MOST_OF_UINT8,
        _select(backend, logits),
    )
    return prediction


def confusion_matrix(
    logits: Tensor | Projection,
    target: Tensor,
    *,
    ignore_index: int | None = 255,
    allow_ignored_class: bool = False,
    align_corners: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Count how often the pixels of each label are predicted as each class.

    Of the predictions of `predict` at the resolution of the labels, which are not stored. Rows are
    labels and columns predictions: entry [i, j] is the number of pixels of label i whose prediction
    is j. Counts are exact and do not depend on the order of threads.

    Args:
        logits: [B, C, h, w], as in `predict`.
        target: [B, H, W], int64, int32 or uint8; values in [0, C) or `ignore_index`.
        ignore_index: label of the pixels that are not counted; any integer outside [0, C), 255 by
            default, or None if no pixel is ignored.
        allow_ignored_class: True lets `ignore_index` be one of the classes: its row is then 0.
        align_corners: as in `torch.nn.functional.interpolate`; False by default.
        out: int64 [C, C], contiguous, on the device of the logits: the counts are added to it, and
            it is returned. None (default) makes a new matrix. If a label is wrong, it is unchanged
            on the CPU.
        backend: as in `predict`.

    Returns:
        int64 [C, C], `out` if it was given.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. A
            label outside [0, C) that is not `ignore_index` is a ValueError on the CPU; on a GPU it
            is a device-side assertion, which waits for nothing, or with `HETEROAKD_CHECK_LABELS=1`
            the ValueError.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    logits = _logits_of(logits)
    classes = logits.shape[1]
    target = plain_tensor(target)
    check_target(target, classes)
    index = check_ignore_index(ignore_index)
    check_ignored_class(ignore_index, classes, allow_ignored_class)
    check_flag(align_corners, "align_corners")
    if target.shape[0] != logits.shape[0]:
        raise ValueError(f"target: got batch {target.shape[0]}, logits has batch {logits.shape[0]}")
    check_device(target, "target", logits, "logits")
    _check_grid(logits, (target.shape[1], target.shape[2]))
    if out is not None:
        _check_out(out, logits)
    counts: Tensor = torch.ops.heteroakd_fast.confusion_matrix(
        logits, target, index, align_corners, _select(backend, logits)
    )
    return counts if out is None else out.add_(counts)


# --- checks --------------------------------------------------------------------------------------


def _logits_of(logits: Tensor | Projection) -> Tensor:
    """Checked, without a graph."""
    side = check_side(plain_side(logits), "logits")
    if isinstance(side, Projection):
        with torch.no_grad():
            side = project(side.features, side.weight, side.bias)
    classes = side.shape[1]
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"logits: got C={classes} classes, expected 1 to {MAX_CLASSES}")
    return side.detach()


def _check_size(size: Sequence[int]) -> tuple[int, int]:
    if isinstance(size, (int, Tensor)) or not isinstance(size, Sequence) or len(size) != 2:
        got = tuple(size) if isinstance(size, Sequence) else type(size).__name__
        raise TypeError(f"size: got {got}, expected two integers (H, W)")
    height, width = size
    if not torch.compiler.is_compiling():  # where they may be symbols
        height, width = (check_integer(n, "size") for n in (height, width))
    if not (0 <= height <= LARGEST_SIZE and 0 <= width <= LARGEST_SIZE):
        raise ValueError(f"size: got {(height, width)}, expected from 0 to {LARGEST_SIZE}")
    return height, width


def _check_grid(logits: Tensor, size: tuple[int, int]) -> None:
    batch, _, height, width = logits.shape
    if batch * size[0] * size[1] != 0 and (height == 0 or width == 0):
        raise ValueError(f"logits: got an empty grid {(height, width)} for a size of {size}")


def _check_out(out: object, logits: Tensor) -> None:
    classes = logits.shape[1]
    if isinstance(out, Tensor) and out.dtype != torch.int64:
        raise TypeError(f"out: got {out.dtype}, expected torch.int64")
    check_tensor(out, "out", 2, "[C, C]", (torch.int64,))
    assert isinstance(out, Tensor)
    if tuple(out.shape) != (classes, classes):
        raise ValueError(
            f"out: got shape {tuple(out.shape)}, expected [C, C] = {(classes, classes)}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out: got strides {out.stride()}, expected a contiguous tensor")
    check_device(out, "out", logits, "logits")


def _select(backend: str | None, logits: Tensor) -> str:
    if backend is not None:
        check_choice(backend, "backend", (backends.AUTO, *backends.names()))
    return backends.select(backend, _STRUCTURE, logits.device.type)


# --- implementations -----------------------------------------------------------------------------


def _predict_impl(
    logits: Tensor, size: Sequence[int], align_corners: bool, bytes: bool, backend: str
) -> Tensor:
    _check_operands(logits, (int(size[0]), int(size[1])))
    if bytes and logits.shape[1] > _MOST_OF_UINT8:
        raise ValueError(f"bytes: got True, expected False for C={logits.shape[1]} classes")
    dtype = torch.uint8 if bytes else torch.int64
    shape = (logits.shape[0], int(size[0]), int(size[1]))
    if 0 in shape:  # no backend has to think of it
        return logits.new_empty(shape, dtype=dtype)
    return backends.get(backend).predict(logits, shape[1:], align_corners, dtype)


def _predict_fake(
    logits: Tensor, size: Sequence[int], align_corners: bool, bytes: bool, backend: str
) -> Tensor:
    dtype = torch.uint8 if bytes else torch.int64
    return logits.new_empty((logits.shape[0], *size), dtype=dtype)


def _confusion_matrix_impl(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, backend: str
) -> Tensor:
    if target.dim() != 3 or target.shape[0] != logits.shape[0] or target.device != logits.device:
        raise ValueError(
            f"target: got shape {tuple(target.shape)} on {target.device}, expected [B, H, W] "
            f"beside {tuple(logits.shape)} on {logits.device}"
        )
    _check_operands(logits, (target.shape[1], target.shape[2]))
    classes = logits.shape[1]
    if target.numel() == 0:
        return logits.new_zeros((classes, classes), dtype=torch.int64)
    matrix, report = backends.get(backend).confusion_matrix(
        logits, target, ignore_index, align_corners
    )
    check_label_report(report, target, None, classes, ignore_index, ignore_index)
    return matrix


def _confusion_matrix_fake(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, backend: str
) -> Tensor:
    return logits.new_empty((logits.shape[1], logits.shape[1]), dtype=torch.int64)


def _check_operands(logits: Tensor, size: tuple[int, int]) -> None:
    """What a kernel would read out of bounds, where the operator is called directly."""
    if logits.dim() != 4 or not 1 <= logits.shape[1] <= MAX_CLASSES:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, C, h, w]")
    if min(size) < 0:
        raise ValueError(f"size: got {size}, expected two integers >= 0")
    _check_grid(logits, size)


_KEY = "CompositeExplicitAutograd"  # one implementation for every device; the backend chooses
_library.impl("predict", _predict_impl, _KEY)
_library.impl("confusion_matrix", _confusion_matrix_impl, _KEY)
torch.library.register_fake("heteroakd_fast::predict", _predict_fake, lib=_library)
torch.library.register_fake(
    "heteroakd_fast::confusion_matrix", _confusion_matrix_fake, lib=_library
)
