"""The gate's verdicts on synthetic numbers; nothing here is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# The benchmarks are a folder of the repository, not of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gate, instructions, memory

CASE = "ce | some shape"
OURS = "heteroakd[cpu]"
TOOLS = {"compiler": "12.2.0", "torch": "2.13.0"}
BASELINES: dict[str, Any] = {
    "instructions": {
        "taken_with": TOOLS,
        "baselines": {CASE: {OURS: {"instructions_per_pixel_class": 100.0, "tolerance": 0.03}}},
    },
    "ratios": {CASE: {OURS: {"time": 1.0, "memory": 10.0}}},
}


def measured(
    count: float | None = 100.0,
    time: float = 2.0,
    memory: float = 20.0,
    tools: dict[str, str] = TOOLS,
    case: str = CASE,
) -> gate.Measured:
    counts = None if count is None else {case: {OURS: count}}
    skipped = {} if count is not None else {"instructions": "valgrind is not installed"}
    return gate.Measured(
        counts, tools, {case: {OURS: time}}, {case: {OURS: memory}}, skipped, gone={}
    )


def test_green_on_equal() -> None:
    text, red = gate.report(measured(), BASELINES)
    assert not red
    assert text.endswith("gate: green")
    assert "note:" not in text


@pytest.mark.parametrize(("count", "expected"), [(102.9, False), (103.1, True), (200.0, True)])
def test_red_when_slower_than_the_tolerance(count: float, expected: bool) -> None:
    text, red = gate.report(measured(count), BASELINES)
    assert red == expected
    assert ("gate: RED: 1 of 3 checks failed" in text) == expected


def test_improvement_is_green_with_a_hint() -> None:
    text, red = gate.report(measured(90.0), BASELINES)
    assert not red
    assert "-10.0% (tolerance 3%), improved: run --update to keep it" in text


@pytest.mark.parametrize("name", ["compiler", "torch"])
@pytest.mark.parametrize(("count", "expected"), [(124.0, False), (126.0, True)])
def test_other_tools_get_the_loose_tolerance(name: str, count: float, expected: bool) -> None:
    text, red = gate.report(measured(count, tools={**TOOLS, name: "other"}), BASELINES)
    assert red == expected
    assert "(tolerance 25%)" in text
    assert f"note: baselines were taken with {name} {TOOLS[name]}, this is other" in text


def test_missing_valgrind_is_skipped_unless_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda _: None)
    assert instructions.missing() == "valgrind is not installed"
    with pytest.raises(RuntimeError, match="valgrind is not installed"):
        instructions.count([])
    text, red = gate.report(measured(None), BASELINES)
    assert not red
    assert "skipped: valgrind is not installed" in text
    text, red = gate.report(measured(None), BASELINES, require_instructions=True)
    assert red
    assert "--require-instructions" in text.splitlines()[-1]


def test_missing_baseline_is_reported_and_green() -> None:
    for baselines in ({}, BASELINES):
        text, red = gate.report(measured(1e9, 0.01, 0.01, case="a new case"), baselines)
        assert not red
        assert text.count("no baseline yet: run --update") == 3


@pytest.mark.parametrize("low", [{"time": 0.9}, {"memory": 9.0}])
def test_red_when_a_ratio_falls_below_its_limit(low: dict[str, float]) -> None:
    red = [check.what for check in gate.judge(measured(**low), BASELINES) if check.red]  # type: ignore[arg-type]
    assert red == list(low)


def test_red_when_a_kernel_with_a_baseline_is_lost() -> None:
    lost = gate.gone(BASELINES)
    assert list(lost) == [(CASE, OURS)]
    assert "no longer has this case" in lost[CASE, OURS]
    one = gate.COMPARED[0].key
    lost = gate.gone({"ratios": {one: {"heteroakd[none]": {"time": 1.0}}}})
    assert "no backend has this name" in lost[one, "heteroakd[none]"]

    found = measured()
    found.gone = {(CASE, OURS): "cannot run here: no compiled extension"}
    text, red = gate.report(found, BASELINES)
    assert red
    assert "has a baseline, but cannot run here: no compiled extension" in text


def test_update_writes_what_then_is_green() -> None:
    new = gate.updated(measured(150.0, 3.0, 30.0), BASELINES)
    entry = new["instructions"]["baselines"][CASE][OURS]
    assert entry == {"instructions_per_pixel_class": 150.0, "tolerance": 0.03}
    assert new["ratios"][CASE][OURS] == {"time": 1.5, "memory": 15.0}
    assert not gate.report(measured(150.0, 3.0, 30.0), new)[1]
    assert gate.updated(measured(100.0), {})["instructions"] == BASELINES["instructions"]


def test_update_keeps_what_was_skipped_and_hand_set_tolerances() -> None:
    without = measured(None)
    without.memory = None
    new = gate.updated(without, BASELINES)
    assert new["instructions"] == BASELINES["instructions"]
    assert new["ratios"] == {CASE: {OURS: {"time": 1.0, "memory": 10.0}}}

    wider = json.loads(json.dumps(BASELINES))
    wider["instructions"]["baselines"][CASE][OURS]["tolerance"] = 0.1
    kept = gate.updated(measured(150.0), wider)
    assert kept["instructions"]["baselines"][CASE][OURS]["tolerance"] == 0.1


def test_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "BASELINES", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "measure", lambda _: measured(100.0))
    assert gate.main(["--update"]) == 0
    monkeypatch.setattr(gate, "measure", lambda _: measured(110.0))
    assert gate.main(["--json", str(tmp_path / "out.json")]) == 1
    assert "RED: +10.0% (tolerance 3%)" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["red"]
    assert written["instructions_per_pixel_class"] == {CASE: {OURS: 110.0}}

    def fails(baselines: object) -> gate.Measured:
        raise RuntimeError("counting instructions failed")

    monkeypatch.setattr(gate, "measure", fails)
    assert gate.main([]) == 1
    assert "gate: RED: counting instructions failed" in capsys.readouterr().err


def test_memory_is_a_ratio_of_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    one = gate.COMPARED[0]
    monkeypatch.setattr(memory, "peak_bytes", lambda _, name: 80 if name == "eager" else 4)
    assert gate.compare_memory([(one, OURS)]) == {one.key: {OURS: 20.0}}


def test_dumps_are_matched_to_jobs_by_label(tmp_path: Path) -> None:
    for number, (job, total) in enumerate([(1, 7), (0, 5)]):
        text = f"desc: Trigger: Client Request: job {job}\n\nevents: Ir\ntotals: {total}\n"
        (tmp_path / f"dump.{number}").write_text(text)
    (tmp_path / "dump.9").write_text("desc: Trigger: Program termination\ntotals: 10\n")
    assert instructions._read_dumps(tmp_path.glob("dump.*")) == {0: 5, 1: 7}


def test_every_compiled_backend_is_gated_and_only_those() -> None:
    names = {provider for _, provider in gate.jobs_of(gate.COUNTED)}
    assert names <= {name for name in gate.find() if name.startswith("heteroakd[")}
    assert "heteroakd[reference]" not in names
