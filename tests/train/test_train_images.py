"""How image files are opened: the right way up, and nothing but images of the formats expected."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image
from train_helpers import in_order

import heteroakd_fast.train
from heteroakd_fast.train.config import DataConfig
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.batches import evaluation_batches, training_batches
from heteroakd_fast.train.datasets.images import FORMATS, read_image, read_mask
from heteroakd_fast.train.datasets.pairs import read_sbd_mask
from heteroakd_fast.train.datasets.published import stems_of
from heteroakd_fast.train.errors import DataError

Pixels = NDArray[np.uint8]
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "TIFF": "tif", "BMP": "bmp", "WEBP": "webp"}
#: How a camera stores a picture that is to be shown upright, by EXIF orientation.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),  # shown after a quarter turn clockwise
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: np.rot90(upright, -1),
}


def test_images_are_opened_in_one_place() -> None:
    """What is tested here of one function holds wherever an image is read."""
    folder = Path(heteroakd_fast.train.__file__).parent
    places = {
        path.name: len(found)
        for path in folder.rglob("*.py")
        if (found := re.findall(r"\bImage\.open\(", path.read_text(encoding="utf-8")))
    }
    assert places == {"images.py": 1}


def save_as_a_camera(path: Path, upright: Pixels, orientation: int, **options: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif, **options)


def blocks(height: int = 24, width: int = 40) -> Pixels:
    """Nothing of it is symmetric; smooth enough for JPEG."""
    rng = np.random.default_rng(3)
    return rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_are_turned_as_their_exif_data_say(
    tmp_path: Path, name: str, orientation: int
) -> None:
    path = tmp_path / f"image.{SUFFIXES[name]}"
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    save_as_a_camera(path, blocks(), orientation, **options.get(name, {}))
    picture = read_image(path)
    assert picture.shape == (24, 40, 3)
    np.testing.assert_allclose(picture.astype(int), blocks(), atol=6 if name == "JPEG" else 0)


def test_exif_data_that_cannot_be_read_turn_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(blocks()).save(path, exif=b"Exif\0\0nonsense", quality=100, subsampling=0)
    np.testing.assert_allclose(read_image(path).astype(int), blocks(), atol=6)


def folder_config(root: Path, **options: Any) -> DataConfig:
    values = {"kind": "folder", "root": root, "num_classes": 3, "augment": "none"}
    return DataConfig(**{**values, **options})


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Photographs of 40 x 24 pixels in all orientations, each with the mask of what it shows."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for orientation in STORED:
        options = {"quality": 100, "subsampling": 0}
        save_as_a_camera(
            tmp_path / "images" / f"p{orientation}.jpg", blocks(), orientation, **options
        )
        mask = Image.fromarray((blocks()[:, :, 0] // 86).astype(np.uint8))
        mask.save(tmp_path / "masks" / f"p{orientation}.png")
    return tmp_path


def test_photographs_are_trained_and_evaluated_upright(photographs: Path) -> None:
    """Without a crop: they are of one size, however they are stored."""
    config = folder_config(photographs)
    data = load_data(config)
    read = [
        *training_batches(in_order(data.train, 1), config, start=0, stop=len(data.train)),
        *evaluation_batches(data.val, 2, config=config),
    ]
    assert sum(len(images) for images, _ in read) == 8
    for images, target in read:
        for image, labels in zip(images, target, strict=True):
            np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), blocks(), atol=6)
            np.testing.assert_array_equal(labels, blocks()[:, :, 0] // 86)


def test_a_mask_of_the_stored_pixels_is_told_of_the_orientation(photographs: Path) -> None:
    Image.fromarray(np.zeros((40, 24), np.uint8)).save(photographs / "masks" / "p6.png")
    with pytest.raises(DataError, match=r"p6\.png: 24 x 40 .*p6\.jpg has 40 x 24 .*EXIF"):
        load_data(folder_config(photographs))


# --- other content -------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (POSTSCRIPT, "content that begins with b'%!PS-Adobe-3.0 E'"),
        (gif(), "content that begins with b'GIF87a"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "content that begins with b'\\x89PNG"),
        (b"%PDF-1.7 and so on", "content that begins with b'%PDF-1.7 and so '"),
        (b"", "an empty file"),
    ],
    ids=["PostScript", "GIF", "no PNG", "PDF", "empty"],
)
def test_other_content_is_named_and_not_decoded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path], Any],
    content: bytes,
    found: str,
) -> None:
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once
    path = tmp_path / "p3.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert not started.exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read as a")
    assert f"got {found}" in message
    assert message.endswith(", expected PNG, JPEG, TIFF, BMP, WEBP")


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Whoever waits for the other end of a FIFO is woken."""

    def wake(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, wake)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("read", [read_image, read_mask, read_sbd_mask, stems_of])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "a FIFO"), (Path.mkdir, "a directory"), (link("/dev/null"), "a device")],
    ids=["FIFO", "directory", "device"],
)
def test_only_regular_files_are_opened(
    tmp_path: Path, make: Callable[[Path], None], kind: str, read: Callable[[Path], Any]
) -> None:
    if read is read_sbd_mask:
        pytest.importorskip("scipy")
    path = tmp_path / "p3.png"
    make(path)
    with at_once(), pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: got {kind}, expected a regular file"


def saved(name: str, path: Path) -> bytes:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 40, 3), np.uint8)).save(path, name)
    return path.read_bytes()


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("limit", [959, 400], ids=["Pillow warns", "Pillow raises"])
def test_more_pixels_than_pillow_trusts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    limit: int,
    read: Callable[[Path], Any],
) -> None:
    path = tmp_path / f"p3.{SUFFIXES[name]}"
    saved(name, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"p3\..*cannot be read as .*960 pixels.* exceeds limit"):
        read(path)


def test_a_bomb_is_known_by_its_header(tmp_path: Path) -> None:
    """120 megapixels in a few bytes; nothing is decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    path = tmp_path / "p3.png"
    header = struct.pack(">IIBBBBB", 12_000, 10_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(DataError, match="120000000 pixels"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's TIFF reader
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_data_errors(tmp_path: Path, name: str) -> None:
    """Cut short they always are; with bytes changed they are, or are read."""
    path = tmp_path / "p3.png"
    good = saved(name, path)
    for length in (1, 9, 20, 60, len(good) // 4, len(good) // 2, 3 * len(good) // 4):
        path.write_bytes(good[:length])
        for read in (read_image, read_mask):
            with pytest.raises(DataError, match=r"p3\.png: (cannot be read as a|a mask as JPEG)"):
                read(path)
    random.seed(0)
    for _ in range(60):
        content = bytearray(good)
        for _ in range(3):
            content[random.randrange(min(120, len(good)))] = random.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            assert read_image(path).ndim == 3
