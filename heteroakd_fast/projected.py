"""The 1x1 projections and the loss on the projected pair, fused (docs/method.md, sections 1 to 6).

`projected_distillation_loss` is the function; `projected_sums` one pass before means and weights,
for `functional.combine`. Two backends: `triton`, whose kernels (`kernels/projection.py`) never
store the projected logits, and `reference`, which is `reference.project` and
`reference.distillation_sums`. The operator `heteroakd_fast::projected_sums` stands where
`distillation_sums` stands for logits (`ops.py`), and saves nothing but its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from . import backends, functional, ops, reference
from .backends._gpu import check_labels
from .checks import (
    axis_hint,
    check_choice,
    check_flag,
    check_ignore_index,
    check_ignored_class,
    check_number,
    plain_tensor,
)
from .functional import Normalizer, WeightedPass
from .labels import check_synchronously, nearest_labels
from .output import DistillationOutput
from .projector import _no_autocast
from .spec import TERMS, LossSpec

if TYPE_CHECKING:
    from heteroakd_fast.kernels import projection

__all__ = [
    "PRECISIONS",
    "Projection",
    "fused_pass",
    "projected_distillation_loss",
    "projected_sums",
]

PRECISIONS: Final = ("ieee", "tf32x3", "tf32")
_BACKENDS: Final = (backends.AUTO, "triton", "reference")
_IF_POSSIBLE: Final = "triton if possible"  # not a name that callers have
_MOST_CLASSES: Final = 256
_OF_STUDENT: Final = ("ce", "kd", "hetero", "feature")


class Projection(NamedTuple):
    """Features and the 1x1 convolution over them."""

    features: Tensor
    """[B, D, h, w]"""
    weight: Tensor
    """[C, D] or, as `torch.nn.Conv2d` keeps it, [C, D, 1, 1]"""
    bias: Tensor | None
    """[C]"""


def projected_distillation_loss(
    student_features: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_features: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor,
    *,
    precision: str = "ieee",
    ce_weight: float = 1.0,
    teacher_ce_weight: float = 0.0,
    kd_weight: float = 0.0,
    hetero_weight: float = 0.0,
    feature_weight: float = 0.0,
    preset: str = "softmax-kl",
    temperature: float = 1.0,
    tau: float = 1.0,
    mix: str | None = None,
    evaluation: str | None = None,
    weight_axis: str = "class",
    kd_divergence: str = "forward",
    kd_beta: float = 0.5,
    ignore_index: int | None = 255,
    allow_ignored_class: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalizer: Normalizer | None = None,
    process_group: Any = None,
    return_maps: bool = False,
    backend: str | None = None,
) -> DistillationOutput:
    """`functional.distillation_loss` of z = W f + b at the features' resolution, in one kernel.

    Equal to projecting both features in float32 and calling `functional.distillation_loss` on the
    result, except that the backend "triton" never stores the projected logits. Whether that is
    faster depends on C and D: the header of `kernels/projection.py` has the count. Source:
    HeteroAKD (Huang et al., AAAI 2025, arXiv 2504.07691), from public descriptions of it.

    Args:
        student_features: [B, D_s, h, w], float32, bfloat16, float16 or float64, any strides.
        student_weight: [C, D_s] or [C, D_s, 1, 1], the same dtype choices, 1 <= C <= 4096.
        student_bias: [C] or None.
        teacher_features: [B, D_t, h, w], the student's grid, D_t free; never gets a gradient.
            None, with weight and bias, when no term needs the teacher.
        teacher_weight, teacher_bias: as the student's; only `teacher_ce` sends them a gradient.
        target: [B, h, w], int64, int32 or uint8; values in [0, C) or `ignore_index`.
        precision: how "triton" multiplies float32 on tensor cores: "ieee" not at all, "tf32x3" in
            three passes that keep about 22 bits, "tf32" in one that keeps 11. Products of two
            16-bit factors are exact in each of them; those of a 16-bit and a float32 factor take
            "tf32x3", which there loses nothing that float32 keeps, or "tf32" where that is asked.
        normalizer, process_group: as in `functional.distillation_loss`; so are the weights of the
            terms and all other options.
        backend: "auto", "triton" or "reference"; None leaves the choice to `use_backend`, the
            environment and the device. "triton" computes ce, teacher_ce, kd (forward), feature
            and hetero in the preset "softmax-kl", for C up to 256, no maps and no float64;
            "auto" gives anything else, and every CPU tensor, to "reference".

    Returns:
        `DistillationOutput`; `loss` is the weighted sum, differentiable once with respect to
        `student_features` and the weights and biases.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    weights = {
        "ce": ce_weight,
        "teacher_ce": teacher_ce_weight,
        "kd": kd_weight,
        "hetero": hetero_weight,
        "feature": feature_weight,
    }
    checked = {name: check_number(weights[name], f"{name}_weight") for name in TERMS}
    asked = {name: weight for name, weight in checked.items() if weight != 0.0}
    spec = LossSpec(
        terms=tuple(asked),
        preset=preset,
        mix=functional.resolve_mix(preset, mix),
        evaluation="discrepancy" if evaluation is None else evaluation,
        weight_axis=weight_axis,
        kd_divergence=kd_divergence,
        kd_beta=check_number(kd_beta, "kd_beta"),
        temperature=check_number(temperature, "temperature"),
        tau=check_number(tau, "tau"),
        ignore_index=check_ignore_index(ignore_index),
        label_smoothing=check_number(label_smoothing, "label_smoothing"),
        maps=check_flag(return_maps, "return_maps"),
    )
    functional.check_spec(spec)
    check_choice(precision, "precision", PRECISIONS)
    student = Projection(
        plain_tensor(student_features), plain_tensor(student_weight), plain_tensor(student_bias)
    )
    teacher = _teacher(
        plain_tensor(teacher_features),
        plain_tensor(teacher_weight),
        plain_tensor(teacher_bias),
        spec,
    )
    target, class_weight = plain_tensor(target), plain_tensor(class_weight)
    _check(student, teacher, target, class_weight, spec)
    check_ignored_class(ignore_index, student.weight.shape[0], allow_ignored_class)
    if not (spec.maps or any(TERMS[term].needs_teacher for term in spec.terms)):
        teacher = None
    if not {"ce", "teacher_ce"} & set(spec.terms):
        class_weight = None
    sums = projected_sums(
        student,
        teacher,
        target,
        class_weight,
        spec,
        precision,
        _select(backend, student, teacher, spec),
    )
    one = WeightedPass(
        sums,
        asked,
        spec,
        weighted_ce=class_weight is not None,
        dtype=_compute_dtype(student),
    )
    loss, (terms,), denominators = functional.combine([one], normalizer, process_group)
    return DistillationOutput(
        loss=loss, valid=sums.valid, maps=one.maps, denominators=denominators, **terms
    )


