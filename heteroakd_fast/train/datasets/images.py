"""One image and its mask as arrays, the data sets made of them, and colours for classes."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import DataError
from ..files import check_regular

if TYPE_CHECKING:
    from .survey import Survey

Pixels = NDArray[np.uint8]  # H x W x 3
Mask = NDArray[np.integer[Any]]  # H x W
Palette = tuple[tuple[int, int, int], ...]

#: Content of image files, whatever their names say. Pillow decodes dozens of formats more, and one
#: of them by starting Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# Their values go to 255 in images; those of all other modes that Pillow decodes do so anyway.
_FULL = dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "I;16N"), (65535,)) | {"F": (1, 255)}
# A page of this kind (TIFF's NewSubfileType) is a smaller copy or the mask of another.
_COPY = 1 | 4


class Form(NamedTuple):
    """How an image file stores its pixels."""

    mode: str
    """Pillow's name."""
    full: int
    """The value that is white."""
    least: float
    greatest: float
    turned: bool = False
    """Whether its EXIF orientation turns it."""


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
    surveys: tuple[Survey, Survey] | None = None
    """What all files of both sets hold, where that was looked for."""

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
            # JPEGs of phones may have a second picture (MPO); the first is the one that counts.
            frames = {"TIFF": _pages, "PNG": _frames, "WEBP": _frames}.get(image.format or "")
            if frames and (count := frames(image)) > 1:
                kind = "pages" if image.format == "TIFF" else "frames"
                raise DataError(
                    f"{name}: a {image.format} of {count} {kind}, expected one; save each by itself"
                )
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders let through whatever a broken file makes them meet
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror + " (a link to nothing)" * Path(name).is_symlink()
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            reason = f"{reason.rstrip('.')}; cut it into smaller ones"
        if isinstance(error, UnidentifiedImageError):
            if content is None:
                with Path(name).open("rb") as file:
                    content = file.read(16)
            begins = f"content that begins with {content[:16]!r}" if content else "an empty file"
            if content[:4] in (b"II*\0", b"MM\0*"):
                begins = "a TIFF that Pillow does not know, such as several bands of floats"
            reason = f"got {begins}, expected {', '.join(FORMATS)}"
        raise DataError(f"{name}: cannot be read as {what}: {reason}") from None


def _frames(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1)


def _pages(image: Image.Image) -> int:
    count = 0
    for index in range(_frames(image)):
        image.seek(index)
        count += not image.tag_v2.get(254, 0) & _COPY  # type: ignore[attr-defined]
    image.seek(0)
    return count


def read_image(name: Path | str, content: bytes | None = None) -> Pixels:
    """RGB pixels as they are meant to be seen: the EXIF orientation is applied, deep greys are
    scaled to 8 bits, and alpha is dropped."""
    with _opened(name, "an image", content) as image:
        image.load()  # here, where damage raises
        with contextlib.suppress(Exception):  # EXIF data that cannot be read name no orientation
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode in _FULL:
            values = np.asarray(image)
            grey = np.rint(values * (255.0 / _deep(name, image.mode, values).full))
            return np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
        # It would be copied otherwise.
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_form(name: Path | str, pixels: Pixels) -> Form:
    """How a file stores the image that was read from it as `pixels`."""
    with _opened(name, "an image", None) as image:
        form = Form(image.mode, 255, int(pixels.min()), int(pixels.max()))
        if image.mode in _FULL:
            form = _deep(name, image.mode, np.asarray(image))
        return form._replace(turned=_orientation(image) != 1)


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # EXIF data that cannot be read name none
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _deep(name: Path | str, mode: str, values: NDArray[Any]) -> Form:
    """The range of values that are not of 8 bits: of their type, and of floats the one that is
    customary. A float above 1 that is almost black in 0 to 255 is more likely 0 to 1 overshot."""
    least, greatest = values.min().item(), values.max().item()
    for full in _FULL[mode]:
        # NaN fails every comparison.
        if least >= 0 and greatest <= full and (mode != "F" or full == 1 or greatest >= 2):
            return Form(mode, full, least, greatest)
    ranges = " or ".join(f"0 to {full}" for full in _FULL[mode])
    raise DataError(
        f"{name}: values from {least:g} to {greatest:g} (mode {mode}), expected {ranges}; rescale "
        "the images, all by the same factor"
    )


