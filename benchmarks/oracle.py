"""The float64 truth of a case, image by image, so that a large batch needs the memory of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heteroakd_fast import functional
from heteroakd_fast.output import DistillationOutput

from .cases import Case
from .inputs import IGNORE_INDEX, Inputs

__all__ = ["Truth", "errors_of", "evaluation", "truth_of"]


class Truth(NamedTuple):
    loss: float
    grads: list[Tensor]
    """Of each leaf, float64, in the leaf's shape"""
    counts: Tensor | None = None
    """Of an evaluation its result"""


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """Loss and gradients of the backend `reference` in float64.

    A term is a quotient of sums over the images: a first round over them adds up the denominators,
    a second one takes each image's part of the loss and of the gradient by them.
    """
    objective = case.target
    if objective.evaluates:
        double = replace(inputs, student_logits=inputs.student_logits.double())
        return Truth(0.0, [], evaluation(case, double, "reference"))
    if inputs.models:  # the networks stay in their own precision
        leaves = inputs.leaves
        logits, teacher_logits = inputs.models()
    else:
        leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
        logits, teacher_logits = leaves[0], inputs.teacher_logits
    if objective.from_features:
        logits = F.conv2d(logits, leaves[1][:, :, None, None])
    teacher = teacher_logits.double() if objective.needs_teacher else None

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

    images = logits.detach().double().split(1)
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
    if logits is leaves[0]:
        return Truth(loss, [total])
    return Truth(loss, list(torch.autograd.grad(logits, leaves, total.to(logits.dtype))))


def evaluation(case: Case, inputs: Inputs, backend: str) -> Tensor:
    """The function that the case evaluates, by a backend."""
    options: dict[str, Any] = {"align_corners": case.align_corners, "backend": backend}
    if case.target.evaluates == "predict":
        return functional.predict(inputs.student_logits, case.label_size, **options)
    return functional.confusion_matrix(
        inputs.student_logits, inputs.target, ignore_index=IGNORE_INDEX, **options
    )


def _share_of_others(expected: Tensor, found: Tensor) -> float:
    if expected.dim() == 2:  # a confusion matrix, where another prediction counts twice
        return float((found - expected).abs().sum() / 2 / expected.sum())
    return float((found.long() != expected.long()).double().mean())


def errors_of(truth: Truth, loss: Tensor, inputs: Inputs) -> tuple[float, float]:
    """Relative error of the loss, and the largest gradient error over the largest gradient, of each
    leaf; of a network over the largest of all, for some of its gradients are zero by symmetry.
    Of an evaluation the share of pixels that differ, and 0."""
    if truth.counts is not None:
        return _share_of_others(truth.counts, loss), 0.0
    loss_error = abs(float(loss.detach()) - truth.loss) / max(abs(truth.loss), 1e-300)
    grad_error = 0.0
    largest = [float(grad.abs().amax()) for grad in truth.grads]
    for grad, leaf, own in zip(truth.grads, inputs.leaves, largest, strict=True):
        assert leaf.grad is not None
        difference = float((leaf.grad.double() / inputs.loss_scale - grad).abs().amax())
        scale = max(max(largest) if inputs.models else own, 1e-300)
        # NaN must stay, and max would drop it
        grad_error = grad_error if difference / scale <= grad_error else difference / scale
    return loss_error, grad_error
