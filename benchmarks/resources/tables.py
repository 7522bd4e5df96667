"""Tables that the reports of both compilers have in common."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ..markdown import table
from .kernel import Kernel, Row, W, loop_costs
from .loops import LoopCount
from .times import cost_of
from .units import BANDWIDTH, CLOCK, COLUMNS, MULTIPROCESSORS


def rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def loop_json(row: Row[Any], loop: LoopCount) -> dict[str, Any]:
    return {
        "name": loop.name,
        "source": loop.source,
        "range": loop.iterable,
        "innermost": loop.innermost,
        "unroll": loop.unroll,
        "remainder": loop.remainder,
        "instructions": loop.instructions,
        "spills": loop.spills,
        "calls": loop.calls if loop.name == "step" else {},
        "per_pixel_class": {} if loop.remainder else loop_costs(row)[loop.name],
    }


def cost_json(row: Row[Any]) -> dict[str, Any]:
    cost = cost_of(row.kernel, row.launch)
    return {
        **asdict(cost),
        "binding": cost.binding,
        "bound_us": cost.bound_us,
        "elements": row.launch.elements,
    }


def by_case(rows: Sequence[Row[W]]) -> dict[str, list[Row[W]]]:
    result: dict[str, list[Row[W]]] = defaultdict(list)
    for row in rows:
        result[row.case].append(row)
    return result


def kernel_table(rows: Sequence[Row[Any]]) -> str:
    header = ["case", "kernel", "registers", "stack", "LDL / STL", "inner", "shared", "code KiB"]
    header += ["warps fit / given", "imbalance", "instr. per element", "MUFU", "time us", "binds"]
    header += ["memory us"]
    cells = []
    for row in rows:
        kernel, cost, work = row.kernel, cost_of(row.kernel, row.launch), row.launch.elements
        executed = 32 * sum(cost.instructions.values())
        special = 32 * cost.instructions.get("MUFU", 0.0)
        cells.append(
            [
                row.case,
                row.name + (f" (= {row.same_as})" if row.same_as else ""),
                str(kernel.registers),
                str(kernel.stack),
                f"{kernel.spill_loads} / {kernel.spill_stores}",
                str(kernel.inner_spills),
                str(kernel.shared),
                f"{kernel.code_bytes / 1024:.0f}",
                f"{cost.resident_warps} / {cost.given_warps:.1f}",
                f"{cost.imbalance:.2f}",
                f"{executed / work:.1f}" if work else "",
                f"{special / work:.2f}" if work else "",
                ("" if cost.complete else "> ") + f"{max(cost.unit_us.values()):.1f}",
                cost.binding,
                f"{cost.memory_us:.1f}",
            ]
        )
    return table(header, cells)


def loop_table(
    rows: Sequence[Row[Any]],
    names: Sequence[str] = ("case", "kernel"),
    leave_out: Callable[[str], bool] = lambda _: False,
) -> str:
    columns = [*COLUMNS, "other"]
    found = []
    used = set[str]()
    for row in rows:
        if not row.same_as:
            for name, costs in loop_costs(row).items():
                if leave_out(name):
                    continue
                loop = next(x for x in row.kernel.loops if x.name == name and not x.remainder)
                found.append((row, name, loop.unroll, costs))
                used |= costs.keys()
    columns = [x for x in columns if x in used]
    header = [*names, "loop", "unrolled", "all", *columns]
    cells = [
        [row.case, row.name][-len(names) :]
        + [name, f"{unroll:g}", f"{costs['all']:.2f}"]
        + [f"{costs[x]:.2f}" if x in costs else "" for x in columns]
        for row, name, unroll, costs in found
    ]
    return table(header, cells)


def step_tables(rows: Sequence[Row[Any]], names: Sequence[str] = ("case", "kernel")) -> str:
    cells = []
    for row in rows:
        step = next((x for x in row.kernel.loops if x.name == "step" and not x.innermost), None)
        if step is not None and not row.same_as:
            pixels = row.launch.pixels_per_thread
            largest = Counter(step.calls).most_common(10)
            found = ", ".join(f"{name} {count / pixels:.1f}" for name, count in largest)
            where = [row.case, row.name][-len(names) :]
            cells.append([*where, f"{step.instructions / pixels:.1f}", found])
    return table([*names, "all", "of which"], cells)


def spilled(kernel: Kernel) -> str:
    mark = ("*" if kernel.inner_spills else "") + (" +" if kernel.inner_barriers else "")
    return f"{kernel.registers}, {kernel.spills}{mark}"


def by_arch(arch: str) -> int:
    """80, 90a, 100"""
    return int(re.sub(r"\D", "", arch))


def arch_table(rows: Sequence[Row[Any]]) -> str:
    archs = sorted({x.arch for x in rows}, key=by_arch)
    known: dict[tuple[str, str], dict[str, Row[Any]]] = defaultdict(dict)
    for row in rows:
        known[row.case, row.name][row.arch] = row
    cells = [
        [case, name, *(spilled(by[a].kernel) if a in by else "" for a in archs)]
        for (case, name), by in known.items()
        if not all(row.same_as for row in by.values())
    ]
    return table(["case", "kernel", *(f"sm_{a}" for a in archs)], cells)


def lines(content: Mapping[str, Any], within: str) -> str:
    """JSON with a line for each launch in the lists `within`, so that a difference can be read."""
    places: dict[str, str] = {}

    def place(row: Any) -> str:
        name = f"row {len(places)}"
        places[json.dumps(name)] = json.dumps(row)
        return name

    runs = {version: [place(row) for row in rows] for version, rows in content[within].items()}
    text = json.dumps({**content, within: runs}, indent=1)
    return re.sub(r'"row \d+"', lambda found: places[found[0]], text) + "\n"


class Described(NamedTuple):
    """What a case is, and what its method costs whatever the code."""

    what: str
    special: float
    """exponentials and logarithms of a pixel and class"""
    bytes: int | None
    """None: the case is not the whole method"""


def floor_ms(known: Described, rows: Sequence[Row[Any]]) -> float:
    """The larger one of a case's floors."""
    work = max(x.launch.elements or 0.0 for x in rows)
    special = known.special * work / (16 * MULTIPROCESSORS * CLOCK)
    return 1e3 * max(special, (known.bytes or 0) / BANDWIDTH["peak"])


def case_table(rows: Sequence[Row[Any]], known: Mapping[str, Described]) -> str:
    header = [
        "case",
        "what",
        "bound ms",
        "binds",
        "memory ms",
        "floor: exp, log ms",
        "floor: bytes ms",
    ]
    cells = []
    for case, members in by_case(rows).items():
        costs = [cost_of(x.kernel, x.launch) for x in members]
        total = sum(x.bound_us for x in costs) / 1e3
        heaviest = max(costs, key=lambda x: x.bound_us)
        work = max(x.launch.elements or 0.0 for x in members)
        what, special, moved = known[case]
        cells.append(
            [
                case,
                what,
                f"{total:.3f}",
                heaviest.binding,
                f"{sum(x.memory_us for x in costs) / 1e3:.3f}",
                f"{1e3 * special * work / (16 * MULTIPROCESSORS * CLOCK):.3f}" if moved else "",
                f"{1e3 * moved / BANDWIDTH['peak']:.3f}" if moved else "",
            ]
        )
    return table(header, cells)