def fused_pass(
    student: Projection,
    teacher: Projection,
    target: Tensor,
    weights: Mapping[str, float],
    *,
    class_weight: Tensor | None,
    backend: str | None,
    **options: Any,
) -> WeightedPass | None:
    """The pass of `HeteroAKDLoss` over a projected pair at the features' resolution, or None where
    no kernel does all of it at once.

    target: [B, H, W] at any size; taken to the features' grid by nearest neighbour. options: fields
    of `LossSpec`, already checked.
    """
    asked = {name: weight for name, weight in weights.items() if weight != 0.0}
    spec = LossSpec(terms=tuple(name for name in TERMS if name in asked), **options)
    if student.features.shape[2:] != teacher.features.shape[2:] or not asked:
        return None
    if not _fuses(backend, student, teacher, spec):
        return None
    functional.check_target(target, student.weight.shape[0])
    if target.device.type == "cpu" or check_synchronously():
        ops.valid_count(target, student.weight.shape[0], spec.ignore_index)
    labels = nearest_labels(target, (student.features.shape[2], student.features.shape[3]))
    if not {"ce", "teacher_ce"} & set(spec.terms):
        class_weight = None
    _check(student, teacher, labels, class_weight, spec)
    sums = projected_sums(student, teacher, labels, class_weight, spec, "ieee", "triton")
    return WeightedPass(
        sums,
        asked,
        spec,
        weighted_ce=class_weight is not None,
        dtype=_compute_dtype(student),
    )


def _fuses(requested: str | None, student: Projection, teacher: Projection, spec: LossSpec) -> bool:
    """Whether the kernels that this call would take anyway can project too."""
    plain = backends.select(requested, spec, student.features.device.type)
    if plain != "triton":
        return False
    return _select(_IF_POSSIBLE, student, teacher, spec) == "triton"


# --- one pass ------------------------------------------------------------------------------------


