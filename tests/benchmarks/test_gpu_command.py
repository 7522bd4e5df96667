"""`dev.py gpu` without a GPU: what it runs, how it copes, what its workers find."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import shim_backend
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `dev` and `setup` are no part of the package

from benchmarks import gpu, gpu_calls, gpu_workers, memory, stages  # noqa: E402

shim = pytest.mark.skipif(not shim_backend.USED, reason="the CUDA sources do not run on the CPU")


def fake(name: str, code: str, limit: float = 30.0) -> stages.Stage:
    def work(stage: stages.StageRun) -> None:
        ran = stage.python("-c", code)
        stage.conclude(ran.status, output=ran.tail)

    return stages.Stage(name, limit, work)


def run(
    tmp_path: Path, *chosen: stages.Stage, seconds: float = 60.0
) -> tuple[stages.Report, dict[str, Any]]:
    report = stages.Report(tmp_path / "gpu.json", seconds / 60, "a commit")
    stages.run_stages(chosen, report, seconds, gpu.summary)
    return report, json.loads((tmp_path / "gpu.json").read_text())


# --- the command -------------------------------------------------------------------------------


def test_dry_run_prints_every_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    names = [
        *("prepare", "smoke", "headline", "issue", "correctness", "determinism", "graphs"),
        *("sanitizer", "driver", "tests", "kernels", "benchmarks", "order"),
    ]
    assert [stage.name for stage in gpu.STAGES] == names[1:]
    positions = [text.index(f"{name} (at most") for name in names]
    assert positions == sorted(positions)
    for part in (
        "gpu_workers environment",
        "TORCH_CUDA_ARCH_LIST=9.0a",
        "gpu_workers compile --share 0/1",
        "gpu_workers kernels check cuda",
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


def test_selections_cover_every_test_once() -> None:
    """Two runs of one file: a sample first, and then what is not in it."""
    commands: list[str] = []
    for name in ("correctness", "tests"):
        stage = next(x for x in gpu.STAGES if x.name == name)
        report = stages.Report(Path("gpu.json"), 1.0, "")
        running = stages.StageRun(name, 60.0, report, dry=True)
        stage.work(running)
        commands += running.commands
    sample, rest = (re.search(r"-k '(.*?)'", command) for command in commands)
    assert sample is not None
    assert rest is not None
    assert rest[1] == f"not ({sample[1]})"
    words = sample[1].split(" and ")
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_gpu.py").read_text(), re.M)
    assert words[0] in tests


# --- stages ------------------------------------------------------------------------------------


def test_a_failing_stage_stops_none_of_the_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(stage: stages.StageRun) -> None:
        raise KeyError("a defect of the stage itself")

    report, written = run(
        tmp_path,
        fake("fails", "print('what it said'); raise SystemExit(3)"),
        stages.Stage("breaks", 30.0, broken),
        fake("passes", "print(1)"),
    )
    found = written["stages"]
    assert [stage["status"] for stage in found.values()] == ["failed", "failed", "passed"]
    assert "what it said" in found["fails"]["details"]["output"]
    assert "a defect of the stage" in found["breaks"]["details"]["reasons"][0]
    assert written["complete"]
    assert not report.ok
    assert re.search(r"breaks +failed +0\.. s  KeyError", capsys.readouterr().out)


def test_a_stage_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(alive)!r}).touch()"
    hang = (
        "import subprocess, sys, time; print('began', flush=True);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    began = time.monotonic()
    report, written = run(tmp_path, fake("hangs", hang, limit=0.8), fake("passes", "print(1)"))
    assert time.monotonic() - began < 15
    assert [x["status"] for x in written["stages"].values()] == ["timeout", "passed"]
    assert "began" in written["stages"]["hangs"]["details"]["output"]
    assert not report.ok
    time.sleep(max(0.0, began + 3.0 - time.monotonic()))
    assert not alive.exists()


def test_the_total_limits_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_LEAST", 0.5)
    _, written = run(
        tmp_path,
        fake("long", "import time; time.sleep(60)", limit=float("inf")),
        fake("late", "print(1)"),
        seconds=1.0,
    )
    assert [x["status"] for x in written["stages"].values()] == ["timeout", "timeout"]
    reasons = written["stages"]["late"]["details"]["reasons"]
    assert reasons == ["no time was left to begin it"]


_WORKER = """
import json, os, sys, time
start = int(sys.argv[2]) if len(sys.argv) > 1 else 0
for i, name in list(enumerate(("passes", "dies", "hangs", "fails", "is skipped")))[start:]:
    print(json.dumps({"name": name, "begin": i}), flush=True)
    if name == "dies":
        print("the driver says why", flush=True)
        os._exit(11)
    if name == "hangs":
        time.sleep(60)
    found = {"fails": {"failed": "wrong"}, "is skipped": {"skipped": "no"}}.get(name, {"x": 1})
    print(json.dumps({"name": name, "found": found}), flush=True)
    print('{"name": broken line', flush=True)
