"""`python -m benchmarks.resources`: what the Triton kernels are compiled to, without a GPU.

Every case performs the package's own launches on tensors that have shapes and strides but no
memory; the launches are recorded, compiled for sm_80, sm_90 and sm_100 by the assembler inside the
Triton wheel, and the machine code is read: registers, spills, shared memory, and the instructions
of each loop, by the unit that executes them. `--check` holds the numbers under the ceilings of
resources.json and exits with 1 if one is over; `--update` writes new ceilings.

Loops are told apart by the line information of the machine code: a loop belongs to the `for` of the
source (and to the call of the function that has it) that most of its instructions come from. The
assembler unrolls some loops and keeps the rolled loop for what remains; the unroll factor is the
ratio of their global loads. How often a loop runs is its `range(...)` with the launch's arguments.

Times follow from the counts and from the rates of a unit (`UNITS`, per clock and multiprocessor),
as if nothing ever waited: bounds on paper, in which branches that are not taken count as well.
Nothing here is a measurement.

To add a case, write a function that performs launches (of any module of `kernels/`) and give it a
name in `CASES`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from heteroakd_fast.spec import LossSpec

__all__ = ["CASES", "check", "loops_of", "main", "parse_sass", "unavailable"]

CEILINGS: Final = Path(__file__).with_name("resources.json")
ARCHS: Final = (90, 80, 100)
#: The architecture whose loops are counted and whose times are derived.
MAIN_ARCH: Final = 90
SLACK: Final = 0.03

# --- cases --------------------------------------------------------------------------------------


def distill(
    shape: tuple[int, int, int, int],
    labels: tuple[int, int],
    terms: tuple[str, ...] = ("ce", "hetero"),
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
    teacher: tuple[int, int] | None = None,
    channels_last: bool = False,
    **options: Any,
) -> None:
    """The launches of one training step (or one evaluation) of the loss."""
    from heteroakd_fast.kernels import launch

    from heteroakd_fast.backends import triton as backend
    from heteroakd_fast.backends._parts import split

    spec = LossSpec(terms=terms, **options)
    batch, classes = shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student = torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout)
    other = (batch, classes, *(teacher or shape[2:]))
    target = torch.empty(batch, *labels, dtype=torch.int64, device="cuda")
    part, _ = split(student, torch.empty(other, dtype=dtype, device="cuda"), spec)
    assert part is not None
    run = backend._run(part)
    sums = torch.empty(len(terms), dtype=torch.float64, device="cuda")
    report = torch.empty(2, dtype=torch.int64, device="cuda")
    maps = torch.empty(2, batch, *labels, device="cuda") if spec.maps else None
    saved = launch.forward(run, target, None, sums, torch.empty_like(sums), report, maps, grad)
    if grad:
        launch.backward(run, target, None, sums, saved)


_S4 = partial(distill, (8, 19, 128, 256), (512, 1024))
_S8 = partial(distill, (8, 19, 64, 128), (512, 1024))
_ALL = ("ce", "kd", "hetero", "feature")

#: name -> (what it is, the launches)
CASES: Final[dict[str, tuple[str, Callable[[], None]]]] = {
    "s4": ("ce + hetero, T 2, B8 C19 512x1024, stride 4", partial(_S4, temperature=2.0)),
    "s8": ("ce + hetero, T 2, B8 C19 512x1024, stride 8", partial(_S8, temperature=2.0)),
    "c150": (
        "ce + hetero, T 2, B8 C150 512x512, stride 4",
        partial(distill, (8, 150, 128, 128), (512, 512), temperature=2.0),
    ),
    "c21": (
        "ce + hetero, T 2, B8 C21 512x512, stride 8",
        partial(distill, (8, 21, 64, 64), (512, 512), temperature=2.0),
    ),
    "c171": (
        "ce + hetero, T 2, B8 C171 512x512, stride 8",
        partial(distill, (8, 171, 64, 64), (512, 512), temperature=2.0),
    ),
    "bf16": ("as s4, bf16 logits", partial(_S4, temperature=2.0, dtype=torch.bfloat16)),
    "t1.7": ("as s4, T 1.7", partial(_S4, temperature=1.7)),
    "mix-logits": ("as s4, mix logits", partial(_S4, temperature=2.0, mix="logits")),
    "paper": ("as s4, preset paper", partial(_S4, temperature=2.0, preset="paper", mix="logits")),
    "paper-space": (
        "as s4, preset paper, weight_axis space",
        partial(_S4, temperature=2.0, preset="paper", mix="logits", weight_axis="space"),
    ),
    "kd-js": (
        "kd js, T 2, shape of s4",
        partial(_S4, ("kd",), temperature=2.0, kd_divergence="js"),
    ),
    "kd-reverse": (
        "kd reverse, T 2, shape of s4",
        partial(_S4, ("kd",), temperature=2.0, kd_divergence="reverse"),
    ),
    "ce": ("ce, shape of s4", partial(_S4, ("ce",))),
    "default": (
        "ce + kd + hetero, T 2, shape of s4",
        partial(_S4, ("ce", "kd", "hetero"), temperature=2.0),
    ),
    "all": ("ce + kd + hetero + feature, T 2, shape of s4", partial(_S4, _ALL, temperature=2.0)),
    "teacher-s4": (
        "ce + hetero, T 2, B8 C19 512x1024, student stride 8, teacher stride 4",
        partial(_S8, temperature=2.0, teacher=(128, 256)),
    ),
    "stride1": (
        "ce + hetero, T 2, B8 C19 512x1024, logits on the label grid",
        partial(distill, (8, 19, 512, 1024), (512, 1024), temperature=2.0),
    ),
    "align": (
        "ce + hetero, T 2, B8 C19 769x769 from 97x97, align_corners",
        partial(distill, (8, 19, 97, 97), (769, 769), temperature=2.0, align_corners=True),
    ),
    "no-grad": ("as s4, forward without gradients", partial(_S4, temperature=2.0, grad=False)),
    "float64": ("as s4, float64", partial(_S4, temperature=2.0, dtype=torch.float64)),
    "channels-last": (
        "as s4, channels_last logits",
        partial(_S4, temperature=2.0, channels_last=True),
    ),
}

#: The method's own exponentials and logarithms per pixel and class, whatever the code: one
#: exponential per model (another at a temperature other than 1, 2, 4, where both are needed), and
#: what a term adds (the counts of floor.py): a logarithm for the mixture of hetero or js; an
#: exponential for that of logits; for the paper's preset three softplus and two weights.
PAPER_FLOOR: Final[dict[str, float]] = {
    "ce": 1,
    "t1.7": 5,
    "mix-logits": 3,
    "paper": 9,
    "paper-space": 10,
    "kd-js": 3,
    "kd-reverse": 2,
}
_USUAL_FLOOR: Final = 3.0

# --- launches -----------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One launch of a kernel, as the package asked for it."""

    function: Any
    """a triton.JITFunction"""
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        careful = " (careful)" if self.keywords.get("CAREFUL") else ""
        return f"{self.function.__name__}{careful}"

    def values(self) -> dict[str, Any]:
        """Arguments by name; numbers and constants only."""
        bound = dict(zip(self.function.arg_names, self.arguments, strict=False))
        bound.update(self.keywords)
        return {k: v for k, v in bound.items() if isinstance(v, (bool, int, float))}

    def tensors(self) -> list[Tensor]:
        """Each tensor once, however often it stands among the arguments."""
        every = (*self.arguments, *self.keywords.values())
        return list({id(x): x for x in every if isinstance(x, Tensor)}.values())

    @property
    def bytes(self) -> int:
        """Every tensor read or written once."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    @property
    def warps(self) -> int:
        return int(self.keywords.get("num_warps", 4))

    @property
    def pixels_per_thread(self) -> float:
        """What a step of a thread covers: pixels, or elements of a plain kernel."""
        values = self.values()
        if "R" in values and "S" in values:
            return float(values["R"] * values["S"])
        block = values.get("BLOCK", 1) * values.get("BLOCK_C", 1)
        return max(1.0, float(block / (32 * self.warps)))


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    found = importlib.util.find_spec("triton")  # nothing is imported for an answer
    if found is None or found.origin is None:
        return "Triton is not installed (`pip install 'triton>=3.6'`)"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: the kernels are Python functions"
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("cuobjdump", "nvdisasm", "ptxas") if not (tools / name).exists()]
    return f"this Triton comes without {', '.join(missing)}" if missing else None


class _Gpu(Tensor):
    """A tensor without memory that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _GPU


