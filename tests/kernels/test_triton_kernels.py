"""What is the Triton kernels' own, beyond what every backend is tested for (tests/contract): the
exact fallback, 64-bit offsets, launches, and the elementary functions.

On a GPU, or here in Triton's interpreter. `test_kernel_resources.py` looks at what the compiler
makes of the same sources.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import F32, TERM_CASES, Batch, make_batch
from common import check as check_on
from geometries import batch_of
from interpreter import INTERPRETED

from heteroakd_fast import backends
from heteroakd_fast.spec import LossSpec
from heteroakd_fast.terms import KD, CrossEntropy

if backends.available()["triton"] is not None:
    pytest.skip(f"triton: {backends.available()['triton']}", allow_module_level=True)

import triton
import triton.language as tl
from heteroakd_fast.kernels import config, distillation, formulas, launch, statistics

DEVICE = "cpu" if INTERPRETED else "cuda"
HETERO: dict[str, Any] = {"hetero_weight": 1.0, "temperature": 2.0}


def check(batch: Batch, **options: Any) -> None:
    check_on(batch, backend="triton", **options)


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 19, config.MANY_CLASSES, 150])
def test_numbers_of_classes(classes: int) -> None:
    """19 and 150 are no power of two; from MANY_CLASSES on the label's logit is read apart."""
    check(make_batch(1, classes, (2, 2), None, (4, 4), F32), **HETERO)


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
    batch = make_batch(1, 3, grid, None, size, F32)
    batch = Batch(20 * batch.student, 20 * batch.teacher, batch.target)
    check(batch, align_corners=align_corners, **options)


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensors had more than 2^31 elements."""
    monkeypatch.setattr(launch, "_INT32", 10)
    check(batch_of("other-teacher"), **TERM_CASES["all"])
    check(batch_of("label-grid"), **HETERO)


# --- the exact fallback ------------------------------------------------------------------------


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
    check(batch_of(geometry, dtype=torch.float64), **TERM_CASES[case])


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
    batch = make_batch(2, 4, (3, 4), None, (12, 16), F32)
    batch = Batch(batch.student * scale, batch.teacher * scale, batch.target)
    flags = careful_programs(batch, monkeypatch, hetero_weight=1.0, temperature=temperature)
    assert flags
    if scale <= 1.0:
        assert not any(flags)
    if scale >= 200.0:
        assert all(flags)


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
    monkeypatch.setattr(config, "static_launch", lambda _: config.Launch(pixels, warps=1))
    check(batch_of("other-teacher", dtype=torch.float64), **TERM_CASES["all"])


# --- the operator, called directly ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": (2, 2, 3, 3)}, "teacher: got C=2"),
        ({"teacher": None}, "teacher: got None"),
        ({"target": (1, 6, 6)}, "target: got shape"),
        ({"weight": (4,)}, "class_weight: got shape"),
    ],
)
def test_operator_refuses_what_would_be_read_out_of_bounds(
    changed: dict[str, Any], message: str
) -> None:
    shapes: dict[str, Any] = {"teacher": (2, 3, 3, 3), "target": (2, 6, 6), "weight": (3,)}
    shapes |= changed
    teacher = None if shapes["teacher"] is None else torch.zeros(shapes["teacher"], device=DEVICE)
    spec = LossSpec.of(CrossEntropy(), KD())
    with pytest.raises(ValueError, match=message):
        torch.ops.heteroakd_fast.sums(
            *(torch.zeros(2, 3, 3, 3, device=DEVICE), None, None, teacher, None, None),
            torch.zeros(shapes["target"], dtype=torch.int64, device=DEVICE),
            torch.ones(shapes["weight"], device=DEVICE),
            spec.vector(),
            structure=spec.structure,
            wants=[False] * 6,
            precision="ieee",
            backend="triton",
        )
