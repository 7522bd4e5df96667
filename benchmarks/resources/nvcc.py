"""Compiles CUDA C++ to machine code, once: cubins are kept by the hash of what they come from.

Warnings are errors. The cache is a folder that several processes may use at once: who comes second
waits for the first and finds its result.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
CSRC: Final = ROOT / "csrc"
CACHE: Final = ROOT / "build" / "cubins"
#: Of one source and architecture; older ones are removed.
_KEPT: Final = 8


class CompileError(Exception):
    """The compiler's own words."""


@dataclass(frozen=True)
class Compiled:
    """One source for one architecture."""

    source: Path
    arch: str
    cubin: Path
    log: str
    """of `ptxas -v`"""
    seconds: float
    """that nvcc took when it compiled this"""
    fresh: bool
    """it was not in the cache"""


def find_nvcc() -> str | None:
    """As setup.py does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return str(candidate) if candidate.exists() else None
    return shutil.which("nvcc")


def find_tool(name: str) -> str | None:
    """Beside nvcc, on the PATH, or in the Triton wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / name] if home else []
    if found := shutil.which(name):
        places.append(Path(found))
    triton = importlib.util.find_spec("triton")  # nothing is imported for an answer
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    return next((str(x) for x in places if x.exists()), None)


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    if find_nvcc() is None:
        return "nvcc was not found (set CUDA_HOME or PATH)"
    if find_tool("nvdisasm") is None:
        return "nvdisasm was found neither in a CUDA toolkit nor in the Triton wheel"
    if shutil.which("c++filt") is None:
        return "c++filt was not found (binutils)"
    return None


@cache
def nvcc_version() -> str:
    text = _output(_nvcc(), "--version")
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else "unknown"


def _nvcc() -> str:
    nvcc = find_nvcc()
    assert nvcc is not None, unavailable()
    return nvcc


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def flags(arch: str, more: Sequence[str] = (), torch_include: str | None = None) -> list[str]:
    """Those of setup.py that matter to a kernel, and what the report needs."""
    if torch_include is None:
        import torch

        torch_include = str(Path(torch.__file__).parent / "include")
    target = re.search(
        r"^TORCH_TARGET = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text(), re.MULTILINE
    )
    assert target is not None
    return [
        "-std=c++17",
        f"-DTORCH_TARGET_VERSION=0x{int(target[1]):02x}{int(target[2]):02x}{0:012x}",
        f"-DHAKD_TORCH_TARGET={target[1]}.{target[2]}",
        *("-isystem", torch_include),
        "-O3",
        "-Wno-deprecated-gpu-targets",
        *more,
        f"-arch=sm_{arch}",
        "-lineinfo",
        *("-Xptxas", "-v"),
        *("-Werror", "all-warnings"),
    ]


# --- cache --------------------------------------------------------------------------------------

_INCLUDE: Final = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def files_of(source: Path) -> list[Path]:
    """A source and every header that it includes by a relative path, taken branch or not."""
    found: dict[Path, None] = {}
    waiting = [source.resolve()]
    while waiting:
        file = waiting.pop()
        if file not in found and file.is_file():
            found[file] = None
            names = _INCLUDE.findall(file.read_text())
            waiting += [(file.parent / name).resolve() for name in names]
    return sorted(found)


def key_of(source: Path, options: Sequence[str], version: str) -> str:
    """Line information is part of a cubin: comments count."""
    import torch

    digest = hashlib.sha256(repr((version, torch.__version__, list(options))).encode())
    for file in files_of(source):
        digest.update(repr((str(file), file.read_bytes())).encode())
    return digest.hexdigest()[:20]


def compile_source(
    source: Path, arch: str, more: Sequence[str] = (), folder: Path = CACHE
) -> Compiled:
    options = flags(arch, more)
    stem = f"{source.stem}-sm_{arch}"
    entry = folder / f"{stem}-{key_of(source, options, nvcc_version())}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f"{stem}.lock"):
        fresh = not entry.exists()
        if fresh:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                made = Path(place) / "entry"
                made.mkdir()
                _compile(source, options, made)
                made.rename(entry)  # whole, or not there
            _forget(folder, stem)
    told = json.loads((entry / "log.json").read_text())
    code = entry / "kernels.cubin"
    return Compiled(source, arch, code, told["log"], told["seconds"], fresh)


