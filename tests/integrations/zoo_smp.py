"""With real models of segmentation_models_pytorch; `test_zoo.py` runs it where they are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import tiny
import torch
import torch.nn.functional as F

from heteroakd_fast import HeteroAKDLoss, functional, terms
from heteroakd_fast.integrations import FrozenTeacher
from heteroakd_fast.integrations.smp import DistillationLoss, low_resolution

OPTIONS: dict[str, Any] = {"kd_weight": 0.5, "temperature": 2.0}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images, target = tiny.data(2, size=64)
    target[0, :9] = 255
    return images, target


def unet(**options: Any) -> torch.nn.Module:
    return smp.Unet(
        "mobilenet_v2",
        encoder_weights=None,
        classes=tiny.CLASSES,
        decoder_channels=(32, 16, 16, 8, 8),
        **options,
    )


def fpn(**options: Any) -> torch.nn.Module:
    return smp.FPN("resnet18", encoder_weights=None, classes=tiny.CLASSES, **options)


def test_equals_the_plain_loss() -> None:
    student, teacher = unet(), FrozenTeacher(fpn())
    images, target = batch()
    ours = DistillationLoss("multiclass", tiny.CLASSES, ignore_index=255, **OPTIONS)
    taught = teacher(images)["teacher_logits"]
    parameters = [p for p in student.parameters() if p.requires_grad]
    loss = ours(student(images), target, taught)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    plain = HeteroAKDLoss(tiny.CLASSES, **OPTIONS)(student(images), target, teacher_logits=taught)
    expected = torch.autograd.grad(plain.loss, parameters, allow_unused=True)
    torch.testing.assert_close(loss, plain.loss)
    for one, two in zip(grads, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, two)
    assert sum(grad is not None and bool(grad.any()) for grad in grads) > 10


def test_low_resolution_changes_the_memory_and_not_the_loss() -> None:
    torch.manual_seed(0)
    student, teacher = (
        fpn().eval(),
        smp.DeepLabV3Plus(
            "mobilenet_v2", encoder_weights=None, classes=tiny.CLASSES, decoder_channels=16
        ),
    )
    teacher.eval().requires_grad_(False)
    images, target = batch()
    ours = DistillationLoss("multiclass", tiny.CLASSES, ignore_index=255, **OPTIONS)
    weight = student.segmentation_head[0].weight
    with low_resolution(student, teacher):
        small, small_taught = student(images), teacher(images)
    assert small.shape == small_taught.shape == (2, tiny.CLASSES, 16, 16)
    full, full_taught = student(images), teacher(images)
    assert full.shape == full_taught.shape == (2, tiny.CLASSES, 64, 64)  # as they were
    losses = [ours(small, target, small_taught), ours(full, target, full_taught)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_predictions_from_low_resolution() -> None:
    """As docs/integrations.md says."""
    torch.manual_seed(0)
    student = fpn().eval()
    images, _ = batch()
    with torch.no_grad():
        full = student(images)
        with low_resolution(student):
            size = (images.shape[2], images.shape[3])
            found = functional.predict(student(images), size, align_corners=True)
    top = full.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4 * full.abs().max()
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear].long(), full.argmax(1)[clear])


def test_low_resolution_leaves_a_unet_alone_and_refuses_activations() -> None:
    images, _ = batch()
    net = unet().eval()
    with low_resolution(net):
        assert net(images).shape[-1] == 64
    with (
        pytest.raises(ValueError, match=r"models\[1\]: ends in Sigmoid, the loss needs logits"),
        low_resolution(net, fpn(activation="sigmoid")),
    ):
        pass


def test_cross_entropy_alone_is_that_of_smp() -> None:
    """Where nothing is ignored. With ignored pixels, theirs divides by them too."""
    logits = torch.randn(2, tiny.CLASSES, 16, 16)
    target = torch.randint(0, tiny.CLASSES, (2, 16, 16))
    ours = DistillationLoss("multiclass", tiny.CLASSES, kd_weight=0, hetero_weight=0)
    theirs = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.0, ignore_index=255)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    target[:, :4] = 255
    ours = DistillationLoss(
        "multiclass", tiny.CLASSES, ignore_index=255, kd_weight=0, hetero_weight=0
    )
    torch.testing.assert_close(0.75 * ours(logits, target), theirs(logits, target))
    torch.testing.assert_close(
        ours(logits, target), F.cross_entropy(logits, target, ignore_index=255)
    )


@pytest.mark.parametrize("smooth", [0.0, 1.5])
@pytest.mark.parametrize(
    ("term", "theirs"),
    [
        (terms.Dice(), smp.losses.DiceLoss),
        (terms.Dice(log=True), partial(smp.losses.DiceLoss, log_loss=True)),
        (terms.Tversky(), smp.losses.TverskyLoss),
        (
            terms.Tversky(alpha=0.3, beta=0.8, gamma=0.75),
            partial(smp.losses.TverskyLoss, alpha=0.3, beta=0.8, gamma=0.75),
        ),
    ],
)
def test_overlaps_are_those_of_smp(term: terms.Term, theirs: Any, smooth: float) -> None:
    """With ignored pixels, and a class that no pixel has."""
    low = 2.0 * torch.randn(2, tiny.CLASSES, 8, 6)
    target = torch.randint(0, tiny.CLASSES - 1, (2, 32, 24))
    target[0, :9] = 255
    logits = [low.clone().requires_grad_() for _ in range(2)]
    found = functional.segmentation_loss(logits[0], target, terms=[replace(term, smooth=smooth)])
    full = F.interpolate(logits[1], (32, 24), mode="bilinear", align_corners=False)
    expected = theirs("multiclass", ignore_index=255, smooth=smooth)(full, target)
    torch.testing.assert_close(found.loss, expected)
    (3.0 * found.loss).backward()
    (3.0 * expected).backward()
    torch.testing.assert_close(logits[0].grad, logits[1].grad, rtol=1e-4, atol=1e-8)


def test_example() -> None:
    tiny.run_example("smp_training")
