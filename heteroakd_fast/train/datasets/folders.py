"""The folders that data sets are published in, and a folder of the user's own."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..errors import DataError, DependencyError, shortened
from ..files import check_regular
from .images import (
    Mask,
    Palette,
    Pixels,
    SegmentationData,
    indexed_colours,
    palette_of,
    read_image,
    read_mask,
    spread_palette,
)
from .survey import Pair, Survey, check_surveys, oddities, survey, table

log = logging.getLogger("heteroakd_fast.train")

_UNLABELLED = 255  # in all published data sets; in VOC the border around objects
# Of published data sets so many files of each split are read before training.
_SAMPLE = 32
# What systems leave in folders.
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")


class Encoding:
    """What the values in mask files mean: classes, or what is ignored; others are an error."""

    def __init__(self, meaning: Mapping[int, int], expected: str) -> None:
        self.expected = expected
        # Value -> class; -1: not expected. One entry more than values, for those beyond.
        self.table = np.full(max(256, max(meaning) + 2), -1, np.int32)
        self.table[list(meaning)] = list(meaning.values())

    @classmethod
    def plain(cls, classes: int, unlabelled: int, ignored: int, what: str = "") -> Encoding:
        """Values are classes, and `unlabelled` becomes `ignored`."""
        meaning = {unlabelled: ignored, **{value: value for value in range(classes)}}
        return cls(meaning, f"{what}0 to {classes - 1} or {unlabelled} (ignored)")

    @classmethod
    def shifted(cls, classes: int, unlabelled: int, ignored: int) -> Encoding:
        """0 is no class, k is class k-1, and `unlabelled` is none either."""
        meaning = {unlabelled: ignored, 0: ignored}
        meaning |= {value + 1: value for value in range(classes)}
        return cls(meaning, f"1 to {classes}, or 0 or {unlabelled} (ignored)")

    def also(self, value: int, meaning: str) -> Encoding:
        """The same, with a value that stays as it is."""
        known = {int(k): int(self.table[k]) for k in (self.table >= 0).nonzero()[0]}
        return type(self)({**known, value: value}, f"{self.expected}, or {value} ({meaning})")

    def decode(self, values: Mask, path: Path) -> Mask:
        """Class ids and `ignore_index`; `path` is for messages."""
        places: Mask = values
        if values.dtype != np.uint8:
            beyond = len(self.table) - 1
            places = np.where((values < 0) | (values > beyond), beyond, values)
        decoded: Mask = self.table[places]
        wrong = values[decoded < 0]
        if wrong.size:
            raise DataError(
                f"{path}: has the value {int(wrong[0])} ({wrong.size} pixels out of range), "
                f"expected {self.expected}"
            )
        return decoded


@dataclass(frozen=True)
class FileSource:
    """Pairs of files, read when asked for."""

    pairs: tuple[Pair, ...]
    #: By how the mask's file name ends; the first that fits.
    encodings: tuple[tuple[str, Encoding], ...]
    #: Of every pixel of an image without a mask.
    ignore_index: int = _UNLABELLED
    #: Of which masks have one for each value, where they are coded by colour.
    colours: Palette | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Pixels, Mask]:
        image_path, mask_path = self.pairs[index]
        image = read_image(image_path)
        if mask_path is None:
            return image, np.full(image.shape[:2], self.ignore_index, np.int64)
        if mask_path.suffix == ".mat":
            values = read_sbd_mask(mask_path)
        else:
            values = read_mask(mask_path, colours=self.colours)
        if image.shape[:2] != values.shape:
            turned = image.shape[1::-1] == values.shape
            raise DataError(
                f"{mask_path}: {values.shape[1]} x {values.shape[0]} pixels, "
                f"but its image {image_path} has {image.shape[1]} x {image.shape[0]}"
                + (
                    " (with its EXIF orientation, which masks do not have)"
                    if turned
                    else "; export it again, or resize it without interpolation"
                )
            )
        encoding = next(e for ending, e in self.encodings if mask_path.name.endswith(ending))
        return image, encoding.decode(values, mask_path)

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])


_Loaded = tuple[FileSource, FileSource, tuple[str, ...], Palette]


def load_layout(config: DataConfig, unlabelled_index: int | None = None) -> SegmentationData:
    """The training and validation set of `data.kind` in `data.root`, checked; masks of a folder may
    have `unlabelled_index`, too.

    Raises:
        DataError: something is missing or cannot be used.
    """
    load = {"cityscapes": _cityscapes, "voc": _voc, "ade20k": _ade20k}.get(config.kind)
    assert config.root is not None  # the configuration requires it
    root = config.root.expanduser()
    train, val, names, palette = (
        load(config, root) if load else _folder(config, root, unlabelled_index)
    )
    with_mask = tuple(index for index, (_, mask) in enumerate(train.pairs) if mask is not None)
    if not with_mask:
        raise DataError(f"{root}: no training image has a mask; the teacher needs some")
    held_out = {image for image, _ in val.pairs}
    if both := [image for image, _ in train.pairs if image in held_out]:
        raise DataError(f"{both[0]}: is listed for training and for validation{_more(both)}")
    some = with_mask if len(with_mask) < len(train) else None
    surveys = None if config.check is False else _check_files(train, val, config, names)
    return SegmentationData(
        train, val, names, palette, config.ignore_index, with_mask=some, surveys=surveys
    )


def _check_files(
    train: FileSource, val: FileSource, config: DataConfig, names: tuple[str, ...]
) -> tuple[Survey, Survey] | None:
    """Read what `data.check` asks for, say what it is, and find what training would fail of."""

    def sample(source: FileSource) -> FileSource:
        """All of it, or files evenly spread over it."""
        if config.check or config.kind == "folder" or len(source) <= _SAMPLE:
            return source
        places = np.linspace(0, len(source) - 1, _SAMPLE).astype(int).tolist()
        return replace(source, pairs=tuple(source.pairs[place] for place in places))

    def surveyed(source: FileSource) -> Survey:
        encodings = [(ending, e.expected, e.table.tolist()) for ending, e in source.encodings]
        return survey(source, len(names), repr((encodings, source.colours)))

    samples = sample(train), sample(val)
    first, second = map(surveyed, samples)
    whole = samples == (train, val)
    for split, found, source in (("training", first, train), ("validation", second, val)):
        beginning = "" if whole else f"a sample of the {len(source)} images for "
        log.info("%s%s", beginning, found.line(split))
    check_surveys(first, second, config, names, whole)
    if odd := oddities(first, second, config, names, whole):
        log.warning("%s: %s", config.root, "; ".join(odd))
        log.info("shares of the pixels:\n%s", table(names, first, second))
    _check_indexed_colours(samples[0], 0 if source.colours else len(names))
    # A sample says nothing about classes.
    return (first, second) if whole else None


def _check_indexed_colours(source: FileSource, count: int) -> None:
    """Refuse masks whose palettes have a colour at different places among the first `count`: a
    program that numbers the colours of each file by itself wrote them.

    Raises:
        DataError: there are some.
    """
    known: dict[tuple[int, ...], tuple[int, Path]] = {}
    for _, path in source.pairs:
        if path is None or path.suffix.lower() != ".png" or not count:
            continue
        colours = indexed_colours(path)
        for index, colour in enumerate(colours[:count]):
            if colours.count(colour) > 1:
                continue
            before, other = known.setdefault(colour, (index, path))
            if before != index:
                raise DataError(
                    f"{path}: the colour {list(colour)} has the index {index}, but {before} in "
                    f"{other.name}: colours stand for classes, not indices; list them in "
                    'data.palette (data.kind = "folder")'
                )


def _is_hidden(name: str) -> bool:
    # macOS leaves a ._name beside each name.
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def _listed(folder: Path, layout: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
    except (FileNotFoundError, NotADirectoryError):
        there = next((parent for parent in folder.parents if parent.is_dir()), None)
        raise DataError(f"{folder}: no such folder; expected {layout}{holds(there)}") from None


def holds(folder: Path | None) -> str:
    """What is in a folder, for messages."""
    names = sorted(p.name for p in folder.iterdir() if not _is_hidden(p.name)) if folder else []
    packed = [
        name for name in names if name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z"))
    ]
    unpack = f" (unpack {shortened(packed, 3)})" if packed else ""
    return f"; {folder} holds {shortened(names, 6) or 'nothing'}{unpack}" if folder else ""


def _below(root: Path, inside: str) -> Path | None:
    """The folder that has `inside`: `root`, or one up to two folders deeper, as archives may have
    it."""
    found = (sorted(root.glob(f"{deeper}{inside}")) for deeper in ("", "*/", "*/*/"))
    path = next((paths[0] for paths in found if paths), None)
    return path and path.parents[inside.count("/")]


def _pair_up(
    images: Iterable[Path],
    masks: Callable[[Path], tuple[Path, ...]],
    nothing: str = "",
    own: bool = False,
    some_without: bool = False,
) -> tuple[Pair, ...]:
    """Each image with the first of its possible masks that exists; `some_without`: or None; `own`:
    in a folder of the user's."""
    choices = {image: masks(image) for image in images}
    if not choices:
        raise DataError(nothing)
    # Listed once each: asking for thousands of files one by one is slow.
    folders = {mask.parent for paths in choices.values() for mask in paths}
    there = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    found = {image: [p for p in paths if p in there] for image, paths in choices.items()}
    missing = [image for image, paths in found.items() if not paths]
    if missing and not some_without:
        image, paths = missing[0], choices[missing[0]]
        expected = " or ".join(map(str, paths))
        near = sorted(path for path in there - {image} if _alike(path.name, image, paths[0]))
        hint = ""
        if near:
            hint = f"; there is {near[0].name}"
            if near[0].suffix.lower() not in _MASK_SUFFIXES:
                hint += _EXPORT
            elif near[0].parent not in {path.parent for path in paths}:
                hint = f"; there is {near[0]}: images and masks have the same subfolders"
            elif near[0].stem.casefold() == paths[0].stem.casefold():
                hint += ": capitals count"
            elif own:
                hint += ": data.mask_suffix names an ending"
        elif len(missing) == len(choices):
            folder = paths[0].parent
            images_there = any(path.suffix.lower() in _MASK_SUFFIXES for path in there)
            hint = holds(folder if folder.is_dir() else None) + _EXPORT * (not images_there)
        if own and len(missing) < len(choices):
            hint += '; where only the teacher is to label such images, set data.labelled = "masks"'
        raise DataError(f"{image}: has no mask {expected}{_more(missing)}{hint}")
    return tuple((image, paths[0] if paths else None) for image, paths in found.items())


