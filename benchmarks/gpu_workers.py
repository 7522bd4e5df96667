"""What `benchmarks.gpu` runs in processes of its own: `python -m benchmarks.gpu_workers NAME ...`.

Each goes through a list of items and tells what it finds (`StageRun.items`), but for `build`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .cases import Case, case
from .gpu import BACKENDS, NO_GPU, ROOT, find_tool, rehearsing
from .stages import END

if TYPE_CHECKING:
    from .gpu_calls import Call
    from .providers import Provider

Found = dict[str, Any]
Item = tuple[str, Callable[[], Found]]
#: Calls of a rehearsal, and of the sanitizer: kernels that are interpreted, or checked, are slow.
FEW: Final = ("ce+hetero", "label grid", "every term", "projection")
SANITIZED: Final = (
    *("ce+hetero", "bfloat16", "40 classes", "masked class", "label grid", "label grid, bfloat16"),
    *("two grids", "mix = logits", "paper, space", "js", "every term", "float64", "projection"),
)


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


@cache
def device() -> str:
    """ "cuda"; "cpu" in a rehearsal, where the kernels' own sources run without a GPU."""
    if not rehearsing():
        return "cuda"
    sys.path.insert(0, str(ROOT / "tests"))
    import interpreter  # type: ignore[import-not-found]
    import shim_backend  # type: ignore[import-not-found]

    interpreter.set_up()
    shim_backend.set_up()
    return "cpu"


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # an error of a kernel belongs to the item that launched it


def go_through(items: list[Item], start: int) -> None:
    for index, (name, work) in enumerate(items):
        if index < start:
            continue
        say(name=name, begin=index)
        broken = False
        try:
            found = work()
            synchronise()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}".strip()[:600]}
            broken = "CUDA" in found["failed"]
        say(name=name, found=found)
        if broken:  # so may be the context: another process goes on
            raise SystemExit(1)
    say(name=END)


# --- lists of items ----------------------------------------------------------------------------


def environment() -> list[Item]:
    return [("environment", describe)]


def describe() -> Found:
    """The machine and what is installed."""
    import torch

    from . import provenance

    if not (torch.cuda.is_available() or rehearsing()):
        return {"failed": NO_GPU}
    found: Found = {
        "device": "CPU (a rehearsal)",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": output_of("nvcc", "--version").splitlines()[-1:],
        "packages": provenance.versions("triton", "numpy", "pytest", "hypothesis", "setuptools"),
        "sources": provenance.fingerprint(),
        "tools": [name for name in ("ncu", "compute-sanitizer") if find_tool(name)],
    }
    if device() == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        query = "driver_version,clocks.sm,clocks.max.sm,power.limit"
        found |= {
            "device": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "second_level_cache_mib": gpu.L2_cache_size >> 20,
            "driver": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        }
    # A device that is listed and cannot compute must fail here.
    assert float(torch.arange(10, device=device()).sum()) == 45.0
    return found


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def kernels(mode: str, backend: str, *names: str) -> list[Item]:
    where = device()
    from heteroakd_fast import backends

    from .gpu_calls import CALLS, MODES

    if reason := backends.available()[backend]:
        return [(backend, lambda: {"skipped": reason})]
    calls = {name: CALLS[name] for name in names or (CALLS if where == "cuda" else FEW)}
    if where == "cpu":
        calls = {name: smaller(call) for name, call in calls.items()}
    return [
        (f"{backend} {name}", partial(MODES[mode], call, backend, where))
        for name, call in calls.items()
        if backend in call.backends
    ]


def smaller(call: Call) -> Call:
    grid, teacher = (3, 4), call.teacher_grid and (4, 2)
    size = grid if call.size == call.grid else (10, 13)
    return replace(call, classes=3, grid=grid, teacher_grid=teacher, size=size)


def sanitized() -> list[Item]:
    names = SANITIZED if device() == "cuda" else FEW[:1]
    return [item for backend in BACKENDS for item in kernels("once", backend, *names)]


