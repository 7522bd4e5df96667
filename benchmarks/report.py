"""A result file as a page of Markdown with pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .cases import OBJECTIVES, Case
from .markdown import table
from .plots import draw_all, three_sides
from .results import RUN_TO_RUN, Results, Spread, expected, ratio, spread, total_ms

__all__ = ["summary", "write"]

MIB = 2**20


def write(results: Results, directory: Path) -> Path:
    """Draws the pictures and writes `report.md` beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        pictures = dict(draw_all(results, directory))
    except ImportError as error:
        print(f"report: no pictures ({error}); pip install matplotlib", file=sys.stderr)
        pictures = {}
    page = directory / "report.md"
    page.write_text("\n".join(_page(results, pictures)).rstrip() + "\n")
    return page


def summary(results: Results) -> str:
    """The headline rows, for a terminal."""
    lines = [f"{'case':58} {'eager':>9} {'compile':>9} {'ours':>9}  ratio to eager, compile"]
    for one in _measured(results, "headline"):
        sides = three_sides(results, one)
        times = [f"{_ms(row):>9}" for row in sides.values()]
        name = f"{one.objective} {one.label}"
        ours = sides["ours"]
        over = "cannot" if ours is None else (
            f"{_times(_ratio(sides['eager'], ours))}, {_times(_ratio(sides['compile'], ours))}"
            f"  {ours['provider']}")  # fmt: skip
        lines.append(f"{name:58} {' '.join(times)}  {over}")
    for phase, items in _not_reached(results).items():
        lines += ["", f"not reached, {phase}:", *(f"  {item}" for item in items)]
    return "\n".join(lines)


def _page(results: Results, pictures: dict[str, str]) -> list[str]:
    data = results.data
    about = data["environment"]
    lines = ["# Benchmark report", ""]
    lines += _environment(data, about)
    lines += _how_to_read(data)
    if missing := _not_reached(results):
        lines += ["## Not reached", ""]
        lines += ["Planned, and not measured before the run's time was over or it was stopped:", ""]
        lines += [
            f"- {phase}: {'; '.join(f'`{item}`' for item in items)}"
            for phase, items in missing.items()
        ]
        lines.append("")

    def picture(name: str) -> None:
        if name in pictures:
            lines.extend([f"![{pictures[name]}]({name})", ""])

    if _measured(results, "headline"):
        lines += ["## Headline", "", *_case_table(results, "headline")]
    picture("time.png")
    picture("memory.png")
    for group, title in (
        ("large", "Large batches"),
        ("objectives", "Objectives"),
        ("dtypes", "Dtypes"),
    ):
        if _measured(results, group):
            lines += [f"## {title}", "", *_case_table(results, group)]
    lines += _default_malloc(results)
    lines += _threads(results)
    lines += _everyone(results)
    picture("floor.png")
    if any(results.group(name) for name in ("pixels", "classes", "batches", "strides")):
        lines += ["## Scaling", ""]
    picture("scaling.png")
    for group in ("pixels", "classes", "batches", "strides"):
        if _measured(results, group):
            lines += [f"### {group.capitalize()}", "", *_curve_table(results, group)]
    lines += _crops(results)
    if data["steps"]:
        lines += ["## A whole training step", ""]
    picture("step.png")
    lines += _steps(results)
    return lines


def _environment(data: dict[str, Any], about: dict[str, Any]) -> list[str]:
    machine = about.get("gpu") or f"{about['processor']}, {about['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    rates = data["rates"]
    return [
        f"- machine: {machine}, {about['memory_gib']} GiB, {about['cpu_capability']}",
        f"- torch {about['torch']}, Python {about['python']}, {packages}",
        f"- commit {about['commit']}; tests: {about['tests']}; suite `{data['suite']}`, "
        f"{data['seconds']:.0f} s",
        f"- measured ceilings: {rates['fma_per_s'] / 1e9:.0f} G multiply-adds/s (matrix product), "
        f"{rates['bytes_per_s'] / 1e9:.1f} GB/s (copy, read + written)",
        *(
            f"- {name}: {text}"
            for name, text in data["settings"].items()
            if any(row["setting"] == name for row in data["rows"])
        ),
        "",
    ]


def _how_to_read(data: dict[str, Any]) -> list[str]:
    return [
        "Times are medians of forward + backward, all providers interleaved in one process; "
        f"{data.get('visits', 2)} visits to a case at different moments of the run, while its time "
        "allows. A ratio is that of the medians; in brackets the range in which another run is "
        f"expected (10th against 90th percentile of the samples, at least {RUN_TO_RUN:.0%} either "
        "way). Above 1: this "
        "package needs less. Rows below 1 are rows where it loses. *ours* is "
        "the fastest compiled backend, `reference` (plain PyTorch) where there is none yet. "
        "Errors are against float64: of the loss, relative; of the gradient, the largest over "
        "the largest gradient. The floor is the time of the arithmetic or bytes that the method "
        "itself asks for, at the ceilings above (`benchmarks/floor.py`). A dash: it cannot, or the "
        "run's time was over.",
        "",
    ]


