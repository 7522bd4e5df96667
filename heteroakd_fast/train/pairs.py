"""Pairs of files, a picture and its mask: found, checked and read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .config import DataConfig
from .errors import DataError
from .pictures import Mask, Picture, read_mask, read_picture

Pair = tuple[Path, Path]

# Of the published data sets only so many files of each split are read before training: they come
# as they were published, and some hold 20000 pictures.
_FIRST = 4


@dataclass(frozen=True)
class Encoding:
    """What the values in mask files mean: classes, or what is ignored; others are an error."""

    meaning: Mapping[int, int]
    expected: str

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

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        """Value -> class; -1: not expected. One entry more than values, for those beyond."""
        table = np.full(max(256, max(self.meaning) + 2), -1, np.int64)
        table[list(self.meaning)] = list(self.meaning.values())
        return table

    @cached_property
    def _byte_table(self) -> bytes | None:
        """The table for 8-bit values, where every class is one as well."""
        table = self._table[:256]
        if table.max() > 255:
            return None
        return table.astype(np.uint8).tobytes()

    def decode(self, values: Mask, path: Path) -> Mask:
        """Class ids and `ignore_index`; `path` is for messages."""
        if values.dtype == np.uint8 and self._byte_table is not None:
            # A histogram costs a fraction of what comparing every pixel with the limits does.
            present = np.flatnonzero(Image.fromarray(values).histogram())
            if (self._table[present] >= 0).all():
                if (self._table[present] == present).all():
                    return values
                mapped = values.tobytes().translate(self._byte_table)
                return np.frombuffer(mapped, np.uint8).reshape(values.shape)
        beyond = len(self._table) - 1
        decoded = self._table[np.where((values < 0) | (values > beyond), beyond, values)]
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
    #: How masks of some suffix are read that are no pictures.
    readers: tuple[tuple[str, Callable[[Path], Mask]], ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Picture, Mask]:
        image_path, mask_path = self.pairs[index]
        picture = read_picture(image_path)
        values = dict(self.readers).get(mask_path.suffix, read_mask)(mask_path)
        if picture.shape[:2] != values.shape:
            turned = picture.shape[1::-1] == values.shape
            raise DataError(
                f"{mask_path}: {values.shape[1]} x {values.shape[0]} pixels, "
                f"but its picture {image_path} has {picture.shape[1]} x {picture.shape[0]}"
                + (" (with its EXIF orientation, which masks do not have)" if turned else "")
            )
        encoding = next(e for ending, e in self.encodings if mask_path.name.endswith(ending))
        return picture, encoding.decode(values, mask_path)


class Folders:
    """What is in folders, each listed once: asking for thousands of files one by one is slow."""

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self._names: dict[Path, frozenset[str]] = {}

    def names(self, folder: Path) -> frozenset[str]:
        """The files in `folder`, or the message of what should have been there."""
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(path.name for path in folder.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                raise DataError(f"{folder}: no such folder; expected {self.layout}") from None
            except OSError as error:
                raise DataError(f"{folder}: cannot be listed: {error.strerror}") from None
        return self._names[folder]

    def holds(self, path: Path) -> bool:
        try:
            return path.name in self.names(path.parent)
        except DataError:
            return False


def pair_up(
    images: Iterable[Path],
    mask_names: Callable[[Path], tuple[Path, ...]],
    folders: Folders,
) -> tuple[Pair, ...]:
    """Each picture with the first of its possible masks that exists."""
    pairs: list[Pair] = []
    missing: list[tuple[Path, tuple[Path, ...]]] = []
    for image in images:
        choices = mask_names(image)
        mask = next((path for path in choices if folders.holds(path)), None)
        if mask is None:
            missing.append((image, choices))
        else:
            pairs.append((image, mask))
    if missing:
        image, choices = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{image}: has no mask {' or '.join(map(str, choices))}{more}")
    return tuple(pairs)


def check_files(train: FileSource, val: FileSource, config: DataConfig) -> None:
    """Read what `data.check` asks for, and find images that cannot share a batch.

    Raises:
        DataError: a file cannot be used, or training images differ in size without `data.crop`.
    """
    if config.check is False:
        return
    own = config.kind == "folder"
    count = None if config.check or own else _FIRST
    sizes = [train.read(index)[1].shape for index in range(len(train))[:count]]
    for index in range(len(val))[:count]:
        val.read(index)
    if config.crop is not None:
        return
    # Of published sets the rest is seen to when batches are put together.
    for (image, _), size in zip(train.pairs, sizes[: None if own else _FIRST], strict=False):
        if size != sizes[0]:
            raise DataError(
                f"{image}: {size[1]} x {size[0]} pixels, "
                f"but {train.pairs[0][0].name} has {sizes[0][1]} x {sizes[0][0]}; "
                "pictures of different sizes need data.crop"
            )
