"""What runs without the compiled extension: the formulas band by band, and the warning."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from common import TERM_CASES, Batch, eager_cross_entropy, evaluate, make_batch, spec_of, truth
from torch import Tensor

import heteroakd_fast as hf
from heteroakd_fast import _extension, backends, functional, reference_pass
from heteroakd_fast.backends import reference as bands
from heteroakd_fast.spec import LossSpec, groups_of
from heteroakd_fast.terms import CrossEntropy

CE = LossSpec.of(CrossEntropy()).structure


def call_of(batch: Batch, weight: Tensor | None, spec: LossSpec) -> backends.Call:
    names = groups_of(spec.structure)
    wants = [set(names) != {"teacher_ce"}, "teacher_ce" in names]
    student = batch.student.clone().requires_grad_(wants[0])
    teacher = batch.teacher.clone().requires_grad_(wants[1])
    sides = (student, None, None, teacher, None, None)
    flags = (wants[0], False, False, wants[1], False, False)
    return backends.Call(*sides, batch.target, weight, None, spec, flags)


def by_bands(call: backends.Call, scales: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        found = bands.BACKEND.sums(call)
        grads = bands.BACKEND.gradient(call._replace(target=None), scales, found.saved)
    results = {
        **found._asdict(),
        "counts": found.counts.tolist(),
        "gradients": (grads[0], grads[3]),
    }
    del results["saved"]
    return results


def whole(call: backends.Call, scales: Tensor) -> dict[str, Any]:
    options = call.spec.options()
    numerators, denominators, maps = reference_pass.sums(
        call.student, call.labels, call.teacher, call.class_weight, options
    )
    totals, denominators = reference_pass.group(numerators, denominators, options)
    sides = (call.student, call.teacher)
    grads = iter(torch.autograd.grad(totals, [x for x in sides if x.requires_grad], scales))
    return {
        "numerators": numerators.detach(),
        "totals": totals.detach(),
        "denominators": denominators,
        "counts": [int((call.labels != options.ignore_index).sum())] * 2,
        "maps": maps,
        "gradients": tuple(next(grads) if x.requires_grad else None for x in sides),
    }


def assert_same(batch: Batch, spec: LossSpec, weight: Tensor | None = None) -> None:
    """float64, so that only a wrong formula can differ."""
    groups = spec.options().group_count
    scales = torch.linspace(0.7, -1.3, groups, dtype=torch.float64)
    call = call_of(batch, weight, spec)
    ours, theirs = by_bands(call, scales), whole(call, scales)
    assert ours.keys() == theirs.keys()
    gradients = zip(ours.pop("gradients"), theirs.pop("gradients"), strict=True)
    pairs = [*((ours[name], theirs[name]) for name in theirs), *gradients]
    for value, expected in pairs:
        if isinstance(expected, Tensor):
            signal = float(expected.abs().max()) if expected.numel() else 1.0
            assert signal > 0
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13 * signal)
        else:
            assert value == expected


@pytest.mark.parametrize("case", TERM_CASES)
def test_bands_are_the_oracle(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 3 of 13 rows; the last image has no valid pixel, and some bands have none."""
    monkeypatch.setattr(bands.reference_evaluation, "elements_of_band", lambda _: 3 * 5 * 17)
    batch = make_batch(batch=3)
    batch.target[0, :7] = 255
    batch.target[2] = 255
    weight = torch.rand(5, dtype=torch.float64) if "ce" in case else None
    maps = "hetero" in case or case == "all"
    spec = spec_of(**TERM_CASES[case], return_maps=maps, class_weight=weight)
    assert_same(batch, spec, weight)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("budget", [1, 2 * 5 * 13 * 17, 2**30])