_GPU: Final = torch.device("cuda", 0)
_META: Final = torch.device("meta")


class _PretendGpu(TorchFunctionMode):
    """Whatever torch is asked for is done without memory; a torch without CUDA will do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_without_memory, (args, dict(kwargs or {})))
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return tree_map(_on_gpu, func(*args, **kwargs))


def _without_memory(x: Any) -> Any:
    if isinstance(x, _Gpu):
        return x.as_subclass(Tensor)
    return _META if isinstance(x, torch.device) else x


def _on_gpu(x: Any) -> Any:
    return x.as_subclass(_Gpu) if type(x) is Tensor else x


@cache
def launches_of(case: str) -> tuple[Launch, ...]:
    """Runs a case without a GPU and keeps what it would have launched."""
    from triton.runtime.jit import KernelInterface

    found: list[Launch] = []

    def record(function: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            found.append(Launch(function, tuple(grid), arguments, keywords))

        return call

    with (
        mock.patch.object(KernelInterface, "__getitem__", record),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        _PretendGpu(),
    ):
        CASES[case][1]()
    return tuple(found)


class _Described:
    """A tensor as Triton's launcher looks at it: dtype and a pointer that allocators align."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype

    @staticmethod
    def data_ptr() -> int:
        return 0


class _Source(NamedTuple):
    """A launch as the compiler takes it. Equal ones are one kernel."""

    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    def key(self, function: Any) -> str:
        return repr((function.__module__, function.__name__, *self))


