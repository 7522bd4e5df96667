"""`python3 dev.py gpu`: everything that only a GPU can tell, in one command and without a network.

    python3 dev.py gpu [--minutes 6] [--output runs/gpu] [--only STAGE,...] [--library FILE]
                       [--dry-run | --rehearse]

It takes torch, Triton and nvcc as the calling interpreter sees them. The extension is built for
this GPU into `build/gpu`, or taken from `--library`; a second call builds nothing. Stages run in
the order of their value, each in processes of its own under a time limit: a kernel that hangs or
breaks its CUDA context ends its process, and what comes after it goes on. `gpu.json` is rewritten
as results arrive.
"""

from __future__ import annotations

import argparse
import csv
import glob
import importlib.util
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from . import provenance
from .stages import Details, Report, Stage, StageRun, events, last_line, run_stages

__all__ = ["NO_GPU", "STAGES", "main"]

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / "build" / "gpu"
PACKAGE: Final = BUILD / "package" / "heteroakd_fast"
NO_GPU: Final = (
    "dev.py gpu: torch sees no CUDA device; run this on a machine with an NVIDIA GPU and a CUDA "
    "build of torch, or try --rehearse."
)
REHEARSAL: Final = "HETEROAKD_GPU_REHEARSAL"
LIBRARY: Final = "HETEROAKD_GPU_LIBRARY"
WORKERS: Final = ("-m", "benchmarks.gpu_workers")
BACKENDS: Final = ("cuda", "triton")
SANITIZERS: Final = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_FOUND: Final = 86  # an exit code that neither Python nor a signal uses
#: What ncu reads. Issue slots first: what binds on paper.
METRICS: Final = {
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special_functions_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "bytes",
    "smsp__inst_executed.sum": "instructions",
}


def rehearsing() -> bool:
    return bool(os.environ.get(REHEARSAL))


def find_tool(name: str) -> str | None:
    """On the PATH or in a CUDA toolkit, which often is not on it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/bin" for home in homes if home]
    places += sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


# --- stages ------------------------------------------------------------------------------------


def describe_environment(stage: StageRun) -> Details:
    """The machine and what is installed; "failed" in it where nothing can be run."""
    ran = stage.python(*WORKERS, "environment")
    found: Details = next((x["found"] for x in events(ran.output) if "found" in x), {})
    if not (found or stage.dry):
        found["failed"] = ran.tail
    stage.details["items"] = {"environment": found}
    stage.conclude("failed" if "failed" in found else "passed")
    return found


def prepare(stage: StageRun) -> None:
    """Builds the extension while Triton and torch.compile compile, into their caches, what the
    stages after this one will run."""
    workers = 1 if rehearsing() or stage.dry else max(1, min(8, (os.cpu_count() or 2) // 2))
    shares = [f"{i}/{workers}" for i in range(workers)]
    with ThreadPoolExecutor(workers + 1) as pool:
        built = pool.submit(build, stage)
        list(pool.map(lambda x: stage.items(*WORKERS, "compile", "--share", x, silent=240), shares))
        built.result()


def lay_out_package() -> None:
    """The package as it is installed, in links: with the kernels, and soon the library, in it."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for source in (ROOT / "heteroakd_fast").iterdir():
        if source.name not in ("kernels", "__pycache__") and not source.name.startswith("_C."):
            (PACKAGE / source.name).symlink_to(source)
    (PACKAGE / "kernels").symlink_to(ROOT / "kernels")


def build(stage: StageRun) -> None:
    """Links a library into the package: the one that was given, or one built for this GPU."""
    import dev

    if rehearsing():  # the tests' shim compiles the same sources for the CPU
        return stage.record(stage.details, "library", "left out")
    link = PACKAGE / "_C.abi3.so"
    given = os.environ.get(LIBRARY)
    if given and not stage.dry:
        link.symlink_to(given)
        ask = "from heteroakd_fast import backends; print(backends.available()['cuda'])"
        reason = last_line(stage.python("-c", ask).output)
        if reason == "None":
            return stage.record(stage.details, "library", "given")
        link.unlink()
        stage.conclude("passed", f"--library: {reason}")
    about = stage.report.found("environment").get("environment", {})
    settings = {
        "TORCH_CUDA_ARCH_LIST": about.get("capability", "9.0").replace("9.0", "9.0a"),
        "HETEROAKD_BUILD_CUDA": "1",
        # The kernels of the CPU are slow to compile, and not what is measured.
        "CXXFLAGS": "-O0",
    }
    settings |= {name: os.environ[name] for name in settings if os.environ.get(name)}
    state = dev.fingerprint(f"{about.get('torch')} {settings}")
    built, stamp = BUILD / "lib" / "heteroakd_fast" / link.name, BUILD / "built"
    if not stage.dry and built.exists() and stamp.exists() and stamp.read_text() == state:
        stage.record(stage.details, "library", "built by an earlier call")
    else:
        ran = stage.python(*WORKERS, "build", "--output", str(BUILD), environment=settings)
        if ran.code != 0:
            unfinished = "not built in time, another call goes on with it"
            reason = unfinished if ran.code is None else last_line(ran.output)
            return stage.conclude(ran.status, f"library: {reason}", ran.tail)
        stage.record(stage.details, "library", f"built in {ran.seconds:.0f} s")
    if not stage.dry:
        stamp.write_text(state)
        link.symlink_to(built)
    return None


