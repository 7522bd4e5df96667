"""`python -m benchmarks.gpu`: everything that only a GPU can tell, in one command.

    python -m benchmarks.gpu [--output runs/gpu] [--minutes 8] [--only STAGE,...] [--dry-run]

Each stage runs in processes of its own under a time limit out of the total: a kernel that hangs
or breaks its CUDA context ends its stage and no other. `gpu.json` is rewritten after each stage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from . import provenance

__all__ = ["NO_GPU", "STAGES", "Ran", "Report", "Result", "Runner", "Stage", "execute", "main"]

ROOT: Final = Path(__file__).resolve().parent.parent
SCHEMA: Final = 1
NO_GPU: Final = (
    "benchmarks.gpu: torch sees no CUDA device; run this on a machine with an NVIDIA GPU and a "
    "CUDA build of torch."
)
SANITIZERS: Final = ("memcheck", "racecheck", "initcheck", "synccheck")
_SANITIZER_FOUND: Final = 86  # an exit code that neither Python nor a signal uses
_TAIL: Final = 4000  # characters of output kept of a command that went wrong
_LEAST: Final = 5.0  # seconds: with less, a stage is not begun
Details = dict[str, Any]


# --- one command -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """How one command ended."""

    code: int | None
    """Exit status; None when it was stopped at its limit"""
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        return self.output[-_TAIL:]


def execute(command: Sequence[str], limit: float, environment: dict[str, str] | None = None) -> Ran:
    """Runs a command from the repository's root; at the limit it and its children are ended."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # its children (compilers, the sanitizer's target) end with it
    )
    code: int | None = None
    try:
        output, _ = process.communicate(timeout=max(limit, 0.1))
        code = process.returncode
    except subprocess.TimeoutExpired:
        _end(process)
        try:
            # A process stuck in the driver does not die at once, and must not hold the rest.
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired as error:
            partial = error.stdout or b""
            output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
    except BaseException:
        _end(process)
        raise
    return Ran(code, output, time.monotonic() - began)


def _end(process: subprocess.Popen[str]) -> None:
    """Kills the group that `start_new_session` gave it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


# --- stages ------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a stage found."""

    status: str
    """passed, failed, skipped or timeout"""
    details: Details = field(default_factory=dict)


@dataclass
class Context:
    """What a stage may use."""

    output: Path
    limit: float
    """Seconds that this stage has"""
    earlier: dict[str, Details] = field(default_factory=dict)
    """Details of the stages before, by name"""


@dataclass(frozen=True)
class Stage:
    name: str
    limit: float
    """Most seconds it may take, of those that are left; infinite: all of them"""
    commands: Callable[[Context], list[list[str]]]
    """What it will run, for people to read"""
    run: Callable[[Context], Result]


def judge(ran: Ran) -> str:
    if ran.code is None:
        return "timeout"
    return "passed" if ran.code == 0 else "failed"


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _environment_commands(context: Context) -> list[list[str]]:
    return [_python("-m", "benchmarks.gpu", "--worker", "environment")]


def _run_environment(context: Context) -> Result:
    ran = execute(_environment_commands(context)[0], context.limit)
    # Libraries may print before it; the report is the last line.
    lines = ran.output.strip().splitlines()
    if judge(ran) == "passed" and lines:
        try:
            return Result("passed", json.loads(lines[-1]))
        except ValueError:
            pass
        return Result("failed", {"reason": "its last line is not JSON", "output": ran.tail})
    return Result("failed" if ran.code == 0 else judge(ran), {"output": ran.tail})


def _pytest_commands(name: str, tests: Sequence[str]) -> Callable[[Context], list[list[str]]]:
    def commands(context: Context) -> list[list[str]]:
        command = _python("-m", "pytest", *tests)
        command += ["-q", "-p", "no:cacheprovider", "--maxfail=50", "--durations=10"]
        if importlib.util.find_spec("xdist") is not None:
            # most of the time goes into compiling kernels, one process each
            command += ["-n", str(min(os.cpu_count() or 1, 12)), "--dist", "worksteal"]
        command += [f"--junitxml={context.output / f'{name}.xml'}"]
        if importlib.util.find_spec("hypothesis") is None:
            # conftest.py imports it, and these tests do not need it: a bare machine runs them
            # without poisoned memory rather than not at all.
            command.append("--noconftest")
        return [command]

    return commands


