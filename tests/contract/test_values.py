"""docs/contract.md: value and gradients of every backend equal the oracle's in float64, whatever
the terms, grids, dtypes, layouts and labels. What a kernel computes in a way of its own is tested
again in `tests/kernels`."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    BACKENDS,
    CPU_KERNELS,
    DTYPES_16,
    F32,
    FAST_CASES,
    KERNELS,
    OBJECTS,
    TERM_CASES,
    Batch,
    Result,
    assert_like_logits,
    assert_maps_match,
    assert_matches,
    assert_same_bits,
    check,
    complete,
    evaluate,
    every_backend,
    every_kernel,
    make_batch,
    reads,
    truth,
)
from geometries import GEOMETRIES, LAYOUTS, SMALL, arranged, batch_of
from interpreter import INTERPRETED

from heteroakd_fast.terms import Term

HETERO: dict[str, Any] = {"hetero_weight": 1.0, "temperature": 2.0}
ALL = TERM_CASES["all"]
CASES = {**FAST_CASES, **TERM_CASES, "ce+hetero": HETERO}

some_geometries = pytest.mark.parametrize("geometry", ["stride-4", "label-grid", "other-teacher"])


@complete
@pytest.mark.parametrize("dtype", [torch.float64, F32], ids=str)
@pytest.mark.parametrize("case", TERM_CASES)
@every_kernel
def test_every_term(backend: str, case: str, dtype: torch.dtype) -> None:
    """In float64 to 1e-12: what is left to see there is arithmetic, not rounding."""
    if (backend, case, dtype) == ("reference", "kd-standardized", F32):
        pytest.skip("a pixel of s = 0.05 shows how PyTorch rounds where it interpolates by thirds")
    check(batch_of("stride-3", dtype=dtype), backend=backend, **TERM_CASES[case])


@pytest.mark.parametrize("dtype", [F32, torch.float64, *DTYPES_16], ids=str)
@pytest.mark.parametrize("case", TERM_CASES)
@every_backend
def test_every_term_in_every_dtype(backend: str, case: str, dtype: torch.dtype) -> None:
    got = check(make_batch(dtype=dtype), backend=backend, **TERM_CASES[case])
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else F32)


@pytest.mark.share(3)
@pytest.mark.parametrize("temperature", [2.0, 4.0, 0.7])
@pytest.mark.parametrize("term", OBJECTS, ids=lambda term: term.name)
@every_kernel
def test_objects_beside_exponentials_of_a_temperature(
    backend: str, term: Term, temperature: float
) -> None:
    """Exponentials at T = 1 are powers of those at the temperature of the pass."""
    if term.shares_temperature and hasattr(term, "temperature"):
        term = replace(term, temperature=temperature)
    options = {"ce_weight": 0.3, "kd_weight": 0.01, "temperature": temperature}
    check(batch_of("stride-4"), backend=backend, terms=(term,), **options)


@pytest.mark.share(3)
@pytest.mark.parametrize(
    "case", ["all", "ce-smoothed", "kd-js", "kd-reverse", "hetero-mix-logits", "hetero-paper",
             "hetero-paper-space", "hetero-paper-space-mix-teacher", "teacher_ce"]
)  # fmt: skip
@pytest.mark.parametrize(
    "geometry", ["label-grid", "label-grid-ragged", "other-teacher", "several-warps"]
)
@every_kernel
def test_terms_on_other_grids(backend: str, geometry: str, case: str) -> None:
    check(batch_of(geometry), backend=backend, **TERM_CASES[case])


@cache
def expected_of(
    geometry: str, case: str, align_corners: bool = False
) -> tuple[Batch, dict[str, Any], Result]:
    """A batch with options and what the oracle says of it, which is the same for every backend."""
    options = CASES[case]
    batch = batch_of(geometry)
    maps = {"return_maps": True} if options.get("hetero_weight") else {}
    return batch, options, truth(batch, 2.5, align_corners=align_corners, **options, **maps)


@complete
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("backend", "geometry"),
    [
        (backend, geometry)
        for backend in KERNELS
        for geometry in (SMALL if backend == "reference" else GEOMETRIES)
    ],
)
def test_every_geometry(backend: str, geometry: str, align_corners: bool) -> None:
    """CPU kernels have one way for all terms; GPU kernels have their own for these two."""
    case = "all" if backend.startswith(("cpu", "reference")) else "ce+hetero"
    batch, options, expected = expected_of(geometry, case, align_corners)
    options = {**options, "return_maps": backend.startswith("cpu")}
    got = evaluate(batch, 2.5, backend=backend, align_corners=align_corners, **options)
    assert_matches(got, expected)
    if got.maps is not None:
        assert_maps_match(got, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 2), (4, 6), (2, 3), (12, 18), (129, 131)])
@pytest.mark.parametrize("grid", [(4, 6), (1, 1), (1, 9)])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("case", ["ce", "all"])
@every_backend
def test_any_ratio_of_grids(
    backend: str, case: str, align_corners: bool, grid: tuple[int, int], size: tuple[int, int]
) -> None:
    if backend == "triton" and INTERPRETED and size > (100, 100):
        pytest.skip("too large for an interpreter")
    batch = make_batch(grid=grid, size=size, ignored=0.0)
    check(batch, backend=backend, align_corners=align_corners, **TERM_CASES[case])


@pytest.mark.share(13)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, torch.float64, *DTYPES_16], ids=str)
@pytest.mark.parametrize(
    ("geometry", "case"),
    [
        ("stride-4", "ce+kd+hetero"),
        ("label-grid", "ce+kd+hetero"),
        ("label-grid-ragged", "ce+hetero-T1.7"),
        ("other-teacher", "all"),
        ("bands", "all"),
        ("bands-label-grid", "all"),
    ],
)
@every_kernel
def test_dtypes_and_layouts(
    backend: str, geometry: str, case: str, dtype: torch.dtype, layout: str
) -> None:
    """Strides change no bit; gradients get those of their logits."""
    options = CASES[case]
    dense = batch_of(geometry, dtype=dtype)
    batch = arranged(dense, layout)
    got = evaluate(batch, 2.5, backend=backend, **options)
    assert_matches(got, truth(dense, 2.5, **options))
    if (backend, dtype) != ("reference", torch.float64):  # the oracle itself
        assert_like_logits(batch, got)
        assert_same_bits(got, evaluate(dense, 2.5, backend=backend, **options))


@pytest.mark.parametrize("expanded", [(1, -1, 1), (1, 1, -1)])
@every_backend
def test_expanded_input(backend: str, expanded: tuple[int, int, int]) -> None:
    """Logits and labels with strides of 0."""
    b, h, w = (slice(None) if size < 0 else slice(0, size) for size in expanded)
    batch = make_batch(dtype=F32)
    logits, labels = batch.student[b, :, h, w], batch.target[b, h, w]
    logits, labels = logits.expand_as(batch.student), labels.expand_as(batch.target)
    assert 0 in logits.stride()
    got = evaluate(batch._replace(student=logits, target=labels), backend=backend)
    dense = batch._replace(student=logits.contiguous(), target=labels.contiguous())
    assert_same_bits(got, evaluate(dense, backend=backend))


@pytest.mark.share(25)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("ignore_index", [255, 0, 2, 200])
@some_geometries
@every_backend
def test_labels_and_class_weights(
    backend: str, geometry: str, ignore_index: int, label_dtype: torch.dtype, weighted: bool
) -> None:
    batch = batch_of(geometry, classes=5, ignore_index=ignore_index, label_dtype=label_dtype)
    batch.target[:, 0, 0] = 1
    weight = torch.tensor([0.5, 2.0, 0.0, 1.5, 1.0]) if weighted else None
    options = {**HETERO, "class_weight": weight, "ignore_index": ignore_index}
    options |= {"allow_ignored_class": ignore_index < 5, "backend": backend}
    got = check(batch, **options)
    for layout in ("sliced", "permuted"):
        labels = arranged(batch, layout).target
        assert_same_bits(got, evaluate(batch._replace(target=labels), 2.5, **options))


DTYPE_PAIRS = [
    *((F32, narrow) for narrow in DTYPES_16),
    *((narrow, F32) for narrow in DTYPES_16),
    (F32, torch.float64),
    (torch.float64, F32),
]


@pytest.mark.share(7)
@pytest.mark.parametrize(
    ("case", "dtypes"),
    [*itertools.product(["ce+hetero"], DTYPE_PAIRS), *itertools.product(["all"], DTYPE_PAIRS[:4])],
    ids=str,
)
@some_geometries
@every_kernel
def test_a_teacher_of_another_dtype(
    backend: str, geometry: str, case: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    batch = batch_of(geometry, dtype=torch.float64)
    batch = Batch(batch.student.to(dtypes[0]), batch.teacher.to(dtypes[1]), batch.target)
    check(batch, backend=backend, **CASES[case])


@pytest.mark.parametrize("classes", [2, 19, 21, 150, 171, 257])
@pytest.mark.parametrize("case", ["ce", "all", "kd-js", "hetero-mix-logits", "hetero-paper"])
@some_geometries
@every_backend
def test_numbers_of_classes(backend: str, geometry: str, case: str, classes: int) -> None:
    batch = batch_of(geometry, batch=1, classes=classes, ignore_index=-1)
    check(batch, backend=backend, ignore_index=-1, **TERM_CASES[case])


@pytest.mark.parametrize(
    "case", [*FAST_CASES, "ce-smoothed", "teacher_ce", "hetero-softmax-kl-T", "hetero-mix-logits"]
)
@some_geometries
@every_backend
def test_one_class_is_certain(backend: str, geometry: str, case: str) -> None:
    """Exactly."""
    got = evaluate(batch_of(geometry, classes=1), backend=backend, **CASES[case])
    assert got.loss == 0
    assert not any(got.terms.values())
    assert not any(grad.any() for grad in (got.student_grad, got.teacher_grad) if grad is not None)


@pytest.mark.parametrize("backend", [x for x in KERNELS if x != "triton" or not INTERPRETED])
def test_4096_classes(backend: str) -> None:
    batch = make_batch(1, 4096, (2, 3), size=(5, 7), dtype=F32, ignore_index=-1)
    check(batch, backend=backend, ignore_index=-1)


# --- ignored pixels, and values that are not finite ----------------------------------------------


@pytest.mark.parametrize("ignored", ["rows", "columns", "scattered", "all-but-one", "an-image"])
@pytest.mark.parametrize("case", ["all", "hetero-paper", "hetero-paper-space"])
@pytest.mark.parametrize("geometry", ["bands", "several-warps", "label-grid", "other-teacher"])
@every_kernel
def test_where_pixels_are_ignored(backend: str, geometry: str, case: str, ignored: str) -> None:
    """Vectors and images without a valid pixel, in any order with those that have one."""
    batch = batch_of(geometry, ignored=0.0)
    target = batch.target
    height, width = target.shape[1:]
    if ignored == "rows":
        target[:, 1 : height // 4] = 255
        target[:, height // 2 :: 3] = 255
    elif ignored == "columns":
        target[:, :, 2 : 2 * width // 3] = 255
    elif ignored == "scattered":
        target[torch.rand(target.shape) < 0.9] = 255
    elif ignored == "all-but-one":
        target.fill_(255)
        target[1, height // 2 + 1, width // 2 + 1] = 1
    else:
        target[0] = 255
    check(batch, backend=backend, **TERM_CASES[case])


def unread(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Which logits, [B, 1, h, w], lie beside no valid pixel, and not even near one."""
    size = target.shape[1:]
    if logits.shape[2:] == size:
        return (target == 255)[:, None]
    grid = torch.zeros(len(logits), 1, *logits.shape[2:], requires_grad=True)
    fine = F.interpolate(grid, size, mode="bilinear")
    (read,) = torch.autograd.grad(fine, grid, (target != 255)[:, None].float())
    return F.max_pool2d(read, 3, stride=1, padding=1) == 0


