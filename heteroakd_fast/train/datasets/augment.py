"""Augmentation: every choice comes from one generator, which is made anew for each image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import DataConfig
from .images import Mask, Pixels

# The first crop counts as a try.
_TRIES = 10
_BRIGHTNESS = 32.0
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 0.1  # of the whole circle: 18 of 180
_COLOUR_DRAWS = 9


def augment(
    image: Pixels, mask: Mask, config: DataConfig, rng: np.random.Generator
) -> tuple[Pixels, Mask]:
    """Random resize, crop, colours, flips and quarter turns."""
    # Always the same number of draws in the same order: switching one augmentation on or off
    # then leaves the others as they were.
    scale, top, left, flip, turns = rng.uniform(size=5)
    # The options that came later have draws of their own, so that batches without them stay.
    colours, corners = np.empty(0), np.array([[top, left]])
    if config.photometric or config.crop_max_ratio < 1.0:
        colours = rng.uniform(size=_COLOUR_DRAWS)
        corners = np.concatenate([corners, rng.uniform(size=(_TRIES - 1, 2))])

    low, high = config.scale
    height, width = _scaled(mask.shape, config, low + (high - low) * scale)
    rows, columns = _nearest(mask.shape[0], height), _nearest(mask.shape[1], width)
    window = _choose_window(mask, rows, columns, config, corners)
    # Only what the crop shows is resized and coloured.
    image = _resized(image, (height, width), window)
    mask = _picked(mask, rows[window[0]], columns[window[1]])
    if config.photometric:
        image = distort_colours(image, colours)
    if config.crop_size is not None:
        image, mask = _pad(image, mask, config.crop_size, config.ignore_index)
    if config.augment != "none" and flip < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if config.augment == "dihedral":
        quarter = int(turns * 4)
        if quarter % 2 and image.shape[0] != image.shape[1]:
            quarter -= 1  # a quarter turn would change the shape within a batch
        image, mask = np.rot90(image, quarter), np.rot90(mask, quarter)
    return image, mask


def fit_image(image: Pixels, config: DataConfig) -> Pixels:
    """A validation image as the network gets it: `data.resize`, without anything random."""
    shape = (image.shape[0], image.shape[1])
    size = _scaled(shape, config, 1.0)
    return _resized(image, size, (slice(0, size[0]), slice(0, size[1])))


def _scaled(shape: tuple[int, ...], config: DataConfig, factor: float) -> tuple[int, int]:
    """Height and width after `data.resize` and the random factor, both in one step."""
    height, width = shape
    if config.resize is not None:
        long, short = config.resize
        # As large as fits into long x short, whichever way the image lies.
        factor *= min(long / max(height, width), short / min(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """Which of `old` rows each of `new` rows shows; in integers, so exact."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def _picked(mask: Mask, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Mask:
    # Four times as fast as indexing with both.
    return mask.take(rows, 0).take(columns, 1)


Window = tuple[slice, slice]


def _choose_window(
    mask: Mask,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    config: DataConfig,
    corners: NDArray[np.float64],
) -> Window:
    """The part of the resized image that is kept."""
    height, width = len(rows), len(columns)
    if config.crop_size is None:
        return slice(0, height), slice(0, width)
    side_y, side_x = min(config.crop_size[0], height), min(config.crop_size[1], width)
    window = slice(0, side_y), slice(0, side_x)
    for top, left in corners:
        y, x = int(top * (height - side_y + 1)), int(left * (width - side_x + 1))
        window = slice(y, y + side_y), slice(x, x + side_x)
        if config.crop_max_ratio >= 1.0:
            break
        shown = _picked(mask, rows[window[0]], columns[window[1]])
        counts = np.bincount(shown.ravel(), minlength=config.ignore_index + 1)
        counts[config.ignore_index] = 0
        # A crop without any label is no better than one of a single class.
        if 0 < counts.max() <= config.crop_max_ratio * counts.sum():
            break
    return window


def _resized(image: Pixels, size: tuple[int, int], window: Window) -> Pixels:
    """The window of the image at `size`, without making the rest of it.

    It differs from a window cut out afterwards by the rounding of halves: the filter sees the
    whole image, but the box is given in single precision.
    """
    rows, columns = window
    old_height, old_width = image.shape[:2]
    if size == (old_height, old_width):
        return image[rows, columns]
    y, x = old_height / size[0], old_width / size[1]
    # min: a rounding error must not reach over the edge.
    box = (
        columns.start * x,
        rows.start * y,
        min(columns.stop * x, old_width),
        min(rows.stop * y, old_height),
    )
    shown = (columns.stop - columns.start, rows.stop - rows.start)
    whole = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(whole.resize(shown, Image.Resampling.BILINEAR, box=box))


def _pad(image: Pixels, mask: Mask, size: tuple[int, int], ignore: int) -> tuple[Pixels, Mask]:
    """Fill up at the bottom and at the right with black that is not counted."""
    y, x = size[0] - mask.shape[0], size[1] - mask.shape[1]
    if not y and not x:
        return image, mask
    if ignore > np.iinfo(mask.dtype).max:
        mask = mask.astype(np.int64)
    return (
        np.pad(image, ((0, y), (0, x), (0, 0))),
        np.pad(mask, ((0, y), (0, x)), constant_values=ignore),
    )


def distort_colours(image: Pixels, draws: NDArray[np.float64]) -> Pixels:
    """Brightness, contrast, saturation and hue, each with probability 1/2.

    Contrast comes before or after the colours at random. Each step rounds to 8 bits, so that all
    of them are look-ups in tables.
    """
    brighten, by, contrast_first, contrast, contrast_by, saturate, saturate_by, turn, turn_by = (
        draws.tolist()
    )
    levels = np.arange(256, dtype=np.float64)
    plain = levels.astype(np.uint8)
    before = after = plain
    if brighten < 0.5:
        before = _levels(levels + _between((-_BRIGHTNESS, _BRIGHTNESS), by))
    if contrast < 0.5:
        stretched = _levels(levels * _between(_CONTRAST, contrast_by))
        if contrast_first < 0.5:
            before = stretched[before]
        else:
            after = stretched
    saturations = hues = plain
    if saturate < 0.5:
        saturations = _levels(levels * _between(_SATURATION, saturate_by))
    if turn < 0.5:
        hues = plain + np.uint8(round(256 * _between((-_HUE, _HUE), turn_by)) % 256)

    if saturations is plain and hues is plain:
        return _look_up(image, after[before])
    hsv = Image.fromarray(_look_up(image, before)).convert("HSV")
    table = np.concatenate([hues, saturations, plain]).tolist()
    return _look_up(np.asarray(hsv.point(table).convert("RGB")), after)


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def _levels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _look_up(image: Pixels, table: NDArray[np.uint8]) -> Pixels:
    return np.frombuffer(image.tobytes().translate(table.tobytes()), np.uint8).reshape(image.shape)