def _run_pytest(name: str, tests: Sequence[str]) -> Callable[[Context], Result]:
    commands = _pytest_commands(name, tests)

    def run(context: Context) -> Result:
        if importlib.util.find_spec("pytest") is None:
            return Result("failed", {"reason": "pytest is not installed"})
        report = context.output / f"{name}.xml"
        report.unlink(missing_ok=True)  # an older run's must not be taken for this one's
        (command,) = commands(context)
        ran = execute(command, context.limit)
        details: Details = {"poisoned_memory": "--noconftest" not in command}
        if report.exists():
            details |= counts_of(report)
        status = judge(ran)
        if status == "passed" and not details.get("counts", {}).get("passed"):
            status = "skipped"
        if status not in ("passed", "skipped"):
            details["output"] = ran.tail
        return Result(status, details)

    return run


def counts_of(report: Path) -> Details:
    """Counts, failing names with the first line of their message, and reasons of the skips."""
    try:
        root = ElementTree.parse(report).getroot()
    except ElementTree.ParseError as error:
        return {"reason": f"{report.name} is not XML: {error}"}
    counts: Counter[str] = Counter()
    failing: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for case in root.iter("testcase"):
        outcome = "passed"
        for child in case:
            message = child.get("message") or ""
            if child.tag in ("failure", "error"):
                outcome = "failed"
                failing[case.get("name") or "?"] = message.split("\n")[0][:300]
            elif child.tag == "skipped" and outcome == "passed":
                outcome = "skipped"
                reasons[message[:300]] += 1
        counts[outcome] += 1
    return {
        "counts": {name: counts[name] for name in ("passed", "failed", "skipped")},
        "failing": failing,
        "skip_reasons": dict(reasons),
    }


