"""Pictures of a result file. One subject each; every picture reads without the text around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .results import Results, spread, total_ms

__all__ = ["draw_all"]

GREY, BLUE, ORANGE, PALE = "#8c8c8c", "#4c78a8", "#e45756", "#f2b8b5"
INK, FAINT = "#222222", "#dddddd"
Axes = Any
Figure = Any


def draw_all(results: Results, directory: Path) -> list[tuple[str, str]]:
    """Writes the pictures that the results allow; returns (file name, caption)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.edgecolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": FAINT,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "savefig.dpi": 130,
            "savefig.bbox": "tight",
        }
    )
    drawn = []
    for name, caption, draw in PICTURES:
        figure = draw(results, plt)
        if figure is None:
            continue
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / name)
        plt.close(figure)
        drawn.append((name, caption))
    return drawn


def three_sides(results: Results, one: Case) -> dict[str, dict[str, Any] | None]:
    """Eager, the better compiled graph, and ours, of one case."""
    rows = results.rows(one.key)
    eager = rows.get("eager")
    able = eager is not None and eager["cannot"] is None and eager["forward_ms"]
    return {
        "eager": eager if able else None,
        "compile": results.best_compiled(rows),
        "ours": results.ours(rows),
    }


_COLOURS = {"eager": GREY, "compile": BLUE, "ours": ORANGE}


def _name_of_ours(results: Results, cases: Sequence[Case]) -> str:
    names = {row["provider"] for one in cases if (row := results.ours(results.rows(one.key)))}
    return " / ".join(sorted(names)) or "ours"


def _bars(
    results: Results,
    plt: Any,
    cases: Sequence[Case],
    value: Callable[[Case, str, dict[str, Any]], float | None],
    unit: str,
    title: str,
    text: Callable[[float], str],
) -> Figure | None:
    """Horizontal bars on a logarithmic axis, three for each case; the ratio stands at ours."""
    found: list[tuple[Case, dict[str, float]]] = []
    for one in cases:
        values = {}
        for side, row in three_sides(results, one).items():
            number = None if row is None else value(one, side, row)
            if number is not None and number > 0:
                values[side] = number
        if "eager" in values and len(values) > 1:
            found.append((one, values))
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(found) + 1.6))
    height = 0.26
    largest = max(max(values.values()) for _, values in found)
    for place, (_, values) in enumerate(found):
        for step, side in enumerate(("eager", "compile", "ours")):
            if side not in values:
                continue
            y = place + (step - 1) * height
            axes.barh(y, values[side], height * 0.92, color=_COLOURS[side])
            label = text(values[side])
            if side == "ours":
                label += f"   eager / ours {values['eager'] / values['ours']:.1f}"
                if "compile" in values:
                    label += f", compile / ours {values['compile'] / values['ours']:.1f}"
            axes.text(values[side] * 1.03, y, label, va="center", fontsize=8.5, color=INK,
                      fontweight="bold" if side == "ours" else "normal")  # fmt: skip
    axes.set_yticks(range(len(found)), [_two_lines(one) for one, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(min(min(v.values()) for _, v in found) / 2, largest * 30)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontweight="bold", pad=28)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS[side]) for side in _COLOURS]
    labels = ["eager PyTorch", "torch.compile", _name_of_ours(results, [c for c, _ in found])]
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
    return figure


def _two_lines(one: Case) -> str:
    dtype = "" if one.dtype == "float32" else f", {one.dtype}"
    return f"{one.objective}{dtype}\n{one.label}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _median_ms(one: Case, side: str, row: dict[str, Any]) -> float | None:
    found = spread(total_ms(row))
    return found.median if found else None


def _overview(results: Results) -> list[Case]:
    """The headline rows, then the other objectives and dtypes, each once."""
    chosen: dict[str, Case] = {}
    for group in ("headline", "objectives", "dtypes"):
        for one in results.group(group):
            chosen.setdefault(one.key, one)
    return list(chosen.values())[:16]


def time_bars(results: Results, plt: Any) -> Figure | None:
    return _bars(results, plt, _overview(results), _median_ms,
                 "forward + backward of the loss, ms (logarithmic)", "Time of the loss",
                 lambda ms: f"{_three_digits(ms)} ms")  # fmt: skip


def memory_bars(results: Results, plt: Any) -> Figure | None:
    def peak(one: Case, side: str, row: dict[str, Any]) -> float | None:
        number = results.data["peak_bytes"].get(one.key, {}).get(row["provider"])
        return number / 2**20 if isinstance(number, int) else None

    return _bars(results, plt, _overview(results), peak,
                 "peak above the inputs, MiB (logarithmic)", "Memory of the loss",
                 lambda mib: f"{_three_digits(mib)} MiB")  # fmt: skip


