"""The time that no implementation can beat, and the machine's rates it follows from.

Counted is the arithmetic that the method itself asks for, per pixel and class of the label grid,
and the bytes that must move: each logit and label read once, each gradient written once. The rates
are measured by the libraries that reach them: a matrix product for multiply-adds, a large copy for
bytes. On a CPU exponentials and logarithms run on the same units as multiply-adds and are counted
in them; on a GPU they have a unit of their own.

Counts for one model (student or teacher), per pixel and class:
    interpolation 1 multiply-add (a running sum along the row; the vertical one is shared by a row)
    maximum 1, exponent's argument 1, sum of exponentials 1, exponential 1
and for the gradient of the student: its value 2, the adjoint of the interpolation 2. Each term adds
what `_TERMS` says. Strides that are not 1 share the vertical interpolation, which is left out: the
floor is a little too low rather than too high.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .cases import Case
from .inputs import make_inputs

__all__ = ["Rates", "floor_ms", "measure_rates"]

#: multiply-adds that one exponential or logarithm costs where there is no unit for it:
#: range reduction, a polynomial of degree 5, scaling
EXP_AS_FMA = 7
LOG_AS_FMA = 7


@dataclass(frozen=True)
class Work:
    """Per pixel and class."""

    fma: float
    exp: float
    log: float


_STUDENT = Work(fma=4 + 4, exp=1, log=0)
_TEACHER = Work(fma=4, exp=1, log=0)
# Beyond the exponentials at T = 1. At a T that is a small integer exp(z) is a power of exp(z / T)
# (1 multiplication); at another T the terms need one more exponential for each model.
_TERMS = {
    "kd": Work(fma=2 + 2, exp=0, log=0),  # sum of p_t (z_t - z_s); gradient p_s - p_t
    # mixture 2, discrepancy 1, entropy of the mixture 2 and its logarithm, gradient 3
    "hetero": Work(fma=8, exp=0, log=1),
    # two binary cross entropies and that of the mixture, class weights, mixture, value, gradient
    "paper": Work(fma=14, exp=3, log=3),
}


def work_of(case: Case) -> Work:
    options = case.target.options
    if case.target.evaluates:  # nothing for certain: few classes may be able to win in a cell
        return Work(fma=0, exp=0, log=0)
    parts = [_STUDENT]
    if case.target.needs_teacher:
        parts.append(_TEACHER)
        if float(options.get("temperature", 1.0)).is_integer():
            parts.append(Work(fma=2, exp=0, log=0))
        else:
            parts.append(Work(fma=0, exp=2, log=0))
    if options.get("kd_weight"):
        parts.append(_TERMS["kd"])
    if options.get("hetero_weight"):
        parts.append(_TERMS["paper" if options.get("preset") == "paper" else "hetero"])
        if options.get("mix") == "logits":
            parts.append(Work(fma=1, exp=1, log=0))
    return Work(*(sum(getattr(p, name) for p in parts) for name in ("fma", "exp", "log")))


@dataclass(frozen=True)
class Rates:
    """Of this machine, all cores of it."""

    fma_per_s: float
    bytes_per_s: float
    exp_per_s: float
    """0 where exponentials are made of multiply-adds"""


@cache
def measure_rates(device: str) -> Rates:
    """The best of several tries: a floor is what the machine can, not what it did."""
    size = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device)
    fma = size**3 / _best_seconds(lambda: torch.mm(a, b), device)
    source = torch.randn(2**26 if device == "cpu" else 2**29, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    bandwidth = moved / _best_seconds(lambda: target.copy_(source), device)
    exp = 0.0
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        # 16 a clock and multiprocessor on every generation from sm_70 on
        exp = 16.0 * gpu.multi_processor_count * 1e3 * getattr(gpu, "clock_rate", 1_755_000)
    return Rates(fma, bandwidth, exp)


def _best_seconds(step: Callable[[], object], device: str, tries: int = 8) -> float:
    best = float("inf")
    for _ in range(tries):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def bytes_of(case: Case) -> int:
    """Every input read once, every gradient written once."""
    inputs = make_inputs(case)
    return inputs.bytes() + sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves)


def floor_ms(case: Case, rates: Rates) -> tuple[float, str]:
    """Milliseconds, and what binds: "arithmetic", "exponentials" or "bytes".

    Projections add their three matrix products (forward, to the features, to the weight).
    """
    work, count = work_of(case), case.pixel_classes
    fma = work.fma * count
    if case.target.from_features:
        h, w = case.grid(case.stride)
        fma += 3.0 * case.batch * case.classes * case.channels * h * w
    special = (work.exp + work.log) * count
    seconds = {"bytes": bytes_of(case) / rates.bytes_per_s}
    if rates.exp_per_s:
        seconds["arithmetic"] = fma / rates.fma_per_s
        seconds["exponentials"] = special / rates.exp_per_s
    else:
        fma += (EXP_AS_FMA * work.exp + LOG_AS_FMA * work.log) * count
        seconds["arithmetic"] = fma / rates.fma_per_s
    binding = max(seconds, key=lambda name: seconds[name])
    return 1e3 * seconds[binding], binding