def find_sanitizer() -> str | None:
    """On the PATH or in the CUDA toolkit, which often is not on it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/bin" for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def _sanitizer_commands(context: Context) -> list[list[str]]:
    program = find_sanitizer() or "compute-sanitizer"
    commands = []
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", str(_SANITIZER_FOUND)]
        if tool == "memcheck":
            # torch probes the driver with calls that are allowed to fail
            command += ["--report-api-errors", "no"]
        commands.append(command + _python("-m", "benchmarks.gpu", "--worker", "kernels"))
    return commands


def _run_sanitizer(context: Context) -> Result:
    if find_sanitizer() is None:
        return Result("skipped", {"reason": "compute-sanitizer is not installed"})
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation it can see
    began = time.monotonic()
    # Without the sanitizer first: says whether there is anything to check, and compiles it.
    plain = execute(_python("-m", "benchmarks.gpu", "--worker", "kernels"), context.limit)
    if plain.code == 3:
        return Result("skipped", {"reason": plain.output.strip()})
    if judge(plain) != "passed":
        return Result(judge(plain), {"reason": "fails without the sanitizer", "output": plain.tail})
    tools: dict[str, Details] = {}
    for i, command in enumerate(_sanitizer_commands(context)):
        left = context.limit - (time.monotonic() - began)
        ran = execute(command, left / (len(SANITIZERS) - i), environment)
        tools[SANITIZERS[i]] = {"status": judge(ran), "seconds": round(ran.seconds, 1)}
        if ran.code != 0:
            tools[SANITIZERS[i]]["output"] = ran.tail
            # the first report says more than the last one
            tools[SANITIZERS[i]]["beginning"] = ran.output[:_TAIL]
    statuses = {tool["status"] for tool in tools.values()}
    worst = next((s for s in ("failed", "timeout") if s in statuses), "passed")
    return Result(worst, {"ran": plain.output.strip(), "tools": tools})


def _benchmark_commands(context: Context) -> list[list[str]]:
    # Some time is for the start of the process and its report; its own limit comes after that.
    seconds = max(int(context.limit) - 20, 1)
    command = _python("-m", "benchmarks", "run", "--device", "cuda", "--suite", "gpu")
    return [[*command, "--seconds", str(seconds), "--output", str(context.output)]]


def _run_benchmarks(context: Context) -> Result:
    results = context.output / "results.json"
    before = results.stat().st_mtime_ns if results.exists() else None
    ran = execute(_benchmark_commands(context)[0], context.limit)
    status = judge(ran)
    details: Details = {}
    # A run that was cut off may have left what it had; an older run's file is not taken.
    if results.exists() and results.stat().st_mtime_ns != before:
        try:
            details["results"] = json.loads(results.read_text())
        except ValueError as error:
            status, details["reason"] = "failed", f"results.json is not JSON: {error}"
    elif status == "passed":
        status, details["reason"] = "failed", "it wrote no results.json"
    if status != "passed":
        details["output"] = ran.tail
    return Result(status, details)


def _order_commands(context: Context) -> list[list[str]]:
    return [_python("-m", "benchmarks.order", str(context.output / "results.json"))]


def _run_order(context: Context) -> Result:
    """Which of two backends is faster, by kind of call: an entry for `backends/order.json`."""
    if "results" not in context.earlier.get("benchmarks", {}):
        return Result("skipped", {"reason": "no benchmarks in this run"})
    ran = execute(_order_commands(context)[0], context.limit)
    if ran.code == 1:
        return Result("skipped", {"reason": "no case that two compiled backends did"})
    if judge(ran) != "passed":
        return Result(judge(ran), {"output": ran.tail})
    return Result("passed", {"order": json.loads(ran.output)})


def _tests(name: str, limit: float, *tests: str) -> Stage:
    return Stage(name, limit, _pytest_commands(name, tests), _run_pytest(name, tests))


_ON_GPU: Final = ("tests/test_gpu.py", "-m", "gpu", "-k")
_KERNELS: Final = (
    "tests/test_cuda_kernels.py",
    "tests/test_triton_kernels.py",
    "tests/test_projection.py",
)


STAGES: Final = (
    Stage("environment", 60, _environment_commands, _run_environment),
    _tests("correctness", 240, *_ON_GPU, "not determinism and not graph"),
    _tests("kernels", 120, *_KERNELS),
    _tests("determinism", 60, *_ON_GPU, "determinism"),
    _tests("graphs", 60, *_ON_GPU, "graph"),
    _tests("driver", 90, "tests/train/test_train_gpu.py"),
    Stage("sanitizer", 120, _sanitizer_commands, _run_sanitizer),
    Stage("benchmarks", float("inf"), _benchmark_commands, _run_benchmarks),
    Stage("order", 20, _order_commands, _run_order),
)


# --- all of them -------------------------------------------------------------------------------


@dataclass
class Report:
    """The contents of `gpu.json`."""

    device: str
    commit: str
    minutes: float
    schema: int = SCHEMA
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    complete: bool = False
    """False in a file that a killed run left"""
    stages: list[Details] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Whole or not at all: a run may be killed while it writes."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(partial, path)

    @property
    def ok(self) -> bool:
        return all(stage["status"] in ("passed", "skipped") for stage in self.stages)

    def table(self) -> str:
        lines = [f"{self.device}, commit {self.commit}"]
        for stage in self.stages:
            lines.append(
                f"{stage['name']:12} {stage['status']:8} {stage['seconds']:7.1f} s  "
                f"{summary(stage['details'])}".rstrip()
            )
        return "\n".join(lines)


def summary(details: Details) -> str:
    """A stage's details in a few words."""
    parts = []
    if "counts" in details:
        parts.append(", ".join(f"{n} {name}" for name, n in details["counts"].items() if n))
    parts += list(details.get("failing", {}))[:3]
    if "tools" in details:
        parts.append(", ".join(f"{n} {tool['status']}" for n, tool in details["tools"].items()))
    if "results" in details:
        rows: Any = details["results"]
        if isinstance(rows, dict):
            rows = rows.get("rows", rows.get("results", rows))
        parts.append(f"{len(rows)} rows")
    if "reason" in details:
        parts += str(details["reason"]).splitlines()[:1]
    elif not parts and details.get("output"):
        parts += [line[:100] for line in str(details["output"]).strip().splitlines()[-1:]]
    return "; ".join(parts)


class Runner:
    """Runs stages one after another, and keeps `gpu.json` up to date."""

    def __init__(self, report: Report, output: Path, seconds: float) -> None:
        self.report = report
        self.output = output
        self._deadline = time.monotonic() + seconds

    def run(self, stages: Sequence[Stage]) -> Report:
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "gpu.json"
        earlier: dict[str, Details] = {}
        for stage in stages:
            limit = min(stage.limit, self._deadline - time.monotonic())
            context = Context(self.output, limit, earlier)
            print(f"{stage.name}: at most {max(limit, 0):.0f} s", flush=True)
            began = time.monotonic()
            commands: list[str] = []
            if limit < min(_LEAST, stage.limit):
                result = Result("timeout", {"reason": "no time was left to begin it"})
            else:
                try:
                    commands = [shlex.join(command) for command in stage.commands(context)]
                    result = stage.run(context)
                except Exception as error:  # a stage's defect must not cost the stages after it
                    result = Result("failed", {"reason": f"{type(error).__name__}: {error}"})
            earlier[stage.name] = result.details
            self.report.stages.append(
                {
                    "name": stage.name,
                    "status": result.status,
                    "seconds": round(time.monotonic() - began, 2),
                    "limit": round(max(limit, 0.0), 2),
                    "commands": commands,
                    "details": result.details,
                }
            )
            self.report.complete = len(self.report.stages) == len(stages)
            self.report.write(path)
        return self.report


