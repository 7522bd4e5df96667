"""Compiles csrc/cuda without a GPU and reads what came out, instance by instance."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from . import cplusplus, cuda_cases, nvcc
from .cuda_launches import names_of
from .kernel import Kernel
from .loops import ByArm, Function, LoopCount, Place, SourceLoop, Sources, count_loops
from .nvcc import CSRC, Compiled, CompileError, Usage
from .sass import Frames, Instruction, parse_sass

ARCHS: Final = ("90a", "80", "100")
#: The architecture whose loops are counted and whose times are derived.
MAIN_ARCH: Final = "90a"
#: Compilers that run at a time; one may want gigabytes.
_MOST: Final = 2


@dataclass
class Instance:
    """A kernel with its template arguments, for one architecture."""

    file: str
    arch: str
    name: str
    usage: Usage
    """as ptxas says"""
    kernel: Kernel
    """as the machine code says"""

    @property
    def template(self) -> str:
        return self.name.split("<")[0]


class Job(NamedTuple):
    source: Path
    arch: str


class Failure(NamedTuple):
    job: Job
    text: str


class Result(NamedTuple):
    compiled: list[Compiled]
    instances: list[Instance]
    failures: list[Failure]


def sources_in(paths: Sequence[Path]) -> list[Path]:
    """Files, and what is in folders."""
    return [y for x in paths for y in (sorted(x.glob("*.cu")) if x.is_dir() else [x])]


def chosen(sources: Sequence[Path], archs: Sequence[str], quick: bool) -> list[Job]:
    """The main architecture first; the largest files first, because they take longest."""
    return [
        Job(source, arch)
        for arch in archs
        for source in sorted(
            sources, key=lambda x: -sum(y.stat().st_size for y in nvcc.files_of(x))
        )
        if not quick or source.name in _quick_files(arch)
    ]


def _quick_files(arch: str) -> Sequence[str]:
    return cuda_cases.QUICK_MAIN_FILES if arch == MAIN_ARCH else cuda_cases.QUICK_FILES


def compile_jobs(
    jobs: Sequence[Job],
    processes: int,
    folder: Path = nvcc.CACHE,
    tell: Callable[[str], None] = lambda _: None,
) -> Result:
    """Every source for every architecture, and what failed."""

    def compile_one(job: Job) -> Compiled | Failure:
        try:
            found = nvcc.compile_source(job.source, job.arch, cuda_cases.FLAGS, folder)
        except CompileError as error:
            return Failure(job, f"{job.source.name} | sm_{job.arch} does not compile: {error}")
        if found.fresh:
            tell(f"{job.source.name} | sm_{job.arch}: compiled in {found.seconds:g} s")
        return found

    with ThreadPoolExecutor(min(processes, _MOST)) as threads:
        made = list(threads.map(compile_one, jobs))
    compiled = [x for x in made if isinstance(x, Compiled)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context) as pool:
        instances = [y for x in pool.map(read_instances, compiled) for y in x]
    return Result(compiled, instances, [x for x in made if isinstance(x, Failure)])


# --- machine code -------------------------------------------------------------------------------


def read_instances(compiled: Compiled) -> list[Instance]:
    """The kernels of a cubin, by name."""
    usages = nvcc.usages(compiled.log)
    if not usages:
        return []
    sources = sources_of(compiled.source)
    code = nvcc.sections(nvcc.disassemble(compiled.cubin))
    names = nvcc.demangle(list(usages))
    instances = []
    for mangled, name in zip(usages, names, strict=True):
        usage = usages[mangled]
        kernel = read_kernel(code[mangled], usage, sources)
        instances.append(Instance(compiled.source.name, compiled.arch, name, usage, kernel))
    return sorted(instances, key=lambda x: x.name)


def read_kernel(text: str, usage: Usage, sources: Sources) -> Kernel:
    """Functions that the compiler calls instead of inlining them stand behind the kernel. They are
    for rare cases: their instructions are in no loop and in no time, their spills are apart."""
    instructions, labels = parse_sass(text, file_name)
    called = [labels[x.label] for x in instructions if x.kind == "CALL" and x.label in labels]
    size = min(called, default=len(instructions))
    own, rest = instructions[:size], instructions[size:]
    kinds = Counter(x.kind for x in own)
    outside, loops = count_loops(own, {k: at for k, at in labels.items() if at < size}, sources)
    arms = Arms(instructions, labels, sources)
    arms.swapped = _tell_copies_apart(own, loops)
    for loop in loops:
        loop.rare = not cuda_cases.RARE.isdisjoint(names_of(loop.name))
        loop.by_arm = arms.count(sorted(loop.own))
    inside = frozenset[int]().union(*(x.own for x in loops))
    return Kernel(
        registers=usage.registers,
        stack=usage.stack,
        shared=usage.shared,
        spill_loads=kinds["LDL"],
        spill_stores=kinds["STL"],
        code_bytes=16 * len(instructions),
        outside=outside,
        loops=loops,
        called_spills=_spills(rest),
        called_code_bytes=16 * len(rest),
        outside_by_arm=_merged(arms.count([x for x in range(size) if x not in inside])),
    )


def _spills(instructions: Sequence[Instruction]) -> int:
    return sum(x.kind in ("LDL", "STL") for x in instructions)


def _merged(by_arm: ByArm) -> ByArm:
    """What is set up for staging, in four copies that lines do not tell apart: one more arm."""
    found: dict[frozenset[str], Counter[str]] = defaultdict(Counter)
    for arms, kinds in by_arm.items():
        copies = any(x.startswith("staged whole") for x in arms)
        found[frozenset([cuda_cases.SET_UP]) if copies else arms].update(kinds)
    return {arms: dict(kinds) for arms, kinds in found.items()}


def _tell_copies_apart(
    instructions: Sequence[Instruction], loops: Sequence[LoopCount]
) -> dict[int, dict[str, str]]:
    """Staging is compiled for float and for 16 bits, for two rows and for three; line information
    may give all of them the place of the first. Their loads tell them apart; the loops of the last
    column stand behind them. Returns, for the instructions of such loops, arm -> the true one."""
    swapped: dict[int, dict[str, str]] = {}
    arms: dict[str, str] = {}
    words: list[tuple[str, str]] = []
    for loop in loops:
        loads = [x for x in (instructions[i] for i in loop.own) if x.kind == "LDG"]
        if loads and "last" not in loop.name:
            arms, words = {}, []
            if all(".U16" in x.opcode for x in loads) and "float>" in loop.name:
                arms["staged float"] = "staged 16 bits"
                words.append(("float>", "uint16_t>"))
            rows = len(loads) / loop.unroll
            if rows == 3 and loop.name.startswith("staging<2, "):
                arms["staged whole, one"] = "staged whole, two"
                words.append(("<2, ", "<"))
        if loop.name.startswith(("staging", "rows of last")):
            for mistaken, true in words:
                loop.name = loop.name.replace(mistaken, true)
            swapped |= dict.fromkeys(loop.own, arms)
    return swapped


class Arms:
    """Which arms of branches (`cuda_cases.ARMS`) the instructions of a kernel stand in. A function
    that is called counts as part of who calls it, each of its loops once; those of the compiler
    itself (slow ways of a division) count nothing."""

    def __init__(
        self, instructions: Sequence[Instruction], labels: Mapping[str, int], sources: Sources
    ) -> None:
        self.instructions = instructions
        self.known: dict[Frames, frozenset[str]] = {}
        starts = {
            x.label: labels[x.label]
            for x in instructions
            if x.kind == "CALL" and x.label is not None and x.label in labels
        }
        ends = sorted([*starts.values(), len(instructions)])
        self.called = {
            label: range(start, next(x for x in ends if x > start))
            for label, start in starts.items()
            if not label.startswith("$__internal")
        }
        self.lines = sources.arms
        self.swapped: Mapping[int, Mapping[str, str]] = {}
        """instruction -> an arm that its lines lead to, and the true one"""

    def count(self, places: Sequence[int], around: Frames = ()) -> ByArm:
        """opcode -> instructions, by the arms that they all stand in."""
        found: dict[frozenset[str], Counter[str]] = defaultdict(Counter)
        for place in places:
            instruction = self.instructions[place]
            frames = instruction.frames + around
            arms = self._arms(frames)
            if place in self.swapped:
                arms = frozenset(self.swapped[place].get(x, x) for x in arms)
            found[arms][instruction.kind] += 1
            if instruction.kind == "CALL" and instruction.label in self.called:
                for inner, kinds in self.count(self.called[instruction.label], frames).items():
                    found[inner].update(kinds)
        return {arms: dict(kinds) for arms, kinds in found.items()}

    def _arms(self, frames: Frames) -> frozenset[str]:
        if frames not in self.known:
            parts = set[tuple[str, int]]().union(*(self.lines.get(x, ()) for x in frames))
            names = {arm for arm, _ in parts}
            self.known[frames] = frozenset(
                arm
                for arm in names
                if all((arm, number) in parts for number in range(len(cuda_cases.ARMS[arm])))
            )
        return self.known[frames]


def taken(kernel: Kernel, without: Mapping[str, float]) -> Kernel:
    """A kernel less the arms that a launch does not take, and with what it calls."""

    def kinds(by_arm: ByArm) -> dict[str, float]:
        total: Counter[str] = Counter()
        for arms, counts in by_arm.items():
            share = math.prod(1.0 - without.get(arm, 0.0) for arm in arms)
            for kind, count in counts.items():
                total[kind] += count * share  # type: ignore[assignment]
        return {kind: count for kind, count in total.items() if count}

    loops = [replace(x, kinds=kinds(x.by_arm)) for x in kernel.loops]
    return replace(kernel, outside=kinds(kernel.outside_by_arm), loops=loops)


@cache
def file_name(path: str) -> str:
    """Of line information: two folders of csrc have files of one name."""
    full = Path(os.path.normpath(path))
    return full.relative_to(CSRC).as_posix() if full.is_relative_to(CSRC) else full.name


@cache
def sources_of(source: Path) -> Sources:
    """The functions and loops of a source and its headers, as they are at the first call."""
    texts = {file_name(str(x)): x.read_text() for x in nvcc.files_of(source)}
    found = {name: cplusplus.read(text, name) for name, text in texts.items()}
    lines = {name: text.splitlines() for name, text in texts.items()}
    loops = {name: x.loops for name, x in found.items()}
    functions = {name: x.functions for name, x in found.items()}
    return Sources(
        functions=functions,
        loops=loops,
        label=lambda place: label_of(place, loops, lines),
        closed_by_head=True,
        deep=True,
        arms=_lines_of_arms(texts, functions),
    )


def _lines_of_arms(
    texts: Mapping[str, str], functions: Mapping[str, Sequence[Function]]
) -> dict[tuple[str, int], set[tuple[str, int]]]:
    """File and line -> parts of arms, each an arm's name and which of its `Lines` it is."""
    found: dict[tuple[str, int], set[tuple[str, int]]] = defaultdict(set)
    for file, text in texts.items():
        for arm, parts in cuda_cases.ARMS.items():
            for number, part in enumerate(parts):
                for function in functions[file]:
                    if function.name == part.function:
                        lines = cplusplus.extent(text, function, part.begin, part.end)
                        for line in range(lines[0], lines[1] + 1) if lines else ():
                            found[file, line].add((arm, number))
    return dict(found)


