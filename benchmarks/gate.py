"""`python -m benchmarks.gate`: has a kernel become slower? For CI; red is exit code 1.

Three checks, none of an absolute time: instructions per pixel and class against the baselines in
gate.json, and time and peak memory of eager PyTorch divided by ours against loose lower limits,
for catching disasters. `--update` writes what was measured as the new baselines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from . import instructions, memory
from .cases import Case, case
from .inputs import make_inputs
from .providers import EAGER, Forward, find

__all__ = ["Check", "Measured", "judge", "main", "updated"]

BASELINES: Final = Path(__file__).with_name("gate.json")

#: For a new baseline; an entry in gate.json keeps its own.
TOLERANCE: Final = 0.03
#: Where the compiler, torch or another tool differs from the baseline's.
LOOSE_TOLERANCE: Final = 0.25
#: Lower limits of the ratios, as a fraction of what is measured when they are written.
LIMIT_OF_MEASURED: Final = 0.5

COUNTED: Final = [
    *(
        case(objective, "Cityscapes", 1, stride, size=(128, 256))
        for objective in ("ce", "ce+kd", "ce+hetero", "ce+paper")
        for stride in (4, 8)
    ),
    case("ce", "ADE20K", 1, 4, size=(64, 128)),
]
COMPARED: Final = [
    case("ce", "Cityscapes", 1, 4, size=(512, 512)),
    case("ce", "ADE20K", 1, 4, size=(256, 256)),
    case("ce+hetero", "Cityscapes", 1, 4, size=(512, 512)),
]

#: case key -> provider -> number
Table = dict[str, dict[str, float]]


@dataclass
class Measured:
    """One run of the gate. A part that is None was skipped, and `skipped` says why."""

    instructions: Table | None
    taken_with: dict[str, str]
    time: Table | None
    memory: Table | None
    skipped: dict[str, str]
    gone: dict[tuple[str, str], str]
    """(case key, provider) of gate.json -> why it is no longer measured."""


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    what: str
    case: str
    provider: str
    measured: float | None
    limit: float | None
    red: bool
    verdict: str


def judge(measured: Measured, baselines: Mapping[str, Any]) -> list[Check]:
    """Every number against its limit."""
    checks = [
        Check("gone", key, provider, None, None, True, f"has a baseline, but {reason}")
        for (key, provider), reason in measured.gone.items()
    ]
    counted = baselines.get("instructions", {})
    same_tools = counted.get("taken_with") == measured.taken_with
    for key, provider, value in _rows(measured.instructions):
        baseline = counted.get("baselines", {}).get(key, {}).get(provider)
        checks.append(_judge_count(key, provider, value, baseline, same_tools))
    for what, table in (("time", measured.time), ("memory", measured.memory)):
        for key, provider, value in _rows(table):
            limit = baselines.get("ratios", {}).get(key, {}).get(provider, {}).get(what)
            if limit is None:
                red, verdict = False, "no baseline yet: run --update"
            else:
                red = value < limit
                verdict = "RED: eager / ours fell below the limit" if red else "ok"
            checks.append(Check(what, key, provider, value, limit, red, verdict))
    return checks


def _judge_count(
    key: str, provider: str, value: float, baseline: Mapping[str, float] | None, same_tools: bool
) -> Check:
    if baseline is None:
        verdict = "no baseline yet: run --update"
        return Check("instructions", key, provider, value, None, False, verdict)
    expected = baseline["instructions_per_pixel_class"]
    tolerance = baseline["tolerance"]
    if not same_tools:
        tolerance = max(tolerance, LOOSE_TOLERANCE)
    change = value / expected - 1
    red = change > tolerance
    verdict = f"{change:+.1%} (tolerance {tolerance:.0%})"
    if red:
        verdict = f"RED: {verdict}"
    elif change < -tolerance:
        verdict += ", improved: run --update to keep it"
    limit = expected * (1 + tolerance)
    return Check("instructions", key, provider, value, limit, red, verdict)


def updated(measured: Measured, baselines: Mapping[str, Any]) -> dict[str, Any]:
    """gate.json after `--update`; what was skipped stays as it was."""
    counted = baselines.get("instructions", {})
    if measured.instructions is not None:
        old = counted.get("baselines", {})
        new: dict[str, dict[str, dict[str, float]]] = {}
        for key, provider, value in _rows(measured.instructions):
            tolerance = old.get(key, {}).get(provider, {}).get("tolerance", TOLERANCE)
            new.setdefault(key, {})[provider] = {
                "instructions_per_pixel_class": round(value, 3),
                "tolerance": tolerance,
            }
        counted = {"taken_with": measured.taken_with, "baselines": new}

    limits: dict[str, dict[str, dict[str, float]]] = {}
    for what, table in (("time", measured.time), ("memory", measured.memory)):
        if table is None:
            for key, by_provider in baselines.get("ratios", {}).items():
                for provider, kept in by_provider.items():
                    if what in kept and (key, provider) not in measured.gone:
                        entry = limits.setdefault(key, {}).setdefault(provider, {})
                        entry[what] = kept[what]
        for key, provider, value in _rows(table):
            limit = round(LIMIT_OF_MEASURED * value, 2)
            limits.setdefault(key, {}).setdefault(provider, {})[what] = limit
    return {"instructions": counted, "ratios": limits}


def _rows(table: Table | None) -> list[tuple[str, str, float]]:
    return [
        (key, provider, value)
        for key, by_provider in (table or {}).items()
        for provider, value in by_provider.items()
    ]


def jobs_of(cases: Sequence[Case]) -> list[instructions.Job]:
    """Every compiled backend of ours on every case that it can run on the CPU."""
    ours = [
        one
        for name, one in find().items()
        if name.startswith("heteroakd[") and name != "heteroakd[reference]"
    ]
    return [(one, who.name) for one in cases for who in ours if who.cannot(one, "cpu") is None]


def gone(baselines: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Baselines that nothing is measured for: a kernel that is lost must not turn green."""
    found: dict[tuple[str, str], str] = {}
    for kept, cases in (
        (baselines.get("instructions", {}).get("baselines", {}), COUNTED),
        (baselines.get("ratios", {}), COMPARED),
    ):
        by_key = {one.key: one for one in cases}
        measured = {(one.key, provider) for one, provider in jobs_of(cases)}
        for key, by_provider in kept.items():
            for provider in by_provider:
                if (key, provider) in measured:
                    continue
                who = find().get(provider)
                if key not in by_key:
                    reason = "the gate no longer has this case: run --update"
                elif who is None:
                    reason = "no backend has this name: run --update"
                else:
                    reason = f"cannot run here: {who.cannot(by_key[key], 'cpu')}"
                found[key, provider] = reason
    return found