print(json.dumps({"name": "end"}))
"""


def test_items_go_on_behind_one_that_dies_or_hangs(tmp_path: Path) -> None:
    """And the file has them while the stage runs."""
    seen: list[Any] = []

    def look(stage: stages.StageRun) -> None:
        stage.items("-c", _WORKER, silent=0.7)
        seen.append(json.loads((tmp_path / "gpu.json").read_text()))

    _, written = run(tmp_path, stages.Stage("look", 30.0, look))
    (found,) = (x["details"]["items"] for x in written["stages"].values())
    assert found == {
        "passes": {"x": 1},
        "dies": {"failed": "ends its process with 11: the driver says why"},
        "hangs": {"failed": "hangs: it printed nothing"},
        "fails": {"failed": "wrong"},
        "is skipped": {"skipped": "no"},
    }
    assert written["stages"]["look"]["status"] == "failed"
    assert written["stages"]["look"]["commands"][-1].endswith("--start 3")
    during = seen[0]["stages"]["look"]
    assert during["status"] == "running"
    assert during["details"]["items"]["passes"] == {"x": 1}
    assert not seen[0]["complete"]
    assert gpu.summary({"items": found}).startswith("1 of 5; dies: ends its process")


def test_an_exit_code_after_the_last_item_is_noticed(tmp_path: Path) -> None:
    code = _WORKER.replace('("passes", "dies", "hangs", "fails", "is skipped")', '("passes",)')

    def work(stage: stages.StageRun) -> None:
        stage.items("-c", code + "raise SystemExit(86)")

    _, written = run(tmp_path, stages.Stage("exits", 30.0, work))
    assert written["stages"]["exits"]["status"] == "failed"
    assert len(written["stages"]["exits"]["commands"]) == 1


# --- what the stages read ----------------------------------------------------------------------

# As pytest prints, alone and with workers.
_ALONE = """
tests/test_gpu.py::test_ok[x-[1 2]] PASSED                               [ 14%]
tests/test_gpu.py::test_bad[a b] FAILED                                  [ 42%]
tests/test_gpu.py::test_skip SKIPPED (no GPU here)                       [ 57%]
tests/test_gpu.py::test_broken ERROR                                     [ 71%]
"""
_WITH_WORKERS = """
tests/test_gpu.py::test_ok[x-[1 2]] |
[gw0] [ 14%] PASSED tests/test_gpu.py::test_ok[x-[1 2]] |
[gw1] [ 42%] FAILED tests/test_gpu.py::test_bad[a b] |
[gw1] [ 57%] SKIPPED tests/test_gpu.py::test_skip |
[gw0] [ 71%] ERROR tests/test_gpu.py::test_broken |
""".replace("|", "")
_SUMMARY = """
___________________________ ERROR at setup of test_broken ___________________________
=========================== short test summary info ============================
SKIPPED [3] tests/test_gpu.py:5: no GPU here
ERROR tests/test_gpu.py::test_broken - RuntimeError: at setup
FAILED tests/test_gpu.py::test_bad[a b] - AssertionError: why - not
=============== 1 failed, 1 passed, 3 skipped, 1 error in 1.78s ================
"""


@pytest.mark.parametrize("progress", [_ALONE, _WITH_WORKERS])
def test_counts_of_a_test_run(progress: str) -> None:
    stage = stages.StageRun("x", 60.0, stages.Report(Path("gpu.json"), 1.0, ""), dry=True)
    outcome = gpu.Outcome(stage)
    for line in progress.splitlines():
        outcome.read(line)
    assert stage.details["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    bad, broken = "tests/test_gpu.py::test_bad[a b]", "tests/test_gpu.py::test_broken"
    assert stage.details["failing"] == {bad: "", broken: ""}  # known when the run is stopped here
    for line in _SUMMARY.splitlines():
        outcome.read(line)
    assert stage.details["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert stage.details["failing"] == {
        bad: "AssertionError: why - not",
        broken: "RuntimeError: at setup",
    }
    assert stage.details["skipped"] == {"no GPU here": 3}


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
    assert "a host" not in json.dumps(launches)
    assert "cell_kernel 61.5 % of the issue slots" in gpu.summary({"launches": launches})


def test_times_are_put_into_a_table(tmp_path: Path) -> None:
    report = stages.Report(tmp_path / "gpu.json", 6.0, "")
    rows = {
        "eager": {"ms": 6.25, "graph_ms": None, "peak_mib": 1520.0},
        "heteroakd[cuda]": {"ms": 0.5, "graph_ms": 0.3125, "peak_mib": 38.0, "paper_ms": 0.219},
    }
    items = {"s4": {"rows": rows, "floor_ms": 0.065}, "c150": {"skipped": "no time was left"}}
    report.stages["headline"] = {"details": {"items": items}}
    line = gpu.times_table(report).splitlines()[1]
    assert line.split() == (
        ["s4", "6.25", "-", "-", "0.3125", "-", "0.219", "-", "0.065", "1520", "38", "-"]
    )


# --- building and importing --------------------------------------------------------------------


def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)  # which would count instead
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr(gpu, "PACKAGE", tmp_path / "package" / "heteroakd_fast")
    report = stages.Report(tmp_path / "gpu.json", 6.0, "")
    commands: list[str] = []

    def python(self: stages.StageRun, *arguments: str, **options: Any) -> stages.Ran:
        commands.append(options["environment"]["TORCH_CUDA_ARCH_LIST"])
        (tmp_path / "lib" / "heteroakd_fast").mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / "heteroakd_fast" / "_C.abi3.so").touch()
        return stages.Ran(0, "", 41.0)

    monkeypatch.setattr(stages.StageRun, "python", python)
    said = []
    for capability in ("9.0", "9.0", "8.0"):
        found = {"environment": {"capability": capability, "torch": "2.11.0"}}
        report.stages["environment"] = {"details": {"items": found}}
        gpu.lay_out_package()
        stage = stages.StageRun("prepare", 60.0, report)
        gpu.build(stage)
        said.append(stage.details["library"])
        assert (gpu.PACKAGE / "_C.abi3.so").exists()
    assert said == ["built in 41 s", "built by an earlier call", "built in 41 s"]
    assert commands == ["9.0a", "8.0"]


@pytest.mark.parametrize("answer", ["None", "it could not be loaded into torch 2.11"])
def test_a_library_that_is_given_is_tried_first(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr(gpu, "PACKAGE", tmp_path / "package" / "heteroakd_fast")
    given = tmp_path / "elsewhere.so"
    given.touch()
    monkeypatch.setenv(gpu.LIBRARY, str(given))
    stage = stages.StageRun("prepare", 60.0, stages.Report(tmp_path / "gpu.json", 6.0, ""))
    links: list[Path] = []

    def python(*arguments: str, **options: Any) -> stages.Ran:
        if arguments[0] == "-c":
            links.append((gpu.PACKAGE / "_C.abi3.so").resolve())
            return stages.Ran(0, f"a warning\n{answer}\n", 1.0)
        return stages.Ran(1, "setuptools is not installed", 1.0)

    monkeypatch.setattr(stage, "python", python)
    gpu.lay_out_package()
    gpu.build(stage)
    assert links == [given]
    if answer == "None":
        assert stage.details == {"library": "given"}
        assert (gpu.PACKAGE / "_C.abi3.so").samefile(given)
    else:
        reasons = [f"--library: {answer}", "library: setuptools is not installed"]
        assert stage.details["reasons"] == reasons
        assert not (gpu.PACKAGE / "_C.abi3.so").exists()


def test_the_build_uses_the_rules_of_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import setup

    real, ninja = subprocess.run, []

    def run(command: list[str], **options: Any) -> Any:
        if command[0] == setup.find_ninja():
            ninja.append(command)
            return subprocess.CompletedProcess(command, 0)
        return real(command, **options)

    if reason := setup.what_is_missing():
        pytest.skip(reason)
    monkeypatch.setattr(setup.subprocess, "run", run)
    monkeypatch.setenv("HETEROAKD_BUILD_CUDA", "0")
    monkeypatch.chdir(tmp_path)
    gpu_workers.build(tmp_path)
    (command,) = ninja
    rules = (Path(command[2]) / "build.ninja").read_text()
    assert f"build {tmp_path}/lib/heteroakd_fast/_C.abi3.so: link" in rules
    assert "cpu_pass_portable.cpp.o: cxx" in rules


# --- workers -----------------------------------------------------------------------------------


@shim
def test_a_worker_finds_the_package_of_a_bare_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rehearsal of one call, in a process of its own that is not told where anything is."""
    monkeypatch.setattr(gpu, "PACKAGE", tmp_path / "package" / "heteroakd_fast")
    monkeypatch.setenv(gpu.REHEARSAL, "1")
    gpu.lay_out_package()
    path = os.pathsep.join([str(tmp_path / "package"), str(ROOT)])
    report = stages.Report(tmp_path / "gpu.json", 1.0, "")
    stage = stages.StageRun("smoke", 60.0, report, environment={"PYTHONPATH": path}, cwd=tmp_path)
    stage.items(*gpu.WORKERS, "kernels", "check", "cuda", "label grid")
    assert stage.status == "passed", stage.details
    (found,) = stage.details["items"].values()
    assert found["kernel"] == "label grid: ce, kd, hetero"
    assert 0 < found["gradient_error"] < 1e-5
    assert (gpu.PACKAGE / "kernels" / "launch.py").samefile(ROOT / "kernels" / "launch.py")
    assert not list(gpu.PACKAGE.glob("_C.*"))


