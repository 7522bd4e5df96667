"""`python -m benchmarks.kernels`: what the headline's GPU kernels are compiled to; needs no GPU.

Read off the machine code: registers; bytes that spills and other local memory move in all of it;
bytes of shared memory of a block, as far as the code says; instructions of a thread per pixel and
class, and those of special functions, shared, global and local memory; instructions per pixel.

Per pixel and class are innermost loops, with what is predicated; per pixel is what else the loops
around them have. A loop is called by the function that it stands in, with the constants and types
among the template arguments of the calls that lead there; of CUDA's those count that a call with
float32 logits at T = 2 runs, but for what stages logits. Branches that are not taken count too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

from heteroakd_fast import functional
from heteroakd_fast._requirements import explain
from heteroakd_fast.backends import Call
from heteroakd_fast.spec import LossSpec, plan

from .markdown import table

ROOT: Final = Path(__file__).resolve().parents[1]
CEILINGS: Final = Path(__file__).with_suffix(".json")
ARCH: Final = "90a"  # of the ceilings
UNITS: Final = {
    "special": {"MUFU"},
    "shared": {"LDS", "STS", "LDSM", "STSM"},
    "global": {"LDG", "STG", "LDGSTS", "LD", "ST"},
    "local": {"LDL", "STL"},
}
#: What has a ceiling, by how much of what was measured.
HELD: Final = {"registers": 1, "spilled": 1, "local": 1, "instructions": 1.02, "per pixel": 1.02}
Row = dict[str, Any]


class Cuda(NamedTuple):
    file: str
    symbol: str  # a pattern of its mangled name
    pixels: int  # of a thread at a time
    loops: Mapping[str, int]  # that run, and the classes of an iteration that the source asks for


_CELLS: Final = {"cell_statistics<2>": 1, "cell_gradients<2, true>": 1}
_LABELS: Final = {"maxima": 4, "statistics<2>": 2}
_SEGMENTS: Final = {"sweep_cells<float>": 2, "find_statistics": 1, "gradients": 1}
_OWN: Final = _SEGMENTS | {"for_each_class": 1}
CUDA: Final = {
    "cells: ce": Cuda("cells_ce.cu", "", 16, {x.replace("2", "1"): 1 for x in _CELLS}),
    "cells: ce + hetero": Cuda("cells_ce_hetero.cu", "", 16, _CELLS),
    "cells: ce + kd + hetero": Cuda("cells_ce_kd_hetero.cu", "", 16, _CELLS),
    "labels: forward": Cuda("labels_grid.cu", "Li0ELi0ELi0E.*4ELb0", 4, _LABELS | {"find_late": 2}),
    "labels: backward": Cuda(
        "labels_grid.cu", "Li0ELi0ELi0E.*4ELb1", 4, _LABELS | {"gradients<2>": 2}
    ),
    "segments: mixed logits": Cuda("segments_fixed.cu", "Li0ELi0ELi1E", 4, _OWN),
    "segments: paper": Cuda("segments_fixed.cu", "Li0ELi0ELin1ELi3E", 4, _OWN),
    "segments: reverse kd": Cuda("segments_fixed.cu", "Li0ELi1E", 4, _OWN),
    "segments: js": Cuda("segments_fixed.cu", "Li0ELi2E", 4, _OWN),
    "segments: any terms": Cuda(
        "segments.cu", "segment_kernelIf.*6KdTerm.*HeteroTerm(?!.*PaperTerm)", 4, {"gradients": 1}
    ),
    "sum of gradients": Cuda("sums.cu", "combine_gradients_kernelIf", 4, {}),
}


def distill(
    shape: tuple[int, int, int, int],
    labels: tuple[int, int],
    *terms: str,
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
    teacher: tuple[int, int] | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    temperature: float = 2.0,
    **options: Any,
) -> None:
    """Launches Triton's kernels for a step of the loss (grad=False: an evaluation) on "cuda"."""
    launch = importlib.import_module("heteroakd_fast.kernels.launch")
    weights = {f"{term}_weight": 1.0 for term in terms or ("ce", "hetero")}
    flat = {"ce_weight": 0.0, **weights, "temperature": temperature, **options}
    encoded, numbers = functional.encode_flat(flat, False)
    (one,) = plan(encoded, False, False, ())
    spec = LossSpec((255, 0, 0, 255, *one.structure), numbers)
    student = torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout)
    other = torch.empty(*shape[:2], *(teacher or shape[2:]), dtype=dtype, device="cuda")
    target = torch.empty(shape[0], *labels, dtype=torch.int64, device="cuda")
    call = Call.of((student, None, None, other, None, None, target, None, None), spec)
    step = launch.passes_of(call)[0]
    sums = torch.empty(len(one.names), dtype=torch.float64, device="cuda")
    report = torch.empty(4, dtype=torch.int64, device="cuda")
    saved = launch.forward(step, target, None, sums, sums.clone(), report, None, grad)
    if grad:
        launch.backward(step, target, None, sums, saved)


