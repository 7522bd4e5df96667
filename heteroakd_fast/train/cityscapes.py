"""Cityscapes: street scenes, leftImg8bit with the fine masks of gtFine."""

from __future__ import annotations

from pathlib import Path

from .config import DataConfig
from .data import SegmentationData
from .errors import DataError
from .pairs import Encoding, FileSource, Folders, check_files, pair_up

CLASS_NAMES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
PALETTE = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
# The id of each class in labelIds files, in the order of the classes.
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_LAST_ID = 33
_UNLABELLED = 255  # also what -1 (a number plate) is in 8 bits

_PICTURE, _TRAIN_IDS, _LABEL_IDS = (
    "_leftImg8bit.png",
    "_gtFine_labelTrainIds.png",
    "_gtFine_labelIds.png",
)
_LAYOUT = (
    f"leftImg8bit/{{train,val}}/CITY/*{_PICTURE} and "
    f"gtFine/{{train,val}}/CITY/*{_LABEL_IDS} (or *{_TRAIN_IDS}) in data.root"
)


def encodings(ignore_index: int) -> tuple[tuple[str, Encoding], ...]:
    """Train ids where the files were prepared, else ids as published; both to train ids."""
    train_ids = Encoding(
        tuple((index, index) for index in range(len(_IDS))),
        (_UNLABELLED,),
        ignore_index,
        f"train ids: 0 to {len(_IDS) - 1} or {_UNLABELLED} (ignored)",
    )
    others = set(range(_LAST_ID + 1)) - set(_IDS)
    ids = Encoding(
        tuple((value, index) for index, value in enumerate(_IDS)),
        (*sorted(others), _UNLABELLED),
        ignore_index,
        f"label ids: 0 to {_LAST_ID} or {_UNLABELLED} (ignored)",
    )
    return (_TRAIN_IDS, train_ids), (_LABEL_IDS, ids)


def load_cityscapes(config: DataConfig) -> SegmentationData:
    """The train and val splits of the folder that holds leftImg8bit/ and gtFine/."""
    assert config.root is not None  # the configuration requires it
    folders = Folders(f"Cityscapes as {_LAYOUT}")
    train, val = (
        _split(config.root.expanduser(), split, folders, config.ignore_index)
        for split in ("train", "val")
    )
    check_files(train, val, config)
    return SegmentationData(train, val, CLASS_NAMES, PALETTE, config.ignore_index)


def _split(root: Path, split: str, folders: Folders, ignore_index: int) -> FileSource:
    pictures = root / "leftImg8bit" / split
    masks = root / "gtFine" / split
    folders.names(masks)
    images = [
        pictures / city / name
        for city in sorted(folders.names(pictures))
        if (pictures / city).is_dir()
        for name in sorted(folders.names(pictures / city))
        if name.endswith(_PICTURE)
    ]
    if not images:
        raise DataError(f"{pictures}: holds no picture CITY/*{_PICTURE}; expected {folders.layout}")

    def choices(image: Path) -> tuple[Path, ...]:
        stem = image.name.removesuffix(_PICTURE)
        return tuple(masks / image.parent.name / f"{stem}{e}" for e in (_TRAIN_IDS, _LABEL_IDS))

    return FileSource(pair_up(images, choices, folders), encodings(ignore_index))
