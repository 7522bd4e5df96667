"""report.html: everything about a run in one file that needs nothing else.

Names of classes, stages' terms and the configuration are the user's: all text goes through
`escape`.
"""

from __future__ import annotations

import base64
import io
import math
import platform
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import __version__
from .config import Config
from .data import Picture, SegmentationData
from .logs import duration, read_metrics
from .looking import (
    DISCREPANCY_COLOURS,
    RELIABILITY_COLOURS,
    TILE_WIDTH,
    UNLABELLED,
    Sample,
    hex_colour,
    named_tiles,
    percent,
    top_of,
)
from .models import count_parameters
from .pipeline import Outcome
from .reading import as_toml

TITLES = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}
_NO_TERMS = {"kind", "step", "lr", "seconds", "wait"}
_MOST_POINTS = 400  # more than a chart has pixels for
_LONG_TABLE = 40
_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 30

Point = tuple[float, float]
Record = dict[str, Any]


def points(gain: float) -> str:
    """A difference of two scores in points of a percent; never minus zero."""
    return f"{round(100 * gain, 1) + 0.0:+.1f}"


def render(
    outcome: Outcome, config: Config, results: dict[str, Any], samples: Sequence[Sample]
) -> str:
    """The whole page; `results` is the content of results.json."""
    metrics = {
        stage: read_metrics(config.run / stage / "metrics.jsonl") for stage in results["stages"]
    }
    headline, caveat = _headline(results)
    body = [
        f"<h1>{escape(headline)}</h1>",
        f"<p>{escape(caveat)}</p>",
        _cards(outcome, config, results),
        f"<h2>IoU of each class</h2>{_classes(outcome)}",
        f"<h2>Validation pictures</h2>{_pictures(outcome, samples)}",
        f"<h2>Training</h2>{_charts(metrics)}",
        f"<h2>Run</h2>{_facts(outcome, config, metrics)}",
        "<details><summary>Configuration in full</summary>"
        f"<pre>{_toml(as_toml(config))}</pre></details>",
    ]
    if outcome.data.credit:
        body.append(f'<p class="muted">{escape(outcome.data.credit)}</p>')
    return _PAGE.format(title=escape(headline), style=_STYLE, body="\n".join(body))


# -- outcome -----------------------------------------------------------------------------------


def _headline(results: dict[str, Any]) -> tuple[str, str]:
    caveat = "One seed: another one gives other numbers. Scores are those of the last step."
    gain = results.get("gain")
    if gain is not None:
        return f"Distillation changed the student's mIoU by {points(gain)} points", caveat
    stage = list(results["stages"])[-1]
    return f"{TITLES[stage].capitalize()}: mIoU {_score(results['stages'][stage]['miou'])}", caveat


