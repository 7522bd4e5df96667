"""Distillation with accelerate: several processes, gradient accumulation, mixed precision.

    pip install accelerate
    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py  # or accelerate launch, on GPUs

The loss is prepared like the model, because it has projectors to train, and gets the group of all
processes, because its denominators are then those of the whole batch.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from heteroakd_fast import HeteroAKDLoss
from heteroakd_fast.integrations import FrozenTeacher

CLASSES = 4


class Net(nn.Module):
    """Gives its logits at half the resolution, and the feature map they are made from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.classifier(features), features


def loader() -> DataLoader:
    """Patches whose colour tells the class."""
    target = torch.randint(0, CLASSES, (64, 4, 4))
    target = target.repeat_interleave(8, 1).repeat_interleave(8, 2)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    images = colours[target].permute(0, 3, 1, 2) + 0.1 * torch.randn(64, 3, 32, 32)
    return DataLoader(TensorDataset(images, target), batch_size=4, shuffle=True)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixed-precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--accumulate", type=int, default=2)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulate,
    )
    several = accelerator.num_processes > 1
    loss_fn = HeteroAKDLoss(
        CLASSES,
        student_channels=8,
        teacher_channels=32,
        process_group=dist.group.WORLD if several else None,
    )
    teacher = FrozenTeacher(Net(width=32), feature="body")  # load your trained one
    student = Net(width=8)
    optimizer = torch.optim.AdamW([*student.parameters(), *loss_fn.parameters()], lr=1e-2)
    student, loss_fn, optimizer, data = accelerator.prepare(student, loss_fn, optimizer, loader())

    losses: list[float] = []
    for _ in range(2):
        for images, target in data:
            with accelerator.accumulate(student, loss_fn):
                with accelerator.autocast():
                    logits, features = student(images)
                    taught = teacher(images)
                out = loss_fn(logits, target, student_features=features, **taught)
                accelerator.backward(out.loss)  # divides by the number of accumulated batches
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(out.loss.detach(), "mean").item())
    accelerator.print(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
