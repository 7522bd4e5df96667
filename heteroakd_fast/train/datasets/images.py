"""One image and its mask as arrays, the data sets made of them, and colours for classes."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.colors import hsv_to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError
from ..files import check_regular

Pixels = NDArray[np.uint8]  # H x W x 3
Mask = NDArray[np.integer[Any]]  # H x W
Palette = tuple[tuple[int, int, int], ...]

#: Content of image files, whatever their names say. Pillow decodes dozens of formats more, and one
#: of them by starting Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# "P": the palette index is the class, whatever its colour. "1" (bilevel) arrives as booleans.
_MASK_MODES = {"1", "L", "P", "I", "I;16", "I;16B"}


class Source(Protocol):
    """Images with masks, by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Pixels, Mask]: ...

    def name(self, index: int) -> str:
        """What messages call an image: its file, where it is one."""
        ...


@dataclass(frozen=True)
class SegmentationData:
    """A training and a validation set over the same classes."""

    train: Source
    val: Source
    class_names: tuple[str, ...]
    palette: Palette
    ignore_index: int
    credit: str = ""
    with_mask: tuple[int, ...] | None = None
    """The training images that have a mask, where not all have one."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@contextlib.contextmanager
def _opened(name: Path | str, what: str, content: bytes | None) -> Iterator[Image.Image]:
    """An open image file, or `content` that messages call `name`; decoded inside the block.

    Raises:
        DataError: not a regular file; none of `FORMATS`; more pixels than Pillow's
            `MAX_IMAGE_PIXELS`; damaged or cut short.
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
    except Exception as error:  # decoders let through whatever a broken file makes them meet
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            if content is None:
                with Path(name).open("rb") as file:
                    content = file.read(16)
            begins = f"content that begins with {content[:16]!r}" if content else "an empty file"
            reason = f"got {begins}, expected {', '.join(FORMATS)}"
        raise DataError(f"{name}: cannot be read as {what}: {reason}") from None


def read_image(name: Path | str, content: bytes | None = None) -> Pixels:
    """RGB pixels as they are meant to be seen: the EXIF orientation is applied."""
    with _opened(name, "an image", content) as image:
        image.load()  # here, where damage raises
        with contextlib.suppress(Exception):  # EXIF data that cannot be read name no orientation
            ImageOps.exif_transpose(image, in_place=True)
        # It would be copied otherwise.
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(name: Path | str, content: bytes | None = None) -> Mask:
    """The values as the file has them: class ids in one channel."""
    with _opened(name, "a mask", content) as image:
        mode, values = image.mode, np.asarray(image)
    if mode not in _MASK_MODES:
        raise DataError(
            f"{name}: a mask of mode {mode}, expected class ids in one channel (grey or palette)"
        )
    return values.astype(np.uint8 if values.dtype in (np.bool_, np.uint8) else np.int64, copy=False)


def palette_of(text: str) -> Palette:
    """Colours of hexadecimal digits."""
    colours = (bytes.fromhex(colour) for colour in text.split())
    return tuple((red, green, blue) for red, green, blue in colours)


def spread_palette(count: int) -> Palette:
    """Colours far apart: golden-ratio steps of hue, with brightness alternating."""
    index = np.arange(count)
    hsv = [index * 0.618034 % 1.0, 0.75 - 0.25 * (index % 2), 0.95 - 0.3 * (index % 3 == 1)]
    colours = np.rint(hsv_to_rgb(np.stack(hsv, 1)) * 255).astype(int).tolist()
    return tuple((red, green, blue) for red, green, blue in colours)