def _compile(source: Path, options: Sequence[str], place: Path) -> None:
    begin = time.perf_counter()
    command = [_nvcc(), "-cubin", *options, "-o", str(place / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode != 0:
        said = [line for line in text.splitlines() if not line.startswith("ptxas info")]
        raise CompileError("\n".join(said)[-4000:] or f"nvcc exits with {done.returncode}")
    seconds = round(time.perf_counter() - begin, 1)
    (place / "log.json").write_text(json.dumps({"seconds": seconds, "log": text}))


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time compiles a source for an architecture."""
    import fcntl  # where there is nvcc without it, nothing here runs

    with open(file, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _forget(folder: Path, stem: str) -> None:
    entries = [x for x in folder.glob(f"{stem}-*") if x.is_dir()]
    for old in sorted(entries, key=lambda x: x.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


# --- what the tools print -----------------------------------------------------------------------


@dataclass
class Usage:
    """What `ptxas -v` says of a kernel; bytes."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    barriers: int = 0


_ENTRY: Final = re.compile(r"Compiling entry function '([^']+)'")
_PROPERTIES: Final = re.compile(r"Function properties for '?([\w$.]+)'?")
_NUMBERS: Final = {
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill_stores": re.compile(r"(\d+) bytes spill stores"),
    "spill_loads": re.compile(r"(\d+) bytes spill loads"),
    "registers": re.compile(r"Used (\d+) registers"),
    "shared": re.compile(r"(\d+)(?:\+\d+)? bytes smem"),
    "barriers": re.compile(r"used (\d+) barriers"),
}


def usages(log: str) -> dict[str, Usage]:
    """By mangled name. Functions that a kernel calls follow it and are left out."""
    found: dict[str, Usage] = {}
    entry = ""
    own = False  # the lines at hand are the kernel's
    for line in log.splitlines():
        if begun := _ENTRY.search(line):
            entry, own = begun[1], True
            found[entry] = Usage()
        elif named := _PROPERTIES.search(line):
            own = named[1] == entry
        elif own:
            for name, pattern in _NUMBERS.items():
                if number := pattern.search(line):
                    setattr(found[entry], name, int(number[1]))
    return found


def sections(text: str) -> dict[str, str]:
    """The code of each function of `nvdisasm -c`, by mangled name."""
    parts = re.split(r"^\t\.section\t\.text\.([^,\s]+)", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def disassemble(cubin: Path) -> str:
    tool = find_tool("nvdisasm")
    assert tool is not None, unavailable()
    done = subprocess.run([tool, "-c", "-gi", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"nvdisasm: {done.stderr.strip()[-500:]}")
    return done.stdout


def demangle(names: Sequence[str]) -> list[str]:
    """Without namespaces, parameters and return type: `cell_kernel<Set<true>, 4, 4>`."""
    text = "\n".join(names) + "\n"
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return [readable(line) for line in done.stdout.splitlines()]


def readable(demangled: str) -> str:
    text = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    text = re.sub(r"\b(?:\w+::)+", "", text)
    depth = 0
    for at, mark in enumerate(text):
        depth += {"<": 1, ">": -1}.get(mark, 0)
        if mark == "(" and depth == 0:
            text = text[:at]
            break
    # a constant of an enumeration
    return re.sub(r"\((\w+)\)(-?\d+)", r"\1(\2)", text)


def arguments_of(name: str) -> tuple[str, ...]:
    """The template's, of a readable name."""
    if "<" not in name:
        return ()
    found = [""]
    depth = 0
    for mark in name[name.index("<") + 1 : name.rindex(">")]:
        depth += {"<": 1, ">": -1}.get(mark, 0)
        if mark == "," and depth == 0:
            found.append("")
        else:
            found[-1] += mark
    return tuple(x.strip() for x in found)
