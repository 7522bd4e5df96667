"""Pictures of a run. One subject each; every picture reads without the text around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import Case
from .results import Results, Row, best_compiled, ours

__all__ = ["draw_all", "three_sides"]

GREY, BLUE, ORANGE = "#8c8c8c", "#4c78a8", "#e45756"
INK, FAINT = "#222222", "#dddddd"
COLOURS = {"eager": GREY, "compile": BLUE, "ours": ORANGE}
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
}
Figure = Any


def three_sides(rows: dict[str, Row]) -> dict[str, Row | None]:
    """Eager, the better compiled graph, and ours, of the rows of one case; None where there are no
    times."""
    eager = rows.get("eager")
    able = eager if eager and eager.total else None
    return {"eager": able, "compile": best_compiled(rows), "ours": ours(rows)}


def draw_all(results: Results, directory: Path) -> dict[str, str]:
    """Write the pictures that the results allow; returns their captions by file name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {}
    with plt.rc_context(STYLE):
        for name, (caption, draw) in PICTURES.items():
            if (figure := draw(results, plt)) is not None:
                figure.savefig(directory / name)
                plt.close(figure)
                drawn[name] = caption
    return drawn


def _overview(results: Results) -> list[Case]:
    """The headline rows, then the other objectives and dtypes, each once."""
    groups = ("headline", "objectives", "dtypes")
    return list(dict.fromkeys(one for group in groups for one in results.measured(group)))[:16]


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _three_bars(
    results: Results, plt: Any, value: str, unit: str, title: str, xlabel: str
) -> Figure | None:
    """Horizontal bars on a logarithmic axis, three for each case; the ratio stands at ours."""
    found: dict[Case, dict[str, float]] = {}
    for one in _overview(results):
        sides = three_sides(results.of(one)).items()
        values = {side: number for side, row in sides if row and (number := getattr(row, value))}
        if "eager" in values and len(values) > 1:
            found[one] = values
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(found) + 1.6))
    axes.set_yticks(
        range(len(found)), [one.name.replace(f", {one.label}", f"\n{one.label}") for one in found]
    )
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    axes.set_title(title, pad=28)
    for number, (side, colour) in enumerate(COLOURS.items()):
        have = [(place, values) for place, values in enumerate(found.values()) if side in values]
        places = [place + (number - 1) * 0.26 for place, _ in have]
        bars = axes.barh(places, [v[side] for _, v in have], 0.24, color=colour, label=side)
        texts = [f"{_digits(values[side])} {unit}" for _, values in have]
        if side == "ours":
            texts = [
                f"{text}   " + ", ".join(f"{name} / ours {values[name] / values[side]:.1f}"
                                         for name in values if name != side)
                for text, (_, values) in zip(texts, have, strict=True)
            ]  # fmt: skip
        axes.bar_label(bars, texts, padding=3, fontsize=8.5,
                       fontweight="bold" if side == "ours" else "normal")  # fmt: skip
    axes.set_xscale("log")
    every = [number for values in found.values() for number in values.values()]
    axes.set_xlim(min(every) / 2, max(every) * 30)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
    return figure


def time_bars(results: Results, plt: Any) -> Figure | None:
    xlabel = "forward + backward of the loss, ms (logarithmic)"
    return _three_bars(results, plt, "total_ms", "ms", "Time of the loss", xlabel)


def memory_bars(results: Results, plt: Any) -> Figure | None:
    xlabel = "peak above the inputs, MiB (logarithmic)"
    return _three_bars(results, plt, "peak_mib", "MiB", "Memory of the loss", xlabel)


def scaling(results: Results, plt: Any) -> Figure | None:
    """Time against pixels, classes, batch and stride; a line for each objective and side."""
    panels: dict[str, tuple[str, Callable[[Case], float]]] = {
        "pixels": ("label pixels", lambda one: one.height * one.width * one.batch),
        "classes": ("classes", lambda one: one.classes),
        "batches": ("batch", lambda one: one.batch),
        "strides": ("stride of the logits", lambda one: one.stride),
    }
    panels = {group: panel for group, panel in panels.items() if results.measured(group)}
    if not panels:
        return None
    figure, grid = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (group, (label, x_of)) in zip(grid[0], panels.items(), strict=True):
        cases = sorted(results.measured(group), key=x_of)
        for objective, dash in (("ce", "-"), ("ce+hetero", "--")):
            mine = [(x_of(one), three_sides(results.of(one))) for one in cases
                    if one.objective == objective]  # fmt: skip
            for side, colour in COLOURS.items():
                points = [(x, *row.total) for x, rows in mine if (row := rows[side]) and row.total]
                if len(points) < 2:
                    continue
                x, median, low, high = zip(*points, strict=True)
                (line,) = axes.plot(x, median, dash, marker="o", markersize=3.5, color=colour)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                handles.setdefault(f"{objective}, {side}", line)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(label)
    grid[0][0].set_ylabel("forward + backward, ms")
    figure.legend(handles.values(), handles, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0))
    title = "How the time grows (bands: middle 80 % of the samples)"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.tight_layout()
    return figure


PICTURES: dict[str, tuple[str, Callable[[Results, Any], Figure | None]]] = {
    "time.png": ("Time of the loss, forward and backward", time_bars),
    "memory.png": ("Peak memory of the loss", memory_bars),
    "scaling.png": ("Growth with pixels, classes, batch and stride", scaling),
}