def specialise(launch: Launch, arch: int) -> _Source:
    """What Triton would compile for this launch on a GPU, by its own rules."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    function = launch.function
    binder = create_function_from_signature(function.signature, function.params, backend)
    arguments = [_Described(x) if isinstance(x, Tensor) else x for x in launch.arguments]
    bound, specialization, options = binder(*arguments, **launch.keywords)
    _, signature, constants, attributes = function._pack_args(
        backend, dict(launch.keywords), bound, specialization, options
    )
    return _Source(signature, constants, attributes, options)


# --- machine code -------------------------------------------------------------------------------

#: (file, line), the innermost call first
Frames = tuple[tuple[str, int], ...]


class Instruction(NamedTuple):
    opcode: str
    """with its modifiers: LDG.E.64"""
    conditional: bool
    """under a predicate, or a branch that takes one"""
    label: str | None
    """where a branch goes"""
    frames: Frames

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]


_LINE = re.compile(r'//## File "([^"]*)", line (\d+)( inlined at)?')
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_CODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\(([^)]*)\)")


def parse_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the labels between them; of `nvdisasm -c -gi`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    frames: list[tuple[str, int]] = []
    complete = True  # the chain of calls that stands above the next instruction
    for line in text.splitlines():
        if found := _LINE.search(line):
            if complete:
                frames = []
            frames.append((os.path.basename(found[1]), int(found[2])))
            complete = found[3] is None
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _CODE.match(line):
            predicate, opcode, operands = found.groups()
            target = _TARGET.search(operands)
            instructions.append(
                Instruction(
                    opcode,
                    predicate is not None or bool(re.match(r"!?U?P\d", operands)),
                    target[1] if target else None,
                    tuple(frames),
                )
            )
    return instructions, labels


def _successors(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[list[int]]:
    """The instructions that may follow each one. Calls return to the next one."""
    following = []
    for at, instruction in enumerate(instructions):
        after = [at + 1] if at + 1 < len(instructions) else []
        if instruction.kind in ("EXIT", "RET") and not instruction.conditional:
            after = []
        elif instruction.kind == "BRA" and (label := instruction.label) and label in labels:
            target = labels[label]
            after = [target, *after] if instruction.conditional else [target]
        following.append([x for x in after if x < len(instructions)])
    return following


@dataclass(eq=False)
class Loop:
    """A natural loop of the control flow."""

    body: frozenset[int]
    """instructions, those of inner loops included"""
    parent: Loop | None = None
    inner: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> frozenset[int]:
        return self.body.difference(*(loop.body for loop in self.inner))


def loops_of(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Loop]:
    """All loops, in the order of their first instruction, with their nesting."""
    starts, successors = _blocks(instructions, labels)
    dominators = _dominators(successors)
    predecessors = defaultdict(list)
    for block, after in successors.items():
        for x in after:
            predecessors[x].append(block)
    bodies: dict[int, set[int]] = {}
    for block, after in successors.items():
        for head in after:
            if head in dominators.get(block, ()):
                body = bodies.setdefault(head, {head})
                waiting = [block]
                while waiting:
                    x = waiting.pop()
                    if x not in body:
                        body.add(x)
                        waiting.extend(predecessors[x])
    ends = dict(zip(starts, [*starts[1:], len(instructions)], strict=True))
    loops = [
        Loop(frozenset(i for block in body for i in range(block, ends[block])))
        for body in bodies.values()
    ]
    # the trap behind a kernel's last instruction jumps to itself
    loops = sorted((x for x in loops if len(x.body) > 1), key=lambda x: min(x.body))
    for loop in loops:
        around = [x for x in loops if x is not loop and loop.body < x.body]
        if around:
            loop.parent = min(around, key=lambda x: len(x.body))
            loop.parent.inner.append(loop)
    return loops


def _blocks(
    instructions: Sequence[Instruction], labels: Mapping[str, int]
) -> tuple[list[int], dict[int, list[int]]]:
    """First instructions of basic blocks, and which block may follow which."""
    following = _successors(instructions, labels)
    begins = {0, *(x for x in labels.values() if x < len(instructions))}
    for at, after in enumerate(following):
        if after != [at + 1] and at + 1 < len(instructions):
            begins.add(at + 1)
    starts = sorted(begins)
    last = dict(zip(starts, [x - 1 for x in starts[1:]] + [len(instructions) - 1], strict=True))
    return starts, {block: following[last[block]] for block in starts}


def _dominators(successors: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """Blocks that every way from the entry to a block goes through; of reachable blocks."""
    order: list[int] = []
    seen: set[int] = set()
    waiting = [(0, iter(successors[0]))]
    seen.add(0)
    while waiting:
        block, after = waiting[-1]
        step = next((x for x in after if x not in seen), None)
        if step is None:
            order.append(block)
            waiting.pop()
        else:
            seen.add(step)
            waiting.append((step, iter(successors[step])))
    order.reverse()
    before = defaultdict(list)
    for block in order:
        for x in successors[block]:
            before[x].append(block)
    result: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [result[x] for x in before[block] if x in result]
            new = set.intersection(*known) | {block}
            if result.get(block) != new:
                result[block] = new
                changed = True
    return result


# --- units --------------------------------------------------------------------------------------

#: column -> opcodes; what is in none of them is "other"
_COLUMNS: Final[dict[str, frozenset[str]]] = {
    name: frozenset(opcodes.split())
    for name, opcodes in {
        "MUFU": "MUFU",
        "FP32": "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSET FSETP FCHK FADD2 FMUL2 FFMA2",
        "FP64": "DADD DMUL DFMA DSETP DMNMX",
        "INT": "IADD IADD3 IADD32I IABS IMAD IMNMX VIMNMX VIMNMX3 VIADDMNMX VIADD ISETP LOP LOP3 "
        "PLOP3 LEA SHF SHL SHR SEL MOV MOV32I PRMT SGXT BMSK FLO POPC BREV P2R R2P HFMA2 HADD2 "
        "CS2R I2FP I2IP F2FP R2UR S2UR S2R UIADD3 UIMAD UISETP ULOP3 UPLOP3 ULEA USHF USEL UMOV "
        "UFLO UPOPC UP2UR UR2UP UPRMT USGXT UVIADD UIADD3X UVIMNMX UBMSK UIABS IADD64 UIADD364",
        "CONV": "F2F I2F F2I FRND",
        "LDG": "LDG LD",
        "STG": "STG ST",
        "LDS/STS": "LDS STS LDSM STSM",
        "SHFL": "SHFL",
        "LDC": "LDC ULDC LDCU",
        "BAR": "BAR WARPSYNC DEPBAR LDGDEPBAR MEMBAR ERRBAR CCTL SYNCS",
        "LDL/STL": "LDL STL",
        "MMA": "HMMA HGMMA IMMA UTCHMMA UTCQMMA DMMA QGMMA",
    }.items()
}


class Unit(NamedTuple):
    """What instructions wait for: lanes that it serves per clock and multiprocessor."""

    lanes: float
    kinds: frozenset[str] | None
    """None: every instruction"""


_FMA: Final = frozenset(["FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "IMAD"])
_LSU_COLUMNS: Final = ("LDG", "STG", "LDS/STS", "SHFL", "LDL/STL")
_SLOW: Final = frozenset(["POPC", "FLO", "BREV"])
#: on neither pipe of 64 or 128 lanes: the uniform datapath, special registers, packed arithmetic
_ELSEWHERE: Final = frozenset(
    {x for x in _COLUMNS["INT"] if x.startswith("U")}
    | {"S2R", "S2UR", "R2UR", "CS2R", "FADD2", "FMUL2", "FFMA2"}
)

#: Compute capability 9.0: throughput table of the CUDA programming guide; four schedulers issue one
#: warp instruction per clock each. LSU: one request of 32 lanes per clock, conflicts not counted.
UNITS: Final[dict[str, Unit]] = {
    "issue": Unit(128, None),
    "FP32": Unit(128, _FMA),
    "ALU": Unit(64, (_COLUMNS["FP32"] | _COLUMNS["INT"]) - _FMA - _SLOW - _ELSEWHERE),
    "FP64": Unit(64, _COLUMNS["FP64"]),
    "MUFU": Unit(16, _COLUMNS["MUFU"] | _COLUMNS["CONV"] | _SLOW),
    "LSU": Unit(32, frozenset().union(*(_COLUMNS[x] for x in _LSU_COLUMNS))),
}
MULTIPROCESSORS: Final = 132
CLOCK: Final = 1.755e9
BANDWIDTH: Final = {"peak": 3.35e12, "copies": 3.0e12}


def column_of(kind: str) -> str:
    return next((name for name, kinds in _COLUMNS.items() if kind in kinds), "other")


# --- source -------------------------------------------------------------------------------------


class SourceLoop(NamedTuple):
    """A `for` of a kernel's source."""

    file: str
    function: str
    first: int
    last: int
    iterable: str
    """its `range(...)`"""
    nested: bool
    """inside another one of the same function"""


