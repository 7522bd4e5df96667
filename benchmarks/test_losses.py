"""The cases of the suite under pytest-benchmark, for its statistics, storage and comparison.

    python -m pytest benchmarks --benchmark-group-by=param:key
    python -m pytest benchmarks -k "hetero and eager" --benchmark-autosave

Ratios hold within one run only. `python -m benchmarks` interleaves the providers, checks each
against float64 and measures memory as well: prefer it for figures that are to be shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from .cases import SUITES, cases_of
from .inputs import make_inputs
from .providers import find

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark", reason='pip install "heteroakd_fast[bench]"')
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUITE = SUITES["gpu" if DEVICE == "cuda" else "cpu"]
CASES = {
    one.key: one
    for one in cases_of({g: SUITE[g] for g in ("headline", "objectives", "dtypes", "projections")})
}


@pytest.mark.parametrize("provider", find())
@pytest.mark.parametrize("key", CASES)
def test_loss(benchmark: BenchmarkFixture, key: str, provider: str) -> None:
    case, who = CASES[key], find()[provider]
    if reason := who.cannot(case, DEVICE):
        pytest.skip(f"cannot: {reason}")
    inputs = make_inputs(case, DEVICE)
    forward = who.build(case, inputs)

    def step() -> Tensor:
        for leaf in inputs.leaves:
            leaf.grad = None
        loss = forward()
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    loss = step()
    expected = find()["eager"].build(case, inputs)().detach()
    tolerance = 1e-4 if case.dtype == "float32" else 2e-2
    torch.testing.assert_close(loss.to(expected), expected, rtol=tolerance, atol=0)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
