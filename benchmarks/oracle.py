"""The float64 truth of a case, image by image, so that a large batch needs the memory of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heteroakd_fast import functional
from heteroakd_fast.output import DistillationOutput

from .cases import Case
from .inputs import IGNORE_INDEX, Inputs

__all__ = ["Truth", "errors_of", "truth_of"]


class Truth(NamedTuple):
    loss: float
    grads: list[Tensor]
    """Of each leaf, float64, in the leaf's shape"""


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """Loss and gradients of the backend `reference` in float64.

    A term is a quotient of sums over the images: a first round over them adds up the denominators,
    a second one takes each image's part of the loss and of the gradient by them.
    """
    objective = case.target
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    logits = leaves[0]
    if objective.from_features:
        logits = F.conv2d(logits, leaves[1][:, :, None, None])
    teacher = inputs.teacher_logits.double() if objective.needs_teacher else None

    def loss_of(
        image: int, z: Tensor, denominators: dict[str, Tensor] | None = None
    ) -> DistillationOutput:
        return functional.distillation_loss(
            z,
            inputs.target[image : image + 1],
            None if teacher is None else teacher[image : image + 1],
            ignore_index=IGNORE_INDEX,
            align_corners=case.align_corners,
            normalizer=denominators,
            backend="reference",
            **objective.options,
        )

    images = logits.detach().split(1)
    denominators: dict[str, Tensor] = {}
    for image, z in enumerate(images):
        for name, value in (loss_of(image, z).denominators or {}).items():
            denominators[name] = denominators.get(name, 0.0) + value
    loss, grads = 0.0, []
    for image, z in enumerate(images):
        part = loss_of(image, z.requires_grad_(), denominators).loss
        loss += part.item()
        grads += torch.autograd.grad(part, z)
    total = torch.cat(grads)
    if not objective.from_features:
        return Truth(loss, [total])
    return Truth(loss, list(torch.autograd.grad(logits, leaves, total)))


def errors_of(truth: Truth, loss: Tensor, inputs: Inputs) -> tuple[float, float]:
    """Relative error of the loss, and the largest gradient error over the largest gradient."""
    loss_error = abs(float(loss.detach()) - truth.loss) / max(abs(truth.loss), 1e-300)
    grad_error = 0.0
    for grad, leaf in zip(truth.grads, inputs.leaves, strict=True):
        assert leaf.grad is not None
        difference = (leaf.grad.double() / inputs.loss_scale - grad).abs().amax()
        grad_error = max(grad_error, float(difference / grad.abs().amax().clamp(min=1e-300)))
    return loss_error, grad_error
