"""ADE20K as in the scene parsing challenge of 2016: 150 classes, 0 in a mask is none of them."""

from __future__ import annotations

from pathlib import Path

from .config import DataConfig
from .data import SegmentationData
from .errors import DataError
from .pairs import FileSource, Folders, check_files, pair_up, shifted_encoding
from .pictures import spread_palette

# The first of the names that the challenge gives each class, in its order.
_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming
pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin
board, shower, radiator, glass, clock, flag
"""
CLASS_NAMES = tuple(" ".join(name.split()) for name in _NAMES.split(","))

_LAYOUT = (
    "ADE20K as images/{training,validation}/*.jpg and annotations/{training,validation}/*.png "
    "in data.root or in its ADEChallengeData2016/"
)
_UNLABELLED = 255  # beside 0


def load_ade20k(config: DataConfig) -> SegmentationData:
    """The training and validation splits of ADEChallengeData2016."""
    assert config.root is not None  # the configuration requires it
    root = config.root.expanduser()
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    folders = Folders(_LAYOUT)
    train, val = (
        _split(root, split, folders, config.ignore_index) for split in ("training", "validation")
    )
    check_files(train, val, config)
    colours = spread_palette(len(CLASS_NAMES))
    return SegmentationData(train, val, CLASS_NAMES, colours, config.ignore_index)


def _split(root: Path, split: str, folders: Folders, ignore_index: int) -> FileSource:
    pictures, masks = root / "images" / split, root / "annotations" / split
    images = [pictures / name for name in sorted(folders.names(pictures)) if name.endswith(".jpg")]
    if not images:
        raise DataError(f"{pictures}: holds no picture *.jpg; expected {folders.layout}")
    folders.names(masks)
    pairs = pair_up(images, lambda image: (masks / f"{image.stem}.png",), folders)
    encoding = shifted_encoding(len(CLASS_NAMES), _UNLABELLED, ignore_index)
    return FileSource(pairs, (("", encoding),))