@cache
def cases() -> dict[str, Case]:
    """The headline, what tells most first; by the names that they have in `docs/benchmarks`."""
    if rehearsing():
        return {"s4": case("ce+hetero", "Cityscapes", 1, 4, size=(16, 32), classes=5)}
    return {
        "s4": case("ce+hetero", "Cityscapes", 8, 4),
        "stride1": case("ce+hetero", "Cityscapes", 8, 1),
        "c150": case("ce+hetero", "ADE20K", 8, 4),
        "bf16": case("ce+hetero", "Cityscapes", 8, 4, dtype="bfloat16"),
        "s8": case("ce+hetero", "Cityscapes", 8, 8),
        "ce": case("ce", "Cityscapes", 8, 4),
        "paper": case("ce+paper", "Cityscapes", 8, 4),
        "mix-logits": case("ce+hetero-logits", "Cityscapes", 8, 4),
        "teacher-s4": case("ce+hetero", "Cityscapes", 8, 8, teacher_stride=4),
        "align": case("ce+hetero", "Cityscapes 769", 8, 8, align_corners=True),
        "c171": case("ce+hetero", "COCO-Stuff", 8, 8),
        "t1.7": case("ce+hetero-T1.7", "Cityscapes", 8, 4),
    }


def providers() -> dict[str, Provider]:
    from .providers import find

    ours = [f"heteroakd[{backend}]" for backend in BACKENDS]
    compiled = ["compile", "compile-whole"] if device() == "cuda" else []
    return {name: find()[name] for name in ("eager", *compiled, *ours)}


def one_step(one: Case, provider: Provider) -> Found:
    """Forward and backward."""
    from .inputs import make_inputs

    if reason := provider.cannot(one, device()):
        return {"skipped": reason}
    began = time.monotonic()
    provider.build(one, make_inputs(one, device()))().backward()
    synchronise()
    return {"seconds": round(time.monotonic() - began, 1)}


def compile_share(share: str) -> list[Item]:
    """The i-th of n shares of what Triton and torch.compile compile for the other stages."""
    os.nice(10)  # nvcc, at the same time, has the longer way
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    # In a rehearsal the sources of the other backend are compiled for the CPU as well.
    items = [x for y in (BACKENDS if rehearsing() else BACKENDS[1:]) for x in kernels("once", y)]
    items += [
        (f"{key} {name}", partial(one_step, one, provider))
        for name, one in cases().items()
        for key, provider in providers().items()
        if key not in ("eager", "heteroakd[cuda]")
    ]
    i, n = map(int, share.split("/"))
    return items[i::n]


def headline(seconds: float) -> list[Item]:
    """Times of all providers, interleaved, beside the bounds; of as many cases as there is time
    for."""
    deadline = time.monotonic() + seconds
    device()
    return [(name, partial(measure, name, deadline)) for name in cases()]


def measure(name: str, deadline: float) -> Found:
    from . import floor, timing

    if time.monotonic() > deadline:
        return {"skipped": "no time was left"}
    one, known = cases()[name], providers()
    able = [key for key, provider in known.items() if provider.cannot(one, device()) is None]
    rows: Found = {}

    def keep(event: Found) -> None:
        rows.update({row["provider"]: summary_of(row) for row in event.get("rows", ())})

    timing.time_cases(
        timing.Job([one], {one.key: list(known)}, device(), visits=1, rounds=20), keep
    )
    for backend in BACKENDS:
        rows[f"heteroakd[{backend}]"]["paper_ms"] = paper_ms(name, backend)
    rates = floor.measure_rates(device())
    least, binds = floor.floor_ms(one, rates)
    found = {
        "case": one.key,
        "floor_ms": round(least, 4),
        "binds": binds,
        "copy_tb_per_s": round(rates.bytes_per_s / 1e12, 2),
        "rows": rows,
    }
    wrong = [f"{key}: {row['cannot']}" for key, row in rows.items()
             if key.startswith("heteroakd") and key in able and row["cannot"]]  # fmt: skip
    return {**found, "failed": "; ".join(wrong)} if wrong else found


