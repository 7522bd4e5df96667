"""The results of a run as a page of Markdown with pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import Case
from .markdown import table
from .plots import draw_all, three_sides
from .results import OURS, RUN_TO_RUN, Results, Row, Spread, expected, ratio

__all__ = ["summary", "write"]

#: Groups with a table of cases; those of `CURVES` have a picture as well.
TABLES = {
    "headline": "Headline",
    "large": "Large batches",
    "objectives": "Objectives",
    "dtypes": "Dtypes",
    "projections": "Projections",
    "evaluation": "Evaluation (no backward)",
}
CURVES = ("pixels", "classes", "batches", "strides")
#: Memory that a training step may take above networks and inputs
BUDGET_GIB = 4
HOW_TO_READ = f"""\
Times are medians of forward + backward, all providers interleaved in one process, a case visited at
different moments of the run while its time allows. A ratio is that of the medians; in brackets the
range in which another run is expected (10th against 90th percentile of the samples, at least
{RUN_TO_RUN:.0%} either way). Above 1: this package needs less. Rows below 1 are rows where it
loses. *ours* is the fastest compiled backend, `reference` (plain PyTorch) where there is none.
Errors are against float64: of the loss, relative; of the gradient, the largest over the largest
gradient; of an evaluation, the share of pixels with another prediction. The floor is the time of
the arithmetic or bytes that the method itself asks for, at the ceilings above
(`benchmarks/floor.py`). A dash: it cannot, or the run's time was over.
"""


def write(results: Results, directory: Path) -> Path:
    """Draw the pictures and write `report.md` beside them."""
    try:
        pictures = draw_all(results, directory)
    except ImportError as error:
        print(f"report: no pictures ({error}); pip install matplotlib", file=sys.stderr)
        pictures = {}
    page = directory / "report.md"
    page.write_text("\n".join(_page(results, pictures)).rstrip() + "\n")
    return page


def summary(results: Results) -> str:
    """The headline rows, for a terminal, and what was not reached."""
    lines = [f"{'case':58} {'eager':>9} {'compile':>9} {'ours':>9}  ratio to eager, compile"]
    for one in results.measured("headline"):
        rows = three_sides(results.of(one))
        times = " ".join(f"{_ms(row):>9}" for row in rows.values())
        eager, compiled, ours = rows.values()
        over = "cannot"
        if ours:
            over = f"{_times(eager, ours)}, {_times(compiled, ours)}  {ours.provider}"
        lines.append(f"{one.name:58} {times}  {over}")
    for phase, items in results.missed.items():
        lines += ["", f"not reached, {phase}:", *(f"  {item}" for item in items)]
    return "\n".join(lines)


def _page(results: Results, pictures: dict[str, str]) -> list[str]:
    lines = ["# Benchmark report", "", *_environment(results), "", HOW_TO_READ]

    def section(title: str, content: Iterable[str], *names: str) -> None:
        """With its pictures; nothing where there is no content."""
        if content := list(content):
            lines.extend([f"## {title}", "", *content, ""])
            for name in names:
                if name in pictures:
                    lines.extend([f"![{pictures[name]}]({name})", ""])

    missed = [f"- {phase}: {'; '.join(f'`{x}`' for x in items)}"
              for phase, items in results.missed.items()]  # fmt: skip
    section("Not reached before the run's time was over or it was stopped", missed)
    for group, title in TABLES.items():
        shown = ("time.png", "memory.png") if group == "headline" else ()
        section(title, _cases(results, results.measured(group)), *shown)
    section("Other settings", _other_settings(results))
    curves = [one for group in CURVES for one in results.measured(group)]
    section("Scaling", _cases(results, list(dict.fromkeys(curves))), "scaling.png")
    section("Every provider", _everyone(results))
    section("A training step of real networks", _training(results))
    return lines


def _environment(results: Results) -> list[str]:
    about, rates = results.about, results.rates
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    used = {row.setting for row in results.rows}
    return [
        f"- machine: {about['machine']}, {about['cores']} cores, {about['memory_gib']} GiB, "
        f"{about['cpu_capability']}",
        f"- torch {about['torch']}, Python {about['python']}, {packages}",
        f"- commit {about['commit']}; tests: {about['tests']}; suite `{results.name}`, "
        f"{results.seconds:.0f} s",
        f"- measured ceilings: {rates.fma_per_s / 1e9:.0f} G multiply-adds/s (matrix product), "
        f"{rates.bytes_per_s / 1e9:.1f} GB/s (copy, read + written)",
        *(f"- {name}: {text}" for name, text in results.settings.items() if name in used),
    ]


# --- sections ----------------------------------------------------------------------------------


def _cases(results: Results, cases: Sequence[Case]) -> list[str]:
    """A row for each case: the three sides."""
    header = ["case", "eager ms", "compile ms", "ours ms", "over eager", "over compile"]
    header += ["MiB eager / compile / ours", "error loss, gradient: eager; ours", "floor / ours"]
    cells = []
    for one in cases:
        eager, compiled, ours = three_sides(results.of(one)).values()
        cells.append([
            one.name,
            _ms(eager),
            _ms(compiled),
            f"{_ms(ours)} ({_backend(ours)})",
            _times(eager, ours, bold=True),
            _times(compiled, ours, bold=True),
            " / ".join(_mib(row) for row in (eager, compiled, ours)),
            f"{_errors(eager)}; {_errors(ours)}",
            _floor(ours),
        ])  # fmt: skip
    return _table(header, cells)


def _other_settings(results: Results) -> list[str]:
    header = ["setting", "case", "eager ms", "compile ms", "ours ms", "over eager", "over compile"]
    cells = []
    for setting in list(results.settings)[1:]:
        for one in dict.fromkeys(row.case for row in results.rows if row.setting == setting):
            eager, compiled, ours = three_sides(results.of(one, setting)).values()
            times = [_ms(row) for row in (eager, compiled, ours)]
            ratios = [_times(row, ours, bold=True) for row in (eager, compiled)]
            cells.append([setting, one.name, *times, *ratios])
    return _table(header, cells)


def _everyone(results: Results) -> list[str]:
    """Every provider that could, on every case with more than the three sides; then the reasons of
    those that could not."""
    header = ["case", "provider", "forward ms", "backward ms", "both (10 %-90 %)", "graph ms"]
    header += ["peak MiB", "error loss, gradient"]
    cells: list[list[str]] = []
    reasons: dict[str, None] = {}
    for one in dict.fromkeys(one for group in TABLES for one in results.measured(group)):
        for name, row in results.of(one).items():
            if row.cannot:
                reasons[f"- {name}: {' '.join(row.cannot.split())}"] = None
            elif row.total:
                both = f"{_digits(row.total.median)} "
                both += f"({_digits(row.total.low)}-{_digits(row.total.high)})"
                parts = [_digits(x) for x in (row.forward_ms, row.backward_ms)]
                graph, peak = _digits(row.graph_ms), _mib(row)
                cells.append([one.name, name, *parts, both, graph, peak, _errors(row)])
    found = _table(header, cells)
    return (
        [*found, "", "Who cannot (some of) these cases, and why:", "", *reasons]
        if reasons
        else found
    )


def _training(results: Results) -> list[str]:
    """Of each side, a step beside its loss alone; the largest batch by the line through the peaks
    of two batches, for memory is linear in the batch."""
    cells = []
    for one in results.measured("training"):
        twice = results.of(replace(one, batch=2 * one.batch))
        loss = results.of(replace(one, objective="ce+hetero"))
        for row in three_sides(results.of(one)).values():
            alone = loss.get(row.provider) if row else None
            if not (one.target.models and row and row.total_ms and alone and alone.total_ms):
                continue
            share = f"{100 * alone.total_ms / row.total_ms:.1f} %"
            more = twice.get(row.provider)
            batch = "-"
            if row.peak_mib and more and more.peak_mib:
                of_one = (more.peak_mib - row.peak_mib) / one.batch
                room = 1024 * BUDGET_GIB - row.peak_mib
                batch = f"{one.batch + room / of_one:.0f}" if of_one > 0 else "-"
            cells.append([one.name, row.provider, _ms(row), _ms(alone), share, _mib(row), batch])
    header = ["step", "provider", "step ms", "loss alone ms", "loss's share", "peak MiB"]
    return _table([*header, f"largest batch in {BUDGET_GIB} GiB, by two peaks"], cells)


# --- cells -------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Nothing where there are no rows."""
    return [table(header, rows)] if rows else []


def _backend(row: Row | None) -> str:
    return row.provider.removeprefix(OURS).removesuffix("]") if row else "cannot"


def _digits(value: float | None) -> str:
    """Three of them."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(row: Row | None) -> str:
    return _digits(row.total_ms) if row else "-"


def _mib(row: Row | None) -> str:
    return _digits(row.peak_mib) if row else "-"


def _floor(row: Row | None) -> str:
    if row is None or not row.total_ms or not row.floor_ms:
        return "-"
    return f"{100 * row.floor_ms / row.total_ms:.1f} % ({row.floor_binds})"


def _times(baseline: Row | None, row: Row | None, bold: bool = False) -> str:
    found: Spread | None = ratio(baseline, row)
    if found is None:
        return "-"
    median, low, high = expected(found)
    digits = 2 if median < 10 else 1
    shown: Any = f"{median:.{digits}f}x"
    return f"{f'**{shown}**' if bold else shown} ({low:.{digits}f}-{high:.{digits}f})"


def _errors(row: Row | None) -> str:
    if row is None or row.loss_error is None or row.grad_error is None:
        return "-"
    return f"{row.loss_error:.0e}, {row.grad_error:.0e}"
