"""Accuracy where a divergence is a small difference of large numbers: near agreement, at confident
pixels, and with one side of the mixture almost absent. The rules are in docs/contract.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Batch, assert_accurate, evaluate, every_backend, truth

from heteroakd_fast.channelwise import channel_wise_distillation
from heteroakd_fast.terms import CWD, DKD

DIVERGENCES: dict[str, dict[str, Any]] = {
    "kd": {"kd_weight": 1.0},
    "reverse": {"kd_weight": 1.0, "kd_divergence": "reverse"},
    "js": {"kd_weight": 1.0, "kd_divergence": "js"},
    "js-0.01": {"kd_weight": 1.0, "kd_divergence": "js", "kd_beta": 0.01},
    "hetero": {"hetero_weight": 1.0, "evaluation": "none"},
    "mix-logits": {"hetero_weight": 1.0, "mix": "logits", "evaluation": "none"},
    "mix-teacher": {"hetero_weight": 1.0, "mix": "teacher", "evaluation": "none"},
    "paper-space": {"hetero_weight": 1.0, "preset": "paper", "weight_axis": "space"},
    "dkd": {"terms": (DKD(beta=1.0, temperature=20.0),)},  # T^2 alone is in front of it
    "cwd": {"terms": (CWD(temperature=20.0),)},
}


def near_agreement(difference: float, classes: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    z = 2.0 * torch.randn(2, classes, 8, 8, generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    target = torch.randint(0, classes, (2, size, size), generator=generator)
    return Batch(z, z + difference * noise, target)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("difference", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("case", DIVERGENCES)
@every_backend
def test_values_near_agreement(backend: str, case: str, difference: float, size: int) -> None:
    """Within rounding of what is summed, and never negative; with T^2 = 400 in front of it."""
    options = {"ce_weight": 0.0, "temperature": 20.0, **DIVERGENCES[case]}
    batch = near_agreement(difference, 150 if backend == "cpu" else 40, size)
    got = evaluate(batch, backend=backend, **options).loss.item()
    expected = truth(batch, **options).loss.item()
    assert got >= 0.0
    # The instruction of GPUs has a logarithm of 22 digits.
    digits = 24 if backend == "cpu" or not torch.cuda.is_available() else 22
    assert got == pytest.approx(expected, rel=1e-5, abs=2.0**-digits * 20.0**2)


@pytest.mark.parametrize("difference", [1e-6, 1e-5])
def test_channel_wise_near_agreement(difference: float) -> None:
    batch = near_agreement(difference, 40, 32)
    expected = channel_wise(Batch(*(x.double() for x in batch[:2]), batch.target))
    got = channel_wise(batch)
    assert got >= 0.0
    assert got == pytest.approx(expected, rel=1e-5, abs=2.0**-24 * 4.0**2)


def channel_wise(batch: Batch) -> float:
    loss = channel_wise_distillation(batch.student, batch.target, batch.teacher, temperature=4.0)
    return loss.loss.item()


@pytest.mark.parametrize("rest", [1e-3, 1e-4, 1e-8])
@every_backend
def test_js_with_almost_all_weight_on_the_teacher(backend: str, rest: float) -> None:
    """Its gradient is 1 - beta times something, and float32 has few digits of 1 - beta."""
    options = {"ce_weight": 0.0, "kd_weight": 1.0, "kd_divergence": "js", "kd_beta": 1.0 - rest}
    batch = near_agreement(1.0, 19, 16)
    got, expected = evaluate(batch, backend=backend, **options), truth(batch, **options)
    assert_accurate(got.student_grad, expected.student_grad)


@pytest.mark.parametrize("spread", [30.0, 300.0, 1e4])
@pytest.mark.parametrize("case", ["reverse", "js"])
@every_backend
def test_pixels_without_gradient(backend: str, case: str, spread: float) -> None:
    """A confident student's gradient is a difference of log ratios, each as large as the logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (spread * torch.randn(1, 19, 24, 24, generator=generator) for _ in range(2))
    batch = Batch(student, teacher, torch.zeros(1, 24, 24, dtype=torch.long))
    options = {"ce_weight": 0.0, **DIVERGENCES[case]}
    got = evaluate(batch, grad_output=24.0 * 24.0, backend=backend, **options).student_grad
    exact = truth(batch, grad_output=24.0 * 24.0, **options).student_grad
    largest = exact.abs().amax(1)
    without = largest < 1e-20
    assert without.any()
    assert got.abs().amax(1)[without].max().item() < 1e-15
    if case == "reverse" and spread < 1e4:  # beyond, and of js, nothing is left at the others
        assert_accurate(got, exact)
