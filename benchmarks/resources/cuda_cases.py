"""The CUDA C++ kernels as their author describes them: the one file to fill in.

`TEMPLATES` says what every instance of a `__global__` function has in common, `CASES` which
launches a call of the package consists of, `LOOPS` what loops are called, `ARMS` which lines stand
in an arm of a branch that not every launch takes. Nothing of this can be read from machine code;
everything else is. `python -m benchmarks.resources --backend cuda` prints the names of instances
and loops.

Cases have the names and shapes of those of Triton. All pixels are taken to be valid and all logits
to be moderate: the loops for the others (`hand over`, the second `maxima`) do not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from . import cases as triton_cases
from .cuda_geometry import (
    MOST_CHUNK_ROWS,
    PARTIALS,
    WARP,
    WARPS,
    Call,
    Cut,
    ceil_div,
    cut_cells,
    cut_labels,
    held_bytes,
    label_grid_pixels,
    saved_bytes,
    stage,
)
from .cuda_launches import Case, Launch, Lines, Template

#: nvcc flags that setup.py has besides those of nvcc.py.
FLAGS: Final[Sequence[str]] = ()

#: Name of the `__global__` function -> what its instances have in common. Each one must be here.
TEMPLATES: Final[Mapping[str, Template]] = {
    "cell_kernel": Template(pixels=lambda x: float(x[-2]) * float(x[-1])),
    "segment_kernel": Template(pixels=lambda x: float(x[2])),
    "space_kernel": Template(pixels=lambda x: float(x[-1])),
    "label_kernel": Template(pixels=lambda x: float(x[1])),
    "combine_gradients_kernel": Template(pixels=lambda _: 4.0),
    "finish_sums_kernel": Template(),
    "reduce_space_kernel": Template(),
    "label_report_kernel": Template(),
}

#: Function that has the `for` -> what the loop is called; "name/inner": a `for` inside another one
#: of the same function; "name#2": its second one that the source does not unroll, if they are to be
#: told apart. Others go by the function. The loop around the loops over classes is "step". Where
#: calls on the way have constants or types between angle brackets, they are appended:
#: `case 2: statistics<2>(...)` leads to "statistics<2>".
LOOPS: Final[Mapping[str, str]] = {
    "label_report_kernel": "labels",
    "stage_maxima": "staging maxima",
    "stage_last_maxima#1": "rows of last maxima",
    "stage_last_maxima#2": "staging last maxima",
    "stage_logits#1": "staging",
    "stage_logits#2": "rows of last column",
    "stage_logits#3": "staging last column",
    "CellPass::run#1": "rows",
    "CellPass::run#2": "step",
    "CellPass::for_each_block": "blocks",
    "cell_statistics": "statistics",
    "cell_gradients": "gradients",
    "CellPass::finish#1": "hand over",
    "CellPass::finish#2": "hand over/inner",
    "for_each_segment#1": "rows",
    "for_each_segment#2": "step",
    "space_kernel": "classes",
    "SegmentPass::sweep_cells": "read cells",
    "SegmentPass::sweep_gathered": "gather",
    "SegmentPass::sweep_labels": "read labels",
    "SegmentPass::find_maximum": "careful maxima",
    "SegmentPass::find_statistics": "statistics",
    "SegmentPass::find_squares": "squares",
    "SegmentPass::find_js": "js",
    "SegmentPass::find_paper": "paper",
    "SegmentPass::find_mixed#1": "mixed maxima",
    "SegmentPass::find_mixed#2": "mixed",
    "SegmentPass::gradients": "gradients",
    "label_kernel": "step",
    "LabelPass::fetch#1": "no pixels",
    "LabelPass::fetch#2": "fetch",
    "LabelPass::fetch#3": "fetch 16 bits",
    "LabelPass::fetch#4": "fetch one by one",
    "LabelPass::maxima": "maxima",
    "LabelPass::statistics": "statistics",
    "LabelPass::find_late": "late",
    "LabelPass::gradients": "gradients",
    "combine_gradients_kernel": "logits",
    "reduce_space_kernel": "rows of sums",
    "column_sum": "sums",
    "finish_sums_kernel": "images",
}

#: Loops that hardly ever run, by the names that LOOPS gives: they may spill.
RARE: Final[frozenset[str]] = frozenset(["hand over", "hand over/inner"])

#: Spills that an innermost loop of a kernel has on the main architecture, all such loops together:
#: none but these. `--update` does not write more; a person who has looked at them does.
INNER_SPILLS: Final[Mapping[str, int]] = {
    # gradients, about 18 of 580 instructions for 16 pixels: three terms' coefficients of each
    "cell_kernel<Fixed<true, KdDivergence(1), Hetero(1), Mix(0)>, 4, 4>": 55,
    # statistics, 2 of 170
    "cell_kernel<Fixed<true, KdDivergence(0), Hetero(0), Mix(0)>, 4, 4>": 2,
    # the kernels for any terms: gradients, and js in double
    "segment_kernel<float, Any, 4, Hold(1)>": 42,
    "segment_kernel<double, Any, 2, Hold(1)>": 30,
    # one number of 670 instructions for 4 logits, that the compiler may stay at 32 registers
    "combine_gradients_kernel<float>": 2,
}

#: Files that a quick run compiles for all architectures, and one more for the main one.
QUICK_FILES: Final = ("operators.cu", "labels.cu", "sums.cu", "labels_grid.cu")
QUICK_MAIN_FILES: Final = (*QUICK_FILES, "cells_ce.cu")


# --- arms of branches ---------------------------------------------------------------------------

_PASS: Final = "SegmentPass"


def _sources() -> dict[str, tuple[Lines, ...]]:
    """Where a model's logits lie, in the pass by segments: "student cells", "teacher gathered"."""
    below = {
        "cells": Lines("under", "if (model.source == Source::kCells) {"),
        "on labels": Lines("under", "if (model.source == Source::kLabels) {"),
        "gathered": Lines("under", "const Taps<F> rows", "u.fraction_x[s] = columns.fraction"),
    }
    found: dict[str, tuple[Lines, ...]] = {}
    for model in ("student", "teacher"):
        begins = Lines(f"{_PASS}::{_PASS}", f"{model}_ = under(")
        for source in below:
            found[f"{model} {source}, place"] = (begins, below[source])
            collects = Lines("space_kernel", f"> {model} = under(")
            found[f"{model} {source}, space"] = (collects, below[source])
    return found


