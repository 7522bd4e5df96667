"""Data as people have it: right data in customary forms are read, wrong ones refused or said."""

from __future__ import annotations

import json
import logging
import struct
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import write_ade20k, write_cityscapes, write_voc
from PIL import Image
from train_helpers import write_pictures

from heteroakd_fast.train.cli import main
from heteroakd_fast.train.config import DataConfig
from heteroakd_fast.train.datasets import load_data, survey
from heteroakd_fast.train.datasets.images import SegmentationData, Source, read_image, read_mask
from heteroakd_fast.train.datasets.landcover import Tiles
from heteroakd_fast.train.datasets.pairs import FileSource
from heteroakd_fast.train.datasets.splits import keep_split
from heteroakd_fast.train.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data", count=6)


def load(root: Path, **options: Any) -> SegmentationData:
    values = {"kind": "folder", "root": root, "num_classes": 3, "crop": 16, **options}
    return load_data(DataConfig(**values))


def names(source: Source) -> list[str]:
    assert isinstance(source, FileSource)
    return [image.name for image, _ in source.pairs]


# -- names and folders -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "masks", "val"),
    [
        ("images/train", "masks/train", "val"),
        ("train/images", "train/masks", "val"),
        ("img_dir/train", "ann_dir/train", "val"),
        ("images/training", "annotations/training", "validation"),
    ],
)
def test_layouts(root: Path, images: str, masks: str, val: str) -> None:
    moved = root.parent / "moved"
    for kind, folder in (("images", images), ("masks", masks)):
        train, held_out = moved / folder, moved / folder.replace("training", val)
        held_out = held_out if val == "validation" else moved / folder.replace("train", val)
        train.mkdir(parents=True)
        held_out.mkdir(parents=True)
        for index in range(6):
            target = train if index < 4 else held_out
            (root / kind / f"p{index}.png").rename(target / f"p{index}.png")
    data = load(moved)
    assert names(data.train) == ["p0.png", "p1.png", "p2.png", "p3.png"]
    assert names(data.val) == ["p4.png", "p5.png"]


def test_half_of_a_split_is_named(root: Path) -> None:
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir()
        for path in (root / kind).glob("*.png"):
            path.rename(root / kind / "train" / path.name)
    with pytest.raises(DataError, match="images.val: no such folder; expected .*masks.val"):
        load(root)


@pytest.mark.parametrize(
    "name",
    [
        *("{}_mask.png", "{}-mask.png", "{}_labelIds.png", "{}_gt.tif", "{}_label.bmp"),
        *("{}.tiff", "{}.PNG", "{}_mask.TIF", "{}.BMP"),
    ],
)
def test_names_of_masks(root: Path, name: str) -> None:
    before = [load(root).train.read(index)[1] for index in range(3)]
    for path in list((root / "masks").iterdir()):
        Image.open(path).save(root / "masks" / name.format(path.stem))
        path.unlink()
    for index, expected in enumerate(before):
        np.testing.assert_array_equal(load(root).train.read(index)[1], expected)


def test_endings_of_masks_that_are_not_clear(root: Path) -> None:
    masks = root / "masks"
    for path in list(masks.iterdir()):
        path.with_name(f"{path.stem}_seg.png").write_bytes(path.read_bytes())
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    load(root)
    assert str(load(root, mask_suffix="_seg").train.pairs[0][1]).endswith("_seg.png")  # type: ignore[attr-defined]
    (masks / "p0.png").write_bytes((masks / "p0_mask.png").read_bytes())
    with pytest.raises(
        DataError, match=r'p0\.png and .*p0_mask\.png; .*data\.mask_suffix = "_mask'
    ):
        load(root)
    # A name that is another image's belongs to that one.
    (root / "images" / "p0_mask.png").write_bytes((root / "images" / "p0.png").read_bytes())
    assert len(names(load(root).train) + names(load(root).val)) == 7
    (root / "images" / "p0_mask.png").unlink()
    for path in (masks / "p0.png", *masks.glob("*_mask.png")):
        path.unlink()
    with pytest.raises(DataError, match=r"no mask .* there is \S+_seg\.png: data\.mask_suffix"):
        load(root)


