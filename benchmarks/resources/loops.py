"""Tells the loops of machine code apart by its line information.

A loop belongs to the `for` of the source (and to the call of the function that has it) that most of
its instructions come from; with nvcc, to the one whose line the closing branch has. Assemblers
unroll some loops and keep the rolled loop for what remains; the unroll factor is the ratio of their
global loads.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .flow import Loop, loops_of
from .sass import Frames, Instruction

_NEARLY_ALL: Final = 0.7


class SourceLoop(NamedTuple):
    """A `for` of a kernel's source."""

    file: str
    function: str
    first: int
    last: int
    iterable: str
    """what it runs over: `range(...)`, or the head of a `for` in C++"""
    nested: bool
    """inside another one of the same function"""
    unrolled: bool = False
    """the source asks for no loop in machine code"""
    factor: int = 1
    """the source asks for that many iterations in one of the machine code"""


class Place(NamedTuple):
    """A `for`, and the calls that lead to it."""

    loop: SourceLoop
    calls: Frames


class Function(NamedTuple):
    """A function of the source, by its lines."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Sources:
    """The source files of kernels, as far as loops need them; by the names in line information."""

    functions: Mapping[str, Sequence[Function]]
    loops: Mapping[str, Sequence[SourceLoop]]
    """inner loops last"""
    label: Callable[[Place], str]
    """what a loop is called"""
    closed_by_head: bool = False
    """the branch that closes a loop has the line of the `for`"""
    deep: bool = False
    """a function that has nearly all of a loop's instructions is taken apart"""
    arms: Mapping[tuple[str, int], set[tuple[str, int]]] = field(default_factory=dict)
    """file and line -> the arms of branches that it belongs to, and which part of theirs it is"""

    def function_at(self, file: str, line: int) -> str:
        around = (x.name for x in self.functions.get(file, ()) if x.first <= line <= x.last)
        return next(around, file)

    def called(self, frames: Frames) -> str:
        """The function that a kernel calls and that an instruction comes from, at whatever depth;
        the kernel itself for its own lines."""
        return self.function_at(*frames[max(len(frames) - 2, 0)]) if frames else ""

    def parts(self, frames: Sequence[Frames]) -> Counter[str]:
        """Instructions by the function that they come from, as called from the kernel."""
        if not self.deep:
            return Counter(self.called(x) for x in frames)
        found: Counter[str] = Counter()
        for depth in range(1, max(map(len, frames), default=0) + 1):
            found = Counter(self.function_at(*x[max(len(x) - depth, 0)]) for x in frames if x)
            if max(found.values()) < _NEARLY_ALL * sum(found.values()):
                break
        return found

    def place_of(self, frames: Frames) -> Place | None:
        """The innermost `for` around an instruction."""
        for depth, (file, line) in enumerate(frames):
            around = [
                x for x in self.loops.get(file, ()) if x.first <= line <= x.last and not x.unrolled
            ]
            if around:
                return Place(around[-1], frames[depth + 1 :])
        return None

    def place_at(self, frames: Frames) -> Place | None:
        """The `for` on the very line of a branch; `do` closes on its last."""
        if not self.closed_by_head or not frames:
            return None
        (file, line), *_ = frames
        here = (x for x in self.loops.get(file, ()) if line in (x.first, x.last))
        loop = min(here, key=lambda x: (line != x.first, x.last - x.first), default=None)
        return Place(loop, frames[1:]) if loop else None


#: By the arms of branches that it stands in: what is executed, calls included, opcode ->
#: instructions. For launches that do not take all arms.
ByArm = dict[frozenset[str], dict[str, int]]


@dataclass
class LoopCount:
    """What one loop of the machine code costs."""

    name: str
    source: str
    iterable: str
    innermost: bool
    unroll: float
    """iterations of the source in one of the machine code"""
    remainder: bool
    """it does what an unrolled loop of the same `for` left over"""
    parent: int
    """its place in the list of loops; -1: the kernel"""
    kinds: dict[str, float]
    """opcode -> instructions, inner loops left out"""
    calls: dict[str, int]
    """which function of the kernel's own calls they come from"""
    rare: bool = False
    """it hardly ever runs, and may spill"""
    own: frozenset[int] = frozenset()
    """its instructions by their places in the code, inner loops left out"""
    by_arm: ByArm = field(default_factory=dict)

    @property
    def instructions(self) -> float:
        return sum(self.kinds.values())

    @property
    def spills(self) -> int:
        return round(self.kinds.get("LDL", 0) + self.kinds.get("STL", 0))


