"""Published data sets: their folders and encodings, and what is said where something is amiss."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from layouts import mask_of, write_ade20k, write_cityscapes, write_sbd, write_sbd_pngs, write_voc
from numpy.typing import NDArray
from PIL import Image
from train_helpers import write_pictures

from heteroakd_fast.train.config import DataConfig
from heteroakd_fast.train.datasets import folders, load_data
from heteroakd_fast.train.datasets.images import SegmentationData
from heteroakd_fast.train.datasets.pairs import FileSource
from heteroakd_fast.train.datasets.published import (
    ADE20K,
    CITYSCAPES,
    CITYSCAPES_COLOURS,
    VOC,
    voc_palette,
)
from heteroakd_fast.train.errors import DataError, DependencyError


def load(kind: str, root: Path, **options: Any) -> SegmentationData:
    own: dict[str, Any] = {"num_classes": 3} if kind == "folder" else {}
    values = {"kind": kind, "root": root, "crop": 16, **own, **options}
    return load_data(DataConfig(**values))


def stems(source: object) -> list[str]:
    assert isinstance(source, FileSource)
    return [image.stem for image, _ in source.pairs]


def test_cityscapes_ids_become_train_ids(tmp_path: Path) -> None:
    data = load("cityscapes", write_cityscapes(tmp_path))
    assert (len(data.train), len(data.val), data.num_classes) == (3, 2, 19)
    # As the data set's own table has them, written out: 7 is road ... 33 is bicycle.
    published = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10}
    published |= {24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    for source in (data.train, data.val):
        for index, name in enumerate(stems(source)):
            values = mask_of(name.removesuffix("_leftImg8bit"), layouts.CITYSCAPES_IDS)
            expected = [[published.get(int(value), 255) for value in row] for row in values]
            picture, mask = source.read(index)
            np.testing.assert_array_equal(mask, expected)
            np.testing.assert_array_equal(picture, layouts.picture_of(values))


def test_cityscapes_prepared_train_ids_come_first(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path, train_ids=True)
    unprepared = "aachen_000000_000019"
    (root / f"gtFine/train/aachen/{unprepared}_gtFine_labelTrainIds.png").unlink()
    data = load("cityscapes", root)
    for index, name in enumerate(stems(data.train)):
        stem = name.removesuffix("_leftImg8bit")
        if stem != unprepared:
            expected = mask_of(f"{stem} prepared", layouts.CITYSCAPES_TRAIN_IDS)
            np.testing.assert_array_equal(data.train.read(index)[1], expected)
    # Its bottom row begins with the ids 0, 1, ...; 7 is the first that counts.
    mask = data.train.read(0)[1]
    assert mask[-1, :9].tolist() == [255] * 7 + [0, 1]


@pytest.mark.parametrize("ignore_index", [254, 400])
def test_ignored_pixels_become_the_configured_value(tmp_path: Path, ignore_index: int) -> None:
    data = load("cityscapes", write_cityscapes(tmp_path), ignore_index=ignore_index)
    assert data.train.read(0)[1][-1, 6:8].tolist() == [ignore_index, 0]
    assert data.ignore_index == ignore_index


@pytest.mark.parametrize("where", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_palette_indices(tmp_path: Path, where: str) -> None:
    write_voc(tmp_path)
    data = load("voc", tmp_path / where)
    assert stems(data.train) == list(layouts.VOC_TRAIN)
    assert stems(data.val) == list(layouts.VOC_VAL)
    assert data.num_classes == 21
    for source in (data.train, data.val):
        for index, stem in enumerate(stems(source)):
            expected = mask_of(stem, layouts.VOC_VALUES)
            np.testing.assert_array_equal(source.read(index)[1], expected)
    assert data.palette[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert data.palette[11] == (192, 128, 0)
    assert data.palette[20] == (0, 64, 128)


def check_trainaug(data: SegmentationData) -> None:
    assert stems(data.train) == list(layouts.TRAINAUG)
    assert stems(data.val) == list(layouts.VOC_VAL)
    for index, stem in enumerate(layouts.TRAINAUG):
        own = stem in layouts.VOC_TRAIN  # VOC's own masks, with their borders, go before SBD's
        expected = mask_of(stem, layouts.VOC_VALUES) if own else layouts.sbd_mask(stem)
        np.testing.assert_array_equal(data.train.read(index)[1], expected)


@pytest.mark.parametrize("line", ["{0}", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"])
def test_voc_trainaug_from_pngs(tmp_path: Path, line: str) -> None:
    folder = write_voc(tmp_path)
    write_sbd_pngs(folder)
    assert stems(load("voc", folder).train) == list(layouts.VOC_TRAIN)  # only where asked for
    aug_list = folder / "ImageSets" / "Segmentation" / "trainaug.txt"
    # A list that names a picture that is validated must not leak it into training.
    listed = (*layouts.TRAINAUG, "2007_v1")
    aug_list.write_text("\n".join(line.format(stem) for stem in listed))
    check_trainaug(load("voc", folder, voc_split="trainaug"))


@pytest.mark.parametrize("place", ["VOCdevkit/VOCaug/dataset", "benchmark_RELEASE/dataset", "mine"])
def test_voc_trainaug_from_mat_files(tmp_path: Path, place: str) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder = write_voc(tmp_path)
    sbd = write_sbd(
        tmp_path / place,
        lambda path, mask: scipy_io.savemat(path, {"GTcls": {"Segmentation": mask}}),
    )
    given = {"sbd_root": sbd} if place == "mine" else {}
    data = load("voc", folder, voc_split="trainaug", **given)
    check_trainaug(data)
    (sbd / "cls" / "2008_s1.mat").write_bytes(b"MATLAB 5.0 no more")
    with pytest.raises(DataError, match=r"2008_s1\.mat: cannot be read as a mask of SBD"):
        load("voc", folder, voc_split="trainaug", check=True, **given)


def test_mat_files_need_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_voc(tmp_path)
    write_sbd(tmp_path / "VOCdevkit/VOCaug/dataset", lambda path, _: path.touch())
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DependencyError, match="cls: holds .mat files.*pip install scipy") as caught:
        load("voc", folder, voc_split="trainaug")
    assert caught.value.exit_code == 2


def test_trainaug_without_sbd(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    expected = ".*SegmentationClassAug/.*trainaug.txt.*cls/.*data.sbd_root.*VOCaug/dataset"
    with pytest.raises(DataError, match=f"VOC2012: holds no masks of SBD; {expected}"):
        load("voc", folder, voc_split="trainaug")
    (folder / "SegmentationClassAug").mkdir()
    with pytest.raises(DataError, match=f"trainaug.txt: no such list; {expected}"):
        load("voc", folder, voc_split="trainaug")


@pytest.mark.parametrize("inside", [False, True])
def test_ade20k_zero_is_no_class(tmp_path: Path, inside: bool) -> None:
    folder = write_ade20k(tmp_path)
    data = load("ade20k", folder if inside else tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (3, 2, 150)
    for source in (data.train, data.val):
        for index, stem in enumerate(stems(source)):
            values = mask_of(stem, layouts.ADE20K_VALUES).astype(int)
            assert set(np.unique(values)) == {*range(151), 255}
            expected = np.where((values == 0) | (values == 255), 255, values - 1)
            np.testing.assert_array_equal(source.read(index)[1], expected)


def test_class_lists() -> None:
    assert (CITYSCAPES[0], CITYSCAPES[18]) == ("road", "bicycle")
    assert (VOC[0], VOC[20]) == ("background", "tvmonitor")
    some = [(0, "wall"), (44, "chest of drawers"), (75, "swivel chair"), (149, "flag")]
    assert [ADE20K[index] for index, _ in some] == [name for _, name in some]
    for names, count in ((CITYSCAPES, 19), (VOC, 21), (ADE20K, 150)):
        assert len(set(names)) == len(names) == count
    assert len(set(CITYSCAPES_COLOURS)) == 19
    assert CITYSCAPES_COLOURS[5] == (153, 153, 153)
    assert len(set(voc_palette(256))) == 256


def test_folder_can_reduce_the_zero_label(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data", count=4)
    plain = load("folder", root, num_classes=3)
    reduced = load("folder", root, num_classes=2, reduce_zero_label=True)
    for index in range(len(plain.train)):
        before = plain.train.read(index)[1].astype(int)
        expected = np.where((before == 0) | (before == 255), 255, before - 1)
        np.testing.assert_array_equal(reduced.train.read(index)[1], expected)
    with pytest.raises(DataError, match=r"expected 1 to 1, or 0 or 255 \(ignored\)"):
        load("folder", root, num_classes=1, reduce_zero_label=True)


def test_masks_of_sixteen_bits(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data", count=4)
    for path in (root / "masks").iterdir():
        wide = np.array(Image.open(path)).astype(np.uint16)
        wide[wide == 255] = 65535
        wide[0, 20] = 299
        Image.fromarray(wide).save(path)
    options = {"num_classes": 300, "ignore_index": 65535}
    mask = load("folder", root, **options).train.read(0)[1]
    assert (int(mask[0, 0]), int(mask[0, 20])) == (65535, 299)
    with pytest.raises(DataError, match=r"the value 299 \(1 pixels out of range\)"):
        load("folder", root, **{**options, "num_classes": 299})


def test_same_stem_twice(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data")
    Image.open(root / "images" / "p1.png").save(root / "images" / "p1.jpg")
    with pytest.raises(DataError, match="same stem"):
        load("folder", root)


def test_palette_masks_are_read_as_indices(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data")
    before = load("folder", root)
    expected = [before.train.read(index)[1] for index in range(len(before.train))]
    for path in (root / "masks").iterdir():
        mask = Image.open(path).convert("L")
        paletted = Image.fromarray(np.array(mask))
        paletted.putpalette([value for index in range(256) for value in (255 - index, 7, index)])
        assert paletted.mode == "P"
        paletted.save(path)
    after = load("folder", root)
    for index, mask_before in enumerate(expected):
        np.testing.assert_array_equal(after.train.read(index)[1], mask_before)


def test_split_is_disjoint_complete_and_by_seed(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data", count=10)

    def names(seed: int) -> tuple[set[str], set[str]]:
        data = load("folder", root, split_seed=seed)
        train, val = (
            {image.name for image, _ in source.pairs}  # type: ignore[attr-defined]
            for source in (data.train, data.val)
        )
        return train, val

    train, val = names(0)
    assert not train & val
    assert len(train) == 8
    assert len(val) == 2
    assert names(0) == (train, val)
    assert any(names(seed)[1] != val for seed in range(1, 5))


def test_own_split_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "train", count=3)
    write_pictures(tmp_path / "data" / "val", count=2, seed=1)
    data = load("folder", tmp_path / "data")
    assert (len(data.train), len(data.val)) == (3, 2)


# -- what is amiss ---------------------------------------------------------------------------------


def tree(kind: str, root: Path) -> Path:
    write = {"cityscapes": write_cityscapes, "voc": write_voc, "ade20k": write_ade20k}
    return write[kind](root) if kind in write else write_pictures(root / "data", count=4)


TRAIN_FILES = {
    "cityscapes": (
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
    ),
    "voc": ("JPEGImages/2007_t1.jpg", "SegmentationClass/2007_t1.png"),
    "ade20k": (
        "images/training/ADE_train_00000002.jpg",
        "annotations/training/ADE_train_00000002.png",
    ),
}
PUBLISHED = pytest.mark.parametrize("kind", list(TRAIN_FILES))
FILES = TRAIN_FILES | {"folder": ("images/p2.png", "masks/p2.png")}
ALL = pytest.mark.parametrize("kind", list(FILES))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def one_wrong_id(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[4:6, 7] = 200
    Image.fromarray(pixels).save(path)


def holding(pixels: NDArray[Any], **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(pixels).save(path, **options)


EXPECTED = {
    "cityscapes": "label ids: 0 to 33 or 255 (ignored)",
    "voc": "0 to 20 or 255 (ignored)",
    "ade20k": "1 to 150, or 0 or 255 (ignored)",
    "folder": "0 to 2 or 255 (ignored)",
}
SIZES = {"folder": (40, 40)}


@ALL
@pytest.mark.parametrize(
    ("which", "damage", "expected"),
    [
        (0, truncate, "{path}: cannot be read as an image"),
        (1, truncate, "{path}: cannot be read as a mask"),
        (1, Path.unlink, "{image}: has no mask {path}"),
        (
            1,
            holding(np.zeros((8, 9), np.uint8)),
            "{path}: 9 x 8 pixels, but its image {image} has {size[1]} x {size[0]}",
        ),
        (
            1,
            one_wrong_id,
            "{path}: has the value 200 (2 pixels out of range), expected {values}",
        ),
        (1, "negative", "{path}: has the value -1 ({count} pixels out of range)"),
        (1, "colours", "{path}: a mask of mode RGB, expected class ids in one channel"),
    ],
    ids=["image", "mask", "no mask", "size", "id", "negative", "colours"],
)
def test_a_bad_file_is_named(
    tmp_path: Path, kind: str, which: int, damage: Any, expected: str
) -> None:
    root = tree(kind, tmp_path)
    path, image = root / FILES[kind][which], root / FILES[kind][0]
    size = SIZES.get(kind, layouts.SIZE)
    if damage == "negative":
        damage = holding(np.full(size, -1, np.int32), format="TIFF")
    elif damage == "colours":
        damage = holding(np.full((*size, 3), (1, 2, 3), np.uint8))
    damage(path)
    with pytest.raises(DataError) as caught:
        load(kind, root)
    message = expected.format(
        path=path, image=image, size=size, count=size[0] * size[1], values=EXPECTED[kind]
    )
    # Of several masks that would do, Cityscapes' message names all.
    message = message.removesuffix(str(path)) if damage is Path.unlink else message
    assert str(caught.value).startswith(message)
    assert str(path) in str(caught.value)
    if damage is truncate:  # unless nothing was to be read before training
        load(kind, root, check=False)


@PUBLISHED
def test_only_a_sample_is_read_unless_asked(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_SAMPLE", 4)
    caplog.set_level(logging.INFO)
    root = tree(kind, tmp_path)
    image, mask = (root / name for name in TRAIN_FILES[kind])
    lists = root / "ImageSets" / "Segmentation"
    for index in range(5):
        # "z" comes last in every order.
        names = [
            path.with_name(path.name.replace("000000_", f"z{index}_").replace(".", f"_z{index}."))
            if kind == "voc"
            else path.with_name(path.name.replace("_0000", f"_z{index}", 1))
            for path in (image, mask)
        ]
        for old, new in zip((image, mask), names, strict=True):
            shutil.copy(old, new)
        if kind == "voc":
            with (lists / "train.txt").open("a") as file:
                file.write(f"{names[0].stem}\n")
    data = load(kind, root)
    assert (len(data.train), data.surveys) == (8, None)
    assert "a sample of the 8 images for training: 4 images, RGB" in caplog.text
    assert "in no mask" not in caplog.text
    # Evenly spread: the last is in it, the one before is not.
    before, last = (mask for _, mask in data.train.pairs[-2:])  # type: ignore[attr-defined]
    before.write_bytes(b"")
    load(kind, root)
    with pytest.raises(DataError, match=before.name):
        load(kind, root, check=True)
    last.write_bytes(b"")
    with pytest.raises(DataError, match=last.name):
        load(kind, root)


@PUBLISHED
def test_archives_may_have_folders_around(tmp_path: Path, kind: str) -> None:
    root = tree(kind, tmp_path / "x" / "archive")
    top = tmp_path / "x"
    assert len(load(kind, top).train) == 3
    if kind == "cityscapes":  # one around each of its archives
        for name in ("leftImg8bit", "gtFine"):
            (top / f"{name}_trainvaltest").mkdir()
            (root / name).rename(top / f"{name}_trainvaltest" / name)
        assert len(load(kind, top).train) == 3


def test_what_is_there_instead_is_named(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    (root / "gtFine").rename(root / "gtCoarse")
    (root / "gtFine_trainvaltest.zip").touch()
    with pytest.raises(
        DataError,
        match=r"gtFine/train: no such folder.*; \S+ holds gtCoarse, gtFine_trainvaltest.zip, "
        r"leftImg8bit \(unpack gtFine_trainvaltest.zip\)$",
    ):
        load("cityscapes", root)
    (root / "gtCoarse").rename(root / "gtFine")
    for path in root.rglob("*labelIds.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"labelIds\.png \(and 2 more\); there is aachen\S+_color"):
        load("cityscapes", root)


@pytest.mark.parametrize(
    "line", ["\ufeff{0}\r", "C:\\data\\JPEGImages\\{0}.jpg", '"{0}.jpg"', "{0}.jpg,{0}.png"]
)
def test_lists_as_people_write_them(tmp_path: Path, line: str) -> None:
    root = write_voc(tmp_path)
    path = root / "ImageSets" / "Segmentation" / "train.txt"
    lines = [line.format(stem) for stem in layouts.VOC_TRAIN]
    path.write_text("\n".join(lines[:1] + [text.lstrip("\ufeff") for text in lines[1:]]), "utf-8")
    assert stems(load("voc", root).train) == list(layouts.VOC_TRAIN)
    path.write_text("\n".join([*layouts.VOC_TRAIN, layouts.VOC_VAL[0]]))
    with pytest.raises(DataError, match=r"2007_v0\.jpg: is listed for training and for validation"):
        load("voc", root)


@PUBLISHED
def test_root_that_is_none(tmp_path: Path, kind: str) -> None:
    layout = {
        "cityscapes": "leftImg8bit/{train,val}/CITY/",
        "voc": "ImageSets/Segmentation/{train,val}.txt",
        "ade20k": "annotations/{training,validation}/",
    }[kind]
    for root in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match="no such folder") as caught:
            load(kind, root)
        assert str(root) in str(caught.value)
        assert layout in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("cityscapes", "leftImg8bit/val"),
        ("cityscapes", "gtFine/train"),
        ("voc", "JPEGImages"),
        ("voc", "SegmentationClass"),
        ("ade20k", "images/validation"),
        ("ade20k", "annotations/training"),
        ("folder", "masks"),
        ("folder", ""),
    ],
)
def test_missing_folder(tmp_path: Path, kind: str, folder: str) -> None:
    root = tree(kind, tmp_path)
    shutil.rmtree(root / folder)
    with pytest.raises(DataError) as caught:
        load(kind, root)
    assert str(caught.value).startswith(f"{root / folder}: no such folder")
    assert ("folder/masks" if folder == "masks" else "data.root") in str(caught.value).replace(
        str(root), "folder"
    )


@pytest.mark.parametrize(
    ("kind", "folder"),
    [("cityscapes", "leftImg8bit/val"), ("ade20k", "images/validation"), ("folder", "images")],
)
def test_empty_split(tmp_path: Path, kind: str, folder: str) -> None:
    root = tree(kind, tmp_path)
    shutil.rmtree(root / folder)
    (root / folder).mkdir()
    with pytest.raises(DataError, match=f"{folder}: holds no image"):
        load(kind, root)


def test_voc_lists(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    path = root / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("2007_t0\n\n2007_t9\n2007_t8\n")
    with pytest.raises(DataError, match=r"2007_t9\.jpg: no such image.*train\.txt.*1 more"):
        load("voc", root)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"train\.txt: names no image"):
        load("voc", root)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"train\.txt: cannot be read as a list"):
        load("voc", root)
    path.unlink()
    with pytest.raises(DataError, match=r"train\.txt: no such list; expected VOC 2012"):
        load("voc", root)


@pytest.mark.parametrize("kind", ["voc", "folder"])
def test_different_sizes_need_a_crop(tmp_path: Path, kind: str) -> None:
    root = tree(kind, tmp_path)
    names = [name.replace("t1", "t2") for name in FILES[kind]]
    for path in (root / name for name in names):
        Image.open(path).crop((0, 0, 20, 20)).save(path)
    load(kind, root)
    with pytest.raises(DataError, match=r"2\.(jpg|png): 20 x 20 pixels, .*data\.crop"):
        load(kind, root, crop=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "voc"}, 'data.root is required with data.kind = "voc"'),
        ({"kind": "ade20k", "root": ".", "num_classes": 150}, "num_classes is only for"),
        ({"kind": "voc", "root": ".", "class_names": ("a",)}, "class_names is only for"),
        ({"kind": "voc", "root": ".", "reduce_zero_label": True}, 'only for data.kind = "folder"'),
        ({"kind": "ade20k", "root": ".", "voc_split": "trainaug"}, 'only for data.kind = "voc"'),
        ({"kind": "voc", "root": ".", "sbd_root": "."}, 'only for data.voc_split = "trainaug"'),
        ({"kind": "cityscapes", "root": ".", "ignore_index": 18}, "18, which is also a class"),
        ({"kind": "landcover", "ignore_index": 7}, "7, which is also a class .* is 8"),
        ({"kind": "landcover", "root": "."}, 'data.root is not for data.kind = "landcover"'),
        (
            {"kind": "folder", "root": ".", "num_classes": 9, "ignore_index": 9}
            | {"reduce_zero_label": True},
            "9, which is the last class in masks",
        ),
    ],
)
def test_keys_of_another_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
