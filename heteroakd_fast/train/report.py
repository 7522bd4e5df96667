"""The comparison at the end: a picture, results.json and a table."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from .. import __version__
from .config import Config
from .data import Mask, Normalizer, Picture, SegmentationData, Source, to_tensors
from .engine import autocast, predict
from .errors import TrainingError
from .files import write_atomically
from .models import count_parameters
from .pipeline import Outcome, fingerprint

TITLES = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}
_LOOKED_AT = 200  # a large validation set is not read through for a handful of pictures
_UNLABELLED = (128, 128, 128)
_LEGEND_LIMIT = 25  # more names than this fit nowhere


@dataclass(frozen=True)
class Sample:
    """One row of the picture."""

    picture: Picture
    label: Mask
    predictions: dict[str, NDArray[np.int64]]
    reliability: NDArray[np.float32]
    discrepancy: NDArray[np.float32]


def write_report(outcome: Outcome, config: Config, console: Console) -> None:
    """Write report.png and results.json into the run folder and print the table."""
    results = summary(outcome, config)
    folder = config.run
    try:
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / "results.json", (text.encode(),))
        draw(outcome, collect(outcome, config), folder / "report.png", config.report.dpi)
    except OSError as error:
        raise TrainingError(f"{folder}: the report cannot be written: {error}") from error
    console.print(table(outcome))
    if "gain" in results:
        console.print(
            f"Distillation changed the student's mIoU by {100 * results['gain']:+.1f} points "
            "(one seed).",
            highlight=False,
        )
    console.print(
        f"Written: {folder / 'report.png'}, {folder / 'results.json'}",
        highlight=False,
        soft_wrap=True,
    )


def summary(outcome: Outcome, config: Config) -> dict[str, Any]:
    """The content of results.json; scores are those of the last step, not of the best one."""
    stages: dict[str, Any] = {}
    for stage, result in outcome.results.items():
        named = zip(outcome.data.class_names, result.scores.class_iou, strict=True)
        stages[stage] = {
            "miou": result.scores.miou,
            "pixel_accuracy": result.scores.pixel_accuracy,
            "class_iou": {name: None if math.isnan(iou) else iou for name, iou in named},
            "best_miou": result.best_miou,
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "parameters": count_parameters(outcome.models[stage]),
        }
    gain = {}
    if {"alone", "distilled"} <= stages.keys():
        gain = {"gain": stages["distilled"]["miou"] - stages["alone"]["miou"]}
    return gain | {
        "stages": stages,
        "config": {
            key: json.loads(value) for key, value in fingerprint(config, "distilled").items()
        },
        "device": str(outcome.device),
        "versions": {
            "heteroakd_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def table(outcome: Outcome) -> Table:
    """Scores in percent, one column per network."""
    view = Table(title="Validation IoU, %")
    view.add_column("class")
    for stage in outcome.results:
        view.add_column(TITLES[stage], justify="right")
    scores = [result.scores for result in outcome.results.values()]
    for index, name in enumerate(outcome.data.class_names):
        view.add_row(name, *(_percent(score.class_iou[index]) for score in scores))
    view.add_section()
    view.add_row("mIoU", *(_percent(score.miou) for score in scores), style="bold")
    view.add_row("pixel accuracy", *(_percent(score.pixel_accuracy) for score in scores))
    return view


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def choose_samples(source: Source, data: SegmentationData, count: int) -> list[int]:
    """Validation pictures with many classes in them: those show most."""
    variety = []
    for index in range(min(len(source), _LOOKED_AT)):
        mask = source.read(index)[1]
        shares = (
            np.bincount(mask[mask != data.ignore_index], minlength=data.num_classes) / mask.size
        )
        variety.append((-int((shares > 0.02).sum()), index))
    return sorted(index for _, index in sorted(variety)[:count])


@torch.no_grad()
def collect(outcome: Outcome, config: Config) -> list[Sample]:
    """Predictions of the three networks and the loss's own maps."""
    normalize = Normalizer(config.data, outcome.device)
    for model in outcome.models.values():
        model.eval()
    samples = []
    for index in choose_samples(outcome.data.val, outcome.data, config.report.samples):
        picture, label = outcome.data.val.read(index)
        image, target = to_tensors(picture, label)
        images = normalize(image[None])
        with autocast(outcome.device, config.amp):
            predictions = {
                stage: predict(model, images, (label.shape[0], label.shape[1]))[0].cpu().numpy()
                for stage, model in outcome.models.items()
            }
            maps = {}
            if outcome.distillation is not None:
                maps = outcome.distillation.maps(images, target[None].to(outcome.device))
        shown = {}
        for name in ("reliability", "discrepancy"):
            values = maps[name][0].float().cpu().numpy() if name in maps else np.float32(np.nan)
            shown[name] = np.where(label == outcome.data.ignore_index, np.float32(np.nan), values)
        samples.append(Sample(picture, label, predictions, **shown))
    return samples


