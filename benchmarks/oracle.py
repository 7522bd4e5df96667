"""The float64 truth of a case, image by image, so that a large batch needs the memory of one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heteroakd_fast import functional

from .cases import Case
from .inputs import IGNORE_INDEX, Inputs

__all__ = ["Truth", "errors_of", "truth_of"]


class Truth(NamedTuple):
    loss: float
    grads: list[Tensor]
    """Of each leaf, float64, in the leaf's shape"""


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """Loss and gradients of the backend `reference` in float64.

    A term is a quotient of sums over images, so each image gives its part of the numerator, of
    its gradient and of the denominator, and the quotient is taken at the end.
    """
    objective = case.target
    weights = {"ce": 1.0}
    options: dict[str, Any] = {
        "ignore_index": IGNORE_INDEX,
        "align_corners": case.align_corners,
    }
    for name, value in objective.options.items():
        if name.endswith("_weight"):
            weights[name.removesuffix("_weight")] = value
        else:
            options[name] = value

    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    if objective.from_features:
        features, weight = leaves
        logits = F.conv2d(features, weight[:, :, None, None])
    else:
        logits = leaves[0]
    teacher = inputs.teacher_logits.double() if objective.needs_teacher else None

    terms = len(weights)
    numerators = torch.zeros(terms, dtype=torch.float64)
    denominators = torch.zeros(terms, dtype=torch.float64)
    term_grads = torch.zeros(terms, *logits.shape, dtype=torch.float64, device=logits.device)
    for image in range(case.batch):
        z = logits.detach()[image : image + 1].requires_grad_()
        one = functional.run(
            z,
            None if teacher is None else teacher[image : image + 1],
            inputs.target[image : image + 1],
            weights,
            backend="reference",
            **options,
        )
        sums = one.sums
        numerators += sums.numerators.detach().cpu()
        denominators += sums.denominators.detach().cpu()
        for k in range(terms):
            (grad,) = torch.autograd.grad(sums.numerators[k], z, retain_graph=k + 1 < terms)
            term_grads[k, image] = grad[0]
    scale = torch.tensor(list(weights.values()), dtype=torch.float64) / denominators
    loss = float((scale * numerators).sum())
    total = (scale.to(logits.device).view(-1, 1, 1, 1, 1) * term_grads).sum(dim=0)
    grads = torch.autograd.grad(logits, leaves, total) if objective.from_features else [total]
    return Truth(loss, list(grads))


def errors_of(truth: Truth, loss: Tensor, inputs: Inputs) -> tuple[float, float]:
    """Relative error of the loss, and the largest gradient error over the largest gradient."""
    loss_error = abs(float(loss.detach()) - truth.loss) / max(abs(truth.loss), 1e-300)
    grad_error = 0.0
    for grad, leaf in zip(truth.grads, inputs.leaves, strict=True):
        assert leaf.grad is not None
        difference = (leaf.grad.double() / inputs.loss_scale - grad).abs().amax()
        grad_error = max(grad_error, float(difference / grad.abs().amax().clamp(min=1e-300)))
    return loss_error, grad_error
