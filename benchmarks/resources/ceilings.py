"""Ceilings of registers, spills, shared memory and instructions: a file, and whether it is kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .kernel import Row, loop_costs

#: Of the Triton kernels.
CEILINGS: Final = Path(__file__).with_name("triton.json")
SLACK: Final = 0.03
DEFAULTS: Final = {"registers": 255, "spills": 0, "spills in an innermost loop": 0, "shared": 64}


def check(
    rows: Sequence[Row[Any]], ceilings: Mapping[str, Any], version: str, compiler: str = "triton"
) -> list[str]:
    """What is over its ceiling, in words. Instruction counts and small spills are those of one
    compiler; with another one, only what no compiler may do is held."""
    same_compiler = _minor(version) == _minor(ceilings.get(compiler, ""))
    problems = []
    for row in rows:
        where = f"{row.key} | sm_{row.arch}"
        limits = {
            **ceilings["defaults"],
            **ceilings["kernels"].get(f"sm_{row.arch}", {}).get(row.key, {}),
        }
        if not same_compiler:
            limits["registers"] = ceilings["defaults"]["registers"]
        found: dict[str, float] = {"registers": row.kernel.registers}
        if same_compiler or not row.launch.careful:
            found["spills in an innermost loop"] = row.kernel.inner_spills
        if same_compiler:
            found |= {"spills": row.kernel.spills, "shared": row.kernel.shared}
            found["spills in called functions"] = row.kernel.called_spills
        for what, value in found.items():
            if value > limits.get(what, 0):
                problems.append(f"{where}: {what} {value:g}, ceiling {limits.get(what, 0):g}")
        if same_compiler:
            problems += _check_loops(row, limits.get("loops", {}), where)
    return problems


def _check_loops(row: Row[Any], limits: Mapping[str, float], where: str) -> list[str]:
    costs = loop_costs(row)
    problems = [f"{where}: loop {name} is gone" for name in limits if name not in costs]
    for name, limit in limits.items():
        if name in costs and costs[name]["all"] > limit:
            found = f"{costs[name]['all']:.2f} instructions per pixel and class"
            problems.append(f"{where}: loop {name} {found}, ceiling {limit:g}")
    return problems


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def new_ceilings(rows: Sequence[Row[Any]], version: str) -> dict[str, Any]:
    """Ceilings that these kernels just keep. Innermost loops may spill only where loops are not
    held, and if listed."""
    kernels: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        entry: dict[str, Any] = {}
        if row.kernel.spills:
            entry["spills"] = row.kernel.spills
        if row.kernel.shared > DEFAULTS["shared"]:
            entry["shared"] = row.kernel.shared
        if row.kernel.inner_spills and not row.held:
            entry["spills in an innermost loop"] = row.kernel.inner_spills
        if row.held and not row.same_as:
            entry["loops"] = loop_ceilings(row)
        if entry:
            kernels[f"sm_{row.arch}"][row.key] = entry
    return {"triton": version, "defaults": dict(DEFAULTS), "kernels": dict(kernels)}


def loop_ceilings(row: Row[Any]) -> dict[str, float]:
    return {
        name: math.ceil(100 * costs["all"] * (1 + SLACK)) / 100
        for name, costs in loop_costs(row).items()
    }
