"""The report on the Triton kernels: resources.md and resources.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..markdown import table
from .cases import CASES, PAPER_FLOOR, USUAL_FLOOR
from .kernel import Row
from .launches import Launch, launches_of, method_bytes
from .tables import (
    Described,
    arch_table,
    case_table,
    cost_json,
    kernel_table,
    lines,
    loop_json,
    loop_table,
    rounded,
    spilled,
    step_tables,
)
from .units import BANDWIDTH, CLOCK, MULTIPROCESSORS, UNITS


def as_json(rows: Sequence[Row[Launch]]) -> list[dict[str, Any]]:
    result = []
    for row in rows:
        kernel = row.kernel
        entry: dict[str, Any] = {
            "case": row.case,
            "kernel": row.name,
            "arch": int(row.arch),
            "same_as": row.same_as,
            "registers": kernel.registers,
            "stack_bytes": kernel.stack,
            "spill_loads": kernel.spill_loads,
            "spill_stores": kernel.spill_stores,
            "spills_in_innermost_loops": kernel.inner_spills,
            "barriers_in_innermost_loops": kernel.inner_barriers,
            "shared_bytes": kernel.shared,
            "code_bytes": kernel.code_bytes,
            "tiles": {k: v for k, v in row.launch.values().items() if k in _TILES},
            "grid": list(row.launch.grid),
            "loops": [loop_json(row, loop) for loop in kernel.loops],
        }
        if row.held:
            entry["paper"] = cost_json(row)
        result.append(rounded(entry))
    return result


_TILES: Final = ("R", "S", "SUB_R", "SUB_C", "TI", "N", "BLOCK", "BLOCK_C", "num_warps")


_HEADER = """# Resources of the Triton kernels, and what they cost on paper

Written by `python -m benchmarks.resources`; no GPU was used, and **no number here is a
measurement**. Kernels are compiled for each case's real launch arguments with Triton {triton}, and
the machine code is read.

- *Registers* of a thread; *stack* in bytes; *spills*: loads and stores of local memory (LDL / STL)
  in the whole code; those inside an innermost loop stand apart: `*` marks the kernels
  that have some, each of them listed by name in the ceilings.
- *Instructions* are of a thread, per pixel and class, unless it says per pixel. A predicated
  instruction counts; so does a branch that may not be taken.
- *Time* is what the busiest unit needs at its full rate, if nothing ever waited for anything:
  {units} lanes per clock and multiprocessor, {multiprocessors} multiprocessors at an assumed
  {clock:.3f} GHz (H100 SXM), halo lanes, ragged edges and the busiest multiprocessor's share
  counted; *memory*: every tensor of the launch moved once at {peak:.2f} TB/s (copies have been seen
  to reach about {copies:.1f}). A kernel's bound is the larger of the two. Launches and tensor cores
  are not counted; ">": nor are the repetitions of a loop of unknown length.
- *Warps* of a multiprocessor: how many fit (registers, shared memory), and how many the launch has.
- *Paper floor*, whatever the code: the method's own exponentials and logarithms once per pixel and
  class (16 per clock and multiprocessor), and its bytes: logits and labels read once, the gradient
  written once.
"""


def as_markdown(
    rows: Sequence[Row[Launch]], triton_version: str, others: Mapping[str, list[dict[str, Any]]]
) -> str:
    main = [x for x in rows if x.held]
    known = {x.case: _describe(x.case) for x in main}
    units = ", ".join(f"{name} {unit.lanes:g}" for name, unit in UNITS.items())
    parts = [
        _HEADER.format(
            triton=triton_version,
            units=units,
            multiprocessors=MULTIPROCESSORS,
            clock=CLOCK / 1e9,
            peak=BANDWIDTH["peak"] / 1e12,
            copies=BANDWIDTH["copies"] / 1e12,
        ),
        "## Cases, forward + backward, sm_90\n\n" + case_table(main, known),
        "## Kernels, sm_90\n\n" + kernel_table(main),
        "## Loops, sm_90\n\nPer pixel and class; *step* per pixel, loops over classes left out; of "
        "`combine_gradients`, `reduce` and `finish_sums`: per element and iteration.\n\n"
        + loop_table(main),
        "## What a step consists of\n\nInstructions per pixel outside the loops over classes, by "
        "the function that the kernel calls; sm_90, the ten largest.\n\n" + step_tables(main),
        "## Other architectures, and careful twins\n\nRegisters, and spills (LDL + STL; * inside "
        "an innermost loop); +: barriers inside one.\n\n" + arch_table(rows),
    ]
    if others:
        parts.append("## Other versions of Triton\n\nThe same.\n\n" + _version_table(rows, others))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _describe(case: str) -> Described:
    special = PAPER_FLOOR.get(case, USUAL_FLOOR)
    return Described(CASES[case][0], special, method_bytes(launches_of(case)))


def _version_table(rows: Sequence[Row[Launch]], others: Mapping[str, list[dict[str, Any]]]) -> str:
    versions = sorted(others)
    known = {
        version: {(x["case"], x["kernel"], x["arch"]): x for x in table}
        for version, table in others.items()
    }
    cells = []
    for row in rows:
        if row.same_as:
            continue
        line = [row.case, row.name, f"sm_{row.arch}", spilled(row.kernel)]
        for version in versions:
            other = known[version].get((row.case, row.name, int(row.arch)))
            line.append(_other_spilled(other) if other else "")
        if any(line[4:]):
            cells.append(line)
    return table(["case", "kernel", "arch", "this", *versions], cells)


def _other_spilled(entry: Mapping[str, Any]) -> str:
    mark = "*" if entry["spills_in_innermost_loops"] else ""
    mark += " +" if entry.get("barriers_in_innermost_loops") else ""
    return f"{entry['registers']}, {entry['spill_loads'] + entry['spill_stores']}{mark}"


def write_report(rows: Sequence[Row[Launch]], triton_version: str, directory: Path) -> None:
    """Other versions' tables stay in the file until the same version is run again."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "resources.json"
    runs: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    runs[triton_version] = as_json(rows)
    assumed = {"multiprocessors": MULTIPROCESSORS, "clock_hz": CLOCK, "bytes_per_s": BANDWIDTH}
    file.write_text(lines({"measured": False, "assumed": assumed, "runs": runs}, "runs"))
    if triton_version == max(runs, key=_version_key):
        others = {version: table for version, table in runs.items() if version != triton_version}
        text = as_markdown(rows, triton_version, others)
        (directory / "resources.md").write_text(text)


def _version_key(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)]