@shim
def test_the_calls_reach_every_kernel() -> None:
    named = set()
    for file in (ROOT / "csrc" / "cuda").glob("*.cu"):
        pattern = r'"((?:cells|label grid|segments)(?:: [^"]+| in double)?)"'
        named |= set(re.findall(pattern, file.read_text()))
    assert len(named) >= 16
    reached = set()
    for call in gpu_calls.CALLS.values():
        if "cuda" in call.backends:
            inputs = gpu_calls.inputs_of(call, "cpu")
            reached |= set(gpu_calls.kernel_of(call, inputs, "cuda").split("; "))
    assert reached == named
    assert set(gpu_workers.FEW) | set(gpu_workers.SANITIZED) <= set(gpu_calls.CALLS)
    assert any(call.options.get("weight_axis") == "space" for call in gpu_calls.CALLS.values())


def small(name: str, **changes: Any) -> gpu_calls.Call:
    return dataclasses.replace(gpu_workers.smaller(gpu_calls.CALLS[name]), **changes)


@shim
@pytest.mark.parametrize("name", gpu_calls.CALLS)
def test_calls_are_right_and_errors_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = small(name)
    backend = "cuda" if "cuda" in call.backends else "reference"
    if backend == "reference":
        monkeypatch.setattr(gpu_calls, "kernel_of", lambda *_: "none")
    found = gpu_calls.check(call, backend, "cpu")
    assert "failed" not in found
    assert gpu_calls.repeat(call, backend, "cpu") == {"bits": found["bits"]}
    assert "failed" not in gpu_calls.graph(call, backend, "cpu")
    real = gpu_calls.outputs_of

    def wrong(call: gpu_calls.Call, tensors: list[Tensor], backend: str) -> list[Tensor]:
        loss, *others = real(call, tensors, backend)
        scale = 1.0 if backend == "reference" else 1.01
        return [loss, *(scale * other for other in others)]

    monkeypatch.setattr(gpu_calls, "outputs_of", wrong)
    if backend == "cuda":
        assert "gradients are wrong" in gpu_calls.check(call, backend, "cpu")["failed"]


