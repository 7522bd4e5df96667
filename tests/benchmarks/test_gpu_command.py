"""`dev.py gpu` without a GPU: what it runs, how it copes, what its workers find."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `dev` is no part of the package

from benchmarks import gpu, gpu_workers, stages  # noqa: E402
from benchmarks.cases import SUITES  # noqa: E402


def stage_run(name: str, path: Path = Path("gpu.json"), **options: Any) -> stages.StageRun:
    return stages.StageRun(name, 60.0, stages.Report(path, 1.0, "a commit"), **options)


def fake(name: str, code: str, limit: float = 30.0) -> stages.Stage:
    def work(stage: stages.StageRun) -> None:
        ran = stage.python("-c", code)
        stage.conclude(ran.status, output=ran.tail)

    return stages.Stage(name, limit, work)


def run(tmp_path: Path, *chosen: stages.Stage, seconds: float = 60.0) -> dict[str, Any]:
    report = stages.Report(tmp_path / "gpu.json", seconds / 60, "a commit")
    stages.run_stages(chosen, report, seconds, gpu.summary)
    written: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert written["complete"]
    assert report.ok == all(x["status"] == "passed" for x in written["stages"].values())
    found: dict[str, Any] = written["stages"]
    return found


# --- the command -------------------------------------------------------------------------------


def test_dry_run_prints_every_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    positions = [text.index(f"{stage.name} (at most") for stage in gpu.STAGES]
    assert positions == sorted(positions)
    for part in (
        "gpu_workers environment",
        "TORCH_CUDA_ARCH_LIST=9.0a",
        "gpu_workers compile 0/1",
        "setup.py build_ext",
        "benchmarks.gpu_tests 0/1",
        "ncu --csv --metrics sm__inst_issued",
        "tests/test_gpu.py -m gpu",
        "tests/kernels/test_triton_kernels.py",
        "--tool racecheck",
        "benchmarks run --device cuda",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []
    assert gpu.main(["--dry-run", "--only", "graphs"]) == 0
    assert "sanitizer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--only", "graph"], ["--minutes", "0"], ["--library", "no/such/file"]]
)
def test_refuses_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main(arguments)
    assert caught.value.code == 2
    assert f"{arguments[0]}: got" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "dev.py", "gpu", "--output", str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.strip() == gpu.NO_GPU
    assert not (tmp_path / "out").exists()
    # The package as the workers see it: a bare checkout with its kernels, and no library yet.
    assert (gpu.PACKAGE / "kernels" / "launch.py").samefile(ROOT / "kernels" / "launch.py")
    assert not list(gpu.PACKAGE.glob("_C.*"))


def test_selections_name_tests_that_exist() -> None:
    """What a stage has of a file, a later one leaves out."""
    commands = {}
    for stage in gpu.STAGES:
        if stage.name in ("smoke", "graphs", "tests"):
            running = stage_run(stage.name, dry=True)
            stage.work(running)
            commands[stage.name] = running.commands[0]
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_gpu.py").read_text(), re.M)
    for name in ("smoke", "graphs"):
        test = commands[name].rpartition("-k ")[2].split()[0]
        assert test in tests
        assert f"not {test}" in commands["tests"]


# --- stages ------------------------------------------------------------------------------------


def test_a_failing_stage_stops_none_of_the_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(stage: stages.StageRun) -> None:
        raise KeyError("a defect of the stage itself")

    found = run(
        tmp_path,
        fake("fails", "print('what it said'); raise SystemExit(3)"),
        stages.Stage("breaks", 30.0, broken),
        fake("passes", "print(1)"),
    )
    assert [stage["status"] for stage in found.values()] == ["failed", "failed", "passed"]
    assert "what it said" in found["fails"]["details"]["output"]
    assert "a defect of the stage" in found["breaks"]["details"]["reasons"][0]
    assert re.search(r"breaks +failed +0\.. s  KeyError", capsys.readouterr().out)


def test_a_stage_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(alive)!r}).touch()"
    hang = (
        "import subprocess, sys, time; print('began', flush=True);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    began = time.monotonic()
    found = run(tmp_path, fake("hangs", hang, limit=0.8), fake("passes", "print(1)"))
    assert time.monotonic() - began < 15
    assert [x["status"] for x in found.values()] == ["timeout", "passed"]
    assert "began" in found["hangs"]["details"]["output"]
    time.sleep(max(0.0, began + 3.0 - time.monotonic()))
    assert not alive.exists()


def test_the_total_limits_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_LEAST", 0.5)
    long = fake("long", "import time; time.sleep(60)", limit=float("inf"))
    found = run(tmp_path, long, fake("late", "print(1)"), seconds=1.0)
    assert [x["status"] for x in found.values()] == ["timeout", "timeout"]
    assert found["late"]["details"]["reasons"] == ["no time was left to begin it"]


_WORKER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.stages import go_through

def die():
    print("the driver says why", flush=True)
    os._exit(11)

def fail():
    raise RuntimeError("CUDA error: misaligned address")

items = [("passes", lambda: {{"x": 1}}), ("dies", die), ("hangs", lambda: time.sleep(60)),
         ("fails", fail), ("is skipped", lambda: {{"skipped": "no"}})]
print('{{"name": broken line', flush=True)
go_through(items[:int(sys.argv[1])], int(sys.argv[3]) if len(sys.argv) > 2 else 0)
raise SystemExit(int(sys.argv[1] == "1") * 86)
"""