def evaluate(
    shape: tuple[int, int, int, int], labels: tuple[int, int], dtype: torch.dtype, counts: bool
) -> None:
    """Launches Triton's kernel of `predict` or, with counts, of `confusion_matrix`."""
    predict = importlib.import_module("heteroakd_fast.kernels.predict")
    logits = torch.empty(shape, dtype=dtype, device="cuda")
    if counts:
        target = torch.empty(shape[0], *labels, dtype=torch.uint8, device="cuda")
        predict.confusion_matrix(logits, target, 255, True)
    else:
        predict.predict(logits, labels, False, torch.uint8)


_S4: Final = partial(distill, (8, 19, 128, 256), (512, 1024))
_C150: Final = partial(distill, (8, 150, 128, 128), (512, 512))
_JS: Final = partial(_S4, "kd", kd_divergence="js")
#: Triton's pass: ten of the headline, then other variants. 19 classes, stride 4, or as it says.
TRITON: Final = {
    "ce": partial(_S4, "ce"),
    "ce + hetero": _S4,
    "ce + hetero (stride 8)": partial(distill, (8, 19, 64, 128), (512, 1024)),
    "ce + hetero (150 classes)": _C150,
    "ce + kd + hetero": partial(_S4, "ce", "kd", "hetero"),
    "mixed logits": partial(_S4, mix="logits"),
    "paper": partial(_S4, preset="paper", mix="logits"),
    "reverse kd": partial(_S4, "kd", kd_divergence="reverse"),
    "js": _JS,
    "labels: backward": partial(distill, (8, 19, 512, 1024), (512, 1024)),
    "no gradients": partial(_S4, grad=False),
    "all terms, float64": partial(_S4, "ce", "kd", "hetero", "feature", dtype=torch.float64),
    "T 1.7, teacher's grid": partial(_C150, teacher=(64, 64), temperature=1.7),
    "paper over space": partial(_S4, preset="paper", mix="logits", weight_axis="space"),
    "js, 16 bits": partial(_JS, dtype=torch.bfloat16, layout=torch.channels_last),
    "predict": partial(evaluate, (8, 150, 128, 128), (512, 512), torch.float32, False),
    "predict, labels": partial(evaluate, (8, 19, 512, 512), (512, 512), torch.bfloat16, False),
    "confusion matrix": partial(evaluate, (8, 150, 128, 128), (512, 512), torch.float64, True),
}
NAMES: Final = (*(f"CUDA {x}" for x in CUDA), *(f"Triton {x}" for x in [*TRITON][:10]))

Frames = tuple[tuple[str, int], ...]  # (file, line), then of the inlined calls that lead there


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: LDG.E.64
    following: list[int]  # places of the instructions that may come next
    frames: Frames


