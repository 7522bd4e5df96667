"""Augmentation: picture and mask stay together, and what is not switched on changes nothing."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from train_helpers import in_order

from heteroakd_fast.train.config import DataConfig
from heteroakd_fast.train.datasets.augment import augment, distort_colours, fit_image
from heteroakd_fast.train.datasets.batches import evaluation_batches, training_batches


def options(**values: Any) -> DataConfig:
    return DataConfig(**{"kind": "landcover", "augment": "none", **values})


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


class Ramps:
    """Seven pictures, made of arithmetic only."""

    def __len__(self) -> int:
        return 7

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        values = np.arange(24 * 24 * 3) * (index + 3) // 5
        picture = (values % 251).astype(np.uint8).reshape(24, 24, 3)
        return picture, (values[: 24 * 24] % 8).reshape(24, 24)

    def name(self, index: int) -> str:
        return f"ramp {index}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"augment": "dihedral"},
            "a176ef95b885ef3c72f593340e0fe27bf703aa7efacc0be15ef0c4730389d8c6",
        ),
        (
            {"augment": "flip"},
            "142215609a2e3f8a6416b1184a53df209475a7788998722388a2923671dea3f2",
        ),
        (
            {"augment": "flip", "crop": 16},
            "40e1a3b6cb6d989a0dd9cfa3aa3c90880daed16f82d485c678bbd60bbde05b96",
        ),
        (
            {"augment": "dihedral", "crop": 32},
            "52efef836c914985e6cdda6dde84082c707f1edb28d86ecf2d71ccf66055d547",
        ),
    ],
)
def test_batches_of_earlier_versions_stay(values: dict[str, Any], expected: str) -> None:
    """The checksums are those of the code before resize, photometric and the rest were added: an
    experiment that was begun with it goes on with the same batches."""
    digest = hashlib.sha256()
    for images, target in training_batches(
        in_order(Ramps(), 4, seed=5), options(**values), start=0, stop=6
    ):
        assert (images.dtype, target.dtype) == (torch.uint8, torch.int64)
        digest.update(images.numpy().tobytes())
        digest.update(target.numpy().tobytes())
    assert digest.hexdigest() == expected


EVERYTHING = {
    "resize": (96, 48),
    "scale": (0.5, 2.0),
    "crop": (32, 48),
    "crop_max_ratio": 0.75,
    "augment": "dihedral",
}


def blocks(seed: int, height: int = 40, width: int = 60) -> tuple[NDArray[Any], NDArray[Any]]:
    """A mask of blocks, and a picture whose first channel tells the mask."""
    mask = rng(seed).integers(0, 5, (height // 10, width // 10)).repeat(10, 0).repeat(10, 1)
    return np.repeat((mask * 50)[:, :, None], 3, 2).astype(np.uint8), mask


def test_picture_and_mask_stay_together() -> None:
    config = options(**EVERYTHING)
    for seed in range(40):
        picture, mask = augment(*blocks(seed), config, rng(seed))
        assert picture.shape == (32, 48, 3)
        assert mask.shape == (32, 48)
        labelled = mask != 255
        # Away from every border between blocks, the picture has exactly the mask's colour.
        inner = labelled.copy()
        for shift in np.ndindex(5, 5):
            inner &= np.roll(mask, (shift[0] - 2, shift[1] - 2), (0, 1)) == mask
        inner[:2] = inner[-2:] = inner[:, :2] = inner[:, -2:] = False
        assert inner.sum() > 100
        np.testing.assert_array_equal(picture[inner][:, 0], mask[inner] * 50)
        assert (picture[~labelled] == 0).all()
        # Half-way between two colours lies the border in the mask, give or take the half pixel.
        wrong = np.abs(picture[:, :, 0].astype(int) - mask * 50)[labelled] > 150
        assert wrong.mean() < 0.01


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.3, 2.0])
def test_a_resized_window_is_cut_from_the_resized_picture(factor: float) -> None:
    """Only the window is made; pixels may differ by the rounding of halves in each direction."""
    picture = rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    mask = np.arange(70 * 90).reshape(70, 90)
    size = (round(90 * factor), round(70 * factor))
    whole = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    config = options(scale=(factor, factor), crop=24)
    whole_mask = augment(picture, mask, options(scale=(factor, factor)), rng(0))[1]
    assert whole_mask.shape == (size[1], size[0])
    for seed in range(20):
        part, labels = augment(picture, mask, config, rng(seed))
        y, x = np.argwhere(whole_mask == labels[0, 0])[0]
        candidates = [
            np.abs(whole[y + dy : y + dy + 24, x + dx : x + dx + 24].astype(int) - part).max()
            for dy in range(2)
            for dx in range(2)
            if whole[y + dy : y + dy + 24, x + dx : x + dx + 24].shape == part.shape
        ]
        assert min(candidates) <= 2


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((375, 500), (512, 683)),  # as most pictures of VOC and ADE20K: the short side decides
        ((500, 375), (683, 512)),
        ((100, 1000), (205, 2048)),  # the long side decides
        ((512, 600), (512, 600)),
        ((1024, 2048), (512, 1024)),
    ],
)
def test_resize_fits_and_keeps_the_ratio(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    config = options(resize=(2048, 512))
    picture, mask = np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.uint8)
    picture[: shape[0] // 2] = 200
    mask[: shape[0] // 2] = 1
    resized, labels = augment(picture, mask, config, rng(0))
    assert resized.shape == (*expected, 3)
    assert labels.shape == expected
    assert abs(int((labels[:, 0] == 1).sum()) - expected[0] // 2) <= 1
    np.testing.assert_array_equal(fit_image(picture, config), resized)
    # The random factor comes on top, in the same step.
    doubled, _ = augment(picture, mask, options(resize=(2048, 512), scale=(2.0, 2.0)), rng(0))
    assert max(abs(d - 2 * e) for d, e in zip(doubled.shape, expected, strict=False)) <= 1


def test_evaluation_resizes_the_picture_and_not_its_mask() -> None:
    class Source:
        # The third has the second's shape once it is resized, but not its mask's.
        shapes = ((40, 80), (40, 80), (20, 40))

        def __len__(self) -> int:
            return 3

        def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            shape = self.shapes[index]
            return np.full((*shape, 3), index, np.uint8), np.full(shape, index, np.int64)

    batches = list(evaluation_batches(Source(), 4, config=options(resize=(160, 20))))
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 20, 40), (1, 3, 20, 40)]
    assert [tuple(target.shape) for _, target in batches] == [(2, 40, 80), (1, 20, 40)]
    assert [int(v) for _, target in batches for v in target[:, 0, 0]] == [0, 1, 2]


def test_crop_avoids_a_single_class() -> None:
    mask = np.zeros((64, 256), np.int64)
    mask[:, 220:] = 1
    mask[:, 236:] = 2
    mask[:8] = 255  # what is not counted has no share
    picture = np.repeat((mask * 3 % 256)[:, :, None], 3, 2).astype(np.uint8)

    def shares(ratio: float) -> list[float]:
        found = []
        for seed in range(100):
            config = options(crop=32, crop_max_ratio=ratio)
            image, labels = augment(picture, mask, config, rng(seed))
            np.testing.assert_array_equal(image[:, :, 0], labels * 3 % 256)
            counted = np.bincount(labels[labels != 255], minlength=3)
            found.append(counted.max() / counted.sum())
        return found

    free, tried = np.array(shares(1.0)), np.array(shares(0.75))
    assert (free > 0.75).mean() > 0.8
    # Ten tries with about one chance in six each.
    assert 0.05 < (tried > 0.75).mean() < 0.35
    # A first crop that is good enough stays.
    good = free <= 0.75
    assert good.any()
    np.testing.assert_array_equal(free[good], tried[good])


def test_what_is_not_counted_has_no_share_of_a_crop() -> None:
    mask = np.full((64, 256), 255)
    mask[::5] = np.arange(256) % 2  # two classes with half each of the fifth that counts
    picture = np.zeros((64, 256, 3), np.uint8)
    for seed in range(20):
        first, chosen = (
            augment(picture, mask, options(crop=32, crop_max_ratio=ratio), rng(seed))[1]
            for ratio in (1.0, 0.75)
        )
        np.testing.assert_array_equal(chosen, first)
    # Four fifths of one class and a fifth uncounted: that is all of what counts.
    mask[:] = 0
    mask[::5] = 255
    mask[:, 250:] = 1
    moved = 0
    for seed in range(20):
        first, chosen = (
            augment(picture, mask, options(crop=32, crop_max_ratio=ratio), rng(seed))[1]
            for ratio in (1.0, 0.9)
        )
        moved += not np.array_equal(chosen, first)
    assert moved >= 5


def test_crop_of_two_sides() -> None:
    picture, mask = blocks(0, 40, 60)
    image, labels = augment(picture, mask, options(crop=(16, 32)), rng(0))
    assert image.shape == (16, 32, 3)
    assert labels.shape == (16, 32)
    image, labels = augment(picture, mask, options(crop=(48, 32), ignore_index=300), rng(0))
    assert image.shape == (48, 32, 3)
    assert (labels[40:] == 300).all()
    assert (labels[:40] < 5).all()


def test_padding_of_narrow_masks_holds_wide_values() -> None:
    picture, mask = blocks(0, 20, 20)
    labels = augment(picture, mask.astype(np.uint8), options(crop=32, ignore_index=300), rng(0))[1]
    assert (labels[20:] == 300).all()


def test_photometric_changes_the_picture_only() -> None:
    picture = rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    mask = rng(2).integers(0, 5, (40, 60))
    off = options(**EVERYTHING)
    on = options(**EVERYTHING, photometric=True)
    changed = 0
    for seed in range(40):
        before, labels_before = augment(picture, mask, off, rng(seed))
        after, labels = augment(picture, mask, on, rng(seed))
        np.testing.assert_array_equal(labels, labels_before)
        # Padding stays black: it is no part of the scene.
        padding = (before == 0).all(2) & (labels == 255)
        assert (after[padding] == 0).all()
        changed += not np.array_equal(after, before)
    assert 32 <= changed < 40  # each of four with probability 1/2: 1 in 16 stays as it was


def test_photometric_is_a_function_of_seed_step_and_slot() -> None:
    config = options(photometric=True)

    def images(seed: int, start: int) -> list[torch.Tensor]:
        batches = training_batches(in_order(Ramps(), 7, seed), config, start=start, stop=4)
        return [image for image, _ in batches]

    whole = images(0, 0)
    assert torch.equal(whole[3], images(0, 3)[0])
    assert not torch.equal(whole[3].sort(0).values, images(1, 3)[0].sort(0).values)
    assert not torch.equal(whole[3].sort(0).values, whole[2].sort(0).values)


# The draws, in this order: brighten, by, contrast first, contrast, by, saturate, by, turn, by.
# Half or more: not at all (or contrast last).
NOTHING = [0.9, 0.0, 0.9, 0.9, 0.0, 0.9, 0.0, 0.9, 0.0]


def distorted(picture: NDArray[np.uint8], **draws: float) -> NDArray[np.int64]:
    names = ["brighten", "b", "first", "contrast", "c", "saturate", "s", "turn", "h"]
    values = [draws.get(name, value) for name, value in zip(names, NOTHING, strict=True)]
    return distort_colours(picture, np.array(values)).astype(np.int64)


def test_each_distortion() -> None:
    picture = rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    values = picture.astype(np.int64)

    def clip(expected: NDArray[Any]) -> NDArray[np.int64]:
        return np.clip(np.rint(expected), 0, 255).astype(np.int64)

    np.testing.assert_array_equal(distorted(picture), values)
    np.testing.assert_array_equal(distorted(picture, brighten=0.1, b=1.0), clip(values + 32))
    np.testing.assert_array_equal(distorted(picture, brighten=0.1, b=0.0), clip(values - 32))
    np.testing.assert_array_equal(distorted(picture, contrast=0.1, c=0.0), clip(values * 0.5))
    np.testing.assert_array_equal(distorted(picture, contrast=0.1, c=1.0), clip(values * 1.5))
    both = {"brighten": 0.1, "b": 1.0, "contrast": 0.1, "c": 1.0}
    np.testing.assert_array_equal(distorted(picture, **both), clip(clip(values + 32) * 1.5))
    # Saturation leaves the largest channel; a half of it halves what the others lack to it.
    largest = values.max(2, keepdims=True)
    grey = distorted(picture, saturate=0.1, s=0.0)
    assert np.abs(grey - (largest + values) / 2).max() <= 3
    # With contrast last it works on the colours that saturation left.
    last = distorted(picture, saturate=0.1, s=0.0, contrast=0.1, c=1.0)
    np.testing.assert_array_equal(last, clip(grey * 1.5))
    first = distorted(picture, saturate=0.1, s=0.0, contrast=0.1, c=1.0, first=0.1)
    assert np.abs(first - last).max() > 10
    # A tenth of the circle from pure red towards green, and back towards blue.
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    for by, channel in ((1.0, 1), (0.0, 2)):
        turned = distorted(red, turn=0.1, h=by)[0, 0]
        assert turned[0] == 255
        assert abs(turned[channel] - 0.6 * 255) <= 4
        assert turned[3 - channel] == 0


def test_distortions_come_with_probability_one_half() -> None:
    grey, red = np.full((1, 1, 3), 100, np.uint8), np.full((1, 1, 3), (200, 50, 50), np.uint8)
    draws = [rng(seed).uniform(size=9) for seed in range(400)]
    # Grey has neither hue nor saturation: brightness and contrast are left.
    same = np.mean([(distort_colours(grey, draw) == grey).all() for draw in draws])
    assert 0.19 < same < 0.31
    hues = [distort_colours(red, draw)[0, 0] for draw in draws]
    assert 0.4 < np.mean([int(hue[1]) == int(hue[2]) for hue in hues]) < 0.6
