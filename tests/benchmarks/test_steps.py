"""The training step: rows complete and sane, refusals and differences reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import steps
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.providers import Forward, find

pytest.importorskip("transformers")
SMOKE = steps.STEP_CASES["smoke"]
OURS = "heteroakd[reference]"


class Fake:
    """Eager's loss, one part in a hundred too large; or a refusal, or an error."""

    def __init__(self, name: str) -> None:
        self.name = name

    def cannot(self, case: Case, device: str) -> str | None:
        assert (case.objective, case.stride, case.dtype) == ("ce+hetero", 4, "float32")
        return "not today" if self.name == "refusing" else None

    def build(self, case: Case, inputs: Inputs) -> Forward:
        if self.name == "failing":
            raise ValueError("no kernel\nfor this")
        right = find()["eager"].build(case, inputs)
        return lambda: 1.01 * right()


def test_rows_of_a_step_and_of_what_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = find()
    fakes = {name: Fake(name) for name in ("wrong", "refusing", "failing")}
    monkeypatch.setattr(steps, "find", lambda: {**known, **fakes})
    names = ["eager", OURS, *fakes]
    rows = {row["provider"]: row for row in steps.measure(SMOKE, names, "cpu", 3, 2.0)}
    assert list(rows) == names
    assert {row["key"] for row in rows.values()} == {SMOKE.key}
    for name in ("eager", OURS):
        row = rows[name]
        assert "cannot" not in row
        assert 0 < row["step_p10_ms"] <= row["step_ms"] <= row["step_p90_ms"]
        assert row["loss_share"] == row["loss_ms"] / row["step_ms"] > 0
        assert row["relative_error"] <= 1e-4
    assert rows["wrong"]["cannot"].startswith("differs")
    assert rows["refusing"]["cannot"] == "not today"
    assert rows["failing"]["cannot"] == "ValueError: no kernel"
    assert all("step_ms" not in row for row in rows.values() if "cannot" in row)


def test_copies_train_alike_and_see_each_steps_teacher() -> None:
    a, b = (steps.Trainer(SMOKE, find()[name], "cpu") for name in ("eager", OURS))
    assert [tuple(one.shape) for one in a.logits()] == [(1, 5, 16, 16)] * 2
    before = [parameter.clone() for parameter in a.student.parameters()]
    for turn in range(3):
        # Other images, so another teacher's answer: a loss that kept the first would part here.
        generator = torch.Generator().manual_seed(turn)
        a.images = b.images = torch.randn(1, 3, 64, 64, generator=generator)
        torch.testing.assert_close(b.step(), a.step(), rtol=1e-4, atol=0.0)
    changed = [not torch.equal(*pair) for pair in zip(before, a.student.parameters(), strict=True)]
    # All but those whose gradient is exactly zero by symmetry.
    assert sum(changed) > 0.9 * len(changed)


def test_largest_batch_is_that_of_the_line_through_two_peaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = {1: 130, 2: 230}
    monkeypatch.setattr(steps, "_peak", lambda case, *_: peaks[case.batch])
    monkeypatch.setattr(steps, "fresh_process", lambda work: work())
    found = steps.largest_batch(SMOKE, "eager", "cpu", 1000)
    assert (found["batch"], found["peaks"]) == (9, peaks)  # 30 + 100 for each image
    assert steps.largest_batch(SMOKE, "eager", "cpu", 50)["batch"] == 0


def test_peak_of_a_step() -> None:
    assert steps._peak(SMOKE, "eager", "cpu", 1) > 0
