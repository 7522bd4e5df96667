"""The training step: rows complete and sane, refusals and differences reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import steps
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.providers import Forward, find

SMOKE = steps.STEP_CASES["smoke"][0]
OURS = "heteroakd[reference]"


class Wrong:
    """Eager's loss, one part in a hundred too large."""

    name = "wrong"

    def cannot(self, case: Case, device: str) -> str | None:
        return None

    def build(self, case: Case, inputs: Inputs) -> Forward:
        right = find()["eager"].build(case, inputs)
        return lambda: 1.01 * right()


class Refusing(Wrong):
    name = "refusing"

    def cannot(self, case: Case, device: str) -> str | None:
        assert (case.objective, case.stride, case.dtype) == ("ce+hetero", 4, "float32")
        return "not today"


class Failing(Wrong):
    name = "failing"

    def build(self, case: Case, inputs: Inputs) -> Forward:
        def forward() -> Tensor:
            raise ValueError("no kernel\nfor this")

        return forward


def test_rows_of_a_step_and_of_what_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    known = find()
    extra = {one.name: one for one in (Wrong(), Refusing(), Failing())}
    monkeypatch.setattr(steps, "find", lambda: {**known, **extra})

    names = ["eager", OURS, "wrong", "refusing", "failing", "unheard-of"]
    rows = {row["provider"]: row for row in steps.measure_steps([SMOKE], names, "cpu", 3, 2.0)}

    assert list(rows) == names
    assert {row["key"] for row in rows.values()} == {SMOKE.key}
    for name in ("eager", OURS):
        row = rows[name]
        assert "cannot" not in row
        assert 0 < row["step_p10_ms"] <= row["step_ms"] <= row["step_p90_ms"]
        assert row["loss_ms"] == row["loss_forward_ms"] + row["loss_backward_ms"]
        assert min(row["loss_forward_ms"], row["loss_backward_ms"]) > 0
        assert row["loss_share"] == row["loss_ms"] / row["step_ms"]
        assert row["relative_error"] <= 1e-4
        assert 1 <= row["rounds"] <= 3
        assert (row["batch"], row["classes"], row["height"]) == (1, 5, 64)
    assert rows["wrong"]["cannot"].startswith("differs")
    assert rows["refusing"]["cannot"] == "not today"
    assert rows["failing"]["cannot"] == "ValueError: no kernel"
    assert rows["unheard-of"]["cannot"] == "no such provider"
    assert all("step_ms" not in row for row in rows.values() if "cannot" in row)


def test_copies_train_alike_and_see_each_steps_teacher() -> None:
    pytest.importorskip("transformers")
    known = find()
    a, b = steps._trainers(SMOKE, [known["eager"], known[OURS]], "cpu")
    before = [parameter.clone() for parameter in a.student.parameters()]
    for turn in range(3):
        # Other images, so another teacher's answer: a loss that kept the first would part here.
        a.images = b.images = torch.randn(
            1, 3, 64, 64, generator=torch.Generator().manual_seed(turn)
        )
        torch.testing.assert_close(b.step(), a.step(), rtol=1e-4, atol=0.0)
    changed = [not torch.equal(*pair) for pair in zip(before, a.student.parameters(), strict=True)]
    # All but those whose gradient is exactly zero by symmetry.
    assert sum(changed) > 0.9 * len(changed)


def test_without_transformers_rows_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (row,) = steps.measure_steps([SMOKE], ["eager"], "cpu", 1, 1.0)
    assert row["cannot"].startswith("transformers is not installed (pip install")


def test_peak_memory_in_a_process_of_its_own() -> None:
    pytest.importorskip("transformers")
    peak, seconds = steps._cpu_peak_and_seconds(SMOKE, "eager")
    assert peak > 0
    assert seconds > 0


def test_largest_batch_predicts_then_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory not quite linear: the line's answer is measured, found too large, and corrected."""
    asked: list[int] = []

    def peak(case: steps.StepCase, provider: str) -> tuple[int, float]:
        asked.append(case.batch)
        return 100 * case.batch + 2 * case.batch**2, 0.0

    monkeypatch.setattr(steps, "_cpu_peak_and_seconds", peak)
    monkeypatch.setattr(steps, "_available_bytes", lambda: 1 << 40)

    found = steps.largest_batch(SMOKE, "eager", "cpu", 1000)
    assert (found["batch"], found["how"]) == (8, "measured")
    assert asked == [1, 2, 9, 8]
    assert [point["batch"] for point in found["points"]] == [1, 2, 8, 9]

    found = steps.largest_batch(SMOKE, "eager", "cpu", 1000, seconds=0.0)
    assert (found["batch"], found["how"]) == (9, "fit")
    with pytest.raises(RuntimeError, match="more than the budget"):
        steps.largest_batch(SMOKE, "eager", "cpu", 50)


def test_suites_name_models_that_exist_and_keys_differ() -> None:
    for cases in steps.STEP_CASES.values():
        assert len({case.key for case in cases}) == len(cases)
        for case in cases:
            assert {case.student, case.teacher} <= set(steps.MODELS)
