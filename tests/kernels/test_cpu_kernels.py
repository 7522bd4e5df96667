"""The compiled CPU kernels, beyond what every backend is tested for: every instruction set, both
ways to the gradient, the geometry of bands and vectors, and the elementary functions."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from common import (
    CPU_KERNELS,
    DTYPES_16,
    F32,
    TERM_CASES,
    Batch,
    Result,
    assert_accurate,
    assert_like_logits,
    assert_maps_match,
    assert_matches,
    check,
    evaluate,
    has_isa,
    instruction_set,
    make_batch,
    truth,
)
from geometries import arrange, arrange_labels, batch_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heteroakd_fast import _extension, functional

pytestmark = pytest.mark.skipif(
    not _extension.loaded(), reason=f"no compiled extension: {_extension.unavailable()}"
)

DTYPES = (F32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)
# What Linux calls the features that each instruction set needs.
ISAS: dict[str, set[str]] = {
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
# Every term at once.
ALL: dict[str, Any] = TERM_CASES["all"]


every_isa = pytest.mark.parametrize("backend", CPU_KERNELS)


def assert_call_matches(batch: Batch, got: Result, expected: Result, **options: Any) -> None:
    """`assert_matches` also for a few pixels at a high temperature.

    In float32 a divergence is a difference of logarithms of sums, each rounded at some 1e-7, and
    T^2 multiplies that; gradients are differences of probabilities, which T multiplies. Many pixels
    average it; where hardly one is valid and the models (or the student and the mixed target)
    nearly agree, it shows.
    """
    if got.loss.dtype == torch.float64:
        assert_matches(got, expected)
        return
    temperature = options["temperature"]
    weights = {name: options.get(f"{name}_weight", 1.0) for name in expected.terms}
    absolute = max(2e-6, 1e-6 * temperature**2)
    assert got.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        assert got.terms[name] == pytest.approx(value, rel=2e-6, abs=absolute), name
    loss = float(expected.loss)
    assert float(got.loss) == pytest.approx(loss, rel=2e-6, abs=sum(weights.values()) * absolute)
    # the gradient of a pixel whose models have nothing in common, when it is the only one
    valid = int((batch.target != options["ignore_index"]).sum())
    natural = 2.5 * sum(weights.values()) * temperature / max(valid, 1)
    for name in ("student_grad", "teacher_grad"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if theirs is None:
            continue
        if theirs.abs().max() > 0.02 * natural:
            assert_accurate(ours, theirs, name)
        else:
            allowed = 2e-7 * natural * torch.ones_like(theirs)
            if ours.dtype in DTYPES_16:
                info = torch.finfo(ours.dtype)
                allowed += info.eps / 2 * theirs.abs() * 1.001 + info.smallest_normal
            assert ((ours.double() - theirs).abs() <= allowed).all(), name


# --- every term, every geometry ------------------------------------------------------------------


class Call(NamedTuple):
    """A call of the loss, small enough to print."""

    backend: str
    batch: int
    classes: int
    grid: tuple[int, int]
    teacher_grid: tuple[int, int]
    size: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    label_dtype: torch.dtype
    layouts: tuple[str, str]
    strided: bool
    scale: float
    ignored: float
    weighted: bool
    student_requires_grad: bool
    options: dict[str, Any]
    seed: int

    def run(self) -> None:
        plain = make_batch(
            self.batch,
            self.classes,
            self.grid,
            self.teacher_grid,
            self.size,
            scale=self.scale,
            ignored=self.ignored,
            ignore_index=self.options["ignore_index"],
            label_dtype=self.label_dtype,
            seed=self.seed,
        )
        batch = Batch(
            arrange(plain.student.to(self.dtypes[0]), self.layouts[0]),
            arrange(plain.teacher.to(self.dtypes[1]), self.layouts[1]),
            arrange_labels(plain.target, "sliced" if self.strided else "contiguous"),
        )
        options = dict(self.options)
        if self.weighted:
            generator = torch.Generator().manual_seed(self.seed)
            options["class_weight"] = torch.rand(self.classes, generator=generator) + 0.1
        wanted = self.student_requires_grad or not options.get("teacher_ce_weight")
        got = evaluate(batch, 2.5, wanted, backend=self.backend, **options)
        expected = truth(batch, 2.5, **options)
        if not wanted:
            expected = expected._replace(student_grad=None)
        assert_call_matches(batch, got, expected, **options)
        assert_like_logits(batch, got)
        if options["return_maps"]:
            assert_maps_match(got, expected)


@st.composite
def grids(draw: st.DrawFn, align_corners: bool) -> dict[str, tuple[int, int]]:
    """A grid of each model and of the labels, in every relation that a kernel treats apart."""
    sides = st.tuples(st.integers(1, 21), st.integers(1, 21))
    grid = draw(sides)
    relation = draw(st.sampled_from(["integer", "integer", "identity", "down", "any"]))
    size = grid
    if relation == "integer":
        ratios = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
        lost = 1 if align_corners else 0
        size = ((grid[0] - lost) * ratios[0] + lost, (grid[1] - lost) * ratios[1] + lost)
    elif relation == "down":
        size = draw(st.tuples(st.integers(1, grid[0]), st.integers(1, grid[1])))
    elif relation == "any":
        size = draw(st.tuples(st.integers(1, 70), st.integers(1, 150)))
    teacher_grid = draw(st.one_of(st.just(grid), st.just(size), sides))
    return {"grid": grid, "teacher_grid": teacher_grid, "size": size}


@st.composite
def terms(draw: st.DrawFn) -> dict[str, Any]:
    """Those of a test case, or a mixture of any."""
    if draw(st.booleans()):
        return dict(TERM_CASES[draw(st.sampled_from(list(TERM_CASES)))])
    names = draw(
        st.sets(st.sampled_from(["ce", "teacher_ce", "kd", "hetero", "feature"]), min_size=1)
    )
    options: dict[str, Any] = {"ce_weight": 0.0}
    options |= {f"{name}_weight": draw(st.sampled_from([0.3, 1.0])) for name in sorted(names)}
    options["kd_divergence"] = draw(st.sampled_from(["forward", "reverse", "js"]))
    options["kd_beta"] = draw(st.sampled_from([0.5, 0.1]))
    options["evaluation"] = draw(st.sampled_from(["discrepancy", "none"]))
    options["preset"] = draw(st.sampled_from(["softmax-kl", "paper"]))
    if options["preset"] == "paper":
        options["weight_axis"] = draw(st.sampled_from(["class", "space"]))
        options["mix"] = draw(st.sampled_from(["logits", "teacher"]))
    else:
        options["mix"] = draw(st.sampled_from(["probs", "logits", "teacher"]))
    return options


@st.composite
def calls(draw: st.DrawFn) -> Call:
    align_corners = draw(st.booleans())
    options = draw(terms())
    options |= {
        "align_corners": align_corners,
        "ignore_index": draw(st.sampled_from([255, 0])),
        "allow_ignored_class": True,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "temperature": draw(st.sampled_from([1.0, 2.0, 4.0, 1.7])),
        "tau": draw(st.sampled_from([1.0, 0.7, 3.0])),
        "return_maps": draw(st.booleans()),
    }
    # One pass: of several each rounds its gradient to 16 bits, and autograd their sum.
    options["terms"] = tuple(
        dataclasses.replace(term, temperature=options["temperature"])
        if term.shares_temperature and hasattr(term, "temperature")
        else term
        for term in options.get("terms", ())
    )
    if not options["terms"]:
        del options["terms"]
    dtype = draw(st.sampled_from(DTYPES))
    # `teacher_ce` is computed in the teacher's precision, which must not be less than the loss's
    narrower = dtype == torch.float64 and options.get("teacher_ce_weight")
    others = [torch.float64] if narrower else [F32, torch.float64]
    layouts = st.sampled_from(["contiguous", "channels_last", "sliced"])
    geometry = draw(grids(align_corners))
    # A softmax over space of equal logits has a gradient of 0: there is no signal to compare with.
    assume(geometry["grid"] != (1, 1) or "terms" not in options or options.get("kd_weight"))
    return Call(
        backend=draw(st.sampled_from(CPU_KERNELS)),
        batch=draw(st.integers(1, 3)),
        classes=draw(st.integers(1, 24)),
        **geometry,
        dtypes=(dtype, draw(st.sampled_from([dtype, *others]))),
        label_dtype=draw(st.sampled_from(LABEL_DTYPES)),
        layouts=(draw(layouts), draw(layouts)),
        strided=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 3.0, 5.0])),
        ignored=draw(st.sampled_from([0.0, 0.3, 0.95])),
        weighted=draw(st.booleans()),
        student_requires_grad=draw(st.sampled_from([True, True, False])),
        options=options,
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=600)
@given(call=calls())
def test_every_call_equals_the_oracle(call: Call) -> None:
    """Loss, terms, gradients and maps against the oracle in float64, on the same input values."""
    call.run()


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, F32) for case in TERM_CASES), *(("all", x) for x in DTYPES_16)]
)
@pytest.mark.parametrize("geometry", ["bands", "bands-label-grid", "bands-uneven", "bands-corners"])
@every_isa
def test_every_term_on_every_instruction_set(
    backend: str, geometry: str, case: str, dtype: torch.dtype
) -> None:
    options = {"align_corners": geometry == "bands-corners", "return_maps": True}
    batch = batch_of(geometry, classes=7, dtype=dtype)
    check(batch, backend=backend, **TERM_CASES[case], **options)


# --- which instruction set -----------------------------------------------------------------------


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETEROAKD_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match=r"HETEROAKD_CPU_ISA.*sse9"):
        _extension.operators().cpu_isa()
    with pytest.raises(RuntimeError, match=r"HETEROAKD_CPU_ISA.*sse9"):
        evaluate(make_batch(dtype=F32), backend="cpu")


@every_isa
def test_the_variable_chooses_the_instruction_set(backend: str) -> None:
    with instruction_set(backend.removeprefix("cpu-")):
        assert f"cpu-{_extension.operators().cpu_isa()}" == backend


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads /proc/cpuinfo"
)
def test_the_best_instruction_set_of_the_processor_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tests above skip what the processor lacks, and nothing else."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    for name, needed in ISAS.items():
        assert has_isa(name) == (needed <= flags), name
    best = next(name for name, needed in ISAS.items() if needed <= flags)
    monkeypatch.delenv("HETEROAKD_CPU_ISA", raising=False)
    assert _extension.operators().cpu_isa() == best
    monkeypatch.setenv("HETEROAKD_CPU_ISA", "")
    assert _extension.operators().cpu_isa() == best


# --- elementary functions ------------------------------------------------------------------------


def elementary(name: str, x: Tensor, isa: str) -> Tensor:
    """The kernels' own function of every element."""
    padded = torch.nn.functional.pad(x, (0, -x.numel() % 16), value=1.0)
    out: Tensor = _extension.operators().elementary(padded, name, isa)
    return out[: x.numel()]


