"""Upsampling + cross entropy, forward and backward: each backend beside eager PyTorch.

    python -m pytest benchmarks --benchmark-group-by=param:shape

Compare within one run only; shapes are those of real work (Cityscapes, VOC, ADE20K).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from heteroakd_fast import backends, functional
from heteroakd_fast.spec import LossSpec

# name: batch, classes, label height and width, stride of the logits
SHAPES = {
    "B2 C19 512x1024 stride 4": (2, 19, 512, 1024, 4),
    "B2 C19 512x1024 stride 8": (2, 19, 512, 1024, 8),
    "B4 C21 512x512 stride 8": (4, 21, 512, 512, 8),
    "B2 C150 512x512 stride 4": (2, 150, 512, 512, 4),
}


def eager(logits: Tensor, target: Tensor) -> Tensor:
    z = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(z, target, ignore_index=255)


def on(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, target: functional.cross_entropy(logits, target, backend=backend).loss


def providers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Eager PyTorch and every backend that computes this here; `reference` is eager again."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"eager": eager}
    for name, reason in backends.available().items():
        if name == "reference" or reason is not None:
            continue
        found[name] = on(backends.select(name, LossSpec(terms=("ce",)), "cpu"))
    return found


@pytest.mark.parametrize("provider", providers())
@pytest.mark.parametrize("shape", SHAPES)
def test_upsample_cross_entropy(benchmark: BenchmarkFixture, shape: str, provider: str) -> None:
    batch, classes, height, width, stride = SHAPES[shape]
    torch.manual_seed(0)
    logits = torch.randn(batch, classes, height // stride, width // stride, requires_grad=True)
    target = torch.randint(0, classes, (batch, height, width))
    loss = providers()[provider]

    def step() -> Tensor:
        logits.grad = None
        value = loss(logits, target)
        value.backward()
        return value.detach()

    value = step()
    torch.testing.assert_close(value, eager(logits.detach(), target), rtol=1e-5, atol=0)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
