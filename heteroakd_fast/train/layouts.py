"""The folders that data sets are published in, and a folder of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .config import DataConfig
from .data import SegmentationData
from .errors import DataError, DependencyError
from .pairs import Encoding, FileSource, Folders, Pair, check_files, pair_up
from .pictures import Mask, Palette, check_regular, palette_of, spread_palette

_UNLABELLED = 255  # in all published data sets; in VOC the border around objects


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


def load_layout(config: DataConfig, seed: int) -> SegmentationData:
    """The training and validation set of `data.kind` in `data.root`, checked; `seed` splits a
    folder that has no split.

    Raises:
        DataError: something is missing or cannot be used.
    """
    load = {"cityscapes": _cityscapes, "voc": _voc, "ade20k": _ade20k}.get(config.kind)
    assert config.root is not None  # the configuration requires it
    root = config.root.expanduser()
    train, val, names, palette = load(config, root) if load else _folder(config, root, seed)
    check_files(train, val, config)
    return SegmentationData(train, val, names, palette, config.ignore_index)


_Loaded = tuple[FileSource, FileSource, tuple[str, ...], Palette]


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
_PICTURE, _TRAIN_IDS, _LABEL_IDS = (
    "_leftImg8bit.png",
    "_gtFine_labelTrainIds.png",
    "_gtFine_labelIds.png",
)


def _cityscapes(config: DataConfig, root: Path) -> _Loaded:
    folders = Folders(
        f"Cityscapes as leftImg8bit/{{train,val}}/CITY/*{_PICTURE} and "
        f"gtFine/{{train,val}}/CITY/*{_LABEL_IDS} (or *{_TRAIN_IDS}) in data.root"
    )
    ignore = config.ignore_index
    # Train ids where the files were prepared, else ids as published; -1 is 255 in 8 bits.
    ids = dict.fromkeys((*range(34), _UNLABELLED), ignore)
    ids |= {value: index for index, value in enumerate(_IDS)}
    encodings = (
        (_TRAIN_IDS, Encoding.plain(len(_IDS), _UNLABELLED, ignore, "train ids: ")),
        (_LABEL_IDS, Encoding(ids, f"label ids: 0 to 33 or {_UNLABELLED} (ignored)")),
    )

    def split(name: str) -> FileSource:
        pictures, masks = root / "leftImg8bit" / name, root / "gtFine" / name
        folders.names(masks)
        cities = (pictures / city for city in sorted(folders.names(pictures)))
        images = [
            city / file
            for city in cities
            if city.is_dir()
            for file in sorted(folders.names(city))
            if file.endswith(_PICTURE)
        ]

        def choices(image: Path) -> tuple[Path, ...]:
            stem = masks / image.parent.name / image.name.removesuffix(_PICTURE)
            return tuple(Path(f"{stem}{ending}") for ending in (_TRAIN_IDS, _LABEL_IDS))

        needed = f"{pictures}: holds no picture CITY/*{_PICTURE}"
        return FileSource(_pairs_of(images, choices, folders, needed), encodings)

    return split("train"), split("val"), CITYSCAPES, _CITYSCAPES_COLOURS


def _pairs_of(
    images: list[Path],
    masks: Callable[[Path], tuple[Path, ...]],
    folders: Folders,
    nothing: str,
) -> tuple[Pair, ...]:
    if not images:
        raise DataError(f"{nothing}; expected {folders.layout}")
    return pair_up(images, masks, folders)


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


def _ade20k(config: DataConfig, root: Path) -> _Loaded:
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    folders = Folders(
        "ADE20K as images/{training,validation}/*.jpg and annotations/{training,validation}/*.png "
        "in data.root or in its ADEChallengeData2016/"
    )
    encoding = Encoding.shifted(len(ADE20K), _UNLABELLED, config.ignore_index)

    def split(name: str) -> FileSource:
        pictures, masks = root / "images" / name, root / "annotations" / name
        images = [
            pictures / file for file in sorted(folders.names(pictures)) if file.endswith(".jpg")
        ]
        folders.names(masks)
        nothing = f"{pictures}: holds no picture *.jpg"
        pairs = _pairs_of(images, lambda image: (masks / f"{image.stem}.png",), folders, nothing)
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
    folders = Folders(_VOC_LAYOUT)
    root = _find_voc(root)
    mask_classes = Encoding.plain(len(VOC), _UNLABELLED, config.ignore_index)
    lists = root / "ImageSets" / "Segmentation"
    for name in ("JPEGImages", "SegmentationClass"):
        folders.names(root / name)

    def source(stems: list[str], list_path: Path, *more: tuple[Path, str]) -> FileSource:
        """`more`: folder and suffix of masks for stems without one of VOC's own."""
        images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        missing = [image for image in images if not folders.holds(image)]
        if missing:
            also = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]}: no such picture, but {list_path} names it{also}")
        places = ((root / "SegmentationClass", ".png"), *more)

        def masks(image: Path) -> tuple[Path, ...]:
            return tuple(folder / f"{image.stem}{suffix}" for folder, suffix in places)

        pairs = pair_up(images, masks, folders)
        return FileSource(pairs, (("", mask_classes),), ((".mat", read_sbd_mask),))

    val_stems = _stems(lists / "val.txt")
    val = source(val_stems, lists / "val.txt")
    train_list = lists / "train.txt"
    if config.voc_split == "train":
        train = source(_stems(train_list), train_list)
    elif config.sbd_root is None and (root / "SegmentationClassAug").is_dir():
        # The lists in use differ in whether they repeat VOC's own; none may hold what is validated.
        aug_list = lists / "trainaug.txt"
        if not aug_list.exists():
            raise DataError(f"{aug_list}: no such list; {_SBD_LAYOUT}")
        stems = sorted(set(_stems(aug_list)) - set(val_stems))
        train = source(stems, aug_list, (root / "SegmentationClassAug", ".png"))
    else:
        sbd = _find_sbd(config, root)
        _load_mat_reader(sbd)
        listed = {*_stems(sbd / "train.txt"), *_stems(sbd / "val.txt"), *_stems(train_list)}
        stems = sorted(listed - set(val_stems))
        train = source(stems, sbd / "train.txt", (sbd / "cls", ".mat"))
    return train, val, VOC, voc_palette(len(VOC))


