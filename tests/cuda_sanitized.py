"""Calls of the CUDA kernels for a process with sanitizers: `test_cuda_shim.py` runs it.

Prints "finished" at the end; an access out of bounds or a misaligned one ends the process before.
"""

from __future__ import annotations

from typing import Any

import cuda_shim
import torch
from common import TERM_CASES, evaluate, make_batch

from heteroakd_fast import backends
from heteroakd_fast.backends import cuda

# Sizes at which nothing is a multiple of anything: ends of rows, warps, blocks, staged classes.
CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"grid": (3, 5), "teacher_grid": None, "size": (13, 17), "classes": 5},
        {"hetero_weight": 1.0},
    ),
    ({"grid": (2, 35), "teacher_grid": None, "size": (7, 107), "classes": 3}, {"kd_weight": 1.0}),
    (
        {"grid": (2, 3), "teacher_grid": None, "size": (8, 12), "classes": 33},
        {"hetero_weight": 1.0},
    ),
    ({"grid": (5, 7), "teacher_grid": None, "size": (5, 7), "classes": 5}, {"hetero_weight": 1.0}),
    ({"grid": (5, 8), "teacher_grid": None, "size": (5, 8), "classes": 5}, {"hetero_weight": 1.0}),
    ({"grid": (4, 6), "teacher_grid": (8, 3), "size": (13, 17)}, TERM_CASES["all"]),
    ({"grid": (4, 6), "teacher_grid": (8, 3), "size": (13, 17)}, TERM_CASES["hetero-paper-space"]),
    ({"grid": (1, 1), "teacher_grid": (9, 7), "size": (9, 7)}, TERM_CASES["hetero-mix-logits"]),
]


def main() -> None:
    torch.manual_seed(0)
    cuda.BACKEND.__init__(lambda: cuda_shim.load(sanitize=True), ("cpu",))  # type: ignore[misc]
    backends._unavailable.cache_clear()
    for shape, options in CALLS:
        maps = "hetero_weight" in options
        for dtype in (torch.float32, torch.bfloat16):
            batch = make_batch(dtype=dtype, **shape)
            # beyond the limit of staged logits: pixels are handed over
            batch.student[0, 0, -1, -1] = -1000.0
            result = evaluate(batch, backend="cuda", return_maps=maps, **options)
            assert result.loss.isfinite(), (shape, options)
    print("finished")


if __name__ == "__main__":
    main()
