"""The comparison at the end: a page (template: page.html), a figure, results.json and a table."""

from __future__ import annotations

import json
import platform
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from importlib import resources
from typing import Any

import jinja2
import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .. import __version__
from .config import Config
from .errors import shortened
from .files import write_file
from .logs import finite, read_metrics, say
from .models import count_parameters
from .pipeline import Outcome, fingerprint
from .reading import as_toml
from .visualization import COLOURS, TITLES, Gallery, curves, encoded

Results = dict[str, Any]


def write_report(outcome: Outcome, config: Config, console: Console) -> None:
    """Write report.html, report.png and results.json into the run folder and print the summary."""
    results = summary(outcome, config)
    gallery = Gallery(config, outcome.data, outcome.device, config.report.samples)
    mious = rows(results)[-2][1]
    titles = {stage: f"{TITLES[stage]}\nmIoU {percent(miou)} %" for stage, miou in mious.items()}
    figure = encoded(gallery.figure(outcome.models, outcome.distillation, titles), "png")
    contents = {
        "report.html": render(outcome, config, results, figure).encode(),
        "report.png": figure,
        "results.json": json.dumps(results, indent=2, allow_nan=False).encode(),
    }
    for name, content in contents.items():
        write_file(config.run / name, content)
    files = ", ".join(str(config.run / name) for name in contents)
    console.print(table(results))
    for line in (*notes(results), f"Written: {files}", headline(results)):
        say(console, line)


def summary(outcome: Outcome, config: Config) -> Results:
    """The content of results.json; scores are those of the last step, not of the best one, and None
    where there are none (an absent class, labels that are all ignored)."""
    stages: dict[str, Any] = {}
    for stage, result in outcome.results.items():
        named = zip(outcome.data.class_names, result.scores.class_iou, strict=True)
        stages[stage] = {
            **asdict(result.scores),
            "class_iou": dict(named),
            "best_miou": result.best_miou,
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "parameters": count_parameters(outcome.models[stage]),
        }
    stages, device = finite(stages), outcome.device
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {
        "gain": gain({stage: scores["miou"] for stage, scores in stages.items()}),
        "stages": stages,
        "config": {k: json.loads(value) for k, value in fingerprint(config, "distilled").items()},
        "device": f"{device}{gpu}",
        "versions": {"heteroakd_fast": __version__, **versions},
    }


def gain(scores: Mapping[str, float | None]) -> float | None:
    """Of the distilled student over the student alone, if both have a score."""
    alone, distilled = scores.get("alone"), scores.get("distilled")
    return None if alone is None or distilled is None else distilled - alone


def percent(score: float | None, sign: str = "") -> str:
    """A score, or a difference of two (never minus zero) with its sign."""
    return "-" if score is None else f"{round(100 * score, 1) + 0.0:{sign}.1f}"


def rows(results: Results) -> list[tuple[str, dict[str, float | None]]]:
    """Names and each stage's score: of the classes, then mIoU and pixel accuracy."""
    stages = results["stages"]
    classes = next(iter(stages.values()))["class_iou"]
    found = [(name, {s: stages[s]["class_iou"][name] for s in stages}) for name in classes]
    for title, key in (("mIoU", "miou"), ("pixel accuracy", "pixel_accuracy")):
        found.append((title, {stage: scores[key] for stage, scores in stages.items()}))
    return found


def headline(results: Results) -> str:
    """The outcome in a line."""
    mious = {stage: percent(scores["miou"]) for stage, scores in results["stages"].items()}
    if results["gain"] is None:
        stage, miou = list(mious.items())[-1]
        return f"{TITLES[stage].capitalize()}: mIoU {miou} % (one seed)."
    # The experiment is of the embedded data.
    more = "; the experiment has ten" if results["config"]["data.kind"] == "landcover" else ""
    return (
        f"Distilled: mIoU {mious['distilled']} %, student alone {mious['alone']} %: gain "
        f"{percent(results['gain'], '+')} points (one seed{more})."
    )


def notes(results: Results) -> list[str]:
    """What keeps the scores from meaning what they seem to."""
    *classes, (_, mious), _ = rows(results)
    teacher, alone = mious.get("teacher"), mious.get("alone")
    found = []
    if teacher is not None and alone is not None and teacher < alone:
        found.append(
            f"The teacher ({percent(teacher)} %) is worse than the student alone "
            f"({percent(alone)} %), so that distillation from it cannot help; train it longer or "
            "take a larger one."
        )
    if absent := [name for name, scores in classes if None in scores.values()]:
        found.append(
            f"Never in the validation labels: {shortened(absent)}. Such classes have no score and "
            "are left out of the mean; one that is predicted all the same has 0."
        )
    return found


def table(results: Results) -> Table:
    """Scores in percent, one column per network."""
    titles = (*(TITLES[stage] for stage in results["stages"]), "gain")
    columns = [Column(title, justify="right") for title in titles]
    view = Table("class", *columns, title="Validation IoU, %")
    for name, scores in rows(results):
        shown = (*map(percent, scores.values()), percent(gain(scores), "+"))
        # Text: a name of the user's holds no markup.
        view.add_row(Text(name, overflow="fold"), *shown)
    return view


def render(outcome: Outcome, config: Config, results: Results, figure: bytes) -> str:
    """The page, which needs no other file. The template escapes all text: names of classes and the
    configuration are the user's."""
    metrics = {s: read_metrics(config.run / s / "metrics.jsonl") for s in outcome.results}
    functions = (percent, gain, rows, notes, headline, as_toml, timedelta, b64encode)
    names: dict[str, Any] = {function.__name__: function for function in functions}
    names |= {"outcome": outcome, "config": config, "results": results, "metrics": metrics}
    names |= {"titles": TITLES, "colours": COLOURS, "threads": torch.get_num_threads()}
    names |= {"figure": figure, "curves": encoded(curves(metrics), "svg")}
    text = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True, undefined=jinja2.StrictUndefined)
    return str(template.render(names))
