"""The CUDA kernels against the float64 oracle: on a GPU, or here through the shim (cuda_shim.py).

Small shapes that cross every border there is: between cells, warps (31 columns each), blocks,
chunks of rows, blocks of staged classes, and the edges of the picture. `test_kernel_resources.py`
looks at what the compiler makes of the same sources.
"""

from __future__ import annotations

import math
from typing import Any

import cuda_shim
import pytest
import torch
from common import (
    TERM_CASES,
    Batch,
    Result,
    assert_matches,
    evaluate,
    make_batch,
    spec_of,
    truth,
)
from test_gpu import arrange, arrange_labels

from heteroakd_fast import backends
from heteroakd_fast.backends.cuda import BACKEND
from heteroakd_fast.spec import LossSpec

if backends.available()["cuda"] is not None:
    pytest.skip(f"cuda: {backends.available()['cuda']}", allow_module_level=True)

SHIM = not torch.cuda.is_available()
DEVICE = "cpu" if SHIM else "cuda"
F32 = torch.float32
HETERO: dict[str, Any] = {"hetero_weight": 1.0, "temperature": 2.0}
# What the kernels by cells and on the label grid compute; everything else goes by segments.
USUAL: dict[str, dict[str, Any]] = {
    "ce": {},
    "hetero": {"ce_weight": 0.0, "hetero_weight": 1.5},
    "ce+kd": {"kd_weight": 0.7, "temperature": 4.0},
    "kd": {"ce_weight": 0.0, "kd_weight": 0.7, "temperature": 0.7},
    "ce+hetero-T2": {"hetero_weight": 0.7, "temperature": 2.0, "tau": 0.6},
    "ce+hetero-T1.7": {"hetero_weight": 0.7, "temperature": 1.7},
    "ce+hetero-no-evaluation": {"hetero_weight": 0.7, "evaluation": "none"},
    "ce+kd+hetero": {"kd_weight": 0.4, "hetero_weight": 0.7, "temperature": 2.0},
    "maps": {"hetero_weight": 0.7, "return_maps": True},
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "several-warps": {"grid": (9, 40), "teacher_grid": None, "size": (27, 120), "batch": 2},
    "several-blocks": {"grid": (20, 17), "teacher_grid": None, "size": (60, 51), "batch": 1},
    "stride-4": {"grid": (5, 6), "teacher_grid": None, "size": (20, 24)},
    "stride-8": {"grid": (3, 4), "teacher_grid": None, "size": (24, 32), "batch": 1},
    "stride-2": {"grid": (5, 6), "teacher_grid": None, "size": (10, 12)},
    "uneven": {"grid": (3, 5), "teacher_grid": None, "size": (13, 17)},
    "other-teacher": {"grid": (4, 6), "teacher_grid": (8, 3), "size": (13, 17)},
    "label-grid": {"grid": (5, 8), "teacher_grid": None, "size": (5, 8)},
    "label-grid-ragged": {"grid": (5, 7), "teacher_grid": None, "size": (5, 7)},
    "label-grid-warps": {"grid": (3, 300), "teacher_grid": None, "size": (3, 300), "batch": 1},
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
    return evaluate(on_device(batch), 2.5, backend="cuda", **options)


def check(batch: Batch, **options: Any) -> Result:
    got = run(batch, **options)
    if DEVICE != "cpu":
        got = got._replace(
            loss=got.loss.cpu(),
            student_grad=None if got.student_grad is None else got.student_grad.cpu(),
            teacher_grad=None if got.teacher_grad is None else got.teacher_grad.cpu(),
        )
    expected = truth(batch, 2.5, **options)
    assert_matches(got, expected)
    if got.maps is not None:
        assert expected.maps is not None
        for name, values in expected.maps.items():
            torch.testing.assert_close(
                got.maps[name].cpu().double(), values.double(), rtol=1e-5, atol=2e-6, msg=name
            )
    return got


def kernels(batch: Batch, **options: Any) -> dict[str, str]:
    return BACKEND.kernel(*on_device(batch), spec_of(**options))


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


@pytest.mark.parametrize("case", USUAL)
@pytest.mark.parametrize("geometry", ["stride-4", "stride-8", "uneven", "label-grid"])
def test_usual_terms(geometry: str, case: str) -> None:
    batch = make_batch(classes=5, dtype=F32, **GEOMETRIES[geometry])
    names = set(kernels(batch, **USUAL[case]).values())
    assert all(("label grid" if geometry == "label-grid" else "cells") in name for name in names)
    check(batch, **USUAL[case])


@pytest.mark.parametrize(
    "case", ["all", "ce-smoothed", "kd-js", "kd-reverse", "hetero-mix-logits", "hetero-paper",
             "hetero-paper-space", "hetero-paper-space-mix-teacher", "teacher_ce"]
)  # fmt: skip
@pytest.mark.parametrize(
    "geometry", ["label-grid", "label-grid-ragged", "other-teacher", "several-warps"]
)
def test_other_terms(geometry: str, case: str) -> None:
    check(make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry]), **TERM_CASES[case])


