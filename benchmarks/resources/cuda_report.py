"""The report on the CUDA C++ kernels: resources.md and resources.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from . import cuda_cases
from .cuda import MAIN_ARCH, Instance, Result
from .cuda_launches import Launch
from .kernel import Row
from .tables import (
    Described,
    by_arch,
    case_table,
    cost_json,
    kernel_table,
    lines,
    loop_json,
    loop_table,
    rounded,
    spilled,
    step_tables,
    table,
)
from .units import BANDWIDTH, CLOCK, MULTIPROCESSORS, UNITS

_HEADER: Final = """# Resources of the CUDA kernels, and what they cost on paper

Written by `python -m benchmarks.resources --backend cuda`; no GPU was used, and **no number here is
a measurement**. Every file of `csrc/cuda` is compiled with nvcc {nvcc}; the machine code is read.

- *Registers* of a thread; *stack* in bytes; *LDL / STL*: loads and stores of local memory (spills,
  and whatever else needs an address) in the whole code of a kernel; *inner*: those inside an
  innermost loop that is not marked as rare. Functions that are called and not inlined are for rare
  cases and stand apart.
- *Instructions* are of a thread, per pixel and class, unless it says per pixel: a thread's loops
  serve all pixels that it holds in registers. A predicated instruction counts; so does a branch
  that may not be taken, except loops that the case says do not run.
- *Time* is what the busiest unit needs at its full rate, if nothing ever waited for anything:
  {units} lanes per clock and multiprocessor, {multiprocessors} multiprocessors at an assumed
  {clock:.3f} GHz (H100 SXM), the busiest multiprocessor's share counted; *memory*: every tensor of
  the launch moved once at {peak:.2f} TB/s (copies have been seen to reach about {copies:.1f}). A
  kernel's bound is the larger of the two. ">": the repetitions of some loop are not counted.
- *Warps* of a multiprocessor: how many fit (registers, shared memory), and how many the launch has.
- *Floor*, whatever the code: the method's own exponentials and logarithms once per pixel and class
  (16 per clock and multiprocessor), and its bytes.
