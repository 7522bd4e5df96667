"""Checks of single arguments, and what to say about one that cannot be used."""

from __future__ import annotations

import difflib
import numbers
import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_T = TypeVar("_T")

__all__ = [
    "axis_hint",
    "check_choice",
    "check_constant",
    "check_count",
    "check_flag",
    "check_ignore_index",
    "check_ignored_class",
    "check_integer",
    "check_number",
    "check_scalar",
    "check_temperature",
    "label_hint",
    "label_range",
    "plain_tensor",
    "refuse_forward_mode",
    "refuse_unknown",
    "refuse_without_memory",
    "suggest",
]

_LARGEST = sys.float_info.max
# Beyond, T^2 and logits / T leave float32's range, or keep too few of its digits.
_SMALLEST_TEMPERATURE = 1e-4
# What `ignore_index=None` is to the operators: int32 and uint8 cannot hold it, and no conversion
# makes it (NaN becomes -2**63).
_NOTHING = -(2**63) + 1


def check_number(value: object, name: str) -> float:
    """A finite number, as a float; NumPy's scalars are numbers too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {_kind(value)}, expected a number")
    value = value if isinstance(value, (int, float)) else float(value)
    if not -_LARGEST < value < _LARGEST:  # comparisons: a traced float knows nothing else
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return float(value)


def check_integer(value: object, name: str) -> int:
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        integer = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {_kind(value)}, expected an integer") from None
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"{name}: got {integer}, expected a 64-bit integer")
    return integer


def check_count(value: object, name: str, largest: int | None = None) -> int:
    """A positive integer."""
    integer = check_integer(value, name)
    if integer < 1:
        raise ValueError(f"{name}: got {integer}, expected a positive integer")
    if largest is not None and integer > largest:
        raise ValueError(f"{name}: got {integer}, expected at most {largest}")
    return integer


def check_flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {_kind(value)}, expected True or False")
    return value


def _kind(value: object) -> str:
    """What came, for an error: strings and None by value, others by type."""
    return repr(value) if value is None or isinstance(value, str) else type(value).__name__


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_temperature(value: object, name: str) -> float:
    """A temperature that float32 can divide by."""
    number = check_number(value, name)
    if not _SMALLEST_TEMPERATURE <= number <= 1.0 / _SMALLEST_TEMPERATURE:
        raise ValueError(
            f"{name}: got {number}, expected a number > 0, from {_SMALLEST_TEMPERATURE:g} "
            f"to {1.0 / _SMALLEST_TEMPERATURE:g}"
            + ("; tau is of the reliability, T of kd is temperature" if name == "tau" else "")
        )
    return number


def check_scalar(value: object, name: str) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected one element")
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name}: got {value.dtype}, expected a real number")
        check_constant(value, name)
    elif check_number(value, name) < 0.0:
        raise ValueError(f"{name}: got {value}, expected a number >= 0")


def check_constant(tensor: Tensor, name: str) -> None:
    """Raises where a derivative is expected of a tensor that gets none."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: requires grad, but no gradient is computed for it; pass .detach()"
        )
    refuse_forward_mode(tensor, name)


def refuse_forward_mode(tensor: Tensor, name: str) -> None:
    """Raises where an operator, or `detach`, would drop a tangent without a word."""
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name}: has a tangent (jvp, jacfwd), but heteroakd_fast losses have no forward-mode "
            "derivative; use reverse mode, or pass .detach()"
        )


def refuse_without_memory(tensor: Tensor, name: str) -> None:
    """Raises where a storage was freed or shrunk: operators of PyTorch would read beyond it."""
    if torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    try:
        size = tensor.untyped_storage().size()
    except NotImplementedError:  # what a transform wraps has its storage elsewhere
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    end = tensor.storage_offset() + sum((n - 1) * stride for n, stride in steps) + 1
    if end * tensor.element_size() > size:
        raise RuntimeError(
            f"{name}: the tensor has no memory: its storage has {size} bytes, expected "
            f"{end * tensor.element_size()}; it was freed (by a sharded trainer, resize_) or shrunk"
        )


def check_ignore_index(value: object) -> int:
    """The label to ignore as the operators take it, of an integer or, for nothing, None."""
    return _NOTHING if value is None else check_integer(value, "ignore_index")


def check_ignored_class(ignore_index: int | None, num_classes: int, allowed: bool) -> None:
    """Raises where the label to ignore is a class, and `allow_ignored_class` does not say so."""
    allowed = check_flag(allowed, "allow_ignored_class")
    if ignore_index is not None and not allowed and 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index: got {ignore_index}, which is also one of the {num_classes} classes; "
            "give a label that is no class, or ignore_index=None if no pixel is ignored; if the "
            "pixels of this class are to be excluded from the loss, set allow_ignored_class=True"
        )


def label_range(num_classes: int, ignore_index: int) -> str:
    """Where a wrong label is not, for a message about it."""
    if ignore_index == _NOTHING:
        return f"not in [0, {num_classes})"
    return f"neither in [0, {num_classes}) nor ignore_index={ignore_index}"


def suggest(name: str, known: Collection[str], renamed: Mapping[str, str]) -> str | None:
    """What a name that does not exist may stand for, as the end of a message."""
    if name in renamed:
        return f"it is called {renamed[name]} here"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    return f"did you mean {' or '.join(near)}?" if near else None


def refuse_unknown(
    unknown: Collection[str], known: Collection[str], renamed: Mapping[str, str]
) -> None:
    """Raises where there are keyword arguments that nothing reads.

    Raises:
        TypeError: names the first, and what it may stand for.
    """
    for name in unknown:
        hint = suggest(name, known, renamed) or f"expected {', '.join(known)}"
        raise TypeError(f"{name}: there is no such argument; {hint}")


def plain_tensor(tensor: _T) -> _T:
    """The same values and graph without the subclass, where that adds Python behaviour only.

    Labels of torchvision (`tv_tensors.Mask`) or MONAI and images of fastai are such: their own
    functions are not for a loss, and two that do not know each other cannot be in one call.
    Subclasses that dispatch (DTensor, fake and functional tensors) hold their values elsewhere,
    and stay as they are.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter) or not isinstance(tensor, Tensor):
        return tensor
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return Tensor.as_subclass(tensor, Tensor)  # type: ignore[return-value]


def label_hint(shape: torch.Size, num_classes: int) -> str:
    """What to do with labels that have one axis too many."""
    if len(shape) != 4:
        return ""
    if shape[1] == 1:
        return "; drop the channel axis with target.squeeze(1)"
    if shape[3] == 1:
        return "; drop the channel axis with target.squeeze(3)"
    if shape[1] == num_classes:
        return "; class indices are expected: of a one-hot target, target.argmax(1)"
    return ""


def axis_hint(shape: torch.Size, channels: int, name: str, tapped: bool = True) -> str:
    """What to do with a map whose channels are its last axis; empty where they are not.

    `tapped`: whether it may come out of a `FeatureTap`.
    """
    if len(shape) == 3 and shape[2] == channels:
        kind, options = "the tokens [B, N, D] of a transformer", 'layout="tokens", grid=(h, w)'
        change = f"{name}.transpose(1, 2).unflatten(2, (h, w)) without class tokens"
    elif len(shape) == 4 and shape[1] != channels and shape[3] == channels:
        kind, options = "a map [B, h, w, D]", 'layout="NHWC"'
        change = f"{name}.permute(0, 3, 1, 2)"
    else:
        return ""
    ways = f"FeatureTap(..., {options}), or {change}" if tapped else change
    return f"; its last axis has {channels}, as of {kind}: {ways}"