#: Name -> lines of an arm: an instruction is in it where the calls that lead to it go through all
#: of these lines. What `if constexpr` and templates decide is no arm.
ARMS: Final[Mapping[str, tuple[Lines, ...]]] = {
    "labels of 8 bits": (Lines("load_labels", "load_labels_as<uint8_t>"),),
    "labels of 32 bits": (Lines("load_labels", "load_labels_as<int32_t>"),),
    "wide division": (Lines("divide", "static_cast<uint64_t>(a) /"),),
    "maps": (Lines("write_maps", "const int64_t plane", "out[p.batch * plane]"),),
    # logits and gradients by dtype
    "staged float": (Lines("with_plane", "f(Plane<float>"),),
    "staged 16 bits": (Lines("with_plane", "f(Plane<uint16_t>"),),
    "narrow float": (Lines("load_narrow", "if (dtype == Dtype::kFloat)"),),
    "narrow 16 bits": (Lines("load_narrow", "const uint16_t bits", "return dtype =="),),
    "load double": (Lines("load_logit", "if (dtype == Dtype::kDouble)"),),
    "load float": (Lines("load_logit", "if (dtype == Dtype::kFloat)"),),
    "load 16 bits": (Lines("load_logit", "const uint16_t bits", "return static_cast<T>(dtype"),),
    "read double": (Lines("read", "read_plainly<double>"),),
    "read float": (Lines("read", "read_plainly<float>"),),
    "read 16 bits": (Lines("read", "read_plainly<uint16_t>"),),
    "store double": (Lines("store_logit", "case Dtype::kDouble"),),
    "store float": (Lines("store_logit", "case Dtype::kFloat"),),
    "store half": (Lines("store_logit", "case Dtype::kHalf"),),
    "store bfloat16": (Lines("store_logit", "case Dtype::kBFloat16", "static_cast<BFloat16*>"),),
    "store four float": (Lines("store_four", "if (dtype == Dtype::kFloat) {"),),
    "store four of 16 bits": (Lines("store_four", "*reinterpret_cast<uint2*>"),),
    # by cells
    "staged whole, two": (Lines("CellPass::run", "staging_.template bring<kRows>"),),
    "staged whole, one": (Lines("CellPass::run", "staging_.template bring<2>"),),
    "staged by blocks": (Lines("CellPass::for_each_block", "if (!whole_) staging_"),),
    "label logits, whole": (Lines("CellPass::label_logits", "if (whole_) {"),),
    "label logits, by blocks": (
        Lines(
            "CellPass::label_logits", "const Logits& model", "out[r][s] = between_corners(a[0][0]"
        ),
    ),
    "cell gradients": (
        Lines("CellPass::step", "if (p.gradients || (knowledge<Set>(p) && p.hetero_term)) grad"),
    ),
    # on the label grid
    "store fours": (Lines("LabelPass::store", "if (p.gradient.vectors) {"),),
    "store one by one": (Lines("LabelPass::store", "if (i >= wide_) continue", "store_logit("),),
    # by segments
    **_sources(),
    "student not held": (Lines(f"{_PASS}::read_student", "if (!holds())"),),
    "teacher not held": (Lines(f"{_PASS}::read_teacher", "if (!holds())"),),
    "careful on labels": (Lines("read_carefully", "if (source == Source::kLabels)"),),
    "huge": (Lines("between_huge", "if (f == F(0))", "return fma(f, b"),),
    "power of its own": (Lines(f"{_PASS}::hard", "if (power == 0)"),),
    "pair": (Lines(f"{_PASS}::find_statistics", "const F a_t", "s[i].reverse ="),),
    "pair, reads": (Lines(f"{_PASS}::find_statistics", "if (pair<Set>(p)) read_teacher"),),
    "pair, gradients": (Lines(f"{_PASS}::gradients", "if (pair<Set>(p)) {"),),
    "pair, totals": (Lines("totals_of", "if (pair<Set>(p)) {"),),
    "soft, totals": (Lines("totals_of", "if (soft<Set>(p)) {"),),
    "hard, totals": (Lines("totals_of", "if (hard) {"),),
    "hard, label": (Lines("totals_of", "if (hard) student_e"),),
    "knowledge, totals": (Lines("totals_of", "if (knowledge<Set>(p)) {"),),
    "knowledge, label": (Lines("totals_of", "if (knowledge<Set>(p)) teacher_e"),),
    "knowledge, label logit": (Lines(f"{_PASS}::run", "? label_logit(p.teacher"),),
    "knowledge, pixel": (Lines(f"{_PASS}::pixel", "if (knowledge<Set>(p)) {"),),
    "smoothing, weights": (Lines(f"{_PASS}::find_statistics", "const F w ="),),
    "smoothing, pixel": (Lines("cross_entropy_pixel", "if (smoothed) {"),),
    "smoothing, gradients": (
        Lines(f"{_PASS}::cross_entropy_gradient", "if (Set::smoothing(p)) {"),
    ),
    "ce, pixel": (Lines(f"{_PASS}::pixel", "if (Set::ce(p)) {"),),
    "ce, gradients": (Lines(f"{_PASS}::gradients", "g[kCe][i] ="),),
    "kd forward, pixel": (Lines(f"{_PASS}::pixel", "if (Set::kd(p) == KdDivergence::kForward) {"),),
    "kd other, pixel": (
        Lines(f"{_PASS}::pixel", "} else if (Set::kd(p) != KdDivergence::kNone) {"),
    ),
    "kd reverse, pixel": (Lines(f"{_PASS}::pixel", "if (Set::kd(p) == KdDivergence::kReverse) {"),),
    "kd js, pixel": (Lines(f"{_PASS}::pixel", "const F beta", "kd_student_[i] = valid"),),
    "kd, gradients": (Lines(f"{_PASS}::gradients", "g[kKd][i] ="),),
    "kd reverse, gradients": (Lines(f"{_PASS}::kd_gradient", "other = e_s * (a_s - a_t)"),),
    "kd js, gradients": (Lines(f"{_PASS}::kd_gradient", "const JsMean<F> js", "other = js.p_s"),),
    "kd js, loop": (Lines(f"{_PASS}::run", "find_js();"),),
    "feature, squares": (Lines(f"{_PASS}::run", "find_squares(squares)"),),
    "feature, pixel": (Lines(f"{_PASS}::pixel", "if (Set::feature(p)) {"),),
    "feature, gradients": (Lines(f"{_PASS}::gradients", "g[kFeature][i] ="),),
    "hetero, gradients": (Lines(f"{_PASS}::gradients", "g[kHetero][i] =", "? hetero_gradient"),),
    "probs, gradients": (Lines(f"{_PASS}::hetero_gradient", "if (Set::mix(p) != Mix::kLogits) {"),),
    "knowledge, gradients": (Lines(f"{_PASS}::hetero_gradient", "if (knowledge<Set>(p)) {"),),
    "mixed": (Lines(f"{_PASS}::run", "find_mixed(sums)"),),
    "mixed, gradients": (
        Lines(f"{_PASS}::hetero_gradient", "const F a = mixed_target", "exp2(a), hetero_student"),
    ),
    "paper": (Lines(f"{_PASS}::run", "find_paper();"),),
    "paper, pixel": (Lines(f"{_PASS}::pixel", "} else if (Set::hetero(p) == Hetero::kPaper) {"),),
    "paper, gradients": (
        Lines(f"{_PASS}::hetero_gradient", "if (Set::hetero(p) == Hetero::kPaper) {"),
    ),
    "paper, class": (Lines(f"{_PASS}::hetero_gradient", "const PaperClass<F> k ="),),
    "space, pixel": (
        Lines(f"{_PASS}::pixel", "} else if (Set::hetero(p) == Hetero::kPaperSpace) {"),
    ),
    "space, maps": (
        Lines(f"{_PASS}::pixel", "const PaperClass<F> k = paper_at_label", "d = k.gap"),
    ),
    "space, gradients": (
        Lines(f"{_PASS}::hetero_gradient", "const F a = k.z_h", "(w * bernoulli_kl_gradient"),
    ),
    "late": (Lines(f"{_PASS}::run", "if (late()) {"),),
    "gradients on labels": (Lines(f"{_PASS}::gradients", "if (on_labels) {"),),
    "slots, reads": (Lines(f"{_PASS}::gradients", "cursor[k].begin()"),),
    "slots": (
        Lines(f"{_PASS}::gradients", "if (!has[k] || p.slot[k] < 0) continue", "cursor[k].add("),
    ),
    # sums
    "summed slots": (Lines("combine_gradients_kernel", "if (j + x >= width)", "total[x] +="),),
    "row above": (Lines("combine_gradients_kernel", "if (above != nullptr) g +="),),
}

