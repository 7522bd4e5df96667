"""The losses as a researcher writes them in PyTorch, eager and under `torch.compile`.

They stand here to be measured against, and are checked against the oracle before they are; the
formulas that count are those of `heteroakd_fast.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case
from ..inputs import IGNORE_INDEX, Inputs
from . import EAGER, Forward, Provider

__all__ = ["providers"]

#: (student_z, teacher_z, target) -> loss
FullResolutionLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def upsample(logits: Tensor, case: Case) -> Tensor:
    if logits.shape[-2:] == case.label_size:
        return logits
    return F.interpolate(
        logits, size=case.label_size, mode="bilinear", align_corners=case.align_corners
    )


def cross_entropy(student_z: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student_z, target, ignore_index=IGNORE_INDEX)


def knowledge_distillation(
    student_z: Tensor, teacher_z: Tensor, target: Tensor, temperature: float
) -> Tensor:
    valid = target != IGNORE_INDEX
    log_p_s = F.log_softmax(student_z / temperature, dim=1)
    p_t = F.softmax(teacher_z / temperature, dim=1)
    per_pixel = F.kl_div(log_p_s, p_t, reduction="none").sum(dim=1)
    return temperature**2 * (per_pixel * valid).sum() / valid.sum()


def hetero(
    student_z: Tensor, teacher_z: Tensor, target: Tensor, temperature: float, mix: str
) -> Tensor:
    with torch.no_grad():
        e_s = F.cross_entropy(student_z, target, ignore_index=IGNORE_INDEX, reduction="none")
        e_t = F.cross_entropy(teacher_z, target, ignore_index=IGNORE_INDEX, reduction="none")
        r_t = torch.sigmoid(e_s - e_t)[:, None]
        log_p_t = F.log_softmax(teacher_z / temperature, dim=1)
        p_t = log_p_t.exp()
    log_p_s = F.log_softmax(student_z / temperature, dim=1)
    with torch.no_grad():
        if mix == "probs":
            target_p = r_t * p_t + (1 - r_t) * log_p_s.exp()
        else:
            target_p = F.softmax((r_t * teacher_z + (1 - r_t) * student_z) / temperature, dim=1)
        d = F.kl_div(log_p_s, p_t, reduction="none").sum(dim=1)
        d = d * (target != IGNORE_INDEX)
    per_pixel = F.kl_div(log_p_s, target_p, reduction="none").sum(dim=1)
    return temperature**2 * (d * per_pixel).sum() / d.sum()


def hetero_paper(
    student_z: Tensor, teacher_z: Tensor, target: Tensor, temperature: float
) -> Tensor:
    valid = target != IGNORE_INDEX
    with torch.no_grad():
        label = torch.where(valid, target, 0)
        one_hot = torch.zeros_like(student_z).scatter_(1, label[:, None], 1.0)
        h_s = F.binary_cross_entropy_with_logits(student_z, one_hot, reduction="none")
        h_t = F.binary_cross_entropy_with_logits(teacher_z, one_hot, reduction="none")
        r_t = (h_s + 1e-6) / (h_s + h_t + 2e-6)
        z_h = r_t * teacher_z + (1 - r_t) * student_z
        h_h = F.binary_cross_entropy_with_logits(z_h, one_hot, reduction="none")
        weight = F.softmax(h_s + (h_s - h_h).clamp(min=0), dim=1)
        target_p = F.softmax(z_h / temperature, dim=1)
    log_p_s = F.log_softmax(student_z / temperature, dim=1)
    per_pixel = -(weight * target_p * log_p_s).sum(dim=1)
    return (per_pixel * valid).sum() / valid.sum()


def loss_of(case: Case) -> FullResolutionLoss:
    """The loss of a case from logits on the label grid, computed in float32 or wider."""
    options = case.target.options
    temperature = options.get("temperature", 1.0)

    def loss(student_z: Tensor, teacher_z: Tensor, target: Tensor) -> Tensor:
        dtype = torch.promote_types(student_z.dtype, torch.float32)
        student_z, teacher_z = student_z.to(dtype), teacher_z.to(dtype)
        total = cross_entropy(student_z, target)
        if options.get("kd_weight"):
            total = total + options["kd_weight"] * knowledge_distillation(
                student_z, teacher_z, target, temperature
            )
        if options.get("hetero_weight"):
            if options.get("preset") == "paper":
                term = hetero_paper(student_z, teacher_z, target, temperature)
            else:
                term = hetero(
                    student_z, teacher_z, target, temperature, options.get("mix", "probs")
                )
            total = total + options["hetero_weight"] * term
        return total

    # Its own code object: `torch.compile` counts and searches its graphs by that.
    loss.__code__ = loss.__code__.replace()
    return loss


def student_and_teacher(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits at their own resolution."""
    if inputs.models:
        return inputs.models()
    if case.target.from_features:
        return F.conv2d(inputs.student_features, inputs.weight[:, :, None, None]), inputs.weight
    if not case.target.needs_teacher:
        return inputs.student_logits, inputs.student_logits.detach()[:0]
    return inputs.student_logits, inputs.teacher_logits


def with_upsampling(case: Case, loss: FullResolutionLoss) -> FullResolutionLoss:
    """The loss from logits at their own resolution."""

    def whole(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        teacher_z = upsample(teacher, case) if case.target.needs_teacher else teacher
        return loss(upsample(student, case), teacher_z, target)

    whole.__code__ = whole.__code__.replace()
    return whole


def evaluation(case: Case) -> FullResolutionLoss:
    """Argmax of upsampled logits, or its confusion matrix, as everybody writes it."""
    classes = case.classes

    def whole(logits: Tensor, _: Tensor, target: Tensor) -> Tensor:
        prediction = upsample(logits.float(), case).argmax(1)
        if case.target.evaluates == "predict":
            return prediction
        valid = target != IGNORE_INDEX
        entry = target[valid] * classes + prediction[valid]
        return torch.bincount(entry, minlength=classes**2).view(classes, classes)

    whole.__code__ = whole.__code__.replace()
    return whole


def compiled(loss: FullResolutionLoss) -> FullResolutionLoss:
    return torch.compile(loss, fullgraph=True, dynamic=False)


# Compiled once, whatever inputs they get and however often a case is visited.
@cache
def loss_by(name: str, case: Case) -> FullResolutionLoss:
    """What most trainers do; the loss on the label grid compiled, which is the better graph on a
    CPU; upsampling inside the graph too."""
    if case.target.evaluates:
        return evaluation(case) if name == EAGER else compiled(evaluation(case))
    if name == EAGER:
        return with_upsampling(case, loss_of(case))
    if name == "compile":
        return with_upsampling(case, compiled(loss_of(case)))
    return compiled(with_upsampling(case, loss_of(case)))


class Baseline:
    def __init__(self, name: str) -> None:
        self.name = name

    def cannot(self, case: Case, device: str) -> str | None:
        return None

    def build(self, case: Case, inputs: Inputs) -> Forward:
        loss = loss_by(self.name, case)
        return lambda: loss(*student_and_teacher(case, inputs), inputs.target)


def providers() -> list[Provider]:
    return [Baseline(name) for name in (EAGER, "compile", "compile-whole")]