# --- what runs in processes of its own ---------------------------------------------------------


def _worker_environment() -> int:
    import torch

    from heteroakd_fast import info

    properties = torch.cuda.get_device_properties(0)
    report: Details = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "properties": str(properties),
        "cudnn": torch.backends.cudnn.version(),
        "driver": _output_of(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"
        ),
        "nvcc": (_output_of("nvcc", "--version") or "").splitlines()[-1:],
        "sanitizer": find_sanitizer() is not None,
        "versions": provenance.versions(
            "torch", "triton", "numpy", "pytest", "hypothesis", "pytest-benchmark"
        ),
        "info": info.collect(),
    }
    # A device that is listed and cannot compute must fail here.
    report["computes"] = float(torch.arange(10, device="cuda").sum()) == 45.0
    print(json.dumps(report, default=str))
    return 0 if report["computes"] else 1


def _output_of(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _worker_kernels() -> int:
    """Each compiled backend once, on tensors small enough for the sanitizer; 3 without any."""
    import torch

    from heteroakd_fast import BackendUnavailableError, backends, functional

    device = torch.device("cuda")
    objectives: dict[str, Details] = {
        "ce": {"label_smoothing": 0.1},
        "kd": {"kd_weight": 1.0, "teacher_ce_weight": 1.0, "feature_weight": 1.0},
        "hetero": {"hetero_weight": 1.0, "return_maps": True},
        "paper": {"hetero_weight": 1.0, "preset": "paper"},
        "space": {"hetero_weight": 1.0, "preset": "paper", "weight_axis": "space"},
    }
    # grids of student and teacher: each way that kernels read logits
    grids = {"gather": ((4, 6), (8, 3)), "cells": ((4, 5), (4, 5)), "labels": ((13, 17), (13, 17))}
    calls = [
        (name, grid, dtype)
        for name in objectives
        for grid in grids
        for dtype in (torch.float32, torch.bfloat16)
        if grid == "gather" or (name in ("kd", "hetero") and dtype == torch.float32)
    ]
    ran: list[str] = []
    reasons: list[str] = []
    for backend in backends.CANDIDATES["cuda"]:
        for name, grid, dtype in calls:
            options = objectives[name]
            torch.manual_seed(0)
            # made on the CPU: the fewer of torch's own kernels, the faster the sanitizer
            student = torch.randn(2, 5, *grids[grid][0]).to(dtype).to(device).requires_grad_()
            teacher = torch.randn(2, 5, *grids[grid][1]).to(dtype).to(device)
            teacher.requires_grad_("teacher_ce_weight" in options)
            target = torch.randint(0, 5, (2, 13, 17))
            target[0, :3] = 255
            try:
                loss = functional.distillation_loss(
                    student, teacher, target.to(device), backend=backend, **options
                ).loss
            except BackendUnavailableError as error:
                reasons.append(str(error))
                break
            loss.backward()
            torch.cuda.synchronize()
            ran.append(f"{backend} {name} {grid} {str(dtype).removeprefix('torch.')}")
    if not ran:
        print("no compiled backend runs on this GPU: " + " ".join(dict.fromkeys(reasons)))
        return 3
    print(", ".join(ran))
    return 0


_WORKERS: Final = {"environment": _worker_environment, "kernels": _worker_kernels}


# --- the command -------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="default: %(default)s"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="in all; default: %(default)s")
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="print every stage's commands")
    parser.add_argument("--worker", choices=_WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    wanted = [name for name in options.only.split(",") if name]
    for name in wanted:
        if name not in names:
            parser.error(f"--only: got {name!r}, expected some of {', '.join(names)}")
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes: got {options.minutes}, expected a number > 0")
    options.stages = [stage for stage in STAGES if not wanted or stage.name in wanted]
    # the stages run in the repository's root, wherever this was called
    options.output = options.output.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; 0 when none failed, 1 when one did, 2 without a GPU."""
    options = _parse(arguments)
    if options.worker:
        return _WORKERS[options.worker]()
    seconds = 60.0 * options.minutes
    if options.dry_run:
        for stage in options.stages:
            limit = min(stage.limit, seconds)
            print(f"{stage.name} (at most {limit:.0f} s)")
            for command in stage.commands(Context(options.output, limit)):
                print(f"    {shlex.join(command)}")
        return 0

    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    report = Report(torch.cuda.get_device_name(0), provenance.commit(), options.minutes)
    Runner(report, options.output, seconds).run(options.stages)
    print(f"\n{report.table()}\n{options.output / 'gpu.json'}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
