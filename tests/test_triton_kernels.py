"""The Triton kernels against the float64 oracle: on a GPU, or here in Triton's interpreter.

Small shapes that cross every border there is: between threads' cells, warps (31 columns each),
programs (62), chunks of rows, and the edges of the picture. `test_kernel_resources.py` looks at
what the compiler makes of the same sources.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from common import (
    TERM_CASES,
    Batch,
    Result,
    assert_matches,
    evaluate,
    make_batch,
    truth,
)
from interpreter import INTERPRETED
from test_gpu import arrange, arrange_labels

from heteroakd_fast import backends
from heteroakd_fast.spec import LossSpec

if backends.available()["triton"] is not None:
    pytest.skip(f"triton: {backends.available()['triton']}", allow_module_level=True)

import triton
import triton.language as tl
from heteroakd_fast.kernels import config, distillation, formulas, launch, statistics

DEVICE = "cpu" if INTERPRETED else "cuda"
F32 = torch.float32
HETERO: dict[str, Any] = {"hetero_weight": 1.0, "temperature": 2.0}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "several-warps": {"grid": (9, 40), "teacher_grid": None, "size": (18, 80), "batch": 2},
    "several-programs": {"grid": (20, 17), "teacher_grid": None, "size": (40, 34), "batch": 1},
    "other-teacher": {"grid": (4, 6), "teacher_grid": (8, 3), "size": (13, 17)},
    "label-grid": {"grid": (5, 8), "teacher_grid": None, "size": (5, 8)},
    "label-grid-ragged": {"grid": (5, 7), "teacher_grid": None, "size": (5, 7)},
    "teacher-on-label-grid": {"grid": (3, 4), "teacher_grid": (9, 11), "size": (9, 11)},
    "student-on-label-grid": {"grid": (9, 11), "teacher_grid": (3, 4), "size": (9, 11)},
    "downsampled": {"grid": (20, 11), "teacher_grid": (9, 23), "size": (9, 7)},
    "one-logit": {"grid": (1, 1), "teacher_grid": None, "size": (9, 7)},
    "one-row": {"grid": (1, 5), "teacher_grid": (3, 1), "size": (7, 11)},
    "large-ratio": {"grid": (2, 3), "teacher_grid": None, "size": (20, 36), "batch": 1},
    "one-row-of-labels": {"grid": (3, 3), "teacher_grid": None, "size": (1, 9)},
    "one-pixel": {"grid": (3, 3), "teacher_grid": None, "size": (1, 1), "ignored": 0.0},
}


def on_device(batch: Batch) -> Batch:
    return Batch(*(tensor.to(DEVICE) for tensor in batch))


def run(batch: Batch, **options: Any) -> Result:
    return evaluate(on_device(batch), 2.5, backend="triton", **options)


def check(batch: Batch, **options: Any) -> None:
    got = run(batch, **options)
    if DEVICE != "cpu":
        got = got._replace(
            loss=got.loss.cpu(),
            student_grad=None if got.student_grad is None else got.student_grad.cpu(),
            teacher_grad=None if got.teacher_grad is None else got.teacher_grad.cpu(),
        )
    assert_matches(got, truth(batch, 2.5, **options))


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, F32], ids=str)
@pytest.mark.parametrize("case", TERM_CASES)
def test_every_term(case: str, dtype: torch.dtype) -> None:
    """In float64 to 1e-12: what is left to see there is arithmetic, not rounding."""
    batch = make_batch(classes=3, dtype=dtype, grid=(3, 4), teacher_grid=None, size=(9, 12))
    check(batch, **TERM_CASES[case])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry: str, align_corners: bool) -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry])
    check(batch, align_corners=align_corners, **HETERO)


@pytest.mark.parametrize("case", ["all", "kd-js", "hetero-paper", "hetero-paper-space"])
@pytest.mark.parametrize("geometry", ["label-grid", "other-teacher"])
def test_terms_that_do_not_fold(geometry: str, case: str) -> None:
    check(make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry]), **TERM_CASES[case])


@pytest.mark.parametrize("classes", [1, 2, 19, config.MANY_CLASSES, 150])
def test_numbers_of_classes(classes: int) -> None:
    """19 and 150 are no power of two; from MANY_CLASSES on the label's logit is read apart."""
    check(
        make_batch(
            batch=1, classes=classes, dtype=F32, grid=(2, 2), teacher_grid=None, size=(4, 4)
        ),
        **HETERO,
    )


