"""Small trees in the layouts that Cityscapes, VOC, SBD and ADE20K are published in.

Every mask has a random block structure of all the values its files may hold, and every picture the
colours of its mask, so that a network can learn from them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heteroakd_fast.train.datasets.published import voc_palette

Values = NDArray[np.uint8]

#: height, width
SIZE = (24, 48)


def mask_of(name: str, values: Sequence[int], size: tuple[int, int] = SIZE) -> Values:
    """The values that the file `name` holds: blocks of 4 x 4 pixels, each value at least once."""
    rng = np.random.default_rng(list(name.encode()))
    blocks = rng.choice(values, size=(-(-size[0] // 4), -(-size[1] // 4))).astype(np.uint8)
    pixels = blocks.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
    pixels[-1, : len(values)] = values[: size[1]]
    pixels[-2, : max(0, len(values) - size[1])] = values[size[1] : 2 * size[1]]
    pixels[-3, : max(0, len(values) - 2 * size[1])] = values[2 * size[1] : 3 * size[1]]
    pixels[-4, : max(0, len(values) - 3 * size[1])] = values[3 * size[1] :]
    return pixels


def picture_of(mask: Values) -> Values:
    noise = np.random.default_rng(int(mask.sum())).integers(0, 30, (*mask.shape, 3))
    colours = np.stack([mask * np.uint8(37), mask * np.uint8(91), mask * np.uint8(149)], 2)
    return np.clip(colours * 0.8 + noise, 0, 255).astype(np.uint8)


def save(path: Path, pixels: Values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


CITYSCAPES_IDS = (*range(34), 255)
CITYSCAPES_TRAIN_IDS = (*range(19), 255)


def write_cityscapes(
    root: Path,
    train: int = 3,
    val: int = 2,
    *,
    train_ids: bool = False,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Two cities a split; masks as published, or with the prepared train ids beside them."""
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            city = ("aachen", "bochum")[index % 2]
            stem = f"{city}_{index:06}_000019"
            mask = mask_of(stem, CITYSCAPES_IDS, size)
            masks = root / "gtFine" / split / city
            save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", picture_of(mask))
            save(masks / f"{stem}_gtFine_labelIds.png", mask)
            # What else is in the folder is to be left alone.
            save(masks / f"{stem}_gtFine_color.png", picture_of(mask))
            (masks / f"{stem}_gtFine_polygons.json").write_text("{}")
            if train_ids:
                prepared = mask_of(f"{stem} prepared", CITYSCAPES_TRAIN_IDS, size)
                save(masks / f"{stem}_gtFine_labelTrainIds.png", prepared)
    return root


VOC_VALUES = (*range(21), 255)
#: SBD lists some of what VOC lists too: t0 is in both, v1 is one of VOC's validation pictures.
VOC_TRAIN, VOC_VAL = ("2007_t0", "2007_t1", "2007_t2"), ("2007_v0", "2007_v1")
SBD_TRAIN, SBD_VAL = ("2007_t0", "2008_s0", "2008_s1"), ("2007_v1", "2008_s2")
TRAINAUG = ("2007_t0", "2007_t1", "2007_t2", "2008_s0", "2008_s1", "2008_s2")


def save_with_palette(path: Path, pixels: Values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.putpalette([channel for colour in voc_palette(256) for channel in colour])
    assert image.mode == "P"
    image.save(path)


def sbd_mask(stem: str) -> Values:
    return mask_of(f"{stem} of SBD", range(21))


def write_voc(root: Path, size: tuple[int, int] = SIZE) -> Path:
    """VOCdevkit/VOC2012 in `root`, with the pictures of SBD too; VOC2012 comes back."""
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, stems in (("train", VOC_TRAIN), ("val", VOC_VAL)):
        (lists / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            mask = mask_of(stem, VOC_VALUES, size)
            save_with_palette(folder / "SegmentationClass" / f"{stem}.png", mask)
            save(folder / "JPEGImages" / f"{stem}.jpg", picture_of(mask))
    for stem in {*SBD_TRAIN, *SBD_VAL} - {*VOC_TRAIN, *VOC_VAL}:
        save(folder / "JPEGImages" / f"{stem}.jpg", picture_of(sbd_mask(stem)))
    return folder


def write_sbd_pngs(folder: Path) -> None:
    """SBD's masks as the usual converters leave them in VOC2012."""
    (folder / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("\n".join(TRAINAUG))
    for stem in {*SBD_TRAIN, *SBD_VAL}:
        save(folder / "SegmentationClassAug" / f"{stem}.png", sbd_mask(stem))


def write_sbd(dataset: Path, save_mat: Callable[[Path, Values], None]) -> Path:
    """SBD's own folder."""
    (dataset / "cls").mkdir(parents=True)
    for name, stems in (("train", SBD_TRAIN), ("val", SBD_VAL)):
        (dataset / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            save_mat(dataset / "cls" / f"{stem}.mat", sbd_mask(stem))
    return dataset


ADE20K_VALUES = (*range(151), 255)


def write_ade20k(root: Path, train: int = 3, val: int = 2) -> Path:
    """ADEChallengeData2016 in `root`; that folder comes back."""
    folder = root / "ADEChallengeData2016"
    for split, short, count in (("training", "train", train), ("validation", "val", val)):
        for index in range(count):
            stem = f"ADE_{short}_{index + 1:08}"
            mask = mask_of(stem, ADE20K_VALUES)
            save(folder / "annotations" / split / f"{stem}.png", mask)
            save(folder / "images" / split / f"{stem}.jpg", picture_of(mask))
    return folder
