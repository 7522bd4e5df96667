"""Peak memory of one step.

On a GPU the caching allocator counts it. On the CPU the kernel does: the process's high-water mark
(VmHWM) above what was resident just before the step. Every case gets a process of its own, because
memory that an earlier case freed would hide what this one takes.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .inputs import make_inputs
from .providers import find

__all__ = [
    "death",
    "fresh_process",
    "gpu_high_water",
    "high_water",
    "largest_crop",
    "peak_bytes",
]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def supported() -> str | None:
    """Why the high-water mark cannot be read here, or None."""
    if _STATUS.exists() and _CLEAR_REFS.exists():
        return None
    return "needs Linux (/proc/self/clear_refs)"


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def high_water(step: Callable[[], object]) -> int:
    """Bytes of this process that `step` adds at its peak to what was resident before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed must not count as there already
    _CLEAR_REFS.write_text("5")  # resets VmHWM to VmRSS
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before)


def fresh_process(function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> Any:
    """The function's value, computed in a new process with torch already imported.

    Raises:
        RuntimeError: the process died (of memory, say), failed, or ran out of time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "heteroakd_fast", "benchmarks.memory"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(send, function, arguments), daemon=False)
    process.start()
    send.close()
    try:
        if not receive.poll(timeout):
            process.kill()
            raise RuntimeError(f"took more than {timeout:.0f} s")
        try:
            value, error = receive.recv()
        except EOFError:
            process.join()
            raise RuntimeError(death(process.exitcode)) from None
    finally:
        process.join()
        receive.close()
    if error is not None:
        raise RuntimeError(error)
    return value


def _run(send: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    result: tuple[Any, str | None]
    try:
        result = (function(*arguments), None)
    except Exception as error:
        text = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        result = (None, text)
    send.send(result)
    send.close()


def death(exit_code: int | None) -> str:
    """What an exit status tells."""
    if exit_code == -signal.SIGKILL:
        return "killed, perhaps for want of memory"
    return f"the process ended with {exit_code}"


def peak_bytes(case: Case, provider: str, device: str = "cpu") -> int:
    """Peak of forward and backward above inputs, outputs' gradients included.

    Raises:
        RuntimeError: as `fresh_process`.
    """
    if device != "cpu":
        return gpu_high_water(_step(case, provider, device))
    value: int = fresh_process(_peak_on_cpu, case, provider)
    return value


def _step(case: Case, provider: str, device: str) -> Callable[[], None]:
    inputs = make_inputs(case, device)
    forward = find()[provider].build(case, inputs)

    def step() -> None:
        forward().backward()

    step()  # compiles, starts thread pools, fills caches
    for leaf in inputs.leaves:
        leaf.grad = None
    return step


def _peak_on_cpu(case: Case, provider: str) -> int:
    return high_water(_step(case, provider, "cpu"))


def gpu_high_water(step: Callable[[], object]) -> int:
    """Bytes of GPU memory that `step` allocates at its peak beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def largest_crop(
    case: Case, provider: str, budget: int, device: str = "cpu", largest: int = 8192
) -> dict[str, Any]:
    """The side of the largest square label map whose loss stays within `budget` bytes.

    Memory is linear in pixels, so two measurements predict the answer, and a third confirms it:
    the peak at the returned side was measured and is within the budget.
    """

    def peak(side: int) -> int:
        return peak_bytes(replace(case, height=side, width=side), provider, device)

    unit = 32 * max(case.stride, case.teacher_stride) // 4
    small, large = 256, 512
    low, high = peak(small), peak(large)
    per_pixel = max((high - low) / (large**2 - small**2), 1e-3)
    side = int((budget / per_pixel) ** 0.5) // unit * unit
    while True:
        side = max(unit, min(side, largest))
        used = peak(side)
        if used <= budget or side == unit:
            return {"side": side, "peak_bytes": used, "capped": side == largest}
        side = (side - unit) // unit * unit
