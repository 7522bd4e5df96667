"""A result file: what it holds, statistics of its samples, JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

from .cases import Case
from .providers import EAGER

__all__ = ["SCHEMA", "Results", "Spread", "expected", "ratio", "spread"]

SCHEMA = 1
#: Of two runs of the suite on two idle cores, nine in ten ratios agreed within 13 %, while one in
#: six lay outside the range of the first run's samples.
RUN_TO_RUN = 0.15
_OURS = "heteroakd["
_PARTS = (
    "suite", "environment", "settings", "rates", "floors", "groups", "cases", "rows", "peak_bytes",
    "crops", "crop_budget", "steps", "step_batches", "seconds",
)  # fmt: skip


class Spread(NamedTuple):
    """Median, and the range that holds the middle 80 % of the samples."""

    median: float
    low: float
    high: float


def spread(samples: list[float]) -> Spread | None:
    if not samples:
        return None
    return Spread(_quantile(samples, 0.5), _quantile(samples, 0.1), _quantile(samples, 0.9))


def _quantile(samples: list[float], q: float) -> float:
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])


def total_ms(row: dict[str, Any]) -> list[float]:
    """Forward + backward of each round."""
    return [f + b for f, b in zip(row["forward_ms"], row["backward_ms"], strict=True)]


def ratio(baseline: dict[str, Any], row: dict[str, Any]) -> Spread | None:
    """How many times faster `row` is than `baseline`: the ratio of the medians, and the range of
    the samples: each side's middle 80 % against the other's."""
    theirs, ours = spread(total_ms(baseline)), spread(total_ms(row))
    if theirs is None or ours is None or min(theirs.low, ours.low) <= 0.0:
        return None
    return Spread(theirs.median / ours.median, theirs.low / ours.high, theirs.high / ours.low)


def expected(found: Spread) -> Spread:
    """Where the ratio of another run is expected: a run differs from the next by more than its
    own samples tell."""
    low, high = found.median * (1.0 - RUN_TO_RUN), found.median * (1.0 + RUN_TO_RUN)
    return Spread(found.median, min(found.low, low), max(found.high, high))


class Results:
    """One run of the suite."""

    def __init__(self, data: dict[str, Any]) -> None:
        if data.get("schema") != SCHEMA:
            raise ValueError(f"results: got schema {data.get('schema')}, expected {SCHEMA}")
        if missing := [name for name in _PARTS if name not in data]:
            raise ValueError(f"results: the file lacks {', '.join(missing)}")
        self.data = data
        self.cases = {fields["key"]: _case(fields) for fields in data["cases"]}

    @classmethod
    def load(cls, path: Path) -> Results:
        path = path / "results.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict):
                raise ValueError("no object in it")
            return cls(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a result file ({error})") from None

    def rows(self, key: str, setting: str = "main") -> dict[str, dict[str, Any]]:
        """Rows of a case by provider."""
        return {
            row["provider"]: row
            for row in self.data["rows"]
            if row["case"] == key and row["setting"] == setting
        }

    def group(self, name: str) -> list[Case]:
        return [self.cases[key] for key in self.data["groups"].get(name, [])]

    def ours(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """The fastest of this package's backends that could; `reference` only for want of any."""
        able = [row for row in rows.values() if row["provider"].startswith(_OURS)
                and row["cannot"] is None and row["forward_ms"]]  # fmt: skip
        compiled = [row for row in able if row["provider"] != _OURS + "reference]"]
        return min(compiled or able, key=lambda row: spread(total_ms(row)) or (0.0, 0.0, 0.0),
                   default=None)  # fmt: skip

    def best_compiled(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        able = [row for name, row in rows.items() if name.startswith("compile")
                and row["cannot"] is None and row["forward_ms"]]  # fmt: skip
        return min(able, key=lambda row: spread(total_ms(row)) or (0.0, 0.0, 0.0), default=None)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / "results.json.part"
        temporary.write_text(json.dumps(self.data, indent=1))
        temporary.replace(directory / "results.json")
        self._save_csv(directory / "results.csv")

    def _save_csv(self, path: Path) -> None:
        columns = [
            "objective", "dataset", "batch", "classes", "height", "width", "stride",
            "teacher_stride", "align_corners", "dtype", "channels", "setting", "provider", "cannot",
            "forward_ms", "backward_ms", "total_ms", "total_ms_p10", "total_ms_p90", "graph_ms",
            "rounds", "speedup_over_eager", "peak_mib", "floor_ms", "loss_error", "grad_error",
        ]  # fmt: skip
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            for row in self.data["rows"]:
                fields = self.cases[row["case"]].fields()
                writer.writerow({**fields, **self._numbers(row)})

    def _numbers(self, row: dict[str, Any]) -> dict[str, Any]:
        both = spread(total_ms(row))
        eager = self.rows(row["case"], row["setting"]).get(EAGER)
        faster = ratio(eager, row) if eager else None
        peak = self.data["peak_bytes"].get(row["case"], {}).get(row["provider"])

        def median(name: str) -> float | str:
            found = spread(row[name])
            return round(found.median, 4) if found else ""

        return {
            **{name: row[name] for name in ("setting", "provider", "loss_error", "grad_error")},
            "cannot": row["cannot"] or "",
            "forward_ms": median("forward_ms"),
            "backward_ms": median("backward_ms"),
            "graph_ms": median("graph_ms"),
            "total_ms": round(both.median, 4) if both else "",
            "total_ms_p10": round(both.low, 4) if both else "",
            "total_ms_p90": round(both.high, 4) if both else "",
            "rounds": len(row["forward_ms"]),
            "speedup_over_eager": round(faster.median, 3) if faster else "",
            "peak_mib": round(peak / 2**20, 2) if isinstance(peak, int) else "",
            "floor_ms": round(self.data["floors"][row["case"]]["ms"], 4),
        }


def _case(fields: dict[str, Any]) -> Case:
    return Case(**{name: value for name, value in fields.items() if name != "key"})
