"""A tiny folder data set and configuration that the driver's tests share."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from heteroakd_fast.train import pipeline
from heteroakd_fast.train.checkpoint import load_checkpoint
from heteroakd_fast.train.config import Config, DistillConfig
from heteroakd_fast.train.datasets.batches import Order, TrainingSet
from heteroakd_fast.train.datasets.images import SegmentationData, Source
from heteroakd_fast.train.engine import Trainer
from heteroakd_fast.train.objectives import DistillObjective, Objective, PlainObjective

CPU = torch.device("cpu")
QUIET = Console(quiet=True)

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


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with other values; a mapping changes keys of a table."""
    tables = {
        key: getattr(config, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return config.model_copy(update=tables)


def in_order(source: Source, batch_size: int, seed: int = 0) -> TrainingSet:
    """Every image of a source, all of whose labels are seen."""
    return TrainingSet(source, Order(seed, batch_size, len(source)))


def plain(model: nn.Module, config: Config) -> PlainObjective:
    return PlainObjective(model, config.distill, 255)


def distilling(
    student: nn.Module, teacher: nn.Module, distill: DistillConfig, **options: Any
) -> DistillObjective:
    values = {"num_classes": 3, "ignore_index": 255, "taps": None, "side": (32, 32)}
    return DistillObjective(
        student, teacher, distill, **{**values, "device": CPU, "seed": 0, **options}
    )


def trainer(
    config: Config, data: SegmentationData, objective: Objective, folder: str, **options: Any
) -> Trainer:
    """Of the stage `alone`, whatever the objective."""
    values: dict[str, Any] = {
        "config": config,
        "data": data,
        "training": pipeline.training_sets(config, data)[0]["alone"],
        "folder": config.run / folder,
        "steps": config.student.steps,
        "fingerprint": pipeline.fingerprint(config, "alone"),
        "device": CPU,
        "console": QUIET,
        "side": (32, 32),
    }
    return Trainer("alone", objective, **{**values, **options})


def before_step(run: Trainer, step: int, action: Callable[[], Any]) -> None:
    """Let something happen when the step (from 1) begins."""
    original = run._step

    def stepped(micro_batches: Any) -> None:
        if run.step + 1 == step:
            action()
        original(micro_batches)

    run._step = stepped  # type: ignore[method-assign]


def after_step(run: Trainer, step: int, action: Callable[[], Any]) -> None:
    """Let something happen when the step (from 1) is done, before anything of it is saved."""
    original = run._step

    def stepped(micro_batches: Any) -> None:
        original(micro_batches)
        if run.step == step:
            action()

    run._step = stepped  # type: ignore[method-assign]


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Writes beyond the limit fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint."""
    saved = load_checkpoint(folder)
    assert saved is not None
    return int(saved["step"])


def same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def exported(run: Path, stage: str = "alone") -> dict[str, Tensor]:
    return load_file(run / stage / "model.safetensors")


def weights_of(objective: nn.Module) -> dict[str, Tensor]:
    """A copy."""
    return {name: value.clone() for name, value in objective.state_dict().items()}
