"""Peak memory of one step.

On a GPU the caching allocator counts it. On the CPU the kernel does: the process's high-water mark
(VmHWM) above what was resident just before the step. Every case gets a process of its own, because
memory that an earlier case freed would hide what this one takes.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .inputs import make_inputs
from .providers import find

__all__ = ["fresh_process", "high_water", "peak_bytes", "supported"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def supported() -> str | None:
    """Why the high-water mark cannot be read here, or None."""
    if _STATUS.exists() and _CLEAR_REFS.exists():
        return None
    return "needs Linux (/proc/self/clear_refs)"


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def high_water(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that `step` takes at its peak beyond what was taken before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed must not count as there already
    _CLEAR_REFS.write_text("5")  # resets VmHWM to VmRSS
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before)


def fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, computed in a new process with torch already imported.

    Raises:
        RuntimeError: the process died (of memory, say) or the function failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "heteroakd_fast", "benchmarks.memory"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError("the process was killed, perhaps for want of memory") from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RuntimeError(text) from None


def peak_bytes(case: Case, provider: str, device: str = "cpu") -> int:
    """Peak of forward and backward above inputs, outputs' gradients included.

    Raises:
        RuntimeError: as `fresh_process`.
    """
    if device != "cpu":
        return _peak(case, provider, device)
    value: int = fresh_process(_peak, case, provider, device)
    return value


def _peak(case: Case, provider: str, device: str) -> int:
    inputs = make_inputs(case, device)
    forward = find()[provider].build(case, inputs)

    def step() -> None:
        result = forward()
        if not case.target.evaluates:
            result.backward()  # type: ignore[no-untyped-call]

    step()  # compiles, starts thread pools, fills caches
    for leaf in inputs.leaves:
        leaf.grad = None
    return high_water(step, device)