def projected_sums(
    student: Projection,
    teacher: Projection | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    precision: str,
    backend: str,
) -> ops.SumsResult:
    """One pass on "triton" or "reference", its input checked already.

    Differentiable once: in the student's three tensors through every term but `teacher_ce`, in the
    teacher's weight and bias through `teacher_ce`.
    """
    if teacher is not None:
        teacher = _teacher_that_learns(teacher, "teacher_ce" in spec.terms)
    if backend == "reference":
        return _reference_sums(student, teacher, target, class_weight, spec)
    learns = any(term in _OF_STUDENT for term in spec.terms)
    wants = [
        torch.is_grad_enabled() and x is not None and x.requires_grad and of
        for x, of in (
            *((x, learns) for x in student),
            *((x, "teacher_ce" in spec.terms) for x in (teacher or _NOBODY)[1:]),
        )
    ]
    inputs = (*student, *(teacher or _NOBODY), target, class_weight)
    numerators, denominators, valid = torch.ops.heteroakd_fast.projected_sums(
        *(ops._not_inference(x) for x in inputs),
        **spec.options(),
        precision=precision,
        wants=wants,
    )
    maps = numerators.new_empty(0, dtype=torch.float32)
    return ops.SumsResult(numerators, denominators.detach(), valid, maps)


_NOBODY: Final = (None, None, None)


def _teacher_that_learns(teacher: Projection, learns: bool) -> Projection:
    """Without gradient to the features, nor to anything else unless a term asks for it."""
    features, weight, bias = teacher
    if not learns:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return Projection(features.detach(), weight, bias)


def _reference_sums(
    student: Projection,
    teacher: Projection | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> ops.SumsResult:
    with _no_autocast(target.device.type):
        return ops.distillation_sums(
            _project(student, target, spec),
            None if teacher is None else _project(teacher, target, spec),
            target,
            class_weight,
            spec,
            "reference",
        )


def _project(side: Projection, target: Tensor, spec: LossSpec) -> Tensor:
    """In float32 or wider. What ignored pixels hold would reach the weight's gradient, as 0 times
    it, which may be NaN."""
    dtype = _compute_dtype(side)
    features = torch.where((target != spec.ignore_index)[:, None], side.features.to(dtype), 0)
    bias = None if side.bias is None else side.bias.to(dtype)
    return reference.project(features, side.weight.flatten(1).to(dtype), bias)


def _compute_dtype(side: Projection) -> torch.dtype:
    both = torch.promote_types(side.features.dtype, side.weight.dtype)
    return torch.promote_types(both, torch.float32)


# --- checks and choice ---------------------------------------------------------------------------


def _teacher(
    features: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: LossSpec
) -> Projection | None:
    if features is not None and weight is not None:
        return Projection(features, weight, bias)
    given = {"teacher_features": features, "teacher_weight": weight, "teacher_bias": bias}
    if any(x is not None for x in given.values()):
        missing = "teacher_features" if features is None else "teacher_weight"
        others = ", ".join(name for name, x in given.items() if x is not None)
        raise ValueError(f"{missing}: got None beside {others}; give both or none of them")
    for term in spec.terms:
        if TERMS[term].needs_teacher:
            raise ValueError(
                f"teacher_features: got None, but {term}_weight is not 0; pass the teacher's "
                f"features and weight or set {term}_weight=0"
            )
    if spec.maps:
        raise ValueError("teacher_features: got None, but return_maps=True needs them")
    return None


def _check(
    student: Projection,
    teacher: Projection | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> None:
    _check_side(student, "student", student)
    classes = student.weight.shape[0]
    if not 1 <= classes <= functional.MAX_CLASSES:
        raise ValueError(
            f"student_weight: got C={classes} classes, expected 1 to {functional.MAX_CLASSES}"
        )
    functional.check_target(target, classes)
    _check_device(target, "target", student)
    batch, _, height, width = student.features.shape
    if target.shape != (batch, height, width):
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, student_features has (B, h, w) = "
            f"{(batch, height, width)}; take the labels on the features' grid"
        )
    if teacher is not None:
        _check_teacher(teacher, student)
    if class_weight is not None:
        functional.check_class_weight(class_weight, classes, student.features, "student_features")


def _check_teacher(teacher: Projection, student: Projection) -> None:
    _check_side(teacher, "teacher", student)
    features, own = teacher.features, student.features
    if (features.shape[0], *features.shape[2:]) != (own.shape[0], *own.shape[2:]):
        raise ValueError(
            f"teacher_features: got shape {tuple(features.shape)}, student_features has "
            f"{tuple(own.shape)}; both need the same B, h and w"
        )
    if teacher.weight.shape[0] != student.weight.shape[0]:
        raise ValueError(
            f"teacher_weight: got C={teacher.weight.shape[0]} classes, student_weight has "
            f"{student.weight.shape[0]}"
        )


def _check_side(side: Projection, name: str, student: Projection) -> None:
    dtypes = functional.LOGITS_DTYPES
    weight, hint = side.weight, ""
    if isinstance(side.features, Tensor) and isinstance(weight, Tensor) and weight.dim() > 1:
        hint = axis_hint(side.features.shape, weight.shape[1], f"{name}_features")
    functional.check_tensor(side.features, f"{name}_features", 4, "[B, D, h, w]", dtypes, hint)
    depth = side.features.shape[1]
    if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2:] == (1, 1):
        functional.check_tensor(weight, f"{name}_weight", 4, "[C, D, 1, 1]", dtypes)
    else:
        functional.check_tensor(weight, f"{name}_weight", 2, "[C, D] or [C, D, 1, 1]", dtypes)
    if depth < 1 or weight.shape[1] != depth:
        raise ValueError(
            f"{name}_weight: got D={weight.shape[1]} channels, {name}_features has {depth}{hint}"
        )
    _check_device(side.features, f"{name}_features", student)
    _check_device(weight, f"{name}_weight", student)
    if side.bias is None:
        return
    functional.check_tensor(side.bias, f"{name}_bias", 1, "[C]", dtypes)
    _check_device(side.bias, f"{name}_bias", student)
    if side.bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{name}_bias: got {side.bias.shape[0]} entries, expected C={weight.shape[0]}"
        )