def test_hidden_and_other_files(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("images", "masks"):
        for name in ("._p0.png", ".hidden.png"):
            (root / folder / name).write_bytes(b"\0\5\x16\7 Mac OS X")
    for index in range(4):
        (root / "images" / f"q{index}.gif").touch()
    data = load(root)
    assert len(data.train) + len(data.val) == 6
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 1
    assert "images: 4 of 10 left out because of the suffix (q0.gif, q1.gif, q2.gif ...)" in said[0]


def moved(root: Path, change: Any) -> None:
    """Every image and mask to where `change` says, of its folder and name."""
    for kind in ("images", "masks"):
        for path in sorted((root / kind).iterdir()):
            target = root / change(kind, path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        if not any((root / kind).iterdir()):
            (root / kind).rmdir()


@pytest.mark.parametrize(
    "change",
    [
        lambda kind, name: f"{kind}/{int(name[1]) % 2}/{name}",
        lambda kind, name: f"{kind}/{name[1]}/a/image.png",
        lambda kind, name: f"{kind.title()}/{name}",
        lambda kind, name: f"{'imgs' if kind == 'images' else 'gt'}/{name}",
        lambda kind, name: f"images/{name if kind == 'images' else name[:2] + '_mask.png'}",
        lambda kind, name: name if kind == "images" else f"{name[:2]}_mask.png",
        lambda kind, name: name if kind == "images" else f"masks/{name}",
    ],
    ids=["subfolders", "same names", "capitals", "other words", "together", "flat", "root"],
)
def test_other_customary_folders(root: Path, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    def read(data: SegmentationData) -> set[tuple[bytes, bytes]]:
        pairs = [*map(data.train.read, range(len(data.train)))]
        pairs += map(data.val.read, range(len(data.val)))
        return {(image.tobytes(), mask.tobytes()) for image, mask in pairs}

    before = read(load(root))
    moved(root, change)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (next(root.rglob("*.png")).parent / name).touch()
    assert read(load(root)) == before
    assert not said(caplog, logging.WARNING)


def test_links(root: Path) -> None:
    (root / "images").rename(root.parent / "elsewhere")
    (root / "images").mkdir()
    (root / "images" / "a").symlink_to(root.parent / "elsewhere")
    (root / "images" / "a" / "loop").symlink_to(root / "images")
    moved(root, lambda kind, name: f"{kind}/{name if kind == 'images' else 'a/' + name}")
    assert len(names(load(root).train)) == 5
    (root / "images" / "a" / "p1.png").unlink()
    (root / "images" / "a" / "p1.png").symlink_to("nothing.png")
    with pytest.raises(DataError, match=r"p1\.png: cannot be read as an image: .* link to nothing"):
        load(root)


def all_masks_as(name: str) -> Any:
    def change(root: Path) -> None:
        for path in list((root / "masks").iterdir()):
            path.rename(path.with_name(name.format(path.stem)))

    return change


def nothing_but(name: str) -> Any:
    def change(root: Path) -> None:
        for path in (root / "masks").iterdir():
            path.unlink()
        (root / "masks" / name).touch()

    return change


def zipped(root: Path) -> None:
    (root / "images").rename(root.parent / "x")
    (root / "images.zip").touch()


def images_as(suffix: str) -> Any:
    def change(root: Path) -> None:
        for path in list((root / "images").iterdir()):
            path.rename(path.with_suffix(suffix))

    return change


def labelme(root: Path) -> None:
    (root / "masks").rename(root.parent / "x")
    for index in range(6):
        (root / "images" / f"p{index}.json").touch()


def one_deeper(root: Path) -> None:
    moved(root, lambda kind, name: f"deeper/{kind}/{name}")


def subfolders_of_images(root: Path) -> None:
    moved(root, lambda kind, name: f"{kind}/{'a/' * (kind == 'images')}{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (all_masks_as(f"{{}}.{suffix}"), rf"there is p0\.{suffix}, which is not read: export")
            for suffix in ("npy", "npz", "mat", "txt", "json", "xml")
        ),
        (nothing_but("coco.json"), r"masks holds coco\.json, which is not read: export"),
        (labelme, r"masks: no such folder; .*6 of 12 left out .*p0\.json"),
        (zipped, r"images: no such folder; .*holds images\.zip, masks \(unpack images\.zip\)"),
        (images_as(".gif"), r"images: 6 of 6 left out because of the suffix .*expected \.bmp"),
        (one_deeper, r"images: no such folder; .* holds deeper$"),
        (subfolders_of_images, r"a/p0\.png: has no mask .*masks/a/p0\.png"),
    ],
)
def test_what_is_no_mask_is_told_in_one_message(
    root: Path, change: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(root)
    with pytest.raises(DataError, match=message):
        load(root)
    assert not said(caplog, logging.WARNING)


def test_capitals_and_other_numbers(root: Path) -> None:
    (root / "masks" / "p0.png").rename(root / "masks" / "P0.PNG")
    with pytest.raises(DataError, match=r"p0\.png: has no mask .*; there is P0\.PNG: capitals"):
        load(root)
    (root / "masks" / "P0.PNG").rename(root / "masks" / "p00.png")
    with pytest.raises(DataError, match=r"p0\.png: has no mask (?!.*p00)"):
        load(root)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_names(root: Path, forms: tuple[str, str]) -> None:
    for folder, form in zip(("images", "masks"), forms, strict=True):
        name = unicodedata.normalize(form, "forêt.png")
        (root / folder / "p0.png").rename(root / folder / name)
    data = load(root, labelled=(unicodedata.normalize("NFC", "forêt"),), val_fraction=0.01)
    assert len(data.train) + len(data.val) == 6


# -- the split -------------------------------------------------------------------------------------


def test_files_that_come_later_move_no_other(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data", count=30, side=16)
    before = {part: set(names(getattr(load(root), part))) for part in ("train", "val")}
    assert set(names(load(root, split_seed=1).val)) != before["val"]
    for kind in ("images", "masks"):
        for index in range(20):
            (root / kind / f"new{index}.png").write_bytes((root / kind / "p1.png").read_bytes())
        (root / kind / "p0.png").unlink()
    after = load(root)
    for part in ("train", "val"):
        assert before[part] - {"p0.png"} <= set(names(getattr(after, part)))
    assert 5 <= len(after.val) <= 15


@pytest.mark.parametrize("place", [".", "splits", "ImageSets/Segmentation"])
@pytest.mark.parametrize(
    "line", ["{}", "{}.png\r", "/somewhere/else/images/{}.png", "images/{0}.png masks/{0}.png"]
)
def test_lists_split_a_folder(
    root: Path, place: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    (root / place).mkdir(parents=True, exist_ok=True)
    for index in (0, 5):
        for kind in ("images", "masks"):
            (root / kind / f"p{index}.png").rename(root / kind / f"p {index}.png")
    lists = [root / place / "train.txt", root / place / "val.txt"]
    lists[0].write_text("\n".join(line.format(name) for name in ("p 0", "p2", "p3", "p2")))
    load(root)
    assert "there is no train.txt and val.txt" in said(caplog, logging.WARNING)
    lists[1].write_text("\ufeff" + "\n".join(line.format(name) for name in ("p4", "p 5")) + "\n\n")
    (root / "masks" / "p1.png").unlink()  # in none of them
    data = load(root)
    assert names(data.train) == ["p 0.png", "p2.png", "p3.png"]
    assert names(data.val) == ["p 5.png", "p4.png"]
    lists[1].write_text("p4\np9\np8\n")
    with pytest.raises(
        DataError, match=r"val\.txt: names p9 \(and 1 more\), and .*images holds no"
    ):
        load(root)
    lists[1].write_text("p4", encoding="utf-16")
    with pytest.raises(DataError, match=r"val\.txt: cannot be read as a list of images \(UTF-8\)"):
        load(root)
    lists[1].write_text("p4\np2\n")
    with pytest.raises(DataError, match=r"p2\.png: is listed for training and for validation"):
        load(root)


def test_images_in_both_splits_are_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved(root, lambda kind, name: f"{'train' if int(name[1]) < 4 else 'val'}/{kind}/{name}")
    load(root)
    assert not said(caplog, logging.WARNING)
    for kind in ("images", "masks"):
        (root / "val" / kind / "z.png").write_bytes((root / "train" / kind / "p1.png").read_bytes())
    load(root)
    assert "1 images are both in training and in validation (z.png)" in said(
        caplog, logging.WARNING
    )


def test_the_split_is_kept_with_the_run(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "split.txt"
    keep_split(load(root), root, path)
    lines = path.read_text().splitlines()
    assert (len(lines), "train images/p0.png" in lines, len(set(lines))) == (6, True, 6)
    keep_split(load(root), root, path)
    for kind in ("images", "masks"):
        (root / kind / "p1.png").rename(root / kind / "a\nb.png")
    path.unlink()
    for _ in range(2):
        keep_split(load(root), root, path)
    assert "images/a\\nb.png\n" in path.read_text()
    for kind in ("images", "masks"):
        (root / kind / "a\nb.png").rename(root / kind / "p1.png")
    path.unlink()
    keep_split(load(root), root, path)
    assert not said(caplog, logging.WARNING)
    for kind in ("images", "masks"):
        (root / kind / "p0.png").rename(root / kind / "new.png")
    keep_split(load(root, split_seed=1), root, path)
    for text in ("2 from train to val (images/p", "1 from val to train", "1 new (images/new.png)"):
        assert text in said(caplog, logging.WARNING)
    assert "1 gone (images/p0.png)" in said(caplog, logging.WARNING)
    assert path.read_text().splitlines() == lines


# -- pixels ----------------------------------------------------------------------------------------

GREY = np.array([[0, 51], [102, 255]], np.uint8)
ALPHA = np.full((2, 2), 7, np.uint8)
RGBA = np.stack([GREY, GREY, GREY, ALPHA], 2)


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(GREY), "png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "tif"),
        (Image.fromarray(GREY.astype(np.int32) * 257), "tif"),
        (Image.fromarray((GREY / 255).astype(np.float32)), "tif"),
        (Image.fromarray(GREY.astype(np.float32)), "tif"),
        (Image.fromarray(RGBA), "png"),
        (Image.fromarray(RGBA[..., 2:], "LA"), "png"),
        (Image.fromarray(GREY).convert("P"), "png"),
        (Image.fromarray(GREY).convert("CMYK"), "tif"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_depths_and_modes_of_images(tmp_path: Path, image: Image.Image, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    np.testing.assert_array_equal(read_image(path), GREY[..., None].repeat(3, 2))


def test_bilevel_images(tmp_path: Path) -> None:
    Image.fromarray(GREY > 60).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png")[..., 1], [[0, 0], [255, 255]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            np.array([[-0.5, 1]], np.float32),
            r"values from -0\.5 to 1 \(mode F\), expected 0 to 1 or",
        ),
        (np.array([[0, 1.2]], np.float32), r"values from 0 to 1\.2 \(mode F\)"),
        (
            np.array([[0, 4095]], np.float32),
            r"values from 0 to 4095 \(mode F\).* by the same factor",
        ),
        (np.array([[0, np.nan]], np.float32), r"values from nan to nan \(mode F\)"),
        (
            np.array([[0, 70000]], np.int32),
            r"values from 0 to 70000 \(mode I\), expected 0 to 65535",
        ),
    ],
)
def test_ranges_of_images_that_are_not_clear(tmp_path: Path, values: Any, expected: str) -> None:
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(DataError, match=rf"image\.tif: {expected}"):
        read_image(tmp_path / "image.tif")


def test_tiffs_that_pillow_does_not_know(tmp_path: Path) -> None:
    tags = {256: 2, 257: 1, 258: 32, 259: 1, 262: 2, 277: 3, 278: 1, 279: 24, 339: 3}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4  # where the floats are
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "image.tif").write_bytes(head + bytes(24))
    with pytest.raises(DataError, match="a TIFF that Pillow does not know, such as several bands"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_pages(tmp_path: Path, read: Any) -> None:
    pages, path = [Image.fromarray(GREY) for _ in range(3)], tmp_path / "image.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"image\.tif: a TIFF of 3 pages, expected one"):
        read(path)
    for page in pages[1:]:  # overviews, as a GeoTIFF has them
        page.encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert read(path).shape[:2] == (2, 2)


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_frames(tmp_path: Path, read: Any, suffix: str) -> None:
    pages, path = [Image.fromarray(GREY // k) for k in (1, 2)], tmp_path / f"image.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=rf"a {suffix.upper()} of 2 frames, expected one"):
        read(path)


def repaint(root: Path, paint: Any, suffix: str = "png") -> None:
    for path in list((root / "images").iterdir()):
        values = paint(np.asarray(Image.open(path)).mean(2))
        path.unlink()
        Image.fromarray(values).save(path.with_suffix(f".{suffix}"))


def said(caplog: pytest.LogCaptureFixture, level: int) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == level)


def test_a_line_says_what_the_images_are(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    repaint(root, lambda grey: (grey * 10).astype(np.uint16))
    with caplog.at_level(logging.INFO, "heteroakd_fast.train"):
        load(root)
    assert "training: 5 images, I;16 from " in said(caplog, logging.INFO)
    assert " of 65535; 40 x 40 pixels" in said(caplog, logging.INFO)
    assert "mode I;16 never exceed " in said(caplog, logging.WARNING)


def test_floats_of_two_ranges(root: Path) -> None:
    repaint(root, lambda grey: grey.astype(np.float32), "tif")
    load(root)
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(root / "images" / "p0.tif")
    with pytest.raises(DataError, match=r"F in \[0, 1\] and others F in \[0, 255\]"):
        load(root)


# -- masks -----------------------------------------------------------------------------------------


def remask(root: Path, change: Any) -> None:
    for path in (root / "masks").iterdir():
        Image.fromarray(change(np.array(Image.open(path)))).save(path)


CODED = np.array([[128, 64, 128], [244, 35, 232], [70, 70, 70]], np.uint8)
LISTS = {
    "names first": "# ours\nroad 128 64 128\nside walk 244 35 232\nhouse 70 70 70\nvoid 0 0 0\n",
    "names last": "128 64 128\troad\n244 35 232\tside walk\n70 70 70\thouse\n0 0 0\tvoid\n",
    "comma": "name,r,g,b\nroad,128,64,128\nside walk,244,35,232\nhouse,70,70,70\nvoid,0,0,0\n",
    "BOM": "\ufeffroad 128 64 128\r\n\r\nside walk 244 35 232\r\nhouse 70 70 70\r\nvoid 0 0 0\r\n",
    "ends": 'road,128,64,128,\n"side walk",244,35,232,\nhouse,70,70,70,\nvoid,0,0,0,\n',
    "hex": "road #804080\nside walk #F423E8\nhouse: #464646\nvoid #000000\n",
    "brackets": "road: [128, 64, 128]\nside walk: (244, 35, 232)\nhouse: [70,70,70]\nvoid [0,0,0]",
    "numbers": "0\troad\t128\t64\t128\n1 side walk 244 35 232\n2 house 70 70 70\n3 void 0 0 0\n",
    "numbers first": "0 128 64 128 road\n1 244 35 232 side walk\n2 70 70 70 house\n3 0 0 0 void\n",
}


@pytest.mark.parametrize("listed", [None, *LISTS])
def test_masks_coded_by_colour(root: Path, listed: str | None) -> None:
    before = load(root)
    expected = [before.train.read(index)[1] for index in range(len(before.train))]
    remask(root, lambda m: np.where(m[..., None] < 3, CODED[m.clip(max=2)], 0).astype(np.uint8))
    with pytest.raises(DataError, match=r"p\d\.png: a mask of mode RGB, .*data\.palette"):
        load(root)
    palette: Any = (*map(tuple, CODED.tolist()), (0, 0, 0))
    if listed:
        palette = root / "classes.txt"
        palette.write_text(LISTS[listed], encoding="utf-8")
    data = load(root, palette=palette)
    for index, mask in enumerate(expected):
        np.testing.assert_array_equal(data.train.read(index)[1], mask)
    assert data.palette[1] == (244, 35, 232)
    assert data.class_names == (("road", "side walk", "house") if listed else before.class_names)
    with pytest.raises(DataError, match=r"has the colour \[0, 0, 0\] \(4 pixels\), which data"):
        load(root, palette=tuple(map(tuple, CODED.tolist())))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read as a palette"),
        ("a 1 2 3\nb 4 5\n", "has the line 'b 4 5', expected `name r g b`"),
        ("a 1 2 3\nb 4 5 6\n", "has 2 classes of different names"),
        ("a 1 2 3\nb 4 5 600\n", "a number above 255"),
    ],
)
def test_palettes_that_are_none(root: Path, text: str | None, expected: str) -> None:
    if text:
        (root / "classes.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"classes\.txt: .*{expected}"):
        load(root, palette=root / "classes.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"palette": ((0, 0, 0), (1, 1, 1))}, "data.palette has 2 colours, data.num_classes is 3"),
        ({"palette": ((0, 0, 0),) * 3}, "a colour more than once"),
        ({"palette": ((0, 0, 0), (1, 1, 1), (2, 2, 2)), "reduce_zero_label": True}, "go with"),
    ],
)
def test_palettes_that_do_not_fit(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(root, **options)


def test_binary_masks_in_black_and_white(root: Path) -> None:
    expected = load(root).train.read(0)[1] == 1
    remask(root, lambda mask: (mask == 1) * np.uint8(255))
    with pytest.raises(DataError, match=r"no other class: 0 and 255 alone.*data\.palette"):
        load(root, num_classes=2)
    mask = load(root, num_classes=2, palette=((0, 0, 0), (255, 255, 255))).train.read(0)[1]
    np.testing.assert_array_equal(mask, expected)
    remask(root, lambda mask: np.full_like(mask, 255))
    with pytest.raises(DataError, match="no pixel of a training mask has a class"):
        load(root)


@pytest.mark.parametrize(
    "form",
    [
        lambda mask: mask.astype(np.float32),
        lambda mask: mask.astype(np.int32),
        lambda mask: mask[..., None].repeat(3, 2),
        lambda mask: np.stack([mask] * 3 + [np.full_like(mask, 255)], 2),
    ],
    ids=["float", "32 bits", "RGB", "RGBA"],
)
def test_class_ids_in_other_modes(root: Path, form: Any) -> None:
    before = load(root).train.read(0)[1]
    for path in list((root / "masks").iterdir()):
        values = form(np.array(Image.open(path)))
        path.unlink()
        Image.fromarray(values).save(path.with_suffix(".tif"))
    np.testing.assert_array_equal(load(root).train.read(0)[1], before)


def test_masks_in_the_alpha_channel(root: Path) -> None:
    remask(root, lambda mask: np.stack([mask * 0] * 3 + [mask], 2))
    with pytest.raises(DataError, match=r"p0\.png: a mask of one colour, .* its alpha channel"):
        load(root)


def test_masks_that_are_to_be_turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (root / "masks").iterdir():
        Image.open(path).save(path, exif=exif)
    with pytest.raises(DataError, match=r"p0\.png: a mask with an EXIF orientation, expected none"):
        load(root)


def test_palettes_that_number_colours_by_themselves(root: Path) -> None:
    """As `convert("P")` and editors write them; grey levels and other palettes are fine."""
    colours = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        image = Image.open(path).point(lambda value: min(value, 2))
        image.putpalette([channel for colour in colours for channel in colour])
        image.save(path)
        if number == 4:
            load(root)
            colours.insert(0, colours.pop())
    with pytest.raises(
        DataError, match=r"\d\.png: the colour \[.*\] has the index \d, but \d in p\d.png.*palette"
    ):
        load(root)
    load(root, palette=tuple(colours))


def test_values_that_mean_something_else(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    remask(root, lambda mask: np.where(mask < 3, mask + 1, mask).astype(np.uint8))
    with pytest.raises(DataError, match=r"value 3 .*; data\.num_classes, data\.ignore_index and"):
        load(root)
    load(root, num_classes=4)
    assert "class 0: in no mask at all (where classes begin with 1, set" in caplog.text
    load(root, reduce_zero_label=True)
    remask(root, lambda mask: mask * 0)
    with pytest.raises(
        DataError, match="hold class 0 and no other class, so that there is nothing"
    ):
        load(root)


def test_masks_as_jpeg(root: Path) -> None:
    for path in list((root / "masks").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(DataError, match=r"p\d\.jpg: a mask as JPEG.*expected PNG; export"):
        load(root)


def test_what_is_odd_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(root)
    assert not said(caplog, logging.WARNING)

    def ignored(mask: Any) -> Any:
        mask[:5] = 255
        return mask

    remask(root, ignored)
    with caplog.at_level(logging.INFO, "heteroakd_fast.train"):
        load(root, num_classes=5)
    assert "class 3, class 4: in no mask at all" in said(caplog, logging.WARNING)
    assert "12.5% of the pixels of training masks are ignored" in said(caplog, logging.WARNING)
    assert "class 4    0.000%" in said(caplog, logging.INFO)
    Image.fromarray(np.full((40, 40), 255, np.uint8)).save(root / "masks" / "p3.png")
    assert load(root).val.name(0).endswith("p3.png")
    assert "there is nothing to score" in said(caplog, logging.WARNING)


def test_what_was_scanned_is_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETEROAKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(survey, "_MOMENT", -1.0)
    first = load(root)
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read", None)  # not a file is read
        assert load(root).surveys == first.surveys
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2  # of both splits
    assert {json.loads(file.read_text())["images"] for file in files} == {1, 5}
    for file in files:
        file.write_text("{")
    assert load(root).surveys == first.surveys
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(root / "masks" / "p0.png")
    with pytest.raises(DataError, match="value 9"):
        load(root)


def test_the_command_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["folder", "--data.root", str(root), "--data.num-classes", "3"]
    assert main(["check", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("training: 5 images, RGB from ")
    assert lines[1].startswith("validation: 1 images, RGB from ")
    assert [line.split()[0] for line in lines[2:]] == ["class"] * 4 + ["ignored"]
    palette = ["--data.palette", "0", "0", "0", "1", "1", "1", "2", "2", "2", "255", "255", "255"]
    assert main(["check", *options, *palette]) == 0
    (root / "classes.txt").write_text("a 0 0 0\nb 1 1 1\nc 2 2 2\nvoid 255 255 255\n")
    assert main(["check", *options, "--data.palette", str(root / "classes.txt")]) == 0
    assert "\nb " in capsys.readouterr().out
    (root / "masks" / "p0.png").write_bytes(b"")
    assert main(["check", *options]) == 1
    assert "p0.png: cannot be read as a mask" in capsys.readouterr().err


# -- published data sets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    [
        "images/ADE/training/urban/street",
        "ADE20K_2021_17_01/images/ADE/training/urban/street",
        "images/training/a/abbey",
        "ADE20K_2016_07_26/images/training/a/abbey",
    ],
)
def test_the_other_download_of_ade20k(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True)
    (tmp_path / inside / "ADE_train_00000001.jpg").touch()
    with pytest.raises(DataError, match=r"full ADE20K.*ADEChallengeData2016\.zip.*150 classes"):
        load_data(DataConfig(kind="ade20k", root=tmp_path))


@pytest.mark.parametrize(
    ("kind", "write"),
    [("cityscapes", write_cityscapes), ("voc", write_voc), ("ade20k", write_ade20k)],
)
def test_published_data_from_a_mac(
    tmp_path: Path, kind: Any, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path)
    for path in [path for path in folder.rglob("*.*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7 Mac OS X")
    with caplog.at_level(logging.INFO, "heteroakd_fast.train"):
        data = load_data(DataConfig(kind=kind, root=folder))
    assert (len(data.train), len(data.val)) == (3, 2)
    assert "training: 3 images, RGB from 0 to " in said(caplog, logging.INFO)


def test_tiles_are_described_too() -> None:
    tiles = Tiles(np.zeros((2, 8, 8, 3), np.uint8), np.ones((2, 8, 8), np.uint8), 255)
    data = SegmentationData(tiles, tiles, ("a", "b"), ((0, 0, 0),) * 2, 255)
    lines = survey.describe(data).splitlines()
    assert lines[0] == "training: 2 images, 8 x 8 pixels"
    assert lines[-2].split() == ["b", "100.000%", "100.000%"]
