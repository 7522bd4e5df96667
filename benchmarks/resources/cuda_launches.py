"""What `cuda_cases.py` says a launch with: kernels, arms of branches, launches, cases."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .loops import LoopCount

Arguments = tuple[str, ...]
"""Of a template, as a demangler writes them: ("Fixed<true, false>", "4", "4")"""


@dataclass(frozen=True)
class Template:
    """All instances of one kernel."""

    pixels: Callable[[Arguments], float] = lambda _: 1.0
    """that a thread holds in registers, so that an iteration of its loops serves them all: R x S;
    or the elements of an iteration"""
    careful: Callable[[Arguments], bool] = lambda _: False
    """a twin for extreme logits, whose loops are not held"""


class Lines(NamedTuple):
    """Lines of a function: the first one that has the text `begin`, with the statement or the block
    that it opens; up to and with the first one behind it that has the text `end`."""

    function: str
    begin: str
    end: str = ""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    """the instance by its readable name: "label_report_kernel<long>" """
    grid: int
    """blocks"""
    threads: int
    """of a block"""
    bytes: int
    """moved: every tensor read or written once"""
    elements: float | None = None
    """pixels times classes, which counts in the report are divided by; None: no such number"""
    shared: int = 0
    """bytes of dynamic shared memory"""
    loops: Mapping[str, float] = field(default_factory=dict)
    """how often a thread runs each loop every time that it comes to it, by name; 0 for what this
    launch does not take. What is left out counts once, and the time gets a ">". "statistics"
    also stands for "statistics 2", unless that is listed"""
    without: Mapping[str, float] = field(default_factory=dict)
    """arms of branches (names of `ARMS`) -> the share of their instructions that this launch does
    not execute"""
    pixels: float = 1.0
    careful: bool = False
    # both are filled in from TEMPLATES

    @property
    def programs(self) -> int:
        return self.grid

    @property
    def warps(self) -> int:
        return math.ceil(self.threads / 32)

    @property
    def pixels_per_thread(self) -> float:
        return self.pixels

    def trips(self, loop: LoopCount) -> float | None:
        known = (self.loops[x] for x in names_of(loop.name) if x in self.loops)
        return next((float(x) for x in known), None)


def names_of(loop: str) -> tuple[str, ...]:
    """By which a case may speak of a loop: the exact one goes first."""
    copied = re.sub(r" \(copy \d+\)$", "", loop)
    return loop, copied, re.sub(r" \d+$", "", copied)


@dataclass(frozen=True)
class Case:
    """What a call of the package launches: forward, and backward if it has one."""

    what: str
    launches: Sequence[Launch]
    special: float = 0.0
    """exponentials and logarithms per pixel and class that the method needs, whatever the code"""
    bytes: int | None = None
    """that the method moves, whatever the code; None: no floors for this case"""
