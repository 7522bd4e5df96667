"""The report on the CUDA C++ kernels: resources.md and resources.json."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..markdown import table
from . import cuda_cases
from .cuda import MAIN_ARCH, Instance, Result
from .cuda_launches import Launch, names_of
from .cuda_record import instance_json
from .kernel import Row
from .nvcc import ROOT
from .tables import (
    Described,
    by_arch,
    by_case,
    case_table,
    cost_json,
    floor_ms,
    kernel_table,
    lines,
    loop_table,
    rounded,
    spilled,
    step_tables,
)
from .times import cost_of, executions
from .units import BANDWIDTH, CLOCK, MULTIPROCESSORS, UNITS

_HEADER: Final = """# Resources of the CUDA kernels, and what they cost on paper

Written by `python -m benchmarks.resources --backend cuda`; no GPU was used, and **no number of a
kernel is a measurement**. Every file of `csrc/cuda` is compiled with nvcc {nvcc}; the machine code
is read.

- *Registers* of a thread; *stack* in bytes; *LDL / STL*: loads and stores of local memory (spills,
  and whatever else needs an address) in the whole code of a kernel; *inner*: those inside an
  innermost loop that is not marked as rare. Functions that are called and not inlined stand apart.
- *Instructions* are of a thread, per pixel and class, unless it says per pixel: a thread's loops
  serve all pixels that it holds in registers. A predicated instruction counts. Of a branch both
  arms count in the tables of loops; in cases, with their times, the arms that the case does not
  take are left out as far as lines tell them apart (`ARMS` in `benchmarks/resources/cuda_cases.py`:
  dtypes, staging by blocks or at once, terms that a kernel for any terms is not asked for), and a
  function that is called counts as part of its caller. All pixels are valid, and no logit is so
  large that its pixels would be handed over.
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
    used = {x.launch.kernel for x in main}
    loops = [x for x in held if x.held and x.name in used]
    parts = [
        _HEADER.format(
            nvcc=version,
            units=", ".join(f"{name} {unit.lanes:g}" for name, unit in UNITS.items()),
            multiprocessors=MULTIPROCESSORS,
            clock=CLOCK / 1e9,
            peak=BANDWIDTH["peak"] / 1e12,
            copies=BANDWIDTH["copies"] / 1e12,
        ),
        f"## Cases, forward + backward, sm_{MAIN_ARCH}\n\n" + case_table(main, known),
        "## CUDA against Triton on paper\n\nBounds of both, from this report and from [that on "
        "Triton](../triton/resources.md); where the ratio is above 1, CUDA loses. *Share*: the "
        "larger floor, by the bound. Triton's kernels are compiled for a call and have few arms "
        "that are not taken, but those count. **Not measured.**\n\n" + _against_triton(main, known),
        "## Where instructions go\n\nOf a case, per pixel and class. *Staging*: reading, "
        "interpolating where that is kept, maxima. *Statistics*: every loop over classes before "
        "the gradients. *Pixel*: outside the loops over classes, per step. *Thread*: once per "
        "thread and row of cells. *Sums*: the launches that are no pass.\n\n" + _parts_table(main),
        f"## Kernels, sm_{MAIN_ARCH}\n\n" + kernel_table(main),
        f"## Loops, sm_{MAIN_ARCH}\n\nOf the kernels that a case launches; all are in "
        "`resources.json`. Per pixel and class; *step* per pixel, loops over classes left out; of "
        "kernels without pixels: per element. A loop that the machine code has twice, for both "
        "models or two calls, is listed once.\n\n"
        + loop_table(loops, ("kernel",), lambda x: len(set(names_of(x))) > 1),
        "## What a step consists of\n\nInstructions per pixel outside the loops over classes, by "
        f"the function that the kernel calls; sm_{MAIN_ARCH}, the ten largest.\n\n"
        + step_tables(loops, ("kernel",)),
        "## All kernels\n\nRegisters, and LDL + STL (* inside an innermost loop; + barriers inside "
        "one; behind a comma those of functions that are called).\n\n" + _instance_table(result),
        "## Seconds to compile\n\nOf one architecture, on the machine that wrote this.\n\n"
        + _seconds_table(result),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _triton_bounds() -> dict[str, float]:
    """Case -> ms, of the newest Triton in its report."""
    file = ROOT / "docs" / "benchmarks" / "triton" / "resources.json"
    if not file.exists():
        return {}
    runs = json.loads(file.read_text())["runs"]
    newest = max(runs, key=lambda x: [int(y) for y in re.findall(r"\d+", x)])
    found: dict[str, float] = defaultdict(float)
    for row in runs[newest]:
        if "paper" in row and "(careful)" not in row["kernel"]:
            found[row["case"]] += row["paper"]["bound_us"] / 1e3
    return dict(found)


def _against_triton(rows: Sequence[Row[Launch]], known: Mapping[str, Described]) -> str:
    triton = _triton_bounds()
    cells = []
    for case, members in by_case(rows).items():
        costs = [cost_of(x.kernel, x.launch) for x in members]
        bound = sum(x.bound_us for x in costs) / 1e3
        heaviest = max(zip(costs, members, strict=True), key=lambda x: x[0].bound_us)
        floor = floor_ms(known[case], members)
        other = triton.get(case)
        cells.append(
            [
                case,
                f"`{heaviest[1].name.split('<')[0]}`",
                f"{bound:.3f}",
                f"{other:.3f}" if other else "",
                f"{bound / other:.2f}" if other else "",
                f"{floor:.3f}",
                f"{floor / bound:.0%}",
                f"{floor / other:.0%}" if other else "",
            ]
        )
    header = ["case", "by", "CUDA ms", "Triton ms", "CUDA / Triton", "floor ms"]
    return table([*header, "CUDA's share", "Triton's share"], cells)


#: Loop by its first words -> column of "where instructions go"
_PARTS: Final = {
    "staging": ("staging", "rows of last", "fetch", "maxima", "no pixels"),
    "statistics": ("statistics", "mixed", "js", "paper", "squares"),
    "gradients": ("gradients", "late"),
    "pixel": ("step", "blocks", "hand over"),
}


def _parts_table(rows: Sequence[Row[Launch]]) -> str:
    columns = [*_PARTS, "thread", "sums"]
    cells = []
    for case, members in by_case(rows).items():
        found = dict.fromkeys(columns, 0.0)
        elements = max(x.launch.elements or 0.0 for x in members)
        for row in members:
            threads = 32 * row.launch.programs * row.launch.warps / elements
            counts = [("", sum(row.kernel.outside.values()))]
            runs = executions(row.kernel, row.launch)
            pairs = zip(row.kernel.loops, runs, strict=True)
            counts += [(x.name, x.instructions * n) for x, n in pairs]
            for name, count in counts:
                part = next((k for k, v in _PARTS.items() if name.startswith(v)), "thread")
                a_pass = row.name.split("<")[0] in _PASSES
                found[part if a_pass else "sums"] += count * threads
        cells.append([case, *(f"{x:.2f}" for x in found.values()), f"{sum(found.values()):.2f}"])
    return table(["case", *columns, "all"], cells)


_PASSES: Final = ("cell_kernel", "segment_kernel", "label_kernel")


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
    result: Result,
    held: Sequence[Row[Launch]],
    launched: Sequence[Row[Launch]],
    version: str,
    digest: str,
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
        "digest": digest,
        "seconds_to_compile": dict(sorted(seconds.items())),
        "rows": {
            "kernels": [instance_json(instance, row) for row, instance in rows],
            "launches": [rounded(_launch_json(row)) for row in launched],
        },
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
        "left_out": {x: y for x, y in launch.without.items() if y},
        "paper": cost_json(row),
    }


def write_report(
    result: Result,
    held: Sequence[Row[Launch]],
    launched: Sequence[Row[Launch]],
    version: str,
    digest: str,
    directory: Path,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    content = as_json(result, held, launched, version, digest)
    (directory / "resources.json").write_text(lines(content, "rows"))
    (directory / "resources.md").write_text(as_markdown(result, held, launched, version))


def print_tables(held: Sequence[Row[Launch]], launched: Sequence[Row[Launch]]) -> None:
    print(kernel_table(launched), loop_table([x for x in held if x.main], ("kernel",)), sep="\n\n")
