"""Where a result comes from: machine, versions, commit, and whether the tests passed on it.

python -m benchmarks.provenance --tests-passed      remembers that they did (dev.py calls it)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["commit", "describe", "remember_tests", "tests_status", "versions"]

ROOT = Path(__file__).resolve().parent.parent
_STAMP = ROOT / "runs" / "tests-passed.json"
_SOURCES = ("heteroakd_fast", "kernels", "csrc", "benchmarks", "tests")
_SUFFIXES = {".py", ".cpp", ".cu", ".h", ".toml", ".json"}


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
    _STAMP.parent.mkdir(exist_ok=True)
    _STAMP.write_text(json.dumps({"fingerprint": fingerprint(), "commit": commit()}))


def tests_status() -> str:
    """ "passed" if the whole suite did on exactly these sources, on this machine."""
    if not _STAMP.exists():
        return "not run on these sources"
    same = json.loads(_STAMP.read_text())["fingerprint"] == fingerprint()
    return "passed" if same else "not run on these sources"


def commit() -> str:
    """Short hash, with a + where the sources differ from it."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        name = git("rev-parse", "--short", "HEAD")
        return (name + ("+" if git("status", "--porcelain") else "")) if name else "unknown"
    except OSError:
        return "unknown"


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions, without names of hosts or people."""
    import torch

    from heteroakd_fast import info

    report = info.collect()
    about: dict[str, Any] = {
        "device": device,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "cpu_capability": report["cpu_capability"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "extension": report["extension_build"],
        "backends": report["backends"],
        "commit": commit(),
        "tests": tests_status(),
        "packages": versions("numpy", "triton", "transformers", "liger-kernel", "orda-kernel"),
    }
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return about


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def versions(*names: str) -> dict[str, str]:
    """Of the distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--tests-passed"]:
        raise SystemExit(__doc__)
    remember_tests()
