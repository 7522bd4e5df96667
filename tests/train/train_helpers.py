"""A tiny folder data set and configuration that the driver's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)

CONFIG = """
run = "{run}"
seed = 1
threads = 1

[data]
kind = "folder"
root = "{root}"
num_classes = 3
crop = 32

[teacher]
arch = "unet"
steps = {steps}
tap = "decoder.1"
[teacher.kwargs]
width = 8
levels = 3

[student]
arch = "unet"
steps = {steps}
tap = "decoder.1"
[student.kwargs]
width = 6
levels = 3

[optim]
lr = 3e-3
batch_size = 2
warmup_steps = 2

[log]
every = 3
eval_every = 8
checkpoint_every = 4
tensorboard = false

[report]
samples = 2
dpi = 50
"""


def write_pictures(root: Path, count: int = 10, side: int = 40, seed: int = 0) -> Path:
    """Pictures of coloured stripes: their masks can be learned in a few steps."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for index in range(count):
        mask = np.sort(rng.integers(0, 3, size=(side, 1)), axis=0).repeat(side, 1).astype(np.uint8)
        mask[:2, :2] = 255
        noise = rng.integers(-30, 30, size=(side, side, 3))
        colour = COLOURS[np.minimum(mask, 2)].astype(int)
        picture = np.clip(colour + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(root / "images" / f"p{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"p{index}.png")
    return root


def write_config(folder: Path, steps: int = 10, run: str = "run") -> Path:
    root = folder / "pictures"
    if not root.exists():
        write_pictures(root)
    path = folder / f"{run}.toml"
    text = CONFIG.format(run=(folder / run).as_posix(), root=root.as_posix(), steps=steps)
    path.write_text(text, encoding="utf-8")
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "heteroakd_fast.train", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The subprocess imports the package that the tests import."""
    package = Path(__import__("heteroakd_fast").__file__).parent.parent
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}


def run_command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
        **options,
    )