def called(frames: Frames) -> str:
    """The function that a kernel calls and that an instruction comes from, at whatever depth; the
    kernel itself for its own lines."""
    return function_at(*frames[max(len(frames) - 2, 0)]) if frames else ""


def function_at(file: str, line: int) -> str:
    around = (x.name for x in _functions().get(file, ()) if x.first <= line <= x.last)
    return next(around, file)


class _Function(NamedTuple):
    name: str
    first: int
    last: int


@cache
def _functions() -> dict[str, list[_Function]]:
    return {
        file: [
            _Function(x.name, x.lineno, x.end_lineno or x.lineno)
            for x in module.body
            if isinstance(x, ast.FunctionDef)
        ]
        for file, module in _modules().items()
    }


@cache
def _modules() -> dict[str, ast.Module]:
    """The kernels' source files, as they are now."""
    import heteroakd_fast.kernels as package

    paths = sorted(Path(next(iter(package.__path__))).glob("*.py"))
    return {path.name: ast.parse(path.read_text()) for path in paths}


@cache
def source_loops() -> dict[str, list[SourceLoop]]:
    """By file; inner loops last."""
    result = {}
    for file, module in _modules().items():
        found: list[SourceLoop] = []
        for function in module.body:
            if isinstance(function, ast.FunctionDef):
                _collect(function, file, function.name, False, found)
        result[file] = found
    return result


def _collect(
    node: ast.AST, file: str, function: str, nested: bool, found: list[SourceLoop]
) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.For) and "static_range" not in ast.unparse(child.iter):
            last = child.end_lineno or child.lineno
            iterable = ast.unparse(child.iter)
            found.append(SourceLoop(file, function, child.lineno, last, iterable, nested))
            _collect(child, file, function, True, found)
        else:
            _collect(child, file, function, nested, found)


class Place(NamedTuple):
    """A `for`, and the calls that lead to it."""

    loop: SourceLoop
    calls: Frames


def place_of(frames: Frames) -> Place | None:
    """The innermost `for` around an instruction."""
    for depth, (file, line) in enumerate(frames):
        around = [x for x in source_loops().get(file, ()) if x.first <= line <= x.last]
        if around:
            return Place(around[-1], frames[depth + 1 :])
    return None


#: What the loops of functions are called; others go by the function's name.
_LABELS: Final = {
    "corner_bounds": "bounds",
    "pixel_bounds": "bounds",
    "one_model": "statistics",
    "two_models": "statistics",
    "paper_sums": "statistics",
    "mixed_logits": "mixture",
    "js_sums": "js",
    "squared_difference": "feature",
    "paper_at_label": "at-label",
}


def label_of(place: Place) -> str:
    source = place.loop
    if source.function == "distillation_pass":
        return "gradients" if source.nested else "step"
    if source.function == "collect":
        return "step" if source.nested else "classes"
    return _LABELS.get(source.function, source.function)


# --- a kernel -----------------------------------------------------------------------------------


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
    kinds: dict[str, int]
    """opcode -> instructions, inner loops left out"""
    calls: dict[str, int]
    """which function of the kernel's own calls they come from"""

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    @property
    def spills(self) -> int:
        return self.kinds.get("LDL", 0) + self.kinds.get("STL", 0)


