"""What is the CUDA kernels' own, beyond what every backend is tested for (tests/contract): which
kernel a call gets, staged classes, pixels that are handed over, any order of threads.

On a GPU, or here through the shim (cuda_shim.py). `test_kernel_resources.py` looks at what the
compiler makes of the same sources.
"""

from __future__ import annotations

import math
from typing import Any

import cuda_shim
import pytest
import torch
from common import (
    F32,
    FAST_CASES,
    TERM_CASES,
    Batch,
    Result,
    assert_matches,
    assert_same_bits,
    evaluate,
    make_batch,
    truth,
)
from common import check as check_on
from geometries import batch_of

from heteroakd_fast import backends
from heteroakd_fast.backends import compiled
from heteroakd_fast.spec import LossSpec
from heteroakd_fast.terms import KD, CrossEntropy

if backends.available()["cuda"] is not None:
    pytest.skip(f"cuda: {backends.available()['cuda']}", allow_module_level=True)

SHIM = not torch.cuda.is_available()
DEVICE = "cpu" if SHIM else "cuda"
HETERO: dict[str, Any] = {"hetero_weight": 1.0, "temperature": 2.0}


def on_device(batch: Batch) -> Batch:
    return Batch(*(tensor.to(DEVICE) for tensor in batch))


def run(batch: Batch, **options: Any) -> Result:
    return evaluate(batch, 2.5, backend="cuda", **options)


def check(batch: Batch, **options: Any) -> Result:
    return check_on(batch, backend="cuda", **options)


#: Names of kernels that belong to a call and not to its pass.
AROUND = {"finish_sums", "group_totals", "combine_gradients", "reduce_space"}


def kernels(batch: Batch, **options: Any) -> set[str]:
    """The kernels that compute such a call's passes, as the shim heard them launched."""
    if not SHIM:
        pytest.skip("a GPU does not say which kernels ran")
    cuda_shim.launched()
    evaluate(batch, backend="cuda", **options)
    return {name for name in cuda_shim.launched() if name not in AROUND}


# --- accuracy ----------------------------------------------------------------------------------


usual = pytest.mark.parametrize("case", FAST_CASES)
fast = pytest.mark.parametrize("geometry", ["stride-4", "stride-8", "uneven", "label-grid"])


@usual
@fast
def test_usual_terms(geometry: str, case: str) -> None:
    check(batch_of(geometry, classes=5), **FAST_CASES[case])


@usual
@fast
def test_usual_terms_get_the_fast_kernels(geometry: str, case: str) -> None:
    names = kernels(batch_of(geometry, classes=5), **FAST_CASES[case])
    assert names
    assert all(("label grid" if geometry == "label-grid" else "cells") in name for name in names)


@pytest.mark.parametrize("case", ["hetero-mix-teacher", "hetero-paper-mix-teacher"])
@pytest.mark.parametrize("geometry", ["stride-4", "label-grid"])
def test_without_mixing(geometry: str, case: str) -> None:
    """Kernels compiled for a mixture must not be sent what has none; maps show r_t all the same."""
    batch = batch_of(geometry, classes=5)
    any_terms = "segments: paper" if "paper" in case else "segments"
    for options in (TERM_CASES[case], {**TERM_CASES[case], "ce_weight": 1.0, "kd_weight": 0.5}):
        assert kernels(batch, **options) == {any_terms}
        check(batch, return_maps=True, **options)


@pytest.mark.parametrize("case", ["ce", "kd", "ce+hetero-T2", "ce+kd+hetero"])
@pytest.mark.parametrize(
    ("grid", "size", "classes"),
    [
        *(((3, 3), (12, 12), classes) for classes in (1, 2, 19, 29, 31, 64, 150, 300)),
        *(((3, 6), (3, 6), classes) for classes in (1, 19, 33, 70, 150, 1000)),
    ],
)
def test_numbers_of_classes(
    grid: tuple[int, int], size: tuple[int, int], classes: int, case: str
) -> None:
    """Classes are staged by blocks from 30 on (61 with one model): borders of blocks, ragged ends,
    labels in any of them."""
    batch = make_batch(1, classes, grid, None, size, dtype=F32, ignore_index=-1)
    check(batch, ignore_index=-1, **FAST_CASES[case])