def _find_voc(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "ImageSets").is_dir() or (folder / "JPEGImages").is_dir():
            return folder
    raise DataError(f"{root}: no such folder, or nothing of VOC 2012 in it; expected {_VOC_LAYOUT}")


def _find_sbd(config: DataConfig, root: Path) -> Path:
    names = (Path("VOCaug", "dataset"), Path("benchmark_RELEASE", "dataset"))
    places = [parent / name for parent in (root, *list(root.parents)[:2]) for name in names]
    if config.sbd_root is not None:
        sbd = config.sbd_root.expanduser()
        places = [sbd, sbd / "dataset", *(sbd / name for name in names)]
    for folder in places:
        if (folder / "cls").is_dir():
            return folder
    where = config.sbd_root or root
    raise DataError(f"{where}: holds no masks of SBD; {_SBD_LAYOUT}")


def _stems(path: Path) -> list[str]:
    """The pictures a list names: a stem a line, or a path or two."""
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such list; expected {_VOC_LAYOUT}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of pictures: {error}") from None
    stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if not stems:
        raise DataError(f"{path}: names no picture; expected one a line, such as 2007_000032")
    return stems


def _load_mat_reader(sbd: Path) -> None:
    """Say before training that .mat files cannot be read here."""
    try:
        import scipy.io  # noqa: F401
    except ImportError:
        raise DependencyError(
            f"{sbd / 'cls'}: holds .mat files, which scipy reads, and it is not installed: "
            "pip install scipy"
        ) from None


def read_sbd_mask(path: Path) -> Mask:
    """The class ids in one of SBD's .mat files."""
    from scipy.io import loadmat

    try:
        check_regular(path)
        content = loadmat(str(path), variable_names=["GTcls"])
        values = np.asarray(content["GTcls"]["Segmentation"][0, 0])
    except DataError:
        raise
    except Exception as error:  # its parser lets through whatever a broken file makes it meet
        raise DataError(
            f"{path}: cannot be read as a mask of SBD (GTcls.Segmentation): {error!r}"
        ) from None
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise DataError(
            f"{path}: {values.dtype} with {values.ndim} axes in GTcls.Segmentation, "
            "expected class ids, height x width"
        )
    return values.astype(np.uint8 if values.dtype == np.uint8 else np.int64, copy=False)


# -- your own images: images/ and masks/ with the same stems, in train/ and val/ or split here -----

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_SPLIT = 3  # its own random stream, see data.py


def _folder(config: DataConfig, root: Path, seed: int) -> _Loaded:
    assert config.num_classes is not None  # the configuration requires it
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (data.root)")
    if (root / "train").is_dir() or (root / "val").is_dir():
        train, val = _pairs(root / "train"), _pairs(root / "val")
    else:
        train, val = _split(_pairs(root), config.val_fraction, seed, root)
    count, ignore = config.num_classes, config.ignore_index
    encode = Encoding.shifted if config.reduce_zero_label else Encoding.plain
    encodings = (("", encode(count, ignore, ignore)),)
    names = config.class_names or tuple(f"class {index}" for index in range(count))
    sources = FileSource(tuple(train), encodings), FileSource(tuple(val), encodings)
    return *sources, names, spread_palette(count)


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