_EXPORT = ", which is not read: export masks as images of class ids (PNG)"


def _alike(name: str, image: Path, mask: Path) -> bool:
    """Whether a file's name begins with what those of an image and its mask have in common, and is
    not that of another number."""
    start = os.path.commonprefix([image.stem, mask.stem])  # noqa: RUF071
    ends = not (start[-1:].isalnum() and name[len(start) : len(start) + 1].isalnum())
    return bool(start) and ends and name.casefold().startswith(start.casefold())


def _more(missing: list[Path]) -> str:
    return f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


# -- Cityscapes: street scenes, leftImg8bit with the fine masks of gtFine ------------------------

CITYSCAPES = _names(
    """
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation,
    terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle
    """
)
_CITYSCAPES_COLOURS = palette_of(
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


def _cityscapes(config: DataConfig, root: Path) -> _Loaded:
    # Train ids where the files were prepared, else ids as published; -1 is 255 in 8 bits.
    ids = dict.fromkeys((*range(34), _UNLABELLED), config.ignore_index)
    ids |= {value: index for index, value in enumerate(_IDS)}
    train_ids = Encoding.plain(len(_IDS), _UNLABELLED, config.ignore_index, "train ids: ")
    label_ids = Encoding(ids, f"label ids: 0 to 33 or {_UNLABELLED} (ignored)")

    def split(name: str) -> FileSource:
        images, masks = (
            (_below(root, f"{tree}/{name}") or root) / tree / name
            for tree in ("leftImg8bit", "gtFine")
        )
        for folder in (images, masks):
            _listed(folder, _CITYSCAPES_LAYOUT)

        def choices(image: Path) -> tuple[Path, ...]:
            stem = masks / image.parent.name / image.name.removesuffix(_IMAGE)
            return tuple(Path(f"{stem}{ending}") for ending in (_TRAIN_IDS, _LABEL_IDS))

        nothing = f"{images}: holds no image CITY/*{_IMAGE}; expected {_CITYSCAPES_LAYOUT}"
        found = sorted(images.glob(f"[!.]*/[!.]*{_IMAGE}"))
        pairs = _pair_up(found, choices, nothing)
        return FileSource(pairs, ((_TRAIN_IDS, train_ids), (_LABEL_IDS, label_ids)))

    return split("train"), split("val"), CITYSCAPES, _CITYSCAPES_COLOURS


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


def _ade20k(config: DataConfig, root: Path) -> _Loaded:
    root = _below(root, "images/training") or root
    full = ("ADE20K_20*/images/*", "images/ADE/*", "images/training/[!.]*/")
    if any(path.is_dir() for pattern in full for path in root.glob(pattern)):
        raise DataError(
            f"{root}: holds the full ADE20K (a folder for each scene, thousands of classes); "
            "expected ADEChallengeData2016.zip, the scene parsing benchmark of 150 classes, as "
            f"{_ADE20K_LAYOUT}"
        )
    encoding = Encoding.shifted(len(ADE20K), _UNLABELLED, config.ignore_index)

    def split(name: str) -> FileSource:
        folder, masks = root / "images" / name, root / "annotations" / name
        images = [path for path in _listed(folder, _ADE20K_LAYOUT) if path.suffix.lower() == ".jpg"]
        _listed(masks, _ADE20K_LAYOUT)
        nothing = f"{folder}: holds no image *.jpg; expected {_ADE20K_LAYOUT}"
        pairs = _pair_up(images, lambda image: (masks / f"{image.stem}.png",), nothing)
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


def _voc(config: DataConfig, root: Path) -> _Loaded:
    """The splits that ImageSets/Segmentation lists, or trainaug in place of train."""
    inside = ("JPEGImages", "ImageSets")
    if not any((root / name).is_dir() for name in inside):
        found = [path for name in inside if (path := _below(root, f"VOC2012/{name}"))]
        if not found:
            raise DataError(
                f"{root}: no such folder, or nothing of VOC 2012 in it; expected {_VOC_LAYOUT}"
                + holds(root if root.is_dir() else None)
            )
        root = found[0] / "VOC2012"
    lists, own = root / "ImageSets" / "Segmentation", root / "SegmentationClass"
    there = {path.name for path in _listed(root / "JPEGImages", _VOC_LAYOUT)}
    _listed(own, _VOC_LAYOUT)
    encoding = Encoding.plain(len(VOC), _UNLABELLED, config.ignore_index)

    def source(stems: list[str], listed: Path, more: Path | None = None) -> FileSource:
        """`more`: masks for stems without one of VOC's own."""
        images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        missing = [image for image in images if image.name not in there]
        if missing:
            raise DataError(f"{missing[0]}: no such image, but {listed} names it{_more(missing)}")

        def masks(image: Path) -> tuple[Path, ...]:
            suffix = ".mat" if more and more.name == "cls" else ".png"
            others = (more / f"{image.stem}{suffix}",) if more else ()
            return own / f"{image.stem}.png", *others

        return FileSource(_pair_up(images, masks), (("", encoding),))

    val_stems = _stems(lists / "val.txt")
    val, train_list = source(val_stems, lists / "val.txt"), lists / "train.txt"
    if config.voc_split == "train":
        train = source(_stems(train_list), train_list)
    elif config.sbd_root is None and (root / "SegmentationClassAug").is_dir():
        # The lists in use differ in whether they repeat VOC's own; none may hold what is validated.
        aug_list = lists / "trainaug.txt"
        stems = sorted(set(_stems(aug_list, _SBD_LAYOUT)) - set(val_stems))
        train = source(stems, aug_list, root / "SegmentationClassAug")
    else:
        sbd = _find_sbd(config, root)
        listed = {*_stems(sbd / "train.txt"), *_stems(sbd / "val.txt"), *_stems(train_list)}
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


def _stems(path: Path, layout: str = f"expected {_VOC_LAYOUT}") -> list[str]:
    """The names of the images that a list has, without folders and suffixes."""
    return [entry.rpartition("/")[2] for entry in _entries(path, layout)]


def _entries(path: Path, layout: str) -> list[str]:
    """The images that a list has, without suffixes: a name or a path a line, or a path and that of
    its mask."""
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such list; {layout}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of images (UTF-8): {error}") from None
    names = [line.strip().strip("\"'").replace("\\", "/") for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path}: names no image; expected one a line, such as 2007_000032")
    found = (_LISTED.match(name) for name in names)
    return [match[1] if match else name for match, name in zip(found, names, strict=True)]


def read_sbd_mask(path: Path) -> Mask:
    """The class ids in one of SBD's .mat files."""
    from scipy.io import loadmat

    check_regular(path)
    try:
        values = loadmat(str(path), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
        if values.ndim != 2 or values.dtype.kind not in "ui":
            raise ValueError(f"{values.dtype} with {values.ndim} axes, expected class ids")
    except Exception as error:  # its parser lets through whatever a broken file makes it meet
        raise DataError(
            f"{path}: cannot be read as a mask of SBD (GTcls.Segmentation): {error!r}"
        ) from None
    return np.asarray(values, np.uint8 if values.dtype == np.uint8 else np.int64)


# -- your own images: images/ and masks/ of the same names, split by folders or here ---------------

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_LISTED = re.compile(rf"(.*?)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?=[\s,;]|$)", re.I)
# The first that is there. A JPEG is found, too: reading it says why it is no mask.
_MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp", ".jpg", ".jpeg")
_ENDINGS = ("", "_mask", "-mask", "_label", "_labelIds", "_gt")
# Customary names of folders, whatever their capitals; messages use the first.
_IMAGES = ("images", "img_dir", "image", "imgs", "jpegimages")
_MASKS = ("masks", "ann_dir", "labels", "annotations", "mask", "label", "gt", "segmentationclass")
_TRAIN, _VAL = ("train", "training"), ("val", "validation", "valid")
# A line of a palette: perhaps a number, and a name before or after the colour.
_GAP = r"[\s,;:]+"
_INDEX, _RGB = rf"(?:\d+{_GAP})?", _GAP.join(rf"(?P<{channel}>\d+)" for channel in "rgb")
_NAME = rf"(?!\d+{_GAP})(?P<name>.*?[^\d\s,;:].*?)"
_PALETTE_LINES = tuple(
    re.compile(form)
    for form in (
        rf"{_INDEX}{_NAME}{_GAP}{_RGB}",
        rf"{_INDEX}{_RGB}{_GAP}{_NAME}",
        rf"(?P<name>\d+){_GAP}{_RGB}",
    )
)
_HEX = re.compile(r"(?<=\S)[\s,;:]*#([0-9a-fA-F]{6})\b")


def _folder(config: DataConfig, root: Path, unlabelled_index: int | None) -> _Loaded:
    assert config.num_classes is not None  # the configuration requires it
    _listed(root, "data.root with images/ and masks/, or train/ and val/ with both")
    some_without = config.labelled is not None
    train_folders, val_folders = _own_folders(root, config)
    if val_folders:
        train, val = _pairs(*train_folders, config, some_without), _pairs(*val_folders, config)
    elif lists := _lists(root):
        train = _pairs(*train_folders, config, some_without, lists[0])
        val = _pairs(*train_folders, config, listed=lists[1])
        log.info("%s: split as %s and %s have it", root, *(path.name for path in lists))
    else:
        pairs = _pairs(*train_folders, config, some_without)
        val = _held_out(root, pairs, config)
        train = tuple(pair for pair in pairs if pair not in set(val))
    count, ignore = config.num_classes, config.ignore_index
    encode = Encoding.shifted if config.reduce_zero_label else Encoding.plain
    encoding = encode(count, ignore, ignore)
    names = tuple(f"class {index}" for index in range(count))
    palette, colours = spread_palette(count), None
    if config.palette is not None:
        colours, found = _read_palette(config.palette, count)
        names, palette = found or names, colours[:count]
        places = {index: index if index < count else ignore for index in range(len(colours))}
        encoding = Encoding(places, "colours of data.palette")
    elif unlabelled_index is not None:
        encoding = encoding.also(unlabelled_index, "only the teacher labels it")
    encoding.expected += (
        "; data.num_classes, data.ignore_index and data.reduce_zero_label say what values are, "
        "data.palette the greys or colours that stand for classes"
    )
    encodings = (("", encoding),)
    training, validation = (FileSource(pairs, encodings, ignore, colours) for pairs in (train, val))
    return training, validation, config.class_names or names, palette


def _lists(root: Path) -> list[Path] | None:
    """The lists of images that a folder is split by."""
    for place in (root, root / "splits", root / "ImageSets" / "Segmentation"):
        lists = [place / f"{name}.txt" for name in ("train", "val")]
        there = [path for path in lists if path.is_file()]
        if len(there) == 2:
            return lists
        if there:
            log.warning("%s: left out, for there is no train.txt and val.txt", there[0])
    return None


def _held_out(root: Path, pairs: tuple[Pair, ...], config: DataConfig) -> tuple[Pair, ...]:
    """Those for validation, by hash: files that come or go later leave the others where they
    were."""
    masked = sorted((p for p in pairs if p[1]), key=lambda pair: _position(pair[0], config))
    if len(masked) < 2:
        raise DataError(
            f"{root}: fewer than two images with a mask; at least two are needed, one of them "
            "for validation"
        )
    below = sum(_position(image, config) < config.val_fraction for image, _ in masked)
    held_out = set(masked[: min(len(masked) - 1, max(1, below))])
    return tuple(pair for pair in pairs if pair in held_out)


def _read_palette(given: Palette | Path, count: int) -> tuple[Palette, tuple[str, ...]]:
    """The colours, and the names of the first `count`, where a file has them."""
    if not isinstance(given, Path):
        return given, ()
    try:
        check_regular(given)
        lines = given.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{given}: cannot be read as a palette (UTF-8): {error}") from None
    entries: dict[tuple[int, int, int], str] = {}
    for line in lines:
        plain = _HEX.sub(lambda m: " {} {} {}".format(*bytes.fromhex(m[1])), line)
        plain = re.sub(r"[\"'()\[\]]", "", plain).strip(" \t,;:")
        found = next((m for form in _PALETTE_LINES if (m := form.fullmatch(plain))), None)
        if found is None:
            if any(letter.isdigit() for letter in line) and not line.startswith("#"):
                raise DataError(f"{given}: has the line {line!r}, expected `name r g b`")
            continue  # a comment or a heading
        colour = (int(found["r"]), int(found["g"]), int(found["b"]))
        if max(colour) > 255 or colour in entries:
            raise DataError(f"{given}: {line!r} has a number above 255, or a colour of before")
        entries[colour] = found["name"]
    names = tuple(entries.values())[:count]
    if len(names) < count or len(set(names)) < count:
        raise DataError(
            f"{given}: has {len(set(names))} classes of different names, expected "
            f"data.num_classes = {count} or more lines `name r g b`"
        )
    return tuple(entries), names


def _own_folders(
    root: Path, config: DataConfig
) -> tuple[tuple[Path, Path], tuple[Path, Path] | None]:
    """The folders of images and masks for training, and for validation where the folder is split:
    as train/images or as images/train."""

    def one_of(folder: Path, names: tuple[str, ...]) -> Path:
        there = {}
        if folder.is_dir():
            there = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
        return next((there[name] for name in names if name in there), folder / names[0])

    def is_split(folder: Path) -> bool:
        return any((folder / name).is_dir() for name in (*_TRAIN, *_VAL))

    def both(folder: Path) -> tuple[Path, Path]:
        images, masks = one_of(folder, _IMAGES), one_of(folder, _MASKS)
        if not images.is_dir() and _some(
            folder, lambda path: path.suffix.lower() in IMAGE_SUFFIXES
        ):
            images = folder
        endings = tuple(filter(None, _endings(config)))
        if not masks.is_dir() and _some(images, lambda path: path.stem.endswith(endings)):
            masks = images  # both in one folder, told apart by their names
        return images, masks

    if is_split(root):
        return both(one_of(root, _TRAIN)), both(one_of(root, _VAL))
    images, masks = both(root)
    if is_split(images):
        train, val = ((one_of(images, part), one_of(masks, part)) for part in (_TRAIN, _VAL))
        return train, val
    return (images, masks), None


def _some(folder: Path, condition: Callable[[Path], bool]) -> bool:
    return folder.is_dir() and any(map(condition, folder.iterdir()))


def _endings(config: DataConfig) -> tuple[str, ...]:
    return _ENDINGS if config.mask_suffix is None else (config.mask_suffix,)


def _stem(name: str) -> str:
    """The name that an image and its mask share; macOS writes accents as characters of their own,
    other systems do not."""
    return unicodedata.normalize("NFC", name)


def _position(image: Path, config: DataConfig) -> float:
    """A number in [0, 1) that depends on the name and the seed of the split alone."""
    text = f"{config.split_seed} {_stem(image.stem)}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text).digest()[:8], "big") / 2**64


def _of_suffix(
    folder: Path, suffixes: Iterable[str], layout: str, without: Path | None = None
) -> tuple[dict[str, list[Path]], str]:
    """The files of a folder and of those in it, but for `without`, by their names without suffix;
    and what is left out, for messages."""
    _listed(folder, layout)
    found: dict[str, list[Path]] = {}
    left_out, visited = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not _is_hidden(name)
            and Path(place, name) != without
            and os.path.realpath(Path(place, name)) not in visited
        )
        for name in sorted(name for name in names if not _is_hidden(name)):
            path = Path(place, name)
            if path.suffix.lower() in suffixes:
                key = path.relative_to(folder).with_suffix("").as_posix()
                found.setdefault(_stem(key), []).append(path)
            else:
                left_out.append(name)
    if not left_out:
        return found, ""
    total, shown = sum(map(len, found.values())) + len(left_out), ", ".join(left_out[:3])
    return found, (
        f"{folder}: {len(left_out)} of {total} left out because of the suffix ({shown}"
        f"{' ...' * (len(left_out) > 3)}), expected {', '.join(sorted(suffixes))}"
    )


def _pairs(
    folder: Path,
    masks: Path,
    config: DataConfig,
    some_without: bool = False,
    listed: Path | None = None,
) -> tuple[Pair, ...]:
    layout = f"{folder} and {masks}"
    images, images_left = _of_suffix(folder, IMAGE_SUFFIXES, layout, masks)
    more = images_left and f" ({images_left})"
    there, masks_left = _of_suffix(masks, _MASK_SUFFIXES, layout + more)
    endings = _endings(config)
    if folder == masks:
        own = {stem + end for stem in images for end in endings if end}
        images, masks_left = {k: v for k, v in images.items() if k not in own}, ""
    for path, *others in images.values():
        if others:
            raise DataError(
                f"{others[0]}: has the same stem as {path.name}; one mask cannot belong to both"
            )
    stems = {path: stem for stem, (path,) in images.items()}

    def choices(image: Path) -> tuple[Path, ...]:
        stem = stems[image]
        # What is the name of another image belongs to that one.
        names = [stem + end for end in endings if not end or stem + end not in images]
        found = [there[name] for name in names if name in there and there[name] != [image]]
        if len(found) > 1:
            raise DataError(
                f"{image}: has the masks {' and '.join(str(paths[0]) for paths in found)}; name "
                'the ending that counts, such as data.mask_suffix = "_mask" (or "")'
            )
        by_suffix = sorted(
            found[0] if found else (), key=lambda path: _MASK_SUFFIXES.index(path.suffix.lower())
        )
        first = next((end for end in endings if end or folder != masks), "")
        return tuple(by_suffix) or (masks / f"{stem}{first}.png",)

    nothing = f"{folder}: holds no image"
    nothing = images_left or f"{nothing} ({', '.join(sorted(IMAGE_SUFFIXES))})"
    used = _only(images, listed, folder) if listed else stems
    pairs = _pair_up(used, choices, nothing, True, some_without)
    for text in filter(None, (images_left, masks_left)):
        log.warning(text)
    return pairs


def _only(images: dict[str, list[Path]], listed: Path, folder: Path) -> list[Path]:
    """The images that a list has, in their own order."""
    by_name: dict[str, list[str]] = {}
    for key in images:
        by_name.setdefault(key.rpartition("/")[2], []).append(key)
    kept, unknown = set(), []
    for entry in map(_stem, _entries(listed, "")):
        alike = [
            key
            for key in by_name.get(entry.rpartition("/")[2], ())
            if f"/{entry}".endswith(f"/{key}") or key.endswith(f"/{entry}")
        ]
        kept |= set(alike)
        unknown += [] if alike else [entry]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(f"{listed}: names {unknown[0]}{more}, and {folder} holds no such image")
    return [path for key, (path,) in images.items() if key in kept]