def arms_without_lines(folder: Path) -> list[str]:
    """Arms of the tables that the sources of a folder no longer have."""
    known = set[tuple[str, int]]()
    for file in sorted(folder.glob("*.*")):
        text = file.read_text()
        functions = {file.name: cplusplus.read(text, file.name).functions}
        known |= set().union(*_lines_of_arms({file.name: text}, functions).values())
    parts = [(arm, n, x) for arm, y in cuda_cases.ARMS.items() for n, x in enumerate(y)]
    return [f"arm {arm}: no line has {x}" for arm, n, x in parts if (arm, n) not in known]


_CALL: Final = re.compile(r"\w(?<!_cast)<([^<>()]*)>\s*\(")
_CONSTANT: Final = re.compile(r"-?\d+|true|false|float|double|u?int\d+_t")


def label_of(
    place: Place, loops: Mapping[str, Sequence[SourceLoop]], lines: Mapping[str, Sequence[str]]
) -> str:
    """The function's name or what `LOOPS` makes of it, and the constants of the calls to it."""
    function = place.loop.function + ("/inner" if place.loop.nested else "")
    rolled = [
        x for x in loops[place.loop.file] if x.function == place.loop.function and not x.unrolled
    ]
    # a branch may be told to come from a loop that was unrolled
    number = rolled.index(place.loop) + 1 if place.loop in rolled else len(rolled) + 1
    numbered = f"{place.loop.function}#{number}"
    constants = []
    for file, line in reversed(place.calls):
        text = "".join(lines.get(file, ())[line - 1 : line])
        for call in _CALL.findall(text):
            constants += [x.strip() for x in call.split(",") if _CONSTANT.fullmatch(x.strip())]
    name = cuda_cases.LOOPS.get(numbered) or cuda_cases.LOOPS.get(function, function)
    return f"{name}<{', '.join(constants)}>" if constants else name