"""


def _describe(case: str) -> Described:
    known = cuda_cases.CASES[case]
    return Described(known.what, known.special, known.bytes)


def as_markdown(
    result: Result, held: Sequence[Row[Launch]], launched: Sequence[Row[Launch]], version: str
) -> str:
    main = [x for x in launched if not x.launch.careful]
    known = {x.case: _describe(x.case) for x in main}
    loops = [x for x in held if x.held]
    parts = [
        _HEADER.format(
            nvcc=version,
            units=", ".join(f"{name} {unit.lanes:g}" for name, unit in UNITS.items()),
            multiprocessors=MULTIPROCESSORS,
            clock=CLOCK / 1e9,
            peak=BANDWIDTH["peak"] / 1e12,
            copies=BANDWIDTH["copies"] / 1e12,
        ),
        f"## Cases, sm_{MAIN_ARCH}\n\n" + case_table(main, known),
        f"## Kernels, sm_{MAIN_ARCH}\n\n" + kernel_table(main),
        f"## Loops, sm_{MAIN_ARCH}\n\nOf every kernel. Per pixel and class; *step* per pixel, "
        "loops over classes left out; of kernels without pixels: per element.\n\n"
        + loop_table(loops, ("kernel",)),
        "## What a step consists of\n\nInstructions per pixel outside the loops over classes, by "
        f"the function that the kernel calls; sm_{MAIN_ARCH}, the ten largest.\n\n"
        + step_tables(loops, ("kernel",)),
        "## All kernels\n\nRegisters, and LDL + STL (* inside an innermost loop; + barriers inside "
        "one; behind a comma those of functions that are called).\n\n" + _instance_table(result),
        "## Seconds to compile\n\nOf one architecture, on the machine that wrote this.\n\n"
        + _seconds_table(result),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _instance_table(result: Result) -> str:
    archs = sorted({x.arch for x in result.instances}, key=by_arch)
    known: dict[tuple[str, str], dict[str, Instance]] = defaultdict(dict)
    for instance in result.instances:
        known[instance.file, instance.name][instance.arch] = instance
    cells = [
        [file, name, *(_spilled(by[a]) if a in by else "" for a in archs)]
        for (file, name), by in sorted(known.items())
    ]
    return table(["file", "kernel", *(f"sm_{a}" for a in archs)], cells)


def _spilled(instance: Instance) -> str:
    called = instance.kernel.called_spills
    return spilled(instance.kernel) + (f", {called}" if called else "")


def _seconds_table(result: Result) -> str:
    archs = sorted({x.arch for x in result.compiled}, key=by_arch)
    known: dict[str, dict[str, float]] = defaultdict(dict)
    for made in result.compiled:
        known[made.source.name][made.arch] = made.seconds
    cells = [
        [file, *(f"{by[a]:.1f}" if a in by else "" for a in archs)]
        for file, by in sorted(known.items())
    ]
    return table(["file", *(f"sm_{a}" for a in archs)], cells)


def as_json(
    result: Result, held: Sequence[Row[Launch]], launched: Sequence[Row[Launch]], version: str
) -> dict[str, Any]:
    seconds: dict[str, dict[str, float]] = defaultdict(dict)
    for made in result.compiled:
        seconds[made.source.name][f"sm_{made.arch}"] = made.seconds
    rows = zip(held, result.instances, strict=True)
    return {
        "measured": False,
        "assumed": {
            "multiprocessors": MULTIPROCESSORS,
            "clock_hz": CLOCK,
            "bytes_per_s": BANDWIDTH,
        },
        "nvcc": version,
        "seconds_to_compile": dict(sorted(seconds.items())),
        "rows": {
            "kernels": [rounded(_instance_json(row, instance)) for row, instance in rows],
            "launches": [rounded(_launch_json(row)) for row in launched],
        },
    }


def _instance_json(row: Row[Launch], instance: Instance) -> dict[str, Any]:
    kernel = row.kernel
    return {
        "kernel": row.name,
        "file": instance.file,
        "arch": row.arch,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack,
        "spill_loads": kernel.spill_loads,
        "spill_stores": kernel.spill_stores,
        "spills_in_innermost_loops": kernel.inner_spills,
        "spills_in_called_functions": kernel.called_spills,
        "spilled_bytes_by_ptxas": {
            "loads": instance.usage.spill_loads,
            "stores": instance.usage.spill_stores,
        },
        "barriers_in_innermost_loops": kernel.inner_barriers,
        "shared_bytes": kernel.shared,
        "code_bytes": kernel.code_bytes,
        "called_code_bytes": kernel.called_code_bytes,
        "pixels_per_thread": row.launch.pixels_per_thread,
        "loops": [loop_json(row, loop) for loop in kernel.loops] if row.main else [],
    }


def _launch_json(row: Row[Launch]) -> dict[str, Any]:
    launch = row.launch
    return {
        "case": row.case,
        "kernel": row.name,
        "arch": row.arch,
        "same_as": row.same_as,
        "grid": launch.grid,
        "threads": launch.threads,
        "shared_bytes": row.kernel.shared,
        "runs_of_loops": dict(launch.loops),
        "paper": cost_json(row),
    }


def write_report(
    result: Result,
    held: Sequence[Row[Launch]],
    launched: Sequence[Row[Launch]],
    version: str,
    directory: Path,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    content = as_json(result, held, launched, version)
    (directory / "resources.json").write_text(lines(content, "rows"))
    (directory / "resources.md").write_text(as_markdown(result, held, launched, version))


def print_tables(held: Sequence[Row[Launch]], launched: Sequence[Row[Launch]]) -> None:
    print(kernel_table(launched), loop_table([x for x in held if x.main], ("kernel",)), sep="\n\n")