def compare_times(jobs: Sequence[instructions.Job], seconds: float = 10.0) -> Table:
    """Median over interleaved rounds of eager's time divided by the provider's, one thread."""
    table: Table = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second core that others use would count against either
    try:
        for one, provider in jobs:
            inputs = make_inputs(one)
            pair = [find()[name].build(one, inputs) for name in (EAGER, provider)]
            for forward in pair:
                _step(forward)
            ratios: list[float] = []
            end = time.perf_counter() + seconds / len(jobs)
            while len(ratios) < 5 or time.perf_counter() < end:
                eager, ours = (_step(forward) for forward in pair)
                ratios.append(eager / ours)
            table.setdefault(one.key, {})[provider] = statistics.median(ratios)
    finally:
        torch.set_num_threads(threads)
    return table


def _step(forward: Forward) -> float:
    start = time.perf_counter()
    forward().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def compare_memory(jobs: Sequence[instructions.Job]) -> Table:
    """Eager's peak divided by the provider's."""
    table: Table = {}
    eager: dict[str, int] = {}
    for one, provider in jobs:
        if one.key not in eager:
            eager[one.key] = memory.peak_bytes(one, EAGER)
        ratio = eager[one.key] / max(memory.peak_bytes(one, provider), 1)
        table.setdefault(one.key, {})[provider] = ratio
    return table


