"""The CUDA operators' own source on the CPU: `load()` gives the operators of csrc/cuda, run by the
shim in tests/cuda_shim (its header says what it checks and what it cannot).

    ops = cuda_shim.load()          # torch.ops.heteroakd_fast_shim, for CPU tensors
    cuda_shim.set_seed(3)           # another order of threads and blocks; 0: the natural one

Built with g++ into a cache that outlives the run, one object per source: only what changed is
compiled again. `python tests/cuda_shim.py [--sanitize]` builds it and says where it lies.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sanitizers import FLAGS, CannotTellError, find_compiler, supported

__all__ = ["CannotTellError", "build", "load", "set_seed", "set_shared_limit"]

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_shim"
CSRC = ROOT / "csrc"
NAMESPACE = "heteroakd_fast_shim"

#: Alignment as well: the machine would fault at a misaligned vector load.
SANITIZE = [
    *FLAGS["address"],
    *("-fsanitize=alignment", "-O1", "-g1", "-fno-omit-frame-pointer"),
]
JOBS = 2
KEPT_FILES = 300


def load(sanitize: bool = False) -> Any:
    """The operators. With `sanitize` only in a process of `sanitizers.run_python`."""
    torch.ops.load_library(str(library_path(sanitize)))
    return getattr(torch.ops, NAMESPACE)


def set_seed(seed: int) -> None:
    """The order of threads and blocks from now on; takes the place of HAKD_SHIM_SEED."""
    loaded().hakd_shim_set_seed(ctypes.c_uint64(seed))


def launched() -> list[str]:
    """Names of the kernels that were launched since the last call."""
    names = loaded().hakd_shim_launched
    names.restype = ctypes.c_char_p
    return [str(name) for name in names().decode().splitlines()]


def set_shared_limit(size: int) -> None:
    """Bytes of shared memory that a block can have, from 48 KiB to 227 KiB: 163 KiB on sm_80."""
    if not loaded().hakd_shim_set_shared_limit(ctypes.c_size_t(size)):
        raise ValueError(f"shared limit: got {size}, expected 48 KiB to 227 KiB")


@cache
def library_path(sanitize: bool = False) -> Path:
    """Builds the operators' library where it is not built yet."""
    # setup.py cannot be imported without building
    target = re.search(r"^TORCH_TARGET = \((\d+), (\d+)\)$", (ROOT / "setup.py").read_text(), re.M)
    assert target is not None, "setup.py has no TORCH_TARGET any more"
    major, minor = int(target[1]), int(target[2])
    torch_root = Path(torch.__file__).parent
    flags = [
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}",
        f"-DHAKD_TORCH_TARGET={major}.{minor}",
        f"-DHAKD_LIBRARY={NAMESPACE}",
        "-DHAKD_CUDA_KEY=CPU",
        *("-isystem", str(torch_root / "include")),
    ]
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{torch_root / 'lib'}"]
    sources = [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cuda").glob("*.cu"))]
    return build("operators", sources, flags, link, sanitize)


@cache
def loaded() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))  # the one that torch loads


def build(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    sanitize: bool = False,
) -> Path:
    """A shared library from these sources and the shim, out of the cache where it is there."""
    compiler = find_compiler()
    flags = [
        *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
        *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DHAKD_CUDA_SHIM", f"-I{SHIM}"),
        *flags,
        *(SANITIZE if sanitize else ()),
    ]
    sources = [*sources, SHIM / "shim.cpp"]
    environment = "\n".join([*compiler, compiler_version(tuple(compiler)), torch.__version__])
    with locked(cache_folder()) as folder:
        if sanitize:
            with tempfile.TemporaryDirectory() as scratch:
                supported("address", Path(scratch))
        for _ in range(5):
            keys = [key(source, flags, environment) for source in sources]
            target = folder / f"{name}-{digest(*keys, *link)}.so"
            if target.exists():
                target.touch()
                return target
            objects = compile_all(compiler, flags, dict(zip(sources, keys, strict=True)), folder)
            if [key(source, flags, environment) for source in sources] != keys:
                # Somebody edits them: what was compiled may be neither the old nor the new.
                for file in objects:
                    file.unlink()
                continue
            options = [*flags, "-shared", *map(str, objects), *link]
            run_compiler(compiler, options, target)
            remove_old(folder)
            return target
    raise RuntimeError("the sources changed again and again while they were compiled")


def compile_all(
    compiler: list[str], flags: Sequence[str], keys: dict[Path, str], folder: Path
) -> list[Path]:
    """The object of every source, the large ones first."""
    objects = {source: folder / f"{source.stem}-{key}.o" for source, key in keys.items()}

    def compile_one(source: Path) -> None:
        if objects[source].exists():
            objects[source].touch()
            return
        options = [*flags, "-c", *("-x", "c++"), str(source)]
        run_compiler(compiler, options, objects[source])

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(compile_one, sorted(objects, key=lambda file: -file.stat().st_size)))
    return list(objects.values())


def run_compiler(compiler: list[str], options: list[str], target: Path) -> None:
    """Writes beside the target and renames: whoever sees the target sees all of it."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    done = subprocess.run(
        [*compiler, *options, "-o", str(partial)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"the CUDA sources do not compile for the shim:\n{done.stdout}")
    if done.stdout:
        print(done.stdout, file=sys.stderr)  # warnings
    partial.rename(target)


@cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    return subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout


def key(source: Path, flags: Sequence[str], environment: str) -> str:
    """Of everything that an object depends on; of headers, whether it includes them or not."""
    headers = sorted(
        file
        for folder in (CSRC, SHIM)
        for pattern in ("*.h", "*.cuh")
        for file in folder.rglob(pattern)
    )
    contents = [f"{file}\n{file.read_text()}" for file in (*headers, source)]
    return digest(*contents, *flags, environment)


def digest(*texts: str) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()[:24]


def cache_folder() -> Path:
    """Beside pytest's cache, or where that cannot be written a folder of this user's."""
    for folder in (
        ROOT / ".pytest_cache" / "cuda_shim",
        Path(tempfile.gettempdir()) / f"heteroakd-cuda-shim-{os.getuid()}",
    ):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
    raise CannotTellError("there is no folder to build in")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """One process builds; the others wait for it and find what it has built."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def remove_old(folder: Path) -> None:
    """The files that were not used for longest, but none of the last hour."""
    files = [file for file in folder.iterdir() if file.name != "lock"]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[KEPT_FILES:]:
        if file.stat().st_mtime < time.time() - 3600:
            file.unlink()


if __name__ == "__main__":
    start = time.monotonic()
    print(library_path("--sanitize" in sys.argv[1:]))
    print(f"{time.monotonic() - start:.1f} s")
