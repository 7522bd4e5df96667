"""`python3 dev.py gpu`: everything that only a GPU can tell, in one command and without a network.

    python3 dev.py gpu [--minutes 6] [--output runs/gpu] [--only STAGE,...] [--library FILE]
                       [--dry-run]

It takes torch, Triton and nvcc as the calling interpreter sees them. The extension is built for
this GPU into `build/gpu`, or taken from `--library`; a second call builds nothing. Stages run in
the order of their value, each in processes of its own under a time limit: a kernel that hangs or
breaks its CUDA context ends its process, and what comes after it goes on. `gpu.json` is rewritten
as results arrive.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from . import provenance
from .cases import SUITES
from .stages import Details, Report, Stage, StageRun, event_of, last_line, run_stages

__all__ = ["NO_GPU", "STAGES", "main"]

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / "build" / "gpu"
PACKAGE: Final = BUILD / "package" / "heteroakd_fast"
NO_GPU: Final = (
    "dev.py gpu: torch sees no CUDA device; run this on a machine with an NVIDIA GPU and a CUDA "
    "build of torch."
)
WORKERS: Final = ("-m", "benchmarks.gpu_workers")
TESTS: Final = ("-m", "benchmarks.gpu_tests")
BACKENDS: Final = ("cuda", "triton")
HEADLINE: Final = ("eager", "compile", "compile-whole", *(f"heteroakd[{x}]" for x in BACKENDS))
SANITIZERS: Final = ("memcheck", "racecheck", "initcheck", "synccheck")
_ON_GPU: Final = "tests/test_gpu.py"
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


def find_tool(name: str) -> str | None:
    """In the CUDA toolkit that CUDA_HOME names, or on the PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin" for home in homes if home]
    return shutil.which(name, path=os.pathsep.join(places)) or shutil.which(name)


# --- stages ------------------------------------------------------------------------------------