def measure(baselines: Mapping[str, Any]) -> Measured:
    """Everything that can be measured here."""
    result = Measured(None, {}, None, None, {}, gone(baselines))
    reason = instructions.missing()
    if reason is not None:
        result.skipped["instructions"] = reason
    else:
        jobs = jobs_of(COUNTED)
        counts = instructions.count(jobs) if jobs else instructions.Counts([], {})
        table: Table = {}
        for (one, provider), value in zip(jobs, counts.per_pixel_class, strict=True):
            table.setdefault(one.key, {})[provider] = value
        result.instructions, result.taken_with = table, counts.taken_with
    compared = jobs_of(COMPARED)
    result.time = compare_times(compared)
    reason = memory.supported()
    if reason is not None:
        result.skipped["memory"] = reason
    else:
        result.memory = compare_memory(compared)
    return result


def report(
    measured: Measured, baselines: Mapping[str, Any], require_instructions: bool = False
) -> tuple[str, bool]:
    """What to print, and whether it is red."""
    checks = judge(measured, baselines)
    lines = [
        f"{check.what:12}  {check.case:46}  {check.provider:16}  {_number(check.measured)}"
        f"  {_number(check.limit)}  {check.verdict}"
        for check in checks
    ]
    head = f"{'what':12}  {'case':46}  {'provider':16}  {'measured':>8}  {'limit':>8}"
    lines.insert(0, head)
    lines += [f"{what}: skipped: {reason}" for what, reason in measured.skipped.items()]
    taken_with = baselines.get("instructions", {}).get("taken_with", {})
    if measured.instructions is not None and taken_with:
        lines += [
            f"note: baselines were taken with {name} {taken_with.get(name)}, this is {value}"
            for name, value in measured.taken_with.items()
            if taken_with.get(name) != value
        ]
    failures = sum(check.red for check in checks)
    reasons = [f"{failures} of {len(checks)} checks failed"] if failures else []
    if require_instructions and "instructions" in measured.skipped:
        reasons.append("instructions had to be counted (--require-instructions)")
    lines.append(f"gate: RED: {'; '.join(reasons)}" if reasons else "gate: green")
    return "\n".join(lines), bool(reasons)


def _number(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the baselines anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument(
        "--require-instructions",
        action="store_true",
        help="red where instructions cannot be counted, instead of skipping them",
    )
    options = parser.parse_args(arguments)
    try:
        baselines = json.loads(BASELINES.read_text()) if BASELINES.exists() else {}
    except ValueError as error:
        print(f"gate: RED: {BASELINES.name} is no JSON: {error}", file=sys.stderr)
        return 1
    if not baselines and not options.update:
        print(f"gate: RED: {BASELINES.name} is missing; run --update", file=sys.stderr)
        return 1
    try:
        measured = measure(baselines)
    # What cannot be measured is no regression, but must not pass for green either.
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"gate: RED: {error}", file=sys.stderr)
        return 1
    if options.update:
        measured_baselines = updated(measured, baselines)
        BASELINES.write_text(json.dumps(measured_baselines, indent=2) + "\n")
        baselines, measured.gone = measured_baselines, {}
    text, red = report(measured, baselines, options.require_instructions)
    print(text)
    if options.json:
        content = {
            "instructions_per_pixel_class": measured.instructions,
            "taken_with": measured.taken_with,
            "eager_over_ours": {"time": measured.time, "memory": measured.memory},
            "skipped": measured.skipped,
            "checks": [asdict(check) for check in judge(measured, baselines)],
            "red": red,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(red)


if __name__ == "__main__":
    raise SystemExit(main())