def every_float(first: float, count: int = 1 << 20) -> Tensor:
    """`count` neighbouring floats from `first` > 0 on."""
    start = torch.tensor([first], dtype=F32).view(torch.int32)
    return (start + torch.arange(count, dtype=torch.int32)).view(F32)


def every_magnitude(low: float, high: float, count: int = 1 << 20) -> Tensor:
    """Floats spread evenly over the exponents from low to high, both included."""
    ends = torch.tensor([low, high], dtype=F32).view(torch.int32).double()
    bits = torch.linspace(0, 1, count, dtype=torch.float64) * (ends[1] - ends[0]) + ends[0]
    return bits.round().to(torch.int32).view(F32)


def ulp(exact: Tensor) -> Tensor:
    """The distance of float32s around each value, as float64."""
    _, exponent = torch.frexp(exact.abs())
    return torch.exp2((exponent.clamp(min=-125) - 24).double())


EXACT = {
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "log1p_unit": torch.log1p,
}


def worst(name: str, x: Tensor, isa: str, ulps: float, absolute: float = 0.0) -> float:
    """The largest error as a share of what is allowed."""
    exact = EXACT[name](x.double())
    error = (elementary(name, x, isa).double() - exact).abs()
    return float((error / (ulps * ulp(exact) + absolute)).nan_to_num(math.inf).max())


