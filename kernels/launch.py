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
from heteroakd_fast.spec import Options, numbers_of
from heteroakd_fast.terms import TeacherCrossEntropy, Term

from . import config, terms
from .combine import OF_IMAGES, combine_gradients, finish_sums, group_totals
from .distillation import distillation_pass
from .formulas import BITS_MASK
from .interpolation import CORNERS, DIRECT, GATHER
from .partials import FLAG, LABELLED, LABELLED_WEIGHT, ROW, SHARES, VALID, VALID_WEIGHT
from .space import collect, reduce
from .terms.term import COLLECTING

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


class PassTerm(NamedTuple):
    """A term of a pass, as the kernels know it."""

    term: Term
    code: int
    """its index in `terms`"""
    variant: int
    place: int
    """among the call's numerators; -1: it is there for the maps alone"""
    group: int
    """of its denominator among the call's"""

    @property
    def traits(self) -> terms.Traits:
        found: terms.Traits = terms.traits(self.code, self.variant)
        return found

    @property
    def gradient(self) -> tuple[int, int]:
        """Terms of one group share a gradient, but those that have their own."""
        return self.group, self.code if self.traits.own_gradient else -1


class Pass(NamedTuple):
    """The terms over one model's logits, as `PassTerms` of csrc/spec.h."""

    logits: Tensor
    """[B, C, h, w], those that learn"""
    teacher: Tensor | None
    """[B, C, h', w']"""
    terms: tuple[PassTerm, ...]
    """in the order of the kernels' indices"""
    options: Options
    pixel_weight: Tensor | None = None
    """[B, H, W]"""
    of_teacher: bool = False

    @property
    def unlabelled(self) -> bool:
        """Whether there may be pixels without a label."""
        return self.options.unlabelled_index != self.options.ignore_index

    def of_pixels(self, unused: Tensor) -> list[Any]:
        """What `read_labels` takes beside the labels."""
        options, weights = self.options, self.pixel_weight
        strides = (0, 0, 0) if weights is None else weights.stride()
        return [
            options.ignore_index,
            options.unlabelled_index,
            unused if weights is None else weights,
            *strides,
        ]

    @property
    def maps(self) -> bool:
        return self.options.maps and self.teacher is not None

    @property
    def diagnostics(self) -> bool:
        """Not of a pass over the teacher's logits."""
        return self.options.diagnostics and not self.of_teacher

    @property
    def written(self) -> bool:
        """Whether it writes something of each pixel."""
        return self.maps or self.diagnostics

    @property
    def temperature(self) -> float:
        found = (
            getattr(one.term, "temperature", None)
            for one in self.terms
            if one.term.shares_temperature
        )
        return next((t for t in found if t is not None), 1.0)

    def slots(self) -> list[PassTerm]:
        """Of each saved gradient the first term that adds to it (`slot`)."""
        found: dict[tuple[int, int], PassTerm] = {}
        for one in self.terms:
            if one.group >= 0:
                found.setdefault(one.gradient, one)
        return list(found.values())

    def slot(self, one: PassTerm) -> int:
        """To which of them a term adds; -1 where it is not asked for."""
        gradients = [first.gradient for first in self.slots()]
        return gradients.index(one.gradient) if one.group >= 0 else -1


def passes_of(call: Call) -> tuple[Pass | None, Pass | None]:
    """The student's pass, unless only the teacher is asked about, and that of `teacher_ce`."""
    options = call.spec.options()
    own, of_teacher = terms_of(options)
    needs_teacher = any(one.term.needs_teacher for one in own)
    weight = call.pixel_weight
    student = Pass(call.student, call.teacher if needs_teacher else None, own, options, weight)
    if not of_teacher:
        return student, None
    assert call.teacher is not None
    return student if own else None, Pass(call.teacher, None, of_teacher, options, weight, True)


def terms_of(options: Options) -> tuple[tuple[PassTerm, ...], tuple[PassTerm, ...]]:
    """Of the student's pass and of the teacher's."""
    student: list[PassTerm] = []
    teacher: list[PassTerm] = []
    for term, group in zip(options.terms, options.groups, strict=True):
        place = len(student) + len(teacher)  # those for the maps alone are behind all others
        one = PassTerm(term, *terms.of(term), place if group >= 0 else -1, group)
        (teacher if isinstance(term, TeacherCrossEntropy) else student).append(one)
    student.sort(key=lambda one: one.code)
    return tuple(student), tuple(teacher)


def interpreted() -> bool:
    """Whether the kernels are run by Triton's interpreter, on the CPU."""
    return not isinstance(distillation_pass, triton.JITFunction)


