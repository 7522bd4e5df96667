"""How a pass is cut into programs, and its launches: where the kernels meet torch.

Nothing here waits for the GPU or looks at data: shapes decide everything, so forward and backward
can be captured in a CUDA graph. Launches of a pass: the kernel, its careful twin (which returns at
once where no tile asked for it), and the sums.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from heteroakd_fast.spec import LossSpec

from . import config
from .combine import combine_gradients, finish_sums
from .distillation import BITS_MASK, ROW, distillation_pass
from .interpolation import CORNERS, DIRECT, GATHER
from .space import collect, reduce

__all__ = ["Run", "backward", "forward", "interpreted", "patch_shape"]

_NO_TEACHER = -1
_INT32 = 2**31 - 1


class Run(NamedTuple):
    """One run of the pass over a pair of logits; terms as in `backends/_parts.py`."""

    logits: Tensor
    """[B, C, h, w]"""
    teacher: Tensor | None
    """[B, C, h', w']"""
    terms: tuple[str, ...]
    """of ce, kd, hetero, feature"""
    slots: tuple[int, int, int, int]
    """place of each term's gradient among the saved ones; -1 without"""
    places: tuple[int, int, int, int]
    """place of each term among the call's; -1 without"""
    spec: LossSpec


def interpreted() -> bool:
    """Whether the kernels are run by Triton's interpreter, on the CPU."""
    return not isinstance(distillation_pass, triton.JITFunction)


def _heavy(run: Run) -> bool:
    """Whether a thread keeps more per pixel than sixteen of them leave room for."""
    spec = run.spec
    hetero = "hetero" in run.terms or spec.maps
    return "feature" in run.terms or (
        hetero and (spec.preset == "paper" or spec.mix == "logits" or spec.maps)
    )


def _tiling(run: Run, target: Tensor) -> config.Tiling:
    key = config.key_of(run.logits, run.teacher, target, _heavy(run))
    launch = config.launch_config(key, run.logits.shape[1], _device_name(run.logits.device))
    h, w = run.logits.shape[2:]
    label_h, label_w = target.shape[1:]
    return config.tiling((h, w), (label_h, label_w), run.spec.align_corners, launch)


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type


