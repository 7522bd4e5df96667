"""Batches as a pure function of (seed, step, slot).

No loader has a state: a resumed run asks for the batches of the next step and gets
exactly those the uninterrupted run would have had.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .augment import augment, fit_picture
from .config import DataConfig
from .errors import DataError, TrainingError, UserError
from .pairs import FileSource
from .pictures import Mask as Mask
from .pictures import Palette
from .pictures import Picture as Picture

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
    palette: Palette
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


def batch_names(source: Source, seed: int, step: int, batch_size: int) -> list[str]:
    """The images of a step on all ranks, for messages: their files, where they are files."""
    slots = range(batch_size)
    indices = {sample_index(seed, step, slot, batch_size, len(source)) for slot in slots}
    if isinstance(source, FileSource):
        return [str(source.pairs[index][0]) for index in sorted(indices)]
    return [f"training image {index}" for index in sorted(indices)]


def to_tensors(picture: Picture, mask: Mask) -> tuple[Tensor, Tensor]:
    """uint8 3 x H x W and int64 H x W; copies, because flips leave negative strides."""
    return (
        # Not `ascontiguousarray`, which keeps a negative stride along an axis of one pixel.
        torch.from_numpy(np.array(picture.transpose(2, 0, 1), order="C")),
        torch.from_numpy(np.array(mask, dtype=np.int64, order="C")),
    )


_Batch = list[Tensor] | UserError


class _Keyed(Dataset[Any]):
    """Batches by their keys (step, slot), so that workers need no random state of their own."""

    def __init__(self, source: Source, config: DataConfig, seed: int, batch_size: int) -> None:
        self.source, self.config, self.seed, self.batch_size = source, config, seed, batch_size

    def __getitems__(self, keys: list[tuple[int, int]]) -> _Batch:
        # What is wrong with a file comes back as a value: a loader would wrap an error that a
        # worker raises into the text of a traceback.
        try:
            items = [self._item(step, slot) for step, slot in keys]
            _one_shape([tuple(target.shape) for _, target in items])
        except UserError as error:
            return error
        return default_collate(items)  # type: ignore[no-any-return]

    def _item(self, step: int, slot: int) -> tuple[Tensor, Tensor]:
        index = sample_index(self.seed, step, slot, self.batch_size, len(self.source))
        rng = np.random.default_rng((self.seed, _AUGMENT, step, slot))
        return to_tensors(*augment(*self.source.read(index), self.config, rng))


def _one_shape(shapes: list[tuple[int, ...]]) -> None:
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise DataError(
            f"pictures of {shapes[0][1]} x {shapes[0][0]} and {other[1]} x {other[0]} pixels "
            "cannot be in one batch: pictures of different sizes, and a random resize, need "
            "data.crop"
        )


class _Keys(Sampler[list[tuple[int, int]]]):
    """The keys of each micro-batch of one rank, in the order of the steps."""

    def __init__(
        self, start: int, stop: int, size: int, rank: int, world: int, accumulate: int
    ) -> None:
        self.start, self.stop, self.size = start, stop, size
        self.first = [(micro * world + rank) * size for micro in range(accumulate)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for first in self.first:
                yield [(step, slot) for slot in range(first, first + self.size)]

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.first)


class _Whole(Dataset[Any]):
    """Pictures by index, as they are evaluated."""

    def __init__(self, source: Source, config: DataConfig | None) -> None:
        self.source, self.config = source, config

    def __getitem__(self, index: int) -> _Batch:
        try:
            picture, mask = self.source.read(index)
        except UserError as error:
            return error
        if self.config is not None:
            picture = fit_picture(picture, self.config)
        return [*to_tensors(picture, mask)]


def _as_it_is(batch: _Batch) -> _Batch:
    return batch


def _worker_signals(worker: int) -> None:
    # The parent decides what an interrupt means; a worker that inherited the parent's SIGTERM
    # handler could not be ended by it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read(dataset: Dataset[Any], workers: int, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What a loader delivers, with errors as this process would have raised them."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_worker_signals if workers else None,
        # A generator of its own: the loader otherwise draws from torch's global one, and a
        # resumed run, which makes the loader once more, would go on with other dropout masks.
        generator=torch.Generator(),
        **options,
    )
    with _calm_about_children():
        batches = iter(loader)
    try:
        while True:
            ended = ""
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_lost_worker(error, workers):
                    raise
                ended = str(error).strip() or type(error).__name__
            # Out here, so that nothing of the loader hangs on to the error.
            if ended:
                raise TrainingError(
                    f"a process that reads pictures was ended from outside ({ended}). "
                    f"Most often memory ran out: lower data.workers (now {workers}), data.crop or "
                    "optim.batch_size; in a container, allow more shared memory"
                )
            if isinstance(batch, UserError):
                raise batch
            images, target = batch
            yield images, target
    finally:
        # The workers end now, and not when somebody has done with the error: a process forked in
        # the meantime would try to end them as well.
        del batches


def _is_lost_worker(error: Exception, workers: int) -> bool:
    """Whether a worker is gone, rather than that it sent what it raised itself ("Caught ...")."""
    message = str(error)
    if isinstance(error, RuntimeError):
        return message.startswith("DataLoader worker")
    # Nobody is left who would hand over the memory of a batch that was announced.
    lost = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
    return workers > 0 and lost and not message.startswith("Caught ")


@contextmanager
def _calm_about_children() -> Iterator[None]:
    """Keep the loader's handler of SIGCHLD out: it raises wherever the training step just is.

    The loader also looks after its workers while it waits for them; that is soon enough.
    """
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)


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
    pin_memory: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of this rank in the steps start .. stop-1, `accumulate` of them a step.

    `batch_size` counts the pictures of a step on all ranks: however they are shared out, a step
    sees the same ones.
    """
    if batch_size % (world * accumulate):
        raise ValueError(
            f"batch_size {batch_size} cannot be shared out evenly: "
            f"{world} ranks x {accumulate} micro-batches"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, expected 0 to {world - 1}")
    size = batch_size // (world * accumulate)
    return _read(
        _Keyed(source, config, seed, batch_size),
        config.workers,
        batch_sampler=_Keys(start, stop, size, rank, world, accumulate),
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
    )


def evaluation_batches(
    source: Source,
    batch_size: int,
    *,
    config: DataConfig | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every `world`-th picture in order and whole; neighbours of one shape go together.

    `data.resize` changes the picture only: the mask keeps the size that scores are taken at.
    """
    workers = config.workers if config else 0
    pictures = _read(
        _Whole(source, config),
        workers,
        batch_size=None,
        sampler=range(rank, len(source), world),
        # Enough for the next batch to be read while the network is busy with this one.
        prefetch_factor=max(2, -(-batch_size // workers)) if workers else None,
    )
    images: list[Tensor] = []
    targets: list[Tensor] = []
    for image, target in pictures:
        same = images and (images[0].shape, targets[0].shape) == (image.shape, target.shape)
        if images and (len(images) == batch_size or not same):
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
    from .layouts import load_layout

    return load_layout(config, seed)
