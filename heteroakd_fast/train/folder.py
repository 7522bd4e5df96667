"""Your own pictures: images/ and masks/ with the same stems, in train/ and val/ or split here."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .config import DataConfig
from .data import Mask, Picture, SegmentationData
from .errors import DataError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_SPLIT = 3  # its own random stream, see data.py


@dataclass(frozen=True)
class FolderSource:
    """Pairs of files, read when asked for."""

    pairs: tuple[tuple[Path, Path], ...]
    num_classes: int
    ignore_index: int

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Picture, Mask]:
        image_path, mask_path = self.pairs[index]
        picture, mask = _read_image(image_path), _read_mask(mask_path)
        if picture.shape[:2] != mask.shape:
            raise DataError(
                f"{mask_path}: {mask.shape[1]} x {mask.shape[0]} pixels, "
                f"but its picture {image_path} has {picture.shape[1]} x {picture.shape[0]}"
            )
        outside = (mask < 0) | (mask >= self.num_classes)
        wrong = mask[outside & (mask != self.ignore_index)]
        if wrong.size:
            raise DataError(
                f"{mask_path}: has the value {int(wrong[0])} ({wrong.size} pixels out of range), "
                f"expected 0 to {self.num_classes - 1} or {self.ignore_index} (ignored)"
            )
        return picture, mask


def load_folder(config: DataConfig, seed: int) -> SegmentationData:
    """Find the pairs, check them, and split them where the folder does not."""
    assert config.root is not None  # the configuration requires both
    assert config.num_classes is not None
    root = config.root.expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (data.root)")
    if (root / "train").is_dir() or (root / "val").is_dir():
        train, val = _pairs(root / "train"), _pairs(root / "val")
    else:
        train, val = _split(_pairs(root), config.val_fraction, seed, root)

    sources = (
        FolderSource(tuple(train), config.num_classes, config.ignore_index),
        FolderSource(tuple(val), config.num_classes, config.ignore_index),
    )
    if config.check:
        for part in sources:
            for index in range(len(part)):
                part.read(index)
    if config.crop is None:
        _same_size(sources[0])
    names = config.class_names or tuple(f"class {index}" for index in range(config.num_classes))
    return SegmentationData(*sources, names, _palette(config.num_classes), config.ignore_index)


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    images, masks = folder / "images", folder / "masks"
    for needed in (images, masks):
        if not needed.is_dir():
            raise DataError(
                f"{needed}: no such folder; expected {folder}/images and {folder}/masks"
            )
    by_stem: dict[str, Path] = {}
    for path in sorted(images.iterdir()):
        if path.suffix.lower() not in _IMAGE_SUFFIXES:
            continue
        if path.stem in by_stem:
            raise DataError(
                f"{path}: has the same stem as {by_stem[path.stem].name}; "
                "one mask cannot belong to both"
            )
        by_stem[path.stem] = path
    if not by_stem:
        raise DataError(f"{images}: holds no picture ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    mask_by_stem = {
        path.stem: path
        for path in sorted(masks.iterdir())
        if path.suffix.lower() in {".png", ".tif"}
    }
    missing = [stem for stem in by_stem if stem not in mask_by_stem]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{by_stem[missing[0]]}: has no mask {masks / missing[0]}.png{more}")
    return [(image, mask_by_stem[stem]) for stem, image in by_stem.items()]


def _split(
    pairs: list[tuple[Path, Path]], fraction: float, seed: int, root: Path
) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    if len(pairs) < 2:
        raise DataError(
            f"{root}: one picture only; at least two are needed, one of them for validation"
        )
    held_out = min(len(pairs) - 1, max(1, round(len(pairs) * fraction)))
    order = np.random.default_rng((seed, _SPLIT)).permutation(len(pairs))
    chosen = set(order[:held_out].tolist())
    return (
        [pair for index, pair in enumerate(pairs) if index not in chosen],
        [pair for index, pair in enumerate(pairs) if index in chosen],
    )


def _same_size(source: FolderSource) -> None:
    first: tuple[int, int] | None = None
    for path, _ in source.pairs:
        with Image.open(path) as image:
            size = image.size
        if first is None:
            first = size
        elif size != first:
            raise DataError(
                f"{path}: {size[0]} x {size[1]} pixels, "
                f"but {source.pairs[0][0].name} has {first[0]} x {first[1]}; "
                "pictures of different sizes need data.crop"
            )


def _read_image(path: Path) -> Picture:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from None


def _read_mask(path: Path) -> Mask:
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a mask: {error}") from None
    # "P": the palette index is the class, whatever its colour. "1" (bilevel) arrives as booleans.
    if mode not in {"1", "L", "P", "I", "I;16", "I;16B"}:
        raise DataError(
            f"{path}: a mask of mode {mode}, expected class ids in one channel (grey or palette)"
        )
    return values.astype(np.int64)


def _palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours far apart: golden-ratio steps of hue, with brightness alternating."""
    colours = []
    for index in range(count):
        rgb = colorsys.hsv_to_rgb(
            index * 0.618034 % 1.0, 0.75 - 0.25 * (index % 2), 0.95 - 0.3 * (index % 3 == 1)
        )
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colours)