def prepare(stage: StageRun, library: Path | None = None) -> None:
    """Build the extension while Triton and torch.compile compile, into their caches, what the
    stages after this one will run."""
    workers = 1 if stage.dry else max(1, min(8, (os.cpu_count() or 2) // 2))
    shares = [f"{i}/{workers}" for i in range(workers)]
    with ThreadPoolExecutor(workers + 1) as pool:
        built = pool.submit(build, stage, library)
        list(pool.map(lambda x: stage.items(*WORKERS, "compile", x, silent=240), shares))
        built.result()


def lay_out_package() -> None:
    """The package as it is installed, in links: with the kernels, and soon the library, in it."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for source in (ROOT / "heteroakd_fast").iterdir():
        if source.name not in ("kernels", "__pycache__") and not source.name.startswith("_C."):
            (PACKAGE / source.name).symlink_to(source)
    (PACKAGE / "kernels").symlink_to(ROOT / "kernels")


def build(stage: StageRun, given: Path | None = None) -> None:
    """Link a library into the package: the one that was given, or one built for this GPU."""
    import dev

    link = PACKAGE / "_C.abi3.so"
    if given and not stage.dry:
        link.symlink_to(given.resolve())
        return stage.record(stage.details, "library", "given")
    about = stage.report.items("environment").get("environment", {})
    settings = {
        "TORCH_CUDA_ARCH_LIST": about.get("capability", "9.0").replace("9.0", "9.0a"),
        "HETEROAKD_BUILD_CUDA": "1",
        "HETEROAKD_BUILD_EXTENSION": "1",
        # The kernels of the CPU are slow to compile, and not what is measured.
        "CXXFLAGS": "-O0",
    }
    settings |= {name: os.environ[name] for name in settings if os.environ.get(name)}
    state = dev.fingerprint(f"{about.get('torch')} {settings}")
    built, stamp = BUILD / "lib" / "heteroakd_fast" / link.name, BUILD / "built"
    if not stage.dry and built.exists() and stamp.exists() and stamp.read_text() == state:
        stage.record(stage.details, "library", "built by an earlier call")
    else:
        places = ("--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "objects"))
        ran = stage.python("setup.py", "build_ext", *places, cwd=ROOT, environment=settings)
        if ran.code != 0:
            unfinished = "not built in time, another call goes on with it"
            reason = unfinished if ran.code is None else last_line(ran.output)
            return stage.conclude(ran.status, f"library: {reason}", ran.tail)
        stage.record(stage.details, "library", f"built in {ran.seconds:.0f} s")
    if not stage.dry:
        stamp.write_text(state)
        link.symlink_to(built)
    return None


def suite(name: str, groups: Sequence[str], stage: StageRun, *options: str) -> None:
    """Groups of the benchmark suite, in the time of the stage, into a folder of this name."""
    output = stage.report.path.parent / name
    if not stage.dry:  # an older run's must not pass for this one's
        shutil.rmtree(output, ignore_errors=True)
    # Some time is for the start of the process and its report; its own limit comes after that.
    limits = ("--seconds", f"{max(stage.limit - 20, 1):.0f}", "--output", str(output))
    command = ("-m", "benchmarks", "run", "--device", "cuda", *limits, "--only", *groups, *options)
    ran = stage.python(*command)
    stage.conclude(ran.status, output=ran.tail)  # it ends with the headline's times
    if (found := output / "results.csv").exists():
        with found.open(newline="") as file:
            stage.details["rows"] = list(csv.DictReader(file))


def headline(stage: StageRun) -> None:
    """The main cases, by those who matter."""
    options = ("--phases", "times", "--visits", "1", "--providers", *HEADLINE)
    suite("headline", ["headline"], stage, *options)


def issue(stage: StageRun) -> None:
    """Counters of the headline's kernels, by ncu."""
    program = tool_for(stage, "ncu")
    if program is None:
        return
    command = [program, "--csv", "--metrics", ",".join(METRICS)]
    command += ["--clock-control", "none"]  # the clocks are left as they are
    command += ["--kernel-name", "regex:cell_kernel|label_kernel|distillation_pass"]
    ran = stage.items(*WORKERS, "counted", group="ran", prefix=command, silent=120)
    stage.details["launches"] = read_counters(ran.output)
    if "ERR_NVGPUCTRPERM" in ran.output:
        stage.status = "skipped"
        stage.conclude("skipped", "ncu may not read the counters here (ERR_NVGPUCTRPERM)")
    elif not (stage.details["launches"] or stage.dry):
        stage.conclude("failed", f"no counters: {last_line(ran.output)}", ran.tail)


def tool_for(stage: StageRun, name: str) -> str | None:
    """Where the program is; None, and the stage is skipped, without it."""
    program = find_tool(name) or (name if stage.dry else None)
    if program is None:
        stage.conclude("skipped", f"{name} is not installed")
    return program


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

    def check(tool: str) -> None:
        prefix = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
        if tool == "memcheck":
            # torch probes the driver with calls that are allowed to fail
            prefix += ["--report-api-errors", "no"]
        # Each tensor is an allocation that it can see.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        # conftest.py would fill the memory that initcheck is to see
        selection = (_ON_GPU, "-k", "test_under_a_sanitizer", "--noconftest")
        worker, silent = (*TESTS, "0/1", *pytest_arguments(selection)), float("inf")
        ran = stage.items(
            *worker, group=tool, prefix=prefix, silent=silent, environment=environment
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


def pytest_arguments(selection: Sequence[str]) -> list[str]:
    """Arguments of pytest, which runs elsewhere."""
    found = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    return found + [str(ROOT / x) if x.startswith("tests/") else x for x in selection]


def run_tests(*selection: str, silent: float = 120.0) -> Callable[[StageRun], None]:
    """Tests as items (`gpu_tests.py`), in several processes: most of their time goes into compiling
    kernels."""

    def work(stage: StageRun) -> None:
        if importlib.util.find_spec("pytest") is None:
            return stage.conclude("skipped", "pytest is not installed")
        arguments = pytest_arguments(selection)
        if importlib.util.find_spec("hypothesis") is None:
            # conftest.py imports it, and these tests do not need it: a bare machine runs them
            # without poisoned memory rather than not at all.
            arguments.append("--noconftest")
        number = 1 if stage.dry else min(os.cpu_count() or 1, 12)
        shares = [f"{i}/{number}" for i in range(number)]
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(lambda x: stage.items(*TESTS, x, *arguments, silent=silent), shares))
        return None

    return work


_CALLS: Final = "test_value_gradients_and_bits"
_GRAPHS: Final = "test_graph_replays"
_KERNELS: Final = (
    "tests/contract/test_values.py",
    "tests/kernels/test_cuda_kernels.py",
    "tests/kernels/test_triton_kernels.py",
    "tests/test_projection.py",
)
_OTHERS: Final = [group for group in SUITES["gpu"] if group != "headline"]

STAGES: Final = (
    Stage("prepare", 150, prepare),
    Stage("smoke", 75, run_tests(_ON_GPU, "-k", _CALLS)),
    Stage("headline", 110, headline),
    Stage("issue", 45, issue),
    Stage("graphs", 45, run_tests(_ON_GPU, "-k", _GRAPHS)),
    Stage("sanitizer", 75, sanitizer),
    Stage("driver", 90, run_tests("tests/train/test_train_gpu.py")),
    Stage("tests", 300, run_tests(_ON_GPU, "-m", "gpu", "-k", f"not {_CALLS} and not {_GRAPHS}")),
    Stage("kernels", 120, run_tests(*_KERNELS)),
    Stage("benchmarks", float("inf"), partial(suite, "benchmarks", _OTHERS)),
)


# --- the command -------------------------------------------------------------------------------


def summary(details: Details) -> str:
    """A stage's details in a few words."""
    parts = [f"library {details['library']}"] if "library" in details else []
    for group in ("items", *SANITIZERS):
        found = details.get(group, {})
        bad = {name: one["failed"] for name, one in found.items() if "failed" in one}
        done = sum("skipped" not in one for one in found.values()) - len(bad)
        parts += [f"{done} of {len(found)} {'' if group == 'items' else group}"] if found else []
        parts += [f"{name}: {reason}"[:200] for name, reason in list(bad.items())[:3]]
    for launch in details.get("launches", [])[:4]:
        parts.append(f"{launch['kernel']} {launch.get('issue_slots_percent')} of the issue slots")
    return "; ".join(x.strip() for x in [*parts, *details.get("reasons", [])] if x.strip())


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
    limit = min(STAGES[0].limit, 36.0 * options.minutes)
    first = Stage("prepare", limit, partial(prepare, library=options.library))
    options.stages = [first, *(x for x in STAGES[1:] if not wanted or x.name in wanted)]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when none failed, 1 when one did, 2 without a GPU."""
    options = _parse(arguments)
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
    ran = first.python(*WORKERS, "environment")
    told = [event["found"] for x in ran.output.splitlines() if "found" in (event := event_of(x))]
    about = told[0] if told else {} if first.dry else {"failed": ran.tail}
    if "failed" in about:  # before anything is written: a file of an earlier run may be there
        print(about["failed"], file=sys.stderr)
        return 2
    first.details["items"] = {"environment": about}
    first.conclude("passed")
    first.publish()
    seconds = 60.0 * options.minutes - (first.limit - first.left)
    run_stages(options.stages, report, seconds, summary, **running)
    if options.dry_run:
        return 0
    print(f"\n{about['machine']}, commit {report.commit}\n{report.path}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