def patch_shape(run: Run, target: Tensor) -> tuple[int, ...]:
    """Shape of what a run saves for backward; decided by the shapes alone, because compiled graphs
    outlive tables of launches. Of each term, image and class TI + 1 rows for every
    TI rows of cells, because the last cell's bottom belongs to the next chunk's first logits."""
    batch, classes, h, w = run.logits.shape
    ti = config.rows_of_program((h, w), (target.shape[1], target.shape[2]), run.spec.align_corners)
    return len(run.terms), batch, classes, -(-(h + 1) // ti), ti + 1, w


def _integer(largest: int) -> tl.dtype:
    """For offsets up to `largest`; those of planes and images are 64 bits wide in any case."""
    return tl.int64 if largest > _INT32 else tl.int32


@cache
def _lanes(device: torch.device) -> int:
    """Threads of a warp, as Triton counts them: each takes one cell."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))
    return 32


def _bits(value: float) -> int:
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits ^ int(BITS_MASK)


def _source(logits: Tensor, cells: Tensor, target: Tensor) -> int:
    if logits.shape[2:] == target.shape[1:]:
        return int(DIRECT)
    return int(CORNERS) if logits.shape[2:] == cells.shape[2:] else int(GATHER)


def _reads_rows(logits: Tensor, source: int) -> Tensor:
    """Neighbouring lanes read neighbouring columns: of channels_last logits each from a line of its
    own, so that a (low-resolution) copy is the faster way. On the label grid the loop over the
    classes finds the rest of such a line in the cache."""
    return logits if source == int(DIRECT) or logits.stride(3) == 1 else logits.contiguous()


def _extent(tensor: Tensor, dims: tuple[int, ...]) -> int:
    return sum((tensor.shape[d] - 1) * abs(tensor.stride(d)) for d in dims) + 1


@contextmanager
def _device_of(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device."""
    if tensor.device.type == "cpu":
        yield
        return
    with torch.get_device_module(tensor.device).device(tensor.device):
        yield


class _Geometry(NamedTuple):
    """Arguments that the kernels over tiles share."""

    programs: int
    """per image"""
    grid: tuple[int]
    positional: list[Any]
    tiles: dict[str, Any]
    student: Tensor
    teacher: Tensor


def _geometry(run: Run, target: Tensor, gradients: bool) -> _Geometry:
    logits = run.logits
    teacher = logits if run.teacher is None else run.teacher
    source = int(DIRECT) if logits.shape[2:] == target.shape[1:] else int(CORNERS)
    teacher_source = _NO_TEACHER if run.teacher is None else _source(teacher, logits, target)
    tiling = _tiling(run, target)
    batch, classes, h, w = logits.shape
    label_h, label_w = target.shape[1:]
    if source == int(DIRECT):
        rows, per_row = label_h, -(-label_w // tiling.S)
    else:
        rows, per_row = h + 1, w + 1
    columns = -(-rows // tiling.TI) * per_row
    halo = int(gradients and source == int(CORNERS))
    lanes = _lanes(logits.device)
    programs = -(-columns // (tiling.N * (lanes - halo)))
    logits = _reads_rows(logits, source)
    teacher = logits if run.teacher is None else _reads_rows(teacher, teacher_source)
    largest = max(
        _extent(logits, (2, 3)),
        _extent(teacher, (2, 3)),
        _extent(target, (1, 2)),
        # numerators of positions, and the gradient's own plane
        2 * (label_h + 1) * (max(h, teacher.shape[2]) + 1),
        2 * (label_w + 1) * (max(w, teacher.shape[3]) + 1),
        (columns + 2 * per_row) * (tiling.TI + 1),
        label_h * label_w,
    )
    positional = [
        programs,
        classes,
        label_h,
        label_w,
        h,
        w,
        teacher.shape[2],
        teacher.shape[3],
        rows,
        columns,
        per_row,
        *logits.stride(),
        *teacher.stride(),
        *target.stride(),
    ]
    tiles = {
        "STUDENT": source,
        "TEACHER": teacher_source,
        "ALIGN_CORNERS": run.spec.align_corners,
        **tiling._asdict(),
        "L": lanes,
        "INT": _integer(largest),
        "FLOAT": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "num_warps": tiling.N,
        # products and sums become multiply-adds: the oracle's accuracy does not depend on it, the
        # number of instructions does
        "enable_fp_fusion": True,
    }
    return _Geometry(programs, (programs * batch,), positional, tiles, logits, teacher)


def _space_statistics(
    run: Run, target: Tensor, geometry: _Geometry, halo: int
) -> tuple[Tensor, Tensor]:
    batch, classes = run.logits.shape[:2]
    dtype = torch.promote_types(run.logits.dtype, torch.float32)
    programs = geometry.programs
    found = run.logits.new_empty((batch, programs, classes, 2), dtype=dtype)
    shift = run.logits.new_empty((batch, classes), dtype=dtype)
    weight = torch.empty_like(shift)
    collect[geometry.grid](
        geometry.student,
        geometry.teacher,
        target,
        found,
        *geometry.positional,
        run.spec.ignore_index,
        HALO=halo,
        MIX_TEACHER=run.spec.mix == "teacher",
        PTX=_has_ptx(run.logits),
        **geometry.tiles,
    )
    block = 64
    reduce[(batch, -(-classes // block))](
        found, shift, weight, programs, classes, BLOCK=block, FLOAT=geometry.tiles["FLOAT"]
    )
    return shift, weight


def _has_ptx(logits: Tensor) -> bool:
    return logits.device.type == "cuda" and torch.version.hip is None


def _power(temperature: float) -> int:
    return int(temperature) if temperature in (1.0, 2.0, 4.0) else 0


def _launch(
    run: Run,
    target: Tensor,
    class_weight: Tensor | None,
    gradient: Tensor | None,
    grad_numerators: Tensor | None,
    maps: Tensor | None,
) -> tuple[Tensor, int]:
    """Both kernels of the pass; returns the rows of partial sums and the programs per image."""
    spec = run.spec
    geometry = _geometry(run, target, gradient is not None)
    direct = geometry.tiles["STUDENT"] == int(DIRECT)
    programs = geometry.programs
    partials = run.logits.new_empty((geometry.grid[0], int(ROW)), dtype=torch.float64)
    wants_hetero = "hetero" in run.terms or maps is not None
    hetero = 0
    if wants_hetero:
        hetero = 1 if spec.preset == "softmax-kl" else 2 if spec.weight_axis == "class" else 3
    evaluation = spec.evaluation == "discrepancy"
    unused = partials
    shift = weight = unused
    if hetero == 3 and evaluation and "hetero" in run.terms:
        halo = int(gradient is not None and not direct)
        shift, weight = _space_statistics(run, target, geometry, halo)
    if class_weight is not None:
        class_weight = class_weight.to(
            torch.promote_types(run.logits.dtype, torch.float32)
        ).contiguous()
    slots = run.places if direct else run.slots
    kd = {"forward": 1, "reverse": 2, "js": 3}[spec.kd_divergence] if "kd" in run.terms else 0
    arguments = [
        geometry.student,
        geometry.teacher,
        target,
        unused if class_weight is None else class_weight,
        unused if gradient is None else gradient,
        unused if grad_numerators is None else grad_numerators,
        unused if maps is None else maps,
        partials,
        shift,
        weight,
        *geometry.positional,
        *((0, 0, 0, 0) if gradient is None or not direct else gradient.stride()),
        spec.ignore_index,
        _bits(spec.temperature),
        _bits(spec.tau),
        _bits(spec.kd_beta),
        _bits(spec.label_smoothing),
    ]
    options = {
        "WHOLE": direct and target.shape[2] % geometry.tiles["S"] == 0,
        "SAME_TAPS": geometry.tiles["TEACHER"] == int(CORNERS)
        and geometry.student.stride()[2:] == geometry.teacher.stride()[2:],
        "CE": "ce" in run.terms,
        "SMOOTHING": spec.label_smoothing != 0.0,
        "WEIGHTED": class_weight is not None,
        "KD": kd,
        "HETERO": hetero,
        "HETERO_TERM": "hetero" in run.terms,
        "MIX_LOGITS": hetero == 1 and spec.mix == "logits",
        "MIX_TEACHER": hetero > 0 and spec.mix == "teacher",
        "EVALUATION": evaluation,
        "FEATURE": "feature" in run.terms,
        "MAPS": maps is not None,
        "POWER": _power(spec.temperature),
        "GRAD": gradient is not None,
        "SLOT_CE": slots[0],
        "SLOT_KD": slots[1],
        "SLOT_HETERO": slots[2],
        "SLOT_FEATURE": slots[3],
        "PTX": _has_ptx(run.logits),
        "PICK_LABEL": run.logits.shape[1] < config.MANY_CLASSES,
    }
    for careful in (False, True):
        distillation_pass[geometry.grid](
            *arguments,
            **options,
            CAREFUL=careful,
            **geometry.tiles,
        )
    return partials, programs


def forward(
    run: Run,
    target: Tensor,
    class_weight: Tensor | None,
    numerators: Tensor,
    denominators: Tensor,
    report: Tensor | None,
    maps: Tensor | None,
    compute_grad: bool,
) -> Tensor | None:
    """Writes the run's sums into [K] float64 tensors, the label report (int64 [2]) and the maps
    ([2, B, H, W]); returns the gradients to save, [terms, B, C, rows, w], where there are any."""
    saved = None
    with _device_of(run.logits):
        if compute_grad and run.logits.shape[2:] != target.shape[1:]:
            dtype = torch.promote_types(run.logits.dtype, torch.float32)
            saved = run.logits.new_empty(patch_shape(run, target), dtype=dtype)
        partials, programs = _launch(run, target, class_weight, saved, None, maps)
        spec = run.spec
        finish_sums[(10,)](
            partials,
            numerators,
            denominators,
            partials if report is None else report,
            programs,
            target.shape[0],
            run.logits.shape[1],
            *run.places,
            WEIGHTED=class_weight is not None,
            KNOWLEDGE=spec.preset == "softmax-kl",
            PER_IMAGE=spec.preset == "paper"
            and spec.weight_axis == "space"
            and spec.evaluation == "discrepancy",
            REPORT=report is not None,
            BLOCK=1024,
        )
    return saved


def backward(
    run: Run,
    target: Tensor | None,
    class_weight: Tensor | None,
    grad_numerators: Tensor,
    saved: Tensor | None,
) -> Tensor:
    """The gradient of the run's logits, in their dtype and layout, rounded once."""
    out = torch.empty_like(run.logits)
    with _device_of(run.logits):
        if saved is None:
            assert target is not None
            _launch(run, target, class_weight, out, grad_numerators, None)
            return out
        batch, classes, h, w = run.logits.shape
        channels_last = out.stride(1) == 1 and classes > 1
        block_c, block = (32, 32) if channels_last else (1, 512)
        blocks = -(-(h * w) // block)
        combine_gradients[(blocks * batch, -(-classes // block_c))](
            saved,
            grad_numerators,
            out,
            blocks,
            classes,
            h,
            w,
            saved.shape[3] * saved.shape[4],
            saved.stride(0),
            *out.stride(),
            **{f"SLOT{k}": _place_of_saved(run, k) for k in range(4)},
            TI=saved.shape[4] - 1,
            BLOCK_C=block_c,
            BLOCK=block,
            INT=_integer(max(saved.shape[3:].numel(), _extent(out, (2, 3)))),
            FLOAT=tl.float64 if saved.dtype == torch.float64 else tl.float32,
        )
    return out


def _place_of_saved(run: Run, k: int) -> int:
    """Where the scale of the k-th saved gradient is; -1 behind the last."""
    return run.places[run.slots.index(k)] if k < len(run.terms) else -1
