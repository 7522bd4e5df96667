"""Applies one defect at a time, in process; `test_mutations.py` lists them and what notices them.

A defect of Python or Triton source is a text of one function, replaced: the function's code is
compiled again and swapped, so that every reference to it sees the defect. Defects of C++ and CUDA
source are all compiled into one library of its own (CUDA through the shim), each behind a switch.
"""

from __future__ import annotations
import __future__

import ctypes
import importlib
import inspect
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import cuda_shim
import torch

from heteroakd_fast import functional, spec
from heteroakd_fast.backends import compiled

__all__ = ["Compiled", "Defect", "Library", "compiled_library", "mutated"]


class Defect(NamedTuple):
    """In Python or Triton source."""

    what: str
    where: str
    """module:function, or module:Class.method"""
    old: str
    new: str
    check: Callable[[], None]
    """A test that passes, and must fail with the defect"""


class Compiled(NamedTuple):
    """In C++ or CUDA source."""

    what: str
    file: str
    """in csrc"""
    old: str
    """an expression"""
    new: str
    """what it is with the defect, of the same type"""
    check: Callable[[], None]


def replaced(text: str, old: str, new: str, where: str) -> str:
    assert text.count(old) == 1, f"{where}: found {text.count(old)} times, expected once: {old!r}"
    return text.replace(old, new)


# --- Python and Triton -------------------------------------------------------------------------


@contextmanager
def mutated(where: str, old: str, new: str) -> Iterator[None]:
    """Runs the block with the defect in the function."""
    module_name, _, path = where.partition(":")
    target: Any = importlib.import_module(module_name)
    for name in path.split("."):
        target = inspect.getattr_static(target, name)
    kernel = target if hasattr(target, "rewrite") else None  # of Triton's interpreter
    target = getattr(target, "__func__", target)  # of a class or static method
    function = kernel.rewrite() if kernel is not None else inspect.unwrap(target)
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(kernel.fn if kernel is not None else function))
    source = source[source.index("def ") if "def " in source else 0 :]  # without decorators
    source = replaced(source, old, new, where)
    if kernel is not None:
        code = _rewritten(kernel, source).__code__
    else:
        scope = dict(function.__globals__)
        flags = __future__.annotations.compiler_flag
        exec(compile(source, f"<{where}>", "exec", flags, dont_inherit=True), scope)
        code = scope[function.__name__].__code__
    before = function.__code__
    function.__code__ = code
    forget()
    try:
        yield
    finally:
        function.__code__ = before
        forget()


def forget() -> None:
    """What the package has kept from before, or with a defect."""
    for module in (spec, functional):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _rewritten(kernel: Any, source: str) -> FunctionType:
    """As Triton's interpreter prepares a kernel, from other source."""
    from triton.runtime.interpreter import FunctionRewriter

    rewriter = FunctionRewriter(kernel.fn)
    rewriter.filename, rewriter.def_file_lineno = "<mutated>", 1
    function: FunctionType = rewriter._compile_and_exec(rewriter._transform_ast(source))
    return function


# --- C++ and CUDA ------------------------------------------------------------------------------

_SWITCH = "heteroakd_mutant"
# Both have CPU tensors here, so that operators of one name are in two namespaces.
_NAMESPACE, _CUDA_NAMESPACE = "heteroakd_fast_mutants", "heteroakd_fast_cuda_mutants"


class Library:
    """CPU and CUDA kernels with every compiled defect in them, all switched off."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        names = {"cpu": _NAMESPACE, "cuda": _CUDA_NAMESPACE}
        self.operators = {name: getattr(torch.ops, space) for name, space in names.items()}
        self._mutant = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), _SWITCH)

    @contextmanager
    def used(self, mutant: int) -> Iterator[None]:
        """Both backends run on this library, with the defect of that number; 0 is none."""
        both = (compiled.CPU, compiled.CUDA)
        originals = [backend.__dict__.copy() for backend in both]
        for backend in both:
            own = partial(self.operators.get, backend.name)
            backend.__dict__.update(unavailable=lambda: None, operators=own, _device="cpu")
        self._mutant.value = mutant
        try:
            yield
        finally:
            self._mutant.value = 0
            for backend, original in zip(both, originals, strict=True):
                backend.__dict__.update(original)


@cache
def compiled_library(defects: tuple[Compiled, ...]) -> Library:
    """Without optimisation: it is compiled in a third of the time, and is right all the same."""
    torch_root = Path(torch.__file__).parent
    common = [
        *("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DHAKD_TORCH_TARGET=2.10"),
        *("-isystem", str(torch_root / "include")),
    ]
    shim = ["-DHAKD_CUDA_SHIM", "-DHAKD_CUDA_KEY=CPU", f"-I{cuda_shim.SHIM}", "-x", "c++"]
    isa = {
        f"{kernels}_{name}.cpp": flags
        for kernels in ("pass", "predict")
        for name, flags in (
            ("avx512", ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2"]),
            ("avx2", ["-mavx2"]),
        )
    }
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "csrc"
        shutil.copytree(cuda_shim.CSRC, copy)
        for number, defect in enumerate(defects, 1):
            file = copy / defect.file
            new = f"(({_SWITCH} == {number}) ? ({defect.new}) : ({defect.old}))"
            file.write_text(replaced(file.read_text(), defect.old, new, defect.file))
        macros = copy / "math" / "macros.h"
        switch = f'extern "C" __attribute__((visibility("default"))) int {_SWITCH};\n'
        macros.write_text(macros.read_text() + switch)
        for file in (copy / "cpu").glob("*.cpp"):
            file.write_text(file.read_text().replace("heteroakd_fast_c", _NAMESPACE))
        shutil.copy(copy / "library.cpp", copy / "cuda_library.cpp")
        (copy / "mutant.cpp").write_text(f"{switch}int {_SWITCH} = 0;\n")
        sources = [
            *copy.glob("*.cpp"),
            *(copy / "cpu").glob("*.cpp"),
            *(copy / "cuda").glob("*.cu"),
            cuda_shim.SHIM / "shim.cpp",
        ]
        compiler = cuda_shim.find_compiler()

        def compile_one(source: Path) -> Path:
            target = Path(directory) / f"{source.parent.name}_{source.stem}.o"
            own = isa.get(source.name, [])
            own = [*own, "-mfma", "-mf16c"] if own else own
            options = shim if source.suffix == ".cu" or source.name == "shim.cpp" else []
            cuda = bool(options) or source.name == "cuda_library.cpp"
            own = [*own, f"-DHAKD_LIBRARY={_CUDA_NAMESPACE if cuda else _NAMESPACE}"]
            cuda_shim.run_compiler(compiler, [*common, *own, *options, "-c", str(source)], target)
            return target

        with ThreadPoolExecutor(cuda_shim.JOBS) as pool:
            objects = list(pool.map(compile_one, sources))
        library = Path(directory) / "mutants.so"
        link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{torch_root / 'lib'}"]
        cuda_shim.run_compiler(compiler, ["-shared", *map(str, objects), *link], library)
        return Library(library)