def test_items_go_on_behind_one_that_dies_or_hangs(tmp_path: Path) -> None:
    """And the file has them while the stage runs."""
    seen: list[Any] = []

    def look(stage: stages.StageRun) -> None:
        stage.items("-c", _WORKER, "5", silent=1.5)
        seen.append(json.loads((tmp_path / "gpu.json").read_text()))

    stage = run(tmp_path, stages.Stage("look", 30.0, look))["look"]
    found = stage["details"]["items"]
    assert found == {
        "passes": {"x": 1},
        "dies": {"failed": "ends its process with 11: the driver says why"},
        "hangs": {"failed": "hangs: it printed nothing"},
        "fails": {"failed": "RuntimeError: CUDA error: misaligned address"},
        "is skipped": {"skipped": "no"},
    }
    assert stage["status"] == "failed"
    # What breaks a CUDA context breaks it for all items after it, which get another process.
    assert [x.split("--start ")[-1] for x in stage["commands"][1:]] == ["2", "3", "4"]
    during = seen[0]["stages"]["look"]
    assert during["status"] == "running"
    assert during["details"]["items"]["passes"] == {"x": 1}
    assert gpu.summary({"items": found}).startswith("1 of 5; dies: ends its process")


def test_an_exit_code_after_the_last_item_is_noticed(tmp_path: Path) -> None:
    work = stages.Stage(
        "exits", 30.0, lambda stage: stage.items("-c", _WORKER, "1", silent=30) and None
    )
    found = run(tmp_path, work)["exits"]
    assert found["status"] == "failed"
    assert len(found["commands"]) == 1


# --- what the stages read ----------------------------------------------------------------------

_TESTS = """
import os
import pytest

@pytest.mark.parametrize("x", ["[1 2]", "a b"])
def test_some(x):
    assert x == "[1 2]", "why - not"

def test_skip():
    pytest.skip("no GPU here")

@pytest.fixture
def broken():
    raise RuntimeError("CUDA error: at setup")

def test_broken(broken):
    pass

def test_dies():
    os._exit(11)

def test_last():
    pass
"""