Kernel = tuple[int, int, list[Instruction]]  # registers, shared memory, code
_LINE: Final = re.compile(r'//## File "([^"]*)", line (\d+)( inlined at)?')
_LABEL: Final = re.compile(r"^([.$\w]+):\s*$")
_CODE: Final = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_FUNCTION: Final = re.compile(
    r"^def (\w+)|\b(?:HAKD_DEVICE|HAKD_FN|__device__|__global__)\b[^;{}=#]*?\b(?!__)(\w+)\(",
    re.MULTILINE,
)


def parse_sass(text: str) -> list[Instruction]:
    """One kernel of `nvdisasm -c -gi`, without the functions that it calls."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    targets: list[list[str]] = []
    frames: Frames = ()
    complete = True  # the chain of calls above the next instruction
    for line in text.splitlines():
        if at := _LINE.search(line):
            frames = (*(() if complete else frames), (at[1], int(at[2])))
            complete = at[3] is None
        elif at := _LABEL.match(line):
            if at[1].startswith("$"):
                break
            labels[at[1]] = len(code)
        elif at := _CODE.match(line):
            predicate, opcode, operands = at.groups()
            ends = predicate is None and re.match(r"EXIT|RET|BRX|BRA\S* `", f"{opcode} {operands}")
            targets.append(re.findall(r"\.L\w+", operands) if opcode[:2] == "BR" else [])
            code.append(Instruction(opcode, [] if ends else [len(code) + 1], frames))
    for instruction, names in zip(code, targets, strict=True):
        instruction.following.extend(labels[x] for x in names if x in labels)
    return code


def _natural_loops(code: Sequence[Instruction]) -> list[tuple[frozenset[int], int]]:
    """What each backward branch repeats (blocks laid out elsewhere included), and the branch."""
    before: dict[int, list[int]] = defaultdict(list)
    for i, instruction in enumerate(code):
        for following in instruction.following:
            before[following].append(i)
    loops: dict[int, tuple[frozenset[int], int]] = {}
    for i, instruction in enumerate(code):
        for head in (x for x in instruction.following if x < i):
            members, waiting = {head}, [i]
            while waiting:
                if (x := waiting.pop()) not in members:
                    members.add(x)
                    waiting += before[x]
            if head == 0 or 0 not in members:  # else the return from a block out of line
                loops[head] = loops.get(head, (frozenset[int](), 0))[0] | members, i
    return list(loops.values())


def loops_of(code: Sequence[Instruction]) -> tuple[list[tuple[str, Counter[str], int]], int]:
    """Name, opcodes and unrolled iterations of each innermost loop (0: it does what an
    unrolled copy leaves over); and the number of instructions in the loops around them."""
    found = _natural_loops(code)
    inner = [(x, i) for x, i in found if not any(y < x for y, _ in found)]
    copies: dict[Frames, list[tuple[int, Counter[str]]]] = defaultdict(list)
    for members, branch in inner:
        kinds = Counter(code[i].opcode.split(".")[0] for i in members)
        copies[code[branch].frames].append((kinds["LDG"] + kinds["LDS"] or kinds.total(), kinds))
    loops = []
    for frames, same in copies.items():
        least, most = min(x for x, _ in same), max(x for x, _ in same)
        for loads, kinds in same:
            left_over = loads == least and most >= 2 * least
            loops.append((_name(frames), kinds, 0 if left_over else round(loads / least)))
    around = frozenset[int]().union(*(x for x, _ in found)).difference(*(x for x, _ in inner))
    return loops, len(around)


@cache
def _at(file: str, line: int) -> tuple[str, str]:
    """The function that a line stands in, and the line."""
    before = Path(file).read_text().splitlines()[:line] if Path(file).is_file() else []
    functions = ["".join(x) for x in _FUNCTION.findall("\n".join(before))]
    return "".join(functions[-1:]), "".join(before[-1:])


def _name(frames: Frames) -> str:
    lists = re.findall(r"\w<([\w, ]+)>\(", " ".join(_at(*x)[1] for x in frames[1:]))
    arguments = [x for x in ", ".join(lists).split(", ") if re.fullmatch(r"[a-z0-9_]+", x)]
    return "".join(_at(*x)[0] for x in frames[:1]) + f"<{', '.join(arguments)}>" * bool(arguments)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit or of the Triton wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wheel = Path(getattr(importlib.util.find_spec("triton"), "origin", None) or "").parent
    folders = [*([f"{home}/bin"] if home else os.get_exec_path()), f"{wheel}/backends/nvidia/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def _output(name: str, *arguments: str) -> str:
    if (path := tool(name)) is None:
        raise FileNotFoundError(
            f"{name}: it is neither on PATH, in CUDA_HOME nor in Triton's wheel"
        )
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def read_cubin(cubin: bytes) -> dict[str, Kernel]:
    """Kernels by their mangled names."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(cubin)
        usage = _output("cuobjdump", "-res-usage", file.name)
        text = _output("nvdisasm", "-c", "-gi", file.name)
    parts = re.split(r"^\t\.section\t\.text\.([^,\s]+)", text, flags=re.MULTILINE)
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", usage)
    return {x: (int(registers), int(shared), parse_sass(code[x])) for x, registers, shared in found}


