"""Segmentation scores from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ConfusionMatrix", "Scores", "predict_classes"]


def predict_classes(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Class ids [B, H, W], int64, of logits [B, C, h, w] upsampled to `size`, one image a time."""
    classes = [
        F.interpolate(one[None].float(), size, mode="bilinear", align_corners=align_corners).argmax(
            1
        )
        for one in logits
    ]
    return torch.cat(classes) if classes else logits.new_zeros((0, *size), dtype=torch.int64)


@dataclass(frozen=True)
class Scores:
    """Scores between 0 and 1; NaN where a class is neither predicted nor in the labels."""

    miou: float
    pixel_accuracy: float
    class_iou: tuple[float, ...]


class ConfusionMatrix:
    """Counts of (label, prediction) pairs; rows are labels."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        valid = target != self.ignore_index
        pairs = target[valid].long() * self.num_classes + prediction[valid].long()
        counted = torch.bincount(pairs, minlength=self.num_classes**2)
        self.counts += counted.view(self.num_classes, self.num_classes).cpu()

    def scores(self) -> Scores:
        counts = self.counts.double()
        hit = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - hit
        iou = hit / union  # 0 / 0 is NaN: an absent class has no score, and is left out of the mean
        return Scores(float(iou.nanmean()), float(hit.sum() / counts.sum()), tuple(iou.tolist()))
