"""The gate's verdicts on synthetic numbers; nothing here is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate, instructions

CASE = "ce | some shape"
OURS = "heteroakd[cpu]"
TOOLS = {"compiler": "12.2.0", "torch": "2.13.0"}
BASELINES: dict[str, Any] = {
    "taken_with": TOOLS,
    "instructions": {CASE: {OURS: 100.0}},
    "time": {CASE: {OURS: 1.0}},
}


def measured(
    count: float | None = 100.0,
    time: float = 2.0,
    tools: dict[str, str] = TOOLS,
    case: str = CASE,
) -> gate.Measured:
    found = gate.Measured({"time": {case: {OURS: time}}}, tools)
    if count is None:
        found.skipped["instructions"] = "valgrind is not installed"
    else:
        found.tables["instructions"] = {case: {OURS: count}}
    return found


@pytest.mark.parametrize(
    ("count", "red", "said"),
    [
        (100.0, False, "+0.0% (tolerance 3%)"),
        (102.9, False, "+2.9% (tolerance 3%)"),
        (103.1, True, "RED: +3.1% (tolerance 3%)"),
        (90.0, False, "-10.0% (tolerance 3%), improved: run --update to keep it"),
    ],
)
def test_instructions_against_the_tolerance(count: float, red: bool, said: str) -> None:
    text, found = gate.report(measured(count), BASELINES)
    assert found == red
    assert said in text
    assert text.endswith("gate: RED: 1 checks failed" if red else "gate: green")
    assert "note:" not in text


@pytest.mark.parametrize("name", ["compiler", "torch"])
@pytest.mark.parametrize(("count", "red"), [(124.0, False), (126.0, True)])
def test_other_tools_get_the_loose_tolerance(name: str, count: float, red: bool) -> None:
    text, found = gate.report(measured(count, tools={**TOOLS, name: "other"}), BASELINES)
    assert found == red
    assert "(tolerance 25%)" in text
    assert f"note: baselines were taken with {name} {TOOLS[name]}, this is other" in text


def test_red_when_a_ratio_falls_below_its_limit() -> None:
    text, red = gate.report(measured(time=0.9), BASELINES)
    assert red
    assert "RED: eager / ours fell below the limit" in text


def test_missing_valgrind_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda _: None)
    assert instructions.missing() == "valgrind is not installed"
    with pytest.raises(RuntimeError, match="valgrind is not installed"):
        instructions.count([])
    text, red = gate.report(measured(None), BASELINES)
    assert not red
    assert "skipped: valgrind is not installed" in text


def test_missing_baseline_is_reported_and_green() -> None:
    for baselines in ({}, BASELINES):
        text, red = gate.report(measured(1e9, 0.01, case="a new case"), baselines)
        assert not red
        assert text.count("no baseline yet: run --update") == 2


def test_red_when_a_kernel_with_a_baseline_is_lost() -> None:
    lost = gate.gone(BASELINES)
    assert list(lost) == [(CASE, OURS)]
    assert "no longer has this case" in lost[CASE, OURS]
    one = gate.CASES["time"][0].key
    lost = gate.gone({"time": {one: {"heteroakd[none]": 1.0}}})
    assert "no backend has this name" in lost[one, "heteroakd[none]"]
    found = measured()
    found.gone = {(CASE, OURS): "cannot run here: no compiled extension"}
    text, red = gate.report(found, BASELINES)
    assert red
    assert "has a baseline, but cannot run here: no compiled extension" in text


def test_update_writes_what_then_is_green() -> None:
    new = gate.updated(measured(150.0, 3.0), BASELINES)
    assert new == {
        "taken_with": TOOLS,
        "instructions": {CASE: {OURS: 150.0}},
        "time": {CASE: {OURS: 1.5}},
    }
    assert not gate.report(measured(150.0, 3.0), new)[1]
    skipped = gate.updated(measured(None), BASELINES)
    assert skipped["instructions"] == BASELINES["instructions"]


def test_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "BASELINES", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "measure", lambda _: measured(100.0))
    assert gate.main([]) == 1
    assert "gate: RED: gate.json is missing; run --update" in capsys.readouterr().err
    assert gate.main(["--update"]) == 0
    monkeypatch.setattr(gate, "measure", lambda _: measured(110.0))
    assert gate.main([]) == 1
    assert "RED: +10.0% (tolerance 3%)" in capsys.readouterr().out

    def fails(baselines: object) -> gate.Measured:
        raise RuntimeError("counting instructions failed")

    monkeypatch.setattr(gate, "measure", fails)
    assert gate.main([]) == 1
    assert "gate: RED: counting instructions failed" in capsys.readouterr().err


def test_dumps_are_matched_to_jobs_by_label(tmp_path: Path) -> None:
    for number, (job, total) in enumerate([(1, 7), (0, 5)]):
        text = f"desc: Trigger: Client Request: job {job}\n\nevents: Ir\ntotals: {total}\n"
        (tmp_path / f"dump.{number}").write_text(text)
    (tmp_path / "dump.9").write_text("desc: Trigger: Program termination\ntotals: 10\n")
    assert instructions._read_dumps(tmp_path.glob("dump.*")) == {0: 5, 1: 7}


def test_every_compiled_backend_is_gated_and_only_those() -> None:
    names = {provider for _, provider in gate.jobs_of(gate.CASES["time"][:1])}
    assert names <= {name for name in gate.find() if name.startswith("heteroakd[")}
    assert "heteroakd[reference]" not in names