#: Before the loops that stage all classes: four copies, of which one is executed (cuda.py).
SET_UP: Final = "set up to stage whole"

_ALWAYS: Final = ("labels of 8 bits", "labels of 32 bits", "wide division", "maps")


def _without(*arms: str, **shares: float) -> dict[str, float]:
    return dict.fromkeys((*_ALWAYS, *arms), 1.0) | shares


def _dtypes(what: str, used: str, known: Sequence[str]) -> list[str]:
    return [f"{what} {x}" for x in known if x != used]


# --- launches -----------------------------------------------------------------------------------


def _set(kd: int, hetero: int, mix: int = 0) -> str:
    """`Fixed` of pixel.h with ce, by the numbers of pass.h."""
    return f"Fixed<true, KdDivergence({kd}), Hetero({hetero}), Mix({mix})>"


def _power(temperature: float) -> int:
    return int(temperature) if temperature in (1.0, 2.0) else 0


def _cells(call: Call, terms: Sequence[str], temperature: float, gradients: bool) -> list[Launch]:
    """cell_kernel."""
    cut = cut_cells(call, gradients)
    staged = stage(call)
    whole = staged.blocks == 1
    narrow = "uint16_t" if call.size == 2 else "float"
    power = _power(temperature) if len(terms) > 1 else 1
    columns = ceil_div(call.most_pixels(1), 4)
    loops: dict[str, float] = {
        "rows": call.chunk_rows,
        "step": columns * ceil_div(call.most_pixels(0), 4),
        "blocks": staged.blocks,
        "hand over": 0,
    }
    for element in ("float", "uint16_t"):
        here = element == narrow
        loops |= {
            f"staging maxima<{element}>": here * call.classes,
            f"rows of last maxima<{element}>": here * (MOST_CHUNK_ROWS + 1),
            f"staging last maxima<{element}>": ceil_div(call.classes, WARP),
            f"staging<{element}>": here * whole * call.classes,
            f"rows of last column<{element}>": here * whole * (MOST_CHUNK_ROWS + 1),
            f"staging last column<{element}>": ceil_div(call.classes, WARP),
            # of all classes or of blocks: arms tell these apart
            f"staging<2, {element}>": here * staged.classes,
            f"rows of last column<2, {element}>": here * 2,
            f"staging last column<2, {element}>": ceil_div(int(staged.classes), WARP),
        }
    for x in (0, 1, 2) if len(terms) > 1 else (1,):
        loops[f"statistics<{x}>"] = staged.classes * (x == power)
        loops[f"gradients<{x}, true>"] = staged.classes * (x == power and gradients)
    late = "hetero" in terms
    if late:
        loops["gradients<1, false>"] = staged.classes * (not gradients)
    used = "float" if call.size == 4 else "16 bits"
    launch = Launch(
        kernel=f"cell_kernel<{_set(int('kd' in terms), int(late))}, 4, 4>",
        grid=cut.grid,
        threads=WARPS * WARP,
        bytes=call.input_bytes
        + cut.partial_bytes
        + gradients * saved_bytes(call, cut, len(terms), 4),
        elements=call.elements,
        shared=staged.bytes,
        loops=loops,
        without=_without(
            *_dtypes("staged", used, ("float", "16 bits")),
            *_dtypes("narrow", used, ("float", "16 bits")),
            *(("staged by blocks",) if whole else ("staged whole, two", "staged whole, one")),
            "staged whole, two" if call.chunk_rows == 1 else "staged whole, one",
            "label logits, by blocks" if whole else "label logits, whole",
            *(() if gradients or late else ("cell gradients",)),
        )
        | {SET_UP: 3 / 4 if whole else 1.0},
    )
    return [launch, _finish(cut), *([_combine(call, cut, len(terms))] if gradients else [])]