def _check_device(tensor: Tensor, name: str, student: Projection) -> None:
    device = student.features.device
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, student_features on {device}; move one")


def _select(
    requested: str | None, student: Projection, teacher: Projection | None, spec: LossSpec
) -> str:
    """The backend's name; one that was named runs or says why not."""
    if requested not in (None, _IF_POSSIBLE):
        check_choice(requested, "backend", _BACKENDS)
    name = requested if requested is not None else backends._requests[-1].name
    wide = any(
        x is not None and x.dtype == torch.float64 for x in (*student, *(teacher or _NOBODY))
    )
    many = student.weight.shape[0] > _MOST_CLASSES
    device_type = student.features.device.type
    if torch.compiler.is_compiling():
        chosen: str = _choose_while_tracing(name, spec.structure(), device_type, wide, many)
        return chosen
    return _choose(name, spec.structure(), device_type, wide, many)


def _choose_while_tracing(
    name: str, structure: dict[str, Any], device_type: str, wide: bool, many: bool
) -> str:
    """The tracer can hand over plain constants, and must not look inside."""
    return _choose(name, structure, device_type, wide, many)


# As in `backends`: the decorator that does this would import the tracer with this module.
_choose_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(name: str, structure: dict[str, Any], device_type: str, wide: bool, many: bool) -> str:
    if name == "reference":
        return name
    # The interpreter computes on the CPU too, for tests; nobody should get it unasked.
    if name == backends.AUTO and "triton" not in backends.CANDIDATES.get(device_type, ()):
        return "reference"
    if name not in (*_BACKENDS, _IF_POSSIBLE):
        reason: str | None = "it has no fused projection."
    else:
        reason = backends.available()["triton"] or _refusal(structure, device_type, wide, many)
    if reason is None:
        return "triton"
    if name in (backends.AUTO, _IF_POSSIBLE):
        return "reference"
    raise backends.BackendUnavailableError(
        f"backend: {name!r} was asked for and cannot run this projection: {reason} "
        f"'reference' always works."
    )


def _refusal(structure: dict[str, Any], device_type: str, wide: bool, many: bool) -> str | None:
    """Why the kernels cannot run this call."""
    spec = LossSpec.from_options(structure)
    devices = backends.get("triton").devices()
    if device_type not in devices:
        return f"it computes on {' and '.join(devices)} tensors, these are on {device_type}."
    if wide:
        return "it multiplies matrices in float32 and 16 bits, not in float64."
    if many:
        return f"it keeps a pixel's classes together, {_MOST_CLASSES} at most."
    if "hetero" in spec.terms and spec.preset != "softmax-kl":
        return f"it computes hetero in the preset 'softmax-kl', not {spec.preset!r}."
    if "kd" in spec.terms and spec.kd_divergence != "forward":
        return f"it computes kd_divergence 'forward', not {spec.kd_divergence!r}."
    if spec.maps:
        return "it makes no maps."
    return None


# --- the operator --------------------------------------------------------------------------------

_library = torch.library.Library("heteroakd_fast", "FRAGMENT")
_INPUTS: Final = (
    "Tensor student_features, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_features, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor target, Tensor? class_weight"
)
# wants: whether student features, weight, bias, teacher weight, bias get a gradient.
_library.define(
    f"projected_sums({_INPUTS}, *, {ops.OPTIONS_SCHEMA}, str precision, bool[] wants) "
    "-> (Tensor numerators, Tensor denominators, Tensor valid)",
    tags=ops._TAGS,
)
# A gradient that was not asked for is an empty tensor.
_library.define(
    f"projected_sums_backward(Tensor grad_numerators, {_INPUTS}, *, {ops.OPTIONS_SCHEMA}, "
    "str precision, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=ops._TAGS,
)