@dataclass
class Kernel:
    """What a launch is compiled to."""

    arch: int
    registers: int
    stack: int
    shared: int
    spill_loads: int
    spill_stores: int
    code_bytes: int
    outside: dict[str, int]
    """opcode -> instructions outside every loop"""
    loops: list[LoopCount]

    @property
    def spills(self) -> int:
        return self.spill_loads + self.spill_stores

    @property
    def inner_spills(self) -> int:
        return sum(loop.spills for loop in self.loops if loop.innermost)

    @property
    def inner_barriers(self) -> int:
        """A tensor that changes its layout in a loop goes through shared memory."""
        return sum(loop.kinds.get("BAR", 0) for loop in self.loops if loop.innermost)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compile_launch(launch: Launch, arch: int) -> tuple[bytes, int]:
    """The machine code (an ELF file) and the bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = specialise(launch, arch)
    compiled = triton.compile(
        ASTSource(launch.function, source.signature, source.constants, source.attributes),
        target=GPUTarget("cuda", arch, 32),
        options=source.options,
    )
    return compiled.asm["cubin"], compiled.metadata.shared


def read_kernel(code: bytes, shared: int, arch: int) -> Kernel:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(code)
        usage = _tool("cuobjdump", "-res-usage", str(file))
        text = _tool("nvdisasm", "-c", "-gi", str(file))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    instructions, labels = parse_sass(text)
    kinds = Counter(x.kind for x in instructions)
    outside, loops = count_loops(instructions, labels)
    return Kernel(
        arch=arch,
        registers=int(numbers[1]),
        stack=int(numbers[2]),
        shared=shared,
        spill_loads=kinds["LDL"],
        spill_stores=kinds["STL"],
        code_bytes=16 * len(instructions),
        outside=outside,
        loops=loops,
    )


def count_loops(
    instructions: Sequence[Instruction], labels: Mapping[str, int]
) -> tuple[dict[str, int], list[LoopCount]]:
    """Instructions outside all loops, and every loop with its name and unroll factor."""
    loops = loops_of(instructions, labels)
    places = [_most_common_place(instructions, loop) for loop in loops]
    names = _names(places)
    counts = []
    for loop, place, name in zip(loops, places, names, strict=True):
        kinds = Counter(instructions[i].kind for i in loop.own)
        counts.append(
            LoopCount(
                name=name,
                source=f"{place.loop.file}:{place.loop.function}" if place else "",
                iterable=place.loop.iterable if place else "",
                innermost=not loop.inner,
                unroll=1.0,
                remainder=False,
                parent=loops.index(loop.parent) if loop.parent else -1,
                kinds=dict(sorted(kinds.items())),
                calls=dict(Counter(called(instructions[i].frames) for i in loop.own).most_common()),
            )
        )
    for same in _siblings(places, counts):
        _set_unroll(same)
    inside = frozenset[int]().union(*(loop.body for loop in loops))
    outside = Counter(x.kind for i, x in enumerate(instructions) if i not in inside)
    return dict(sorted(outside.items())), counts


def _most_common_place(instructions: Sequence[Instruction], loop: Loop) -> Place | None:
    votes = Counter(place_of(instructions[i].frames) for i in loop.own)
    votes.pop(None, None)
    return votes.most_common(1)[0][0] if votes else None


def _names(places: Sequence[Place | None]) -> list[str]:
    """Labels; the second `for` with the same label gets a 2, in the order of the code."""
    known: dict[str, list[Place | None]] = defaultdict(list)
    names = []
    for place in places:
        label = label_of(place) if place else "unnamed"
        if place not in known[label]:
            known[label].append(place)
        number = known[label].index(place)
        names.append(label if number == 0 else f"{label} {number + 1}")
    return names


def _siblings(
    places: Sequence[Place | None], counts: Sequence[LoopCount]
) -> Iterable[list[LoopCount]]:
    groups: dict[Any, list[LoopCount]] = defaultdict(list)
    for place, count in zip(places, counts, strict=True):
        if place is not None:
            groups[place, count.parent].append(count)
    return groups.values()


def _set_unroll(same: list[LoopCount]) -> None:
    """Loops of one `for` under one parent: their loads are multiples of the rolled loop's."""
    weights = [loop.kinds.get("LDG", 0) or loop.instructions for loop in same]
    least = min(weights)
    for loop, weight in zip(same, weights, strict=True):
        loop.unroll = float(round(weight / least))
        loop.remainder = len(same) > 1 and weight == least
    # Older line information does not say which call a loop comes from: the second loop with the
    # same factor is another one.
    known: Counter[float] = Counter()
    for loop in same:
        known[loop.unroll] += 1
        if known[loop.unroll] > 1:
            loop.name += f" (copy {known[loop.unroll]})"


# --- how often, how long ------------------------------------------------------------------------


def executions(kernel: Kernel, launch: Launch) -> list[float]:
    """How often one warp runs each loop of the machine code."""
    times = [0.0] * len(kernel.loops)
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for at, loop in enumerate(kernel.loops):
        groups[loop.name, loop.parent].append(at)
    # parents stand before the loops inside them
    for (_, parent), members in sorted(groups.items(), key=lambda item: item[0][1]):
        left = _trips(kernel.loops[members[0]].iterable, launch) or 1.0
        around = 1.0 if parent < 0 else times[parent]
        for at in sorted(members, key=lambda i: -kernel.loops[i].unroll):
            unroll = kernel.loops[at].unroll
            runs = left // unroll if len(members) > 1 else left / unroll
            left -= runs * unroll
            times[at] = around * runs
    return times


def _trips(iterable: str, launch: Launch) -> float | None:
    """The length of a `range(...)` over the launch's arguments; None where it needs other numbers,
    and such a loop is counted once."""
    if not iterable.startswith("range("):
        return None
    try:
        return float(len(eval(iterable, {"__builtins__": {}, "range": range}, launch.values())))
    except (NameError, TypeError):
        return None


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


def cost_of(kernel: Kernel, launch: Launch) -> Cost:
    programs = math.prod(launch.grid)
    executed: Counter[str] = Counter()
    parts = [(kernel.outside, 1.0)]
    parts += zip((x.kinds for x in kernel.loops), executions(kernel, launch), strict=True)
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
        complete=all(_trips(loop.iterable, launch) is not None for loop in kernel.loops),
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