def summary_of(row: Found) -> Found:
    """A row of `timing` without its samples."""
    from .results import spread, total_ms

    both, graph = spread(total_ms(row)), spread(row["graph_ms"])
    return {
        "ms": both and round(both.median, 4),
        "ms_10_90": both and [round(both.low, 4), round(both.high, 4)],
        "graph_ms": graph and round(graph.median, 4),
        "peak_mib": row["peak_bytes"] and round(row["peak_bytes"] / 2**20, 1),
        "loss_error": row["loss_error"],
        "grad_error": row["grad_error"],
        "cannot": row["cannot"] or row["graph_cannot"],
    }


#: Cases by the kernels of `benchmarks/kernels.json` that they spend their time in.
_KERNELS: Final = {
    "s4": ("cells: ce + hetero", "ce + hetero"),
    "bf16": ("cells: ce + hetero", "ce + hetero"),
    "s8": ("cells: ce + hetero", "ce + hetero (stride 8)"),
    "c150": ("cells: ce + hetero", "ce + hetero (150 classes)"),
    "ce": ("cells: ce", "ce"),
    "paper": ("segments: paper", "paper"),
    "mix-logits": ("segments: mixed logits", "mixed logits"),
}


def paper_ms(name: str, backend: str) -> float | None:
    """The time in which this GPU (or an H100) can issue the instructions of the kernel's loops over
    classes, of all pixels: a lower bound that leaves out what is done once per pixel."""
    if name not in _KERNELS:
        return None
    index, prefix = (0, "CUDA") if backend == "cuda" else (1, "Triton")
    table = json.loads((ROOT / "benchmarks" / "kernels.json").read_text())
    counted: float = table[f"{prefix} {_KERNELS[name][index]}"]["instructions"]
    one = cases()[name]
    elements = one.batch * one.classes * one.height * one.width
    return float(f"{1e3 * counted * elements / issued_per_second():.3g}")


def issued_per_second() -> float:
    """Instructions of a thread, by all multiprocessors: four warps a clock each."""
    import torch

    multiprocessors, hertz = 132, 1.755e9
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        multiprocessors = found.multi_processor_count
        hertz = getattr(found, "clock_rate", 0) * 1e3 or hertz
    return 128.0 * multiprocessors * hertz


def issue() -> list[Item]:
    """The headline's kernels once each, for ncu."""
    return [
        (f"{key} {name}", partial(one_step, one, provider))
        for name, one in cases().items()
        if name in ("s4", "stride1")
        for key, provider in providers().items()
        if key.startswith("heteroakd")
    ]


# --- building ----------------------------------------------------------------------------------


def build(output: Path) -> None:
    """The extension, by the rules of setup.py, into `output`/lib."""
    setup: Any = importlib.import_module("setup")  # it lies in the root, and has no types
    setuptools: Any = importlib.import_module("setuptools")
    if reason := setup.what_is_missing():
        raise SystemExit(reason)
    library = setuptools.Extension("heteroakd_fast._C", sources=[], py_limited_api=True)
    command = setup.NinjaBuild(setuptools.Distribution({"ext_modules": [library]}))
    command.build_lib, command.build_temp = str(output / "lib"), str(output / "objects")
    command.ensure_finalized()
    command.run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_workers")
    parser.add_argument("worker")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.worker == "build":
        return build(options.output)
    items: dict[str, Callable[[], list[Item]]] = {
        "environment": environment,
        "kernels": lambda: kernels(*options.arguments),
        "sanitized": sanitized,
        "compile": lambda: compile_share(options.share),
        "headline": lambda: headline(options.seconds),
        "issue": issue,
    }
    return go_through(items[options.worker](), options.start)


if __name__ == "__main__":
    main()