@pytest.mark.parametrize("case", ["hetero-mix-teacher", "hetero-paper-mix-teacher"])
@pytest.mark.parametrize("geometry", ["stride-4", "label-grid"])
def test_without_mixing(geometry: str, case: str) -> None:
    """Kernels compiled for a mixture must not be sent what has none; maps show r_t all the same."""
    batch = make_batch(classes=5, dtype=F32, **GEOMETRIES[geometry])
    for options in (TERM_CASES[case], {**TERM_CASES[case], "ce_weight": 1.0, "kd_weight": 0.5}):
        assert set(kernels(batch, **options).values()) == {"segments"}
        check(batch, return_maps=True, **options)


@pytest.mark.parametrize("case", ["ce", "ce+hetero-T2", "ce+kd+hetero"])
@pytest.mark.parametrize("classes", [1, 2, 19, 29, 31, 64, 150, 300])
def test_numbers_of_classes(classes: int, case: str) -> None:
    """Classes are staged by blocks from 30 on (61 with one model): borders of blocks, ragged ends,
    labels in any of them."""
    shape: dict[str, Any] = {"grid": (3, 3), "teacher_grid": None, "size": (12, 12)}
    batch = make_batch(batch=1, classes=classes, dtype=F32, ignore_index=-1, **shape)
    check(batch, ignore_index=-1, **USUAL[case])


@pytest.mark.parametrize("case", ["ce", "ce+hetero-T2", "kd"])
@pytest.mark.parametrize("classes", [1, 19, 33, 70, 150, 1000])
def test_numbers_of_classes_on_the_label_grid(classes: int, case: str) -> None:
    shape: dict[str, Any] = {"grid": (3, 6), "teacher_grid": None, "size": (3, 6)}
    batch = make_batch(batch=1, classes=classes, dtype=F32, ignore_index=-1, **shape)
    check(batch, ignore_index=-1, **USUAL[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("geometry", "case"),
    [
        ("stride-4", USUAL["ce+kd+hetero"]),
        ("label-grid", USUAL["ce+kd+hetero"]),
        ("label-grid-ragged", USUAL["ce+hetero-T1.7"]),
        ("other-teacher", TERM_CASES["all"]),
    ],
    ids=str,
)
def test_16_bits_and_layouts(
    geometry: str, case: dict[str, Any], layout: str, dtype: torch.dtype
) -> None:
    batch = make_batch(classes=3, dtype=dtype, **GEOMETRIES[geometry])
    arranged = Batch(
        arrange(batch.student.to(DEVICE), layout),
        arrange(batch.teacher.to(DEVICE), layout),
        arrange_labels(batch.target.to(DEVICE), layout),
    )
    check(arranged, **case)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("geometry", ["stride-4", "label-grid", "other-teacher"])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_and_class_weights(geometry: str, label_dtype: torch.dtype, weighted: bool) -> None:
    batch = make_batch(classes=4, dtype=F32, label_dtype=label_dtype, **GEOMETRIES[geometry])
    weight = torch.tensor([0.5, 2.0, 0.0, 1.5], device=DEVICE) if weighted else None
    got = run(batch, class_weight=weight, **HETERO)
    weight = None if weight is None else weight.cpu()
    expected = truth(batch, 2.5, class_weight=weight, **HETERO)
    assert got.student_grad is not None
    assert_matches(got._replace(loss=got.loss.cpu(), student_grad=got.student_grad.cpu()), expected)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(torch.bfloat16, F32), (F32, torch.float16), (F32, torch.float64), (torch.float64, F32)],
    ids=str,
)
@pytest.mark.parametrize("geometry", ["stride-4", "label-grid"])
def test_mixed_dtypes(
    geometry: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    batch = make_batch(classes=3, **GEOMETRIES[geometry])
    check(
        batch._replace(
            student=batch.student.to(student_dtype), teacher=batch.teacher.to(teacher_dtype)
        ),
        **HETERO,
    )


@pytest.mark.parametrize("geometry", ["several-blocks", "label-grid-warps"])
def test_same_bits_again(geometry: str) -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry])
    first, second = run(batch, **HETERO), run(batch, **HETERO)
    assert first.student_grad is not None
    assert second.student_grad is not None
    assert torch.equal(first.student_grad, second.student_grad)
    assert first.terms == second.terms


