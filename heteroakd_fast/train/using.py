"""A trained student on images: `load_student`, and the command `heteroakd-train predict`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import STAGES, Config, Stage
from .datasets.augment import fit_image
from .datasets.batches import Normalizer, image_tensor
from .datasets.images import Mask, Palette, Pixels, read_image
from .datasets.pairs import IMAGE_SUFFIXES, holds
from .engine import choose_device
from .errors import DataError, ModelError, StoppedError
from .files import write_file
from .logs import say
from .models import build_model
from .reading import parse_config
from .scoring import predict
from .weights import load_weights


@dataclass(frozen=True)
class Student:
    """A trained network, and what its use needs."""

    model: nn.Module
    """In eval mode, on its device."""
    path: Path
    """The weights file."""
    stage: str
    class_names: tuple[str, ...]
    palette: Palette
    """RGB of each class, 0 to 255."""
    config: Config
    """Of the run; `config.data_of(stage)` has mean, std and resize."""
    device: torch.device

    def inputs(self, image: Pixels) -> Tensor:
        """What the network takes, [1, 3, h, w]: `image`, uint8 RGB [H, W, 3], after `data.resize`
        and normalization."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                f"image: got {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3], RGB"
            )
        data = self.config.data_of(self.stage)
        return Normalizer(data, self.device)(image_tensor(fit_image(image, data))[None])

    def predict(self, image: Path | str | Pixels) -> Mask:
        """Class ids [H, W] of an image, a file or an array as in `inputs`, at its own size."""
        pixels = read_image(image) if isinstance(image, Path | str) else image
        inputs = self.inputs(pixels)
        found = predict(self.model, inputs, pixels.shape[:2], self.config.data)
        mask: Mask = found[0].cpu().numpy()
        return mask

    def draw(self, image: Pixels, mask: Mask) -> tuple[Image.Image, Image.Image]:
        """The mask with the palette, or in 16-bit grey above 256 classes; and over the image."""
        colours = np.array(self.palette, np.uint8)
        overlay = Image.blend(Image.fromarray(image), Image.fromarray(colours[mask]), 0.5)
        if len(colours) > 256:
            return Image.fromarray(mask.astype(np.uint16)), overlay
        drawn = Image.fromarray(mask)
        drawn.putpalette(colours.tobytes())
        return drawn, overlay


def load_student(
    run: str | Path, stage: Stage | None = None, device: str | torch.device = "cpu"
) -> Student:
    """Load what a run trained.

    The configuration in the file is trusted: `arch = "module:callable"` runs code.

    Args:
        run: the folder of a run, or a weights file that a run wrote.
        stage: distilled, alone or teacher; None: the first of these that is there.
        device: auto, cpu, cuda, cuda:1, mps ...

    Raises:
        UserError: there is no such run or stage, or the file cannot be used.
    """
    path = _weights_file(Path(run), stage)
    metadata = _metadata(path)
    if stage not in (None, metadata["stage"]):
        raise ModelError(f"{path}: got the stage {metadata['stage']}, expected {stage}")
    config = parse_config(metadata["config"], f"{path}, config")
    network = config.network(metadata["stage"])
    # The file has all weights: those that training began with need not be here, unless they are a
    # folder that transformers reads the architecture from.
    begun = network.weights if network.weights and network.weights.is_dir() else None
    names = tuple(json.loads(metadata["class_names"]))
    model = build_model(
        network.model_copy(update={"weights": begun, "init": None}), len(names), config.seed
    )
    load_weights(model, path)
    on = choose_device(str(device))
    palette = tuple((red, green, blue) for red, green, blue in json.loads(metadata["palette"]))
    return Student(model.to(on).eval(), path, metadata["stage"], names, palette, config, on)


def _weights_file(run: Path, stage: str | None) -> Path:
    if run.is_file():
        return run
    if not run.is_dir():
        raise ModelError(
            f"{run}: no such run; expected the folder of a run, or a weights file that one wrote"
        )
    stages = (stage,) if stage else STAGES[::-1]
    # Of a stage that is not finished there is the best so far, once it has been evaluated.
    names = [f"{one}/{kind}.safetensors" for one in stages for kind in ("model", "best")]
    found = next((run / name for name in names if (run / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"{run}: nothing trained in it yet; expected {' or '.join(names)}, which the first "
            "evaluation of a stage writes"
        )
    return found


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as weights: {error}") from None
    needed = ("stage", "config", "class_names", "palette")
    if lacking := [key for key in needed if key not in metadata]:
        raise ModelError(
            f"{path}: its metadata lacks {', '.join(lacking)}; expected a file that this version "
            "wrote: train again in a new --run folder"
        )
    return metadata


@dataclass(frozen=True)
class _Options:
    """Write the mask that a trained student predicts of each image, and an overlay beside it."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or a weights file that one wrote. Its configuration may run code."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")]
    """Image files, or folders of them."""
    output: Path
    """Folder for NAME.png and NAME-overlay.png."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps ..."""
    stage: Stage | None = None
    """What to use; none: distilled, else alone, else teacher."""


def main(argv: list[str], console: Console) -> None:
    """`heteroakd-train predict`."""
    options = tyro.cli(_Options, prog="heteroakd-train predict", args=argv)
    targets = _targets(options.images, options.output)
    student = load_student(options.run, options.stage, options.device)
    try:
        for path, files in targets.items():
            image = read_image(path)
            for file, drawn in zip(files, student.draw(image, student.predict(image)), strict=True):
                buffer = io.BytesIO()
                drawn.save(buffer, format="PNG")
                write_file(file, buffer.getvalue())
    except KeyboardInterrupt:
        raise StoppedError("interrupted; the files written so far are complete") from None
    say(console, f"{options.output}: masks and overlays of {len(targets)} images, {student.path}")


def _targets(given: Iterable[Path], output: Path) -> dict[Path, list[Path]]:
    """The mask and the overlay of each image; none is an image, or that of another."""
    images: dict[Path, list[Path]] = {}
    for path in given:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if path.is_dir():
            files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
            files = [file for file in files if not file.name.startswith(".")]
        if not files:
            raise DataError(
                f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}){holds(path)}"
            )
        for file in files:
            images[file] = [output / f"{file.stem}{end}.png" for end in ("", "-overlay")]
    if not images:
        raise DataError("IMAGE: got none, expected image files or folders of them")
    taken = {path.resolve(): path for path in images}
    for path, targets in images.items():
        for target in targets:
            if other := taken.get(target.resolve()):
                raise DataError(
                    f"{path}: its {target} is taken by {other}; expected images whose names differ "
                    "before the ending, and another --output folder than theirs"
                )
            taken[target.resolve()] = path
    return images