SMALLEST = torch.finfo(F32).smallest_normal
LARGEST = torch.finfo(F32).max


@pytest.mark.parametrize("name", ISAS)
def test_exp2(name: str) -> None:
    """At most 2 ulp; 0 or a denormal below 2^-126."""
    if not has_isa(name):
        pytest.skip(f"this processor has no {name}")
    for x in (
        torch.linspace(-125.0, 1.0, 1 << 20),
        -every_float(0.46875),  # across the border of two roundings, -1/2
        -every_float(0.0078125),  # ... of the table's, -1/64
        -every_magnitude(SMALLEST, 1.0, 1 << 16),
        torch.arange(-125.0, 2.0),
        torch.tensor([0.0, -0.0]),
    ):
        assert worst("exp2", x, name, 2.0) <= 1.0
    assert (
        elementary("exp2", torch.arange(-125.0, 2.0), name) == torch.arange(-125.0, 2.0).exp2()
    ).all()
    small = elementary("exp2", torch.linspace(-160.0, -126.001, 4096), name)
    assert ((small >= 0.0) & (small <= SMALLEST)).all()
    gone = torch.tensor([-200.0, -1000.0, -1e6, -1e9, -1e30, -3e38])
    assert (elementary("exp2", gone, name) == 0.0).all()