def draw(outcome: Outcome, samples: Sequence[Sample], path: Path, dpi: int) -> None:
    """One row per sample: picture, label, three predictions, two maps."""
    # Late and without a display: it takes long to import, and servers have no screen.
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    data = outcome.data
    titles = ["picture", "label"]
    titles += [
        f"{TITLES[stage]}\nmIoU {100 * outcome.results[stage].scores.miou:.1f} %"
        for stage in outcome.results
    ]
    if outcome.distillation is not None:
        titles += ["reliability\nof the teacher", "discrepancy\nteacher / student"]
    rows, columns = len(samples), len(titles)
    height, width = samples[0].label.shape
    cell = 1.9
    row_height, foot = cell * height / width, 0.8
    figure = Figure(
        figsize=(cell * columns, row_height * rows + foot + 0.6), dpi=dpi, layout="constrained"
    )
    FigureCanvasAgg(figure)
    # The legend and the colour bars have a row of their own, so that all pictures keep one size.
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[row_height] * rows + [foot])
    axes = [[figure.add_subplot(grid[r, c]) for c in range(columns)] for r in range(rows)]
    known = np.concatenate([s.discrepancy[np.isfinite(s.discrepancy)] for s in samples])
    # The very highest values are a few pixels at borders, which would leave the rest dark.
    top = float(np.quantile(known, 0.98)) if known.size else 1.0
    bars: list[tuple[int, Any, str, str]] = []
    for row, sample in zip(axes, samples, strict=True):
        row[0].imshow(sample.picture)
        row[1].imshow(colours(sample.label, data))
        for axis, prediction in zip(row[2:], sample.predictions.values(), strict=False):
            axis.imshow(colours(prediction, data), interpolation="nearest")
        if outcome.distillation is not None:
            reliability = row[-2].imshow(sample.reliability, vmin=0.0, vmax=1.0, cmap="RdYlBu")
            discrepancy = row[-1].imshow(
                sample.discrepancy, vmin=0.0, vmax=max(top, 1e-6), cmap="magma"
            )
            bars = [
                (columns - 2, reliability, "0 student, 1 teacher", "neither"),
                (columns - 1, discrepancy, "KL, nats", "max"),
            ]
        for axis in row:
            axis.set(xticks=[], yticks=[], facecolor=_hex(_UNLABELLED))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for column, image, label, extend in bars:
        place = figure.add_subplot(grid[rows, column])
        place.axis("off")
        bar = figure.colorbar(
            image,
            cax=place.inset_axes((0.02, 0.8, 0.96, 0.14)),
            orientation="horizontal",
            extend=extend,
        )
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    patches = [
        Patch(facecolor=_hex(colour), edgecolor="0.4", label=name)
        for name, colour in zip(data.class_names, data.palette, strict=True)
    ]
    patches.append(Patch(facecolor=_hex(_UNLABELLED), edgecolor="0.4", label="not counted"))
    foot_axis = figure.add_subplot(grid[rows, : columns - len(bars)])
    foot_axis.axis("off")
    shown = patches[:_LEGEND_LIMIT]
    foot_axis.legend(handles=shown, loc="upper left", ncols=5, fontsize=8, frameon=False)
    if data.credit:
        foot_axis.text(0.0, 0.22, data.credit, fontsize=6, color="0.35", va="bottom")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, (buffer.getbuffer(),))


def colours(mask: Mask, data: SegmentationData) -> NDArray[np.uint8]:
    """Class ids as colours; what is not counted is grey."""
    picture = np.full((*mask.shape, 3), _UNLABELLED, np.uint8)
    for index, colour in enumerate(data.palette):
        picture[mask == index] = colour
    return picture


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