def _measured(results: Results, group: str) -> list[Case]:
    return [one for one in results.group(group) if results.rows(one.key)]


def _case_table(results: Results, group: str) -> list[str]:
    header = ["case", "eager ms", "compile ms", "ours ms", "over eager", "over compile"]
    header += ["MiB eager / compile / ours", "error loss, gradient: eager; ours", "floor"]
    rows = []
    for one in _measured(results, group):
        sides = three_sides(results, one)
        ours, eager, compiled = sides["ours"], sides["eager"], sides["compile"]
        peaks = results.data["peak_bytes"].get(one.key, {})
        memory = " / ".join(
            _mib(peaks.get(row["provider"])) if row else "-" for row in (eager, compiled, ours)
        )
        floor = results.data["floors"][one.key]
        both = spread(total_ms(ours)) if ours else None
        share = f"{100 * floor['ms'] / both.median:.1f} % ({floor['binds']})" if both else "-"
        name = _short(ours["provider"]) if ours else "cannot"
        dtype = "" if one.dtype == "float32" else f", {one.dtype}"
        rows.append(
            [
                f"{one.objective}{dtype}, {one.label}",
                _ms(eager),
                _ms(compiled),
                f"{_ms(ours)} ({name})",
                _bold(_ratio(eager, ours)),
                _bold(_ratio(compiled, ours)),
                memory,
                f"{_errors(eager)}; {_errors(ours)}",
                share,
            ]
        )
    return [table(header, rows), ""]


def _default_malloc(results: Results) -> list[str]:
    keys = [key for key in results.cases if results.rows(key, "default-malloc")]
    if not keys:
        return []
    cells = []
    for key in keys:
        rows = results.rows(key, "default-malloc")
        eager, compiled, ours = rows.get("eager"), results.best_compiled(rows), results.ours(rows)
        one = results.cases[key]
        times = [_ms(eager), _ms(compiled), _ms(ours)]
        ratios = [_bold(_ratio(eager, ours)), _bold(_ratio(compiled, ours))]
        cells.append([f"{one.objective}, {one.label}", *times, *ratios])
    return [
        "## The same with malloc as the system ships it",
        "",
        "Page faults of freshly mapped memory are then part of everybody's time, and more of those "
        "who allocate more.",
        "",
        table(["case", "eager ms", "compile ms", "ours ms", "over eager", "over compile"], cells),
        "",
    ]


def _threads(results: Results) -> list[str]:
    lines: list[str] = []
    threads = results.data["environment"]["threads"]
    for key, one in results.cases.items():
        for name, alone in results.rows(key, "1 thread").items():
            together = results.rows(key).get(name)
            faster = ratio(alone, together) if together else None
            if faster:
                lines.append(
                    f"- {one.objective}, {one.label}, {name}: {threads} threads are "
                    f"{_times(faster)} as fast as one"
                )
    return ["## Threads", "", *lines, ""] if lines else []


def _everyone(results: Results) -> list[str]:
    """Every provider on every case that has more than the three sides; reasons as footnotes."""
    reasons: dict[str, int] = {}
    groups = ("headline", "large", "objectives", "dtypes", "projections")
    keys = dict.fromkeys(one.key for group in groups for one in _measured(results, group))
    cells: list[list[str]] = []
    for key in keys:
        cells.append([f"**{key}**"])
        for name, row in results.rows(key).items():
            if row["cannot"] is not None:
                number = reasons.setdefault(row["cannot"], len(reasons) + 1)
                cells.append([name, f"cannot [{number}]"])
                continue
            forward, backward = spread(row["forward_ms"]), spread(row["backward_ms"])
            both = spread(total_ms(row))
            if forward is None or backward is None or both is None:
                continue
            cells.append(
                [
                    name,
                    f"{forward.median:.3g}",
                    f"{backward.median:.3g}",
                    f"{both.median:.3g} ({both.low:.3g}-{both.high:.3g})",
                    _mib(results.data["peak_bytes"].get(key, {}).get(name)),
                    _errors(row),
                ]
            )
    if not cells:
        return []
    header = ["provider", "forward ms", "backward ms", "both (10 %-90 %)", "peak MiB", "error"]
    return [
        "## Every provider",
        "",
        table(header, cells),
        "",
        *(f"[{number}] {reason}  " for reason, number in reasons.items()),
        "",
    ]


def _curve_table(results: Results, group: str) -> list[str]:
    cells = []
    for one in _measured(results, group):
        sides = three_sides(results, one)
        eager, ours = sides["eager"], sides["ours"]
        name = f"{one.objective}, {one.label}"
        cells.append([name, _ms(eager), _ms(ours), _bold(_ratio(eager, ours))])
    header = ["case", "eager ms", "ours ms", "over eager"]
    return [table(header, cells), "", *_fit(results, group), ""]


