"""Builds the CPU extension with the compiler's sanitizers, and runs Python with their runtime.

Python itself is not built with them: their libraries are loaded before it starts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    # Without use-after-scope, which makes the always inlined kernels three times slower to compile
    # and looks for pointers to dead locals: they have none that outlive an expression. Without
    # UBSan's checks of every pointer, for the same reason.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-sanitize-address-use-after-scope",
        "-fno-sanitize=null,alignment,object-size,vptr",
        "-D_GLIBCXX_SANITIZE_VECTOR",
    ],
    "thread": ["-fsanitize=thread"],
}
LIBRARIES = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000000",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
    # The process forks, and has no threads then: those of the extension are its own.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
#: Functions that the extension gets from sanitizers.cpp.
WRAPPED = ["malloc", "free", "_Znam", "_ZdaPv", "torch_parallel_for"]


class CannotTellError(Exception):
    """Why a sanitizer cannot be run here."""


def find_compiler() -> list[str]:
    if sys.platform != "linux":
        raise CannotTellError(f"the sanitizers are run on Linux, and this is {sys.platform}")
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise CannotTellError("no C++ compiler was found (set CXX, or install g++ or clang++)")


def supported(sanitizer: str, folder: Path) -> list[str]:
    """The compiler with the sanitizer's flags, once a program of theirs was built and has run."""
    command = [*find_compiler(), *FLAGS[sanitizer]]
    program = folder / "probe"
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    for step in ([*command, f"{program}.cpp", "-o", str(program)], [str(program)]):
        if subprocess.run(step, capture_output=True).returncode != 0:
            raise CannotTellError(f"this fails on an empty program: {shlex.join(step)}")
    return command


def build_extension(sanitizer: str, folder: Path) -> Path:
    """The CPU part as setup.py builds it, and `sanitizers.cpp`, in an empty folder.

    Without optimisation, which with a sanitizer would take twice as long to compile.
    """
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    compiler = shlex.join([*supported(sanitizer, folder), *wraps])  # setup.py links with it too
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "tests" / "sanitizers.cpp", folder / "csrc" / "cpu")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "."],
        cwd=folder,
        check=True,
        env={
            "MAX_JOBS": "2",
            **os.environ,
            "CXX": compiler,
            "CXXFLAGS": "-O0 -g1 -fno-omit-frame-pointer",
            "HETEROAKD_BUILD_EXTENSION": "1",
            "HETEROAKD_BUILD_CUDA": "0",
        },
    )
    return next((folder / "heteroakd_fast").glob("_C.*"))


def run_python(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, for libraries that are built with the sanitizer; stdout has
    stderr too."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            **OPTIONS,
            "LD_PRELOAD": " ".join(map(_runtime, LIBRARIES[sanitizer])),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
    )


def _runtime(name: str) -> str:
    command = [*find_compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise CannotTellError(f"{command[0]} has no {name}; use g++")
    return path
