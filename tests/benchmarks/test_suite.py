"""The benchmark suite itself: what it times is equal, what it reports is what it measured."""

from __future__ import annotations

import csv
import itertools
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import floor, memory, report, results, runner, stages, timing
from benchmarks.__main__ import main
from benchmarks.cases import OBJECTIVES, SUITES, Case, case, cases_of, select
from benchmarks.compare import compare, judge, to_text
from benchmarks.inputs import IGNORE_INDEX, make_inputs
from benchmarks.oracle import errors_of, truth_of
from benchmarks.providers import find
from benchmarks.results import Results, Row, Spread, ratio, spread

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
        loss = timing.step(provider.build(one, inputs), inputs)
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


class Fake:
    """Eager's loss, a thousandth too large; or no loss at all."""

    def __init__(self, name: str) -> None:
        self.name = name

    def cannot(self, one: Case, device: str) -> str | None:
        return None

    def build(self, one: Case, inputs: Any) -> Any:
        if self.name == "broken":
            raise RuntimeError("no such kernel")
        right = find()["eager"].build(one, inputs)
        return lambda: 1.001 * right()


def test_who_differs_or_raises_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the others alone, also in the visits after the first."""
    known: dict[str, Any] = find()
    known |= {name: Fake(name) for name in ("wrong", "broken")}
    monkeypatch.setattr(timing, "find", lambda: known)
    names = ["broken", "wrong", "eager"]
    job = timing.Job(SMOKE[:1], {SMOKE[0].key: names}, rounds=3, visits=2)
    for _, work in timing.items(timing.Job.from_json(job.to_json())):
        rows = {row["provider"]: row for row in work()["rows"]}
        assert list(rows) == names
        assert rows["broken"]["cannot"] == "RuntimeError: no such kernel"
        assert "differs from the oracle" in rows["wrong"]["cannot"]
        assert rows["wrong"]["forward_ms"] == []
        assert len(rows["eager"]["forward_ms"]) == 3
    late = timing.items(replace(job, deadline=1.0))
    assert late[0][1]() == {"skipped": "the run's time was over"}


@pytest.mark.skipif(memory.supported() is not None, reason=str(memory.supported()))
def test_the_high_water_mark_sees_a_known_allocation() -> None:
    peak = memory.fresh_process(memory.high_water, _allocate_64_mib)
    assert 64 * 2**20 <= peak < 70 * 2**20


def _allocate_64_mib() -> None:
    torch.ones(64 * 2**20 // 4)


def test_memory_of_a_gpu_is_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [900]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    assert memory.high_water(lambda: peak.__setitem__(0, 350), "cuda") == 250


def _die() -> None:
    os.kill(os.getpid(), 9)


def test_a_process_that_dies_is_an_error_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="killed"):
        memory.fresh_process(_die)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        memory.fresh_process(divmod, 1, 0)


def test_statistics() -> None:
    assert spread([]) is None
    assert spread([2.0]) == (2.0, 2.0, 2.0)
    assert spread([3.0, 1.0, 2.0]) == pytest.approx((2.0, 1.2, 2.8))
    assert ratio(_row("eager", 10.0), _row("ours", 2.0)) == pytest.approx((5.0, 4.9, 5.1), rel=0.01)


def test_samples_of_all_visits_make_a_row() -> None:
    first = timing.Timed("ours", "", 1e-7, 2e-7, [1.0, 2.0], [1.0, 1.0], peak_bytes=3 << 20)
    second = timing.Timed("ours", forward_ms=[3.0], backward_ms=[2.0])
    row = results.row_of(SMOKE[0], "main", [first, second], (0.5, "bytes"))
    assert (row.forward_ms, row.backward_ms, row.total_ms, row.rounds) == (2.0, 1.0, 3.0, 3)
    assert (row.loss_error, row.peak_mib, row.floor_ms) == (1e-7, 3.0, 0.5)


def test_floors_grow_with_the_work() -> None:
    rates = floor.Rates(fma_per_s=1e11, bytes_per_s=3e10, exp_per_s=0.0)
    cases = {one.objective: one for one in SUITES["cpu"]["objectives"]}
    times = {name: floor.floor_ms(one, rates)[0] for name, one in cases.items()}
    assert times["ce"] < times["ce+kd"] < times["ce+hetero"] < times["ce+paper"]
    assert times["ce+hetero"] < times["ce+hetero-T1.7"]
    on_gpu = floor.Rates(fma_per_s=3e13, bytes_per_s=3e12, exp_per_s=3.7e12)
    assert floor.floor_ms(cases["ce"], on_gpu)[1] in ("exponentials", "bytes", "arithmetic")


# --- result files ------------------------------------------------------------------------------


def _row(name: str, ms: float, cannot: str = "", peak: float | None = None) -> Row:
    times = [None] * 5 if cannot else [ms / 2, ms / 2, ms, 0.99 * ms, 1.01 * ms]
    errors = {"loss_error": 1e-7, "grad_error": 1e-7}
    return Row(SMOKE[0], "main", name, cannot, *times, peak_mib=peak, floor_ms=0.5,
               floor_binds="bytes", **errors)  # fmt: skip


def _rows(ours_ms: float = 2.0, peak: float = 10.0, cannot: str = "") -> list[Row]:
    return [
        _row("eager", 10.0, peak=200.0),
        _row("compile", 6.0),
        _row("heteroakd[cpu]", ours_ms, cannot, peak),
        _row("heteroakd[reference]", 12.0),
        _row("liger", 0.0, "needs Triton and a GPU"),
    ]


def _results(ours_ms: float = 2.0) -> Results:
    about = {
        "machine": "a CPU", "cores": 2, "memory_gib": 24, "cpu_capability": "AVX2", "torch": "2",
        "python": "3", "packages": {}, "commit": "abc", "tests": "passed",
    }  # fmt: skip
    groups = {"headline": [SMOKE[0]], "strides": [SMOKE[0]]}
    rates = floor.Rates(1e11, 1e10, 0.0)
    return Results("smoke", groups, about, {"main": "two threads"}, rates, _rows(ours_ms))


@pytest.mark.parametrize(
    ("after", "changed"),
    [
        (_rows(2.02), []),
        (_rows(4.0), [("heteroakd[cpu]", "ratio to eager", "worse")]),
        (_rows(1.0), [("heteroakd[cpu]", "ratio to eager", "better")]),
        (_rows(peak=40.0), [("heteroakd[cpu]", "peak memory", "worse")]),
        (_rows(cannot="broken"), [("heteroakd[cpu]", "measured at all", "worse")]),
    ],
)
def test_compare_flags_what_changed_and_only_that(
    after: list[Row], changed: list[tuple[str, str, str]]
) -> None:
    found = compare(_rows(), after)
    assert [(x.provider, x.what, x.verdict) for x in found if x.verdict != "same"] == changed
    assert f"{sum(x[2] == 'worse' for x in changed)} worse" in to_text(found)


def test_a_large_move_within_scatter_is_not_called_the_same() -> None:
    assert judge(Spread(10.0, 2.0, 20.0), Spread(5.0, 2.0, 20.0)) == "unclear"
    assert judge(Spread(10.0, 9.0, 11.0), Spread(9.2, 8.5, 10.0)) == "same"


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, none = (tmp_path / name for name in ("old", "new", "none"))
    for folder, rows in ((old, _rows()), (new, _rows(4.0))):
        folder.mkdir()
        results.save(rows, folder)
    assert results.load(old) == _rows()
    assert main(["compare", str(old), str(new)]) == 1
    assert main(["compare", str(old), str(old)]) == 0
    capsys.readouterr()
    assert main(["compare", str(old), str(none)]) == 2
    message = capsys.readouterr().err
    assert f"{none}: not a result file" in message
    assert "give the results.csv that `python -m benchmarks` writes, or its folder" in message
    results.save([replace(row, case=SUITES["cpu"]["classes"][0]) for row in _rows()], new)
    assert main(["compare", str(old), str(new)]) == 2
    assert f"{old} and {new}, without a common case and provider" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert capsys.readouterr().out.count("a run's results.csv, or the folder of it") == 2


def test_the_committed_report_can_be_compared_with() -> None:
    rows = results.load(Path(__file__).parents[2] / "docs" / "benchmarks" / "cpu")
    assert {SUITES["cpu"]["headline"][0], SUITES["cpu"]["classes"][0]} <= {x.case for x in rows}
    assert all(change.verdict == "same" for change in compare(rows, rows))


@pytest.mark.parametrize("text", ["", "[]", "{", "case,provider\n1,2\n"])
def test_a_file_that_is_no_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=r"results\.csv: not a result file"):
        results.load(tmp_path)


def test_the_report_shows_losing_rows_and_reasons(tmp_path: Path) -> None:
    found = _results(20.0)
    page = report.write(found, tmp_path).read_text()
    assert "**0.50x**" in page
    assert "- liger: needs Triton and a GPU" in page
    assert "tests: passed" in page
    assert "Not reached" not in page
    for picture in ("time.png", "memory.png"):
        assert f"({picture})" in page
        assert (tmp_path / picture).stat().st_size > 5000
    results.save(found.rows, tmp_path)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert float(rows[2]["speedup_over_eager"]) == pytest.approx(0.5)


def test_cells_of_tables_hold_names_with_bars_and_messages_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw_all", lambda *_: {})
    found = _results()
    found.rows += [_row("a|peer\nof us", 3.0), _row("another", 0.0, "needs x\nand z")]
    page = report.write(found, tmp_path).read_text()
    assert r"| a\|peer of us | 1.5 | 1.5 |" in page
    assert "- another: needs x and z\n" in page
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines()]
    tables = [list(group) for is_row, group in itertools.groupby(bars, key=bool) if is_row]
    assert len(tables) == 3
    assert all(len(set(rows)) == 1 for rows in tables), tables


def test_ours_is_the_compiled_backend_where_there_is_one() -> None:
    rows = {row.provider: row for row in _rows(99.0)}
    assert results.ours(rows) is rows["heteroakd[cpu]"]
    del rows["heteroakd[cpu]"]
    assert results.ours(rows) is rows["heteroakd[reference]"]


# --- runs --------------------------------------------------------------------------------------


def test_a_run_names_what_it_did_not_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case whose process dies is reported; what the time was too short for is named."""
    keys = [one.key for one in SMOKE]

    def follow(command: list[str], tell: Any, run: Any) -> stages.Ran:
        for key in (*keys[:3], *keys[:3]):  # the others are past the deadline
            tell({"name": key, "begin": 0})
            rows = [vars(timing.Timed(name, "", 1e-7, 1e-7, [1.0], [1.0])) for name in names]
            tell({"name": key, "found": {"rows": rows}})
        tell({"name": keys[3], "found": {"failed": "ends its process with -9"}})
        tell({"name": keys[4], "found": {"skipped": "the run's time was over"}})
        assert len(results.load(tmp_path)) == 3 * len(names) + len(find()) - 1
        return stages.Ran(0, "", 1.0)

    def peak_bytes(*_: Any) -> int:
        raise KeyboardInterrupt

    names = ("eager", "compile")
    monkeypatch.setattr(runner, "follow", follow)
    monkeypatch.setattr(runner.memory, "peak_bytes", peak_bytes)
    monkeypatch.setattr(runner.memory, "supported", lambda: None)
    monkeypatch.setattr(runner.floor, "measure_rates", lambda _: floor.Rates(1e11, 3e10, 0.0))
    monkeypatch.setattr(report, "draw_all", lambda *_: {})
    plan = runner.Plan(
        "smoke",
        "cpu",
        tmp_path,
    )
    found = runner.run(plan)
    assert found.interrupted
    groups = ("headline", "training", "objectives", "evaluation")
    settings = ["default-malloc", "1 thread"]
    peaks = [one.key for name in groups for one in SUITES["smoke"][name]]
    assert found.missed == {"times": keys[4:], "memory": peaks, "settings": settings}
    dead = found.of(SMOKE[3])
    assert {row.cannot for row in dead.values()} == {"ends its process with -9"}
    assert found.of(SMOKE[0])["eager"].rounds == 2
    page, said = report.write(found, tmp_path).read_text(), report.summary(found)
    assert f"- times: `{keys[4]}`; `{keys[5]}`" in page
    assert f"not reached, memory:\n  {peaks[0]}\n  {peaks[1]}\n" in said