@pytest.mark.parametrize("name", ISAS)
def test_logarithms(name: str) -> None:
    """log and log1p to a few ulp, where they pass through 0 too; log2 to 1.5e-7 and a rounding."""
    if not has_isa(name):
        pytest.skip(f"this processor has no {name}")
    positive = (
        every_magnitude(SMALLEST, LARGEST),
        every_float(1.0),
        every_float(0.9375),  # up to 1
        every_float(math.sqrt(0.5) - 0.03),  # across the border of two exponents
        every_float(math.sqrt(2.0) - 0.06),
        torch.exp2(torch.arange(-126.0, 128.0)),
    )
    for x in positive:
        assert worst("log", x, name, 2.0) <= 1.0
        # a rounding of the result, and of the factor where it is made from log
        ulps = 1.0 if name == "avx512" else 1.5
        assert worst("log2", x, name, ulps, absolute=1.5e-7) <= 1.0
    assert (elementary("log", torch.ones(16), name) == 0.0).all()
    for x in (every_magnitude(1e-37, 5000.0), every_float(0.375), every_float(0.9375)):
        assert worst("log1p", x, name, 3.0) <= 1.0
    for x in (
        torch.linspace(0.0, 1.0, 1 << 20),
        every_magnitude(SMALLEST, 1.0),
        every_float(0.9375) - 2.0**-24,
        torch.tensor([0.0, 1.0]),
    ):
        assert worst("log1p_unit", x, name, 3.0) <= 1.0
    assert (elementary("log1p_unit", torch.zeros(16), name) == 0.0).all()


@pytest.mark.parametrize("function", EXACT)
@pytest.mark.parametrize("name", ISAS)
def test_elementary_functions_do_not_hide_nan(name: str, function: str) -> None:
    """In any lane, of either sign, quiet or signalling; its neighbours do not notice."""
    if not has_isa(name):
        pytest.skip(f"this processor has no {name}")
    bits = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -0x7FFFFF, -1]
    for pattern in bits:
        nan = torch.tensor([pattern], dtype=torch.int32).view(F32)
        assert nan.isnan()
        clean = torch.full((16,), 0.7)
        expected = elementary(function, clean, name)
        for lane in range(16):
            x = clean.clone()
            x[lane : lane + 1].view(torch.int32).copy_(nan.view(torch.int32))
            got = elementary(function, x, name)
            assert got[lane].isnan(), hex(pattern)
            got[lane] = expected[lane]
            assert torch.equal(got, expected)


# --- two ways to the gradient --------------------------------------------------------------------


@pytest.mark.parametrize("written", ["student", "teacher", "target", "class_weight"])
def test_on_the_label_grid_overwriting_inputs_before_backward_is_an_error(written: str) -> None:
    """There backward reads its inputs again: autograd must notice, or the gradient is wrong."""
    batch = make_batch(dtype=F32, grid=(9, 11), teacher_grid=(9, 11), size=(9, 11))
    student = batch.student.clone().requires_grad_()
    tensors = {
        "student": student * 1.0,
        "teacher": batch.teacher.clone(),
        "target": batch.target.clone(),
        "class_weight": torch.rand(5) + 0.1,
    }
    output = functional.distillation_loss(
        tensors["student"],
        tensors["target"],
        tensors["teacher"],
        class_weight=tensors["class_weight"],
        hetero_weight=1.0,
        backend="cpu",
    )
    with torch.no_grad():
        tensors[written].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