def kernels(mode: str) -> Callable[[StageRun], None]:
    """Small calls of every kernel (`gpu_calls.py`), both backends at once."""

    def work(stage: StageRun) -> None:
        with ThreadPoolExecutor(len(BACKENDS)) as pool:
            list(pool.map(lambda name: stage.items(*WORKERS, "kernels", mode, name), BACKENDS))
        before = stage.report.found("smoke")
        for name, one in stage.details["items"].items():
            if one.get("bits") != before.get(name, one).get("bits") and "bits" in one:
                one["failed"] = "other bits than in another process"
                stage.conclude("failed")

    return work


def headline(stage: StageRun) -> None:
    seconds = f"{max(stage.limit - 5, 1):.0f}"
    stage.items(*WORKERS, "headline", "--seconds", seconds, silent=120)


def issue(stage: StageRun) -> None:
    """Counters of the headline's kernels, by ncu."""
    program = tool_for(stage, "ncu")
    if program is None:
        return
    command = [*program, "--csv", "--metrics", ",".join(METRICS)]
    command += ["--clock-control", "none"]  # the clocks are left as they are
    command += ["--kernel-name", "regex:cell_kernel|label_kernel|distillation_pass"]
    prefix = [] if rehearsing() else command
    ran = stage.items(*WORKERS, "issue", group="ran", prefix=prefix, silent=120)
    stage.details["launches"] = read_counters(ran.output)
    if "ERR_NVGPUCTRPERM" in ran.output:
        stage.status = "skipped"
        stage.conclude("skipped", "ncu may not read the counters here (ERR_NVGPUCTRPERM)")
    elif not (stage.details["launches"] or stage.dry or rehearsing()):
        stage.conclude("failed", f"no counters: {last_line(ran.output)}", ran.tail)


def tool_for(stage: StageRun, name: str) -> list[str] | None:
    """The program as the beginning of a command; None, and the stage is skipped, without it."""
    program = find_tool(name) or (name if stage.dry or rehearsing() else None)
    if program is None:
        stage.conclude("skipped", f"{name} is not installed")
        return None
    return [program]


def read_counters(output: str) -> list[Details]:
    """The launches in ncu's table."""
    launches: dict[str, Details] = {}
    for row in csv.DictReader(line for line in output.splitlines() if line.startswith('"')):
        if name := METRICS.get(row.get("Metric Name", "")):
            kernel = re.split(r"[<(]", row["Kernel Name"].removeprefix("void "))[0].split("::")[-1]
            launch = launches.setdefault(row["ID"], {"kernel": kernel})
            launch[name] = f"{row['Metric Value']} {row['Metric Unit']}"
    return list(launches.values())