def test_one_small_run_from_the_command_line(tmp_path: Path) -> None:
    assert main([
        "run", "--suite", "smoke", "--only", SMOKE[0].key, "--output", str(tmp_path),
        "--providers", "eager", "heteroakd[reference]", "--visits", "1", "--rounds", "3",
        "--phases", "times", "memory",
    ]) == 0  # fmt: skip
    rows = results.load(tmp_path)
    assert [row.provider for row in rows] == ["eager", "heteroakd[reference]"]
    assert all(not row.cannot and row.total and row.peak_mib is not None for row in rows)
    assert (tmp_path / "report.md").exists()


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
    names = runner.providers_of(suite, runner.Plan("cpu", "cpu", Path()))
    assert names[suite["classes"][0]][0] == "eager"
    assert "compile" not in names[suite["classes"][0]]
    assert "compile" in names[suite["headline"][0]]


def test_a_training_step_is_reported_beside_its_loss(tmp_path: Path) -> None:
    """A third of the step; 30 MiB + 100 MiB for each image."""
    found = _results()
    step = case("tiny training step", "VOC", 1, 4, size=(64, 64))
    loss, twice = replace(step, objective="ce+hetero"), replace(step, batch=2)
    found.groups["training"] = [step, twice, loss]
    for one, ms, peak in ((step, 30.0, 130.0), (twice, 60.0, 230.0), (loss, 10.0, 9.0)):
        found.rows.append(replace(_row("eager", ms, peak=peak), case=one))
    lines = report.write(found, tmp_path).read_text().splitlines()
    (line,) = (x for x in lines if x.startswith("| tiny training step, B1") and "eager" in x)
    assert line.endswith("| eager | 30 | 10 | 33.3 % | 130 | 41 |")