#: What the terms of a call leave out of the pass by segments.
_TERM_ARMS: Final[Mapping[str, Sequence[str]]] = {
    "ce": ("ce, pixel", "ce, gradients"),
    "forward": ("kd forward, pixel",),
    "reverse": ("kd reverse, pixel", "kd reverse, gradients"),
    "js": ("kd js, pixel", "kd js, gradients", "kd js, loop"),
    "kd": ("kd, gradients",),
    "other kd": ("kd other, pixel",),
    "feature": ("feature, squares", "feature, pixel", "feature, gradients"),
    "hetero": ("hetero, gradients",),
    "knowledge": (
        "knowledge, totals",
        "knowledge, label",
        "knowledge, label logit",
        "knowledge, pixel",
        "knowledge, gradients",
    ),
    "probs": ("probs, gradients",),
    "mixed": ("mixed", "mixed, gradients"),
    "paper": ("paper", "paper, pixel", "paper, gradients"),
    "any paper": ("paper, class",),
    "space": ("space, pixel", "space, gradients"),
    "pair": ("pair", "pair, reads", "pair, gradients", "pair, totals"),
    "soft": ("soft, totals",),
    "hard": ("hard, totals", "hard, label"),
    "late": ("late",),
}


def _segments(call: Call, terms: str, has: set[str], slots: int, t: float) -> list[Launch]:
    """segment_kernel. terms: that it is compiled for, or "Any" and the keys of `_TERM_ARMS`."""
    wide = call.size == 8
    pixels, size, dtype = (2, 8, "double") if wide else (4, 4, "float")
    cut = cut_cells(call, True)
    held = held_bytes(call, pixels, size)
    assert held, "the tables say that pixels are held"
    anything = terms == "Any"
    steps = call.most_pixels(0) * ceil_div(call.most_pixels(1), pixels)
    classes = float(call.classes)
    loops: dict[str, float] = {
        "rows": call.chunk_rows,
        "step": steps,
        "careful maxima": 0,
        "statistics": classes,
        "gradients": classes,
    }
    element = "double" if wide else "float" if call.size == 4 else "uint16_t"
    alike = call.teacher == call.student
    for x in ("float", "uint16_t", *(("double",) if wide else ())):
        here = classes * (x == element)
        loops |= {f"read cells<{x}>": here, f"gather<{x}>": 0, f"read labels<{x}>": 0}
    if not alike:  # the copies are the teacher's
        assert element == "float", "the tables have no such case"
        loops |= {"read cells<float> (copy 2)": 0, "gather<float> (copy 2)": classes}
    optional = {"squares": "feature", "js": "js", "paper": "paper"}
    optional |= {"mixed maxima": "mixed", "mixed": "mixed"}
    loops |= {x: classes * (key in has) for x, key in optional.items() if anything or key in has}
    arms = ["student not held", "teacher not held", "careful on labels", "huge"]
    arms += ["smoothing, weights", "smoothing, pixel", "smoothing, gradients", "space, maps"]
    arms += ["gradients on labels"]
    if anything:
        arms += [arm for key, members in _TERM_ARMS.items() if key not in has for arm in members]
    arms += _dtypes("read", dtype, ("double", "float", "16 bits"))
    arms += _dtypes("load", dtype, ("double", "float", "16 bits"))
    if _power(t) != 0 or "soft" not in has:
        arms.append("power of its own")
    source = "cells" if call.teacher == call.student else "gathered"
    for known in ("cells", "on labels", "gathered"):
        arms += [f"student {known}, place"] if known != "cells" else []
        arms += [f"teacher {known}, place"] if known != source else []
    without = _without(*arms)
    without |= {"slots": 1 - slots / 4, "slots, reads": 1 - slots / 4}
    launch = Launch(
        kernel=f"segment_kernel<{dtype}, {terms}, {pixels}, Hold({1 if anything else 2})>",
        grid=cut.grid,
        threads=WARPS * WARP,
        bytes=call.input_bytes + cut.partial_bytes + saved_bytes(call, cut, slots, size),
        elements=call.elements,
        shared=held,
        loops=loops,
        without=without,
    )
    launches = [launch, _finish(cut, per_image="space" in has), _combine(call, cut, slots)]
    return [*(_space(call, cut) if "space" in has else []), *launches]


