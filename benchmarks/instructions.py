"""Instructions executed by forward + backward, counted by valgrind: the same on a busy machine.

One child process under callgrind measures a whole list of jobs: importing torch in there takes
longer than most of them. Instrumentation is off until the measured call, which makes the import
several times faster than `torch.utils.benchmark.Timer.collect_callgrind`, whose process is
instrumented from its start and measures one job.

Valgrind knows no AVX-512: a kernel is counted as it runs on AVX2.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from heteroakd_fast import info

from .cases import Case
from .inputs import make_inputs
from .providers import find

__all__ = ["Counts", "Job", "count", "missing"]

#: A case and the name of the provider that computes it.
Job = tuple[Case, str]

# Client requests are instruction sequences that only C macros can spell.
_MARKS = """
#include <callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* job) { CALLGRIND_DUMP_STATS_AT(job); CALLGRIND_STOP_INSTRUMENTATION; }
"""
_LABEL = re.compile(r"^desc: Trigger: Client Request: job (\d+)$", re.MULTILINE)
_TOTAL = re.compile(r"^totals: (\d+)", re.MULTILINE)
_ROOT = Path(__file__).resolve().parent.parent


class Counts(NamedTuple):
    per_pixel_class: list[float]
    """In the order of the jobs."""
    taken_with: dict[str, str]
    """What the numbers depend on besides the code: compiler, torch and their like."""


def missing() -> str | None:
    """Why nothing can be counted here; None when it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if _compiler() is None:
        return "no C compiler for valgrind's client requests"
    return None


def count(jobs: Sequence[Job], timeout: float = 600.0) -> Counts:
    """Single-threaded instructions per pixel and class of one warm forward + backward each."""
    if reason := missing():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory(prefix="instructions") as name:
        folder = Path(name)
        order = json.dumps([[case.fields(), provider] for case, provider in jobs])
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder / 'dump'}", sys.executable]
        command += ["-m", "benchmarks.instructions", order, str(_build_marks(folder))]
        # Hash order and threads would change the counts from run to run.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        child = subprocess.run(
            command, cwd=_ROOT, env=environment, timeout=timeout, capture_output=True, text=True
        )
        if child.returncode:
            raise RuntimeError(f"counting instructions failed:\n{child.stderr[-3000:]}")
        totals = _read_dumps(folder.glob("dump.*"))
    if len(totals) != len(jobs):
        raise RuntimeError(f"valgrind counted {len(totals)} of {len(jobs)} jobs")
    counts = [totals[i] / jobs[i][0].pixel_classes for i in range(len(jobs))]
    return Counts(counts, json.loads(child.stdout.splitlines()[-1]))


def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _build_marks(folder: Path) -> Path:
    from torch.utils.benchmark.utils import valgrind_wrapper

    source, library = folder / "marks.c", folder / "marks.so"
    source.write_text(_MARKS)
    # torch brings valgrind's headers along; distributions may leave them out.
    headers = Path(next(iter(valgrind_wrapper.__path__)))
    subprocess.run(
        [str(_compiler()), "-O1", "-shared", "-fPIC", f"-I{headers}", source, "-o", library],
        check=True,
    )
    return library


def _read_dumps(paths: Iterable[Path]) -> dict[int, int]:
    totals = {}
    for path in paths:
        text = path.read_text()
        label, total = _LABEL.search(text), _TOTAL.search(text)
        if label and total:
            totals[int(label[1])] = int(total[1])
    return totals


def _tools() -> dict[str, str]:
    build = info.collect()["extension_build"]
    return {
        "compiler": build.get("compiler", "none"),
        "torch": torch.__version__.split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        # Chooses among libm's exponentials.
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _child(order: str, marks_path: str) -> None:
    """Runs the jobs; under valgrind, each leaves a dump. Prints the tools at last."""
    torch.set_num_threads(1)
    marks = ctypes.CDLL(marks_path)
    providers = find()
    for i, (fields, provider) in enumerate(json.loads(order)):
        case = Case(**fields)
        inputs = make_inputs(case)
        forward = providers[provider].build(case, inputs)
        for _ in range(2):
            forward().backward()  # type: ignore[no-untyped-call]
        name = f"job {i}".encode()
        gc.collect()
        gc.disable()  # a collection inside the call would be counted
        marks.begin()
        forward().backward()  # type: ignore[no-untyped-call]
        marks.end(name)
        gc.enable()
    print(json.dumps(_tools()))


if __name__ == "__main__":
    _child(*sys.argv[1:])
