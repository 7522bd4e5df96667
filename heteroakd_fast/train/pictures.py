"""One picture and its mask as arrays, and the colours classes are shown in."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import DataError

Picture = NDArray[np.uint8]  # H x W x 3
Mask = NDArray[np.integer[Any]]  # H x W

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# "P": the palette index is the class, whatever its colour. "1" (bilevel) arrives as booleans.
_MASK_MODES = {"1", "L", "P", "I", "I;16", "I;16B"}


def read_picture(path: Path) -> Picture:
    try:
        with Image.open(path) as image:
            # It would be copied otherwise.
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height from the header alone."""
    try:
        with Image.open(path) as image:
            return image.width, image.height
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from None


def read_mask(path: Path) -> Mask:
    """The values as the file has them; 8 bits stay 8 bits, for they are read fast."""
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a mask: {error}") from None
    if mode not in _MASK_MODES:
        raise DataError(
            f"{path}: a mask of mode {mode}, expected class ids in one channel (grey or palette)"
        )
    return values.astype(np.uint8 if values.dtype in (np.bool_, np.uint8) else np.int64, copy=False)


def spread_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours far apart: golden-ratio steps of hue, with brightness alternating."""
    colours = []
    for index in range(count):
        rgb = colorsys.hsv_to_rgb(
            index * 0.618034 % 1.0, 0.75 - 0.25 * (index % 2), 0.95 - 0.3 * (index % 3 == 1)
        )
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colours)