@pytest.mark.parametrize("case", TERM_CASES)
def test_both_ways_give_the_same_gradient(case: str) -> None:
    """With `align_corners` the logits at twice the distance, repeated, are those of the label grid
    wherever labels are not ignored: the two ways then compute the same thing."""
    options = {**TERM_CASES[case], "align_corners": True}
    fine = make_batch(2, 7, (9, 21), (9, 21), (9, 21), dtype=F32)
    sparse = torch.full((2, 17, 41), 255)
    sparse[:, ::2, ::2] = fine.target
    here = evaluate(fine, backend="cpu", **options)
    there = evaluate(fine._replace(target=sparse), backend="cpu", **options)
    expected = truth(fine, **options)
    for got in (here, there):
        assert_matches(got, expected)


@pytest.mark.parametrize("width", [800, 801])
@every_isa
def test_a_gradient_larger_than_the_caches(backend: str, width: int) -> None:
    """On the label grid it is written past them, where rows are aligned to a vector (and where
    they are not, as every other is here, without)."""
    batch = make_batch(1, 13, (210, width), None, (210, width), dtype=F32)
    assert batch.student.numel() * 4 > 8 << 20
    check(batch, backend=backend, kd_weight=0.5)


# --- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [64, 65])
def test_where_float_sums_become_too_long(ratio: int, dtype: torch.dtype) -> None:
    """Beyond 64 label pixels per logit everything is computed in double, for every dtype."""
    batch = make_batch(2, 4, (2, 3), (5, 4), (2 * ratio, 3 * ratio), dtype=dtype)
    got = check(batch, backend="cpu", return_maps=True, **ALL)
    for values in (got.loss, *got.maps.values()):
        assert values.dtype == torch.promote_types(dtype, F32)


@pytest.mark.parametrize(
    ("scale", "smoothing"), [(0.0, 0.0), (4.0, 0.0), (40.0, 0.0), (4.0, 1.0), (40.0, 1.0)]
)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 7, 8, 16, 32])
@pytest.mark.parametrize("align_corners", [False, True])
def test_integer_ratios(ratio: int, align_corners: bool, scale: float, smoothing: float) -> None:
    """Cross entropy of uniform, ordinary and steep logits."""
    batch = make_batch(2, 19, (9, 11), None, (9 * ratio, 11 * ratio), F32, scale=scale)
    options = {"align_corners": align_corners, "label_smoothing": smoothing}
    check(batch, backend="cpu", **options)


@pytest.mark.parametrize(
    ("grid", "size"), [((2, 1500), (5, 4001)), ((1, 1), (1, 65536)), ((2, 2), (700, 700))]
)
def test_far_from_the_origin(grid: tuple[int, int], size: tuple[int, int]) -> None:
    """Column 4000 of a ratio that is no power of two: the taps must be placed in double. And a
    great many label pixels per logit."""
    check(make_batch(1, 3, grid, None, size, F32, 5.0, ignored=0.0), backend="cpu")


def test_infinite_logits_spread_no_further_than_their_weights() -> None:
    """-inf masks a class; the pixels that do not read it stay finite, on the grid points too."""
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0, 2] = float("-inf")
    x = logits.requires_grad_()
    target = torch.zeros(1, 1, 5, dtype=torch.int64)
    output = functional.cross_entropy(x, target, align_corners=True, backend="cpu")
    output.loss.backward()
    # columns 0, 0.5, 1 see two equal classes; 1.5 and 2 see the second one masked
    assert float(output.loss.detach()) == pytest.approx(3 * 0.6931471805599453 / 5, rel=1e-6)
    assert x.grad.isfinite().all()


# --- large and broken values ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e20, 1e29, 1e31, 3e37, 3e38])
@pytest.mark.parametrize("size", [(9, 21), (36, 84), (23, 50)])
@every_isa
def test_huge_finite_logits_are_those_of_the_oracle(
    backend: str, size: tuple[int, int], value: float
) -> None:
    """p is 0 or 1 at every pixel: finite, and neither an overflow nor a NaN from inf - inf.

    Rows at value take turns with rows at -value in one class: their difference at 3e38 is not a
    float, and interpolated pixels between them see all that lies between."""
    batch = make_batch(2, 4, (9, 21), None, size, dtype=F32)
    batch.student[:, 0, ::2] = value
    batch.student[:, 0, 1::2] = -value
    batch.target[batch.target == 0] = 1
    got, expected = evaluate(batch, backend=backend), truth(batch)
    assert_accurate(got.student_grad, expected.student_grad)
    if value < torch.finfo(F32).max / 2:  # beyond, the loss itself is no float32, in torch neither
        assert float(got.loss) == pytest.approx(float(expected.loss), rel=2e-6)