def images(launch: Launch) -> int:
    """The first axis of the grid counts the programs of all images."""
    values = launch.values()
    return int(launch.grid[0]) // int(values["blocks" if "blocks" in values else "programs"])


def elements(launch: Launch) -> float | None:
    """Pixels times classes of a pass, logits of a sum of gradients."""
    values = launch.values()
    if "label_h" in values:
        return float(values["label_h"] * values["label_w"] * values["classes"] * images(launch))
    if "height" in values:
        return float(values["height"] * values["width"] * values["classes"] * images(launch))
    return None


def method_bytes(launches: Sequence[Launch]) -> int | None:
    """What any implementation moves: logits and labels read once, the gradient written once; None
    for launches of other kernels."""
    passes = [x for x in launches if x.function.__name__ == "distillation_pass"]
    if not passes:
        return None
    first = passes[0]
    names = dict(zip(first.function.arg_names, first.arguments, strict=False))
    moved = {id(names[x]): names[x] for x in ("student", "teacher", "target")}
    total = sum(x.numel() * x.element_size() for x in moved.values())
    if any(x.function.__name__ == "combine_gradients" or x.values().get("GRAD") for x in launches):
        total += names["student"].numel() * names["student"].element_size()
    return int(total)


# --- all cases ----------------------------------------------------------------------------------


class Job(NamedTuple):
    case: str
    number: int
    """of the launch in its case"""
    arch: int


@dataclass
class Row:
    """A launch of a case, compiled for one architecture."""

    case: str
    name: str
    arch: int
    launch: Launch
    kernel: Kernel
    same_as: str
    """an earlier case that compiles to this very kernel"""


def _quiet() -> None:
    """Triton tells every process about its default of fused multiply-adds."""
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    warnings.filterwarnings("ignore", message=".*fp_fusion.*")


def _compile_job(job: Job) -> Kernel | str:
    try:
        code, shared = compile_launch(launches_of(job.case)[job.number], job.arch)
        return read_kernel(code, shared, job.arch)
    except Exception as error:  # the compiler's own exceptions are many
        return f"{type(error).__name__}: {str(error)[:500]}"


def chosen(cases: Sequence[str], archs: Sequence[int], quick: bool) -> list[Job]:
    """The launches to look at. Careful twins, which run where logits are extreme, for one
    architecture only; quick: what a test has the time for."""
    jobs = []
    for arch in archs:
        for case in cases:
            if quick and arch != MAIN_ARCH and case not in QUICK_CASES:
                continue
            for number, launch in enumerate(launches_of(case)):
                careful = launch.keywords.get("CAREFUL")
                if careful and (arch != MAIN_ARCH or (quick and case not in QUICK_CAREFUL)):
                    continue
                jobs.append(Job(case, number, arch))
    return jobs


#: Other architectures, and careful twins, of a quick run.
QUICK_CASES: Final = ("s4", "stride1")
QUICK_CAREFUL: Final = ("s4",)


def compile_jobs(chosen_jobs: Sequence[Job], processes: int) -> tuple[list[Row], list[str]]:
    """Every launch, equal ones compiled once; and what failed."""
    _modules()  # of the same moment as the kernels that were imported
    jobs: dict[tuple[str, int], Job] = {}
    wanted: list[tuple[Job, str]] = []
    for job in chosen_jobs:
        launch = launches_of(job.case)[job.number]
        key = specialise(launch, job.arch).key(launch.function)
        jobs.setdefault((key, job.arch), job)
        wanted.append((job, key))
    context = multiprocessing.get_context("fork")
    # passes take longest: start with them
    order = sorted(
        jobs.values(), key=lambda job: "pass" not in launches_of(job.case)[job.number].name
    )
    with ProcessPoolExecutor(processes, context, initializer=_quiet) as pool:
        compiled = dict(zip(order, pool.map(_compile_job, order), strict=True))
    rows: list[Row] = []
    failures = []
    for job, key in wanted:
        source = jobs[key, job.arch]
        kernel = compiled[source]
        name = _kernel_name(job)
        if isinstance(kernel, str):
            failures.append(f"{job.case} | {name} | sm_{job.arch} does not compile: {kernel}")
            continue
        launch = launches_of(job.case)[job.number]
        same = "" if source.case == job.case else source.case
        rows.append(Row(job.case, name, job.arch, launch, kernel, same))
    return rows, failures


def _kernel_name(job: Job) -> str:
    """The function's name; a number where a case launches it more than once."""
    launches = launches_of(job.case)
    name = launches[job.number].name
    before = [x.name for x in launches[: job.number]].count(name)
    return f"{name} {before + 1}" if before else name


def loop_costs(row: Row) -> dict[str, dict[str, float]]:
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


# --- ceilings -----------------------------------------------------------------------------------


def check(rows: Sequence[Row], ceilings: Mapping[str, Any], triton_version: str) -> list[str]:
    """What is over its ceiling, in words. Instruction counts and small spills are those of one
    compiler; with another one, only what no compiler may do is held."""
    same_compiler = _minor(triton_version) == _minor(ceilings.get("triton", ""))
    problems = []
    for row in rows:
        where = f"{row.case} | {row.name} | sm_{row.arch}"
        limits = {
            **ceilings["defaults"],
            **ceilings["kernels"].get(f"sm_{row.arch}", {}).get(f"{row.case} | {row.name}", {}),
        }
        found: dict[str, float] = {"registers": row.kernel.registers}
        if same_compiler or not row.launch.keywords.get("CAREFUL"):
            found["spills in an innermost loop"] = row.kernel.inner_spills
        if same_compiler:
            found |= {"spills": row.kernel.spills, "shared": row.kernel.shared}
        for what, value in found.items():
            if value > limits.get(what, 0):
                problems.append(f"{where}: {what} {value:g}, ceiling {limits.get(what, 0):g}")
        if same_compiler:
            problems += _check_loops(row, limits.get("loops", {}), where)
    return problems


