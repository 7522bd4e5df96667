"""Launches of the projected pass (projection.py) and of its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from heteroakd_fast.backends import Call
from heteroakd_fast.projector import Projection
from heteroakd_fast.spec import Options
from heteroakd_fast.terms import HeteroAKD

from .launch import bits_of, device_of, finish, has_ptx, interpreted, power_of, terms_of
from .partials import ROW
from .projection import projected_pass
from .projection_gradients import add_splits, features_gradient, weight_gradient

__all__ = ["Gradients", "backward", "forward"]


class Gradients(NamedTuple):
    """Of one side; None where not asked for."""

    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Tile(NamedTuple):
    P: int
    """pixels"""
    BD: int
    """features"""
    BC: int
    """classes; all of them in `projected_pass`"""
    warps: int
    stages: int


def _pass_tile(classes: int, sixteen_bits: bool) -> _Tile:
    """Pixels of a program of `projected_pass` so that two tiles of z and what the epilogue makes of
    them stay in registers, by machine code for sm_90; features per step."""
    columns = _columns(classes)
    few = columns <= 64
    if sixteen_bits:
        pixels = 64 if columns <= 128 else 32
        return _Tile(pixels, 64 if few else 32, columns, 4 if few else 8, 3)
    pixels = {16: 64, 32: 64, 64: 32, 128: 32, 256: 16}[columns]
    return _Tile(pixels, 32, columns, 4 if few else 8, 2)


def _features_tile(classes: int) -> _Tile:
    return _Tile(64, 64, 32 if classes > 16 else 16, 4, 2)


def _weight_tile(classes: int) -> _Tile:
    return _Tile(32, 64, min(64, _columns(classes)), 8, 2)


# Programs of `weight_gradient`, about: enough for the largest GPUs, and the same on all of them.
_PROGRAMS = 256


def _columns(classes: int) -> int:
    columns: int = max(16, triton.next_power_of_2(classes))
    return columns


def _row(classes: int) -> int:
    """Floats of a pixel's row of g: whole sectors of memory."""
    return -(-classes // 8) * 8


def _is_flat(grid: Tensor) -> bool:
    """Whether a pixel's place is its number times the last stride."""
    return grid.shape[-2] == 1 or grid.stride(-2) == grid.shape[-1] * grid.stride(-1)


def _weight_of(side: Projection) -> Tensor:
    """[C, D] in the features' dtype if it has that, else float32: no number is rounded."""
    weight = side.weight.detach().flatten(1)
    if weight.dtype != side.features.dtype:
        weight = weight.float()
    return weight.contiguous()


def _precision(side: Projection, precision: str, both: bool) -> str:
    """both: whether the two factors have the features' dtype, else one of them is float32."""
    device = side.features.device
    if side.features.dtype == torch.float32 or both or precision != "ieee":
        return precision
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


class _Labels(NamedTuple):
    target: Tensor
    ignore_index: int


def _side_arguments(
    side: Projection | None, unused: Tensor
) -> tuple[list[Any], int, tuple[int, ...]]:
    """Pointers, depth and strides."""
    if side is None:
        return [unused, unused, unused], 1, (0, 0, 0, 0)
    bias = unused if side.bias is None else side.bias.detach().float().contiguous()
    features = side.features
    return [features, _weight_of(side), bias], features.shape[1], features.stride()


def _options(side: Projection | None, name: str, precision: str) -> dict[str, Any]:
    if side is None:
        return {name: False, f"{name}_BIAS": False, f"{name}_FLAT": True} | {
            f"{name}_PRECISION": precision
        }
    return {
        name: True,
        f"{name}_BIAS": side.bias is not None,
        f"{name}_FLAT": _is_flat(side.features),
        f"{name}_PRECISION": _precision(side, precision, side.weight.dtype == side.features.dtype),
    }


def _run_pass(
    student: Projection | None,
    teacher: Projection | None,
    labels: _Labels,
    class_weight: Tensor | None,
    options: Options,
    places: dict[str, int],
    scales: Tensor | None,
    student_gradient: Tensor | None,
    teacher_gradient: Tensor | None,
) -> Tensor:
    """Launches `projected_pass`; returns its partial sums, [2, programs, ROW]."""
    some = student if student is not None else teacher
    assert some is not None
    precision = some.precision
    hetero: HeteroAKD | None = options.find("hetero")
    temperature = next((t.temperature for t in options.terms if hasattr(t, "temperature")), 1.0)
    smoothing = [
        getattr(options.find(name), "label_smoothing", 0.0) for name in ("ce", "teacher_ce")
    ]
    target = labels.target
    batch, height, width = target.shape
    classes = some.weight.shape[0]
    sides = [side for side in (student, teacher) if side is not None]
    narrow = all(side.features.dtype != torch.float32 for side in sides)
    tile = _pass_tile(classes, narrow)
    tiles = -(-height * width // tile.P)
    grad = scales is not None
    partials = some.features.new_empty(
        (0,) if grad else (2, batch * tiles, int(ROW)), dtype=torch.float64
    )
    unused = partials
    student_pointers, student_depth, student_strides = _side_arguments(student, unused)
    teacher_pointers, teacher_depth, teacher_strides = _side_arguments(teacher, unused)
    if class_weight is not None:
        class_weight = class_weight.float().contiguous()
    projected_pass[(batch * tiles,)](
        *student_pointers,
        *teacher_pointers,
        target,
        unused if class_weight is None else class_weight,
        unused if scales is None else scales,
        unused if student_gradient is None else student_gradient,
        unused if teacher_gradient is None else teacher_gradient,
        partials,
        classes,
        height * width,
        tiles,
        width,
        student_depth,
        teacher_depth,
        *student_strides,
        *teacher_strides,
        *target.stride(),
        labels.ignore_index,
        bits_of(temperature),
        bits_of(1.0 if hetero is None else hetero.tau),
        *map(bits_of, smoothing),
        **_options(student, "STUDENT", precision),
        **_options(teacher, "TEACHER", precision),
        **{name.upper(): places.get(name, -1) for name in _TERMS},
        LABELS_FLAT=_is_flat(target),
        SMOOTHING=any(smoothing),
        WEIGHTED=class_weight is not None,
        MIX_LOGITS=hetero is not None and hetero.mix == "logits",
        MIX_TEACHER=hetero is not None and hetero.mix == "teacher",
        EVALUATION=hetero is None or hetero.evaluation == "discrepancy",
        POWER=power_of(temperature) if any(name in places for name in _OF_PAIR) else 0,
        GRAD=grad,
        PTX=has_ptx(some.features),
        WIDEN=interpreted(),
        P=tile.P,
        CP=tile.BC,
        GC=_row(classes),
        BD=tile.BD,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partials


_TERMS = ("ce", "teacher_ce", "kd", "hetero", "feature")
_OF_PAIR = ("kd", "hetero", "feature")


def _needed(
    student: Projection, teacher: Projection | None, places: dict[str, int]
) -> tuple[Projection | None, Projection | None]:
    """The sides that these terms read."""
    reads_student = any(name != "teacher_ce" for name in places)
    reads_teacher = any(name != "ce" for name in places)
    return student if reads_student else None, teacher if reads_teacher else None


def _sides(call: Call) -> tuple[Projection, Projection | None]:
    assert call.student_weight is not None
    student = Projection(call.student, call.student_weight, call.student_bias, call.precision)
    if call.teacher is None or call.teacher_weight is None:
        return student, None
    return student, Projection(call.teacher, call.teacher_weight, call.teacher_bias, call.precision)


def forward(call: Call, numerators: Tensor, denominators: Tensor, report: Tensor) -> None:
    """Writes the terms' sums into float64 vectors, and the label report into int64 [4]."""
    student, teacher = _sides(call)
    options = call.spec.options()
    places = {term.name: k for k, term in enumerate(options.asked)}
    with device_of(call.labels):
        partials = _run_pass(
            *_needed(student, teacher, places),
            _Labels(call.labels, options.ignore_index),
            call.class_weight,
            options,
            places,
            None,
            None,
            None,
        )
        for k, asked in enumerate(terms_of(options)):
            if k == 0 or asked:
                finish(
                    partials[k],
                    numerators,
                    denominators,
                    None if k else report,
                    partials.shape[1],
                    1,
                    call.classes,
                    asked,
                    call.class_weight is not None,
                )


def backward(call: Call, grad_totals: Tensor) -> list[Tensor | None]:
    """Gradients of features, weight and bias of the student and of the teacher; those asked for."""
    student, teacher = _sides(call)
    options = call.spec.options()
    wants = call.wants
    places = {
        term.name: k
        for k, term in enumerate(options.asked)
        if any(wants[3:] if term.name == "teacher_ce" else wants[:3])
    }
    of_student = of_teacher = Gradients(None, None, None)
    if not places:
        return [*of_student, *of_teacher]
    asked_groups = (group for group in options.groups if group >= 0)
    scales = torch.stack(
        [
            grad_totals[group] * term.weight
            for term, group in zip(options.asked, asked_groups, strict=True)
        ]
    )
    labels = _Labels(call.labels, options.ignore_index)
    shape = (*call.labels.shape[:1], call.labels[0].numel(), _row(call.classes))
    with device_of(call.labels):
        student_g, teacher_g = (
            call.student.new_empty(shape, dtype=torch.float32) if wanted else None
            for wanted in (any(name != "teacher_ce" for name in places), "teacher_ce" in places)
        )
        _run_pass(
            *_needed(student, teacher, places),
            labels,
            call.class_weight,
            options,
            places,
            scales,
            student_g,
            teacher_g,
        )
        if student_g is not None:
            of_student = _gradients(student, student_g, labels, *wants[:3])
        if teacher_g is not None:
            assert teacher is not None
            of_teacher = _gradients(teacher, teacher_g, labels, False, *wants[4:])
    return [*of_student, *of_teacher]


def _gradients(
    side: Projection,
    g: Tensor,
    labels: _Labels,
    of_features: bool,
    of_weight: bool,
    of_bias: bool,
) -> Gradients:
    precision = _precision(side, side.precision, both=False)
    features = _features_gradient(side, g, precision) if of_features else None
    weight = bias = None
    if of_weight or of_bias:
        weight, bias = _weight_gradient(side, g, labels, precision)
    return Gradients(features, weight if of_weight else None, bias if of_bias else None)


def _features_gradient(side: Projection, g: Tensor, precision: str) -> Tensor:
    out = torch.empty_like(side.features)
    batch, depth, height, width = out.shape
    classes = side.weight.shape[0]
    tile = _features_tile(classes)
    tiles = -(-height * width // tile.P)
    features_gradient[(batch * tiles, -(-depth // tile.BD))](
        g,
        _weight_of(side),
        out,
        classes,
        height * width,
        tiles,
        width,
        depth,
        *out.stride(),
        FLAT=_is_flat(out),
        WIDEN=interpreted(),
        PRECISION=precision,
        P=tile.P,
        BC=tile.BC,
        GC=g.shape[2],
        BD=tile.BD,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _weight_gradient(
    side: Projection, g: Tensor, labels: _Labels, precision: str
) -> tuple[Tensor, Tensor | None]:
    batch, depth, height, width = side.features.shape
    target = labels.target
    classes = side.weight.shape[0]
    tile = _weight_tile(classes)
    tiles = -(-height * width // tile.P)
    blocks = -(-depth // tile.BD), -(-classes // tile.BC)
    per_split = -(-batch * tiles // max(1, _PROGRAMS // (blocks[0] * blocks[1])))
    splits = -(-batch * tiles // per_split)
    partials = g.new_empty((splits, classes, depth + 1))
    weight_gradient[(blocks[0], blocks[1], splits)](
        g,
        side.features,
        target,
        partials,
        classes,
        height * width,
        tiles,
        batch * tiles,
        per_split,
        width,
        depth,
        *side.features.stride(),
        *target.stride(),
        labels.ignore_index,
        FLAT=_is_flat(side.features),
        LABELS_FLAT=_is_flat(target),
        WIDEN=interpreted(),
        PRECISION=precision,
        P=tile.P,
        BC=tile.BC,
        GC=g.shape[2],
        BD=tile.BD,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    weight = torch.empty_like(side.weight, memory_format=torch.contiguous_format)
    bias = None if side.bias is None else torch.empty_like(side.bias)
    block = 256
    add_splits[(-(-classes * (depth + 1) // block),)](
        partials,
        weight,
        partials if bias is None else bias,
        classes,
        depth,
        splits,
        BIAS=bias is not None,
        BLOCK=block,
    )
    return weight, bias
