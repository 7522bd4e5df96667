"""Measures launches on the GPU at hand and writes a table that `config.py` reads.

    python -m heteroakd_fast.kernels.tune --logits 8x19x128x256 --labels 512x1024 \\
        --output launches.json
    HETEROAKD_TRITON_CONFIG=launches.json python train.py

Opt-in, and never part of training: a launch decides the order of sums, so that all ranks need the
same file. Other rows of an existing file stay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch

from heteroakd_fast import _requirements

from . import config

__all__ = ["candidates", "fastest", "main"]

#: One objective for each row of the table that interpolates.
OBJECTIVES: Final[dict[str, dict[str, Any]]] = {
    "light": {"hetero_weight": 1.0, "temperature": 2.0},
    "heavy": {"hetero_weight": 1.0, "temperature": 2.0, "mix": "logits"},
}

Timer = Callable[[Callable[[], object]], float]


def candidates() -> list[config.Launch]:
    return [config.Launch(*row) for row in product((4, 8, 16), (1, 2, 4))]


def fastest(
    step: Callable[[], object], timer: Timer, choices: Sequence[config.Launch]
) -> tuple[config.Launch, dict[config.Launch, float]]:
    """The choice whose median of three visits is the smallest; every choice is visited once before
    any is visited again, so that a clock that drifts does not favour the first."""
    times: dict[config.Launch, list[float]] = {choice: [] for choice in choices}
    for _ in range(3):
        for choice in choices:
            with config.forced(choice):
                times[choice].append(timer(step))
    medians = {choice: statistics.median(seen) for choice, seen in times.items()}
    return min(medians, key=lambda choice: medians[choice]), medians


def _step(shape: Sequence[int], labels: Sequence[int], dtype: torch.dtype, key: str) -> Any:
    from heteroakd_fast import functional

    generator = torch.Generator(device="cuda").manual_seed(0)
    student = torch.randn(*shape, generator=generator, device="cuda").to(dtype).requires_grad_()
    teacher = torch.randn(*shape, generator=generator, device="cuda").to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *labels), generator=generator, device="cuda")

    def step() -> object:
        loss = functional.distillation_loss(
            student, target, teacher, backend="triton", **OBJECTIVES[key]
        ).loss
        return torch.autograd.grad(loss, student)

    return step


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split("x")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m heteroakd_fast.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--logits", type=_sizes, required=True, metavar="BxCxhxw")
    parser.add_argument("--labels", type=_sizes, required=True, metavar="HxW")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if len(options.logits) != 4 or len(options.labels) != 2:
        parser.error("--logits takes BxCxhxw and --labels HxW, e.g. 8x19x128x256 and 512x1024")
    if options.logits[2:] == options.labels:
        parser.error("--labels: the logits have that size, and nothing there is tuned")
    if not torch.cuda.is_available():
        print("no GPU is visible to torch: there is nothing to measure", file=sys.stderr)
        return 2
    if problem := _requirements.explain({"triton": "triton"}, "triton"):
        print(problem, file=sys.stderr)
        return 2
    from triton.testing import do_bench

    def timer(step: Callable[[], object]) -> float:
        return float(do_bench(step, warmup=20, rep=60, return_mode="median"))

    table: dict[str, Any] = {}
    if options.output.exists():
        table = json.loads(options.output.read_text())["launches"]
    for key in OBJECTIVES:
        step = _step(options.logits, options.labels, getattr(torch, options.dtype), key)
        best, medians = fastest(step, timer, candidates())
        now = config.launch_config(key, options.logits[1], "")
        table[f"{torch.cuda.get_device_name()}/{key}/{options.logits[1]}"] = best._asdict()
        print(
            f"{key}: {best} {medians[best]:.4f} ms; {now} {medians.get(now, float('nan')):.4f} ms"
        )
    partial = options.output.with_suffix(".partial")
    partial.write_text(json.dumps({"launches": table}, indent=2) + "\n")
    os.replace(partial, options.output)  # whole or not at all: trainers may be reading it
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
