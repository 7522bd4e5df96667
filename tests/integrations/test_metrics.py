"""Scores against a case worked out by hand and against a count pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heteroakd_fast.integrations.metrics import ConfusionMatrix


def logits_of(prediction: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits whose largest is that of the predicted class."""
    return torch.nn.functional.one_hot(prediction, classes).movedim(-1, 1).float()


def test_by_hand() -> None:
    matrix = ConfusionMatrix(4, ignore_index=255)
    target = torch.tensor([[[0, 0, 0, 1], [1, 2, 255, 255]]])
    prediction = torch.tensor([[[0, 0, 1, 1], [0, 2, 3, 0]]])
    matrix.update(logits_of(prediction, 4), target)
    scores = matrix.scores()
    # class 0: 2 hits of {3 labelled, 1 wrongly predicted}; 1: 1 of {2, 1}; 2: 1 of 1; 3: absent.
    assert scores.class_iou[:3] == pytest.approx((2 / 4, 1 / 3, 1.0))
    assert math.isnan(scores.class_iou[3])
    assert scores.miou == pytest.approx((2 / 4 + 1 / 3 + 1.0) / 3)
    assert scores.pixel_accuracy == pytest.approx(4 / 6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_against_brute_force_over_several_batches(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    classes, ignore = 6, 200
    matrix = ConfusionMatrix(classes, ignore)
    targets, predictions = [], []
    for _ in range(3):
        target = rng.integers(0, classes - 1, size=(2, 9, 11))  # the last class is never labelled
        target[rng.random(target.shape) < 0.1] = ignore
        prediction = np.where(rng.random(target.shape) < 0.5, target % classes, rng.integers(0, 6))
        targets.append(target)
        predictions.append(prediction)
        logits = logits_of(torch.from_numpy(prediction), classes)
        matrix.update(logits, torch.from_numpy(target).to(dtype))
    t, p = np.concatenate(targets), np.concatenate(predictions)
    expected = []
    for c in range(classes):
        both = ((t == c) & (p == c) & (t != ignore)).sum()
        either = (((t == c) | (p == c)) & (t != ignore)).sum()
        expected.append(both / either if either else math.nan)
    scores = matrix.scores()
    np.testing.assert_allclose(scores.class_iou, expected)
    assert scores.miou == pytest.approx(np.nanmean(expected))
    assert scores.pixel_accuracy == pytest.approx(
        ((t == p) & (t != ignore)).sum() / (t != ignore).sum()
    )


def test_nothing_counted_gives_nan_and_no_error() -> None:
    matrix = ConfusionMatrix(3, ignore_index=255)
    matrix.update(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 255))
    assert math.isnan(matrix.scores().miou)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("ignore", [255, None, 2])
def test_low_resolution_logits_and_unlabelled_pixels(
    align_corners: bool, ignore: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 6, generator=generator)
    target = torch.randint(0, 5, (2, 16, 24), generator=generator).to(torch.uint8)
    target[0, :5] = 254
    if ignore == 255:
        target[1, :3] = 255
    matrix = ConfusionMatrix(5, ignore, unlabelled_index=254, align_corners=align_corners)
    matrix.update(logits, target)
    prediction = torch.nn.functional.interpolate(
        logits, (16, 24), mode="bilinear", align_corners=align_corners
    ).argmax(1)
    counted = (target != 254) & (target != (255 if ignore is None else ignore))
    pairs = target[counted].long() * 5 + prediction[counted]
    assert torch.equal(matrix.counts, torch.bincount(pairs, minlength=25).view(5, 5))
    assert (target == 254).any(), "or the test proves nothing"
