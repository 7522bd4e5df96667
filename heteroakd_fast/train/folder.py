"""Your own pictures: images/ and masks/ with the same stems, in train/ and val/ or split here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .config import DataConfig
from .data import SegmentationData
from .errors import DataError
from .pairs import FileSource, Pair, check_files, plain_encoding, shifted_encoding
from .pictures import spread_palette

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_SPLIT = 3  # its own random stream, see data.py


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

    if config.reduce_zero_label:
        encoding = shifted_encoding(config.num_classes, config.ignore_index, config.ignore_index)
    else:
        encoding = plain_encoding(config.num_classes, config.ignore_index)
    sources = (
        FileSource(tuple(train), (("", encoding),)),
        FileSource(tuple(val), (("", encoding),)),
    )
    check_files(*sources, config)
    names = config.class_names or tuple(f"class {index}" for index in range(config.num_classes))
    return SegmentationData(
        *sources, names, spread_palette(config.num_classes), config.ignore_index
    )


def _pairs(folder: Path) -> list[Pair]:
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
    pairs: list[Pair], fraction: float, seed: int, root: Path
) -> tuple[list[Pair], list[Pair]]:
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