@cache
def partly_hidden(geometry: str, case: str) -> tuple[Batch, list[torch.Tensor], Result]:
    """A batch, the logits in it that only ignored pixels see, and what the oracle says."""
    batch = batch_of(geometry)
    batch.target[1, :, batch.target.shape[2] // 2 :] = 255
    batch.target[0, batch.target.shape[1] // 3 :] = 255
    hidden = [unread(logits, batch.target) for logits in batch[:2]]
    assert all(of_side[0].any() for of_side in hidden)
    assert hidden[0][1].any()
    return batch, hidden, truth(batch, 3.0, **CASES[case])


SOME_TERMS = ("ce-smoothed", "hetero-paper", "hetero-paper-space", "all")


@pytest.mark.share(25)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize(
    ("backend", "geometry", "case"),
    [
        *itertools.product(BACKENDS, ("stride-2", "label-grid"), TERM_CASES),
        *itertools.product(KERNELS, ("bands", "bands-label-grid"), ("ce", *SOME_TERMS)),
        *itertools.product(
            BACKENDS,
            ("stride-4", "label-grid-ragged", "other-teacher", "several-warps"),
            (*FAST_CASES, *SOME_TERMS),
        ),
    ],
)
def test_ignored_pixels_contribute_nothing(
    backend: str, geometry: str, case: str, bad: float
) -> None:
    """What only ignored pixels see is garbage in both models: columns, rows, and single logits on
    the label grid."""
    clean, hidden, expected = partly_hidden(geometry, case)
    logits = (x.masked_fill(at, bad) for x, at in zip(clean, hidden, strict=False))
    got = evaluate(Batch(*logits, clean.target), 3.0, backend=backend, **CASES[case])
    assert_matches(got, expected)
    for grad, at in zip((got.student_grad, got.teacher_grad), hidden, strict=True):
        assert grad is None or not grad[at.expand_as(grad)].any()
    if geometry in ("stride-2", "label-grid"):
        assert_same_bits(got, evaluate(clean, 3.0, backend=backend, **CASES[case]))


@pytest.mark.parametrize(
    ("case", "bad"),
    [*((case, math.nan) for case in TERM_CASES), ("all", math.inf), ("ce+hetero", math.inf)],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("backend", "geometry"),
    [
        *itertools.product(KERNELS, ("stride-4", "label-grid", "other-teacher")),
        *itertools.product(CPU_KERNELS, ("bands", "bands-label-grid")),
    ],
)
def test_nan_in_a_valid_pixel_is_not_hidden(
    backend: str, geometry: str, side: str, case: str, bad: float
) -> None:
    """In any lane of a vector."""
    options = CASES[case]
    affected = reads(side, **options)
    for column in (0, 7, 8, -1) if geometry.startswith("bands") else (1,):
        batch = batch_of(geometry, ignored=0.0)
        logits = getattr(batch, side)
        logits[1, 2, 1, column % logits.shape[3]] = bad
        got = evaluate(batch, backend=backend, **options)
        assert math.isfinite(got.loss) == (not affected)
        if math.isnan(bad):
            assert {name for name, value in got.terms.items() if math.isnan(value)} == affected
            if side == "student" and affected:
                assert got.student_grad[1].isnan().any()


@pytest.mark.share(5)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("geometry", ["stride-2", "stride-4", "other-teacher", "label-grid"])
@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "reference"])
def test_a_class_masked_by_minus_infinity(backend: str, geometry: str, align_corners: bool) -> None:
    """Cross entropy is that of the other classes; a label on the class costs infinitely much."""
    batch = batch_of(geometry, classes=6, ignored=0.3)
    batch.target[batch.target == 5] = 4
    masked = batch._replace(student=batch.student.clone())
    masked.student[:, 5] = -math.inf
    options = {"align_corners": align_corners}
    got = evaluate(masked, backend=backend, **options)
    others = batch._replace(student=batch.student[:, :5], teacher=batch.teacher[:, :5])
    assert not got.student_grad[:, 5].any()
    got = got._replace(student_grad=got.student_grad[:, :5])
    assert_matches(got, truth(others, **options))
    masked.target[0, 0, 0] = 5
    assert evaluate(masked, backend=backend, **options).terms["ce"] == math.inf