@pytest.mark.parametrize("case", ["hetero-paper-space", "hetero-paper", "all"])
@pytest.mark.parametrize("geometry", ["several-warps", "label-grid"])
def test_an_image_without_pixels_counts_for_nothing(geometry: str, case: str) -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry])
    batch.target[1] = 255
    check(batch, **TERM_CASES[case])


@pytest.mark.skipif(not SHIM, reason="the shim chooses the order of threads, a GPU does not")
@pytest.mark.parametrize("geometry", ["several-blocks", "label-grid", "other-teacher"])
def test_same_bits_in_any_order_of_threads_and_blocks(geometry: str) -> None:
    """A missing barrier, or a read of what another warp writes, shows in some order."""
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry])
    student = batch.student.clone()
    student[0, 1, 2, 2] = -900.0
    batch = batch._replace(student=student)
    first = run(batch, **HETERO)
    assert first.student_grad is not None
    try:
        for seed in (1, 2, 3):
            cuda_shim.set_seed(seed)
            again = run(batch, **HETERO)
            assert again.student_grad is not None
            assert torch.equal(first.student_grad, again.student_grad)
            assert first.terms == again.terms
    finally:
        cuda_shim.set_seed(0)


# --- pixels that are handed over ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("scale", [1.0, 15.0, 60.0, 200.0, 1e4])
@pytest.mark.parametrize("classes", [4, 40])
def test_confident_logits(classes: int, scale: float, temperature: float) -> None:
    """From within the limit of staged logits, where the corners' maxima may lie far above a pixel's
    own, to far beyond it."""
    batch = make_batch(classes=classes, dtype=F32, **GEOMETRIES["stride-4"])
    batch = Batch(batch.student * scale, batch.teacher * scale, batch.target)
    check(batch, kd_weight=0.3, hetero_weight=1.0, temperature=temperature)


@pytest.mark.parametrize("case", ["ce", "ce+kd+hetero", "maps"])
def test_some_pixels_of_a_cell_are_handed_over(case: str) -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES["stride-4"])
    student = batch.student.clone()
    student[0, 1, 2, 2] = -900.0  # beyond the limit, at the corner of four cells
    student[1, :, 1, 1] = torch.tensor([40.0, 0.0, -40.0])
    student[1, :, 1, 2] = torch.tensor([-40.0, 0.0, 40.0])
    check(batch._replace(student=student), **USUAL[case])


def test_ordinary_pixels_keep_their_bits_beside_others() -> None:
    batch = make_batch(classes=3, dtype=F32, ignored=0.0, **GEOMETRIES["stride-4"])
    student = batch.student.clone()
    student[0, 1, 2, 2] = -900.0
    plain, other = (
        evaluate(on_device(b), backend="cuda", return_maps=True, **HETERO).maps
        for b in (batch, batch._replace(student=student))
    )
    assert plain is not None
    assert other is not None
    for name, values in plain.items():
        same = values == other[name]
        assert same[1].all()
        assert same[0, :6].all()
        assert same[0, :, :6].all()
        assert not same[0, 8:12, 8:12].all()


