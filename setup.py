"""Builds the compiled extension with ninja; everything else is in pyproject.toml.

One shared library on libtorch's stable ABI, without CPython API: the same file serves every
Python >= 3.10 and torch >= 2.10, with or without CUDA. Settings, all optional:

HETEROAKD_BUILD_EXTENSION   1: fail when it cannot be built; 0: pure Python; unset: build it when
                            torch, ninja and a C++ compiler are there.
HETEROAKD_BUILD_CUDA        1: fail without nvcc; 0: CPU only; unset: build it when nvcc is there.
TORCH_CUDA_ARCH_LIST        e.g. "8.0;9.0a;10.0+PTX"; by default every supported generation, and
                            PTX of the newest for those to come.
CXX, CXXFLAGS, NVCC_FLAGS, CUDA_HOME, MAX_JOBS   as usual.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = (2, 10)
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


#: Compiled for more than the baseline, and entered only on processors that have it.
ISA_FLAGS = {
    "pass_avx512.cpp": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mf16c"),
    ],
    "pass_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")


def setting(name: str) -> bool | None:
    """An environment switch: forced on, forced off, or left to what is there."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise SystemExit(f"{name}: got {value!r}, expected 1, 0 or nothing")


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def find_compiler() -> str | None:
    named = os.environ.get("CXX", "").strip()
    if named:
        return named if shutil.which(shlex.split(named)[0]) else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return str(candidate) if candidate.exists() else None
    return shutil.which("nvcc")


def what_is_missing() -> str | None:
    """Why the extension cannot be built here, or None."""
    try:
        import torch
    except ImportError:
        return (
            "torch is not visible to the build; install torch first and use "
            "`pip install --no-build-isolation`"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET:
        return f"torch {torch.__version__} has no stable ABI that serves; install torch >= 2.10"
    if find_ninja() is None:
        return "ninja is not installed (`pip install ninja`)"
    if find_compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    return None


def wants_extension() -> bool:
    asked = setting("HETEROAKD_BUILD_EXTENSION")
    if asked is False:
        return False
    missing = what_is_missing()
    if missing is None:
        return True
    if asked:
        raise SystemExit(f"HETEROAKD_BUILD_EXTENSION=1, but {missing}")
    print(f"heteroakd_fast: installing without the compiled extension: {missing}", file=sys.stderr)
    return False


def wants_cuda() -> bool:
    asked = setting("HETEROAKD_BUILD_CUDA")
    if asked is False:
        return False
    found = find_nvcc() is not None
    if asked and not found:
        raise SystemExit("HETEROAKD_BUILD_CUDA=1, but nvcc was not found (set CUDA_HOME or PATH)")
    return found


def gencode_flags(architectures: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as nvcc flags."""
    flags = []
    for entry in re.split(r"[;,\s]+", architectures.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected entries such as 9.0, 9.0a or "
                "10.0+PTX"
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    """Writes one build.ninja for the C++ and CUDA sources and runs it."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        cuda = wants_cuda()
        torch_root = Path(torch.__file__).parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        target_hex = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}"
        common = [
            "-std=c++17",
            f"-DTORCH_TARGET_VERSION={target_hex}",
            f"-DHAKD_TORCH_TARGET={TORCH_TARGET[0]}.{TORCH_TARGET[1]}",
        ]
        # No contraction: a multiply-add stands where the source says so, for every compiler.
        host = ["-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        includes = ["-isystem", str(torch_root / "include")]
        cxx_flags = [*common, *host, *includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        link_flags = [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        sources = sorted(CSRC.glob("*.cpp")) + sorted((CSRC / "cpu").glob("*.cpp"))
        nvcc_flags: list[str] = []
        if cuda:
            nvcc = find_nvcc()
            assert nvcc is not None
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,")
            architectures = architectures or DEFAULT_ARCHITECTURES
            cxx_flags += [
                "-DHAKD_WITH_CUDA",
                f"-DHAKD_CUDA_VERSION={cuda_version(nvcc)}",
                f"-DHAKD_CUDA_ARCHITECTURES={architectures.replace(';', ',').replace(' ', ',')}",
            ]
            nvcc_flags = [
                *common,
                *includes,
                "-O3",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
                "-Wno-deprecated-gpu-targets",
                "-t0",
                *gencode_flags(architectures),
                *shlex.split(os.environ.get("NVCC_FLAGS", "")),
            ]
            sources += sorted((CSRC / "cuda").glob("*.cu"))
            # The static runtime: the library must load where no CUDA is installed.
            link_flags += [
                *cuda_library_flags(nvcc),
                "-lcudart_static",
                "-ldl",
                "-lrt",
                "-lpthread",
            ]

        write_ninja(build / "build.ninja", sources, target, cxx_flags, nvcc_flags, link_flags)
        ninja = find_ninja()
        assert ninja is not None
        command = [ninja, "-C", str(build), "-v" if self.verbose > 1 else "--quiet"]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                "heteroakd_fast: compiling the extension failed, see above. "
                "HETEROAKD_BUILD_CUDA=0 leaves CUDA out, HETEROAKD_BUILD_EXTENSION=0 everything "
                "compiled."
            )


def cuda_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


def cuda_library_flags(nvcc: str) -> list[str]:
    """Where the static runtime lies: nvcc knows, wherever its launcher was found."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-", "-o", os.devnull],
        input="",
        capture_output=True,
        text=True,
    )
    match = re.search(r"^#\$ LIBRARIES=(.*)$", dry.stderr, re.MULTILINE)
    flags = shlex.split(match[1]) if match else []
    return [flag for flag in flags if flag.startswith("-L")]


def write_ninja(
    path: Path,
    sources: list[Path],
    target: Path,
    cxx_flags: list[str],
    nvcc_flags: list[str],
    link_flags: list[str],
) -> None:
    def escape(file: Path) -> str:
        return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def join(flags: list[str]) -> str:
        return shlex.join(flags).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {find_compiler()}",
        f"nvcc = {find_nvcc() or 'nvcc'}",
        f"cxx_flags = {join(cxx_flags)}",
        f"nvcc_flags = {join(nvcc_flags)}",
        f"link_flags = {join(link_flags)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxx_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $nvcc_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in $link_flags -o $out",
    ]
    objects = []
    for source in sources:
        name = source.relative_to(CSRC).as_posix().replace("/", "_") + ".o"
        objects.append(escape(path.parent / name))
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}")
        if source.name in ISA_FLAGS and is_x86():
            lines.append(f"  cxx_flags = $cxx_flags {' '.join(ISA_FLAGS[source.name])}")
    lines += [f"build {escape(target)}: link {' '.join(objects)}", f"default {escape(target)}", ""]
    path.write_text("\n".join(lines))


if __name__ == "__main__":  # not where `benchmarks.gpu_workers` imports it, to build
    with_extension = wants_extension()
    setup(
        ext_modules=[Extension("heteroakd_fast._C", sources=[], py_limited_api=True)]
        if with_extension
        else [],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if with_extension else {},
    )