def _check_loops(row: Row, limits: Mapping[str, float], where: str) -> list[str]:
    costs = loop_costs(row)
    problems = [f"{where}: loop {name} is gone" for name in limits if name not in costs]
    for name, limit in limits.items():
        if name in costs and costs[name]["all"] > limit:
            found = f"{costs[name]['all']:.2f} instructions per pixel and class"
            problems.append(f"{where}: loop {name} {found}, ceiling {limit:g}")
    return problems


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def new_ceilings(rows: Sequence[Row], triton_version: str) -> dict[str, Any]:
    """Ceilings that these kernels just keep. Loops of the careful twins, which run where logits are
    extreme, and of other architectures are not held; theirs alone may spill, if listed."""
    kernels: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        entry: dict[str, Any] = {}
        if row.kernel.spills:
            entry["spills"] = row.kernel.spills
        if row.kernel.shared > _DEFAULTS["shared"]:
            entry["shared"] = row.kernel.shared
        held = row.arch == MAIN_ARCH and not row.launch.keywords.get("CAREFUL")
        if row.kernel.inner_spills and not held:
            entry["spills in an innermost loop"] = row.kernel.inner_spills
        if held and not row.same_as:
            loops = loop_costs(row)
            entry["loops"] = {
                name: math.ceil(100 * costs["all"] * (1 + SLACK)) / 100
                for name, costs in loops.items()
            }
        if entry:
            kernels[f"sm_{row.arch}"][f"{row.case} | {row.name}"] = entry
    return {"triton": triton_version, "defaults": dict(_DEFAULTS), "kernels": dict(kernels)}


_DEFAULTS: Final = {"registers": 255, "spills": 0, "spills in an innermost loop": 0, "shared": 64}


# --- report -------------------------------------------------------------------------------------


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    result = []
    for row in rows:
        kernel = row.kernel
        entry: dict[str, Any] = {
            "case": row.case,
            "kernel": row.name,
            "arch": row.arch,
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
            "loops": [_loop_json(row, loop) for loop in kernel.loops],
        }
        if row.arch == MAIN_ARCH and not row.launch.keywords.get("CAREFUL"):
            cost = cost_of(kernel, row.launch)
            entry["paper"] = {
                **asdict(cost),
                "binding": cost.binding,
                "bound_us": cost.bound_us,
                "elements": elements(row.launch),
            }
        result.append(_rounded(entry))
    return result


_TILES: Final = ("R", "S", "SUB_R", "SUB_C", "TI", "N", "BLOCK", "BLOCK_C", "num_warps")


def _loop_json(row: Row, loop: LoopCount) -> dict[str, Any]:
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


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


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
    rows: Sequence[Row], triton_version: str, others: Mapping[str, list[dict[str, Any]]]
) -> str:
    main = [x for x in rows if x.arch == MAIN_ARCH and not x.launch.keywords.get("CAREFUL")]
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
        "## Cases, forward + backward, sm_90\n\n" + _case_table(main),
        "## Kernels, sm_90\n\n" + _kernel_table(main),
        "## Loops, sm_90\n\nPer pixel and class; *step* per pixel, loops over classes left out; of "
        "`combine_gradients`, `reduce` and `finish_sums`: per element and iteration.\n\n"
        + _loop_table(main),
        "## What a step consists of\n\nInstructions per pixel outside the loops over classes, by "
        "the function that the kernel calls; sm_90, the ten largest.\n\n" + _step_tables(main),
        "## Other architectures, and careful twins\n\nRegisters, and spills (LDL + STL; * inside "
        "an innermost loop); +: barriers inside one.\n\n" + _arch_table(rows),
    ]
    if others:
        parts.append("## Other versions of Triton\n\nThe same.\n\n" + _version_table(rows, others))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _case_table(rows: Sequence[Row]) -> str:
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
    for case, members in _by_case(rows).items():
        costs = [cost_of(x.kernel, x.launch) for x in members]
        total = sum(x.bound_us for x in costs) / 1e3
        heaviest = max(costs, key=lambda x: x.bound_us)
        work = max(elements(x.launch) or 0.0 for x in members)
        special = PAPER_FLOOR.get(case, _USUAL_FLOOR) * work
        moved = method_bytes(launches_of(case))
        cells.append(
            [
                case,
                CASES[case][0],
                f"{total:.3f}",
                heaviest.binding,
                f"{sum(x.memory_us for x in costs) / 1e3:.3f}",
                f"{1e3 * special / (16 * MULTIPROCESSORS * CLOCK):.3f}" if moved else "",
                f"{1e3 * moved / BANDWIDTH['peak']:.3f}" if moved else "",
            ]
        )
    return _table(header, cells)


def _by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        result[row.case].append(row)
    return result


def _kernel_table(rows: Sequence[Row]) -> str:
    header = ["case", "kernel", "registers", "stack", "LDL / STL", "inner", "shared", "code KiB"]
    header += ["warps fit / given", "imbalance", "instr. per element", "MUFU", "time us", "binds"]
    header += ["memory us"]
    cells = []
    for row in rows:
        kernel, cost, work = row.kernel, cost_of(row.kernel, row.launch), elements(row.launch)
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
    return _table(header, cells)


def _loop_table(rows: Sequence[Row]) -> str:
    columns = [*_COLUMNS, "other"]
    found = []
    used = set[str]()
    for row in rows:
        if not row.same_as:
            for name, costs in loop_costs(row).items():
                loop = next(x for x in row.kernel.loops if x.name == name and not x.remainder)
                found.append((row, name, loop.unroll, costs))
                used |= costs.keys()
    columns = [x for x in columns if x in used]
    header = ["case", "kernel", "loop", "unrolled", "all", *columns]
    cells = [
        [row.case, row.name, name, f"{unroll:g}", f"{costs['all']:.2f}"]
        + [f"{costs[x]:.2f}" if x in costs else "" for x in columns]
        for row, name, unroll, costs in found
    ]
    return _table(header, cells)


