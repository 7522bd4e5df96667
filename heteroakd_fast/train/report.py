"""The comparison at the end: a page, a figure, results.json and a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from .config import Config
from .datasets.batches import Normalizer
from .engine import autocast, predict
from .errors import TrainingError
from .files import write_atomically
from .logs import finite, say
from .looking import (
    COLOUR_MAPS,
    UNLABELLED,
    Sample,
    choose_samples,
    colours,
    hex_colour,
    look,
    percent,
    top_of,
)
from .models import count_parameters
from .page import TITLES, points, render
from .pipeline import Outcome, fingerprint

_LEGEND_LIMIT = 25  # more names than this fit nowhere


def write_report(outcome: Outcome, config: Config, console: Console) -> None:
    """Write report.html, report.png and results.json into the run folder and print the table."""
    results = summary(outcome, config)
    folder = config.run
    try:
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / "results.json", (text.encode(),))
        samples = collect(outcome, config)
        draw(outcome, samples, folder / "report.png", config.report.dpi)
        write_atomically(
            folder / "report.html", (render(outcome, config, results, samples).encode(),)
        )
    except OSError as error:
        raise TrainingError(f"{folder}: the report cannot be written: {error}") from error
    console.print(table(outcome))
    if results.get("gain") is not None:
        gain = points(results["gain"])
        say(console, f"Distillation changed the student's mIoU by {gain} points (one seed).")
    written = (str(folder / name) for name in ("report.html", "report.png", "results.json"))
    say(console, f"Written: {', '.join(written)}")


def summary(outcome: Outcome, config: Config) -> dict[str, Any]:
    """The content of results.json; scores are those of the last step, not of the best one."""
    stages: dict[str, Any] = {}
    for stage, result in outcome.results.items():
        named = zip(outcome.data.class_names, result.scores.class_iou, strict=True)
        stages[stage] = {
            "miou": result.scores.miou,
            "pixel_accuracy": result.scores.pixel_accuracy,
            "class_iou": dict(named),
            "best_miou": result.best_miou,
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "parameters": count_parameters(outcome.models[stage]),
        }
    gain = {}
    if {"alone", "distilled"} <= stages.keys():
        gain = {"gain": stages["distilled"]["miou"] - stages["alone"]["miou"]}
    results = gain | {
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
    # NaN (an absent class, or labels that are all ignored) is no JSON.
    return {key: finite(value) for key, value in results.items()}


def table(outcome: Outcome) -> Table:
    """Scores in percent, one column per network."""
    view = Table(title="Validation IoU, %")
    view.add_column("class")
    for stage in outcome.results:
        view.add_column(TITLES[stage], justify="right")
    scores = [result.scores for result in outcome.results.values()]
    for index, name in enumerate(outcome.data.class_names):
        view.add_row(Text(name), *(percent(score.class_iou[index]) for score in scores))
    view.add_section()
    view.add_row("mIoU", *(percent(score.miou) for score in scores), style="bold")
    view.add_row("pixel accuracy", *(percent(score.pixel_accuracy) for score in scores))
    return view


@torch.no_grad()
def collect(outcome: Outcome, config: Config) -> list[Sample]:
    """Predictions of the three networks and the loss's own maps."""
    normalize = Normalizer(config.data, outcome.device)
    for model in outcome.models.values():
        model.eval()
    # Not compiled, as in evaluations: images of many shapes.
    with autocast(outcome.device, config.amp), torch.compiler.set_stance("force_eager"):
        return [
            look(
                index,
                outcome.models,
                outcome.distillation,
                config=config,
                data=outcome.data,
                normalize=normalize,
                predict=predict,
            )
            for index in choose_samples(outcome.data.val, outcome.data, config.report.samples)
        ]


def draw(outcome: Outcome, samples: Sequence[Sample], path: Path, dpi: int) -> None:
    """One row per sample: image, label, three predictions, two maps."""
    # Late and without a display: it takes long to import, and servers have no screen.
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    data = outcome.data
    titles = ["image", "label"]
    titles += [
        f"{TITLES[stage]}\nmIoU {100 * outcome.results[stage].scores.miou:.1f} %"
        for stage in outcome.results
    ]
    map_titles = {
        "reliability": "reliability\nof the teacher",
        "discrepancy": "discrepancy\nteacher / student",
    }
    maps = [name for name in map_titles if getattr(samples[0], name) is not None]
    titles += [map_titles[name] for name in maps]
    rows, columns = len(samples), len(titles)
    height, width = samples[0].label.shape
    cell = 1.9
    row_height, foot = cell * height / width, 0.8
    figure = Figure(
        figsize=(cell * columns, row_height * rows + foot + 0.6), dpi=dpi, layout="constrained"
    )
    FigureCanvasAgg(figure)
    # The legend and the colour bars have a row of their own, so that all images keep one size.
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[row_height] * rows + [foot])
    axes = [[figure.add_subplot(grid[r, c]) for c in range(columns)] for r in range(rows)]
    looks = {
        "reliability": (1.0, "0 student, 1 teacher", "neither"),
        "discrepancy": (top_of(samples), "KL, nats", "max"),
    }
    bars: list[tuple[int, Any, str, str]] = []
    for row, sample in zip(axes, samples, strict=True):
        row[0].imshow(sample.image)
        row[1].imshow(colours(sample.label, data))
        for axis, prediction in zip(row[2:], sample.predictions.values(), strict=False):
            axis.imshow(colours(prediction, data), interpolation="nearest")
        bars = []
        for column, name in enumerate(maps, columns - len(maps)):
            end, label, extend = looks[name]
            image = row[column].imshow(
                getattr(sample, name), vmin=0.0, vmax=end, cmap=COLOUR_MAPS[name]
            )
            bars.append((column, image, label, extend))
        for axis in row:
            axis.set(xticks=[], yticks=[], facecolor=hex_colour(UNLABELLED))
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
        # A dollar sign would begin a formula.
        Patch(facecolor=hex_colour(colour), edgecolor="0.4", label=name.replace("$", r"\$"))
        for name, colour in zip(data.class_names, data.palette, strict=True)
    ]
    patches.append(Patch(facecolor=hex_colour(UNLABELLED), edgecolor="0.4", label="not counted"))
    foot_axis = figure.add_subplot(grid[rows, : columns - len(bars)])
    foot_axis.axis("off")
    shown = patches[:_LEGEND_LIMIT]
    foot_axis.legend(handles=shown, loc="upper left", ncols=5, fontsize=8, frameon=False)
    if data.credit:
        foot_axis.text(0.0, 0.22, data.credit, fontsize=6, color="0.35", va="bottom")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, (buffer.getbuffer(),))
