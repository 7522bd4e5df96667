"""One image and its mask as arrays, and the colours classes are shown in."""

from __future__ import annotations

import colorsys
import contextlib
import io
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError

Picture = NDArray[np.uint8]  # H x W x 3
Mask = NDArray[np.integer[Any]]  # H x W
Palette = tuple[tuple[int, int, int], ...]

#: Content of image files, whatever their names say. Pillow decodes dozens of formats more, and one
#: of them by starting Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# "P": the palette index is the class, whatever its colour. "1" (bilevel) arrives as booleans.
_MASK_MODES = {"1", "L", "P", "I", "I;16", "I;16B"}
_PREFIX = 16  # bytes by which Pillow tells formats
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> None:
    """Refuse what is no file with content of its own: opening a FIFO would wait for its writer.

    Raises:
        DataError: a directory, FIFO, socket or device.
        OSError: nothing is there, or it cannot be looked up.
    """
    mode = path.stat().st_mode
    kind = next((name for applies, name in _KINDS if applies(mode)), None)
    if kind is not None:
        raise DataError(f"{path}: got {kind}, expected a regular file")


@contextlib.contextmanager
def open_image(
    name: Path | str, what: str = "an image", content: bytes | None = None
) -> Iterator[Image.Image]:
    """Open an image file; pixels are decoded by who uses the image, inside the block.

    Args:
        name: the file; beside `content`, only what messages call it.
        what: "an image" or "a mask", for messages.
        content: the file's content, where it was read already.

    Raises:
        DataError: not a regular file; none of `FORMATS`; more pixels than Pillow's
            `MAX_IMAGE_PIXELS`; damaged or cut short, which shows inside the block.
    """
    try:
        if content is None:
            check_regular(Path(name))
        with warnings.catch_warnings():
            # Pillow itself only warns of an image between its limit and twice that.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(name if content is None else io.BytesIO(content), formats=FORMATS)
        with image:
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        if content is None:
            with Path(name).open("rb") as file:
                content = file.read(_PREFIX)
        raise DataError(
            f"{name}: cannot be read as {what}: got {_describe(content[:_PREFIX])}, expected "
            f"{', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # decoders let through whatever a broken file makes them meet
        raise DataError(
            f"{name}: cannot be read as {what}: {str(error) or type(error).__name__}"
        ) from None


def _describe(prefix: bytes) -> str:
    """What content that could not be opened seems to be, by how it begins."""
    if not prefix:
        return "an empty file"
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        with contextlib.suppress(Exception):  # a prefix too short for one of them
            if accepts is not None and accepts(prefix):
                return f"damaged {name} content" if name in FORMATS else f"{name} content"
    return f"content that begins with {prefix!r}"


def to_picture(image: Image.Image) -> Picture:
    """RGB, H x W x 3, the way up that the EXIF orientation says."""
    image.load()  # here, where damage raises
    with contextlib.suppress(Exception):  # EXIF data that cannot be read name no orientation
        ImageOps.exif_transpose(image, in_place=True)
    # It would be copied otherwise.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_picture(path: Path) -> Picture:
    """The pixels as they are meant to be seen: the EXIF orientation is applied.

    Raises:
        DataError: see `open_image`.
    """
    with open_image(path) as image:
        return to_picture(image)


def read_mask(path: Path) -> Mask:
    """The values as the file has them; 8 bits stay 8 bits, for they are read fast.

    Raises:
        DataError: see `open_image`; or colours, where one channel of class ids is expected.
    """
    with open_image(path, "a mask") as image:
        mode, values = image.mode, np.asarray(image)
    if mode not in _MASK_MODES:
        raise DataError(
            f"{path}: a mask of mode {mode}, expected class ids in one channel (grey or palette)"
        )
    return values.astype(np.uint8 if values.dtype in (np.bool_, np.uint8) else np.int64, copy=False)


def palette_of(text: str) -> Palette:
    """Colours of hexadecimal digits."""
    colours = (bytes.fromhex(colour) for colour in text.split())
    return tuple((red, green, blue) for red, green, blue in colours)


def spread_palette(count: int) -> Palette:
    """Colours far apart: golden-ratio steps of hue, with brightness alternating."""
    colours = []
    for index in range(count):
        rgb = colorsys.hsv_to_rgb(
            index * 0.618034 % 1.0, 0.75 - 0.25 * (index % 2), 0.95 - 0.3 * (index % 3 == 1)
        )
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colours)
