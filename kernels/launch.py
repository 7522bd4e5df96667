"""How a pass is cut into programs, and its launches: where the kernels meet torch.

Nothing here waits for the GPU or looks at data: shapes decide everything, so forward and backward
can be captured in a CUDA graph. Launches of a pass: the kernel, its exact fallback (which returns
at once where no tile set its flag), and the sums.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from heteroakd_fast.backends import Call
from heteroakd_fast.spec import Options
from heteroakd_fast.terms import KD, CrossEntropy, HeteroAKD, TeacherCrossEntropy, Term

from . import config
from .combine import combine_gradients, finish_sums, group_totals
from .distillation import BITS_MASK, ROW, distillation_pass
from .interpolation import CORNERS, DIRECT, GATHER
from .space import collect, reduce

__all__ = [
    "Pass",
    "backward",
    "bits_of",
    "device_of",
    "finish",
    "forward",
    "has_ptx",
    "interpreted",
    "passes_of",
    "patch_shape",
    "power_of",
    "totals_of",
]

_NO_TEACHER = -1
_INT32 = 2**31 - 1
# In the order in which the kernels number them; `teacher_ce` is `ce` of a pass over the teacher.
_TERMS: Final = ("ce", "kd", "hetero", "feature")
Four = tuple[int, int, int, int]


class Pass(NamedTuple):
    """The terms over one model's logits, as `PassTerms` of csrc/spec.h."""

    logits: Tensor
    """[B, C, h, w], those that learn"""
    teacher: Tensor | None
    """[B, C, h', w']"""
    terms: tuple[Term | None, ...]
    """ce, kd, hetero, feature; hetero also for the maps alone"""
    places: Four
    """of each term among the call's numerators; -1 where it is not asked for"""
    groups: Four
    """of each term's denominator among the call's"""
    options: Options

    def asks(self, k: int) -> bool:
        return self.places[k] >= 0

    @property
    def hetero(self) -> HeteroAKD | None:
        term = self.terms[2]
        assert term is None or isinstance(term, HeteroAKD)
        return term

    @property
    def maps(self) -> bool:
        return self.options.maps and self.teacher is not None

    @property
    def temperature(self) -> float:
        found = (getattr(term, "temperature", None) for term in self.terms)
        return next((t for t in found if t is not None), 1.0)

    def slots(self) -> list[int]:
        """Of each saved gradient the first term that adds to it: those of one group share it, but
        that hetero, whose value comes with the factor of its gradient, has its own."""
        first: list[int] = []
        for k in (0, 1, 3, 2):
            shared = k != 2 and any(self.groups[j] == self.groups[k] for j in first)
            if self.asks(k) and not shared:
                first.append(k)
        return first

    def slot(self, k: int) -> int:
        """To which of them a term adds; -1 where it is not asked for."""
        if not self.asks(k):
            return -1
        own = [
            j == k or (2 not in (j, k) and self.groups[j] == self.groups[k]) for j in self.slots()
        ]
        return own.index(True)

    def weight(self, k: int) -> float:
        term = self.terms[k]
        return 1.0 if term is None else term.weight


def passes_of(call: Call) -> tuple[Pass | None, Pass | None]:
    """The student's pass, unless only the teacher is asked about, and that of `teacher_ce`."""
    options = call.spec.options()
    student: dict[str, tuple[Term, int, int]] = {}
    teacher = None
    place = 0
    for term, group in zip(options.terms, options.groups, strict=True):
        at = (term, place if group >= 0 else -1, group)
        if isinstance(term, TeacherCrossEntropy):
            assert call.teacher is not None
            ce: Term = CrossEntropy(term.weight, term.label_smoothing)
            teacher = _pass(call.teacher, None, {"ce": (ce, place, group)}, options)
        else:
            student[term.name] = at
        place += group >= 0
    needs_teacher = any(term.needs_teacher for term, _, _ in student.values())
    other = call.teacher if needs_teacher else None
    return _pass(call.student, other, student, options) if student else None, teacher