def sanitizer(stage: StageRun) -> None:
    """compute-sanitizer's four tools, at the same time."""
    program = tool_for(stage, "compute-sanitizer")
    if program is None:
        return
    # Each tensor is an allocation that it can see.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def check(tool: str) -> None:
        prefix = [*program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
        if tool == "memcheck":
            # torch probes the driver with calls that are allowed to fail
            prefix += ["--report-api-errors", "no"]
        ran = stage.items(
            *(*WORKERS, "sanitized"),
            group=tool,
            prefix=[] if rehearsing() else prefix,
            silent=float("inf"),
            environment=environment,
        )
        reports = [
            line
            for line in ran.output.splitlines()
            if line.startswith("=====") and not re.search("COMPUTE-SANITIZER|SUMMARY", line)
        ]
        if reports:
            # the first ones say more than the last
            stage.record(stage.details, f"{tool} says", reports[:40])
            stage.conclude("failed", f"{tool} found something")

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        list(pool.map(check, SANITIZERS))


def tests(*selection: str) -> Callable[[StageRun], None]:
    """A run of pytest."""

    def work(stage: StageRun) -> None:
        if importlib.util.find_spec("pytest") is None:
            return stage.conclude("skipped", "pytest is not installed")
        arguments = ["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        arguments += [str(ROOT / x) if x.startswith("tests/") else x for x in selection]
        arguments += ["-v", "-p", "no:cacheprovider", "--maxfail=50"]
        if rehearsing():
            arguments.append("--collect-only")
        elif importlib.util.find_spec("xdist") is not None:
            # most of the time goes into compiling kernels, one process each
            arguments += ["-n", str(min(os.cpu_count() or 1, 12)), "--dist", "worksteal"]
        if importlib.util.find_spec("hypothesis") is None:
            # conftest.py imports it, and these tests do not need it: a bare machine runs them
            # without poisoned memory rather than not at all.
            arguments.append("--noconftest")
        outcome = Outcome(stage)
        ran = stage.python(*arguments, on_line=outcome.read)
        if rehearsing():
            stage.conclude(ran.status, last_line(ran.output))
        elif ran.code == 5 or (ran.code == 0 and not outcome.counts["passed"]):
            stage.conclude("skipped")
        else:
            stage.conclude(ran.status, output=ran.tail if ran.code else "")
        return None

    return work


class Outcome:
    """Counts of a run of pytest while it runs."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.counts: Counter[str] = Counter()
        self.failing: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()
        self.ending = False
        stage.details.update(counts=self.counts, failing=self.failing, skipped=self.skipped)

    def read(self, line: str) -> None:
        """Takes a line of `pytest -v`, with workers or without, or of its summary."""
        line = line.strip()
        self.ending = self.ending or "short test summary info" in line
        if self.ending:
            if found := re.match(r"(?:FAILED|ERROR) (\S+::.+?) - (.*)", line):
                self.failing[found[1]] = found[2][:300]
            elif found := re.match(r"SKIPPED \[(\d+)\] (?:\S+: )?(.*)", line):
                self.skipped[found[2][:300]] += int(found[1])
        elif "::" in line and (found := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)):
            failed = found[1] in ("FAILED", "ERROR")
            outcome = "failed" if failed else found[1].lower()
            if failed and (test := re.search(r"\S+::.+?(?= FAILED| ERROR|$)", line)):
                self.stage.record(self.failing, test[0], "")
            self.stage.record(self.counts, outcome, self.counts[outcome] + 1)


def suite(stage: StageRun) -> None:
    """The whole benchmark suite, in the time that is left."""
    where = ["--device", "cuda"]
    if rehearsing():
        where = ["--suite", "smoke", "--only", "C19 64x128", "--phases", "times", "--rounds", "3"]
    output = stage.report.path.parent
    if not stage.dry:  # an older run's must not pass for this one's
        (output / "results.json").unlink(missing_ok=True)
    # Some time is for the start of the process and its report; its own limit comes after that.
    seconds = f"{max(stage.limit - 20, 1):.0f}"
    ran = stage.python(
        *("-m", "benchmarks", "run", *where, "--seconds", seconds, "--output", str(output))
    )
    stage.conclude(ran.status, output=ran.tail if ran.code else "")


def order(stage: StageRun) -> None:
    """Which of two backends is faster, by kind of call: an entry for `backends/order.json`."""
    results = stage.report.path.parent / "results.json"
    if not stage.dry and not results.exists():
        return stage.conclude("skipped", "no benchmarks in this run")
    ran = stage.python("-m", "benchmarks.order", str(results))
    if ran.code == 1:
        return stage.conclude("skipped", "no case that two compiled backends did")
    if ran.code == 0 and not stage.dry:
        stage.details["order"] = json.loads(ran.output)
    return stage.conclude(ran.status, output=ran.tail if ran.code else "")


_ON_GPU: Final = ("tests/test_gpu.py", "-m", "gpu", "-k")
_SAMPLE: Final = "test_value_and_gradients and other-teacher and contiguous and float32"
_KERNELS: Final = (
    "tests/contract/test_values.py",
    "tests/kernels/test_cuda_kernels.py",
    "tests/kernels/test_triton_kernels.py",
    "tests/test_projection.py",
)

STAGES: Final = (
    Stage("smoke", 60, kernels("check")),
    Stage("headline", 90, headline),
    Stage("issue", 45, issue),
    Stage("correctness", 60, tests(*_ON_GPU, _SAMPLE)),
    Stage("determinism", 30, kernels("bits")),
    Stage("graphs", 30, kernels("graph")),
    Stage("sanitizer", 75, sanitizer),
    Stage("driver", 90, tests("tests/train/test_train_gpu.py")),
    Stage("tests", 300, tests(*_ON_GPU, f"not ({_SAMPLE})")),
    Stage("kernels", 120, tests(*_KERNELS)),
    Stage("benchmarks", float("inf"), suite),
    Stage("order", 20, order),
)


# --- the command -------------------------------------------------------------------------------


def summary(details: Details) -> str:
    """A stage's details in a few words."""
    parts = [f"library {details['library']}"] if "library" in details else []
    if "counts" in details:
        parts.append(", ".join(f"{n} {name}" for name, n in details["counts"].items()))
        parts += list(details["failing"])[:3]
    for group in ("items", *SANITIZERS):
        found = details.get(group, {})
        bad = {name: one["failed"] for name, one in found.items() if "failed" in one}
        done = sum("skipped" not in one for one in found.values()) - len(bad)
        parts += [f"{done} of {len(found)} {'' if group == 'items' else group}"] if found else []
        parts += [f"{name}: {reason}"[:200] for name, reason in list(bad.items())[:3]]
    for launch in details.get("launches", [])[:4]:
        parts.append(f"{launch['kernel']} {launch.get('issue_slots_percent')} of the issue slots")
    return "; ".join(x.strip() for x in [*parts, *details.get("reasons", [])] if x.strip())


def times_table(report: Report) -> str:
    """The headline: milliseconds of forward and backward, as the GPU needs them without the host's
    launches where a CUDA graph could be captured; MiB at the peak, above the inputs."""
    titles = ["eager", "compile", "whole", "cuda", "triton", "paper c", "paper t", "floor"]
    titles += ["MiB eager", "MiB cuda", "MiB trit"]
    if not report.found("headline"):
        return ""
    lines = [f"{'ms':11}" + "".join(f"{x:>10}" for x in titles)]
    for name, one in report.found("headline").items():
        names = ("eager", "compile", "compile-whole", *(f"heteroakd[{x}]" for x in BACKENDS))
        rows = [one.get("rows", {}).get(x, {}) for x in names]
        numbers = [row.get("graph_ms") or row.get("ms") for row in rows]
        numbers += [*(row.get("paper_ms") for row in rows[3:]), one.get("floor_ms")]
        numbers += [rows[i].get("peak_mib") for i in (0, 3, 4)]
        cells = ("-" if x is None else f"{x:.4g}" for x in numbers)
        lines.append(f"{name:11}" + "".join(f"{x:>10}" for x in cells))
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="default: %(default)s"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="in all; default: %(default)s")
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--library", type=Path, help="an extension that was built elsewhere")
    parser.add_argument("--dry-run", action="store_true", help="print every stage's commands")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every stage on the CPU, on a few tiny inputs"
    )
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    wanted = [name for name in options.only.split(",") if name]
    for name in wanted:
        if name not in names:
            parser.error(f"--only: got {name!r}, expected some of {', '.join(names)}")
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes: got {options.minutes}, expected a number > 0")
    if options.library is not None and not options.library.is_file():
        parser.error(f"--library: got {options.library}, expected a file")
    # Whatever is asked for is prepared, and has some of the time left for it.
    first = Stage("prepare", min(150.0, 36.0 * options.minutes), prepare)
    options.stages = [first, *(x for x in STAGES if not wanted or x.name in wanted)]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; 0 when none failed, 1 when one did, 2 without a GPU."""
    options = _parse(arguments)
    if options.rehearse:
        os.environ[REHEARSAL] = "1"
    if options.library:
        os.environ[LIBRARY] = str(options.library.resolve())
    report = Report(options.output.resolve() / "gpu.json", options.minutes, provenance.commit())
    if not options.dry_run:
        lay_out_package()
    path = (str(PACKAGE.parent), str(ROOT), os.environ.get("PYTHONPATH", ""))
    running: dict[str, Any] = {
        "dry": options.dry_run,
        "environment": {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        "cwd": BUILD,  # not the root: `python -m` would find the sources there before the package
    }
    first = StageRun("environment", 60.0, report, **running)
    about = describe_environment(first)
    if "failed" in about:
        print(about["failed"], file=sys.stderr)
        return 2
    first.publish()
    seconds = 60.0 * options.minutes - (first.limit - first.left)
    run_stages(options.stages, report, seconds, summary, **running)
    if options.dry_run:
        return 0
    print(f"\n{about['device']}, commit {report.commit}\n{times_table(report)}\n{report.path}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