def _space(call: Call, cut: Cut) -> list[Launch]:
    """What weight_axis = space collects first; float."""
    found = cut.rows * call.classes * 2 * 4
    collect = Launch(
        kernel="space_kernel<float, 4>",
        grid=cut.grid,
        threads=WARPS * WARP,
        bytes=call.input_bytes + found,
        elements=call.elements,
        loops={
            "classes": call.classes,
            "rows": call.chunk_rows,
            "step": call.most_pixels(0) * ceil_div(call.most_pixels(1), 4),
        },
        without=_without(
            "careful on labels",
            "huge",
            *_dtypes("load", "float", ("double", "float", "16 bits")),
            *(f"{x} {y}, space" for x in ("student", "teacher") for y in ("on labels", "gathered")),
        ),
    )
    reduce = Launch(
        kernel="reduce_space_kernel<float>",
        grid=ceil_div(call.batch * call.classes, 64),
        threads=64,
        bytes=found + call.batch * call.classes * 8,
        loops={"rows of sums": cut.rows / call.batch},
    )
    return [collect, reduce]


def _on_labels(call: Call) -> list[Launch]:
    """label_kernel: ce + hetero at T = 2 forward, then with gradients."""
    pixels = label_grid_pixels(call)
    assert pixels == 4, "the tables say that four neighbours are moved at once"
    cut = cut_labels(call, pixels)
    classes = float(call.classes)
    loops: dict[str, float] = {
        "step": call.chunk_rows,
        "no pixels": 0,
        "fetch": classes,
        "fetch 16 bits": 0,
        "fetch one by one": 0,
        "maxima": classes,
        "late": classes,
    }
    for x in (0, 1, 2):
        loops |= {f"statistics<{x}>": classes * (x == 2), f"gradients<{x}>": classes * (x == 2)}
    arms = [*_dtypes("narrow", "float", ("float", "16 bits")), "store one by one"]
    arms.append("store four of 16 bits")
    launches = []
    for gradients in (False, True):
        only = "late" if gradients else "gradients"
        launches.append(
            Launch(
                kernel=f"label_kernel<{_set(1, 1)}, 4, {str(gradients).lower()}>",
                grid=cut.grid,
                threads=WARPS * WARP,
                bytes=call.input_bytes
                + cut.partial_bytes
                + gradients * call.student_logits * call.size,
                elements=call.elements,
                shared=call.classes * call.models * 4 * pixels * WARPS * WARP,
                loops={k: v for k, v in loops.items() if not k.startswith(only)},
                without=_without(*arms),
            )
        )
    return [launches[0], _finish(cut), launches[1]]


