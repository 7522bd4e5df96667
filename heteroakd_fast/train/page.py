"""report.html: everything about a run in one file that needs nothing else (template: page.html)."""

from __future__ import annotations

import base64
import io
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from .. import __version__
from .config import Config
from .datasets.images import Pixels
from .logs import duration, read_metrics
from .looking import (
    TILE_WIDTH,
    UNLABELLED,
    Sample,
    colour_map,
    hex_colour,
    named_tiles,
    percent,
    top_of,
)
from .models import count_parameters
from .pipeline import Outcome
from .reading import as_toml

TITLES = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}
COLOURS = {"teacher": "#8a6bd6", "alone": "#8a94a3", "distilled": "#2f8fd8"}
_NO_TERMS = {"kind", "step", "lr", "seconds", "wait"}
_LONG_TABLE = 40
_AXES = "#808890"  # readable on light and on dark

Point = tuple[float, float]
Record = dict[str, Any]


def points(gain: float) -> str:
    """A difference of two scores in points of a percent; never minus zero."""
    return "-" if math.isnan(gain) else f"{round(100 * gain, 1) + 0.0:+.1f}"


def render(
    outcome: Outcome, config: Config, results: dict[str, Any], samples: Sequence[Sample]
) -> str:
    """The whole page; `results` is the content of results.json.

    Names of classes and the configuration are the user's: the template escapes all text.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points}
    text = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    metrics = {
        stage: read_metrics(config.run / stage / "metrics.jsonl") for stage in outcome.results
    }
    gain = results.get("gain")
    stage, last = list(outcome.results.items())[-1]
    headline = f"{TITLES[stage].capitalize()}: mIoU {percent(last.scores.miou)} %"
    if gain is not None:
        headline = f"Distillation changed the student's mIoU by {points(gain)} points"
    return environment.from_string(text).render(
        headline=headline,
        gain=gain,
        titles=TITLES,
        colours=COLOURS,
        results=outcome.results,
        sizes={
            name: f"{(config.teacher if name == 'teacher' else config.student).arch}, "
            f"{count_parameters(model) / 1e6:.2f} M parameters"
            for name, model in outcome.models.items()
        },
        charts=_charts(metrics),
        facts=_facts(outcome, config, metrics),
        run=_run(outcome, config),
        toml=as_toml(config),
        credit=outcome.data.credit,
        **_classes(outcome),
        **_images(outcome, samples),
    )


def _classes(outcome: Outcome) -> dict[str, Any]:
    """Rows of (name, colour, score of each stage, gain)."""
    scores = {stage: result.scores for stage, result in outcome.results.items()}
    compared = {"alone", "distilled"} <= scores.keys()

    def row(name: str, colour: str, values: dict[str, float]) -> tuple[Any, ...]:
        gain = values["distilled"] - values["alone"] if compared else None
        return name, colour, values, gain

    named = zip(outcome.data.class_names, outcome.data.palette, strict=True)
    classes = [
        row(name, hex_colour(colour), {s: one.class_iou[index] for s, one in scores.items()})
        for index, (name, colour) in enumerate(named)
    ]
    means = [
        row("mIoU", "", {s: one.miou for s, one in scores.items()}),
        row("pixel accuracy", "", {s: one.pixel_accuracy for s, one in scores.items()}),
    ]
    long = len(classes) > _LONG_TABLE
    return {"classes": classes, "means": means, "compared": compared, "long": long}


def _images(outcome: Outcome, samples: Sequence[Sample]) -> dict[str, Any]:
    top, data = top_of(samples), outcome.data
    tiles = [
        # A large image has been shrunk, a small one is shown with its pixels.
        [(name, _png(tile), tile.shape[1] < TILE_WIDTH // 2) for name, tile in row]
        for row in (named_tiles(sample, data, top) for sample in samples)
    ]
    legend = [(n, hex_colour(c)) for n, c in zip(data.class_names, data.palette, strict=True)]
    if len(legend) > _LONG_TABLE:  # the table has them all
        masks = [mask for s in samples for mask in (s.label, *s.predictions.values())]
        seen = {int(index) for mask in masks for index in np.unique(mask)}
        legend = [legend[index] for index in sorted(seen) if index < len(legend)]
    ends = {
        "reliability": ("reliability: 0 student", "1 teacher"),
        "discrepancy": ("discrepancy, KL: 0", f"{top:.2g} nats and more"),
    }
    scales = [
        (low, ",".join(hex_colour(c) for c in colour_map(name)[::25]), high)
        for name, (low, high) in ends.items()
        if getattr(samples[0], name) is not None
    ]
    return {
        "tiles": tiles,
        # Street scenes show nothing at the size of a stamp: rather scroll.
        "width": min(220, max(110, samples[0].label.shape[1] // 2)),
        "legend": legend,
        "scales": scales,
        "unlabelled": hex_colour(UNLABELLED),
    }


def _png(image: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(records: Sequence[Record], kind: str) -> dict[str, list[Point]]:
    """Numbers over steps by name; what is not a number is left out."""
    found: dict[str, list[Point]] = {}
    for record in records:
        if record.get("kind") != kind:
            continue
        for name, value in record.items():
            if name not in _NO_TERMS and _is_number(value):
                found.setdefault(name, []).append((float(record["step"]), float(value)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _charts(metrics: dict[str, list[Record]]) -> list[tuple[str, str]]:
    """Titles and sources: the scores of all stages, then the terms of each."""
    validation = {
        TITLES[stage]: [(step, 100 * value) for step, value in found]
        for stage, records in metrics.items()
        if (found := curves(records, "val").get("miou"))
    }
    colours = {TITLES[stage]: colour for stage, colour in COLOURS.items()}
    title = "validation mIoU over steps, %"
    charts = [(title, chart(title, validation, colours))]
    for stage, records in metrics.items():
        terms = curves(records, "train")
        # Without a teacher the cross entropy is the whole loss.
        shown = {n: p for n, p in terms.items() if n == "loss" or p != terms.get("loss")}
        if shown or not curves(records, "val"):
            title = f"{TITLES[stage]}: loss and its terms over steps"
            charts.append((title, chart(title, shown)))
    return charts


def chart(
    title: str, series: Mapping[str, Sequence[Point]], colours: Mapping[str, str] | None = None
) -> str:
    """Source of an image with a line for each name, and what it ends at in the legend."""
    # Late: it takes long to import.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "font.size": 9, **dict.fromkeys(coloured, _AXES)}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.6, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=10)
        for name, points in series.items():
            steps, values = zip(*points, strict=True)
            options: Any = {"label": f"{name} {values[-1]:.3g}", "color": (colours or {}).get(name)}
            if len(points) == 1:
                # A teacher that was only evaluated: something to compare the others with.
                axes.axhline(values[0], linestyle="--", **options)
            else:
                axes.plot(steps, values, marker="." if len(points) <= 40 else None, **options)
        if series:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            figure.legend(loc="outside lower center", ncols=4, frameon=False)
        else:
            axes.text(0.5, 0.5, "metrics.jsonl has nothing about it", ha="center")
        axes.grid(axis="y", alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _facts(
    outcome: Outcome, config: Config, metrics: dict[str, list[Record]]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    rows: dict[str, tuple[str, ...]] = {}
    for stage, result in outcome.results.items():
        seen = result.steps * config.optim.batch_size
        waits = [line["wait"] for line in metrics[stage] if _is_number(line.get("wait"))]
        rows[stage] = (
            str(result.steps),
            duration(result.seconds),
            f"{seen / result.seconds:.3g}" if seen and result.seconds > 0 else "-",
            f"{100 * waits[-1]:.0f} %" if waits else "-",
            # Below 0 where no evaluation had a score.
            f"{percent(result.best_miou)} %" if result.best_miou >= 0 else "-",
        )
    return ("steps", "time", "images / s", "waiting for images", "best mIoU"), rows


def _run(outcome: Outcome, config: Config) -> dict[str, str]:
    data, device = outcome.data, outcome.device
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    return {
        "data": f"{config.data.kind}: {len(data.train)} training and {len(data.val)} validation "
        f"images, classes: {data.num_classes}",
        "device": f"{name}, amp {config.amp}, CPU threads: {torch.get_num_threads()}",
        "batch": f"{config.optim.batch_size} images a step",
        "seed": str(config.seed),
        "versions": f"heteroakd_fast {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