def scaling(results: Results, plt: Any) -> Figure | None:
    """Time against pixels, classes, batch and stride; a line for each objective and side."""
    panels: list[tuple[str, str, Callable[[Case], float]]] = [
        ("pixels", "label pixels", lambda one: one.height * one.width * one.batch),
        ("classes", "classes", lambda one: one.classes),
        ("batches", "batch", lambda one: one.batch),
        ("strides", "stride of the logits", lambda one: one.stride),
    ]
    panels = [panel for panel in panels if results.group(panel[0])]
    if not panels:
        return None
    figure, grid = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    for axes, (group, label, x_of) in zip(grid[0], panels, strict=True):
        cases = results.group(group)
        for objective, dash in (("ce", "-"), ("ce+hetero", "--")):
            mine = sorted((one for one in cases if one.objective == objective), key=x_of)
            for side in ("eager", "compile", "ours"):
                points = []
                for one in mine:
                    row = three_sides(results, one)[side]
                    found = spread(total_ms(row)) if row else None
                    if found:
                        points.append((x_of(one), found))
                if len(points) < 2:
                    continue
                xs = [x for x, _ in points]
                axes.plot(xs, [s.median for _, s in points], dash, marker="o", markersize=3.5,
                          color=_COLOURS[side], label=f"{objective}, {side}")  # fmt: skip
                axes.fill_between(xs, [s.low for _, s in points], [s.high for _, s in points],
                                  color=_COLOURS[side], alpha=0.15, linewidth=0)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(label)
    grid[0][0].set_ylabel("forward + backward, ms")
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=3,
                  bbox_to_anchor=(0.5, 0.0))  # fmt: skip
    figure.suptitle("How the time grows (bands: middle 80 % of the samples)", x=0.01, ha="left",
                    fontweight="bold")  # fmt: skip
    figure.tight_layout()
    return figure


def floor_share(results: Results, plt: Any) -> Figure | None:
    """How much of the time no implementation could do without."""
    found = []
    for one in _overview(results):
        sides = three_sides(results, one)
        floor = results.data["floors"][one.key]
        shares = {
            side: 100.0 * floor["ms"] / s.median
            for side, row in sides.items()
            if row and (s := spread(total_ms(row)))
        }
        if shares.get("ours"):
            found.append((one, shares, floor["binds"]))
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(found) + 1.6))
    for place, (_, shares, binds) in enumerate(found):
        axes.barh(place, shares["ours"], 0.6, color=ORANGE)
        if "eager" in shares:
            axes.plot([shares["eager"]] * 2, [place - 0.3, place + 0.3], color=INK, linewidth=2)
        beside = max(shares["ours"], shares.get("eager", 0.0)) + 1
        axes.text(beside, place, f"{shares['ours']:.1f} %, {binds}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(found)), [_two_lines(one) for one, _, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("floor / measured time, %; the black line is eager PyTorch")
    axes.grid(axis="y", visible=False)
    axes.set_title(
        f"Share of the floor: {_name_of_ours(results, [one for one, _, _ in found])}",
        loc="left",
        fontweight="bold",
    )
    return figure


def training_step(results: Results, plt: Any) -> Figure | None:
    rows = [row for row in results.data["steps"] if row.get("step_ms")]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.6))
    for place, row in enumerate(rows):
        axes.barh(place, row["step_ms"] - row["loss_ms"], 0.6, color=FAINT)
        axes.barh(place, row["loss_ms"], 0.6, left=row["step_ms"] - row["loss_ms"], color=ORANGE)
        axes.text(row["step_ms"] * 1.01, place, f"{row['step_ms']:.0f} ms, loss "
                  f"{100 * row['loss_share']:.0f} %", va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['provider']}\n{row['name']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(row["step_ms"] for row in rows) * 1.25)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms of one training step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (FAINT, ORANGE)]
    axes.legend(handles, ["models and optimizer", "loss"], loc="lower left",
                bbox_to_anchor=(0, 1.0), ncols=2)  # fmt: skip
    axes.set_title("A whole training step of real models", loc="left", fontweight="bold", pad=28)
    return figure


PICTURES: tuple[tuple[str, str, Callable[[Results, Any], Figure | None]], ...] = (
    ("time.png", "Time of the loss, forward and backward", time_bars),
    ("memory.png", "Peak memory of the loss", memory_bars),
    ("scaling.png", "Growth with pixels, classes, batch and stride", scaling),
    ("floor.png", "Share of the floor", floor_share),
    ("step.png", "A whole training step", training_step),
)
