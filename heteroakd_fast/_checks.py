"""Checks of single arguments, and what to say about one that cannot be used."""

from __future__ import annotations

import difflib
import numbers
import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .projector import PRECISIONS, Projection

if TYPE_CHECKING:
    from .backends import Call

_T = TypeVar("_T")

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


def check_weight(value: object, name: str) -> float:
    """A weight of a term."""
    number = check_number(value, name)
    if number < 0.0:
        raise ValueError(f"{name}: got {number}, expected a number >= 0; 0 leaves the term out")
    return number


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
    if value is None or isinstance(value, str):
        return repr(value)
    kind = type(value)  # of NumPy's bool the name alone is that of Python's
    return f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
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
    end = tensor.storage_offset() + tensor.numel()
    if not tensor.is_contiguous():
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


def check_unlabelled_index(value: int | None, ignore_index: int, num_classes: int) -> int:
    """The label of unlabelled pixels as the operators take it: `ignore_index` for none.

    ignore_index: as `check_ignore_index` returns it.
    """
    if value is None:
        return ignore_index
    if value == ignore_index:
        raise ValueError(
            f"unlabelled_index: got {value}, which is also ignore_index; pixels of that label are "
            "excluded from every term, so give another label to those that only the teacher labels"
        )
    if 0 <= value < num_classes:
        raise ValueError(
            f"unlabelled_index: got {value}, which is also one of the {num_classes} classes; give "
            "a label that is no class, such as 254"
        )
    return value


def label_range(num_classes: int, ignore_index: int, unlabelled_index: int) -> str:
    """Where a wrong label is not, for a message about it."""
    allowed = [f"in [0, {num_classes})"]
    if ignore_index != _NOTHING:
        allowed.append(f"ignore_index={ignore_index}")
    if unlabelled_index != ignore_index:
        allowed.append(f"unlabelled_index={unlabelled_index}")
    return f"neither {' nor '.join(allowed)}" if len(allowed) > 1 else f"not {allowed[0]}"


def suggest(name: str, known: Collection[str], renamed: Mapping[str, str]) -> str | None:
    """What a name that does not exist may stand for, as the end of a message."""
    if name in renamed:
        return f"it is called {renamed[name]} here"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    return f"did you mean {' or '.join(near)}?" if near else None


def refuse_unknown(
    unknown: Collection[str],
    known: Collection[str],
    renamed: Mapping[str, str],
    what: str = "argument",
) -> None:
    """Raises where there are keyword arguments that nothing reads; `what` they are.

    Raises:
        TypeError: names the first, and what it may stand for.
    """
    for name in unknown:
        hint = suggest(name, known, renamed) or f"expected {', '.join(known)}"
        raise TypeError(f"{name}: there is no such {what}; {hint}")


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


def label_hint(shape: torch.Size, num_classes: int, floating: bool) -> str:
    """What to do with labels that have one axis too many."""
    if len(shape) != 4:
        return ""
    if shape[1] == 1:
        return "; drop the channel axis with target.squeeze(1)"
    if shape[3] == 1:
        return "; drop the channel axis with target.squeeze(3)"
    if num_classes in (shape[1], shape[3]):
        axis = 1 if shape[1] == num_classes else 3
        order = "the order is (student_logits, target, teacher_logits), " if floating else ""
        return f"; {order}class indices are expected: of a one-hot target, target.argmax({axis})"
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


# --- tensors of a loss ---------------------------------------------------------------------------

LOGITS_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES: Final = (torch.int64, torch.int32, torch.uint8)
MAX_CLASSES: Final = 4096
#: Of any axis; the kernels number rows and columns in 32 bits, and have tables of 36 bytes a row.
LARGEST_SIZE: Final = 2**28
RESOLUTIONS: Final = ("label", "logits")