def _step_tables(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        step = next((x for x in row.kernel.loops if x.name == "step" and not x.innermost), None)
        if step is not None and not row.same_as:
            pixels = row.launch.pixels_per_thread
            largest = Counter(step.calls).most_common(10)
            found = ", ".join(f"{name} {count / pixels:.1f}" for name, count in largest)
            cells.append([row.case, row.name, f"{step.instructions / pixels:.1f}", found])
    return _table(["case", "kernel", "all", "of which"], cells)


def _spilled(kernel: Kernel) -> str:
    mark = ("*" if kernel.inner_spills else "") + (" +" if kernel.inner_barriers else "")
    return f"{kernel.registers}, {kernel.spills}{mark}"


def _arch_table(rows: Sequence[Row]) -> str:
    archs = sorted({x.arch for x in rows})
    known: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        known[row.case, row.name][row.arch] = row
    cells = [
        [case, name, *(_spilled(by[a].kernel) if a in by else "" for a in archs)]
        for (case, name), by in known.items()
        if not all(row.same_as for row in by.values())
    ]
    return _table(["case", "kernel", *(f"sm_{a}" for a in archs)], cells)


def _version_table(rows: Sequence[Row], others: Mapping[str, list[dict[str, Any]]]) -> str:
    versions = sorted(others)
    known = {
        version: {(x["case"], x["kernel"], x["arch"]): x for x in table}
        for version, table in others.items()
    }
    cells = []
    for row in rows:
        if row.same_as:
            continue
        line = [row.case, row.name, f"sm_{row.arch}", _spilled(row.kernel)]
        for version in versions:
            other = known[version].get((row.case, row.name, row.arch))
            line.append(_other_spilled(other) if other else "")
        if any(line[4:]):
            cells.append(line)
    return _table(["case", "kernel", "arch", "this", *versions], cells)


def _other_spilled(entry: Mapping[str, Any]) -> str:
    mark = "*" if entry["spills_in_innermost_loops"] else ""
    mark += " +" if entry.get("barriers_in_innermost_loops") else ""
    return f"{entry['registers']}, {entry['spill_loads'] + entry['spill_stores']}{mark}"


def write_report(rows: Sequence[Row], triton_version: str, directory: Path) -> None:
    """Other versions' tables stay in the file until the same version is run again."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "resources.json"
    runs: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    runs[triton_version] = as_json(rows)
    assumed = {"multiprocessors": MULTIPROCESSORS, "clock_hz": CLOCK, "bytes_per_s": BANDWIDTH}
    file.write_text(_lines({"measured": False, "assumed": assumed, "runs": runs}))
    if triton_version == max(runs, key=_version_key):
        others = {version: table for version, table in runs.items() if version != triton_version}
        text = as_markdown(rows, triton_version, others)
        (directory / "resources.md").write_text(text)


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for each launch, so that a difference can be read."""
    places: dict[str, str] = {}

    def place(row: Any) -> str:
        name = f"row {len(places)}"
        places[json.dumps(name)] = json.dumps(row)
        return name

    runs = {version: [place(row) for row in rows] for version, rows in content["runs"].items()}
    text = json.dumps({**content, "runs": runs}, indent=1)
    return re.sub(r'"row \d+"', lambda found: places[found[0]], text) + "\n"


def _version_key(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)]


# --- command line -------------------------------------------------------------------------------


@contextmanager
def _own_launch_table() -> Iterator[None]:
    """A table of measured launches is one machine's; the static one is what is looked at."""
    with mock.patch.dict(os.environ):
        os.environ.pop("HETEROAKD_TRITON_CONFIG", None)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if reason := unavailable():
        print(f"benchmarks.resources: {reason}", file=sys.stderr)
        return 2
    unknown = [x for x in options.cases if x not in CASES]
    if unknown:
        print(f"benchmarks.resources: no case {unknown}; known: {[*CASES]}", file=sys.stderr)
        return 2
    _quiet()
    with _own_launch_table():
        rows, failures = compile_jobs(
            chosen(options.cases, options.arch, options.quick), options.processes
        )
    import triton

    code = 0
    if options.update:
        ceilings = new_ceilings(rows, triton.__version__)
        options.ceilings.write_text(json.dumps(ceilings, indent=1) + "\n")
    if options.check:
        ceilings = json.loads(options.ceilings.read_text())
        failures += check(rows, ceilings, triton.__version__)
        print(f"{len(rows)} kernels, {len(failures)} problems")
    if options.output is not None:
        write_report(rows, triton.__version__, options.output)
    for failure in failures:
        print(failure)
        code = 1
    if not (options.check or options.update or options.output):
        main_rows = [x for x in rows if not x.launch.keywords.get("CAREFUL")]
        print(_kernel_table(main_rows), _loop_table(main_rows), sep="\n\n")
    return code


def _listed(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=_numbers, default=list(ARCHS), help="such as 80,90,100")
    parser.add_argument("--cases", type=_listed, default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="what the test looks at: a minute")
    parser.add_argument("--output", type=Path, help="directory of resources.json and resources.md")
    parser.add_argument("--check", action="store_true", help="1 if a ceiling is exceeded")
    parser.add_argument("--update", action="store_true", help="write ceilings from these numbers")
    parser.add_argument("--ceilings", type=Path, default=CEILINGS, help="file of ceilings")
    parser.add_argument("--processes", type=int, default=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