def compile_cuda(source: Path, arch: str, *more: str) -> bytes:
    """Of the flags of setup.py those that kernels notice; warnings are errors. What is compiled is
    kept in the folder for temporary files, by the digest of what it comes from."""
    setup = (ROOT / "setup.py").read_text()
    major, minor = re.findall(r"^TORCH_TARGET = \((\d+), (\d+)\)", setup, re.MULTILINE)[0]
    flags = [
        *("-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{arch}", "-Wno-deprecated-gpu-targets"),
        f"-DTORCH_TARGET_VERSION=0x{int(major):02x}{int(minor):02x}{0:012x}",
        f"-DHAKD_TORCH_TARGET={major}.{minor}",
        *(
            "-isystem",
            str(Path(torch.__file__).parent / "include"),
            "-Werror",
            "all-warnings",
            *more,
        ),
    ]
    parts = [x.read_bytes() for x in (source, *sorted((ROOT / "csrc").rglob("*.*h")))]
    key = repr((str(source), flags, _output("nvcc", "--version"), parts)).encode()
    folder = Path(tempfile.gettempdir()) / f"heteroakd-cubins-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    cubin = folder / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:20]}"
    if not cubin.exists():
        made = cubin.with_suffix(f".{os.getpid()}")
        _output("nvcc", "-cubin", *flags, "-o", str(made), str(source))
        made.rename(cubin)  # whole, or not there
    return cubin.read_bytes()


