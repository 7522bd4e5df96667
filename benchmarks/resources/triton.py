"""Compiles the launches of the cases with Triton, without a GPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

from torch import Tensor

from .cases import QUICK_CAREFUL, QUICK_CASES
from .kernel import Kernel, Row
from .launches import Launch, launches_of
from .loops import count_loops
from .python_source import sources
from .sass import parse_sass

ARCHS: Final = (90, 80, 100)
#: The architecture whose loops are counted and whose times are derived.
MAIN_ARCH: Final = 90


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


def read_kernel(code: bytes, shared: int) -> Kernel:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(code)
        usage = _tool("cuobjdump", "-res-usage", str(file))
        text = _tool("nvdisasm", "-c", "-gi", str(file))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    instructions, labels = parse_sass(text)
    kinds = Counter(x.kind for x in instructions)
    outside, loops = count_loops(instructions, labels, sources())
    return Kernel(
        registers=int(numbers[1]),
        stack=int(numbers[2]),
        shared=shared,
        spill_loads=kinds["LDL"],
        spill_stores=kinds["STL"],
        code_bytes=16 * len(instructions),
        outside=outside,
        loops=loops,
    )


class Job(NamedTuple):
    case: str
    number: int
    """of the launch in its case"""
    arch: int


def quiet() -> None:
    """Triton tells every process about its default of fused multiply-adds."""
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    warnings.filterwarnings("ignore", message=".*fp_fusion.*")


def _compile_job(job: Job) -> Kernel | str:
    try:
        code, shared = compile_launch(launches_of(job.case)[job.number], job.arch)
        return read_kernel(code, shared)
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
                if launch.careful and (arch != MAIN_ARCH or (quick and case not in QUICK_CAREFUL)):
                    continue
                jobs.append(Job(case, number, arch))
    return jobs


def compile_jobs(chosen_jobs: Sequence[Job], processes: int) -> tuple[list[Row[Launch]], list[str]]:
    """Every launch, equal ones compiled once; and what failed."""
    sources()  # of the same moment as the kernels that were imported
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
    with ProcessPoolExecutor(processes, context, initializer=quiet) as pool:
        compiled = dict(zip(order, pool.map(_compile_job, order), strict=True))
    rows: list[Row[Launch]] = []
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
        main = job.arch == MAIN_ARCH
        rows.append(Row(job.case, name, str(job.arch), launch, kernel, same, main))
    return rows, failures


def _kernel_name(job: Job) -> str:
    """The function's name; a number where a case launches it more than once."""
    launches = launches_of(job.case)
    name = launches[job.number].name
    before = [x.name for x in launches[: job.number]].count(name)
    return f"{name} {before + 1}" if before else name


@contextmanager
def own_launch_table() -> Iterator[None]:
    """A table of measured launches is one machine's; the static one is what is looked at."""
    with mock.patch.dict(os.environ):
        os.environ.pop("HETEROAKD_TRITON_CONFIG", None)
        yield