@pytest.mark.parametrize(
    ("grid", "teacher_grid"),
    [
        ((13, 17), (13, 17)),
        ((13, 4), (5, 17)),
        ((26, 40), (1, 1)),
        ((1, 17), (14, 16)),
    ],
)
def test_bands_on_any_grid(
    grid: tuple[int, int],
    teacher_grid: tuple[int, int],
    budget: int,
    align_corners: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Single rows, pairs of images and everything at once; teacher and student apart."""
    monkeypatch.setattr(bands.reference_evaluation, "elements_of_band", lambda _: budget)
    batch = make_batch(batch=3, grid=grid, teacher_grid=teacher_grid)
    assert_same(batch, spec_of(**TERM_CASES["all"], align_corners=align_corners))


@pytest.mark.parametrize("case", ["ce", "all", "hetero-paper-space"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_rows_that_only_ignored_pixels_see(
    case: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image's rows are interpolated apart, across and along: garbage stays where it is."""
    monkeypatch.setattr(bands.reference_evaluation, "elements_of_band", lambda _: 5 * 12 * 3)
    options = {**TERM_CASES[case], "backend": "reference"}
    clean = make_batch(dtype=torch.float32, grid=(8, 6), teacher_grid=(8, 4), size=(16, 12))
    clean.target[:, 8:] = 255  # y = 8 of 16 reads rows 3 and 4; the garbage starts at 5
    dirty = Batch(clean.student.clone(), clean.teacher.clone(), clean.target)
    dirty.student[:, :, 5:] = bad
    dirty.teacher[:, :, 5:] = bad
    got, expected = (evaluate(batch, 3.0, **options) for batch in (dirty, clean))
    assert got.loss == expected.loss
    assert got.student_grad is not None
    assert expected.student_grad is not None
    assert torch.equal(got.student_grad, expected.student_grad)
    assert got.student_grad[:, :, :5].abs().max() > 0
    assert not got.student_grad[:, :, 5:].any()


def test_float64_is_the_oracle_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests take for the truth shares no code with the bands."""
    monkeypatch.setattr(bands.ReferenceBackend, "sums", None)
    assert truth(make_batch()).student_grad is not None


def test_is_not_slower_than_plain_pytorch() -> None:
    """CPU time, so that other processes count little."""
    torch.use_deterministic_algorithms(False)  # would fill every new tensor
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    batch = make_batch(
        batch=1, classes=19, grid=(64, 128), teacher_grid=None, size=(256, 512), dtype=torch.float32
    )
    x = batch.student.requires_grad_()

    def eager() -> Tensor:
        return eager_cross_entropy(x, batch.target)

    def ours() -> Tensor:
        return functional.cross_entropy(x, batch.target, backend="reference").loss

    spent: dict[Any, list[float]] = {eager: [], ours: []}
    try:
        for _ in range(6):
            for step, times in spent.items():
                start = time.process_time()
                step().backward()
                times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(before)
    ratio = min(spent[ours][1:]) / min(spent[eager][1:])
    assert ratio < 1.5, f"{ratio:.2f} times the time of plain PyTorch"


# --- the warning -------------------------------------------------------------------------------


@pytest.fixture
def _without_extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in an installation without compiler, in this process."""
    backends._warn_without_extension.cache_clear()
    monkeypatch.setattr(backends.get("cpu"), "unavailable", lambda: "install a C++17 compiler.")
    yield
    backends._warn_without_extension.cache_clear()


@pytest.mark.usefixtures("_without_extension")
def test_says_once_that_the_extension_is_missing() -> None:
    batch = make_batch(dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        functional.cross_entropy(batch.student, batch.target)
        hf.HeteroAKDLoss(5)(batch.student, batch.target, teacher_logits=batch.teacher)
    assert [warning.category for warning in caught] == [hf.ExtensionMissingWarning]
    assert "install a C++17 compiler." in str(caught[0].message)
    for way in ("backend='reference'", "HETEROAKD_BACKEND=reference"):
        assert way in str(caught[0].message)


@pytest.mark.usefixtures("_without_extension")
def test_is_silent_where_the_fallback_was_asked_for() -> None:
    batch = make_batch(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.cross_entropy(batch.student, batch.target, backend="reference")
        with hf.use_backend("reference"):
            functional.cross_entropy(batch.student, batch.target)
        assert backends.select(None, CE, "mps") == "reference"  # for which nothing is compiled
        assert "reference" in backends.explain(None, CE, "cpu")
        with pytest.raises(hf.BackendUnavailableError):
            backends.select("cpu", CE, "cpu")
    with pytest.warns(hf.ExtensionMissingWarning):
        assert backends.select("auto", CE, "cpu") == "reference"


def test_is_silent_with_the_extension() -> None:
    if not _extension.loaded():
        pytest.skip("no compiled extension")
    backends._warn_without_extension.cache_clear()
    batch = make_batch(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf.ExtensionMissingWarning)
        functional.cross_entropy(batch.student, batch.target)
    assert backends.select(None, CE, "cpu") == "cpu"