@every_isa
def test_equal_models_have_no_divergence(backend: str) -> None:
    """Exactly: the logarithms of powers of 2 are exact, and what is left cancels."""
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    for classes in (1, 2, 4):
        logits = torch.zeros(1, classes, 4, 4)
        for options in (
            {"kd_weight": 1.0, "kd_divergence": "js"},
            {"hetero_weight": 1.0, "evaluation": "none"},
        ):
            batch = Batch(logits, logits.clone(), target)
            got = evaluate(batch, backend=backend, ce_weight=0.0, temperature=4.0, **options)
            assert got.loss == 0
            assert not got.student_grad.any()


@pytest.mark.parametrize("bad", [1e31, 3e38, -math.inf])
@pytest.mark.parametrize("size", [(26, 37), (104, 148)], ids=["identity", "stride-4"])
@every_isa
def test_huge_values_change_nothing_in_other_images_and_bands(
    backend: str, size: tuple[int, int], bad: float
) -> None:
    """Care is taken band by band: what does not see the huge value keeps its bits."""
    clean = make_batch(2, 5, (26, 37), None, size, dtype=F32)
    clean.target[clean.target == 3] = 2
    dirty = clean._replace(student=clean.student.clone())
    dirty.student[1, 3, 12, 20] = bad
    here, there = (evaluate(batch, backend=backend).student_grad for batch in (clean, dirty))
    assert torch.equal(here[0], there[0])
    # bands are 8 rows of logits; row 12 is seen by labels from row 11 to 13, these are of band 1
    assert torch.equal(here[1, :, :8], there[1, :, :8])
    assert torch.equal(here[1, :, 17:], there[1, :, 17:])
    far = torch.ones(37, dtype=torch.bool)
    far[18:23] = False
    assert_accurate(there[1][..., far], here[1][..., far])
    assert not torch.equal(here[1, :, 12], there[1, :, 12])


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("size", [(26, 37), (104, 148), (61, 50)])
@pytest.mark.parametrize(
    "bad",
    [[(0, 0, 0)], [(1, 25, 36)], [(1, 3, 5), (0, 20, 1), (0, 20, 30)], [(1, 9, 36), (1, 10, 0)]],
)
def test_the_first_label_out_of_range_is_named(
    bad: list[tuple[int, int, int]], size: tuple[int, int], strided: bool, label_dtype: torch.dtype
) -> None:
    """In reading order, whatever band and lane the others are in; also with a gradient to make."""
    batch = make_batch(2, 5, (26, 37), None, size, dtype=F32, label_dtype=label_dtype)
    label = 254 if label_dtype == torch.uint8 else -7
    for b, y, x in bad:
        batch.target[b, y, x] = label
    b, y, x = min(bad)
    target = arrange_labels(batch.target, "sliced" if strided else "contiguous")
    expected = rf"label {label} at \(b={b}, y={y}, x={x}\).*; {len(bad)} such pixels"
    for wanted in (False, True):
        with pytest.raises(ValueError, match=expected):
            functional.cross_entropy(
                batch.student.clone().requires_grad_(wanted), target, backend="cpu"
            )


# --- memory --------------------------------------------------------------------------------------

_PEAK = """
import json, sys, torch
import torch.nn.functional as F
from heteroakd_fast import functional
torch.set_num_threads(2)
classes, low, size, backend, weights = json.loads(sys.argv[1])
def logits(low):
    return torch.randn(1, classes, low, low)
x, t = logits(low).requires_grad_(), logits(low)
y = torch.randint(0, classes, (1, size, size), dtype=torch.uint8)
def step(x, t, y):
    if backend == "eager":
        z = F.interpolate(x, y.shape[1:], mode="bilinear")
        return F.cross_entropy(z, y.long(), ignore_index=255).backward()
    functional.distillation_loss(x, y, t, backend=backend, **weights).loss.backward()
# load and allocate what every call needs once
step(logits(4).requires_grad_(), logits(4), y[:, :8, :8])
def status(name):
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) for l in f if l.startswith(name)) * 1024
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
step(x, t, y)
print(json.dumps(status("VmHWM") - before))
"""