def count_loops(
    instructions: Sequence[Instruction], labels: Mapping[str, int], sources: Sources
) -> tuple[dict[str, float], list[LoopCount]]:
    """Instructions outside all loops, and every loop with its name and unroll factor."""
    loops = loops_of(instructions, labels)
    places = [_most_common_place(instructions, loop, sources) for loop in loops]
    names = _names(places, sources)
    counts = []
    for loop, place, name in zip(loops, places, names, strict=True):
        kinds = Counter(instructions[i].kind for i in loop.own)
        calls = sources.parts([instructions[i].frames for i in loop.own])
        counts.append(
            LoopCount(
                name=name,
                source=f"{place.loop.file}:{place.loop.function}" if place else "",
                iterable=place.loop.iterable if place else "",
                innermost=not loop.inner,
                unroll=1.0,
                remainder=False,
                parent=loops.index(loop.parent) if loop.parent else -1,
                kinds=dict[str, float](sorted(kinds.items())),
                calls=dict(calls.most_common()),
                own=loop.own,
            )
        )
    for place, same in _siblings(places, counts):
        _set_unroll(place, same)
    inside = frozenset[int]().union(*(loop.body for loop in loops))
    outside = Counter(x.kind for i, x in enumerate(instructions) if i not in inside)
    return dict[str, float](sorted(outside.items())), counts


def _most_common_place(
    instructions: Sequence[Instruction], loop: Loop, sources: Sources
) -> Place | None:
    votes = Counter(sources.place_at(instructions[i].frames) for i in loop.closing)
    votes.pop(None, None)
    if not votes:
        votes = Counter(sources.place_of(instructions[i].frames) for i in loop.own)
        votes.pop(None, None)
    return votes.most_common(1)[0][0] if votes else None


def _names(places: Sequence[Place | None], sources: Sources) -> list[str]:
    """Labels; the second `for` with the same label gets a 2, in the order of the code."""
    known: dict[str, list[Place | None]] = defaultdict(list)
    names = []
    for place in places:
        label = sources.label(place) if place else "unnamed"
        if place not in known[label]:
            known[label].append(place)
        number = known[label].index(place)
        names.append(label if number == 0 else f"{label} {number + 1}")
    return names


def _siblings(
    places: Sequence[Place | None], counts: Sequence[LoopCount]
) -> Iterable[tuple[Place, list[LoopCount]]]:
    groups: dict[tuple[Place, int], list[LoopCount]] = defaultdict(list)
    for place, count in zip(places, counts, strict=True):
        if place is not None:
            groups[place, count.parent].append(count)
    return ((place, same) for (place, _), same in groups.items())


def _set_unroll(place: Place, same: list[LoopCount]) -> None:
    """Loops of one `for` under one parent: their loads are multiples of the rolled loop's."""
    loads = [loop.kinds.get("LDG", 0) + loop.kinds.get("LDS", 0) for loop in same]
    weights = loads if all(loads) else [loop.instructions for loop in same]
    if place.loop.factor > 1:
        _set_known_factor(same, weights, place.loop.factor)
    else:
        least = min(weights)
        for loop, weight in zip(same, weights, strict=True):
            loop.unroll = float(round(weight / least))
        # where no loop is unrolled they are copies, for a condition that was taken out of them
        unrolled = any(loop.unroll > 1.0 for loop in same)
        for loop, weight in zip(same, weights, strict=True):
            loop.remainder = unrolled and weight == least
    # Older line information does not say which call a loop comes from: the second loop with the
    # same factor is another one.
    known: Counter[float] = Counter()
    for loop in same:
        known[loop.unroll] += 1
        if known[loop.unroll] > 1:
            loop.name += f" (copy {known[loop.unroll]})"


def _set_known_factor(same: list[LoopCount], weights: Sequence[float], factor: int) -> None:
    """The source says the factor. A loop with a `factor`-th of another one's loads does what that
    one left over; it need not be there, and of several copies each may have one."""
    rolled = {weight / factor for weight in weights}.intersection(weights)
    for loop, weight in zip(same, weights, strict=True):
        loop.remainder = weight in rolled
        loop.unroll = 1.0 if loop.remainder else float(factor)