def _heavy(one: Pass) -> bool:
    """Whether a thread keeps more per pixel than sixteen of them leave room for."""
    traits = [term.traits for term in one.terms]
    return any(
        x.needs.raw_logits or x.bounds > 0 or (x.mapped and one.options.maps) for x in traits
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
    """As `number` in formulas.py takes it. Of an integer Triton looks at its size and at what
    divides it: this one is large and odd, at the cost of the last bit of 53."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return (bits ^ int(BITS_MASK)) | 1


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
    one: Pass,
    target: Tensor,
    geometry: _Geometry,
    entries: Sequence[terms.Entry],
    numbers: Sequence[tuple[int, ...]],
    halo: int,
) -> Tensor | None:
    """[softmaxes over space, 3, B, C]: see `reduce`; None without any."""
    batch, classes = one.logits.shape[:2]
    count = terms.place_over_space(entries, len(entries))
    if not any(terms.spaces(entry) for entry in entries):
        return None
    dtype = torch.promote_types(one.logits.dtype, torch.float32)
    programs = geometry.programs
    found = one.logits.new_empty((count, batch, programs, classes, 2), dtype=dtype)
    out = one.logits.new_empty((count, 3, batch, classes), dtype=dtype)
    block = 64
    for k, entry in enumerate(entries):
        for which in range(terms.spaces(entry)):
            collect[geometry.grid](
                geometry.student,
                geometry.teacher,
                target,
                found,
                *geometry.positional,
                *one.of_pixels(found),
                numbers[k],
                TERM=entry.term,
                VARIANT=entry.variant,
                FIRST=which,
                PLACE=terms.place_over_space(entries, k) + which,
                UNLABELLED=one.unlabelled,
                WEIGHTS=one.pixel_weight is not None,
                HALO=halo,
                PTX=has_ptx(one.logits),
                **geometry.tiles,
            )
    reduce[(batch, -(-classes // block), count)](
        found, out, programs, classes, BLOCK=block, FLOAT=geometry.tiles["FLOAT"]
    )
    return out


def _numbers_of_classes(
    one: Pass, target: Tensor, entries: Sequence[terms.Entry], space: Tensor | None
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """`space` with the numbers of terms over classes, and their values by their places."""
    values: dict[int, Tensor] = {}
    for k, term in enumerate(one.terms):
        if not term.traits.numbers_of_classes:
            continue
        alone = one._replace(
            teacher=None,
            terms=(term._replace(variant=int(COLLECTING)),),
            options=one.options._replace(maps=False, diagnostics=False),
        )
        tallies = _launch(alone, target, None, None, None, None).tallies
        assert tallies is not None
        settle = terms.member(term.code, "settle")
        value, numbers = settle(term.term, tallies.sum(dim=0))
        values[term.place] = value
        batch, classes = one.logits.shape[:2]
        if space is None:
            count = terms.place_over_space(entries, len(entries))
            dtype = torch.promote_types(one.logits.dtype, torch.float32)
            space = one.logits.new_empty((count, 3, batch, classes), dtype=dtype)
        space[terms.place_over_space(entries, k), :2] = numbers[:, None]
    return space, values


def has_ptx(logits: Tensor) -> bool:
    return logits.device.type == "cuda" and torch.version.hip is None


def power_of(temperature: float) -> int:
    return int(temperature) if temperature in (1.0, 2.0, 4.0) else 0


class _Launched(NamedTuple):
    partials: Tensor
    """the rows of partial sums"""
    programs: int
    """per image"""
    values: dict[int, Tensor]
    """of terms over classes, by their places"""
    tallies: Tensor | None
    """[programs, tallies, C] float64, where sums of such a term are collected"""


def _launch(
    one: Pass,
    target: Tensor,
    class_weight: Tensor | None,
    gradient: Tensor | None,
    grad_totals: Tensor | None,
    maps: Tensor | None,
) -> _Launched:
    """Both kernels of the pass."""
    geometry = _geometry(one, target, gradient is not None)
    direct = geometry.tiles["STUDENT"] == int(DIRECT)
    programs = geometry.programs
    partials = one.logits.new_empty((geometry.grid[0], int(ROW)), dtype=torch.float64)
    unused = partials
    weighted = class_weight is not None
    if class_weight is not None:
        class_weight = class_weight.to(
            torch.promote_types(one.logits.dtype, torch.float32)
        ).contiguous()
    first = one.slots()
    entries, numbers = [], []
    for term in one.terms:
        # the kernel reads the groups' scales if `direct`, and weights are those of the terms
        slot = term.group if direct else one.slot(term)
        weight, *others = numbers_of([term.term])
        if slot >= 0 and not direct:
            weight /= first[slot].term.weight
        shares = slot >= 0 and term.term.denominator(weighted) in _OF_SHARES
        entries.append(terms.Entry(term.code, term.variant, slot, shares))
        numbers.append((bits_of(weight), *map(bits_of, others)))
    halo = int(gradient is not None and not direct)
    tallies = terms.tallies_of(entries)
    space: Tensor | None = None
    values: dict[int, Tensor] = {}
    if tallies:
        shape = (geometry.grid[0], tallies, one.logits.shape[1])
        space = one.logits.new_empty(shape, dtype=torch.float64)
    else:
        space = _space_statistics(one, target, geometry, entries, numbers, halo)
        space, values = _numbers_of_classes(one, target, entries, space)
    arguments = [
        geometry.student,
        geometry.teacher,
        target,
        unused if class_weight is None else class_weight,
        unused if gradient is None else gradient,
        unused if grad_totals is None else grad_totals,
        unused if maps is None else maps,
        partials,
        unused if space is None else space,
        *geometry.positional,
        *((0, 0, 0, 0) if gradient is None or not direct else gradient.stride()),
        *one.of_pixels(unused),
        bits_of(one.temperature),
        tuple(numbers),
    ]
    options = {
        "TERMS": tuple(entries),
        "WHOLE": direct and target.shape[2] % geometry.tiles["S"] == 0,
        "SAME_TAPS": geometry.tiles["TEACHER"] == int(CORNERS)
        and geometry.student.stride()[2:] == geometry.teacher.stride()[2:],
        "WEIGHTED": weighted,
        "UNLABELLED": one.unlabelled,
        "WEIGHTS": one.pixel_weight is not None,
        "MAPS": maps is not None and one.maps,
        "DIAGNOSTICS": maps is not None and one.diagnostics,
        "POWER": power_of(one.temperature),
        "GRAD": gradient is not None,
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
    return _Launched(partials, programs, values, space if tallies else None)


#: Values of `Term.denominator` that are sums of a term's own.
_OF_SHARES: Final = ("class_weight", "discrepancy")


def _column(one: PassTerm, weighted: bool, unlabelled: bool, weights: bool) -> int:
    """Of `partials`, where a term's denominator is summed, or OF_IMAGES."""
    denominator = one.term.denominator(weighted)
    if denominator == "images":
        return int(OF_IMAGES)
    if denominator in _OF_SHARES:
        return int(SHARES) + one.code
    if unlabelled and one.term.needs_label:
        return int(LABELLED_WEIGHT if weights else LABELLED)
    return int(VALID_WEIGHT if weights else VALID)


def finish(
    partials: Tensor,
    numerators: Tensor,
    denominators: Tensor,
    report: Tensor | None,
    programs: int,
    images: int,
    classes: int,
    asked: Sequence[PassTerm],
    weighted: bool,
    unlabelled: bool = False,
    weights: bool = False,
) -> None:
    """Writes the sums of these terms where they belong; weighted: by classes."""
    finish_sums[(int(ROW if unlabelled or weights else FLAG),)](
        partials,
        numerators,
        denominators,
        partials if report is None else report,
        programs,
        images,
        classes,
        TERMS=tuple(
            (
                one.code,
                one.place,
                one.group,
                _column(one, weighted, unlabelled, weights),
                one.traits.is_divergence,
            )
            for one in asked
            if one.group >= 0
        ),
        UNLABELLED=unlabelled,
        WEIGHTS=weights,
        REPORT=report is not None,
        BLOCK=1024,
    )


def totals_of(numerators: Tensor, options: Options) -> Tensor:
    """Of each group the sum of weight * numerator, float64."""
    totals = numerators.new_empty(options.group_count)
    with device_of(numerators):
        group_totals[(1,)](
            numerators,
            totals,
            tuple(bits_of(term.weight) for term in options.asked),
            GROUP_OF=tuple(group for group in options.groups if group >= 0),
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
    """Writes the pass's sums into float64 vectors, the label report (int64 [4]) and the maps
    ([2, B, H, W]); returns the gradients to save, where there are any."""
    saved = None
    with device_of(one.logits):
        if compute_grad and one.logits.shape[2:] != target.shape[1:]:
            dtype = torch.promote_types(one.logits.dtype, torch.float32)
            shape = patch_shape(one.logits, len(one.slots()), target, one.options.align_corners)
            saved = one.logits.new_empty(shape, dtype=dtype)
        launched = _launch(one, target, class_weight, saved, None, maps)
        programs = launched.programs
        finish(
            launched.partials,
            numerators,
            denominators,
            report,
            programs,
            target.shape[0],
            one.logits.shape[1],
            one.terms,
            class_weight is not None,
            one.unlabelled,
            one.pixel_weight is not None,
        )
        for term in one.terms:
            if term.place in launched.values:
                numerators[term.place] = launched.values[term.place]
                # it was the number of labelled pixels, or their weight
                denominators[term.group] = (denominators[term.group] > 0) * one.logits.shape[1]
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
            tuple(bits_of(one.term.weight) for one in first),
            *out.stride(),
            GROUPS=tuple(one.group for one in first),
            TI=saved.shape[4] - 1,
            BLOCK_C=block_c,
            BLOCK=block,
            INT=_integer(max(saved.shape[3:].numel(), _extent(out, (2, 3)))),
            FLOAT=tl.float64 if saved.dtype == torch.float64 else tl.float32,
        )
    return out