def read_mask(
    name: Path | str, content: bytes | None = None, colours: Palette | None = None
) -> Mask:
    """Class ids: the values as the file has them in one channel, or the places of its colours among
    `colours`."""
    with _opened(name, "a mask", content) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(
                f"{name}: a mask as JPEG, whose compression changes class ids, expected PNG; "
                "export the masks again (a converted JPEG is no better)"
            )
        mode = image.mode
        values = np.asarray(image if colours is None else image.convert("RGB"))
        if _orientation(image) != 1:
            raise DataError(
                f"{name}: a mask with an EXIF orientation, expected none; save it as it is to be "
                "seen"
            )
    if colours is not None:
        return _places(name, values, colours)
    # "P": the palette index is the class, whatever its colour. Alpha means nothing.
    if mode in ("LA", "RGBA") and _plain(values[..., :-1]) and not _plain(values[..., -1:]):
        raise DataError(
            f"{name}: a mask of one colour, with what it shows in its alpha channel; save that as "
            "grey"
        )
    grey = mode in ("RGB", "RGBA") and (values[..., :1] == values[..., 1:3]).all()
    if grey or mode in ("LA", "PA"):
        values = values[..., 0]
    if values.ndim != 2 or (values.dtype.kind == "f" and not (values == np.rint(values)).all()):
        raise DataError(
            f"{name}: a mask of mode {mode}, expected class ids in one channel (grey or palette); "
            'where colours stand for classes, set data.palette (only for data.kind = "folder")'
        )
    # "1" (bilevel) arrives as booleans.
    return values.astype(np.uint8 if values.dtype in (np.bool_, np.uint8) else np.int64, copy=False)


def _places(name: Path | str, rgb: Pixels, colours: Palette) -> Mask:
    """The index of each pixel's colour."""
    weights = np.array([65536, 256, 1], np.int32)
    codes, known = rgb @ weights, np.array(colours, np.int32) @ weights
    order = np.argsort(known)
    places: Mask = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
    wrong = known[places] != codes
    if wrong.any():
        raise DataError(
            f"{name}: has the colour {rgb[wrong][0].tolist()} ({wrong.sum()} pixels), which "
            f"data.palette ({len(colours)} colours) does not; colours without a class go after the "
            "first data.num_classes, and where edges are smoothed or colours approximate (JPEG), "
            "export the masks again"
        )
    return places


def _plain(values: NDArray[Any]) -> bool:
    return bool((values == values[:1, :1]).all())


def indexed_colours(name: Path | str) -> list[tuple[int, ...]]:
    """The colours of the indices of a palette file; none of another."""
    with _opened(name, "a mask", None) as image:
        flat = (image.getpalette() or []) if image.mode == "P" else []
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def palette_of(text: str) -> Palette:
    """Colours of hexadecimal digits."""
    colours = (bytes.fromhex(colour) for colour in text.split())
    return tuple((red, green, blue) for red, green, blue in colours)


def spread_palette(count: int) -> Palette:
    """Colours far apart: golden-ratio steps of hue, with brightness alternating."""
    index = np.arange(count)
    hsv = [index * 0.618034 % 1.0, 0.75 - 0.25 * (index % 2), 0.95 - 0.3 * (index % 3 == 1)]
    from matplotlib.colors import hsv_to_rgb  # late: it takes long to import

    colours = np.rint(hsv_to_rgb(np.stack(hsv, 1)) * 255).astype(int).tolist()
    return tuple((red, green, blue) for red, green, blue in colours)
