"""How often loops run, and what a launch costs on an H100, on paper.

Times follow from the counts and from the rates of a unit (`units.py`), as if nothing ever waited:
bounds, in which branches that are not taken count as well.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

from .kernel import Kernel, Work
from .units import BANDWIDTH, CLOCK, MULTIPROCESSORS, UNITS, column_of


def executions(kernel: Kernel, launch: Work) -> list[float]:
    """How often one warp runs each loop of the machine code."""
    times = [0.0] * len(kernel.loops)
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for at, loop in enumerate(kernel.loops):
        groups[loop.name, loop.parent].append(at)
    # parents stand before the loops inside them
    for (_, parent), members in sorted(groups.items(), key=lambda item: item[0][1]):
        trips = launch.trips(kernel.loops[members[0]])
        left = 1.0 if trips is None else trips
        around = 1.0 if parent < 0 else times[parent]
        for at in sorted(members, key=lambda i: -kernel.loops[i].unroll):
            unroll = kernel.loops[at].unroll
            runs = left // unroll if len(members) > 1 else left / unroll
            left -= runs * unroll
            times[at] = around * runs
    return times


@dataclass
class Cost:
    """What one launch takes of an H100, on paper."""

    programs: int
    warps: int
    """of a program"""
    resident_warps: int
    """of a multiprocessor, as registers and shared memory allow"""
    given_warps: float
    """of a multiprocessor, if all of the launch ran at once"""
    imbalance: float
    """the busiest multiprocessor's programs, by the average"""
    instructions: dict[str, float]
    """executed by all warps together, by column"""
    unit_us: dict[str, float]
    complete: bool
    """whether the length of every loop is known"""
    memory_us: float
    bytes: int

    @property
    def binding(self) -> str:
        unit = max(self.unit_us, key=lambda name: self.unit_us[name])
        return unit if self.unit_us[unit] >= self.memory_us else "memory"

    @property
    def bound_us(self) -> float:
        return max(self.memory_us, *self.unit_us.values())


def cost_of(kernel: Kernel, launch: Work) -> Cost:
    programs = launch.programs
    executed: Counter[str] = Counter()
    runs = executions(kernel, launch)
    parts = [(kernel.outside, 1.0)]
    parts += zip((x.kinds for x in kernel.loops), runs, strict=True)
    for kinds, times in parts:
        for kind, count in kinds.items():
            executed[kind] += count * times * programs * launch.warps  # type: ignore[assignment]
    imbalance = math.ceil(programs / MULTIPROCESSORS) * MULTIPROCESSORS / programs
    unit_us = {}
    for name, unit in UNITS.items():
        busy = sum(n for k, n in executed.items() if unit.kinds is None or k in unit.kinds)
        unit_us[name] = 1e6 * busy * 32 * imbalance / (unit.lanes * MULTIPROCESSORS * CLOCK)
    columns: Counter[str] = Counter()
    for kind, number in executed.items():
        columns[column_of(kind)] += number
    return Cost(
        programs=programs,
        warps=launch.warps,
        resident_warps=resident_warps(kernel, launch.warps),
        given_warps=programs * launch.warps / MULTIPROCESSORS,
        imbalance=imbalance,
        instructions=dict(columns),
        unit_us=unit_us,
        complete=all(
            launch.trips(loop) is not None
            for loop, times in zip(kernel.loops, runs, strict=True)
            if times > 0.0
        ),
        memory_us=1e6 * launch.bytes / BANDWIDTH["peak"],
        bytes=launch.bytes,
    )


def resident_warps(kernel: Kernel, warps: int) -> int:
    """Of compute capability 9.0: 64 warps, 32 programs, 65536 registers that a warp gets by 256,
    227 KiB of shared memory of which each program costs 1 KiB more than it asks for."""
    per_warp = math.ceil(kernel.registers * 32 / 256) * 256
    by_registers = 65536 // per_warp // warps
    by_shared = 228 * 1024 // (kernel.shared + 1024)
    return min(64 // warps, 32, by_registers, by_shared) * warps
