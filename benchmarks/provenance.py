"""Where a result comes from: machine, versions, commit, and whether the tests passed on it.

python -m benchmarks.provenance --tests-passed      remembers that they did (dev.py calls it)
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["commit", "describe", "fingerprint", "remember_tests"]

ROOT = Path(__file__).resolve().parent.parent
_STAMP = ROOT / "runs" / "tests-passed"
_SOURCES = ("heteroakd_fast", "kernels", "csrc", "benchmarks", "tests")
_SUFFIXES = {".py", ".cpp", ".cu", ".h", ".toml", ".json"}
_PACKAGES = (
    "numpy", "triton", "transformers", "pytest", "liger-kernel", "orda-kernel", "cut-cross-entropy",
)  # fmt: skip


def fingerprint() -> str:
    """Of every source file that speed or correctness depends on, committed or not."""
    digest = hashlib.sha256()
    files = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    for folder in _SOURCES:
        files += sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in _SUFFIXES)
    for file in files:
        digest.update(str(file.relative_to(ROOT)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def remember_tests() -> None:
    """The whole test suite passed on exactly these sources, on this machine."""
    _STAMP.parent.mkdir(exist_ok=True)
    _STAMP.write_text(fingerprint())


def commit() -> str:
    """Short hash, with a + where the sources differ from it."""
    names = []
    for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain")):
        try:
            found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return "unknown"
        names.append(found.stdout.strip() if found.returncode == 0 else "")
    name, changes = names
    return (name + ("+" if changes else "")) if name else "unknown"


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions, without names of hosts or people."""
    import torch

    from heteroakd_fast import info

    found = info.collect()
    passed = _STAMP.exists() and _STAMP.read_text() == fingerprint()
    about: dict[str, Any] = {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packages": _versions(),
        "commit": commit(),
        "tests": "passed" if passed else "not run on these sources",
        "sources": fingerprint(),
        **{name: found[name] for name in ("cpu_capability", "python", "torch", "torch_cuda",
                                          "extension_build", "backends")},
    }  # fmt: skip
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(0)
        about |= {
            "machine": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "second_level_cache_mib": gpu.L2_cache_size >> 20,
        }
    return about


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Of what is installed of the packages that matter."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--tests-passed"]:
        raise SystemExit(__doc__)
    remember_tests()
