"""Finds and loads the compiled library, and remembers why when it cannot.

The library speaks libtorch's stable ABI and no CPython API: it is loaded as operators, not
imported. Nothing here builds anything.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ._environment import flag

__all__ = [
    "cpu_isa",
    "cpu_unavailable",
    "cuda_note",
    "cuda_unavailable",
    "description",
    "library_path",
    "loaded",
    "operators",
    "unavailable",
]

_MINIMUM_TORCH = (2, 10)


@cache
def library_path() -> Path | None:
    """The compiled library beside this file, or None in a pure-Python installation."""
    candidates = sorted(Path(__file__).parent.glob("_C.*"))
    libraries = [path for path in candidates if path.suffix in {".so", ".dylib", ".pyd"}]
    return libraries[0] if libraries else None


def unavailable() -> str | None:
    """None once the library is loaded, else the reason and what to do. Loads at the first call."""
    if flag("HETEROAKD_DISABLE_EXTENSION"):
        return "HETEROAKD_DISABLE_EXTENSION is set."
    return _load()


@cache
def _load() -> str | None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MINIMUM_TORCH:
        return (
            f"the compiled extension needs torch >= {'.'.join(map(str, _MINIMUM_TORCH))}, "
            f"this is torch {torch.__version__}; upgrade torch."
        )
    path = library_path()
    if path is None and (Path(__file__).parent.parent / "setup.py").exists():
        return (
            f"the package is imported from the source tree {Path(__file__).parent.parent}, which "
            "has no compiled extension; an installed copy is found from another folder, or build "
            "it in place with `pip install --no-build-isolation --editable .`."
        )
    if path is None:
        return (
            "the package was installed without its compiled extension; install a C++17 compiler "
            "and ninja, then `pip install --no-build-isolation --force-reinstall --no-deps` it "
            "again (HETEROAKD_BUILD_EXTENSION=1 turns a failed build into an error)."
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} could not be loaded into torch {torch.__version__}: {error}"
    return None


def loaded() -> bool:
    """Whether the compiled operators can be called."""
    return unavailable() is None


def operators() -> Any:
    """The compiled operators, loading the library if this is the first use of it."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"the compiled operators cannot be used: {reason}")
    return torch.ops.heteroakd_fast_c


@cache
def description() -> dict[str, str]:
    """How the library was built: compiler, target torch, CUDA version and architectures."""
    if not loaded():
        return {}
    text: str = operators().build_info()
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def cpu_isa() -> str | None:
    """Return the instruction set of the CPU kernels, None where they cannot run."""
    return None if cpu_unavailable() else str(operators().cpu_isa())


def cpu_unavailable() -> str | None:
    """Return why the CPU kernels cannot run (no library, or HETEROAKD_CPU_ISA is refused), or
    None."""
    reason = unavailable()
    if reason is None:
        try:
            operators().cpu_isa()
        except RuntimeError as error:
            message = str(error).splitlines()[0]
            reason = message[message.find("HETEROAKD_CPU_ISA") :]  # without the line of the source
    return reason


def cuda_unavailable() -> str | None:
    """Why the compiled CUDA kernels cannot run with this torch and driver, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    built = description()
    if "cuda" not in built:
        absent = f" ({built['cuda_absent']})" if "cuda_absent" in built else ""
        return (
            f"the compiled extension was built without CUDA{absent}; rebuild with nvcc on the PATH "
            "and HETEROAKD_BUILD_CUDA=1."
        )
    if torch.version.hip:
        return f"torch {torch.__version__} is for ROCm, the compiled kernels are for CUDA."
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch."
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if driver // 1000 < int(_major(built["cuda"])):  # 12080 is 12.8
        return (
            f"the compiled kernels are of CUDA {built['cuda']}, the driver supports CUDA up to "
            f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or rebuild with CUDA_HOME "
            f"at a toolkit of CUDA {driver // 1000}."
        )
    return None


def cuda_note() -> str | None:
    """The CUDA versions of the compiled kernels and of torch where their majors differ."""
    built, of_torch = description().get("cuda"), torch.version.cuda
    if built is None or of_torch is None or _major(built) == _major(of_torch):
        return None
    return (
        f"the compiled kernels are of CUDA {built}, torch is of CUDA {of_torch}: the kernels need "
        f"a driver for CUDA {_major(built)}, whatever torch needs."
    )


def _major(version: str) -> str:
    return version.split(".")[0]
