"""Cityscapes, ADE20K and Pascal VOC in the folders that they are published in."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from ..errors import DataError, DependencyError
from .images import Palette, palette_of, spread_palette
from .pairs import (
    UNLABELLED,
    Encoding,
    FileSource,
    Loaded,
    below,
    entries_of,
    holds,
    listed_in,
    more_of,
    pair_up,
)


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


# -- Cityscapes: street scenes, leftImg8bit with the fine masks of gtFine ------------------------

CITYSCAPES = _names(
    """
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation,
    terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle
    """
)
CITYSCAPES_COLOURS = palette_of(
    """
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000
    00008e 000046 003c64 005064 0000e6 770b20
    """
)
# The id of each class in labelIds files, in the order of the classes.
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_IMAGE, _TRAIN_IDS, _LABEL_IDS = (
    "_leftImg8bit.png",
    "_gtFine_labelTrainIds.png",
    "_gtFine_labelIds.png",
)
_CITYSCAPES_LAYOUT = (
    f"Cityscapes as leftImg8bit/{{train,val}}/CITY/*{_IMAGE} and "
    f"gtFine/{{train,val}}/CITY/*{_LABEL_IDS} (or *{_TRAIN_IDS}) in data.root"
)


def cityscapes(config: DataConfig, root: Path) -> Loaded:
    # Train ids where the files were prepared, else ids as published; -1 is 255 in 8 bits.
    ids = dict.fromkeys((*range(34), UNLABELLED), config.ignore_index)
    ids |= {value: index for index, value in enumerate(_IDS)}
    train_ids = Encoding.plain(len(_IDS), UNLABELLED, config.ignore_index, "train ids: ")
    label_ids = Encoding(ids, f"label ids: 0 to 33 or {UNLABELLED} (ignored)")

    def split(name: str) -> FileSource:
        images, masks = (
            (below(root, f"{tree}/{name}") or root) / tree / name
            for tree in ("leftImg8bit", "gtFine")
        )
        for folder in (images, masks):
            listed_in(folder, _CITYSCAPES_LAYOUT)

        def choices(image: Path) -> tuple[Path, ...]:
            stem = masks / image.parent.name / image.name.removesuffix(_IMAGE)
            return tuple(Path(f"{stem}{ending}") for ending in (_TRAIN_IDS, _LABEL_IDS))

        nothing = f"{images}: holds no image CITY/*{_IMAGE}; expected {_CITYSCAPES_LAYOUT}"
        found = sorted(images.glob(f"[!.]*/[!.]*{_IMAGE}"))
        pairs = pair_up(found, choices, nothing)
        return FileSource(pairs, ((_TRAIN_IDS, train_ids), (_LABEL_IDS, label_ids)))

    return split("train"), split("val"), CITYSCAPES, CITYSCAPES_COLOURS


# -- ADE20K as in the challenge of 2016: 150 classes, 0 in a mask is none of them -----------------

# The first of the names that the challenge gives each class, in its order.
ADE20K = _names(
    """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
    buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming
    pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
    tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
    """
)
_ADE20K_LAYOUT = (
    "ADE20K as images/{training,validation}/*.jpg and annotations/{training,validation}/*.png "
    "in data.root or in its ADEChallengeData2016/"
)


def ade20k(config: DataConfig, root: Path) -> Loaded:
    root = below(root, "images/training") or root
    full = ("ADE20K_20*/images/*", "images/ADE/*", "images/training/[!.]*/")
    if any(path.is_dir() for pattern in full for path in root.glob(pattern)):
        raise DataError(
            f"{root}: holds the full ADE20K (a folder for each scene, thousands of classes); "
            "expected ADEChallengeData2016.zip, the scene parsing benchmark of 150 classes, as "
            f"{_ADE20K_LAYOUT}"
        )
    encoding = Encoding.shifted(len(ADE20K), UNLABELLED, config.ignore_index)

    def split(name: str) -> FileSource:
        folder, masks = root / "images" / name, root / "annotations" / name
        images = [
            path for path in listed_in(folder, _ADE20K_LAYOUT) if path.suffix.lower() == ".jpg"
        ]
        listed_in(masks, _ADE20K_LAYOUT)
        nothing = f"{folder}: holds no image *.jpg; expected {_ADE20K_LAYOUT}"
        pairs = pair_up(images, lambda image: (masks / f"{image.stem}.png",), nothing)
        return FileSource(pairs, (("", encoding),))

    return split("training"), split("validation"), ADE20K, spread_palette(len(ADE20K))


# -- Pascal VOC 2012, alone or with the masks of SBD (Semantic Boundaries Dataset) ----------------

VOC = _names(
    """
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable,
    dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
    """
)
_VOC_LAYOUT = (
    "VOC 2012 as JPEGImages/*.jpg, SegmentationClass/*.png and "
    "ImageSets/Segmentation/{train,val}.txt in data.root, in its VOC2012/ or VOCdevkit/VOC2012/"
)
_SBD_LAYOUT = (
    'data.voc_split = "trainaug" needs the masks of SBD: either SegmentationClassAug/*.png with '
    "ImageSets/Segmentation/trainaug.txt in VOC2012, or SBD's own folder (cls/*.mat, train.txt, "
    "val.txt) as data.sbd_root, or beside VOC2012 as VOCaug/dataset or benchmark_RELEASE/dataset"
)


def voc_palette(count: int) -> Palette:
    """The colours of VOC: the bits of the class go in turn to red, green and blue."""

    def channel(bits: int) -> int:
        return sum((bits >> 3 * place & 1) << 7 - place for place in range(8))

    return tuple(
        (channel(index), channel(index >> 1), channel(index >> 2)) for index in range(count)
    )


def voc(config: DataConfig, root: Path) -> Loaded:
    """The splits that ImageSets/Segmentation lists, or trainaug in place of train."""
    inside = ("JPEGImages", "ImageSets")
    if not any((root / name).is_dir() for name in inside):
        found = [path for name in inside if (path := below(root, f"VOC2012/{name}"))]
        if not found:
            raise DataError(
                f"{root}: no such folder, or nothing of VOC 2012 in it; expected {_VOC_LAYOUT}"
                + holds(root if root.is_dir() else None)
            )
        root = found[0] / "VOC2012"
    lists, own = root / "ImageSets" / "Segmentation", root / "SegmentationClass"
    there = {path.name for path in listed_in(root / "JPEGImages", _VOC_LAYOUT)}
    listed_in(own, _VOC_LAYOUT)
    encoding = Encoding.plain(len(VOC), UNLABELLED, config.ignore_index)

    def source(stems: list[str], listed: Path, more: Path | None = None) -> FileSource:
        """`more`: masks for stems without one of VOC's own."""
        images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        missing = [image for image in images if image.name not in there]
        if missing:
            raise DataError(f"{missing[0]}: no such image, but {listed} names it{more_of(missing)}")

        def masks(image: Path) -> tuple[Path, ...]:
            suffix = ".mat" if more and more.name == "cls" else ".png"
            others = (more / f"{image.stem}{suffix}",) if more else ()
            return own / f"{image.stem}.png", *others

        return FileSource(pair_up(images, masks), (("", encoding),))

    val_stems = stems_of(lists / "val.txt")
    val, train_list = source(val_stems, lists / "val.txt"), lists / "train.txt"
    if config.voc_split == "train":
        train = source(stems_of(train_list), train_list)
    elif config.sbd_root is None and (root / "SegmentationClassAug").is_dir():
        # The lists in use differ in whether they repeat VOC's own; none may hold what is validated.
        aug_list = lists / "trainaug.txt"
        stems = sorted(set(stems_of(aug_list, _SBD_LAYOUT)) - set(val_stems))
        train = source(stems, aug_list, root / "SegmentationClassAug")
    else:
        sbd = _find_sbd(config, root)
        listed = {*stems_of(sbd / "train.txt"), *stems_of(sbd / "val.txt"), *stems_of(train_list)}
        train = source(sorted(listed - set(val_stems)), sbd / "train.txt", sbd / "cls")
    return train, val, VOC, voc_palette(len(VOC))


def _find_sbd(config: DataConfig, root: Path) -> Path:
    """SBD's folder, once it is known that its .mat files can be read."""
    names = (Path("VOCaug", "dataset"), Path("benchmark_RELEASE", "dataset"))
    places = [parent / name for parent in (root, *list(root.parents)[:2]) for name in names]
    if config.sbd_root is not None:
        sbd = config.sbd_root.expanduser()
        places = [sbd, sbd / "dataset", *(sbd / name for name in names)]
    found = next((folder for folder in places if (folder / "cls").is_dir()), None)
    if found is None:
        raise DataError(f"{config.sbd_root or root}: holds no masks of SBD; {_SBD_LAYOUT}")
    try:
        import scipy.io  # noqa: F401
    except ImportError:
        raise DependencyError(
            f"{found / 'cls'}: holds .mat files, which scipy reads, and it is not installed: "
            "pip install scipy"
        ) from None
    return found


def stems_of(path: Path, layout: str = f"expected {_VOC_LAYOUT}") -> list[str]:
    """The names of the images that a list has, without folders and suffixes."""
    return [entry.rpartition("/")[2] for entry in entries_of(path, layout)]
