"""`python -m benchmarks gate`: has a kernel become slower? For CI; red is exit code 1.

Two checks, none of an absolute time: instructions per pixel and class against those in gate.json,
and the time of eager PyTorch divided by ours against loose lower limits, for catching disasters
that instructions do not show. `--update` writes what was measured as the new baselines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from . import instructions
from .cases import Case, case
from .inputs import make_inputs
from .providers import EAGER, find
from .timing import elapsed_ms

__all__ = ["Measured", "gone", "main", "measure", "report", "updated"]

BASELINES: Final = Path(__file__).with_name("gate.json")
TOLERANCE: Final = 0.03
#: Where the compiler, torch or another tool differs from the baseline's.
LOOSE_TOLERANCE: Final = 0.25
#: Lower limits of the ratios, as a fraction of what is measured when they are written.
LIMIT_OF_MEASURED: Final = 0.5
ROUNDS: Final = 40

#: What is measured of which cases.
CASES: Final[dict[str, list[Case]]] = {
    "instructions": [
        *(
            case(objective, "Cityscapes", 1, stride, size=(128, 256))
            for objective in ("ce", "ce+kd", "ce+hetero", "ce+paper")
            for stride in (4, 8)
        ),
        case("ce", "ADE20K", 1, 4, size=(64, 128)),
    ],
    "time": [
        case("ce", "Cityscapes", 1, 4, size=(512, 512)),
        case("ce", "ADE20K", 1, 4, size=(256, 256)),
        case("ce+hetero", "Cityscapes", 1, 4, size=(512, 512)),
    ],
}

#: case key -> provider -> number
Table = dict[str, dict[str, float]]


@dataclass
class Measured:
    """One run of the gate."""

    tables: dict[str, Table] = field(default_factory=dict)
    """By the names of `CASES`"""
    taken_with: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Name -> why it is not in `tables`"""
    gone: dict[tuple[str, str], str] = field(default_factory=dict)
    """(case key, provider) of gate.json -> why it is no longer measured"""


def _rows(table: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, str, float]]:
    for key, by_provider in table.items():
        for provider, value in by_provider.items():
            yield key, provider, value


def judge(what: str, value: float, baseline: float | None, same_tools: bool) -> tuple[bool, str]:
    """Whether a number is red, and what to say of it."""
    if baseline is None:
        return False, "no baseline yet: run --update"
    if what == "time":
        red = value < baseline
        return red, "RED: eager / ours fell below the limit" if red else "ok"
    tolerance = TOLERANCE if same_tools else LOOSE_TOLERANCE
    change = value / baseline - 1
    red = change > tolerance
    verdict = f"{'RED: ' if red else ''}{change:+.1%} (tolerance {tolerance:.0%})"
    return red, verdict + (", improved: run --update to keep it" if change < -tolerance else "")


def updated(measured: Measured, baselines: Mapping[str, Any]) -> dict[str, Any]:
    """gate.json after `--update`; what was skipped stays as it was."""
    new = {**baselines, "taken_with": measured.taken_with or baselines.get("taken_with", {})}
    for what, table in measured.tables.items():
        factor, digits = (LIMIT_OF_MEASURED, 2) if what == "time" else (1.0, 3)
        new[what] = {
            key: {name: round(factor * value, digits) for name, value in by_provider.items()}
            for key, by_provider in table.items()
        }
    return new


# --- measuring ---------------------------------------------------------------------------------


def jobs_of(cases: Sequence[Case]) -> list[instructions.Job]:
    """Every compiled backend of ours on every case that it can run on the CPU."""
    ours = [who for name, who in find().items()
            if name.startswith("heteroakd[") and name != "heteroakd[reference]"]  # fmt: skip
    return [(one, who.name) for one in cases for who in ours if who.cannot(one, "cpu") is None]


