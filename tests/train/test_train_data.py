"""Batches depend on seed and step only, and come out of workers and to ranks unchanged."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from train_helpers import in_order

from heteroakd_fast.train.config import DataConfig
from heteroakd_fast.train.datasets.augment import augment
from heteroakd_fast.train.datasets.batches import (
    Order,
    evaluation_batches,
    to_tensors,
    training_batches,
)
from heteroakd_fast.train.datasets.images import Mask, Pixels, Source
from heteroakd_fast.train.errors import DataError, TrainingError


class Numbered:
    """Pictures that are nothing but their own number."""

    def __init__(self, size: int = 12) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((16, 16, 3), index, np.uint8), np.full((16, 16), index, np.int64)

    def name(self, index: int) -> str:
        return f"number {index}"


PLAIN = DataConfig(kind="landcover", augment="flip", photometric=True, crop_max_ratio=0.9, crop=16)


def test_batches_are_a_function_of_seed_and_step() -> None:
    config = PLAIN.model_copy(update={"augment": "dihedral", "scale": (0.5, 1.5)})
    source = Numbered(8)

    def batches(
        seed: int, start: int, stop: int, workers: int = 0
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        chosen = config.model_copy(update={"workers": workers})
        return list(training_batches(in_order(source, 2, seed), chosen, start=start, stop=stop))

    whole = batches(0, 0, 8)
    state = torch.get_rng_state()
    for tail in (batches(0, 5, 8), batches(0, 5, 8, workers=2)):
        assert len(tail) == 3
        for (images, target), (images_again, target_again) in zip(whole[5:], tail, strict=True):
            assert torch.equal(images, images_again)
            assert torch.equal(target, target_again)
    # The global random state, which dropout draws from, must not depend on where a run resumed.
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(whole[5][0], batches(1, 5, 6)[0][0])
    assert not torch.equal(whole[0][0], whole[3][0])


def test_a_picture_is_augmented_anew_in_each_pass() -> None:
    config = DataConfig(kind="landcover", augment="dihedral")

    class One(Numbered):
        def read(self, index: int) -> tuple[Pixels, Mask]:
            mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
            return np.stack([mask] * 3, axis=2), mask

    batches = training_batches(in_order(One(1), 2), config, start=0, stop=40)
    ways = [[tuple(target.flatten().tolist()) for target in targets] for _, targets in batches]
    for slot in (0, 1):
        assert len({step[slot] for step in ways}) == 8
    assert any(step[0] != step[1] for step in ways)


def test_each_pass_shows_every_picture_once_in_a_new_order() -> None:
    passes = [
        [Order(0, 2, 10).at(step, slot) for step in range(5 * p, 5 * p + 5) for slot in (0, 1)]
        for p in range(3)
    ]
    for one in passes:
        assert sorted(one) == list(range(10))
    assert passes[0] != passes[1]


@pytest.mark.parametrize(("slots", "batch_size"), [(1, 8), (4, 8), (3, 8), (8, 8), (2, 5)])
def test_some_slots_of_a_batch_are_drawn_from_the_labelled_images(
    slots: int, batch_size: int
) -> None:
    labelled = (3, 5, 6, 11)
    order = Order(0, batch_size, 12, labelled, slots)
    drawn = [[order.at(step, slot) for slot in range(batch_size)] for step in range(24)]
    places = [
        s for s in range(batch_size) if (s + 1) * slots // batch_size > s * slots // batch_size
    ]
    assert len(places) == slots
    theirs = [step[place] for step in drawn for place in places]
    rest = [image for step in drawn for s, image in enumerate(step) if s not in places]
    for images, size in ((theirs, 4), (rest, 12)):  # each pass over them has every one once
        for begin in range(0, len(images) - size + 1, size):
            assert len(set(images[begin : begin + size])) == size
    assert set(theirs) == set(labelled)
    assert order.images(3) == sorted(set(drawn[3]))
    # Ranks and micro-batches are runs of slots: each has its share, give or take one.
    if batch_size == 8:
        for run in (range(4), range(4, 8)):
            assert abs(sum(place in run for place in places) - slots / 2) < 1


@pytest.mark.parametrize("kind", ["none", "flip", "dihedral"])
def test_augmentation_moves_picture_and_mask_together(kind: str) -> None:
    config = DataConfig(kind="landcover", augment=kind)  # type: ignore[arg-type]
    mask = np.arange(36).reshape(6, 6)
    picture = np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8)
    seen = set()
    for seed in range(60):
        turned, labels = augment(picture, mask, config, np.random.default_rng(seed))
        np.testing.assert_array_equal(turned[:, :, 0], labels)
        seen.add(labels.tobytes())
    assert len(seen) == {"none": 1, "flip": 2, "dihedral": 8}[kind]


def test_crop_pads_small_pictures_with_ignored_pixels() -> None:
    config = DataConfig(kind="landcover", crop=16, augment="none", ignore_index=9)
    picture, mask = np.full((10, 20, 3), 7, np.uint8), np.ones((10, 20), np.int64)
    image, labels = augment(picture, mask, config, np.random.default_rng(0))
    assert image.shape == (16, 16, 3)
    assert (labels[:10] == 1).all()
    assert (labels[10:] == 9).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5)])
def test_pictures_of_one_pixel_can_be_flipped(shape: tuple[int, int]) -> None:
    picture = np.arange(np.prod(shape) * 3, dtype=np.uint8).reshape(*shape, 3)
    mask = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    images, target = to_tensors(picture[:, ::-1], mask[:, ::-1])
    assert np.array_equal(images.numpy().transpose(1, 2, 0), picture[:, ::-1])
    assert np.array_equal(target.numpy(), mask[:, ::-1])


def test_crop_reaches_every_position() -> None:
    config = DataConfig(kind="landcover", crop=16, augment="none")
    mask = np.arange(18 * 17).reshape(18, 17)
    picture = np.zeros((18, 17, 3), np.uint8)
    corners = {
        int(augment(picture, mask, config, np.random.default_rng(seed))[1][0, 0])
        for seed in range(200)
    }
    assert corners == {17 * y + x for y in range(3) for x in range(2)}


def test_evaluation_groups_neighbours_of_one_shape() -> None:
    class Source:
        shapes = ((4, 5), (4, 5), (4, 5), (6, 5), (4, 5))

        def __len__(self) -> int:
            return len(self.shapes)

        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            shape = self.shapes[index]
            return np.full((*shape, 3), index, np.uint8), np.full(shape, index, np.int64)

    batches = list(evaluation_batches(Source(), batch_size=2))
    assert [len(target) for _, target in batches] == [2, 1, 1, 1]
    assert [int(t) for _, target in batches for t in target[:, 0, 0]] == [0, 1, 2, 3, 4]


def batches_of(
    source: Source, config: DataConfig = PLAIN, batch_size: int = 12, stop: int = 2, **shares: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(
        training_batches(in_order(source, batch_size), config, start=0, stop=stop, **shares)
    )


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_ranks_and_micro_batches_share_out_the_batch(world: int, accumulate: int) -> None:
    # Fewer pictures than fit evenly into a batch: the second step begins in the middle of a pass.
    whole = batches_of(Numbered(10))
    ranks = [
        batches_of(Numbered(10), world=world, rank=rank, accumulate=accumulate)
        for rank in range(world)
    ]
    for part in (0, 1):
        for step in range(2):
            # In this order a micro-batch of all ranks together is a run of neighbouring slots.
            places = [(m, r) for m in range(accumulate) for r in range(world)]
            joined = torch.cat([ranks[r][step * accumulate + m][part] for m, r in places])
            assert torch.equal(joined, whole[step][part])
    assert all(len(rank) == 2 * accumulate for rank in ranks)


def test_batch_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="batch_size 12 .*: 5 ranks x 1 micro-batches"):
        batches_of(Numbered(), world=5)
    with pytest.raises(ValueError, match="batch_size 12 .*: 2 ranks x 4 micro-batches"):
        batches_of(Numbered(), world=2, accumulate=4)


def test_workers_give_the_same_batches() -> None:
    config = PLAIN.model_copy(update={"workers": 2})
    shares = {"world": 2, "rank": 1, "accumulate": 2}
    alone, read = (batches_of(Numbered(), chosen, stop=3, **shares) for chosen in (PLAIN, config))
    assert len(alone) == len(read) == 6
    for one, other in zip(alone, read, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_shared_out_among_ranks(workers: int) -> None:
    config = PLAIN.model_copy(update={"workers": workers})
    seen = []
    for rank in range(3):
        batches = list(evaluation_batches(Numbered(11), 3, config=config, rank=rank, world=3))
        numbers = [int(number) for _, target in batches for number in target[:, 0, 0]]
        assert numbers == list(range(rank, 11, 3))
        assert all((images[:, 0] == target).all() for images, target in batches)
        seen += numbers
    assert sorted(seen) == list(range(11))
    # A rank for which nothing is left.
    assert not list(evaluation_batches(Numbered(1), 3, config=config, rank=1, world=2))


class Broken(Numbered):
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 7:
            raise DataError("p7.png: is broken")
        return super().read(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_comes_out_of_a_worker_as_it_is(workers: int) -> None:
    config = PLAIN.model_copy(update={"workers": workers})
    for batches in (
        training_batches(in_order(Broken(), 2), config, start=0, stop=6),
        evaluation_batches(Broken(), 2, config=config),
    ):
        with pytest.raises(DataError) as caught:
            list(batches)
        assert type(caught.value) is DataError
        assert str(caught.value) == "p7.png: is broken"


def test_pictures_of_two_sizes_cannot_share_a_batch() -> None:
    config = DataConfig(kind="landcover", scale=(0.5, 2.0))
    with pytest.raises(DataError, match=r"cannot be in one batch: .* need data\.crop"):
        batches_of(Numbered(), config)


class Killed(Numbered):
    """The process that reads the last pictures gets killed, as when memory runs out."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index >= 4:
            assert torch.utils.data.get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_killed_worker_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch sets its handler once in a process, which may have been in a test before.
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    config = PLAIN.model_copy(update={"workers": 1})
    batches = evaluation_batches(Killed(), 4, config=config)
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"was ended from outside .*data\.workers \(now 1\)"):
        list(batches)
    assert time.monotonic() - began < 30
    # Not by a handler that would interrupt a training step wherever it is.
    assert signal.getsignal(signal.SIGCHLD) is before


class Faulty(Numbered):
    """An error that is no user's to put right."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        raise FileNotFoundError("of a source's own")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_are_not_taken_for_a_lost_worker(workers: int) -> None:
    config = PLAIN.model_copy(update={"workers": workers})
    with pytest.raises(FileNotFoundError, match="of a source's own"):
        batches_of(Faulty(), config)


def test_batches_can_be_read_outside_the_main_thread() -> None:
    config = PLAIN.model_copy(update={"workers": 1})
    read: list[int] = []
    thread = threading.Thread(target=lambda: read.append(len(batches_of(Numbered(), config))))
    thread.start()
    thread.join(60)
    assert read == [2]
