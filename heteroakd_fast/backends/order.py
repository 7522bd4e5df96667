"""In which order the compiled backends of a device are tried, and why.

CUDA C++ and Triton both run on NVIDIA GPUs. Which is faster is a matter of measurement: of a
table, `order.json`, by name of the device and kind of call, which `python3 dev.py gpu` makes from
its benchmarks (stage "order") and which is committed. Never of a measurement made while training:
every rank and every run gets the same backend, hence the same bits. A device that is not in the
table gets the order that the kernels' machine code suggests (docs/cuda.md), and the reason says so.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from ..spec import LossSpec

__all__ = ["CANDIDATES", "KINDS", "Order", "kind_of", "order"]

#: Compiled backends by type of device; `reference` stands behind each without being named.
CANDIDATES: Final[dict[str, tuple[str, ...]]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
    "xpu": ("triton",),
}

#: Calls that are alike for the choice; what tells them apart is known while a graph is traced.
KINDS: Final[dict[str, str]] = {
    "usual": "ce, forward kd, hetero of the preset softmax-kl with mix = probs",
    "other": "any other term or option",
}

_UNMEASURED: Final = {
    "usual": (
        ("cuda", "triton"),
        "on paper the kernels of cuda need fewer instructions here, and nothing is compiled at the "
        "first call",
    ),
    "other": (
        ("triton", "cuda"),
        "on paper Triton's kernels, compiled for exactly this call, need fewer instructions than "
        "the one kernel of cuda that serves all of these calls",
    ),
}


class Order(NamedTuple):
    """Names of backends, first the one to try first, and why in this order."""

    names: tuple[str, ...]
    reason: str


def kind_of(spec: LossSpec) -> str:
    """One of `KINDS`; looks at `spec.structure()` only."""
    kd = "kd" not in spec.terms or spec.kd_divergence == "forward"
    hetero = ("hetero" not in spec.terms and not spec.maps) or (
        spec.preset == "softmax-kl" and spec.mix == "probs"
    )
    return "usual" if kd and hetero and "feature" not in spec.terms else "other"


def order(device_type: str, kind: str, device_name: str | None = None) -> Order:
    """The order for a kind of call; device_name: None for the current CUDA device."""
    candidates = CANDIDATES.get(device_type, ())
    if len(candidates) < 2:
        return Order(candidates, "there is no other" if candidates else "none is compiled for it")
    name = _device_name() if device_name is None else device_name
    measured = _table().get(name, {}).get(kind)
    if measured is not None:
        faster: str = measured["faster"]
        rest = tuple(candidate for candidate in candidates if candidate != faster)
        return Order(
            (faster, *rest),
            f"measured on {name}: {measured['ratio']:.2f} times as fast as {' and '.join(rest)} "
            f"over {measured['cases']} cases (commit {measured['commit'][:10]})",
        )
    names, reason = _UNMEASURED[kind]
    return Order(names, f"not measured on {name}; {reason}")


@cache
def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this device"


@cache
def _table() -> dict[str, Any]:
    """{device: {kind: {faster, ratio, cases, commit}}}"""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("order.json").read_text())
    return table
