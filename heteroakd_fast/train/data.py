"""Batches as a pure function of (seed, step, slot).

No loader has a state: a resumed run asks for the batches of the next step and gets
exactly those the uninterrupted run would have had.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import DataConfig

Picture = NDArray[np.uint8]  # H x W x 3
Mask = NDArray[np.int64]  # H x W

# Kept apart so that the order of the pictures and their augmentation never share a random stream.
_ORDER, _AUGMENT = 1, 2


class Source(Protocol):
    """Pictures with masks, by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Picture, Mask]: ...


@dataclass(frozen=True)
class SegmentationData:
    """A training and a validation set over the same classes."""

    train: Source
    val: Source
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int
    credit: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(size)


def sample_index(seed: int, step: int, slot: int, batch_size: int, size: int) -> int:
    """Which picture is at `slot` of the batch of `step`; a new order in each pass."""
    epoch, offset = divmod(step * batch_size + slot, size)
    return int(_order(seed, epoch, size)[offset])


def augment(
    picture: Picture, mask: Mask, config: DataConfig, rng: np.random.Generator
) -> tuple[Picture, Mask]:
    """Random resize, crop, flips and quarter turns."""
    # Always the same number of draws in the same order: switching one augmentation on or off
    # then leaves the others as they were.
    scale, top, left, flip, turns = rng.uniform(size=5)
    if config.scale != (1.0, 1.0):
        low, high = config.scale
        picture, mask = _resize(picture, mask, low + (high - low) * scale)
    if config.crop is not None:
        picture, mask = _crop(picture, mask, config.crop, top, left, config.ignore_index)
    if config.augment != "none" and flip < 0.5:
        picture, mask = picture[:, ::-1], mask[:, ::-1]
    if config.augment == "dihedral":
        quarter = int(turns * 4)
        if quarter % 2 and picture.shape[0] != picture.shape[1]:
            quarter -= 1  # a quarter turn would change the shape within a batch
        picture, mask = np.rot90(picture, quarter), np.rot90(mask, quarter)
    return picture, mask


def _resize(picture: Picture, mask: Mask, factor: float) -> tuple[Picture, Mask]:
    size = (max(1, round(mask.shape[1] * factor)), max(1, round(mask.shape[0] * factor)))
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    labels = Image.fromarray(mask.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(resized), np.asarray(labels).astype(np.int64)


def _crop(
    picture: Picture, mask: Mask, side: int, top: float, left: float, ignore: int
) -> tuple[Picture, Mask]:
    pad_y, pad_x = max(0, side - mask.shape[0]), max(0, side - mask.shape[1])
    if pad_y or pad_x:
        picture = np.pad(picture, ((0, pad_y), (0, pad_x), (0, 0)))
        mask = np.pad(mask, ((0, pad_y), (0, pad_x)), constant_values=ignore)
    y = int(top * (mask.shape[0] - side + 1))
    x = int(left * (mask.shape[1] - side + 1))
    return picture[y : y + side, x : x + side], mask[y : y + side, x : x + side]


def to_tensors(picture: Picture, mask: Mask) -> tuple[Tensor, Tensor]:
    """uint8 3 x H x W and int64 H x W; copies, because flips leave negative strides."""
    return (
        torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))),
        torch.from_numpy(np.ascontiguousarray(mask)),
    )


class _Keyed(Dataset[tuple[Tensor, Tensor]]):
    """Items by (step, slot), so that worker processes need no random state of their own."""

    def __init__(self, source: Source, config: DataConfig, seed: int, batch_size: int) -> None:
        self.source, self.config, self.seed, self.batch_size = source, config, seed, batch_size

    def __getitem__(self, key: Any) -> tuple[Tensor, Tensor]:
        step, slot = key
        index = sample_index(self.seed, step, slot, self.batch_size, len(self.source))
        rng = np.random.default_rng((self.seed, _AUGMENT, step, slot))
        return to_tensors(*augment(*self.source.read(index), self.config, rng))


class _Keys(Sampler[list[tuple[int, int]]]):
    """The keys of each batch, in the order of the steps."""

    def __init__(self, start: int, stop: int, micro: int, rank: int, world: int, acc: int) -> None:
        self.start, self.stop, self.micro = start, stop, micro
        self.rank, self.world, self.acc = rank, world, acc

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for m in range(self.acc):
                first = (m * self.world + self.rank) * self.micro
                yield [(step, slot) for slot in range(first, first + self.micro)]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.acc


def _worker_signals(worker: int) -> None:
    # The parent decides what an interrupt means; a worker that inherited the parent's SIGTERM
    # handler could not be ended by it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def training_batches(
    source: Source,
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of steps start .. stop-1."""
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        _Keyed(source, config, seed, batch_size),
        batch_sampler=_Keys(
            start, stop, batch_size // (world * accumulate), rank, world, accumulate
        ),
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_worker_signals if config.workers else None,
        # A generator of its own: the loader otherwise draws from torch's global one, and a
        # resumed run, which makes the loader once more, would go on with other dropout masks.
        generator=torch.Generator(),
    )
    yield from loader


def evaluation_batches(
    source: Source, batch_size: int, *, config: Any = None, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures in order and whole; neighbours of one shape go together."""
    images: list[Tensor] = []
    targets: list[Tensor] = []
    for index in range(rank, len(source), world):
        image, target = to_tensors(*source.read(index))
        if images and (len(images) == batch_size or images[0].shape != image.shape):
            yield torch.stack(images), torch.stack(targets)
            images, targets = [], []
        images.append(image)
        targets.append(target)
    if images:
        yield torch.stack(images), torch.stack(targets)


class Normalizer:
    """uint8 pictures to what the networks take, on their device."""

    def __init__(
        self, config: DataConfig, device: torch.device, channels_last: bool = False
    ) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = torch.tensor(config.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(config.std, device=device).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device, non_blocking=True)
        normalized = (images.float() / 255.0 - self.mean) / self.std
        return normalized.contiguous(memory_format=self.memory_format)


def load_data(config: DataConfig, seed: int) -> SegmentationData:
    """The data set the configuration names, prepared and checked."""
    if config.kind == "landcover":
        from .landcover import load_landcover

        return load_landcover(config.ignore_index)
    from .folder import load_folder

    return load_folder(config, seed)
