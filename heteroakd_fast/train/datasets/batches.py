"""Batches as a pure function of (seed, step, slot).

No loader has a state: a resumed run asks for the batches of the next step and gets
exactly those the uninterrupted run would have had.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig
from ..errors import DataError, TrainingError, UserError
from .augment import augment, fit_image
from .images import Mask, Pixels, Source

# Kept apart so that orders of images and their augmentation never share a random stream.
_ORDER, _AUGMENT, _LABELLED_ORDER = 1, 2, 4


@lru_cache(maxsize=8)
def _permutation(seed: int, stream: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, stream, epoch)).permutation(size)


@dataclass(frozen=True)
class Order:
    """Which image is at a slot of the batch of a step; a new order in each pass over the images."""

    seed: int
    batch_size: int
    size: int
    """Number of images."""
    labelled: tuple[int, ...] = ()
    """Images that `labelled_slots` of a batch are drawn from, evenly spread over its slots, so that
    every rank has its share; the other slots are drawn from all images."""
    labelled_slots: int = 0

    def at(self, step: int, slot: int) -> int:
        before, after = (
            place * self.labelled_slots // self.batch_size for place in (slot, slot + 1)
        )
        if after > before:
            count = step * self.labelled_slots + before
            return self.labelled[self._drawn(_LABELLED_ORDER, count, len(self.labelled))]
        others = self.batch_size - self.labelled_slots
        return self._drawn(_ORDER, step * others + slot - before, self.size)

    def images(self, step: int) -> list[int]:
        """The images of a step, on all ranks."""
        return sorted({self.at(step, slot) for slot in range(self.batch_size)})

    def _drawn(self, stream: int, count: int, size: int) -> int:
        epoch, offset = divmod(count, size)
        return int(_permutation(self.seed, stream, epoch, size)[offset])


class TrainingSet(NamedTuple):
    """The images of a stage, and the order they come in."""

    source: Source
    order: Order

    def names(self, step: int) -> list[str]:
        """The images of a step, for messages."""
        return [self.source.name(index) for index in self.order.images(step)]


def image_tensor(image: Pixels) -> Tensor:
    """uint8 3 x H x W; a copy, because flips leave negative strides."""
    # Not `ascontiguousarray`, which keeps a negative stride along an axis of one pixel.
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def to_tensors(image: Pixels, mask: Mask) -> tuple[Tensor, Tensor]:
    """The image as `image_tensor` has it, and int64 H x W."""
    return image_tensor(image), torch.from_numpy(np.array(mask, dtype=np.int64, order="C"))


def _augmented(
    source: Source, config: DataConfig, order: Order, keys: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """The images of (step, slot): workers need no random state of their own."""
    items = []
    for step, slot in keys:
        rng = np.random.default_rng((order.seed, _AUGMENT, step, slot))
        items.append(to_tensors(*augment(*source.read(order.at(step, slot)), config, rng)))
    shape = items[0][1].shape
    if other := next((target.shape for _, target in items if target.shape != shape), None):
        raise DataError(
            f"images of {shape[1]} x {shape[0]} and {other[1]} x {other[0]} pixels "
            "cannot be in one batch: images of different sizes, and a random resize, need "
            "data.crop"
        )
    return _stacked(items)


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(targets)


def _whole(source: Source, config: DataConfig | None, index: int) -> tuple[Tensor, Tensor]:
    image, mask = source.read(index)
    return to_tensors(image if config is None else fit_image(image, config), mask)


class _Reading(Dataset[Any]):
    """What `read` gives for a key. What is wrong with a file comes back as a value: a loader would
    wrap an error that a worker raises into the text of a traceback."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        self.read = read

    def __getitem__(self, key: Any) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.read(key)
        except UserError as error:
            return error


def _worker_signals(worker: int) -> None:
    # The parent decides what an interrupt means; a worker that inherited the parent's SIGTERM
    # handler could not be ended by it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read(
    read: Callable[[Any], tuple[Tensor, Tensor]],
    keys: Iterable[Any],
    workers: int,
    **options: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a loader reads for the keys, with errors as this process would have raised them."""
    loader: DataLoader[Any] = DataLoader(
        _Reading(read),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
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
                    f"a process that reads images was ended from outside ({ended}). "
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
    training: TrainingSet,
    config: DataConfig,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of this rank in the steps start .. stop-1, `accumulate` of them a step.

    A batch of the order is a step's, on all ranks: however it is shared out, a step sees the same
    images.
    """
    source, order = training
    size, rest = divmod(order.batch_size, world * accumulate)
    if rest:
        raise ValueError(
            f"batch_size {order.batch_size} cannot be shared out evenly: "
            f"{world} ranks x {accumulate} micro-batches"
        )
    firsts = [(micro * world + rank) * size for micro in range(accumulate)]
    keys = (
        [(step, slot) for slot in range(first, first + size)]
        for step in range(start, stop)
        for first in firsts
    )
    read = partial(_augmented, source, config, order)
    return _read(read, keys, config.workers, pin_memory=torch.cuda.is_available())


def evaluation_batches(
    source: Source,
    batch_size: int,
    *,
    config: DataConfig | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every `world`-th image in order and whole; neighbours of one shape go together.

    `data.resize` changes the image only: the mask keeps the size that scores are taken at.
    """
    workers = config.workers if config else 0
    # Enough for the next batch to be read while the network is busy with this one.
    ahead = {"prefetch_factor": max(2, -(-batch_size // workers))} if workers else {}
    keys = range(rank, len(source), world)
    waiting: list[tuple[Tensor, Tensor]] = []
    for pair in _read(partial(_whole, source, config), keys, workers, **ahead):
        same = waiting and all(a.shape == b.shape for a, b in zip(waiting[0], pair, strict=True))
        if waiting and (len(waiting) == batch_size or not same):
            yield _stacked(waiting)
            waiting = []
        waiting.append(pair)
    if waiting:
        yield _stacked(waiting)


def _statistics(config: DataConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (config.mean, config.std))
    return mean, std


class Normalizer:
    """uint8 images, or those normalised as `given` says, to what a network takes, on its device."""

    def __init__(
        self,
        config: DataConfig,
        device: torch.device,
        channels_last: bool = False,
        given: DataConfig | None = None,
    ) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.range = 255.0 if given is None else 1.0
        self.mean, self.std = _statistics(config, device)
        if given is not None:
            mean, std = _statistics(given, device)
            self.mean, self.std = (self.mean - mean) / std, self.std / std

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device, non_blocking=True)
        normalized = (images.float() / self.range - self.mean) / self.std
        return normalized.contiguous(memory_format=self.memory_format)
