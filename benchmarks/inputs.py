"""The tensors of a case: logits as confident as a trained model's, labels in patches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import Case
from .models import Logits, make_models

__all__ = ["IGNORE_INDEX", "Inputs", "make_inputs"]

IGNORE_INDEX = 65535  # no class of any case
_PATCH = 32


@dataclass
class Inputs:
    """What one call of the loss gets. The leaves among them receive gradients."""

    target: Tensor
    """[B, H, W], int64; 5 % of it ignored, in patches"""
    student_logits: Tensor
    """[B, C, h, w], a leaf (not of an evaluation); empty where the objective starts from
    features"""
    teacher_logits: Tensor
    """[B, C, h', w'], no gradient; empty where there is no teacher"""
    student_features: Tensor
    """[B, D, h, w], a leaf; empty where the objective starts from logits"""
    weight: Tensor
    """[C, D], a leaf, of the 1x1 projection; empty likewise"""
    loss_scale: float = 1.0
    """What the loss is multiplied by before backward: float16 is trained with a scaler, for
    gradients of means over a million pixels would vanish in it"""
    models: Logits | None = None
    """Runs the networks, where the objective has them, for student and teacher logits"""
    parameters: list[Tensor] = field(default_factory=list)
    """Of the student network, leaves"""

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose `.grad` a step must fill."""
        candidates = (self.student_logits, self.student_features, self.weight)
        return [*(x for x in candidates if x.requires_grad), *self.parameters]

    def bytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Drawn on the CPU, so that every device sees the same numbers.

    Patches of one label, and logits that favour it (the teacher's more than the student's, both
    wrong here and there): random labels would make every pixel equally wrong, and zeros or tiny
    logits would hide what confident pixels cost.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    height, width = case.label_size
    patches = torch.randint(
        case.classes, (case.batch, -(-height // _PATCH), -(-width // _PATCH)), generator=generator
    )
    ignored = torch.rand(patches.shape, generator=generator) < 0.05
    patches = torch.where(ignored, IGNORE_INDEX, patches)
    target = patches.repeat_interleave(_PATCH, 1).repeat_interleave(_PATCH, 2)
    target = target[:, :height, :width].contiguous()

    def logits(stride: int, confidence: float, noise: float = 2.0) -> Tensor:
        h, w = case.grid(stride)
        z = noise * torch.randn(case.batch, case.classes, h, w, generator=generator)
        rows = (torch.arange(h) * height // h)[:, None]
        columns = torch.arange(w) * width // w
        label = target[:, rows, columns].clamp(max=case.classes - 1)
        favour = torch.full(label.shape, confidence)
        z.scatter_add_(1, label[:, None], favour[:, None])
        return z.to(device, dtype)

    nothing = torch.empty(0, device=device)
    objective = case.target
    scale = 2.0**16 if case.dtype == "float16" else 1.0
    if objective.models:
        models = make_models(case, device)
        return Inputs(target.to(device), nothing, nothing, nothing, nothing, scale, *models)
    student = nothing
    if not objective.from_features:
        student = logits(case.stride, objective.favour, objective.noise)
        student.requires_grad_(not objective.evaluates)
    teacher = logits(case.teacher_stride, 8.0) if objective.needs_teacher else nothing
    features = weight = nothing
    if objective.from_features:
        h, w = case.grid(case.stride)
        features = torch.randn(case.batch, case.channels, h, w, generator=generator)
        weight = torch.randn(case.classes, case.channels, generator=generator)
        weight = 2.0 * weight / case.channels**0.5
        features = features.to(device, dtype).requires_grad_()
        weight = weight.to(device, dtype).requires_grad_()
    return Inputs(target.to(device), student, teacher, features, weight, scale)