def _pass(
    logits: Tensor,
    teacher: Tensor | None,
    terms: dict[str, tuple[Term, int, int]],
    options: Options,
) -> Pass:
    found = [terms.get(name, (None, -1, -1)) for name in _TERMS]
    places, groups = [place for _, place, _ in found], [group for _, _, group in found]
    return Pass(
        logits,
        teacher,
        tuple(term for term, _, _ in found),
        (places[0], places[1], places[2], places[3]),
        (groups[0], groups[1], groups[2], groups[3]),
        options,
    )


def interpreted() -> bool:
    """Whether the kernels are run by Triton's interpreter, on the CPU."""
    return not isinstance(distillation_pass, triton.JITFunction)


def _heavy(one: Pass) -> bool:
    """Whether a thread keeps more per pixel than sixteen of them leave room for."""
    hetero = one.hetero
    return one.asks(3) or (
        hetero is not None
        and (hetero.preset == "paper" or hetero.mix == "logits" or one.options.maps)
    )


def _tiling(one: Pass, target: Tensor) -> config.Tiling:
    key = config.key_of(one.logits, one.teacher, target, _heavy(one))
    launch = config.static_launch(key)
    h, w = one.logits.shape[2:]
    label_h, label_w = target.shape[1:]
    return config.tiling((h, w), (label_h, label_w), one.options.align_corners, launch)


