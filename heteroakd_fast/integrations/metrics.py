"""Segmentation scores from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import functional

__all__ = ["ConfusionMatrix", "Scores"]


@dataclass(frozen=True)
class Scores:
    """Scores between 0 and 1; NaN where a class is neither predicted nor in the labels."""

    miou: float
    pixel_accuracy: float
    class_iou: tuple[float, ...]


class ConfusionMatrix:
    """Counts of (label, prediction) pairs at the size of the labels; rows are labels.

    Args:
        num_classes: C.
        ignore_index, unlabelled_index: labels of the pixels that are not counted, None for none.
        align_corners: how logits are upsampled to the labels.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None,
        unlabelled_index: int | None = None,
        align_corners: bool = False,
    ) -> None:
        self.num_classes, self.align_corners = num_classes, align_corners
        self.ignore_index, self.unlabelled_index = ignore_index, unlabelled_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds the pixels of a batch, on the device of the logits, where the counts stay.

        Args:
            logits: [B, C, h, w], at any resolution.
            target: [B, H, W].
        """
        ignored = self.ignore_index
        if self.unlabelled_index is not None:
            if ignored is None:
                ignored = self.unlabelled_index
            else:
                target = target.long()  # numbers would be cast to another dtype's
                target = target.masked_fill(target == self.unlabelled_index, ignored)
        self.counts = functional.confusion_matrix(
            logits,
            target,
            ignore_index=ignored,
            allow_ignored_class=True,
            align_corners=self.align_corners,
            out=self.counts.to(logits.device),
        )

    def scores(self) -> Scores:
        counts = self.counts.double()
        hit = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - hit
        iou = hit / union  # 0 / 0 is NaN: an absent class has no score, and is left out of the mean
        return Scores(float(iou.nanmean()), float(hit.sum() / counts.sum()), tuple(iou.tolist()))
