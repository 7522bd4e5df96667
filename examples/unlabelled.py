"""Few labelled images, many without: the teacher's knowledge on all of them.

    python examples/unlabelled.py

A teacher is trained on every label; then two students see labels on 4 images of 64: one learns from
those alone, one from the teacher on all images, too. Seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from heteroakd_fast import SegmentationLoss, functional
from heteroakd_fast.terms import CrossEntropy, HeteroAKD

CLASSES, UNLABELLED = 5, 254


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches of five textures, in noise and under changing light."""
    target = torch.randint(0, CLASSES, (count, 4, 4), generator=generator)
    target = target.repeat_interleave(8, 1).repeat_interleave(8, 2)
    line = torch.arange(32) * torch.arange(1, CLASSES + 1)[:, None] * 0.5
    textures = line.sin()[:, :, None] + line.cos()[:, None, :]
    shown = textures[target, torch.arange(32)[:, None], torch.arange(32)]
    light = 1 + 0.5 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return light * shown[:, None] + 0.7 * noise, target


def network(width: int) -> nn.Sequential:
    """Logits at half the resolution."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(width, width, 5, 1, 2),
        nn.ReLU(),
        nn.Conv2d(width, CLASSES, 1),
    )


def train(
    net: nn.Module, inputs: Tensor, target: Tensor, steps: int, teacher: nn.Module | None = None
) -> nn.Module:
    terms = [CrossEntropy()] if teacher is None else [CrossEntropy(), HeteroAKD(2.0)]
    loss_fn = SegmentationLoss(*terms, unlabelled_index=UNLABELLED)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(steps):
        batch = torch.arange(8) + step * 8
        batch = batch % len(inputs)
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher(inputs[batch])
        out = loss_fn(net(inputs[batch]), target[batch], teacher_logits)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def accuracy(net: nn.Module, inputs: Tensor, target: Tensor) -> float:
    """Of pixels, without logits of full resolution."""
    matrix = functional.confusion_matrix(net(inputs), target)
    return float(matrix.diagonal().sum() / matrix.sum())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    generator = torch.Generator().manual_seed(0)
    inputs, target = images(64, generator)
    test_inputs, test_target = images(32, generator)
    few = target.clone()
    few[torch.arange(64) % 16 != 0] = UNLABELLED

    torch.manual_seed(0)
    teacher = train(network(32), inputs, target, 2 * options.steps).eval()
    labelled = torch.arange(0, 64, 16)
    torch.manual_seed(1)
    alone = train(network(12), inputs[labelled], few[labelled], options.steps)
    torch.manual_seed(1)
    distilled = train(network(12), inputs, few, options.steps, teacher)
    results = {
        name: accuracy(net, test_inputs, test_target)
        for name, net in (("teacher", teacher), ("alone", alone), ("distilled", distilled))
    }
    for name, value in results.items():
        print(f"{name:10} {100 * value:5.1f} % of the pixels")
    return results


if __name__ == "__main__":
    main()
