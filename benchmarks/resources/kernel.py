"""A compiled kernel, and the launch that it is looked at for; whoever compiled it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from .loops import ByArm, LoopCount
from .units import column_of


@dataclass
class Kernel:
    """What a launch is compiled to."""

    registers: int
    stack: int
    shared: int
    spill_loads: int
    spill_stores: int
    code_bytes: int
    outside: dict[str, float]
    """opcode -> instructions outside every loop"""
    loops: list[LoopCount]
    called_spills: int = 0
    """of functions that are called and not inlined, where they are told apart"""
    called_code_bytes: int = 0
    outside_by_arm: ByArm = field(default_factory=dict)

    @property
    def spills(self) -> int:
        return self.spill_loads + self.spill_stores

    @property
    def inner_spills(self) -> int:
        return sum(loop.spills for loop in self.loops if loop.innermost and not loop.rare)

    @property
    def inner_barriers(self) -> int:
        """A tensor that changes its layout in a loop goes through shared memory."""
        return round(sum(loop.kinds.get("BAR", 0) for loop in self.loops if loop.innermost))


class Work(Protocol):
    """What is asked of a launch."""

    @property
    def programs(self) -> int:
        """blocks of threads"""

    @property
    def warps(self) -> int:
        """of a program"""

    @property
    def pixels_per_thread(self) -> float:
        """that an iteration of a loop serves"""

    @property
    def elements(self) -> float | None:
        """pixels times classes of the whole launch"""

    @property
    def bytes(self) -> int:
        """moved by the whole launch"""

    @property
    def careful(self) -> bool:
        """a twin that runs where logits are extreme"""

    def trips(self, loop: LoopCount) -> float | None:
        """how often the loop runs each time; None: unknown, and it is counted once"""


W = TypeVar("W", bound=Work, covariant=True)


@dataclass
class Row(Generic[W]):
    """A launch of a case, compiled for one architecture."""

    case: str
    name: str
    arch: str
    launch: W
    kernel: Kernel
    same_as: str
    """an earlier case that compiles to this very kernel"""
    main: bool
    """of the architecture whose loops are counted and whose times are derived"""

    @property
    def key(self) -> str:
        return f"{self.case} | {self.name}" if self.case else self.name

    @property
    def held(self) -> bool:
        """Loops of the careful twins, which run where logits are extreme, and of other
        architectures are not held."""
        return self.main and not self.launch.careful


def loop_costs(row: Row[Any]) -> dict[str, dict[str, float]]:
    """Instructions per pixel (and class, in a loop over classes) of each loop, by column."""
    result = {}
    for loop in row.kernel.loops:
        if not loop.remainder:
            pixels = row.launch.pixels_per_thread * loop.unroll
            columns: dict[str, float] = {"all": loop.instructions / pixels}
            for kind, count in loop.kinds.items():
                column = column_of(kind)
                columns[column] = columns.get(column, 0.0) + count / pixels
            result[loop.name] = columns
    return result