@pytest.mark.parametrize("geometry", ["stride-4", "several-warps", "other-teacher"])
@pytest.mark.parametrize("case", [*USUAL, "hetero-paper"])
def test_nothing_of_an_ignored_pixel_comes_through(case: str, geometry: str) -> None:
    options = USUAL.get(case) or TERM_CASES.get(case, {})
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry])
    student, teacher, target = (tensor.clone() for tensor in batch)
    height, width = target.shape[1:]
    rows, columns = student.shape[2:]
    student[0, :, 0, 0] = math.nan
    student[0, 1, -1, -1] = math.inf
    target[0, : 2 * height // rows, : 2 * width // columns] = 255
    target[0, -2 * height // rows :, -2 * width // columns :] = 255
    teacher[1, 2, 0, 0] = -math.inf
    target[1, : 2 * height // teacher.shape[2], : 2 * width // teacher.shape[3]] = 255
    check(Batch(student, teacher, target), **options)


@pytest.mark.parametrize("case", ["ce", "ce+hetero-T2", "hetero-paper"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("ratio", [2, 4])
def test_a_neighbour_of_weight_zero_is_not_read(ratio: int, bad: float, case: str) -> None:
    """align_corners: every pixel on the border lies on a row or column that the bad logit is not
    on, in a cell that has it for a corner. (The oracle would multiply it by 0.)"""
    size = 2 * ratio + 1
    batch = make_batch(classes=3, dtype=F32, grid=(3, 3), teacher_grid=None, size=(size, size))
    student, target = batch.student.clone(), batch.target.clone()
    student[:, 1, 1, 1] = 0.0
    target[:, 1:-1, 1:-1] = 255
    options = {"align_corners": True, **(USUAL.get(case) or TERM_CASES.get(case, {}))}
    expected = truth(Batch(student, batch.teacher, target), 2.5, **options)
    student[:, 1, 1, 1] = bad
    got = run(Batch(student, batch.teacher, target), **options)
    assert got.student_grad is not None
    assert_matches(got._replace(loss=got.loss.cpu(), student_grad=got.student_grad.cpu()), expected)


@pytest.mark.parametrize("case", USUAL)
@pytest.mark.parametrize("geometry", ["label-grid", "label-grid-ragged"])
def test_nothing_of_an_ignored_pixel_comes_through_on_the_label_grid(
    geometry: str, case: str
) -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry])
    ignored = (batch.target == 255)[:, None]
    assert ignored.any()
    student = batch.student.masked_fill(ignored, math.nan)
    teacher = batch.teacher.masked_fill(ignored, -math.inf)
    check(batch._replace(student=student, teacher=teacher), **USUAL[case])


@pytest.mark.parametrize("geometry", ["stride-4", "label-grid", "other-teacher"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_of_a_valid_pixel_shows(geometry: str, bad: float) -> None:
    batch = make_batch(classes=3, dtype=F32, ignored=0.0, **GEOMETRIES[geometry])
    student = batch.student.clone()
    student[0, 1, 2, 2] = bad
    got = run(batch._replace(student=student), **HETERO)
    assert got.loss.isnan() if math.isnan(bad) else not got.loss.isfinite()


@pytest.mark.parametrize("size", [(3, 4), (9, 12), (6, 8)])
def test_a_label_on_a_masked_class_costs_infinitely_much(size: tuple[int, int]) -> None:
    batch = make_batch(classes=3, dtype=F32, grid=(3, 4), teacher_grid=None, size=size, ignored=0)
    student = batch.student.clone()
    student[:, 1] = -math.inf
    got = run(batch._replace(student=student))
    assert got.terms["ce"] == math.inf


@pytest.mark.parametrize("size", [(3, 4), (9, 12), (6, 8)])
def test_a_masked_class_without_labels_costs_nothing(size: tuple[int, int]) -> None:
    batch = make_batch(classes=3, dtype=F32, grid=(3, 4), teacher_grid=None, size=size)
    target = torch.where(batch.target == 1, 0, batch.target)
    student = batch.student.clone()
    student[:, 1] = -1e4
    check(Batch(student, batch.teacher, target), **USUAL["ce"])


# --- found by others ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize(("classes", "case"), [(61, "ce"), (60, "ce"), (30, "ce+hetero-T2")])
def test_a_bad_logit_of_another_chunk(classes: int, case: str, bad: float) -> None:
    """The last cell's right neighbour in the warp is the first one of other rows."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, classes, 3, 3, generator=generator)
    teacher = torch.randn(1, classes, 3, 3, generator=generator)
    target = torch.full((1, 9, 9), -1)
    target[0, 0, 8] = 0
    expected = truth(Batch(student, teacher, target), 2.5, ignore_index=-1, **USUAL[case])
    student = student.clone()
    student[:, :, 2, 0] = bad
    got = run(Batch(student, teacher, target), ignore_index=-1, **USUAL[case])
    assert got.student_grad is not None
    assert_matches(got._replace(loss=got.loss.cpu(), student_grad=got.student_grad.cpu()), expected)


def test_a_term_that_was_not_asked_for_spoils_nothing() -> None:
    """On the label grid kd alone is computed by the kernel that knows hetero."""
    batch = make_batch(batch=1, classes=3, dtype=F32, ignored=0.0, **GEOMETRIES["label-grid"])
    student, teacher = batch.student.clone(), batch.teacher.clone()
    student[:, 1] = -math.inf
    teacher[:, 1] = -math.inf
    got = run(Batch(student, teacher, torch.ones_like(batch.target)), **USUAL["kd"])
    assert got.student_grad is not None
    assert got.student_grad.isfinite().all()
    assert got.student_grad.abs().max() > 0


@pytest.mark.parametrize("case", ["ce", "ce+kd+hetero"])
@pytest.mark.parametrize(
    ("grid", "size"), [((2, 2), (64, 64)), ((1, 1), (128, 128)), ((1, 1), (64, 65))]
)
def test_large_cells_keep_their_digits(
    grid: tuple[int, int], size: tuple[int, int], case: str
) -> None:
    """Equal losses from pixel to pixel, where a float sum would be off to one side."""
    batch = make_batch(batch=1, classes=5, dtype=F32, grid=grid, teacher_grid=None, size=size)
    check(Batch(0 * batch.student, batch.teacher, batch.target), return_maps=True, **USUAL[case])
    check(batch, **USUAL[case])


@pytest.mark.parametrize("level", [5e10, 7.3e20, 3e37])
def test_equal_huge_logits(level: float) -> None:
    target = torch.zeros(1, 8, 12, dtype=torch.long)
    logits = torch.full((1, 2, 2, 3), level)
    got = run(Batch(logits, logits, target))
    assert got.terms["ce"] == pytest.approx(math.log(2.0), rel=2e-6)


@pytest.mark.parametrize("case", USUAL)
def test_one_class_is_exactly_zero(case: str) -> None:
    batch = make_batch(classes=1, dtype=F32, **GEOMETRIES["stride-4"])
    got = run(batch, **USUAL[case])
    assert got.student_grad is not None
    assert not got.student_grad.any()
    assert not any(got.terms.values())


# --- the kernels that a call gets --------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "options", "expected"),
    [
        ("stride-4", {}, {"ce": "cells: ce"}),
        ("stride-4", HETERO, dict.fromkeys(("ce", "hetero"), "cells: ce, hetero")),
        ("stride-2", {}, {"ce": "segments: ce"}),
        ("other-teacher", HETERO, dict.fromkeys(("ce", "hetero"), "segments: ce, kd, hetero")),
        (
            "stride-4",
            {"kd_weight": 1.0, "kd_divergence": "js"},
            dict.fromkeys(("ce", "kd"), "segments: ce, js"),
        ),
        ("stride-4", {"label_smoothing": 0.1}, {"ce": "segments"}),
        ("label-grid", {}, {"ce": "label grid: ce"}),
        ("stride-4", {"teacher_ce_weight": 1.0}, {"ce": "cells: ce", "teacher_ce": "cells: ce"}),
    ],
)
def test_kernels_are_named(
    geometry: str, options: dict[str, Any], expected: dict[str, str]
) -> None:
    batch = make_batch(classes=3, dtype=F32, **GEOMETRIES[geometry])
    assert kernels(batch, **options) == expected


def test_double_goes_by_segments() -> None:
    batch = make_batch(classes=3, **GEOMETRIES["stride-4"])
    assert kernels(batch) == {"ce": "segments in double"}


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
            backend="cuda",
        )


@pytest.mark.parametrize(
    ("student", "teacher", "target", "weight", "message"),
    [
        ((2, 3, 4), None, (2, 6, 6), None, "student_logits"),
        ((2, 3, 4, 4), (2, 4, 4, 4), (2, 6, 6), None, "teacher_logits"),
        ((2, 3, 4, 4), None, (1, 6, 6), None, "target"),
        ((2, 3, 4, 4), None, (2, 6, 6), (4,), "class_weight"),
        ((2, 3, 4, 4), None, (2, 0, 6), None, "not empty"),
    ],
)
def test_compiled_operator_refuses_the_same(
    student: Any, teacher: Any, target: Any, weight: Any, message: str
) -> None:
    def zeros(shape: Any, dtype: torch.dtype = F32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    with pytest.raises(RuntimeError, match=message):
        BACKEND.operators().cuda_forward(
            zeros(student),
            None if teacher is None else zeros(teacher),
            zeros(target, torch.int64),
            None if weight is None else zeros(weight),
            zeros(1, torch.float64),
            zeros(1, torch.float64),
            None,
            None,
            *(0, -1, -1, -1),
            *(1, 1, 0, True, 0.5, 1.0, 1.0, 255, False, 0.0),
            False,
        )
