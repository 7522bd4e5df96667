"""Builds the compiled extension with ninja; everything else is in pyproject.toml.

One shared library on libtorch's stable ABI, without CPython API: the same file serves every
Python >= 3.10 and torch >= 2.10, with or without CUDA. Settings, all optional:

HETEROAKD_BUILD_EXTENSION   1: fail when it cannot be built; 0: pure Python; unset: build it when
                            torch, ninja and a C++ compiler are there.
HETEROAKD_BUILD_CUDA        1: build the CUDA part for any torch, fail when it cannot be built;
                            0: CPU only; unset: build it when torch is for CUDA and nvcc serves.
TORCH_CUDA_ARCH_LIST        e.g. "8.0;9.0a;10.0+PTX"; by default every generation that the kernels
                            and nvcc know, and PTX of the newest for those to come. It is often
                            set for a whole machine and does not ask for the CUDA part.
CXX, CXXFLAGS, NVCC_FLAGS, CUDA_HOME, MAX_JOBS   as usual.

What is built is printed before it is compiled; pip shows that with -v.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = (2, 10)
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0"
#: Older ones lack instructions that the kernels use.
OLDEST_ARCHITECTURE = 80
OLDEST_NVCC = (12, 0)
#: Measured; of one core, the C++ part and each CUDA target.
MINUTES_CPP = 1.5
MINUTES_CUDA = 1.5

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *_AVX2]
#: Compiled for more than the baseline, and entered only on processors that have it.
ISA_FLAGS = {
    "pass_avx512.cpp": _AVX512,
    "pass_avx2.cpp": _AVX2,
    "predict_avx512.cpp": _AVX512,
    "predict_avx2.cpp": _AVX2,
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


class CudaUnavailableError(Exception):
    """The CUDA part cannot be built here; the text says why."""


class Architecture(NamedTuple):
    """One entry of TORCH_CUDA_ARCH_LIST."""

    number: int
    """10 x compute capability"""
    suffix: str
    """a, f or nothing"""
    ptx: bool = False
    """Whether PTX is added, for GPUs to come"""

    @property
    def capability(self) -> str:
        return f"{self.number // 10}.{self.number % 10}{self.suffix}"

    def __str__(self) -> str:
        return self.capability + "+PTX" * self.ptx

    def flags(self) -> list[str]:
        """For nvcc."""
        virtual = f"compute_{self.number}{self.suffix}"
        codes = [f"sm_{self.number}{self.suffix}", *[virtual] * self.ptx]
        return [f"-gencode=arch={virtual},code={code}" for code in codes]


class CudaPlan(NamedTuple):
    """What the CUDA part is compiled by, and for what."""

    reason: str
    """Why it is built"""
    nvcc: str
    version: str
    architectures: list[Architecture]
    notes: list[str]
    """Printed with the plan: architectures left out, another CUDA than torch's"""

    @property
    def targets(self) -> list[str]:
        return [flag for one in self.architectures for flag in one.flags()]