@shim
def test_other_bits_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call, real = small("ce"), gpu_calls.outputs_of
    runs = iter(range(100))

    def drifting(*arguments: Any) -> list[Tensor]:
        loss, *others = real(*arguments)
        return [loss + 1e-7 * next(runs), *others]

    monkeypatch.setattr(gpu_calls, "outputs_of", drifting)
    assert "other bits" in gpu_calls.repeat(call, "cuda", "cpu")["failed"]
    assert "other bits" in gpu_calls.graph(call, "cuda", "cpu")["failed"]

    # and between the processes of two stages
    report = stages.Report(tmp_path / "gpu.json", 1.0, "")
    report.stages["smoke"] = {"details": {"items": {"x": {"bits": "1"}, "y": {"bits": "2"}}}}
    stage = stages.StageRun("determinism", 60.0, report)

    def items(*worker: str) -> None:
        stage.details["items"] = {"x": {"bits": "1"}, "y": {"bits": "3"}, "z": {"bits": "4"}}

    monkeypatch.setattr(stage, "items", items)
    gpu.kernels("bits")(stage)
    assert [name for name, one in stage.details["items"].items() if "failed" in one] == ["y"]
    assert stage.status == "failed"


@shim
def test_the_headline_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.floor import Rates
    from benchmarks.providers import find

    monkeypatch.setenv(gpu.REHEARSAL, "1")
    monkeypatch.setattr(gpu_workers, "device", lambda: "cpu")
    monkeypatch.setattr("benchmarks.floor.measure_rates", lambda _: Rates(1e9, 1e9, 0.0))
    known = {name: find()[name] for name in ("eager", "heteroakd[cuda]")}
    monkeypatch.setattr(gpu_workers, "providers", lambda: known)
    monkeypatch.setattr(gpu_workers, "BACKENDS", ("cuda",))
    gpu_workers.cases.cache_clear()
    found = gpu_workers.measure("s4", time.monotonic() + 60)
    gpu_workers.cases.cache_clear()
    assert "failed" not in found
    ours = found["rows"]["heteroakd[cuda]"]
    assert ours["ms"] > 0
    assert ours["loss_error"] < 1e-6
    assert ours["paper_ms"] > 0
    assert found["floor_ms"] > 0
    assert gpu_workers.measure("s4", time.monotonic() - 1) == {"skipped": "no time was left"}


def test_memory_of_a_gpu_is_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, peak = [100], [100]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    peak[0] = 900
    assert memory.gpu_high_water(lambda: peak.__setitem__(0, 350)) == 250


def test_paper_counts_what_kernels_json_has() -> None:
    """43 instructions for each of 8 x 19 x 512 x 1024, on an H100: docs/cuda.md."""
    gpu_workers.cases.cache_clear()
    assert gpu_workers.paper_ms("s4", "cuda") == pytest.approx(0.115, rel=0.03)
    assert gpu_workers.paper_ms("s4", "triton") == pytest.approx(0.146, rel=0.03)
    assert gpu_workers.paper_ms("align", "cuda") is None
    for name in gpu_workers.cases():
        for backend in gpu_workers.BACKENDS:
            gpu_workers.paper_ms(name, backend)  # the kernel is in the table
