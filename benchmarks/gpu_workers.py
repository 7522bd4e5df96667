"""What `benchmarks.gpu` runs in processes of its own: `python -m benchmarks.gpu_workers NAME ...`.

Each goes through a list of items and tells what it finds (`stages.go_through`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial

import torch

from .cases import SUITES, Case
from .gpu import BACKENDS, HEADLINE, NO_GPU, find_tool
from .inputs import make_inputs
from .providers import find
from .stages import Details, Item, go_through

DEVICE = "cuda"


def environment() -> list[Item]:
    return [("environment", describe)]


def describe() -> Details:
    """The machine and what is installed; "failed" where nothing can be run."""
    from . import provenance

    if not torch.cuda.is_available():
        return {"failed": NO_GPU}
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit"
    found = {
        **provenance.describe(DEVICE),
        "driver": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        "nvcc": output_of("nvcc", "--version").splitlines()[-1:],
        "tools": [name for name in ("ncu", "compute-sanitizer") if find_tool(name)],
    }
    # A device that is listed and cannot compute must fail here.
    assert float(torch.arange(10, device=DEVICE).sum()) == 45.0
    return found


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def one_step(case: Case, name: str) -> Details:
    """Forward and backward."""
    provider = find()[name]
    if reason := provider.cannot(case, DEVICE):
        return {"skipped": reason}
    began = time.monotonic()
    provider.build(case, make_inputs(case, DEVICE))().backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return {"seconds": round(time.monotonic() - began, 1)}


def compile_share(share: str) -> list[Item]:
    """The i-th of n shares of what Triton and torch.compile compile for the headline."""
    os.nice(10)  # nvcc, at the same time, has the longer way
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    items: list[Item] = [
        (f"{one.key} {name}", partial(one_step, one, name))
        for one in SUITES["gpu"]["headline"]
        for name in HEADLINE
        if name not in ("eager", "heteroakd[cuda]")
    ]
    i, n = map(int, share.split("/"))
    return items[i::n]


def counted() -> list[Item]:
    """The kernels of the first rows of the headline once each, for ncu."""
    return [(f"{one.key} {name}", partial(one_step, one, f"heteroakd[{name}]"))
            for one in SUITES["gpu"]["headline"][:2] for name in BACKENDS]  # fmt: skip


WORKERS: dict[str, Callable[..., list[Item]]] = {
    "environment": environment,
    "compile": compile_share,
    "counted": counted,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_workers")
    parser.add_argument("worker", choices=WORKERS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    go_through(WORKERS[options.worker](*options.arguments), options.start)


if __name__ == "__main__":
    main()