def _fit(results: Results, group: str) -> list[str]:
    """Growth of our time over the last three points: 1 is linear."""
    import math

    x_of = {"pixels": lambda c: c.height * c.width, "classes": lambda c: c.classes,
            "batches": lambda c: c.batch}.get(group)  # fmt: skip
    if x_of is None:
        return []
    lines = []
    for objective in OBJECTIVES:
        points = []
        for one in _measured(results, group):
            row = three_sides(results, one)["ours"]
            found = spread(total_ms(row)) if row and one.objective == objective else None
            if found:
                points.append((x_of(one), found.median))
        points.sort()
        if len(points) >= 3:
            (x0, t0), (x1, t1) = points[-3], points[-1]
            if x1 == x0 or min(t0, t1) <= 0:
                continue
            power = math.log(t1 / t0) / math.log(x1 / x0)
            lines.append(f"{objective}: ours grows with the power {power:.2f} (1 is linear).  ")
    return lines


def _crops(results: Results) -> list[str]:
    crops = results.data["crops"]
    if not crops:
        return []
    budget = results.data["crop_budget"] / MIB
    cells = []
    for one in crops:
        found = [one["objective"], one["provider"]]
        if "cannot" in one:
            cells.append([*found, one["cannot"]])
            continue
        more = " or more" if one["capped"] else ""
        side, peak = one["side"], one["peak_bytes"] / MIB
        cells.append([*found, f"{side} x {side}{more}", f"{peak:.0f}"])
    return [
        f"## Largest crop whose loss fits in {budget:.0f} MiB",
        "",
        "B1 C19, stride 4, float32; each size was measured, not extrapolated.",
        "",
        table(["objective", "provider", "largest crop", "peak MiB"], cells),
        "",
    ]


def _steps(results: Results) -> list[str]:
    data = results.data
    if not data["steps"]:
        return []
    cells = []
    for row in data["steps"]:
        found = [row["key"], row["provider"]]
        if row.get("cannot"):
            cells.append([*found, f"cannot: {row['cannot']}"])
            continue
        cells.append(
            [
                *found,
                f"{row['step_ms']:.0f} ({row['step_p10_ms']:.0f}-{row['step_p90_ms']:.0f})",
                f"{row['loss_ms']:.0f}",
                f"{100 * row['loss_share']:.1f} %",
                f"{row['relative_error']:.1e}",
            ]
        )
    header = ["step", "provider", "step ms", "loss ms", "loss's share", "loss error"]
    lines = [table(header, cells), ""]
    if data["step_batches"]:
        cells = []
        for row in data["step_batches"]:
            batch = str(row.get("batch", f"cannot: {row.get('cannot')}"))
            how = row.get("how", "")
            if row.get("points"):
                how += "; " + ", ".join(
                    f"B{p['batch']} " + (f"{p['bytes'] / MIB:.0f} MiB" if p["bytes"] else "no")
                    for p in row["points"]
                )
            cells.append([row["key"], row["provider"], batch, f"{row['budget'] / MIB:.0f}", how])
        header = ["step", "provider", "largest batch", "budget MiB"]
        lines += [table([*header, "how; peak of a step by batch"], cells), ""]
    return lines


def _not_reached(results: Results) -> dict[str, list[str]]:
    """What each phase was to measure and did not come to; nothing in files that do not say."""
    found: dict[str, list[str]] = results.data.get("not_reached", {})
    return {phase: items for phase, items in found.items() if items}


# --- cells -------------------------------------------------------------------------------------


def _ms(row: dict[str, Any] | None) -> str:
    found = spread(total_ms(row)) if row and row["cannot"] is None else None
    return "-" if found is None else f"{found.median:.3g}" if found.median < 100 else (
        f"{found.median:.0f}")  # fmt: skip


def _ratio(baseline: dict[str, Any] | None, row: dict[str, Any] | None) -> Spread | None:
    found = ratio(baseline, row) if baseline and row else None
    return None if found is None else expected(found)


def _times(value: Spread | None) -> str:
    if value is None:
        return "-"
    digits = 2 if value.median < 10 else 1
    return f"{value.median:.{digits}f}x ({value.low:.{digits}f}-{value.high:.{digits}f})"


def _bold(value: Spread | None) -> str:
    text = _times(value)
    return text if value is None else f"**{text.split(' ')[0]}** {text.split(' ')[1]}"


def _mib(peak: Any) -> str:
    return f"{peak / MIB:.3g}" if isinstance(peak, int) and peak < 100 * MIB else (
        f"{peak / MIB:.0f}" if isinstance(peak, int) else "-")  # fmt: skip


def _errors(row: dict[str, Any] | None) -> str:
    if row is None or row["cannot"] is not None:
        return "-"
    return f"{row['loss_error']:.0e}, {row['grad_error']:.0e}"


def _short(provider: str) -> str:
    return provider.removeprefix("heteroakd[").removesuffix("]")