def peak_bytes(classes: int, low: int, size: int, backend: str, **weights: float) -> int:
    argument = json.dumps([classes, low, size, backend, weights])
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, argument], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.parametrize(
    ("weights", "copies", "growth"),
    [
        # gradient, its unscaled accumulation, edges, and per-thread rows and tiles
        ({}, 6, 4 << 20),
        # the gradient, two unscaled ones, and what each thread holds of the rows of two models
        ({"hetero_weight": 1.0}, 10, 6 << 20),
    ],
    ids=["ce", "ce+hetero"],
)
def test_peak_memory_does_not_grow_with_the_label_grid(
    weights: dict[str, float], copies: int, growth: int
) -> None:
    classes, low = 150, 64
    logits, full = classes * low * low * 4, classes * 1024 * 1024 * 4
    small, large = (peak_bytes(classes, low, size, "cpu", **weights) for size in (256, 1024))
    assert large < copies * logits + (8 << 20), f"{large / 2**20:.1f} MiB"
    assert large - small < growth, f"{small / 2**20:.1f} -> {large / 2**20:.1f} MiB"
    assert large < full / (10 if weights else 20)
    if not weights:
        eager, reference = (peak_bytes(classes, low, 256, name) for name in ("eager", "reference"))
        assert eager > 10 * small, "the measurement should see a materialised grid"
        assert reference < eager / 2, f"{reference / 2**20:.1f} of eager's {eager / 2**20:.1f} MiB"


@pytest.mark.skipif(
    not os.environ.get("HETEROAKD_TEST_LARGE"),
    reason="needs 32 GiB of free memory and a minute; HETEROAKD_TEST_LARGE=1 runs it",
)
def test_gradient_of_more_than_2_31_elements() -> None:
    """2 x 4096 x 513 x 513: the last image's gradient is where 64-bit offsets put it."""
    torch.use_deterministic_algorithms(False)
    one = torch.randn(1, 1, 513, 513).bfloat16() * 3
    logits = one.expand(2, 4096, 513, 513).detach().requires_grad_()
    target = torch.tensor([[[7, 4095], [255, 0]], [[4000, 1], [2, 4095]]])
    loss = functional.cross_entropy(logits, target, backend="cpu").loss
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.numel() > 2**31
    for label, y, x in ((4095, 1, 1), (4000, 0, 0)):
        # the pixel's centre falls between grid points: a corner of it gets a share of p - 1
        row, column = (128, 384)[y], (128, 384)[x]
        assert grad[1, label, row, column] == pytest.approx((1 / 4096 - 1) / 7, rel=0.01)
        assert grad[1, 17, row, column] == pytest.approx(1 / 4096 / 7, rel=0.01)


def test_a_call_that_gives_the_student_nothing_records_nothing() -> None:
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    loss = functional.distillation_loss(
        student, target, student.detach(), ce_weight=0.0, teacher_ce_weight=1.0, backend="cpu"
    ).loss
    assert not loss.requires_grad
    (loss + student.sum()).backward()
    assert (student.grad == 1).all()


def test_inputs_of_inference_mode_may_change_before_backward() -> None:
    """Autograd has no version of them, so the backend keeps its own copy."""
    batch = make_batch(2, 5, (6, 7), (6, 7), (6, 7), dtype=F32)
    options = {"kd_weight": 1.0, "backend": "cpu"}
    expected = evaluate(batch, **options)
    with torch.inference_mode():
        teacher = batch.teacher.clone()
    student = batch.student.clone().requires_grad_()
    loss = functional.distillation_loss(student, batch.target, teacher, **options).loss
    with torch.inference_mode():
        teacher.zero_()
    loss.backward()
    assert torch.equal(student.grad, expected.student_grad)


@pytest.mark.parametrize("size", [(4, 6), (16, 24)])
@every_isa
def test_divergences_of_huge_logits(backend: str, size: tuple[int, int]) -> None:
    batch = make_batch(2, 5, (4, 6), (4, 6), size, dtype=F32)
    batch.student[:, 1] = 1e33
    options = {"ce_weight": 0.0, "kd_weight": 1.0}
    got, expected = evaluate(batch, backend=backend, **options), truth(batch, **options)
    assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-5)