def check_tensor(
    tensor: object,
    name: str,
    rank: int,
    shape: str,
    dtypes: Sequence[torch.dtype],
    hint: str = "",
) -> Tensor:
    """Type, rank and dtype of one argument; `hint` is for one of another rank."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: got {type(tensor).__name__}, expected a tensor {shape}"
            + _tensor_hint(tensor, name)
        )
    if _is_dtensor(tensor):
        raise TypeError(
            f"{name}: got a DTensor; pass its local shard (`.to_local()`) and process_group= for "
            "global denominators"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name}: got {kind}, expected a dense tensor {shape}")
    if tensor.dim() != rank:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {rank} dimensions {shape}"
            + (hint or _rank_hint(tensor, name, rank, dtypes))
        )
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{name}: got {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}"
            + _dtype_hint(tensor.dtype, name)
        )
    if not torch.compiler.is_compiling() and max(tensor.shape) > LARGEST_SIZE:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected sizes up to {LARGEST_SIZE}"
        )
    refuse_without_memory(tensor, name)
    refuse_forward_mode(tensor, name)
    return tensor


def _tensor_hint(value: object, name: str) -> str:
    """What to do with what is no tensor."""
    if isinstance(value, Mapping):
        keys = [key for key in ("logits", "out") if key in value]
        return f"; take the logits out of it, {name}[{keys[0]!r}]" if keys else ""
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"; give one of its tensors, or torch.stack({name})"
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
        return f"; convert it with torch.as_tensor({name})"
    return ""


def _rank_hint(tensor: Tensor, name: str, rank: int, dtypes: Sequence[torch.dtype]) -> str:
    """What to do with one image, or with labels in the place of logits."""
    if rank < 3 or tensor.dim() != rank - 1:
        return ""
    if tensor.dtype not in dtypes:
        return "; these look like labels, which are the argument `target`" if rank == 4 else ""
    return f"; of a single image, add the batch axis: {name}[None]"


def _dtype_hint(dtype: torch.dtype, name: str) -> str:
    """What to do with another dtype."""
    if name == "target":
        floating = (
            "; class indices are expected, no probabilities" if dtype.is_floating_point else ""
        )
        return f"{floating}; if these are class indices, convert them with target.long()"
    if dtype.is_complex:
        return f"; take its real part, {name}.real"
    return f"; convert it with {name}.float()"


def check_target(target: object, num_classes: int) -> None:
    """Type, rank and dtype of labels, before they meet the logits of `num_classes`."""
    hint = ""
    if isinstance(target, Tensor):
        hint = label_hint(target.shape, num_classes, target.is_floating_point())
    check_tensor(target, "target", 3, "[B, H, W]", LABEL_DTYPES, hint)


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


Side = Tensor | Projection


def plain_side(side: Side) -> Side:
    """`plain_tensor` of logits, or of the tensors of a projection."""
    if not isinstance(side, Projection):
        return plain_tensor(side)
    features, weight, bias, precision = side
    return Projection(plain_tensor(features), plain_tensor(weight), plain_tensor(bias), precision)


def classes_of(side: Side) -> int:
    return side.weight.shape[0] if isinstance(side, Projection) else side.shape[1]


def tensor_of(side: Side) -> Tensor:
    """The logits or features: batch, grid, device."""
    return side.features if isinstance(side, Projection) else side


def check_sides(
    student: object, target: object, teacher: object, called: str = "student_logits"
) -> int:
    """Types, shapes and devices of what every loss takes; returns the number of classes.

    called: the caller's name of the first.
    """
    student_side = check_side(student, called)
    classes = classes_of(student_side)
    check_target(target, classes)
    assert isinstance(target, Tensor)
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{called}: got C={classes} classes, expected 1 to {MAX_CLASSES}")
    _check_beside(target, "target", tensor_of(student_side), called)
    _check_grid(tensor_of(student_side), called, target)
    if teacher is None:
        return classes
    teacher_side = check_side(teacher, "teacher_logits", "[B, C, h', w']")
    _check_beside(tensor_of(teacher_side), "teacher_logits", tensor_of(student_side), called)
    if classes_of(teacher_side) != classes:
        shape = tensor_of(teacher_side).shape
        hint = axis_hint(shape, classes, "teacher_logits", tapped=False)
        raise ValueError(
            f"teacher_logits: got C={classes_of(teacher_side)} classes, student_logits has "
            f"{classes}"
            + (
                hint
                or "; to distil from a teacher of other classes, project features: HeteroAKDLoss "
                "with student_channels, teacher_channels and kd_weight=0"
            )
        )
    _check_grid(tensor_of(teacher_side), "teacher_logits", target)
    return classes


def check_side(side: object, name: str, shape: str = "[B, C, h, w]") -> Side:
    """Logits, or the tensors of a projection."""
    if not isinstance(side, Projection):
        return check_tensor(side, name, 4, shape, LOGITS_DTYPES)
    features, weight, bias, precision = side
    check_choice(precision, f"{name}.precision", PRECISIONS)
    hint = ""
    if isinstance(features, Tensor) and isinstance(weight, Tensor) and weight.dim() > 1:
        hint = axis_hint(features.shape, weight.shape[1], f"{name}.features")
    check_tensor(features, f"{name}.features", 4, "[B, D, h, w]", LOGITS_DTYPES, hint)
    if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2:] == (1, 1):
        check_tensor(weight, f"{name}.weight", 4, "[C, D, 1, 1]", LOGITS_DTYPES)
    else:
        check_tensor(weight, f"{name}.weight", 2, "[C, D] or [C, D, 1, 1]", LOGITS_DTYPES)
    depth = features.shape[1]
    if depth < 1 or weight.shape[1] != depth:
        raise ValueError(
            f"{name}.weight: got D={weight.shape[1]} channels, {name}.features has {depth}{hint}"
        )
    if bias is not None:
        check_tensor(bias, f"{name}.bias", 1, "[C]", LOGITS_DTYPES)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{name}.bias: got {bias.shape[0]} entries, expected C={weight.shape[0]}"
            )
    for other, part in ((weight, "weight"), (bias, "bias")):
        if other is not None and other.device != features.device:
            raise ValueError(
                f"{name}.{part}: is on {other.device}, {name}.features on {features.device}; "
                "move one"
            )
    return side


def check_teacher(
    teacher: Side | None,
    names: Collection[str],
    maps: bool,
    weights: Mapping[str, str],
    hint: str = "",
) -> None:
    """That it is there for the terms of these names, which need one, and requires no gradient that
    none sends.

    weights: how the caller calls the weights of terms; hint: for one who has no teacher.
    """
    if teacher is None:
        for name in names:
            weight = weights[name.rstrip("0123456789").rstrip("_")]
            raise ValueError(
                f"teacher_logits: got None, but {weight} is not 0; pass the teacher's "
                f"logits or set {weight} to 0{hint}"
            )
        if maps:
            raise ValueError("teacher_logits: got None, but return_maps=True needs them")
        return
    learns = any(name.startswith("teacher_ce") for name in names)
    if isinstance(teacher, Tensor) and teacher.requires_grad and not learns:
        raise ValueError(
            "teacher_logits: requires grad, but only the term teacher_ce sends it one; run "
            "the teacher under torch.no_grad() or pass .detach()"
            + (f", or set {weights['teacher_ce']} above 0" if "teacher_ce" in weights else "")
        )


def check_class_weight(class_weight: Tensor, classes: int, logits: Tensor, called: str) -> None:
    """logits: the tensor whose device it must be on, `called` so."""
    check_tensor(class_weight, "class_weight", 1, "[C]", LOGITS_DTYPES)
    check_constant(class_weight, "class_weight")
    if class_weight.shape[0] != classes:
        raise ValueError(f"class_weight: got {class_weight.shape[0]} entries, expected C={classes}")
    check_device(class_weight, "class_weight", logits, called)


def check_pixel_weight(pixel_weight: object, target: Tensor, logits: Tensor, called: str) -> None:
    """Type, shape and device; the kernels check the values, as those of labels."""
    hint = ""
    if isinstance(pixel_weight, Tensor) and pixel_weight.dim() == 4 and pixel_weight.shape[1] == 1:
        hint = "; drop the channel axis with pixel_weight.squeeze(1)"
    tensor = check_tensor(pixel_weight, "pixel_weight", 3, "[B, H, W]", LOGITS_DTYPES, hint)
    check_constant(tensor, "pixel_weight")
    if tensor.shape != target.shape:
        raise ValueError(
            f"pixel_weight: got shape {tuple(tensor.shape)}, expected that of target, "
            f"{tuple(target.shape)}"
        )
    check_device(tensor, "pixel_weight", logits, called)


def _check_beside(tensor: Tensor, name: str, logits: Tensor, called: str) -> None:
    if tensor.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{name}: got batch {tensor.shape[0]}, {called} has batch {logits.shape[0]}"
        )
    check_device(tensor, name, logits, called)


def check_device(tensor: Tensor, name: str, logits: Tensor, called: str) -> None:
    if tensor.device != logits.device:
        raise ValueError(
            f"{name}: is on {tensor.device}, {called} on {logits.device}; "
            f"move it with .to({str(logits.device)!r})"
        )


def _check_grid(logits: Tensor, name: str, target: Tensor) -> None:
    if target.numel() and 0 in logits.shape[2:]:
        raise ValueError(
            f"{name}: got an empty grid {tuple(logits.shape[2:])} for a target of "
            f"{tuple(target.shape[1:])}"
        )


def check_call(call: Call) -> None:
    """What a kernel would read out of bounds, or not notice, where the operator is called directly;
    a loss has said it in better words before.

    Raises:
        ValueError: names the argument.
    """
    options = call.spec.options()  # of which it raises what is wrong
    student, target, teacher = call.student, call.labels, call.teacher
    if student.dim() != 4 or target.dim() != 3 or target.shape[0] != student.shape[0]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)} beside {tuple(student.shape)}, expected "
            "[B, H, W] beside [B, C, h, w]"
        )
    if target.dtype not in LABEL_DTYPES:
        raise ValueError(f"target: got {target.dtype}, expected int64, int32 or uint8")
    if options.needs_teacher and teacher is None:
        raise ValueError(f"teacher: got None, {[term.name for term in options.terms]} need it")
    sides = [(student, call.student_weight, call.student_bias)]
    if teacher is not None:
        sides.append((teacher, call.teacher_weight, call.teacher_bias))
    for features, weight, bias in sides:
        if features.dim() != 4 or features.shape[0] != student.shape[0]:
            raise ValueError(f"teacher: got shape {tuple(features.shape)}, expected the same B")
        classes = features.shape[1] if weight is None else len(weight)
        if classes != call.classes or (weight is None) == call.projected:
            raise ValueError(f"teacher: got C={classes}, expected {call.classes}, as the student")
        if weight is not None and weight.flatten(1).shape != (classes, features.shape[1]):
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [C, D]")
        if bias is not None and bias.shape != (classes,):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [C]")
        if weight is not None and features.shape[2:] != target.shape[1:]:
            raise ValueError(f"target: got {tuple(target.shape)}, expected the features' grid")
    if call.class_weight is not None and call.class_weight.shape != (call.classes,):
        raise ValueError(f"class_weight: got shape {tuple(call.class_weight.shape)}, expected [C]")
    if call.pixel_weight is not None:
        check_pixel_weight(call.pixel_weight, target, student, "student")
    if options.unlabelled_index != options.ignore_index:
        check_unlabelled_index(options.unlabelled_index, options.ignore_index, call.classes)
    tensors = (*call[1:6], target, call.class_weight)
    if any(x is not None and x.device != student.device for x in tensors):
        raise ValueError(f"student: on {student.device}, other arguments are not")
    if len(call.wants) != 6:
        raise ValueError(f"wants: got {len(call.wants)} flags, expected 6")
