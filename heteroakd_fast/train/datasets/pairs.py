"""Pairs of an image and a mask: how they are found, and what the values in masks mean."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError, shortened
from ..files import check_regular
from .images import Mask, Palette, Pixels, read_image, read_mask
from .survey import Pair

UNLABELLED = 255  # in all published data sets; in VOC the border around objects
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_LISTED = re.compile(rf"(.*?)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?=[\s,;]|$)", re.I)
# The first that is there. A JPEG is found, too: reading it says why it is no mask.
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp", ".jpg", ".jpeg")
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
    ignore_index: int = UNLABELLED
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


#: Training and validation, the names of the classes and their colours.
Loaded = tuple[FileSource, FileSource, tuple[str, ...], Palette]


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


def is_hidden(name: str) -> bool:
    # macOS leaves a ._name beside each name.
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def listed_in(folder: Path, layout: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    except (FileNotFoundError, NotADirectoryError):
        there = next((parent for parent in folder.parents if parent.is_dir()), None)
        raise DataError(f"{folder}: no such folder; expected {layout}{holds(there)}") from None


def holds(folder: Path | None) -> str:
    """What is in a folder, for messages."""
    names = sorted(p.name for p in folder.iterdir() if not is_hidden(p.name)) if folder else []
    packed = [
        name for name in names if name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z"))
    ]
    unpack = f" (unpack {shortened(packed, 3)})" if packed else ""
    return f"; {folder} holds {shortened(names, 6) or 'nothing'}{unpack}" if folder else ""


def below(root: Path, inside: str) -> Path | None:
    """The folder that has `inside`: `root`, or one up to two folders deeper, as archives may have
    it."""
    found = (sorted(root.glob(f"{deeper}{inside}")) for deeper in ("", "*/", "*/*/"))
    path = next((paths[0] for paths in found if paths), None)
    return path and path.parents[inside.count("/")]


def pair_up(
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
            if near[0].suffix.lower() not in MASK_SUFFIXES:
                hint += _EXPORT
            elif near[0].parent not in {path.parent for path in paths}:
                hint = f"; there is {near[0]}: images and masks have the same subfolders"
            elif near[0].stem.casefold() == paths[0].stem.casefold():
                hint += ": capitals count"
            elif own:
                hint += ": data.mask_suffix names an ending"
        elif len(missing) == len(choices):
            folder = paths[0].parent
            images_there = any(path.suffix.lower() in MASK_SUFFIXES for path in there)
            hint = holds(folder if folder.is_dir() else None) + _EXPORT * (not images_there)
        if own and len(missing) < len(choices):
            hint += '; where only the teacher is to label such images, set data.labelled = "masks"'
        raise DataError(f"{image}: has no mask {expected}{more_of(missing)}{hint}")
    return tuple((image, paths[0] if paths else None) for image, paths in found.items())


_EXPORT = ", which is not read: export masks as images of class ids (PNG)"


def _alike(name: str, image: Path, mask: Path) -> bool:
    """Whether a file's name begins with what those of an image and its mask have in common, and is
    not that of another number."""
    start = os.path.commonprefix([image.stem, mask.stem])  # noqa: RUF071
    ends = not (start[-1:].isalnum() and name[len(start) : len(start) + 1].isalnum())
    return bool(start) and ends and name.casefold().startswith(start.casefold())


def more_of(missing: list[Path]) -> str:
    return f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""


def entries_of(path: Path, layout: str) -> list[str]:
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