def _sides(inputs: tuple[Tensor | None, ...]) -> tuple[projection.Side, projection.Side | None]:
    from heteroakd_fast.kernels import projection

    features, weight, bias = inputs[:3]
    assert features is not None
    assert weight is not None
    student = projection.Side(features, weight, bias)
    features, weight, bias = inputs[3:6]
    if features is None or weight is None:
        return student, None
    return student, projection.Side(features, weight, bias)


def _projected_sums_impl(
    *inputs: Tensor | None, precision: str, wants: list[bool], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from heteroakd_fast.kernels import projection

    spec = LossSpec.from_options(options)
    student, teacher = _sides(inputs)
    target, class_weight = inputs[6:]
    assert target is not None
    wide = any(x is not None and x.dtype == torch.float64 for x in inputs[:6])
    many = student.weight.shape[0] > _MOST_CLASSES
    reason = _refusal(spec.structure(), student.features.device.type, wide, many)
    if reason is not None:
        raise backends.BackendUnavailableError(f"projected_sums: {reason}")
    numerators = student.features.new_zeros(len(spec.terms), dtype=torch.float64)
    denominators = torch.zeros_like(numerators)
    report = student.features.new_zeros(2, dtype=torch.int64)
    if target.numel():
        projection.forward(
            student,
            teacher,
            target,
            class_weight,
            spec,
            precision,
            numerators,
            denominators,
            report,
        )
        check_labels(report, target, student.weight.shape[0], spec.ignore_index)
    return numerators, denominators, report[0].clone()


def _projected_sums_fake(
    student_features: Tensor, *inputs: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    terms = len(options["terms"])
    return (
        student_features.new_empty(terms, dtype=torch.float64),
        student_features.new_empty(terms, dtype=torch.float64),
        student_features.new_empty((), dtype=torch.int64),
    )


def _backward_impl(
    grad_numerators: Tensor,
    *inputs: Tensor | None,
    precision: str,
    wants: list[bool],
    **options: Any,
) -> tuple[Tensor, ...]:
    from heteroakd_fast.kernels import projection

    student, teacher = _sides(inputs)
    target, class_weight = inputs[6:]
    assert target is not None
    learners = (*inputs[:3], *inputs[4:6])
    if target.numel() == 0:
        return tuple(
            torch.zeros_like(x) if wanted and x is not None else grad_numerators.new_empty(0)
            for x, wanted in zip(learners, wants, strict=True)
        )
    of_student, of_teacher = projection.backward(
        student,
        teacher,
        target,
        class_weight,
        LossSpec.from_options(options),
        precision,
        grad_numerators.contiguous(),
        (wants[0], wants[1], wants[2]),
        (wants[3], wants[4]),
    )
    return tuple(
        grad_numerators.new_empty(0) if grad is None else grad
        for grad in (*of_student, *of_teacher[1:])
    )


def _backward_fake(
    grad_numerators: Tensor, *inputs: Tensor | None, wants: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    dense = torch.contiguous_format
    formats = (torch.preserve_format, dense, dense, dense, dense)
    return tuple(
        torch.empty_like(x, memory_format=memory_format)
        if wanted and x is not None
        else grad_numerators.new_empty(0)
        for x, wanted, memory_format in zip(
            (*inputs[:3], *inputs[4:6]), wants, formats, strict=True
        )
    )


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_numerators: Tensor, *unused: object) -> tuple[Tensor | None, ...]:
    ops._refuse_second_order()
    grads = torch.ops.heteroakd_fast.projected_sums_backward(
        grad_numerators, *ctx.saved_tensors, **ctx.options
    )
    features, weight, bias, teacher_weight, teacher_bias = (
        grad if wanted else None for grad, wanted in zip(grads, ctx.options["wants"], strict=True)
    )
    return features, weight, bias, None, teacher_weight, teacher_bias, None, None


_library.impl("projected_sums", _projected_sums_impl, ops._KEY)
_library.impl("projected_sums_backward", _backward_impl, ops._KEY)
torch.library.register_fake("heteroakd_fast::projected_sums", _projected_sums_fake, lib=_library)
torch.library.register_fake("heteroakd_fast::projected_sums_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "heteroakd_fast::projected_sums", _backward, setup_context=_setup_context, lib=_library
)
