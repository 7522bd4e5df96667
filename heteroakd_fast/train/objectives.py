"""What one training step minimises: plain cross entropy, or distillation from a frozen teacher.

Logits stay at the networks' own resolution; the losses upsample them on the fly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import BackendUnavailableError, DistillationOutput, HeteroAKDLoss
from ..functional import cross_entropy
from .config import DistillConfig
from .errors import ConfigError
from .models import logits_of
from .taps import FeatureTap, probe_channels


class Objective(nn.Module):
    """A model with its loss; `model` and `loss` are what is trained and saved."""

    model: nn.Module
    loss: nn.Module

    def __call__(self, images: Tensor, target: Tensor) -> DistillationOutput:
        output: DistillationOutput = super().__call__(images, target)
        return output


class PlainObjective(Objective):
    """Cross entropy against the labels."""

    def __init__(self, model: nn.Module, config: DistillConfig, ignore_index: int) -> None:
        super().__init__()
        self.model, self.loss = model, nn.Module()
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": config.label_smoothing,
            "backend": config.backend,
        }

    def forward(self, images: Tensor, target: Tensor) -> DistillationOutput:
        return cross_entropy(logits_of(self.model(images)), target, **self.options)


class DistillObjective(Objective):
    """The student against the labels and a frozen teacher."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        *,
        num_classes: int,
        ignore_index: int,
        taps: tuple[str, str] | None,
        side: int,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = student
        # In a list, so that it is no submodule: not trained, not saved, not put in training mode.
        self._teacher = [teacher]
        self.taps = (FeatureTap(student, taps[0]), FeatureTap(teacher, taps[1])) if taps else None
        channels: tuple[int | None, int | None] = (None, None)
        if self.taps:
            channels = (
                probe_channels(student, self.taps[0], side, device),
                probe_channels(teacher, self.taps[1], side, device),
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.loss = HeteroAKDLoss(
                    num_classes, *channels, ignore_index=ignore_index, **config.model_dump()
                ).to(device)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"distill: {error}") from error

    def train(self, mode: bool = True) -> DistillObjective:
        super().train(mode)
        self._teacher[0].eval()
        return self

    def forward(
        self, images: Tensor, target: Tensor, return_maps: bool = False
    ) -> DistillationOutput:
        features: dict[str, Tensor] = {}
        if self.taps is None:
            student_logits, teacher_logits = logits_of(self.model(images)), self._teach(images)
        else:
            with self.taps[0] as student_tap, self.taps[1] as teacher_tap:
                student_logits, teacher_logits = logits_of(self.model(images)), self._teach(images)
                features = {
                    "student_features": student_tap.take(),
                    "teacher_features": teacher_tap.take(),
                }
        output: DistillationOutput = self.loss(
            student_logits,
            target,
            teacher_logits=teacher_logits,
            return_maps=return_maps,
            **features,
        )
        return output

    @torch.no_grad()
    def maps(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Per-pixel reliability of the teacher and discrepancy of both, as the loss sees them."""
        self.eval()
        return self.forward(images, target, return_maps=True).maps or {}

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Tensor:
        return logits_of(self._teacher[0](images))


def dry_run(objective: Objective, side: int, device: torch.device) -> None:
    """One pass, so that what the loss or its backend refuses shows early."""
    objective.eval()
    images = torch.zeros(1, 3, side, side, device=device)
    target = torch.zeros(1, side, side, dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            objective(images, target)
    except (BackendUnavailableError, TypeError, ValueError) as error:
        raise ConfigError(f"distill: {error}") from error