def find_nvcc() -> str:
    """Return the path of nvcc.

    Raises:
        CudaUnavailableError: there is none where CUDA_HOME points, or on the PATH.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if found is None:
        raise CudaUnavailableError(
            f"nvcc was not found in {Path(home) / 'bin'} (CUDA_HOME)"
            if home
            else "nvcc was not found (set CUDA_HOME or PATH)"
        )
    return found


def plan_cuda() -> CudaPlan | str:
    """Decide how the CUDA part is built, or return why it is left out.

    Raises:
        SystemExit: TORCH_CUDA_ARCH_LIST is wrong, or HETEROAKD_BUILD_CUDA=1 asks for what cannot
            be built.
    """
    import torch

    asked = setting("HETEROAKD_BUILD_CUDA")
    if asked is False:
        return "HETEROAKD_BUILD_CUDA=0"
    torch_cuda = torch.version.cuda
    if asked is None and torch_cuda is None:
        what = "is for ROCm" if getattr(torch.version, "hip", None) else "has no CUDA"
        return f"torch {torch.__version__} {what} (HETEROAKD_BUILD_CUDA=1 builds it all the same)"
    try:
        nvcc = find_nvcc()
        version = nvcc_version(nvcc)
        architectures, notes = choose_architectures(nvcc, version)
    except CudaUnavailableError as error:
        if asked:
            raise SystemExit(
                f"HETEROAKD_BUILD_CUDA=1, but {error}; HETEROAKD_BUILD_CUDA=0 leaves CUDA out"
            ) from None
        return str(error)
    if torch_cuda is not None and torch_cuda.split(".")[0] != version.split(".")[0]:
        notes.append(
            f"warning: nvcc is of CUDA {version}, torch {torch.__version__} of CUDA {torch_cuda}: "
            f"the kernels will need a driver for CUDA {version.split('.')[0]}; CUDA_HOME names "
            "another toolkit"
        )
    reason = "HETEROAKD_BUILD_CUDA=1" if asked else f"torch is for CUDA {torch_cuda}"
    return CudaPlan(reason, nvcc, version, architectures, notes)


def nvcc_version(nvcc: str) -> str:
    """Return the CUDA version of nvcc, such as 13.0.

    Raises:
        CudaUnavailableError: nvcc does not run, or is too old.
    """
    match = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if match is None:
        raise CudaUnavailableError(f"`{nvcc} --version` names no release")
    if (int(match[1]), int(match[2])) < OLDEST_NVCC:
        raise CudaUnavailableError(
            f"{nvcc} is of CUDA {match[1]}.{match[2]}, expected {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} "
            "or newer (CUDA_HOME names another toolkit)"
        )
    return f"{match[1]}.{match[2]}"


def choose_architectures(nvcc: str, version: str) -> tuple[list[Architecture], list[str]]:
    """Return the entries of TORCH_CUDA_ARCH_LIST (or of the default list) that kernels and nvcc
    support, and a line about each kind of entry that is left out.

    Raises:
        SystemExit: an entry of TORCH_CUDA_ARCH_LIST cannot be read, or nvcc does not know it.
        CudaUnavailableError: no architecture is left, or nvcc does not work here.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,")
    wanted = parse_architectures(asked or DEFAULT_ARCHITECTURES)
    old = [one for one in wanted if one.number < OLDEST_ARCHITECTURE]
    recent = [one for one in wanted if one not in old]
    unknown = [one for one in recent if not knows(nvcc, version, one)]
    kept = [one for one in recent if one not in unknown]
    notes = []
    if old:
        notes.append(f"left out {join(old)}: the kernels need 8.0 or newer")
    if unknown:
        listed = re.findall(
            r"^compute_(\d+)(\d)$", output_of(nvcc, "--list-gpu-arch"), re.MULTILINE
        )
        known = ", ".join(".".join(digits) for digits in listed)
        if asked:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {join(unknown)}, which nvcc {version} ({nvcc}) does "
                f"not know, expected some of {known}"
            )
        notes.append(f"left out {join(unknown)}: nvcc {version} does not know them, only {known}")
    if not kept:
        raise CudaUnavailableError(f"no architecture is left: {'; '.join(notes)}")
    if not asked:
        kept[-1] = kept[-1]._replace(ptx=True)
    return kept, notes


def parse_architectures(text: str) -> list[Architecture]:
    """Read a TORCH_CUDA_ARCH_LIST.

    Raises:
        SystemExit: one cannot be read.
    """
    architectures = []
    for entry in re.split(r"[;,\s]+", text):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected entries such as 9.0, 9.0a or "
                "10.0+PTX"
            )
        architectures.append(Architecture(int(match[1] + match[2]), match[3], bool(match[4])))
    return architectures


def join(architectures: list[Architecture]) -> str:
    return ", ".join(one.capability for one in architectures)


