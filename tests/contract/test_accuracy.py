"""Accuracy where a divergence is a small difference of large numbers: near agreement, at confident
pixels, and with one side of the mixture almost absent. The rules are in docs/contract.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from common import TERM_CASES, Batch, assert_accurate, evaluate, every_backend, truth

from heteroakd_fast.channelwise import channel_wise_distillation


def alone(case: str, **options: Any) -> dict[str, Any]:
    """The term of a case with weight 1, and with these options."""
    given = TERM_CASES[case]
    changes = {"weight": 1.0, **options}
    terms = [
        replace(term, **{name: x for name, x in changes.items() if hasattr(term, name)})
        for term in given.get("terms", ())
    ]
    if terms:
        return {**given, "terms": terms}
    weights = {name: 1.0 for name, x in given.items() if name.endswith("_weight") and x}
    return {**given, **weights, **options}


#: Terms whose value does not vanish in agreement, or is rounding there: discrepancies weigh it.
NO_DIVERGENCES = (
    *("ce", "ce-smoothed", "teacher_ce", "feature", "focal", "ofa", "all", "all+objects"),
    *("hetero-softmax-kl", "hetero-softmax-kl-T", "hetero-mix-logits", "hetero-mix-teacher"),
    *("hetero-paper", "hetero-paper-mix-teacher", "hetero-paper-no-evaluation"),
)
#: Options that are factors of the rounding, beside T^2 = 400.
FACTORS: dict[str, dict[str, float]] = {
    "kd-js": {"kd_beta": 0.5},
    "dkd": {"alpha": 1.0, "beta": 1.0},
}
DIVERGENCES: dict[str, dict[str, Any]] = {
    **{
        case: alone(case, temperature=20.0, **FACTORS.get(case, {}))
        for case in TERM_CASES
        if case not in NO_DIVERGENCES
    },
    "kd-skew-0.01": alone("kd-skew", temperature=20.0, kd_alpha=0.01),
    "kd-js-0.01": alone("kd-js", temperature=20.0, kd_beta=0.01),
    "hetero-mix-logits": alone("hetero-mix-logits", temperature=20.0, evaluation="none"),
    "hetero-mix-teacher": alone("hetero-mix-teacher", temperature=20.0, evaluation="none"),
}
#: Terms that a confident pixel has no gradient of. (One of `hetero` has the rounding of weights.)
CONFIDENT = [x for x in TERM_CASES if x != "teacher_ce" and not x.startswith(("hetero", "all"))]


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
    """Within rounding of what is summed, and never negative."""
    options = DIVERGENCES[case]
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
@pytest.mark.parametrize("divergence", ["js", "skew"])
@every_backend
def test_mixtures_of_almost_the_teacher_alone(backend: str, divergence: str, rest: float) -> None:
    """Its gradient is 1 - beta times something, and float32 has few digits of 1 - beta."""
    options = {"ce_weight": 0.0, "kd_weight": 1.0, "kd_divergence": "js", "kd_beta": 1.0 - rest}
    if divergence == "skew":
        if backend == "reference":
            pytest.skip("autograd takes it from differences that are 1 / rest as large")
        options.update(kd_divergence="skew", kd_alpha=options.pop("kd_beta"))
    batch = near_agreement(1.0, 19, 16)
    got, expected = evaluate(batch, backend=backend, **options), truth(batch, **options)
    assert_accurate(got.student_grad, expected.student_grad)


@pytest.mark.parametrize("spread", [30.0, 300.0, 1e4])
@pytest.mark.parametrize("case", CONFIDENT)
@every_backend
def test_pixels_without_gradient(backend: str, case: str, spread: float) -> None:
    """A confident student's gradient is a difference of log ratios, each as large as the logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (spread * torch.randn(1, 19, 24, 24, generator=generator) for _ in range(2))
    batch = Batch(student, teacher, torch.zeros(1, 24, 24, dtype=torch.long))
    options = alone(case)
    got = evaluate(batch, grad_output=24.0 * 24.0, backend=backend, **options).student_grad
    exact = truth(batch, grad_output=24.0 * 24.0, **options).student_grad
    largest = exact.abs().amax(1)
    without = largest < 1e-20
    assert without.any() or case not in ("kd-reverse", "kd-js", "kd-skew")
    assert (got.abs().amax(1)[without] < 1e-15).all()
    # beyond, and of mixtures, nothing is left at the others
    if spread < 1e4 and case not in ("kd-js", "kd-skew"):
        assert_accurate(got, exact)
