"""What there is to look at: chosen validation images, and masks and maps in colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from .checkpoint import random_states, restore_random_states
from .config import Config
from .datasets.augment import fit_image
from .datasets.batches import Normalizer, to_tensors
from .datasets.images import Mask, Pixels, SegmentationData, Source
from .logs import TensorBoard
from .objectives import DistillObjective, Objective

Values = NDArray[np.float32]
Predict = Callable[[nn.Module, Tensor, tuple[int, int]], Tensor]

UNLABELLED = (128, 128, 128)
TILE_WIDTH = 512
_LOOKED_AT = 200  # a large validation set is not read through for a handful of images
_GAP, _HEAD = 4, 14

#: Of matplotlib, by the map of the loss.
COLOUR_MAPS = {"reliability": "RdYlBu", "discrepancy": "magma"}


@dataclass(frozen=True)
class Sample:
    """One validation image and what the networks make of it.

    Maps are NaN where nothing is counted, and None where the loss has none.
    """

    image: Pixels
    label: Mask
    predictions: dict[str, Mask]
    reliability: Values | None
    discrepancy: Values | None


def choose_samples(source: Source, data: SegmentationData, count: int) -> list[int]:
    """Validation images with many classes in them: those show most."""
    variety = []
    for index in range(min(len(source), _LOOKED_AT)):
        mask = source.read(index)[1]
        labels = mask[mask < data.num_classes]
        shares = np.bincount(labels, minlength=data.num_classes) / mask.size
        variety.append((-int((shares > 0.02).sum()), index))
    return sorted(index for _, index in sorted(variety)[:count])


@torch.no_grad()
def look(
    index: int,
    models: dict[str, nn.Module],
    distillation: DistillObjective | None,
    *,
    config: Config,
    data: SegmentationData,
    normalize: Normalizer,
    predict: Predict,
) -> Sample:
    """Predictions and the loss's own maps, at the size of the label; networks are in eval mode."""
    shown, label = data.val.read(index)
    # The networks get what they get in an evaluation; what is shown keeps the label's size.
    image, target = to_tensors(fit_image(shown, config.data), label)
    images = normalize(image[None])
    size = (label.shape[0], label.shape[1])
    predictions = {
        name: predict(model, images, size)[0].cpu().numpy() for name, model in models.items()
    }
    maps = {}
    if distillation is not None:
        maps = distillation.maps(images, target[None].to(images.device))
    seen: dict[str, Values | None] = {"reliability": None, "discrepancy": None}
    for name in seen.keys() & maps.keys():
        values = maps[name][0].float().cpu().numpy()
        seen[name] = np.where(label == data.ignore_index, np.float32(np.nan), values)
    return Sample(shown, label, predictions, **seen)


class Gallery:
    """The same few validation images at every evaluation, for TensorBoard."""

    def __init__(
        self,
        config: Config,
        data: SegmentationData,
        normalize: Normalizer,
        predict: Predict,
        autocast: AbstractContextManager[Any],
    ) -> None:
        self.config, self.data, self.normalize = config, data, normalize
        self.predict, self.autocast = predict, autocast
        self._chosen: list[int] | None = None

    def show(self, board: TensorBoard, objective: Objective, step: int) -> None:
        """One strip per image. The training goes on as if nobody had looked."""
        if not board.active or not self.config.log.images:
            return
        if self._chosen is None:
            self._chosen = choose_samples(self.data.val, self.data, self.config.log.images)
        distillation = objective if isinstance(objective, DistillObjective) else None
        modes = [(module, module.training) for module in objective.modules()]
        states = random_states()
        objective.eval()
        try:
            # Not compiled, as in evaluations: images of many shapes.
            with self.autocast, torch.compiler.set_stance("force_eager"):
                for index in self._chosen:
                    sample = look(
                        index,
                        {"prediction": objective.model},
                        distillation,
                        config=self.config,
                        data=self.data,
                        normalize=self.normalize,
                        predict=self.predict,
                    )
                    board.image(f"val images/{index}", strip(sample, self.data), step)
        finally:
            for module, training in modes:
                module.training = training
            restore_random_states(states)


