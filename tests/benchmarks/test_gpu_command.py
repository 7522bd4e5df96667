"""`python -m benchmarks.gpu` as far as it goes without a GPU: what it runs, and how it copes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


def fake(name: str, code: str, limit: float = 30.0) -> gpu.Stage:
    command = [sys.executable, "-c", code]

    def run(context: Any) -> gpu.Result:
        ran = gpu.execute(command, context.limit)
        return gpu.Result(gpu.judge(ran), {"output": ran.tail})

    return gpu.Stage(name, limit, lambda _: [command], run)


def run(tmp_path: Path, *stages: gpu.Stage, seconds: float = 60.0) -> tuple[gpu.Report, Any]:
    report = gpu.Report("a device", "a commit", seconds / 60)
    gpu.Runner(report, tmp_path, seconds).run(stages)
    return report, json.loads((tmp_path / "gpu.json").read_text())


def test_dry_run_lists_every_stage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    names = [
        "environment",
        "correctness",
        "kernels",
        "determinism",
        "graphs",
        "driver",
        "sanitizer",
        "benchmarks",
        "order",
    ]
    assert [stage.name for stage in gpu.STAGES] == names
    positions = [text.index(f"{name} (at most") for name in names]
    assert positions == sorted(positions)
    for part in (
        "tests/test_gpu.py -m gpu",
        "tests/test_triton_kernels.py",
        "--tool racecheck",
        "--device cuda --suite gpu",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []
    assert gpu.main(["--dry-run", "--only", "graphs"]) == 0
    assert "sanitizer" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--only", "graph"], ["--minutes", "0"]])
def test_refuses_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main(arguments)
    assert caught.value.code == 2
    assert f"{arguments[0]}: got" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.strip() == gpu.NO_GPU
    assert not (tmp_path / "out").exists()


def test_a_failing_stage_stops_none_of_the_later(tmp_path: Path) -> None:
    def broken(context: Any) -> gpu.Result:
        raise KeyError("a defect of the stage itself")

    report, written = run(
        tmp_path,
        fake("fails", "print('what it said'); raise SystemExit(3)"),
        gpu.Stage("breaks", 30.0, lambda _: [], broken),
        fake("passes", "print(1)"),
    )
    assert [s["status"] for s in written["stages"]] == ["failed", "failed", "passed"]
    assert "what it said" in written["stages"][0]["details"]["output"]
    assert "a defect of the stage" in written["stages"][1]["details"]["reason"]
    assert written["complete"]
    assert not report.ok
    assert "a device, commit a commit" in report.table()
    assert "fails        failed" in report.table()


def test_a_stage_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    hang = (
        "import subprocess, sys, time; print('began', flush=True);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    began = time.monotonic()
    report, written = run(tmp_path, fake("hangs", hang, limit=1.5), fake("passes", "print(1)"))
    assert time.monotonic() - began < 15
    assert [s["status"] for s in written["stages"]] == ["timeout", "passed"]
    assert "began" in written["stages"][0]["details"]["output"]
    assert not report.ok
    time.sleep(max(0.0, began + 5.5 - time.monotonic()))
    assert not alive.exists()


def test_the_total_limits_every_stage(tmp_path: Path) -> None:
    _, written = run(
        tmp_path,
        fake("long", "import time; time.sleep(60)", limit=float("inf")),
        fake("late", "print(1)"),
        seconds=6.0,
    )
    assert [s["status"] for s in written["stages"]] == ["timeout", "timeout"]
    assert written["stages"][1]["details"]["reason"] == "no time was left to begin it"


def test_the_file_is_rewritten_after_each_stage(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(context: Any) -> gpu.Result:
        path = tmp_path / "gpu.json"
        seen.append(json.loads(path.read_text()) if path.exists() else None)
        return gpu.Result("skipped", {"reason": "only looked"})

    stages = [gpu.Stage(name, 30.0, lambda _: [], look) for name in ("one", "two")]
    report, written = run(tmp_path, *stages)
    assert seen[0] is None
    assert [s["name"] for s in seen[1]["stages"]] == ["one"]
    assert not seen[1]["complete"]
    assert written["schema"] == gpu.SCHEMA
    assert report.ok


def test_counts_of_a_test_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
<testcase name="a"/><testcase name="b[x]"><failure message="E  1 != 2&#10;more">long</failure>
</testcase><testcase name="c"><skipped message="no GPU"/></testcase>
<testcase name="d"><error message="at teardown"/></testcase></testsuite></testsuites>"""
    )
    details = gpu.counts_of(report)
    assert details["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert details["failing"] == {"b[x]": "E  1 != 2", "d": "at teardown"}
    assert details["skip_reasons"] == {"no GPU": 1}
    report.write_text("<testsuites>")
    assert "not XML" in gpu.counts_of(report)["reason"]


def test_selections_cover_every_test_once() -> None:
    """Three runs of one file: no test may be in two of them or in none."""
    context = gpu.Context(Path(), 60.0)
    commands = [stage.commands(context)[0] for stage in gpu.STAGES]
    selections = [command[command.index("-k") + 1] for command in commands if "-k" in command]
    assert selections == ["not determinism and not graph", "determinism", "graph"]
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_gpu.py").read_text(), re.M)
    for word in selections[1:]:
        assert any(word in test for test in tests)
    assert not any(all(word in test for word in selections[1:]) for test in tests)


@pytest.mark.parametrize("fresh", [True, False])
def test_benchmark_rows_are_included(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.json"
    results.write_text("[]")

    def execute(command: Any, limit: float, environment: Any = None) -> gpu.Ran:
        assert "--suite" in command
        if fresh:
            results.unlink()
            results.write_text('{"rows": [{"ms": 1.0}, {"ms": 2.0}]}')
        return gpu.Ran(0, "", 0.1)

    monkeypatch.setattr(gpu, "execute", execute)
    result = next(s for s in gpu.STAGES if s.name == "benchmarks").run(gpu.Context(tmp_path, 60.0))
    assert result.status == ("passed" if fresh else "failed")
    assert gpu.summary(result.details) == ("2 rows" if fresh else "it wrote no results.json")
