"""Distillation in a training loop of one's own: a teacher, then a student with features.

    python examples/plain_pytorch.py

Replace `Net` by your networks, `batches` by your loader, and load the teacher that you have.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from heteroakd_fast import HeteroAKDLoss, functional
from heteroakd_fast.integrations import FeatureTap, FrozenTeacher

CLASSES = 4


class Net(nn.Module):
    """Logits at a quarter of the resolution; the loss upsamples them itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.classifier = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images))


def batches(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches whose colour tells the class, under noise; the first rows are not labelled."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    for _ in range(steps):
        coarse = torch.randint(0, CLASSES, (4, 8, 8), generator=generator)
        target = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
        images = colours[target].permute(0, 3, 1, 2)
        images = images + 0.5 * torch.randn(images.shape, generator=generator)
        target[:, :3] = 255
        yield images, target


def train_teacher() -> Net:
    teacher = Net(width=32)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for images, target in batches(40, seed=1):
        optimizer.zero_grad()
        functional.cross_entropy(teacher(images), target).loss.backward()
        optimizer.step()
    return teacher


def main() -> list[float]:
    torch.manual_seed(0)
    student = Net(width=8)
    teacher = FrozenTeacher(train_teacher(), feature="body.3")
    tap = FeatureTap(student, "body.3")

    # Channels of the features: two 1x1 projectors bring them into one space, and are trained along.
    loss_fn = HeteroAKDLoss(
        CLASSES, student_channels=8, teacher_channels=32, kd_weight=0.5, temperature=2.0
    )
    parameters = [*student.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    losses = []
    for step, (images, target) in enumerate(batches(40, seed=2)):
        with tap.listening():
            student_logits = student(images)
            student_features = tap.take()
        out = loss_fn(student_logits, target, student_features=student_features, **teacher(images))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        if step % 10 == 9:
            print(
                f"step {step + 1}: loss {out.loss:.3f}, cross entropy {out.ce:.3f}, "
                f"distillation {out.kd:.4f}, HeteroAKD {out.hetero:.4f}"
            )
    print(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