def patch_shape(
    logits: Tensor, groups: int, target: Tensor, align_corners: bool
) -> tuple[int, ...]:
    """Shape of what a pass saves for backward; decided by the shapes alone, because compiled graphs
    outlive tables of launches. Of each group, image and class TI + 1 rows for every TI rows of
    cells, because the last cell's bottom belongs to the next chunk's first logits."""
    batch, classes, h, w = logits.shape
    ti = config.rows_of_program((h, w), (target.shape[1], target.shape[2]), align_corners)
    return groups, batch, classes, -(-(h + 1) // ti), ti + 1, w


def _integer(largest: int) -> tl.dtype:
    """For offsets up to `largest`; those of planes and images are 64 bits wide in any case."""
    return tl.int64 if largest > _INT32 else tl.int32


@cache
def _lanes(device: torch.device) -> int:
    """Threads of a warp, as Triton counts them: each takes one cell."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))
    return 32


def bits_of(value: float) -> int:
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
def device_of(tensor: Tensor) -> Iterator[None]:
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


def _geometry(one: Pass, target: Tensor, gradients: bool) -> _Geometry:
    logits = one.logits
    teacher = logits if one.teacher is None else one.teacher
    source = int(DIRECT) if logits.shape[2:] == target.shape[1:] else int(CORNERS)
    teacher_source = _NO_TEACHER if one.teacher is None else _source(teacher, logits, target)
    tiling = _tiling(one, target)
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
    teacher = logits if one.teacher is None else _reads_rows(teacher, teacher_source)
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
        "ALIGN_CORNERS": one.options.align_corners,
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
    one: Pass, target: Tensor, geometry: _Geometry, halo: int
) -> tuple[Tensor, Tensor]:
    batch, classes = one.logits.shape[:2]
    dtype = torch.promote_types(one.logits.dtype, torch.float32)
    programs = geometry.programs
    found = one.logits.new_empty((batch, programs, classes, 2), dtype=dtype)
    shift = one.logits.new_empty((batch, classes), dtype=dtype)
    weight = torch.empty_like(shift)
    collect[geometry.grid](
        geometry.student,
        geometry.teacher,
        target,
        found,
        *geometry.positional,
        one.options.ignore_index,
        HALO=halo,
        MIX_TEACHER=one.hetero is not None and one.hetero.mix == "teacher",
        PTX=has_ptx(one.logits),
        **geometry.tiles,
    )
    block = 64
    reduce[(batch, -(-classes // block))](
        found, shift, weight, programs, classes, BLOCK=block, FLOAT=geometry.tiles["FLOAT"]
    )
    return shift, weight


def has_ptx(logits: Tensor) -> bool:
    return logits.device.type == "cuda" and torch.version.hip is None


def power_of(temperature: float) -> int:
    return int(temperature) if temperature in (1.0, 2.0, 4.0) else 0


def _launch(
    one: Pass,
    target: Tensor,
    class_weight: Tensor | None,
    gradient: Tensor | None,
    grad_totals: Tensor | None,
    maps: Tensor | None,
) -> tuple[Tensor, int]:
    """Both kernels of the pass; returns the rows of partial sums and the programs per image."""
    geometry = _geometry(one, target, gradient is not None)
    direct = geometry.tiles["STUDENT"] == int(DIRECT)
    programs = geometry.programs
    partials = one.logits.new_empty((geometry.grid[0], int(ROW)), dtype=torch.float64)
    kd, term = one.terms[1], one.hetero
    hetero = 0
    if term is not None and (one.asks(2) or maps is not None):
        hetero = 1 if term.preset == "softmax-kl" else 2 if term.weight_axis == "class" else 3
    evaluation = term is not None and term.evaluation == "discrepancy"
    unused = partials
    shift = weight = unused
    if hetero == 3 and evaluation and one.asks(2):
        halo = int(gradient is not None and not direct)
        shift, weight = _space_statistics(one, target, geometry, halo)
    if class_weight is not None:
        class_weight = class_weight.to(
            torch.promote_types(one.logits.dtype, torch.float32)
        ).contiguous()
    first = one.slots()
    if direct:  # the kernel reads the groups' scales, and weights are those of the terms
        slots, weights = list(one.groups), [one.weight(k) for k in range(4)]
    else:
        slots = [one.slot(k) for k in range(4)]
        weights = [
            one.weight(k) / one.weight(first[slot]) if slot >= 0 else 1.0
            for k, slot in enumerate(slots)
        ]
    smoothing = getattr(one.terms[0], "label_smoothing", 0.0)
    arguments = [
        geometry.student,
        geometry.teacher,
        target,
        unused if class_weight is None else class_weight,
        unused if gradient is None else gradient,
        unused if grad_totals is None else grad_totals,
        unused if maps is None else maps,
        partials,
        shift,
        weight,
        *geometry.positional,
        *((0, 0, 0, 0) if gradient is None or not direct else gradient.stride()),
        one.options.ignore_index,
        bits_of(one.temperature),
        bits_of(1.0 if term is None else term.tau),
        bits_of(kd.beta if isinstance(kd, KD) else 0.5),
        bits_of(smoothing),
        *map(bits_of, weights),
    ]
    options = {
        "WHOLE": direct and target.shape[2] % geometry.tiles["S"] == 0,
        "SAME_TAPS": geometry.tiles["TEACHER"] == int(CORNERS)
        and geometry.student.stride()[2:] == geometry.teacher.stride()[2:],
        "CE": one.asks(0),
        "SMOOTHING": smoothing != 0.0,
        "WEIGHTED": class_weight is not None,
        "KD": ("forward", "reverse", "js").index(kd.divergence) + 1 if isinstance(kd, KD) else 0,
        "HETERO": hetero,
        "HETERO_TERM": one.asks(2),
        "MIX_LOGITS": hetero == 1 and term is not None and term.mix == "logits",
        "MIX_TEACHER": hetero > 0 and term is not None and term.mix == "teacher",
        "EVALUATION": evaluation,
        "FEATURE": one.asks(3),
        "MAPS": maps is not None,
        "POWER": power_of(one.temperature),
        "GRAD": gradient is not None,
        "SLOT_CE": slots[0],
        "SLOT_KD": slots[1],
        "SLOT_HETERO": slots[2],
        "SLOT_FEATURE": slots[3],
        "SLOTS": len(first),
        "PTX": has_ptx(one.logits),
        "PICK_LABEL": one.logits.shape[1] < config.MANY_CLASSES,
    }
    for careful in (False, True):
        distillation_pass[geometry.grid](
            *arguments,
            **options,
            CAREFUL=careful,
            **geometry.tiles,
        )
    return partials, programs


def _numbered(name: str, values: Sequence[int]) -> dict[str, int]:
    """Arguments NAME0, NAME1, ..."""
    return {f"{name}{k}": value for k, value in enumerate(values)}


def finish(
    partials: Tensor,
    numerators: Tensor,
    denominators: Tensor,
    report: Tensor | None,
    programs: int,
    images: int,
    classes: int,
    places: Sequence[int],
    groups: Sequence[int],
    *,
    weighted: bool,
    hetero: HeteroAKD | None,
) -> None:
    """Writes the sums of the terms ce, kd, hetero, feature where they belong."""
    softmax_kl = hetero is not None and hetero.preset == "softmax-kl"
    finish_sums[(10,)](
        partials,
        numerators,
        denominators,
        partials if report is None else report,
        programs,
        images,
        classes,
        **_numbered("PLACE", places),
        **_numbered("GROUP", groups),
        WEIGHTED=weighted,
        KNOWLEDGE=softmax_kl,
        PER_IMAGE=hetero is not None and not softmax_kl and hetero.over_space,
        REPORT=report is not None,
        BLOCK=1024,
    )


def totals_of(numerators: Tensor, options: Options) -> Tensor:
    """Of each group the sum of weight * numerator, float64."""
    totals = numerators.new_empty(options.group_count)
    groups = [group for group in options.groups if group >= 0]
    weights = [bits_of(term.weight) for term in options.asked]
    missing = 5 - len(groups)
    with device_of(numerators):
        group_totals[(1,)](
            numerators,
            totals,
            *weights,
            *[bits_of(0.0)] * missing,
            **_numbered("GROUP", groups + [-1] * missing),
            GROUPS=len(totals),
        )
    return totals


def forward(
    one: Pass,
    target: Tensor,
    class_weight: Tensor | None,
    numerators: Tensor,
    denominators: Tensor,
    report: Tensor | None,
    maps: Tensor | None,
    compute_grad: bool,
) -> Tensor | None:
    """Writes the pass's sums into float64 vectors, the label report (int64 [2]) and the maps
    ([2, B, H, W]); returns the gradients to save, where there are any."""
    saved = None
    with device_of(one.logits):
        if compute_grad and one.logits.shape[2:] != target.shape[1:]:
            dtype = torch.promote_types(one.logits.dtype, torch.float32)
            shape = patch_shape(one.logits, len(one.slots()), target, one.options.align_corners)
            saved = one.logits.new_empty(shape, dtype=dtype)
        partials, programs = _launch(one, target, class_weight, saved, None, maps)
        finish(
            partials,
            numerators,
            denominators,
            report,
            programs,
            target.shape[0],
            one.logits.shape[1],
            one.places,
            one.groups,
            weighted=class_weight is not None,
            hetero=one.hetero,
        )
    return saved


def backward(
    one: Pass,
    target: Tensor | None,
    class_weight: Tensor | None,
    grad_totals: Tensor,
    saved: Tensor | None,
) -> Tensor:
    """The gradient of the pass's logits, in their dtype and layout, rounded once."""
    out = torch.empty_like(one.logits)
    with device_of(one.logits):
        if saved is None:
            assert target is not None
            _launch(one, target, class_weight, out, grad_totals, None)
            return out
        batch, classes, h, w = one.logits.shape
        channels_last = out.stride(1) == 1 and classes > 1
        block_c, block = (32, 32) if channels_last else (1, 512)
        blocks = -(-(h * w) // block)
        first = one.slots()
        missing = 4 - len(first)
        combine_gradients[(blocks * batch, -(-classes // block_c))](
            saved,
            grad_totals,
            out,
            blocks,
            classes,
            h,
            w,
            saved.shape[3] * saved.shape[4],
            saved.stride(0),
            *(bits_of(one.weight(k)) for k in first),
            *[bits_of(0.0)] * missing,
            *out.stride(),
            **_numbered("GROUP", [*(one.groups[k] for k in first), *[-1] * missing]),
            TI=saved.shape[4] - 1,
            BLOCK_C=block_c,
            BLOCK=block,
            INT=_integer(max(saved.shape[3:].numel(), _extent(out, (2, 3)))),
            FLOAT=tl.float64 if saved.dtype == torch.float64 else tl.float32,
        )
    return out