@pytest.mark.parametrize(
    ("grid", "size", "align_corners"),
    [
        ((12, 12), (3, 3), False),
        ((8, 8), (4, 4), True),
        ((3, 4), (15, 20), False),
        ((3, 4), (12, 16), True),
        ((4, 6), (13, 17), False),
    ],
)
@pytest.mark.parametrize(
    "options", [{"hetero_weight": 1.0, "temperature": 0.5}, {"kd_weight": 1.0}]
)
def test_steep_logits_where_threads_have_more_pixels_than_cells(
    grid: Any, size: Any, align_corners: bool, options: dict[str, Any]
) -> None:
    """Pixels that do not exist are computed with the others, and must stay finite to be nothing."""
    batch = make_batch(batch=1, classes=3, dtype=F32, grid=grid, teacher_grid=None, size=size)
    batch = Batch(20 * batch.student, 20 * batch.teacher, batch.target)
    check(batch, align_corners=align_corners, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_16_bits_and_layouts(layout: str, dtype: torch.dtype) -> None:
    batch = make_batch(classes=3, dtype=dtype, grid=(3, 4), teacher_grid=None, size=(9, 12))
    arranged = Batch(
        arrange(batch.student.to(DEVICE), layout),
        arrange(batch.teacher.to(DEVICE), layout),
        arrange_labels(batch.target.to(DEVICE), layout),
    )
    check(arranged, **TERM_CASES["all"])


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensors had more than 2^31 elements."""
    monkeypatch.setattr(launch, "_INT32", 10)
    check(make_batch(classes=3, dtype=F32), **TERM_CASES["all"])
    check(make_batch(classes=3, dtype=F32, **GEOMETRIES["label-grid"]), **HETERO)


def test_same_bits_again() -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES["several-programs"])
    first, second = run(batch, **HETERO), run(batch, **HETERO)
    assert first.student_grad is not None
    assert second.student_grad is not None
    assert torch.equal(first.student_grad, second.student_grad)
    assert first.terms == second.terms


# --- the careful twin --------------------------------------------------------------------------


@pytest.fixture
def always_careful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program raises its flag, and every pixel takes the exact way there."""
    if not INTERPRETED:
        pytest.skip("a constant of a compiled kernel")
    for module in (distillation, statistics):
        monkeypatch.setattr(module, "SMALLEST_TOTAL", tl.constexpr(math.inf))


@pytest.mark.usefixtures("always_careful")
@pytest.mark.parametrize(
    ("geometry", "case"),
    [
        *(("label-grid", case) for case in TERM_CASES if case != "teacher_ce"),
        *(("other-teacher", case) for case in ("ce-smoothed", "hetero-mix-logits", "hetero-paper")),
    ],
)
def test_careful_pass_computes_the_same(geometry: str, case: str) -> None:
    batch = make_batch(classes=3, dtype=torch.float64, **GEOMETRIES[geometry])
    check(batch, **TERM_CASES[case])


def careful_programs(batch: Batch, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[bool]:
    flags: list[bool] = []
    original = launch._launch

    def spy(*arguments: Any) -> Any:
        result = original(*arguments)
        flags.extend((result[0][:, int(distillation.FLAG)] != 0).tolist())
        return result

    monkeypatch.setattr(launch, "_launch", spy)
    check(batch, **options)
    return flags


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("scale", [1.0, 15.0, 200.0, 1e4])
def test_confident_logits(
    scale: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ordinary logits take the fast way. Where the corners' maxima lie far above a pixel's own, the
    bound would underflow, and the careful way is taken."""
    batch = make_batch(classes=4, dtype=F32, grid=(3, 4), teacher_grid=None, size=(12, 16))
    batch = Batch(batch.student * scale, batch.teacher * scale, batch.target)
    flags = careful_programs(batch, monkeypatch, hetero_weight=1.0, temperature=temperature)
    assert flags
    if scale <= 1.0:
        assert not any(flags)
    if scale >= 200.0:
        assert all(flags)


@pytest.mark.parametrize("case", ["ce-smoothed", "kd-js", "hetero-paper-space", "all"])
def test_nothing_of_an_ignored_pixel_comes_through(case: str) -> None:
    batch = make_batch(classes=3, dtype=F32, grid=(4, 6), teacher_grid=None, size=(16, 24))
    student, teacher, target = (tensor.clone() for tensor in batch)
    student[0, :, 0, 0] = math.nan
    student[0, 1, 3, 5] = math.inf
    teacher[1, 2, 1, 1] = math.nan
    target[0, :8, :8] = 255
    target[0, 10:, 18:] = 255
    target[1, :12, :12] = 255
    check(Batch(student, teacher, target), **TERM_CASES[case])


@pytest.mark.parametrize("case", ["ce", "kd-js", "hetero-mix-logits", "hetero-paper", "all"])
def test_nothing_of_an_ignored_pixel_comes_through_on_the_label_grid(case: str) -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES["label-grid"])
    ignored = (batch.target == 255)[:, None]
    assert ignored.any()
    student = batch.student.masked_fill(ignored, math.nan)
    teacher = batch.teacher.masked_fill(ignored, -math.inf)
    check(batch._replace(student=student, teacher=teacher), **TERM_CASES[case])


def test_nan_of_a_valid_pixel_shows() -> None:
    batch = make_batch(classes=3, dtype=F32, grid=(4, 6), teacher_grid=None, size=(16, 24))
    student = batch.student.clone()
    student[0, 1, 2, 2] = math.nan
    got = run(batch._replace(student=student), **HETERO)
    assert got.loss.isnan()


def test_a_label_on_a_masked_class_costs_infinitely_much() -> None:
    batch = make_batch(classes=3, dtype=F32, grid=(3, 4), teacher_grid=None, size=(3, 4), ignored=0)
    student = batch.student.clone()
    student[:, 1] = -math.inf
    got = run(batch._replace(student=student))
    assert got.terms["ce"] == math.inf


# --- elementary functions ----------------------------------------------------------------------


@triton.jit
def apply(x, y, BLOCK: tl.constexpr, FUNCTION: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if FUNCTION == 0:
        value = formulas.log(value)
    elif FUNCTION == 1:
        value = formulas.log2(value)
    else:
        value = formulas.log1p_unit(value)
    tl.store(y + at, value)


def applied(function: int, x: torch.Tensor) -> torch.Tensor:
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    apply[(x.numel() // 1024,)](x, y, BLOCK=1024, FUNCTION=function)
    return y.cpu().double()


def ulps(got: torch.Tensor, exact: torch.Tensor) -> float:
    spacing = torch.finfo(F32).eps * torch.exp2(exact.abs().clamp_min(1e-37).log2().floor())
    return ((got - exact).abs() / spacing).max().item()


def test_logarithms_keep_their_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.rand(1 << 16, generator=generator) * 44 - 32)
    x[:1024] = 1 + torch.linspace(-1e-3, 1e-3, 1024)  # where a logarithm is small
    exact = x.double()
    assert ulps(applied(0, x), exact.log()) <= 2.5
    error = (applied(1, x) - exact.log2()).abs() - 6e-8 * exact.log2().abs()
    assert error.max() <= 1e-7
    powers = torch.exp2(torch.arange(-126.0, 127.0)).repeat(5)[:1024]
    assert torch.equal(applied(1, powers), powers.double().log2())
    unit = torch.rand(1 << 16, generator=generator) ** 4
    assert ulps(applied(2, unit), unit.double().log1p()) <= 3.0
    assert applied(0, torch.full((1024,), math.nan)).isnan().all()
    assert applied(1, torch.full((1024,), math.nan)).isnan().all()


# --- configuration -----------------------------------------------------------------------------


def test_threads_take_what_wastes_least() -> None:
    def pixels(high: int, wide: int, most: int = 16) -> tuple[int, int, int, int]:
        launched = config.Launch(pixels=most, warps=2)
        return config.tiling((10, 10), (10 * high, 10 * wide), False, launched)[:4]

    assert pixels(4, 4) == (4, 4, 1, 1)
    assert pixels(8, 8) == (2, 8, 4, 1)
    assert pixels(2, 2) == (2, 2, 1, 1)
    assert pixels(3, 3) == (4, 4, 1, 1)
    assert pixels(4, 4, most=8) == (2, 4, 2, 1)
    assert pixels(32, 32) == (2, 8, 16, 4)


@pytest.mark.parametrize(("pixels", "rows"), [(2, 1), (8, 3), (8, 4)])
def test_other_launches_compute_the_same(
    pixels: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "rows_of_program", lambda *_: rows)
    monkeypatch.setattr(config, "launch_config", lambda *_: config.Launch(pixels, warps=1))
    check(make_batch(classes=3, dtype=torch.float64), **TERM_CASES["all"])


# --- these tests can fail ----------------------------------------------------------------------


@triton.jit
def _wrong_kl(weighted_difference, inverse_total_a, log2_total_a, log2_total_b):
    return weighted_difference * inverse_total_a - log2_total_a + log2_total_b


@triton.jit
def _wrong_mixed_target(teacher_weight, teacher, student_weight, student):
    return teacher_weight * student + student_weight * teacher


@triton.jit
def _wrong_numerator(is_label, e, others):
    return tl.where(is_label, others, e)


@triton.jit
def _wrong_fraction(position, cell, in_size, step, origin, unit, FLOAT: tl.constexpr):
    return ((position * step + origin - cell * unit) / unit).to(FLOAT)


@triton.jit
def _wrong_reliability(teacher_nll, student_nll, inverse_tau, PTX: tl.constexpr):
    r = tl.exp2((teacher_nll - student_nll) * inverse_tau)
    return 1.0 / (1.0 + r), r / (1.0 + r)


@pytest.mark.parametrize(
    ("module", "name", "replacement", "case"),
    [
        ("distillation", "kl", _wrong_kl, "kd"),
        ("distillation", "mixed_target", _wrong_mixed_target, "hetero-softmax-kl"),
        ("distillation", "reliability", _wrong_reliability, "hetero-softmax-kl"),
        ("distillation", "cross_entropy_gradient_numerator", _wrong_numerator, "ce"),
        # the whole gradient of an edge pixel must go to the logit that exists
        ("tiles", "fraction_in_cell", _wrong_fraction, "ce"),
    ],
)
def test_a_broken_kernel_is_noticed(
    module: str, name: str, replacement: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETED:
        pytest.skip("the interpreter looks names up at each call, the compiler once")
    broken = importlib.import_module(f"heteroakd_fast.kernels.{module}")
    batch = make_batch(classes=3, dtype=F32, grid=(3, 4), teacher_grid=None, size=(9, 12))
    check(batch, **TERM_CASES[case])
    monkeypatch.setattr(broken, name, replacement)
    with pytest.raises(AssertionError):
        check(batch, **TERM_CASES[case])


# --- the operator, called directly ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"teacher": (2, 2, 3, 3)}, {}, "teacher_logits: got shape"),
        ({"teacher": None}, {}, "teacher_logits: got None"),
        ({"target": (1, 6, 6)}, {}, "target: got shape"),
        ({"weight": (4,)}, {}, "class_weight: got shape"),
        ({}, {"kd_divergence": "x"}, "kd_divergence: got 'x'"),
        ({}, {"temperature": 0.0}, "temperature"),
    ],
)
def test_operator_refuses_what_would_be_read_out_of_bounds(
    changed: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    shapes: dict[str, Any] = {"teacher": (2, 3, 3, 3), "target": (2, 6, 6), "weight": (3,)}
    shapes |= changed
    teacher = None if shapes["teacher"] is None else torch.zeros(shapes["teacher"], device=DEVICE)
    spec = LossSpec(terms=("ce", "kd"))
    with pytest.raises(ValueError, match=message):
        torch.ops.heteroakd_fast.distillation_sums(
            torch.zeros(2, 3, 3, 3, device=DEVICE),
            teacher,
            torch.zeros(shapes["target"], dtype=torch.int64, device=DEVICE),
            torch.ones(shapes["weight"], device=DEVICE),
            **{**spec.options(), **options},
            student_grad=False,
            teacher_grad=False,
            backend="triton",
        )