def _cards(outcome: Outcome, config: Config, results: dict[str, Any]) -> str:
    cards = []
    for stage, result in outcome.results.items():
        model = config.teacher if stage == "teacher" else config.student
        size = f"{model.arch}, {count_parameters(outcome.models[stage]) / 1e6:.2f} M parameters"
        accuracy = f"pixel accuracy {_score(result.scores.pixel_accuracy)}"
        lines = (size, accuracy)
        cards.append(_card(TITLES[stage], _score(result.scores.miou), lines, stage))
    gain = results.get("gain")
    if gain is not None:
        lines = ("points, distilled against alone", "one seed")
        cards.append(_card("gain", points(gain), lines, "better" if gain > 0 else "worse"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(title: str, value: str, lines: Iterable[str], colour: str) -> str:
    below = "".join(f"<div class='muted'>{escape(line)}</div>" for line in lines)
    return (
        f'<div class="card" style="--c:var(--{colour})"><div>{escape(title)}</div>'
        f'<div class="value">{escape(value)}</div>{below}</div>'
    )


def _score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


# -- classes -----------------------------------------------------------------------------------


def _classes(outcome: Outcome) -> str:
    """One row per class; the bars begin at 0 and end at 100 %."""
    stages = list(outcome.results)
    compared = {"alone", "distilled"} <= set(stages)
    heads = "".join(f'<th class="number">{escape(TITLES[stage])}, %</th>' for stage in stages)
    heads += '<th class="number gain">gain</th>' if compared else ""
    rows = []
    scores = {stage: result.scores for stage, result in outcome.results.items()}
    named = zip(outcome.data.class_names, outcome.data.palette, strict=True)
    for index, (name, colour) in enumerate(named):
        row = {stage: scores[stage].class_iou[index] for stage in stages}
        rows.append(_row(f"{_chip(hex_colour(colour))}{escape(name)}", row, compared))
    mean = _row("mIoU", {stage: scores[stage].miou for stage in stages}, compared)
    accuracy = _row(
        "pixel accuracy", {stage: scores[stage].pixel_accuracy for stage in stages}, compared
    )
    long = " long" if len(rows) > _LONG_TABLE else ""
    return (
        f'<div class="scroll{long}"><table class="classes"><thead><tr><th>class</th>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody><tfoot>{mean}{accuracy}</tfoot></table></div>"
    )


def _row(head: str, values: dict[str, float], compared: bool) -> str:
    """`head` is HTML."""
    cells = [f"<td>{head}</td>"]
    for stage, value in values.items():
        share = 0.0 if math.isnan(value) else 100 * value
        cells.append(
            f'<td class="bar" style="--c:var(--{stage});--v:{share:.1f}%">{percent(value)}</td>'
        )
    if compared:
        gain = 100 * (values["distilled"] - values["alone"])
        kind = "better" if gain >= 0.05 else "worse" if gain <= -0.05 else "muted"
        text = "-" if math.isnan(gain) else f"{gain:+.1f}"
        cells.append(f'<td class="number {kind}">{text}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _chip(colour: str) -> str:
    return f'<span class="chip" style="background:{colour}"></span>'


# -- pictures ----------------------------------------------------------------------------------


def _pictures(outcome: Outcome, samples: Sequence[Sample]) -> str:
    top = top_of(samples)
    rows = [named_tiles(sample, outcome.data, top) for sample in samples]
    cells = [f"<div>{escape(_tile_title(name, outcome))}</div>" for name, _ in rows[0]]
    for row in rows:
        # A large picture has been shrunk, a small one is shown with its pixels.
        small = ' class="small"' if row[0][1].shape[1] < TILE_WIDTH // 2 else ""
        cells += [f'<img alt="{escape(name)}" src="{_embedded(t)}"{small}>' for name, t in row]
    data = outcome.data
    named = list(zip(data.class_names, data.palette, strict=True))
    if len(named) > _LONG_TABLE:
        # The table above has them all.
        named = [named[index] for index in sorted(_seen(samples)) if index < len(named)]
    legend = [f"<span>{_chip(hex_colour(colour))}{escape(name)}</span>" for name, colour in named]
    # Street scenes show nothing at the size of a stamp: rather scroll.
    least = min(220, max(110, rows[0][0][1].shape[1] // 2))
    legend.append(f"<span>{_chip(hex_colour(UNLABELLED))}not counted</span>")
    scales = ""
    if samples[0].reliability is not None:
        scales += _scale("reliability: 0 student", RELIABILITY_COLOURS, "1 teacher")
    if samples[0].discrepancy is not None:
        scales += _scale("discrepancy, KL: 0", DISCREPANCY_COLOURS, f"{top:.2g} nats and more")
    grid = f"--n:{len(rows[0])};--w:{least}px"
    return (
        f'<div class="scroll"><div class="tiles" style="{grid}">{"".join(cells)}</div>'
        f'</div><div class="legend">{scales}</div><div class="legend">{"".join(legend)}</div>'
    )


def _seen(samples: Sequence[Sample]) -> set[int]:
    """Classes that are in the pictures."""
    masks = [mask for sample in samples for mask in (sample.label, *sample.predictions.values())]
    return {int(index) for mask in masks for index in np.unique(mask)}


def _tile_title(name: str, outcome: Outcome) -> str:
    if name in outcome.results:
        return TITLES[name]
    return "discrepancy" if name.startswith("discrepancy") else name


def _embedded(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _scale(low: str, colours: Sequence[tuple[int, int, int]], high: str) -> str:
    steps = ",".join(map(hex_colour, colours))
    bar = f'<span class="scale" style="background:linear-gradient(to right,{steps})"></span>'
    return f"<span>{escape(low)} {bar} {escape(high)}</span>"


# -- curves ------------------------------------------------------------------------------------


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


def _charts(metrics: dict[str, list[Record]]) -> str:
    validation = []
    for stage, records in metrics.items():
        points = [(step, 100 * value) for step, value in curves(records, "val").get("miou", [])]
        if points:
            validation.append((TITLES[stage], f"var(--{stage})", points))
    figures = [chart("validation mIoU over steps, %", validation)]
    for stage, records in metrics.items():
        terms = curves(records, "train")
        # Without a teacher the cross entropy is the whole loss.
        shown = {n: p for n, p in terms.items() if n == "loss" or p != terms.get("loss")}
        series = [
            (name, f"var(--s{index % 8})", points)
            for index, (name, points) in enumerate(shown.items())
        ]
        if series or curves(records, "val").keys() == set():
            figures.append(chart(f"{TITLES[stage]}: loss and its terms over steps", series))
    return f'<div class="charts">{"".join(figures)}</div>'


def chart(title: str, series: Sequence[tuple[str, str, list[Point]]]) -> str:
    """Lines (name, colour, points) over the steps, with what they end at."""
    head = f"<figcaption>{escape(title)}</figcaption>"
    if not series:
        nothing = "metrics.jsonl has nothing about it"
        return f'<figure>{head}<p class="muted">{nothing}</p></figure>'
    last = max(points[-1][0] for _, _, points in series)
    values = [value for _, _, points in series for _, value in points]
    low, high = min(0.0, *values), max(values)
    x_ticks, y_ticks = _ticks(0.0, last or 1.0), _ticks(low, high if high > low else low + 1.0)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    x_end, y_low, y_high = last or 1.0, min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * step / x_end

    def y(value: float) -> float:
        return bottom - (bottom - _TOP) * (value - y_low) / (y_high - y_low)

    parts = []
    for tick in y_ticks:
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        if tick <= x_end and tick.is_integer():
            parts.append(
                f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
            )
    legend = []
    for name, colour, points in series:
        shown = _thin(points)
        style = f'style="--c:{colour}"'
        if len(points) == 1:
            # A teacher that was only evaluated: something to compare the others with.
            level = f"{y(points[0][1]):.1f}"
            line = f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{level}" y2="{level}"'
            parts.append(f"{line} {style}/>")
        else:
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in shown)
            parts.append(f'<polyline points="{path}" {style}/>')
        if len(points) <= 40:
            parts += [
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5" {style}>'
                f"<title>{escape(name)}, step {step:g}: {value:.4g}</title></circle>"
                for step, value in points
            ]
        end = f"{points[-1][1]:.3g}"
        legend.append(f"<span>{_chip(colour)}{escape(name)} {end}</span>")
    most = max(len(points) for _, _, points in series)
    note = ""
    if most > _MOST_POINTS:
        note = f'<span class="muted">(means of {-(-most // _MOST_POINTS)} lines)</span>'
    return (
        f'<figure>{head}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{"".join(legend)}{note}</div></figure>'
    )


def _thin(points: list[Point]) -> list[Point]:
    """Means of neighbours, where there are too many."""
    size = -(-len(points) // _MOST_POINTS)
    if size == 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group))
        for group in groups
    ]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that reach from below `low` to above `high`."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, end = math.floor(low / size), math.ceil(high / size - 1e-9)
    return [round(index * size, 12) for index in range(first, end + 1)]


# -- facts -------------------------------------------------------------------------------------


def _facts(outcome: Outcome, config: Config, metrics: dict[str, list[Record]]) -> str:
    heads = ("steps", "time", "pictures / s", "waiting for pictures", "best mIoU")
    rows = []
    for stage, result in outcome.results.items():
        seen = result.steps * config.optim.batch_size
        rate = f"{seen / result.seconds:.3g}" if seen and result.seconds > 0 else "-"
        waits = [line["wait"] for line in metrics[stage] if _is_number(line.get("wait"))]
        wait = f"{100 * waits[-1]:.0f} %" if waits else "-"
        # Below 0 where no evaluation had a score.
        best = _score(result.best_miou if result.best_miou >= 0 else None)
        cells = (str(result.steps), duration(result.seconds), rate, wait, best)
        numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        rows.append(f"<tr><td>{escape(TITLES[stage])}</td>{numbers}</tr>")
    titles = "".join(f'<th class="number">{head}</th>' for head in heads)
    data, device = outcome.data, outcome.device
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    facts = {
        "data": f"{config.data.kind}: {len(data.train)} training and {len(data.val)} validation "
        f"pictures, {_count(data)}",
        "device": f"{name}, amp {config.amp}, CPU threads: {torch.get_num_threads()}",
        "batch": f"{config.optim.batch_size} pictures a step",
        "seed": str(config.seed),
        "versions": f"heteroakd_fast {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
    listed = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return (
        f'<div class="scroll"><table><thead><tr><th>stage</th>{titles}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
        '<p class="muted">Time and pictures a second include evaluations.</p>'
        f"<dl>{listed}</dl>"
    )


def _count(data: SegmentationData) -> str:
    return "1 class" if data.num_classes == 1 else f"{data.num_classes} classes"


def _toml(text: str) -> str:
    lines = []
    for line in text.splitlines():
        value, mark, comment = line.partition("  # ")
        shown = escape(value)
        if mark:
            shown += f'<span class="muted">{escape(mark + comment)}</span>'
        lines.append(shown)
    return "\n".join(lines)


# The policy forbids what the page does not do: loading anything.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root { --bg: #fbfbfa; --panel: #ffffff; --ink: #1c1f23; --muted: #646b75; --line: #dfe2e6;
  --teacher: #7a5bc7; --alone: #8a94a3; --distilled: #1478c8; --better: #1c8448; --worse: #c43c32;
  --s0: #1c1f23; --s1: #1478c8; --s2: #d9730d; --s3: #1c8448; --s4: #b0379a; --s5: #7a5bc7;
  --s6: #0d8f97; --s7: #a3701b; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15171a; --panel: #1d2024; --ink: #e6e8eb; --muted: #98a1ad; --line: #343940;
    --teacher: #a88bf0; --alone: #8e99a8; --distilled: #55a9ee; --better: #55c184;
    --worse: #f0776d; --s0: #e6e8eb; --s1: #55a9ee; --s2: #f09a4a; --s3: #55c184; --s4: #e07fcd;
    --s5: #a88bf0; --s6: #4cc3ca; --s7: #d3a85a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 0 0 10px; }
.muted { color: var(--muted); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin-top: 18px; }
.card { background: var(--panel); border: 1px solid var(--line); border-top: 4px solid var(--c);
  border-radius: 6px; padding: 10px 14px; }
.value { font-size: 30px; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.long { max-height: 75vh; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; background: var(--panel); }
th, td { padding: 4px 12px; border-bottom: 1px solid var(--line); text-align: left; }
th { font-weight: 600; font-size: 13px; color: var(--muted); white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--panel); z-index: 1; }
tfoot td { font-weight: 600; }
.number, .bar { text-align: right !important; font-variant-numeric: tabular-nums; }
.classes { table-layout: fixed; min-width: 620px; }
.classes th:first-child { width: 26%; } .classes th.gain { width: 78px; }
.classes td { overflow-wrap: anywhere; }
.bar { background: linear-gradient(to right, color-mix(in srgb, var(--c) 38%, transparent) var(--v),
  transparent 0) 10px 2px / calc(100% - 10px) calc(100% - 4px) no-repeat; }
.better { color: var(--better); } .worse { color: var(--worse); }
.chip { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 3px;
  border: 1px solid var(--line); vertical-align: -1px; }
.tiles { display: grid; grid-template-columns: repeat(var(--n), minmax(var(--w), 1fr)); gap: 5px;
  font-size: 13px; align-items: end; }
.tiles img { width: 100%; display: block; border-radius: 3px; }
.tiles img.small { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 8px; font-size: 13px; }
.scale { display: inline-block; width: 120px; height: 10px; border: 1px solid var(--line);
  border-radius: 2px; margin: 0 4px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 12px; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 12px; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg line { stroke: var(--line); } svg text { fill: var(--muted); font-size: 12px; }
svg polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
svg circle { fill: var(--c); } svg line.level { stroke: var(--c); stroke-dasharray: 5 4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 12px 0 26px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 18px; font-weight: 600; }
pre { overflow-x: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: 12px; font-size: 12.5px; line-height: 1.45; }
"""
