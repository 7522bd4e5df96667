"""Channel-wise distillation, against the published formula written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import Batch, every_cpu_backend, make_batch
from torch import Tensor

from heteroakd_fast import ChannelWiseLoss
from heteroakd_fast.channelwise import channel_wise_distillation
from heteroakd_fast.labels import nearest_labels


def by_the_formula(batch: Batch, student: Tensor, t: float, resolution: str) -> Tensor:
    """A loop over images and classes, over the valid pixels only."""
    size = batch.target.shape[-2:] if resolution == "label" else student.shape[-2:]
    sides = [
        z if z.shape[-2:] == size else F.interpolate(z, size, mode="bilinear")
        for z in (student.double(), batch.teacher.double())
    ]
    rows = torch.arange(size[0]) * batch.target.shape[1] // size[0]
    columns = torch.arange(size[1]) * batch.target.shape[2] // size[1]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, labels in enumerate(batch.target):
        valid = labels[rows][:, columns] != 255
        if not valid.any():
            continue
        for c in range(student.shape[1]):
            p_s, p_t = ((z[b, c][valid] / t).softmax(0) for z in sides)
            total = total + t * t * (p_t * (p_t.log() - p_s.log())).sum()
            count += 1
    return total / max(count, 1)


@pytest.mark.parametrize("resolution", ["logits", "label"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_cpu_backend
def test_value_and_gradient(backend: str, dtype: torch.dtype, resolution: str) -> None:
    batch = make_batch(batch=3, dtype=dtype)
    batch.target[1] = 255  # an image that counts nowhere
    student = batch.student.clone().requires_grad_()
    output = ChannelWiseLoss(temperature=2.5, resolution=resolution, backend=backend)(
        student, batch.target, teacher_logits=batch.teacher
    )
    (1.7 * output.loss).backward()
    truth = batch.student.double().requires_grad_()
    expected = by_the_formula(batch, truth, 2.5, resolution)
    (1.7 * expected).backward()
    assert float(expected.detach()) > 0.05
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert float(output.cwd) == pytest.approx(float(expected.detach()), rel=rtol)
    rounding = {torch.bfloat16: 2**-8}.get(dtype, rtol)
    assert student.grad.dtype == dtype
    scale = truth.grad.abs().max()
    assert ((student.grad - truth.grad).abs() <= rounding * truth.grad.abs() + rtol * scale).all()
    assert not student.grad[1].any()
    labels = batch.target if resolution == "label" else nearest_labels(batch.target, (4, 6))
    assert int(output.valid) == int((labels != 255).sum())


def test_ignored_pixels_count_nowhere_and_confident_logits_are_finite() -> None:
    batch = make_batch(grid=(13, 17), teacher_grid=(13, 17))
    plain = batch.student.clone().requires_grad_()
    channel_wise_distillation(plain, batch.target, batch.teacher).loss.backward()
    spoilt = batch.student.clone()
    ignored = (batch.target == 255)[:, None].expand_as(spoilt)
    spoilt[ignored] = float("nan")
    spoilt.requires_grad_()
    teacher = torch.where(ignored, torch.inf, batch.teacher)
    channel_wise_distillation(spoilt, batch.target, teacher).loss.backward()
    torch.testing.assert_close(spoilt.grad, plain.grad, rtol=0, atol=0)
    assert plain.grad.abs().max() > 0
    confident = (1e4 * batch.student).requires_grad_()
    output = channel_wise_distillation(confident, batch.target, -1e4 * batch.teacher)
    output.loss.backward()
    assert output.loss.isfinite()
    assert confident.grad.isfinite().all()


def test_nothing_counted() -> None:
    batch = make_batch()
    student = torch.full_like(batch.student, float("nan")).requires_grad_()
    output = channel_wise_distillation(student, torch.full_like(batch.target, 255), batch.teacher)
    assert float(output.loss.detach()) == 0
    output.loss.backward()
    assert not student.grad.any()


def test_micro_batches_add_up() -> None:
    batch = make_batch(batch=4)
    batch.target[0] = 255
    whole = channel_wise_distillation(batch.student, batch.target, batch.teacher)
    halves = [Batch(*(t[rows] for t in batch)) for rows in (slice(0, 2), slice(2, 4))]
    first = [channel_wise_distillation(h.student, h.target, h.teacher) for h in halves]
    mean = sum(output.denominators["cwd"] for output in first if output.denominators) / 2
    again = [
        channel_wise_distillation(h.student, h.target, h.teacher, normalizer=mean).loss
        for h in halves
    ]
    assert float(sum(again) / 2) == pytest.approx(float(whole.loss), rel=1e-12)
    # As `denominators` has it, too.
    named = channel_wise_distillation(*halves[0].arguments, normalizer={"cwd": mean}).loss
    assert float(named) == float(again[0])
    assert float(sum(output.loss for output in first) / 2) != pytest.approx(float(whole.loss))


@pytest.mark.parametrize("resolution", ["logits", "label"])
@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 0), (2, 0, 8)])
def test_no_image_and_no_pixel(resolution: str, shape: tuple[int, int, int]) -> None:
    student, teacher = (torch.randn(shape[0], 3, side, side) for side in (4, 5))
    student.requires_grad_()
    target = torch.zeros(shape, dtype=torch.int64)
    output = ChannelWiseLoss(resolution=resolution)(student, target, teacher_logits=teacher)
    assert float(output.loss.detach()) == 0
    output.loss.backward()
    assert not student.grad.any()


def test_refuses() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="temperature: got -1.0"):
        ChannelWiseLoss(temperature=-1)
    with pytest.raises(ValueError, match="resolution: got 'full'"):
        ChannelWiseLoss(resolution="full")
    with pytest.raises(ValueError, match="teacher_logits: got C=4 classes"):
        channel_wise_distillation(batch.student, batch.target, batch.teacher[:, :4])
    with pytest.raises(ValueError, match="target: label 9"):
        channel_wise_distillation(batch.student, torch.full_like(batch.target, 9), batch.teacher)
    with pytest.raises(ValueError, match="normalizer"):
        channel_wise_distillation(*batch.arguments, normalizer=-1.0)
    with pytest.raises(ValueError, match="normalizer: names the term 'kd', this call computes cwd"):
        channel_wise_distillation(*batch.arguments, normalizer={"kd": 1.0})
    with pytest.raises(TypeError, match="teacher_logits: got None"):
        channel_wise_distillation(batch.student, batch.target, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ignore_index"):
        ChannelWiseLoss(ignore_index="x")(  # type: ignore[arg-type]
            batch.student, batch.target, teacher_logits=batch.teacher
        )
