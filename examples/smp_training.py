"""Distillation with segmentation_models_pytorch: FPN learns from DeepLabV3+.

    pip install segmentation-models-pytorch
    python examples/smp_training.py

Replace the data by yours and load the teacher's weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import segmentation_models_pytorch as smp
import torch
from torch import Tensor

from heteroakd_fast.integrations import FrozenTeacher
from heteroakd_fast.integrations.smp import DistillationLoss, low_resolution

CLASSES = 4


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches whose colour tells the class, under noise."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    for _ in range(steps):
        target = torch.randint(0, CLASSES, (2, 4, 4))
        target = target.repeat_interleave(16, 1).repeat_interleave(16, 2)
        images = colours[target].permute(0, 3, 1, 2)
        images = images + 0.1 * torch.randn(images.shape)
        target[:, :2] = 255
        yield images, target


def main() -> list[float]:
    torch.manual_seed(0)
    student = smp.FPN(
        "resnet18",
        encoder_weights=None,
        classes=CLASSES,
        decoder_pyramid_channels=32,
        decoder_segmentation_channels=32,
    )
    teacher = FrozenTeacher(  # load your trained one: this knows nothing
        smp.DeepLabV3Plus(
            "mobilenet_v2", encoder_weights=None, classes=CLASSES, decoder_channels=32
        )
    )
    loss_fn = DistillationLoss(
        "multiclass", num_classes=CLASSES, ignore_index=255, kd_weight=0.5, temperature=2.0
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)

    losses = []
    student.train()
    for step, (images, y_true) in enumerate(batches(12)):
        # Both models end by upsampling 4 times; the loss does it without storing the result.
        with low_resolution(student, teacher.module):
            y_pred = student(images)
            taught = teacher(images)
        loss = loss_fn(y_pred, y_true, taught["teacher_logits"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 3 == 2:
            terms = loss_fn.terms
            print(f"step {step + 1}: loss {loss:.3f}, ce {terms.ce:.3f}, kd {terms.kd:.3f}")
    print(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}; predicts {student(images).shape}")
    return losses


if __name__ == "__main__":
    main()
