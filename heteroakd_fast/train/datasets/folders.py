"""The data set that a configuration names, in files; and a folder of the user's own."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..errors import DataError
from ..files import check_regular
from .images import Palette, SegmentationData, indexed_colours, spread_palette
from .pairs import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Encoding,
    FileSource,
    Loaded,
    entries_of,
    is_hidden,
    listed_in,
    more_of,
    pair_up,
)
from .published import ade20k, cityscapes, voc
from .survey import Pair, Survey, check_surveys, oddities, survey, table

log = logging.getLogger("heteroakd_fast.train")

# Of published data sets so many files of each split are read before training.
_SAMPLE = 32


def load_layout(config: DataConfig, unlabelled_index: int | None = None) -> SegmentationData:
    """The training and validation set of `data.kind` in `data.root`, checked; masks of a folder may
    have `unlabelled_index`, too.

    Raises:
        DataError: something is missing or cannot be used.
    """
    load = {"cityscapes": cityscapes, "voc": voc, "ade20k": ade20k}.get(config.kind)
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
        raise DataError(f"{both[0]}: is listed for training and for validation{more_of(both)}")
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
    program that numbers the colours of each file by itself wrote them. A few hundred are opened.

    Raises:
        DataError: there are some.
    """
    known: dict[tuple[int, ...], tuple[int, Path]] = {}
    for _, path in source.pairs[:: len(source) // 256 + 1]:
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


# -- your own images: images/ and masks/ of the same names, split by folders or here ---------------

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


def _folder(config: DataConfig, root: Path, unlabelled_index: int | None) -> Loaded:
    assert config.num_classes is not None  # the configuration requires it
    listed_in(root, "data.root with images/ and masks/, or train/ and val/ with both")
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
    listed_in(folder, layout)
    found: dict[str, list[Path]] = {}
    left_out, visited = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not is_hidden(name)
            and Path(place, name) != without
            and os.path.realpath(Path(place, name)) not in visited
        )
        for name in sorted(name for name in names if not is_hidden(name)):
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
    there, masks_left = _of_suffix(masks, MASK_SUFFIXES, layout + more)
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
            found[0] if found else (), key=lambda path: MASK_SUFFIXES.index(path.suffix.lower())
        )
        first = next((end for end in endings if end or folder != masks), "")
        return tuple(by_suffix) or (masks / f"{stem}{first}.png",)

    nothing = f"{folder}: holds no image"
    nothing = images_left or f"{nothing} ({', '.join(sorted(IMAGE_SUFFIXES))})"
    used = _only(images, listed, folder) if listed else stems
    pairs = pair_up(used, choices, nothing, True, some_without)
    for text in filter(None, (images_left, masks_left)):
        log.warning(text)
    return pairs


def _only(images: dict[str, list[Path]], listed: Path, folder: Path) -> list[Path]:
    """The images that a list has, in their own order."""
    by_name: dict[str, list[str]] = {}
    for key in images:
        by_name.setdefault(key.rpartition("/")[2], []).append(key)
    kept, unknown = set(), []
    for entry in map(_stem, entries_of(listed, "")):
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