@pytest.mark.skipif(not SHIM, reason="the shim chooses the order of threads, a GPU does not")
@pytest.mark.parametrize("geometry", ["several-blocks", "label-grid", "other-teacher"])
def test_same_bits_in_any_order_of_threads_and_blocks(geometry: str) -> None:
    """A missing barrier, or a read of what another warp writes, shows in some order."""
    batch = batch_of(geometry)
    student = batch.student.clone()
    student[0, 1, 2, 2] = -900.0
    batch = batch._replace(student=student)
    first = run(batch, **HETERO)
    try:
        for seed in (1, 2, 3):
            cuda_shim.set_seed(seed)
            assert_same_bits(run(batch, **HETERO), first)
    finally:
        cuda_shim.set_seed(0)


# --- pixels that are handed over ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize("scale", [1.0, 15.0, 60.0, 200.0, 1e4])
@pytest.mark.parametrize("classes", [4, 40])
def test_confident_logits(classes: int, scale: float, temperature: float) -> None:
    """From within the limit of staged logits, where the corners' maxima may lie far above a pixel's
    own, to far beyond it."""
    batch = batch_of("stride-4", classes=classes)
    batch = Batch(batch.student * scale, batch.teacher * scale, batch.target)
    check(batch, kd_weight=0.3, hetero_weight=1.0, temperature=temperature)


@pytest.mark.parametrize("case", ["ce", "ce+kd+hetero", "maps"])
def test_some_pixels_of_a_cell_are_handed_over(case: str) -> None:
    batch = batch_of("stride-4")
    student = batch.student.clone()
    student[0, 1, 2, 2] = -900.0  # beyond the limit, at the corner of four cells
    student[1, :, 1, 1] = torch.tensor([40.0, 0.0, -40.0])
    student[1, :, 1, 2] = torch.tensor([-40.0, 0.0, 40.0])
    check(batch._replace(student=student), **FAST_CASES[case])


def test_ordinary_pixels_keep_their_bits_beside_others() -> None:
    batch = batch_of("stride-4", ignored=0.0)
    student = batch.student.clone()
    student[0, 1, 2, 2] = -900.0
    plain, other = (
        run(b, return_maps=True, **HETERO).maps for b in (batch, batch._replace(student=student))
    )
    for name, values in plain.items():
        same = values == other[name]
        assert same[1].all()
        assert same[0, :6].all()
        assert same[0, :, :6].all()
        assert not same[0, 8:12, 8:12].all()


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
    options = {"align_corners": True, **(FAST_CASES.get(case) or TERM_CASES.get(case, {}))}
    expected = truth(Batch(student, batch.teacher, target), 2.5, **options)
    student[:, 1, 1, 1] = bad
    got = run(Batch(student, batch.teacher, target), **options)
    assert_matches(got, expected)


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
    expected = truth(Batch(student, teacher, target), 2.5, ignore_index=-1, **FAST_CASES[case])
    student = student.clone()
    student[:, :, 2, 0] = bad
    got = run(Batch(student, teacher, target), ignore_index=-1, **FAST_CASES[case])
    assert_matches(got, expected)


def test_a_term_that_was_not_asked_for_spoils_nothing() -> None:
    """On the label grid kd alone is computed by the kernel that knows hetero."""
    batch = batch_of("label-grid", batch=1, ignored=0.0)
    student, teacher = batch.student.clone(), batch.teacher.clone()
    student[:, 1] = -math.inf
    teacher[:, 1] = -math.inf
    got = run(Batch(student, teacher, torch.ones_like(batch.target)), **FAST_CASES["kd"])
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
    check(
        Batch(0 * batch.student, batch.teacher, batch.target), return_maps=True, **FAST_CASES[case]
    )
    check(batch, **FAST_CASES[case])