def gone(baselines: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Baselines that nothing is measured for: a kernel that is lost must not turn green."""
    found: dict[tuple[str, str], str] = {}
    for what, cases in CASES.items():
        by_key = {one.key: one for one in cases}
        for key, provider, _ in _rows(baselines.get(what, {})):
            who = find().get(provider)
            if key not in by_key:
                found[key, provider] = "the gate no longer has this case: run --update"
            elif who is None:
                found[key, provider] = "no backend has this name: run --update"
            elif reason := who.cannot(by_key[key], "cpu"):
                found[key, provider] = f"cannot run here: {reason}"
    return found


def compare_times(jobs: Sequence[instructions.Job]) -> list[float]:
    """Medians over interleaved rounds of eager's time divided by the provider's, one thread."""
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second core that others use would count against either
    try:
        for one, provider in jobs:
            inputs = make_inputs(one)
            pair = [find()[name].build(one, inputs) for name in (EAGER, provider)]
            ratios = []
            for _ in range(ROUNDS + 1):
                eager, ours = (sum(elapsed_ms(forward, inputs, "cpu")) for forward in pair)
                ratios.append(eager / ours)
            found.append(statistics.median(ratios[1:]))
    finally:
        torch.set_num_threads(threads)
    return found


def measure(baselines: Mapping[str, Any]) -> Measured:
    """Everything that can be measured here."""
    result = Measured(gone=gone(baselines))
    jobs = {what: jobs_of(cases) for what, cases in CASES.items()}
    values = {"time": compare_times(jobs["time"])}
    if reason := instructions.missing():
        result.skipped["instructions"] = reason
    elif jobs["instructions"]:
        values["instructions"], result.taken_with = instructions.count(jobs["instructions"])
    for what, numbers in values.items():
        table: Table = {}
        for (one, provider), value in zip(jobs[what], numbers, strict=True):
            table.setdefault(one.key, {})[provider] = value
        result.tables[what] = table
    return result


# --- the command -------------------------------------------------------------------------------


def report(measured: Measured, baselines: Mapping[str, Any]) -> tuple[str, bool]:
    """What to print, and whether it is red."""
    before = baselines.get("taken_with", {})
    same_tools = before == measured.taken_with
    lines = [f"{'what':12}  {'case':46}  {'provider':16}  {'measured':>8}  {'baseline':>8}"]
    failures = 0
    for what, table in measured.tables.items():
        for key, provider, value in _rows(table):
            baseline = baselines.get(what, {}).get(key, {}).get(provider)
            red, verdict = judge(what, value, baseline, same_tools)
            failures += red
            shown = f"{'-':>8}" if baseline is None else f"{baseline:8.2f}"
            lines.append(f"{what:12}  {key:46}  {provider:16}  {value:8.2f}  {shown}  {verdict}")
    for (key, provider), reason in measured.gone.items():
        failures += 1
        lines.append(f"{'gone':12}  {key:46}  {provider:16}  RED: has a baseline, but {reason}")
    lines += [f"{what}: skipped: {reason}" for what, reason in measured.skipped.items()]
    lines += [
        f"note: baselines were taken with {name} {before[name]}, this is {value}"
        for name, value in measured.taken_with.items()
        if before.get(name, value) != value
    ]
    lines.append(f"gate: RED: {failures} checks failed" if failures else "gate: green")
    return "\n".join(lines), failures > 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gate", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the baselines anew")
    options = parser.parse_args(arguments)
    try:
        baselines = json.loads(BASELINES.read_text()) if BASELINES.exists() else {}
        if not baselines and not options.update:
            raise RuntimeError(f"{BASELINES.name} is missing; run --update")
        measured = measure(baselines)
    # What cannot be measured is no regression, but must not pass for green either.
    except (RuntimeError, ValueError, subprocess.SubprocessError) as error:
        print(f"gate: RED: {error}", file=sys.stderr)
        return 1
    if options.update:
        baselines, measured.gone = updated(measured, baselines), {}
        BASELINES.write_text(json.dumps(baselines, indent=2) + "\n")
    text, red = report(measured, baselines)
    print(text)
    return int(red)


if __name__ == "__main__":
    raise SystemExit(main())
