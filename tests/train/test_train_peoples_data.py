"""Data as people have it: right data in customary forms are read, wrong ones refused or said."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from train_helpers import write_pictures

from heteroakd_fast.train.config import DataConfig
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.folders import FileSource
from heteroakd_fast.train.datasets.images import SegmentationData, Source
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
    ["{}_mask.png", "{}-mask.png", "{}_labelIds.png", "{}_gt.tif", "{}_label.bmp", "{}.tiff"]
    + ["{}.PNG", "{}_mask.TIF", "{}.BMP"],
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
