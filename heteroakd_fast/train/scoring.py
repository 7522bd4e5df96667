"""Predictions and scores of validation images, whole or window by window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..integrations.metrics import ConfusionMatrix, Scores
from .config import Config, DataConfig
from .datasets.batches import Normalizer, evaluation_batches
from .datasets.images import SegmentationData
from .distributed import ALONE, World
from .models import evaluating, forward_logits
from .parallel import uncompiled


def window_logits(
    model: nn.Module, images: Tensor, sides: tuple[int, int], strides: tuple[int, int]
) -> Tensor:
    """Logits [B, C, H, W] at the size of the images: the mean over overlapping windows, the last of
    which end at the images' borders (mmsegmentation's test mode "slide")."""
    sums: Tensor | None = None
    height, width = images.shape[2:]
    counts = images.new_zeros(1, 1, height, width)
    for top in _window_starts(height, sides[0], strides[0]):
        for left in _window_starts(width, sides[1], strides[1]):
            place = ..., slice(top, top + sides[0]), slice(left, left + sides[1])
            window = images[place]
            logits = forward_logits(model, window)
            logits = F.interpolate(logits, size=window.shape[2:], mode="bilinear")
            if sums is None:
                sums = logits.new_zeros(*logits.shape[:2], height, width, dtype=torch.float32)
            sums[place] += logits
            counts[place] += 1
    assert sums is not None  # an image has a window
    return sums / counts


def _window_starts(size: int, side: int, stride: int) -> list[int]:
    last = max(size - side, 0)
    return [*range(0, last, stride), last]


def autocast(device: torch.device, amp: str) -> torch.autocast:
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def _logits(model: nn.Module, images: Tensor, config: DataConfig) -> Tensor:
    windows = config.windows
    return window_logits(model, images, *windows) if windows else forward_logits(model, images)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, size: tuple[int, int], config: DataConfig) -> Tensor:
    """Class ids at `size`."""
    return functional.predict(_logits(model, images, config), size)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: SegmentationData,
    normalize: Normalizer,
    *,
    config: Config,
    device: torch.device,
    world: World = ALONE,
) -> Scores:
    """Scores over the whole validation set, the images in full; each rank takes its share."""
    matrix = ConfusionMatrix(data.num_classes, data.ignore_index, config.distill.unlabelled_index)
    share = {"rank": world.rank, "world": world.size}
    batches = evaluation_batches(
        data.val, config.optim.eval_batch_size, config=config.data, **share
    )
    with evaluating(model), autocast(device, config.amp), uncompiled():
        for images, target in batches:
            logits = _logits(model, normalize(images), config.data)
            matrix.update(logits, target.to(device))
    matrix.counts = world.total(matrix.counts)
    return matrix.scores()
