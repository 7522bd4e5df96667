"""What the files of a data set hold: said before training, and refused where it is surely wrong."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DataConfig
from ..errors import DataError, UserError, shortened
from ..files import cache_folder, write_file
from .images import SegmentationData, Source, read_form

Pair = tuple[Path, Path | None]  # of an image and its mask

_VERSION = 2  # of what the cache holds
_MOMENT = 2.0  # what is scanned in fewer seconds is not kept
_DARK = 32  # of 255
_MUCH_IGNORED = 0.1
_SHOWN = 3


class Survey(NamedTuple):
    """What is in the files of a split; JSON has the same."""

    images: int
    forms: list[list[str | float]]
    """Of each mode: its name, the value that is white, the least and the greatest value."""
    sizes: list[list[str | int]]
    """Width, height, and the first image that has them."""
    pixels: list[int]
    """Of each class; the last: of none."""
    turned: int
    """Images that their EXIF orientation turns."""
    seen: dict[str, str]
    """A digest of the pixels of each image that is not of one colour, and the image."""

    @property
    def ignored(self) -> float:
        """Share of the pixels that count nowhere."""
        return self.pixels[-1] / max(1, sum(self.pixels))

    @property
    def absent(self) -> set[int]:
        """The classes without a pixel."""
        return {index for index, count in enumerate(self.pixels[:-1]) if not count}

    def line(self, split: str) -> str:
        """Modes, ranges and sizes."""
        forms = [
            f"{mode} from {least:g} to {greatest:g} of {full:g}"
            for mode, full, least, greatest in self.forms
        ]
        sizes = shortened([f"{width} x {height}" for width, height, _ in self.sizes], _SHOWN)
        shown = f"{', '.join(forms)}; {sizes}".removeprefix("; ")
        turned = f" ({self.turned} turned as their EXIF data say)" if self.turned else ""
        return f"{split}: {self.images} images{turned}, {shown} pixels"


def survey(source: Source, classes: int, key: str = "") -> Survey:
    """Read all images and masks of a source. Of files, what took a while is kept in the cache, by
    their names, sizes and times, and by `key`: whatever else decides.

    Raises:
        DataError: one cannot be read.
    """
    files: Sequence[Pair] = getattr(source, "pairs", ())
    path = _cache_path(files, f"{_VERSION} {classes} {key}") if files else None
    if path is not None:
        with suppress(OSError, ValueError, TypeError):
            return Survey(**json.loads(path.read_bytes()))
    started = time.monotonic()
    forms: dict[str, list[str | float]] = {}
    sizes: dict[tuple[int, int], list[str | int]] = {}
    pixels = np.zeros(classes + 1, np.int64)
    turned, seen = 0, {}
    for index in range(len(source)):
        image, mask = source.read(index)
        height, width = mask.shape
        sizes.setdefault((width, height), [width, height, source.name(index)])
        if image.min() < image.max():
            seen[hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest()] = source.name(index)
        if files:
            form = read_form(files[index][0], image)
            turned += form.turned
            name = f"{form.mode} in [0, {form.full}]" if form.mode == "F" else form.mode
            kept = forms.setdefault(name, [name, form.full, form.least, form.greatest])
            kept[2:] = min(kept[2], form.least), max(kept[3], form.greatest)  # type: ignore[type-var]
        if not files or files[index][1] is not None:
            found = np.bincount(mask.ravel(), minlength=classes)
            pixels += [*found[:classes], found[classes:].sum()]
    whole = list(forms.values()), list(sizes.values()), pixels.tolist()
    result = Survey(len(source), *whole, turned, seen)
    if path is not None and time.monotonic() - started > _MOMENT:
        with suppress(UserError):  # it can be made again
            write_file(path, json.dumps(result._asdict()).encode())
    return result


def _cache_path(files: Sequence[Pair], key: str) -> Path | None:
    digest = hashlib.sha256(key.encode())
    try:
        for path in (path for pair in files for path in pair if path is not None):
            status = path.stat()
            digest.update(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode())
    except (OSError, UnicodeEncodeError):  # reading it says what is wrong
        return None
    return cache_folder() / f"survey-{digest.hexdigest()[:16]}.json"


def table(names: Sequence[str], train: Survey, val: Survey) -> str:
    """The share of the pixels of each class, a line each."""
    width = max(map(len, (*names, "ignored")))
    lines = [f"{'class':<{width}}  training  validation"]
    for name, *counts in zip((*names, "ignored"), train.pixels, val.pixels, strict=True):
        share, other = (
            n / max(1, sum(split.pixels)) for n, split in zip(counts, (train, val), strict=True)
        )
        lines.append(f"{name:<{width}}  {share:8.3%}  {other:10.3%}")
    return "\n".join(lines)


def check_surveys(
    train: Survey, val: Survey, config: DataConfig, names: Sequence[str], whole: bool
) -> None:
    """Refuse what nothing could be learned from; `whole`: all files were read.

    Raises:
        DataError: it is in the files.
    """
    (width, height, first), *others = train.sizes
    if others and config.crop is None:
        raise DataError(
            f"{others[0][2]}: {others[0][0]} x {others[0][1]} pixels, but {Path(str(first)).name} "
            f"has {width} x {height}; images of different sizes need data.crop"
        )
    # Black is black in both.
    floats = {mode for mode, _, _, most in train.forms + val.forms if str(mode)[0] == "F" and most}
    if len(floats) > 1:
        raise DataError(
            f"{config.root}: some images are {' and others '.join(sorted(map(str, floats)))}; "
            "rescale them by the same factor"
        )
    if not any(train.pixels[:-1]):
        raise DataError(f"{config.root}: no pixel of a training mask has a class: all are ignored")
    there = set(range(len(names))) - train.absent
    if not whole or len(there) > 1:
        return
    text = f"{config.root}: the masks hold {names[min(there)]} and no other class"
    if as_they_are(config) and there == {0} and train.ignored and config.ignore_index == 255:
        raise DataError(
            f"{text}: 0 and 255 alone, and 255 is data.ignore_index; where 255 is the foreground, "
            "set data.num_classes = 2 and data.palette = [[0, 0, 0], [255, 255, 255]]"
        )
    raise DataError(
        f"{text}, so that there is nothing to learn; the background is a class, too: expected "
        "masks with two classes or more"
    )


def as_they_are(config: DataConfig) -> bool:
    """Whether values in masks are classes."""
    return config.palette is None and not config.reduce_zero_label


def oddities(
    train: Survey, val: Survey, config: DataConfig, names: Sequence[str], whole: bool
) -> list[str]:
    """What may be meant, and often is not."""
    found = []
    absent = {
        "in no mask at all": train.absent & val.absent,
        "in no training mask, but in those for validation": train.absent - val.absent,
    }
    for text, classes in absent.items() if whole else ():
        if classes:
            found.append(
                f"{shortened([names[index] for index in sorted(classes)], _SHOWN)}: {text}"
            )
            if 0 in classes and as_they_are(config) and config.kind == "folder":
                found[-1] += " (where classes begin with 1, set data.reduce_zero_label = true)"
    if not any(val.pixels[:-1]):
        found.append("no pixel of a validation mask has a class: there is nothing to score")
    if train.ignored > _MUCH_IGNORED and config.kind == "folder":  # others are known for it
        found.append(f"{train.ignored:.1%} of the pixels of training masks are ignored")
    for mode, full, _, most in train.forms:
        if 255 * float(most) / float(full) < _DARK:
            found.append(
                f"images of mode {mode} never exceed {most:g} of {full:g}: they are almost black; "
                "rescale them, all by the same factor"
            )
    if both := [Path(val.seen[key]).name for key in train.seen.keys() & val.seen.keys()]:
        found.append(
            f"{len(both)} images are both in training and in validation "
            f"({shortened(sorted(both), _SHOWN)}): scores of what was learned by heart"
        )
    return found


def describe(data: SegmentationData) -> str:
    """What `heteroakd-train check` prints."""
    train, val = data.surveys or (
        survey(data.train, data.num_classes),
        survey(data.val, data.num_classes),
    )
    lines = (train.line("training"), val.line("validation"), table(data.class_names, train, val))
    return "\n".join(lines)