def test_a_test_that_dies_stops_none_of_the_later(tmp_path: Path) -> None:
    """Each test is an item, in the first or the second share."""
    (tmp_path / "test_x.py").write_text(_TESTS)
    stage = stage_run("x", tmp_path / "gpu.json", environment={"PYTHONPATH": str(ROOT)})
    for share in ("0/2", "1/2"):
        options = ("-p", "no:cacheprovider", str(tmp_path), "-k", "test")
        ran = stage.items(*gpu.TESTS, share, *options, silent=60, cwd=tmp_path)
    assert ran.code == 0, ran.output
    assert [x.split("--start ")[1:] for x in stage.commands] == [[], ["3"], [], ["2"]]
    items = stage.details["items"]
    found = {name.split("::")[-1]: what for name, what in items.items()}
    assert found.pop("test_some[a b]")["failed"].startswith("AssertionError: why - not")
    assert found.pop("test_dies")["failed"].startswith("ends its process with 11")
    assert found == {
        "test_some[[1 2]]": {},
        "test_skip": {"skipped": "no GPU here"},
        "test_broken": {"failed": "RuntimeError: CUDA error: at setup"},
        "test_last": {},
    }
    assert stage.status == "failed"


def test_counters_of_ncu_are_read() -> None:
    header = (
        '"ID","Process ID","Host Name","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    )
    issued, duration = next(iter(gpu.METRICS)), "gpu__time_duration.sum"
    kernel = "void heteroakd::cuda::cell_kernel<heteroakd::Fixed<1, 0>, 4, 4>(heteroakd::Pass)"
    output = f"""==PROF== Connected
{{"name": "cuda s4", "begin": 0}}
{header}
"0","7","a host","{kernel}","{issued}","%","61.5"
"0","7","a host","{kernel}","{duration}","us","212.3"
"0","7","a host","{kernel}","something else","us","1"
"1","7","a host","distillation_pass","{issued}","%","70.1"
"""
    launches = gpu.read_counters(output)
    assert launches == [
        {"kernel": "cell_kernel", "issue_slots_percent": "61.5 %", "time": "212.3 us"},
        {"kernel": "distillation_pass", "issue_slots_percent": "70.1 %"},
    ]
    assert "cell_kernel 61.5 % of the issue slots" in gpu.summary({"launches": launches})


def test_a_report_of_the_suite_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that did not end well."""
    stage = stage_run("headline", tmp_path / "gpu.json")

    def python(*arguments: str, **options: Any) -> stages.Ran:
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir()
        (output / "results.csv").write_text("provider,total_ms\neager,6.25\n")
        return stages.Ran(1, "it broke", 1.0)

    monkeypatch.setattr(stage, "python", python)
    gpu.headline(stage)
    assert stage.details["rows"] == [{"provider": "eager", "total_ms": "6.25"}]
    assert (stage.status, stage.details["output"]) == ("failed", "it broke")


def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)  # which would count instead
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr(gpu, "PACKAGE", tmp_path / "package" / "heteroakd_fast")
    commands: list[str] = []

    def python(self: stages.StageRun, *arguments: str, **options: Any) -> stages.Ran:
        commands.append(options["environment"]["TORCH_CUDA_ARCH_LIST"])
        (tmp_path / "lib" / "heteroakd_fast").mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / "heteroakd_fast" / "_C.abi3.so").touch()
        return stages.Ran(0, "", 41.0)

    monkeypatch.setattr(stages.StageRun, "python", python)
    said = []
    for capability, given in (
        ("9.0", None),
        ("9.0", None),
        ("8.0", None),
        ("8.0", ROOT / "dev.py"),
    ):
        stage = stage_run("prepare", tmp_path / "gpu.json")
        found = {"environment": {"capability": capability, "torch": "2.11.0"}}
        stage.report.stages["environment"] = {"details": {"items": found}}
        gpu.lay_out_package()
        gpu.build(stage, given)
        said.append(stage.details["library"])
        assert (gpu.PACKAGE / "_C.abi3.so").exists()
    assert said == ["built in 41 s", "built by an earlier call", "built in 41 s", "given"]
    assert commands == ["9.0a", "8.0"]
    assert (gpu.PACKAGE / "_C.abi3.so").samefile(ROOT / "dev.py")


def test_workers_list_their_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, in shares."""
    monkeypatch.setattr(os, "nice", lambda _: None)
    names = [name for i in range(3) for name, _ in gpu_workers.compile_share(f"{i}/3")]
    assert len(names) == len(set(names)) == 3 * len(SUITES["gpu"]["headline"])
    assert len(gpu_workers.counted()) == 4