def knows(nvcc: str, version: str, architecture: Architecture) -> bool:
    """Return whether nvcc supports this architecture: it preprocesses an empty file for it.

    Raises:
        CudaUnavailableError: it cannot preprocess at all, as with an unsupported host compiler.
    """
    flags = [*architecture.flags(), *shlex.split(os.environ.get("NVCC_FLAGS", ""))]
    command = [nvcc, *flags, "-x", "cu", "-E", "-"]
    run = subprocess.run(command, input="", capture_output=True, text=True)
    if run.returncode == 0:
        return True
    if "Unsupported gpu architecture" in run.stderr:
        return False
    said = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    told = next((line for line in said if re.search("fatal|error", line)), " ".join(said[-1:]))
    raise CudaUnavailableError(
        f"nvcc {version} ({nvcc}) does not work here: {told} (NVCC_FLAGS='-ccbin g++-13' names "
        "another host compiler, CUDA_HOME another toolkit)"
    )


def output_of(*command: str) -> str:
    """Return what a program prints; nothing where it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


def describe(cuda: CudaPlan | str) -> str:
    """Return the lines that are printed before a build."""
    compiler = find_compiler() or ""
    isa = ["portable", "AVX2", "AVX-512"] if is_x86() else ["portable"]
    cores = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    minutes = MINUTES_CPP
    version = (output_of(*shlex.split(compiler), "--version").splitlines() or ["?"])[0]
    lines = [
        "building the compiled extension (HETEROAKD_BUILD_EXTENSION=0 leaves it out)",
        f"C++: {compiler}, {version}; CPU kernels {', '.join(isa)}",
    ]
    if isinstance(cuda, str):
        lines.append(f"CUDA: no: {cuda}")
    else:
        names = ", ".join(map(str, cuda.architectures))
        lines.append(f"CUDA: yes: {cuda.reason}; {cuda.nvcc} {cuda.version}, for {names}")
        lines += [f"CUDA: {note}" for note in cuda.notes]
        minutes += MINUTES_CUDA * len(cuda.architectures)
    lines.append(f"expected time: about {max(1, round(minutes / cores))} min on {cores} cores")
    return "\n".join(f"heteroakd_fast: {line}" for line in lines)


def announce() -> None:
    """Print what an installation here builds (for dev.py)."""
    if wants_extension():
        print(describe(plan_cuda()), flush=True)


class NinjaBuild(build_ext):
    """Writes one build.ninja for the C++ and CUDA sources and runs it."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        cuda = plan_cuda()
        print(describe(cuda), flush=True)
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
        nvcc = None
        if isinstance(cuda, str):
            cxx_flags.append(f"-DHAKD_CUDA_ABSENT={json.dumps(cuda)}")
        else:
            nvcc = cuda.nvcc
            cxx_flags += [
                "-DHAKD_WITH_CUDA",
                f"-DHAKD_CUDA_VERSION={cuda.version}",
                f"-DHAKD_CUDA_ARCHITECTURES={','.join(map(str, cuda.architectures))}",
            ]
            nvcc_flags = [
                *common,
                *includes,
                "-O3",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
                "-Wno-deprecated-gpu-targets",
                "-t0",
                *cuda.targets,
                *shlex.split(os.environ.get("NVCC_FLAGS", "")),
            ]
            sources += sorted((CSRC / "cuda").glob("*.cu"))
            # The static runtime: the library must load where no CUDA is installed.
            link_flags += [
                *cuda_library_flags(cuda.nvcc),
                "-lcudart_static",
                "-ldl",
                "-lrt",
                "-lpthread",
            ]

        write_ninja(build / "build.ninja", sources, target, cxx_flags, nvcc, nvcc_flags, link_flags)
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
    nvcc: str | None,
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
        f"nvcc = {nvcc}",
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


if __name__ == "__main__":
    with_extension = wants_extension()
    setup(
        ext_modules=[Extension("heteroakd_fast._C", sources=[], py_limited_api=True)]
        if with_extension
        else [],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if with_extension else {},
    )