def _finish(cut: Cut, per_image: bool = False) -> Launch:
    rows = cut.rows / 256
    return Launch(
        kernel="finish_sums_kernel",
        grid=PARTIALS,
        threads=256,
        bytes=cut.partial_bytes,
        shared=256 * 8,
        # in the one block that counts images
        loops={"sums": rows, "images": 8 if per_image else 0, "sums 2": rows / 8},
    )


def _combine(call: Call, cut: Cut, slots: int) -> Launch:
    height, width = call.student
    count = call.batch * call.classes * height * ceil_div(width, 4)
    wide = call.size == 8
    used = {2: "bfloat16", 4: "float", 8: "double"}[call.size]
    without = _without(*_dtypes("store", used, ("double", "float", "half", "bfloat16")))
    without |= {"summed slots": 1 - slots / 4, "row above": 1 - 1 / call.chunk_rows}
    saved = saved_bytes(call, cut, slots, 8 if wide else 4)
    return Launch(
        kernel=f"combine_gradients_kernel<{'double' if wide else 'float'}>",
        grid=min(ceil_div(count, 256), 1 << 20),
        threads=256,
        bytes=saved + call.student_logits * call.size,
        elements=call.student_logits,
        loops={"logits": ceil_div(ceil_div(count, 256), 1 << 20)},
        without=without,
    )


