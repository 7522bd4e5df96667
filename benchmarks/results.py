"""What a run found: rows as `results.csv` holds them, statistics of samples, ratios."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from .cases import Case, Suite
from .floor import Rates
from .providers import EAGER
from .timing import Timed

__all__ = [
    "RUN_TO_RUN",
    "Results",
    "Row",
    "Spread",
    "best_compiled",
    "expected",
    "load",
    "ours",
    "ratio",
    "row_of",
    "save",
    "spread",
]

#: Of two runs of the suite on two idle cores, nine in ten ratios agreed within 13 %, while one in
#: six lay outside the range of the first run's samples.
RUN_TO_RUN = 0.15
FILE = "results.csv"
OURS = "heteroakd["
MIB = 2**20


class Spread(NamedTuple):
    """Median, and the range that holds the middle 80 % of the samples."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread | None:
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0]) if samples else None
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), tenths[0], tenths[-1])


@dataclass
class Row:
    """One provider on one case: a line of the file. None: not measured."""

    case: Case
    setting: str
    """Key of `Results.settings`"""
    provider: str
    cannot: str = ""
    """Why there are no times"""
    forward_ms: float | None = None
    backward_ms: float | None = None
    total_ms: float | None = None
    """Median of forward + backward of each round, as are its 10th and 90th percentile"""
    total_ms_p10: float | None = None
    total_ms_p90: float | None = None
    graph_ms: float | None = None
    """Median of replays of a CUDA graph"""
    rounds: int = 0
    peak_mib: float | None = None
    floor_ms: float | None = None
    floor_binds: str = ""
    loss_error: float | None = None
    grad_error: float | None = None

    @property
    def total(self) -> Spread | None:
        if self.total_ms is None or self.total_ms_p10 is None or self.total_ms_p90 is None:
            return None
        return Spread(self.total_ms, self.total_ms_p10, self.total_ms_p90)


def row_of(case: Case, setting: str, visits: Iterable[Timed], floor: tuple[float, str]) -> Row:
    """The row of one provider, of all samples of its visits."""
    visits = list(visits)

    def samples(name: str) -> list[float]:
        return [value for one in visits for value in getattr(one, name)]

    def first(name: str) -> Any:
        return next((x for one in visits if (x := getattr(one, name)) not in (None, "")), None)

    def median(values: list[float]) -> float | None:
        return round(statistics.median(values), 4) if values else None

    forward, backward = samples("forward_ms"), samples("backward_ms")
    total = spread([f + b for f, b in zip(forward, backward, strict=True)])
    middle, low, high = [round(value, 4) for value in total] if total else [None] * 3
    peak = first("peak_bytes")
    return Row(
        case,
        setting,
        visits[0].provider,
        cannot="" if total else first("cannot") or "",
        forward_ms=median(forward),
        backward_ms=median(backward),
        total_ms=middle,
        total_ms_p10=low,
        total_ms_p90=high,
        graph_ms=median(samples("graph_ms")),
        rounds=len(forward),
        peak_mib=peak and round(peak / MIB, 2),
        floor_ms=round(floor[0], 4) or None,
        floor_binds=floor[1],
        loss_error=first("loss_error"),
        grad_error=first("grad_error"),
    )


def ratio(baseline: Row | None, row: Row | None) -> Spread | None:
    """How many times faster `row` is than `baseline`: the ratio of the medians, and the range of
    the samples: each side's middle 80 % against the other's."""
    theirs, mine = (one.total if one else None for one in (baseline, row))
    if theirs is None or mine is None or min(theirs.low, mine.low) <= 0.0:
        return None
    return Spread(theirs.median / mine.median, theirs.low / mine.high, theirs.high / mine.low)


def expected(found: Spread) -> Spread:
    """Where the ratio of another run is expected: a run differs from the next by more than its
    own samples tell."""
    low, high = found.median * (1.0 - RUN_TO_RUN), found.median * (1.0 + RUN_TO_RUN)
    return Spread(found.median, min(found.low, low), max(found.high, high))


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(
        (row for row in rows if row.total), key=lambda row: row.total_ms or 0.0, default=None
    )


def ours(rows: dict[str, Row]) -> Row | None:
    """The fastest of this package's backends that could; `reference` only for want of any."""
    able = [row for name, row in rows.items() if name.startswith(OURS)]
    compiled = [row for row in able if row.provider != OURS + "reference]"]
    return _fastest(compiled) or _fastest(able)


def best_compiled(rows: dict[str, Row]) -> Row | None:
    """The fastest of the graphs of `torch.compile`."""
    return _fastest(row for name, row in rows.items() if name.startswith("compile"))


@dataclass
class Results:
    """One run of the suite."""

    name: str
    groups: Suite
    about: dict[str, Any]
    """Machine and versions, see `provenance.describe`"""
    settings: dict[str, str]
    """Name -> how the rows of it were measured"""
    rates: Rates
    rows: list[Row] = field(default_factory=list)
    missed: dict[str, list[str]] = field(default_factory=dict)
    """What each phase was to measure and did not come to"""
    seconds: float = 0.0
    interrupted: bool = False

    def of(self, case: Case, setting: str = "main") -> dict[str, Row]:
        """Rows of a case by provider."""
        return by_provider(self.rows, case, setting)

    def measured(self, group: str) -> list[Case]:
        """The cases of a group that have rows."""
        return [one for one in self.groups.get(group, []) if self.of(one)]


def by_provider(rows: Iterable[Row], case: Case, setting: str = "main") -> dict[str, Row]:
    return {row.provider: row for row in rows if row.case == case and row.setting == setting}


_CASE = [one.name for one in fields(Case)]
_VALUES = [one.name for one in fields(Row) if one.name != "case"]
_TEXT = {"setting", "provider", "cannot", "floor_binds"}


def save(rows: Sequence[Row], directory: Path) -> None:
    """Write `results.csv`, whole or not at all."""
    temporary = directory / f"{FILE}.part"
    with temporary.open("w", newline="") as file:
        columns = [*_CASE, *_VALUES, "speedup_over_eager"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            faster = ratio(by_provider(rows, row.case, row.setting).get(EAGER), row)
            line = {**row.case.fields(), **{name: getattr(row, name) for name in _VALUES}}
            line["speedup_over_eager"] = round(faster.median, 3) if faster else None
            writer.writerow(line)
    temporary.replace(directory / FILE)


def load(path: Path) -> list[Row]:
    """The rows of a `results.csv`, or of the one in a directory.

    Raises:
        ValueError: it is not one; names the file.
    """
    path = path / FILE if path.is_dir() else path
    hint = "give the results.csv that `python -m benchmarks` writes, or its folder"
    try:
        with path.open(newline="") as file:
            rows = [_row(line) for line in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: not a result file ({error!r}); {hint}") from None
    if not rows:
        raise ValueError(f"{path}: not a result file (it has no rows); {hint}")
    return rows


def _row(line: dict[str, str]) -> Row:
    known: dict[str, Any] = {}
    for name in _CASE:
        text = line[name]
        is_text = name in ("objective", "dataset", "dtype")
        known[name] = text if is_text else text == "True" if name == "align_corners" else int(text)
    values: dict[str, Any] = {name: line[name] if name in _TEXT else _number(line[name])
              for name in _VALUES if name in line}  # fmt: skip
    return Row(Case(**known), **values)


def _number(text: str) -> Any:
    return None if not text else int(text) if text.isdigit() else float(text)