def strip(sample: Sample, data: SegmentationData) -> Pixels:
    """image | label | predictions | reliability | discrepancy, with their names above."""
    tiles = named_tiles(sample, data, top_of([sample]))
    height, width = tiles[0][1].shape[:2]
    canvas = np.full((_HEAD + height, (width + _GAP) * len(tiles) - _GAP, 3), 255, np.uint8)
    for index, (name, tile) in enumerate(tiles):
        left = index * (width + _GAP)
        # Its own image: a name that is too long is cut, and does not run into the next one.
        head = Image.new("RGB", (width, _HEAD), "white")
        ImageDraw.Draw(head).text((1, 1), name, fill="black")
        canvas[:_HEAD, left : left + width] = np.asarray(head)
        canvas[_HEAD:, left : left + width] = tile
    return canvas


def named_tiles(sample: Sample, data: SegmentationData, top: float) -> list[tuple[str, Pixels]]:
    """What there is of a sample, each of the same size; `top` is the brightest discrepancy."""
    height, width = sample.label.shape
    factor = min(1.0, TILE_WIDTH / width)
    shape = (max(1, round(height * factor)), max(1, round(width * factor)))
    tiles = [("image", _shrunk(sample.image, shape))]
    for name, mask in {"label": sample.label, **sample.predictions}.items():
        tiles.append((name, colours(_thinned(mask, shape), data)))
    if sample.reliability is not None:
        values = _thinned(sample.reliability, shape)
        tiles.append(("reliability", coloured(values, "reliability")))
    if sample.discrepancy is not None:
        values = _thinned(sample.discrepancy, shape) / np.float32(top)
        tiles.append((f"discrepancy 0-{top:.2g}", coloured(values, "discrepancy")))
    return tiles


def top_of(samples: Sequence[Sample]) -> float:
    """Where the colours of the discrepancy end.

    The very highest values are a few pixels at borders, which would leave the rest dark.
    """
    maps = [sample.discrepancy for sample in samples if sample.discrepancy is not None]
    known = np.concatenate(
        [values[np.isfinite(values)] for values in maps] or [np.empty(0, np.float32)]
    )
    return max(float(np.quantile(known, 0.98)), 1e-6) if known.size else 1.0


def colours(mask: Mask, data: SegmentationData) -> Pixels:
    """Class ids as colours; what is not counted is grey."""
    table = np.array([*data.palette, UNLABELLED], np.uint8)
    # int64: with 256 classes the index of grey fits into no byte.
    image: Pixels = table[np.minimum(mask.astype(np.int64), data.num_classes)]
    return image


@lru_cache
def colour_map(name: str) -> NDArray[np.uint8]:
    """The colours of a map of the loss, 256 x 3, from 0 to 1; a last row for NaN."""
    import matplotlib as mpl

    table = mpl.colormaps[COLOUR_MAPS[name]](range(256), bytes=True)[:, :3]
    return np.array([*table, UNLABELLED], np.uint8)


def coloured(values: Values, name: str) -> Pixels:
    """Values from 0 to 1 in the colours of a map, beyond them its ends; NaN is grey."""
    levels = np.where(np.isnan(values), 256, np.clip(values, 0.0, 1.0) * 255)
    image: Pixels = colour_map(name)[np.rint(levels).astype(int)]
    return image


def hex_colour(colour: Iterable[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _shrunk(image: Pixels, shape: tuple[int, int]) -> Pixels:
    if image.shape[:2] == shape:
        return image
    whole = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(whole.resize(shape[::-1], Image.Resampling.BOX))


def _thinned(values: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Nearest neighbours: classes cannot be averaged."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(values.shape, shape, strict=True)
    )
    thinned: NDArray[Any] = values.take(rows, 0).take(columns, 1)
    return thinned
