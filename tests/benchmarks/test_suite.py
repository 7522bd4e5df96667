"""The benchmark suite itself: what it times is equal, what it reports is what it measured."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import floor, memory, report, runner, timing
from benchmarks.__main__ import main
from benchmarks.cases import OBJECTIVES, SUITES, Case, case, cases_of, select
from benchmarks.compare import compare, to_text
from benchmarks.inputs import IGNORE_INDEX, make_inputs
from benchmarks.oracle import errors_of, truth_of
from benchmarks.providers import find
from benchmarks.results import Results, ratio, spread, total_ms
from benchmarks.steps import STEP_CASES

SMOKE = list(cases_of(SUITES["smoke"]))


def test_keys_name_a_case_uniquely() -> None:
    for suite in SUITES.values():
        cases = list(cases_of(suite))
        assert len({one.key for one in cases}) == len(cases)
        assert all(Case(**one.fields()) == one for one in cases)


# --- choice of cases ----------------------------------------------------------------------------


def _selected(suite: str, *only: str) -> list[str]:
    return [one.key for one in cases_of(select(suite, only))]


def test_only_takes_every_name_that_list_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name, suite in SUITES.items():
        assert _selected(name) == [one.key for one in cases_of(suite)]
        for group, cases in suite.items():
            assert _selected(name, group) == list(dict.fromkeys(one.key for one in cases))
            for one in cases:
                assert f"  {group:12} {one.key}\n" in listed
                assert _selected(name, one.key) == [one.key]
    assert {one.objective for one in cases_of(select("cpu", ["ce"]))} == {"ce"}
    wanted = {*_selected("cpu", "ADE20K"), *_selected("cpu", "*C150*")}
    assert {*_selected("cpu", "ADE20K", "*C150*")} == wanted
    assert all("C150" in key for key in wanted)
    assert re.search("^objectives: ce, .*\n^data sets: .*ADE20K", listed, re.MULTILINE)


def test_only_names_close_to_what_it_does_not_know() -> None:
    with pytest.raises(
        ValueError, match="--only: got 'ce | B1 C19 64x128 | stride 5 | f"
    ) as caught:
        select("smoke", [SMOKE[0].key, SMOKE[0].key.replace("stride 4", "stride 5")])
    assert f"expected names of suite 'smoke': {SMOKE[0].key}" in str(caught.value)
    with pytest.raises(ValueError, match="'headlines', expected names .*: headline"):
        select("smoke", ["headlines"])
    with pytest.raises(ValueError, match="which suite 'smoke' lacks; --suite cpu has it"):
        select("smoke", ["classes"])


# --- what is timed ------------------------------------------------------------------------------


def test_the_targets_rows_are_in_the_suite_of_the_cpu() -> None:
    labels = {one.label for one in SUITES["cpu"]["headline"]}
    assert "B2 C19 769x769 /8 ac" in labels
    assert "B2 C19 512x1024 /8 (teacher /4)" in labels
    assert SUITES["cpu"]["headline"][5].grid(8) == (97, 97)


@pytest.mark.parametrize("one", SMOKE, ids=lambda one: one.key)
def test_every_provider_computes_the_same(one: Case) -> None:
    inputs = make_inputs(one)
    truth = truth_of(one, inputs)
    able = 0
    for name, provider in find().items():
        if name.startswith("compile") or provider.cannot(one, "cpu"):
            continue  # the compiled ones are the eager ones; compiling takes seconds each
        loss = timing._step(provider.build(one, inputs), inputs)
        allowed = timing.TOLERANCES[one.dtype]
        found = errors_of(truth, loss, inputs)
        assert found[0] <= allowed[0], name
        assert found[1] <= allowed[1], name
        able += 1
    assert able >= 2


def test_the_truth_of_images_is_the_truth_of_the_batch() -> None:
    from heteroakd_fast import functional

    one = case("ce+hetero", "Cityscapes", 3, 4, size=(64, 96), dtype="float64")
    inputs = make_inputs(one)
    whole = functional.distillation_loss(
        inputs.student_logits,
        inputs.target,
        inputs.teacher_logits,
        ignore_index=IGNORE_INDEX,
        backend="reference",
        **OBJECTIVES["ce+hetero"].options,
    ).loss
    whole.backward()
    loss_error, grad_error = errors_of(truth_of(one, inputs), whole, inputs)
    assert loss_error < 1e-13
    assert grad_error < 1e-12


def test_inputs_are_confident_and_partly_ignored() -> None:
    inputs = make_inputs(SUITES["cpu"]["pixels"][2])
    ignored = (inputs.target == IGNORE_INDEX).float().mean()
    assert 0.01 < ignored < 0.12
    assert inputs.student_logits.softmax(dim=1).amax(dim=1).median() > 0.5
    again = make_inputs(SUITES["cpu"]["pixels"][2])
    assert torch.equal(inputs.student_logits, again.student_logits)


def test_a_provider_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        name = "wrong"

        def cannot(self, one: Case, device: str) -> str | None:
            return None

        def build(self, one: Case, inputs: Any) -> Any:
            right = find()["eager"].build(one, inputs)
            return lambda: 1.001 * right()

    everyone = {**find(), "wrong": Wrong()}
    monkeypatch.setattr(timing, "find", lambda: everyone)
    rows = _timed(SMOKE[0], ["eager", "wrong"])
    assert "differs from the oracle" in rows["wrong"]["cannot"]
    assert rows["wrong"]["forward_ms"] == []
    assert len(rows["eager"]["forward_ms"]) == 6


def test_a_provider_that_raises_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name = "broken"

        def cannot(self, one: Case, device: str) -> str | None:
            return None

        def build(self, one: Case, inputs: Any) -> Any:
            raise RuntimeError("no such kernel")

    everyone = {**find(), "broken": Broken()}
    monkeypatch.setattr(timing, "find", lambda: everyone)
    rows = _timed(SMOKE[0], ["broken", "eager"])
    assert rows["broken"]["cannot"] == "RuntimeError: no such kernel"
    assert rows["eager"]["forward_ms"]


def _timed(one: Case, names: list[str]) -> dict[str, dict[str, Any]]:
    events: list[dict[str, Any]] = []
    job = timing.Job([one], {one.key: names}, rounds=3, visits=2)
    timing.time_cases(timing.Job.from_json(job.to_json()), events.append)
    return {row["provider"]: row for row in events[-1]["rows"]}


def test_a_case_that_kills_its_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = SMOKE[:2]
    fake = tmp_path / "python"  # dies in the first case, and ends well when that is left out
    fake.write_text(
        "#!/bin/sh\n"
        f"if grep -q '{first.dataset}' $3; then\n"
        f"  echo '{json.dumps({'begin': first.key, 'visit': 0})}'; kill -9 $$\nfi\n"
        f"echo '{json.dumps({'done': second.key, 'rows': []})}'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(timing.sys, "executable", str(fake))
    job = timing.Job([first, second], {one.key: ["eager"] for one in (first, second)})
    events = list(timing.run_job(job, tmp_path, {"PATH": "/usr/bin:/bin"}))
    assert {"died": first.key, "code": -9} in events
    assert events[-1] == {"done": second.key, "rows": []}


@pytest.mark.skipif(memory.supported() is not None, reason=str(memory.supported()))
def test_the_high_water_mark_sees_a_known_allocation() -> None:
    peak = memory.fresh_process(memory.high_water, _allocate_64_mib)
    assert 64 * 2**20 <= peak < 70 * 2**20


def _allocate_64_mib() -> None:
    torch.ones(64 * 2**20 // 4)


def _die() -> None:
    import os

    os.kill(os.getpid(), 9)


def test_a_process_that_dies_is_an_error_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="killed"):
        memory.fresh_process(_die)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        memory.fresh_process(divmod, 1, 0)


def test_statistics() -> None:
    assert spread([]) is None
    found = spread([3.0, 1.0, 2.0])
    assert found is not None
    assert found.median == 2.0
    assert 1.0 < found.low < 2.0 < found.high < 3.0
    faster = ratio(_row("eager", 10.0), _row("ours", 2.0))
    assert faster is not None
    assert faster.median == pytest.approx(5.0)


def test_floors_grow_with_the_work() -> None:
    rates = floor.Rates(fma_per_s=1e11, bytes_per_s=3e10, exp_per_s=0.0)
    cases = {one.objective: one for one in SUITES["cpu"]["objectives"]}
    times = {name: floor.floor_ms(one, rates)[0] for name, one in cases.items()}
    assert times["ce"] < times["ce+kd"] < times["ce+hetero"] < times["ce+paper"]
    assert times["ce+hetero"] < times["ce+hetero-T1.7"]
    on_gpu = floor.Rates(fma_per_s=3e13, bytes_per_s=3e12, exp_per_s=3.7e12)
    assert floor.floor_ms(cases["ce"], on_gpu)[1] in ("exponentials", "bytes", "arithmetic")


# --- result files ------------------------------------------------------------------------------


def _row(provider: str, milliseconds: float, cannot: str | None = None) -> dict[str, Any]:
    times = [] if cannot else [milliseconds / 2 * f for f in (0.99, 1.0, 1.01)]
    return {
        "case": SMOKE[0].key, "provider": provider, "setting": "main", "cannot": cannot,
        "loss_error": 1e-7, "grad_error": 1e-7, "forward_ms": times, "backward_ms": times,
        "graph_ms": [], "graph_cannot": None,
    }  # fmt: skip


def _results(ours_ms: float, peak: int = 10 * 2**20, cannot: str | None = None) -> Results:
    one = SMOKE[0]
    return Results({
        "schema": 1, "suite": "smoke", "settings": {"main": "two threads"},
        "environment": {
            "processor": "a CPU", "cores": 2, "memory_gib": 24, "cpu_capability": "AVX2",
            "torch": "2", "python": "3", "packages": {}, "commit": "abc", "tests": "passed",
            "threads": 2,
        },
        "rates": {"fma_per_s": 1e11, "bytes_per_s": 1e10, "exp_per_s": 0.0},
        "floors": {one.key: {"ms": 0.5, "binds": "bytes"}},
        "groups": {"headline": [one.key], "strides": [one.key]},
        "cases": [{"key": one.key, **one.fields()}],
        "rows": [_row("eager", 10.0), _row("compile", 6.0), _row("heteroakd[cpu]", ours_ms, cannot),
                 _row("heteroakd[reference]", 12.0),
                 _row("liger", 0.0, cannot="needs Triton and a GPU")],
        "peak_bytes": {
            one.key: {"eager": 200 * 2**20, "heteroakd[cpu]": peak, "compile": "killed"}
        },
        "crops": [{"objective": "ce", "provider": "eager", "side": 512, "peak_bytes": 5,
                   "capped": False}],
        "crop_budget": 2**20, "steps": [], "step_batches": [], "seconds": 1.0,
    })  # fmt: skip


def test_compare_flags_what_got_worse_and_only_that() -> None:
    base = _results(2.0)
    assert all(change.verdict == "same" for change in compare(base, _results(2.02)))
    slower = [c for c in compare(base, _results(4.0)) if c.verdict == "worse"]
    assert [(c.provider, c.what) for c in slower] == [("heteroakd[cpu]", "ratio to eager")]
    larger = [c for c in compare(base, _results(2.0, 40 * 2**20)) if c.verdict == "worse"]
    assert [c.what for c in larger] == ["peak memory"]
    assert [c.verdict for c in compare(base, _results(1.0)) if c.verdict != "same"] == ["better"]
    lost = [c for c in compare(base, _results(2.0, cannot="broken")) if c.verdict == "worse"]
    assert [(c.provider, c.what) for c in lost] == [("heteroakd[cpu]", "measured at all")]
    assert "1 worse" in to_text(compare(base, _results(4.0)))


def test_a_large_move_within_scatter_is_not_called_the_same() -> None:
    from benchmarks.compare import judge
    from benchmarks.results import Spread

    assert judge(Spread(10.0, 2.0, 20.0), Spread(5.0, 2.0, 20.0)) == "unclear"
    assert judge(Spread(10.0, 9.0, 11.0), Spread(9.2, 8.5, 10.0)) == "same"


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _results(2.0).save(tmp_path / "old")
    _results(4.0).save(tmp_path / "new")
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "old")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "none")]) == 2
    assert "not a result file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 9}', '{"schema": 1}'])
def test_a_file_that_is_no_result_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert "not a result file" in capsys.readouterr().err


def test_the_report_shows_losing_rows_and_reasons(tmp_path: Path) -> None:
    results = _results(20.0)
    results.save(tmp_path)
    page = report.write(Results.load(tmp_path), tmp_path).read_text()
    assert "**0.50x**" in page
    assert "cannot [1]" in page
    assert "[1] needs Triton and a GPU" in page
    assert "tests: passed" in page
    for picture in ("time.png", "floor.png"):
        assert f"({picture})" in page
        assert (tmp_path / picture).stat().st_size > 5000
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {row["provider"] for row in rows} >= {"eager", "heteroakd[cpu]"}
    assert float(rows[2]["speedup_over_eager"]) == pytest.approx(0.5)


def test_cells_of_tables_hold_names_with_bars_and_messages_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw_all", lambda *_: [])
    results = _results(2.0)
    step = {"key": "step | A -> B | B2 | float32", "provider": "eager"}
    results.data["crops"].append({"objective": "ce", "provider": "ours", "cannot": "a|b\nc"})
    results.data["steps"] = [{**step, "cannot": "x | y"}]
    results.data["step_batches"] = [{**step, "cannot": "x | y", "budget": 2**20}]
    page = report.write(results, tmp_path).read_text()
    assert r"| **ce \| B1 C19 64x128 \| stride 4 \| float32** |" in page
    assert r"a\|b c" in page
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines()]
    tables = [list(found) for is_row, found in itertools.groupby(bars, key=bool) if is_row]
    assert len(tables) == 6
    assert all(len(set(rows)) == 1 for rows in tables), tables


def test_a_run_names_what_it_did_not_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    keys = [one.key for one in SMOKE]

    def run_job(job: timing.Job, *_: Any) -> Iterator[dict[str, Any]]:
        assert job.deadline == 50.0
        for key in keys[:3]:  # the others are past the deadline
            for visit in range(2):
                yield {"begin": key, "visit": visit}
                rows = [{**_row(name, 1.0), "case": key} for name in ("eager", "compile")]
                yield {"done": key, "rows": rows}
        saved = Results.load(tmp_path).data["not_reached"]
        assert saved == {"times": keys[3:], "memory": peaks, "steps": step}

    def peak_bytes(*_: Any) -> int:
        now[0] += 110.0
        return 2**20

    peaks = [one.key for name in ("headline", "objectives") for one in SUITES["smoke"][name]]
    step = [one.key for one in STEP_CASES["smoke"]]
    monkeypatch.setattr(runner, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(runner.timing, "run_job", run_job)
    monkeypatch.setattr(runner.memory, "peak_bytes", peak_bytes)
    monkeypatch.setattr(runner.memory, "supported", lambda: None)
    monkeypatch.setattr(runner.floor, "measure_rates", lambda _: floor.Rates(1e11, 3e10, 0.0))
    monkeypatch.setattr(report, "draw_all", lambda *_: [])
    plan = runner.Plan("smoke", "cpu", tmp_path, seconds=100.0, phases=("times", "memory", "steps"))
    results = runner.run(plan)
    assert results.data["not_reached"] == {
        "times": keys[3:],
        "memory": [f"{peaks[0]}: compile", *peaks[1:]],
        "steps": step,
    }
    page, said = report.write(results, tmp_path).read_text(), report.summary(results)
    assert f"- times: `{keys[3]}`; `{keys[4]}`" in page
    assert f"not reached, memory:\n  {peaks[0]}: compile\n  {peaks[1]}\n" in said
    results.data["not_reached"]["times"].clear()
    assert "not reached, times" not in report.summary(results)
    assert "Not reached" not in report.write(_results(2.0), tmp_path).read_text()


def test_ours_is_the_compiled_backend_where_there_is_one() -> None:
    ours = _results(99.0).ours(_results(99.0).rows(SMOKE[0].key))
    assert ours is not None
    assert ours["provider"] == "heteroakd[cpu]"
    assert spread(total_ms(ours)) is not None


def test_one_small_run_from_the_command_line(tmp_path: Path) -> None:
    assert main([
        "run", "--suite", "smoke", "--only", SMOKE[0].key, "--output", str(tmp_path),
        "--providers", "eager", "heteroakd[reference]", "--visits", "1", "--rounds", "3",
        "--phases", "times", "memory",
    ]) == 0  # fmt: skip
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["provider"] for row in data["rows"]] == ["eager", "heteroakd[reference]"]
    assert all(row["cannot"] is None and row["forward_ms"] for row in data["rows"])
    assert (tmp_path / "report.md").exists()
    assert not (tmp_path / "job.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [["run", "--suite", "none"], ["run", "--only", "nothing matches"], ["run", "--visits", "0"],
     ["run", "--suite", "smoke", "--providers", "nobody"], ["run", "--seconds", "-1"],
     ["run", "--only", "("], ["run", "--phases", "tea"]],
)  # fmt: skip
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "benchmarks: " in capsys.readouterr().err


def test_curves_are_timed_by_the_sides_that_matter() -> None:
    suite = SUITES["cpu"]
    names = runner._providers_of(suite, runner.Plan("cpu", "cpu", Path()))
    assert names[suite["classes"][0].key][0] == "eager"
    assert "compile" not in names[suite["classes"][0].key]
    assert "compile" in names[suite["headline"][0].key]