@pytest.mark.parametrize("level", [5e10, 7.3e20, 3e37])
def test_equal_huge_logits(level: float) -> None:
    target = torch.zeros(1, 8, 12, dtype=torch.long)
    logits = torch.full((1, 2, 2, 3), level)
    got = run(Batch(logits, logits, target))
    assert got.terms["ce"] == pytest.approx(math.log(2.0), rel=2e-6)


# --- the kernels that a call gets --------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "options", "expected"),
    [
        ("stride-4", {}, "cells: ce"),
        ("stride-4", HETERO, "cells: ce, hetero"),
        ("stride-4", {**HETERO, "kd_weight": 0.5}, "cells: ce, kd, hetero"),
        ("stride-2", {}, "segments: ce"),
        ("other-teacher", HETERO, "segments: ce, kd, hetero"),
        ("stride-4", {"kd_weight": 1.0, "kd_divergence": "js"}, "segments: ce, js"),
        ("stride-4", {"label_smoothing": 0.1}, "segments"),
        ("label-grid", {}, "label grid: ce"),
        ("stride-4", {"teacher_ce_weight": 1.0}, "cells: ce"),
    ],
)
def test_kernels_are_named(geometry: str, options: dict[str, Any], expected: str) -> None:
    assert kernels(batch_of(geometry), **options) == {expected}


def test_ce_and_kd_of_two_denominators_go_by_the_general_kernel() -> None:
    """Kernels of fixed terms have one gradient for both."""
    weight = torch.rand(batch_of("stride-4").student.shape[1]) + 0.1
    options = {"kd_weight": 0.5, "class_weight": weight}
    assert kernels(batch_of("stride-4"), **options) == {"segments"}
    check(batch_of("stride-4"), **options)
    assert kernels(batch_of("stride-4"), hetero_weight=0.5, class_weight=weight) == {
        "cells: ce, hetero"
    }


def test_double_goes_by_segments() -> None:
    assert kernels(batch_of("stride-4", dtype=torch.float64)) == {"segments in double"}


# --- the operator, called directly ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": (2, 2, 3, 3)}, "teacher: got C=2"),
        ({"teacher": None}, "teacher: got None"),
        ({"target": (1, 6, 6)}, "target: got shape"),
        ({"weight": (4,)}, "class_weight: got shape"),
        ({"pixels": (2, 6, 5)}, "pixel_weight: got shape"),
    ],
)
def test_operator_refuses_what_would_be_read_out_of_bounds(
    changed: dict[str, Any], message: str
) -> None:
    shapes: dict[str, Any] = {"teacher": (2, 3, 3, 3), "target": (2, 6, 6), "weight": (3,)}
    shapes = {**shapes, "pixels": shapes["target"], **changed}
    teacher = None if shapes["teacher"] is None else torch.zeros(shapes["teacher"], device=DEVICE)
    spec = LossSpec.of(CrossEntropy(), KD())
    with pytest.raises(ValueError, match=message):
        torch.ops.heteroakd_fast.sums(
            *(torch.zeros(2, 3, 3, 3, device=DEVICE), None, None, teacher, None, None),
            torch.zeros(shapes["target"], dtype=torch.int64, device=DEVICE),
            torch.ones(shapes["weight"], device=DEVICE),
            torch.ones(shapes["pixels"], device=DEVICE),
            spec.vector(),
            structure=spec.structure,
            wants=[False] * 6,
            precision="ieee",
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

    spec = LossSpec.of(CrossEntropy())
    with pytest.raises(RuntimeError, match=message):
        compiled.CUDA.operators().sums(
            zeros(student),
            None if teacher is None else zeros(teacher),
            zeros(target, torch.int64),
            None if weight is None else zeros(weight),
            None,
            spec.vector(),
            spec.structure,
            False,
            False,
        )