def compile_triton(case: str, arch: int, careful: bool = False) -> list[tuple[Any, int]]:
    """The kernels of a case, and the pixels that a thread has at a time. The package's own launches
    are made, on tensors without memory. careful: the exact fallbacks are compiled too."""
    from torch._subclasses import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, MockTensor

    compiled, run = [], JITFunction.run
    no_gpu = mock.Mock(get_current_device=lambda: arch)  # kernels are kept by device
    no_gpu.get_current_target.return_value = GPUTarget("cuda", arch, 32)

    def warm_up(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if careful or not named.get("CAREFUL"):
            pixels = named.get("R", 1) * named.get("S", 1)
            types = tree_map_only(torch.Tensor, lambda x: MockTensor(x.dtype), (given, named))
            compiled.append((run(self, *types[0], grid=grid, warmup=True, **types[1]), pixels))

    with (
        mock.patch.object(driver, "_active", no_gpu),
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(torch.cuda, "device", nullcontext),
        mock.patch.object(torch.Tensor, "contiguous", lambda x: x.new_empty(x.shape)),
        FakeTensorMode(),
    ):
        TRITON[case]()
    return compiled


def row_of(name: str, kernel: Kernel, pixels: int, run: Mapping[str, int]) -> Row:
    """run: the loops that run, and the classes of their iterations; empty: all loops, one class."""
    registers, shared, code = kernel
    loops, around = loops_of(code)
    if gone := run.keys() - {x for x, _, _ in loops}:
        raise RuntimeError(f"{name}: got no loop {', '.join(sorted(gone))}; see CUDA")
    local = [x.opcode for x in code if x.opcode.startswith(("LDL", "STL"))]
    spilled = sum(16 if ".128" in x else 8 if ".64" in x else 4 for x in local)
    row: Row = {"kernel": name, "registers": registers, "spilled": spilled, "block": shared}
    row |= dict.fromkeys(("instructions", *UNITS), 0.0) | {"per pixel": around / pixels}
    row["loops"] = defaultdict(float)
    for loop, kinds, unroll in loops:
        if unroll and (loop in run or not run):
            each = 1 / (unroll * pixels * run.get(loop, 1))
            row["instructions"] += each * kinds.total()
            row["loops"][loop] += each * kinds.total()
            for unit, opcodes in UNITS.items():
                row[unit] += each * sum(kinds[x] for x in opcodes)
    return row


def rows_of(names: Sequence[str], arch: str = ARCH) -> list[Row]:
    """Compiles kernels of `NAMES` and reads them."""
    rows = []
    for name in names:
        backend, case = name.split(" ", 1)
        if backend == "CUDA":
            file, symbol, pixels, run = CUDA[case]
            found = read_cubin(compile_cuda(ROOT / "csrc" / "cuda" / file, arch))
            kernel = next(x for mangled, x in found.items() if re.search(symbol, mangled))
        else:
            compiled = compile_triton(case, int(re.sub(r"\D", "", arch)))
            made, pixels = [x for x in compiled if x[0].name == "distillation_pass"][-1]
            ((registers, _, code),) = read_cubin(made.asm["cubin"]).values()
            kernel, run = (registers, made.metadata.shared, code), {}
        rows.append(row_of(name, kernel, pixels, run))
    return rows


def over(rows: Sequence[Row], ceilings: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What exceeds its ceiling, and kernels without one."""
    return [f"{x['kernel']}: no ceiling" for x in rows if x["kernel"] not in ceilings] + [
        f"{x['kernel']}: {column}: got {x[column]:.4g}, expected at most {limit:g}"
        for x in rows
        for column, limit in ceilings.get(x["kernel"], {}).items()
        if x[column] > limit
    ]


def compilers() -> dict[str, str]:
    """Versions that the numbers depend on."""
    nvcc = re.findall(r"release ([\d.]+)", _output("nvcc", "--version")) if tool("nvcc") else []
    return {"CUDA": "".join(nvcc), "Triton": version("triton").rpartition(".")[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.kernels", description=__doc__)
    parser.add_argument("--arch", default=ARCH, help="80, 90a, 100, ...; ceilings are of 90a")
    parser.add_argument("--only", type=lambda x: x.split(","), default=[""], help="of names: A,B")
    parser.add_argument("--json", action="store_true", help="with every loop; else Markdown")
    parser.add_argument("--check", action="store_true", help=f"against {CEILINGS.name}")
    parser.add_argument("--update", action="store_true", help=f"write {CEILINGS.name}")
    options = parser.parse_args(arguments)
    if reason := explain({"triton": "triton"}, "triton"):
        parser.exit(2, f"benchmarks.kernels: {reason}\n")
    rows = rows_of([x for x in NAMES if any(y in x for y in options.only)], options.arch)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in y.values()] for y in rows]
        print(table([*rows[0]][:-1], [x[:-1] for x in cells]))
    known = json.loads(CEILINGS.read_text())
    if options.update:
        new = {x["kernel"]: {c: round(x[c] * HELD[c], 6) for c in HELD} for x in rows}
        known |= {"compilers": compilers(), **new}
        lines = ",\n".join(f"{json.dumps(x)}: {json.dumps(y)}" for x, y in known.items())
        CEILINGS.write_text(f"{{\n{lines}\n}}\n")
    problems = over(rows, known) if options.check else []
    print(*problems, sep="\n", end="\n" * bool(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
