#!/usr/bin/env python3
"""Runs the CPU kernels under the compiler's sanitizers. Standard library only, but for `extension`.

    python tests/sanitize/run.py address      the kernels alone: AddressSanitizer and UBSan
    python tests/sanitize/run.py thread       the kernels alone: ThreadSanitizer
    python tests/sanitize/run.py extension [arguments of pytest]
                                              the whole extension under pytest: ASan and UBSan

The exit code is the verdict: 0 where nothing was found, 1 where something was, 77 where this
machine cannot tell (no compiler, or one without the sanitizer). CXX names the compiler, by default
g++, then clang++. docs/sanitizers.md says what each mode covers.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DRIVER = ROOT / "tests" / "sanitize" / "kernels.cpp"
PASSES = sorted((ROOT / "csrc" / "cpu").glob("pass_*.cpp"))

CANNOT_TELL = 77
COMMON = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-ffp-contract=off", "-pthread"]
# Without use-after-scope, which makes the always inlined kernels three times slower to compile and
# looks for pointers to dead locals: they have none that outlive an expression. Without UBSan's
# checks of every pointer, for the same reason.
ADDRESS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-sanitize-address-use-after-scope",
    "-fno-sanitize=null,alignment,object-size,vptr",
]
SANITIZERS = {
    "address": [*ADDRESS, "-D_GLIBCXX_SANITIZE_VECTOR"],
    "thread": ["-fsanitize=thread"],
}
# Defects that must be caught first, and words of which the report has one.
PLANTS = {
    "address": {
        "overrun": ["heap-buffer-overflow"],
        "overflow": ["signed integer overflow"],
        "page": ["SEGV"],
    },
    "thread": {"race": ["data race"]},
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
EXTENSION_TESTS = ["tests/kernels/test_cpu_kernels.py", "tests/contract"]


class CannotTellError(Exception):
    """Why the sanitizer cannot be run here."""


def isa_flags() -> dict[str, list[str]]:
    """ISA_FLAGS of setup.py, which cannot be imported without building."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ISA_FLAGS":
            value = eval(compile(ast.Expression(node.value), "setup.py", "eval"), {})
            return {str(name): [str(flag) for flag in flags] for name, flags in value.items()}
    raise SystemExit("run.py: setup.py has no ISA_FLAGS any more")


def find_compiler() -> list[str]:
    if sys.platform != "linux":
        raise CannotTellError(f"the sanitizers are run on Linux, and this is {sys.platform}")
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise CannotTellError("no C++ compiler was found (set CXX, or install g++ or clang++)")


def supported(compiler: list[str], flags: list[str], folder: Path) -> list[str]:
    """The flags that this compiler has, once a program with them was built and has run."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")

    def builds(some: list[str]) -> bool:
        command = [*compiler, *some, "-pthread", str(source), "-o", str(program)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not builds(flags):
        raise CannotTellError(
            f"{shlex.join(compiler)} cannot link with {flags[0]} "
            "(its sanitizer runtime is not installed)"
        )
    if subprocess.run([str(program)], capture_output=True).returncode != 0:
        raise CannotTellError(f"a program built with {flags[0]} does not start on this machine")
    return flags


def compile_all(compiler: list[str], flags: list[str], folder: Path, jobs: int) -> Path:
    """The program, from all kernels; several files at a time, the largest first."""
    per_file = isa_flags()

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        own = per_file.get(source.name, [])
        if "portable" in source.name:
            own = [*own, "-O0"]  # loops over lanes: with a sanitizer, -O1 takes twice as long
        command = [*compiler, *COMMON, *flags, *own, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    sources = sorted([*PASSES, DRIVER], key=lambda source: "portable" not in source.name)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "kernels"
    command = [*compiler, *COMMON, *flags, *map(str, objects), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **OPTIONS},
    )


def planted_and_missed(mode: str, program: Path, isas: list[str]) -> Iterator[str]:
    """Defects that the sanitizer did not report: then its silence elsewhere means nothing."""
    for name, words in PLANTS[mode].items():
        for isa in isas:
            done = run_program(program, name, isa)
            caught = done.returncode != 0 and any(word in done.stdout for word in words)
            say(f"planted {name}, {isa}: {'caught' if caught else 'MISSED'}")
            if not caught:
                yield done.stdout


def check_kernels(mode: str, folder: Path, jobs: int) -> int:
    compiler = find_compiler()
    flags = supported(compiler, SANITIZERS[mode], folder)
    start = time.monotonic()
    program = compile_all(compiler, flags, folder, jobs)
    say(f"compiled in {time.monotonic() - start:.0f} s")
    isas = run_program(program, "list").stdout.split()
    missed = list(planted_and_missed(mode, program, isas))
    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        # the slow ones first
        runs = []
        for done in pool.map(lambda isa: run_program(program, isa), reversed(isas)):
            print(done.stdout, end="", flush=True)
            runs.append(done)
    good = all(done.returncode == 0 for done in runs)
    say(f"ran in {time.monotonic() - start:.0f} s")
    if missed:
        print(*missed, sep="\n")
        say(f"{mode}: the sanitizer misses planted defects, so this run says nothing")
        return 1
    say(f"{mode}: {'nothing was found' if good else 'FAILED, see above'}")
    return 0 if good else 1


def library(compiler: list[str], name: str) -> str:
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise CannotTellError(f"{shlex.join(compiler)} has no {name}; use g++")
    return path


def check_extension(folder: Path, jobs: int, tests: list[str]) -> int:
    """Builds a copy of the package with a sanitizer and runs tests on it."""
    compiler = find_compiler()
    supported(compiler, ADDRESS, folder)
    preload = " ".join(library(compiler, name) for name in ("libasan.so", "libstdc++.so"))
    copy = folder / "package"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("heteroakd_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy,
        check=True,
        env={
            **os.environ,
            # The compiler's name carries what the link needs as well; a later -O0 wins over -O3.
            "CXX": shlex.join([*compiler, *ADDRESS]),
            "CXXFLAGS": "-O0 -g1 -fno-omit-frame-pointer",
            "HETEROAKD_BUILD_EXTENSION": "1",
            "HETEROAKD_BUILD_CUDA": "0",
            "MAX_JOBS": str(jobs),
        },
    )
    say(f"built in {time.monotonic() - start:.0f} s")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=copy,
        env={
            **os.environ,
            **OPTIONS,
            "LD_PRELOAD": preload,
            "PYTHONPATH": str(copy),
        },
    )
    say(f"ran in {time.monotonic() - start:.0f} s")
    say(f"extension: {'nothing was found' if done.returncode == 0 else 'FAILED, see above'}")
    return 0 if done.returncode == 0 else 1


def say(text: str) -> None:
    print(f"run.py: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["address", "thread", "extension"])
    parser.add_argument("--jobs", type=int, default=2, help="compilers and programs at a time")
    options, rest = parser.parse_known_args()
    if rest and options.mode != "extension":
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    with tempfile.TemporaryDirectory(prefix="heteroakd-sanitize-") as name:
        try:
            if options.mode == "extension":
                tests = rest or [*EXTENSION_TESTS, "-k", "cpu"]
                return check_extension(Path(name), options.jobs, tests)
            return check_kernels(options.mode, Path(name), options.jobs)
        except CannotTellError as reason:
            say(f"{options.mode} cannot be run here: {reason}")
            return CANNOT_TELL
        except subprocess.CalledProcessError as error:
            say(f"failed: {shlex.join(map(str, error.cmd))}")
            return 1


if __name__ == "__main__":
    sys.exit(main())