# --- cases --------------------------------------------------------------------------------------

_S4: Final = Call(batch=8, classes=19, student=(128, 256), teacher=(128, 256), labels=(512, 1024))
_S8: Final = replace(_S4, student=(64, 128), teacher=(64, 128))
_SQUARE: Final = replace(_S4, labels=(512, 512))
_SQUARE_S4: Final = replace(_SQUARE, student=(128, 128), teacher=(128, 128))
_SQUARE_S8: Final = replace(_SQUARE, student=(64, 64), teacher=(64, 64))
_USUAL: Final = ("ce", "hetero")
#: keys of `_TERM_ARMS`
_CE_HETERO: Final = {"ce", "probs", "late", "knowledge", "hetero", "pair", "soft", "hard"}
_SPACE: Final = {"ce", "hard", "hetero", "space", "any paper", "late"}


def _of_cells(
    call: Call, terms: Sequence[str] = _USUAL, t: float = 2.0, gradients: bool = True
) -> tuple[Call, list[Launch]]:
    return call, _cells(call, terms, t, gradients)


def _of_segments(
    call: Call, terms: str, has: set[str], slots: int = 2
) -> tuple[Call, list[Launch]]:
    return call, _segments(call, terms, has, slots, 2.0)


def _of_labels(call: Call) -> tuple[Call, list[Launch]]:
    return call, _on_labels(call)


def _cases() -> dict[str, Case]:
    labels = _S4.labels
    found = {
        "s4": _of_cells(_S4),
        "s8": _of_cells(_S8),
        "c150": _of_cells(replace(_SQUARE_S4, classes=150)),
        "c21": _of_cells(replace(_SQUARE_S8, classes=21)),
        "c171": _of_cells(replace(_SQUARE_S8, classes=171)),
        "bf16": _of_cells(replace(_S4, size=2)),
        "t1.7": _of_cells(_S4, t=1.7),
        "mix-logits": _of_segments(_S4, _set(1, 1, 1), {"mixed", "soft"}),
        "paper": _of_segments(_S4, _set(1, 2), {"paper", "soft"}),
        "paper-space": _of_segments(_S4, "Any", _SPACE),
        "kd-js": _of_segments(_S4, _set(3, 0), {"js", "soft"}, slots=1),
        "kd-reverse": _of_segments(_S4, _set(2, 0), {"soft"}, slots=1),
        "ce": _of_cells(replace(_S4, teacher=None), ("ce",)),
        "default": _of_cells(_S4, ("ce", "kd", "hetero")),
        "all": _of_segments(_S4, "Any", {*_CE_HETERO, "kd", "forward", "feature"}, slots=4),
        "teacher-s4": _of_segments(replace(_S8, teacher=(128, 256)), _set(1, 1), {"soft"}),
        "stride1": _of_labels(replace(_S4, student=labels, teacher=labels)),
        "align": _of_cells(
            replace(_S4, student=(97, 97), teacher=(97, 97), labels=(769, 769), align_corners=True)
        ),
        "no-grad": _of_cells(_S4, gradients=False),
        "float64": _of_segments(replace(_S4, size=8), "Any", _CE_HETERO),
        "channels-last": _of_cells(_S4),
    }
    cases = {}
    for name, (call, launches) in found.items():
        gradient = 0 if name == "no-grad" else call.student_logits * call.size
        special = triton_cases.PAPER_FLOOR.get(name, triton_cases.USUAL_FLOOR)
        what = triton_cases.CASES[name][0]
        cases[name] = Case(what, launches, special, call.input_bytes + gradient)
    return cases


CASES: Final[Mapping[str, Case]] = _cases()
