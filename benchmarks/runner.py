"""One run of a suite: times, peaks of memory, a few times again in other settings.

`results.csv` is rewritten after each case, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import floor, memory, provenance, timing
from .cases import Case, Suite, cases_of, select
from .providers import EAGER, find
from .results import MIB, OURS, Results, row_of, save
from .stages import Details, execute, follow

__all__ = ["PHASES", "Plan", "providers_of", "run"]

#: Keeps freed memory in the process. With the default, page faults double the time of eager
#: PyTorch, whose tensors are larger, and flatter whoever allocates less.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "99999999999",
    "MALLOC_TOP_PAD_": "268435456",
}
REFERENCE = f"{OURS}reference]"
CURVES = ("strides", "pixels", "classes", "batches")
#: On a CPU a graph with the interpolation inside is slower than one without: the weaker baseline.
WEAK_ON_CPU = ("compile-whole",)
#: Groups whose peaks of memory are measured
PEAKS = ("headline", "training", "large", "objectives", "projections", "batches", "evaluation")
#: What is measured, in this order, and the share of the time at which each ends: it leaves out its
#: last cases for those after it.
PHASES = {"times": 0.6, "memory": 0.9, "settings": 1.0}


@dataclass(frozen=True)
class Plan:
    suite: str
    device: str
    output: Path
    seconds: float = 0.0
    """For the whole run; 0: no limit. Cases are begun in the order of the suite."""
    only: tuple[str, ...] = ()
    """What to measure, as `cases.select` takes it; empty: all of the suite"""
    providers: tuple[str, ...] = ()
    """Names to time; empty: all that fit"""
    visits: int = 2
    rounds: int = 5
    phases: tuple[str, ...] = tuple(PHASES)
    say: Callable[[str], None] = field(default=print)


def run(plan: Plan) -> Results:
    """Measure, save, and return what was found; interrupted, what there was until then."""
    suite = select(plan.suite, plan.only)
    names = providers_of(suite, plan)
    plan.say(f"suite {plan.suite}: {len(names)} cases on {plan.device}")
    settings = {"main": "CUDA events; inputs rotated through more than the second-level cache"}
    if plan.device == "cpu":
        malloc = " ".join(f"{name}={value}" for name, value in TUNED_MALLOC.items())
        settings = {
            "main": f"{torch.get_num_threads()} threads, {malloc}",
            "default-malloc": "as main, with malloc as the system ships it: page faults of freshly "
            "mapped memory are part of everybody's time",
            "1 thread": "as main, with one thread",
        }
    rates = floor.measure_rates(plan.device)
    about = provenance.describe(plan.device)
    results = Results(plan.suite, suite, about, settings, rates)
    plan.output.mkdir(parents=True, exist_ok=True)
    work = _Run(plan, suite, names, results)
    started = time.time()
    phases = [name for name in PHASES if name in plan.phases]
    results.missed = {name: work.items(name) for name in phases}
    try:
        for name in phases:
            if plan.seconds:
                work.end = started + PHASES[name] * plan.seconds
            if results.missed[name] and work.left() > 0:
                plan.say(f"-- {name} ({time.time() - started:.0f} s)")
                getattr(work, f"measure_{name}")(results.missed[name])
    except KeyboardInterrupt:
        results.interrupted = True
    results.missed = {name: items for name, items in results.missed.items() if items}
    results.seconds = time.time() - started
    save(results.rows, plan.output)
    return results


def providers_of(suite: Suite, plan: Plan) -> dict[Case, list[str]]:
    """Whom to time on each case. On a CPU curves, which have many points, get the sides that
    matter: eager, and this package's compiled backends (`reference` where there is none)."""
    everyone = find()
    if unknown := set(plan.providers) - set(everyone):
        raise ValueError(f"--providers: got {sorted(unknown)}, known are {list(everyone)}")
    others = {one for name, group in suite.items() if name not in CURVES for one in group}
    chosen = {}
    for one in cases_of(suite):
        names = list(plan.providers) or list(everyone)
        if plan.device == "cpu" and not plan.providers:
            names = [name for name in names if name not in WEAK_ON_CPU]
            if one not in others:
                able = [name for name in names if name.startswith(OURS)
                        and everyone[name].cannot(one, plan.device) is None]  # fmt: skip
                names = [EAGER, *([name for name in able if name != REFERENCE] or able)]
        chosen[one] = names
    return chosen


class _Run:
    """The phases. Each is given the list of what it is to measure and removes what it did."""

    def __init__(
        self, plan: Plan, suite: Suite, names: dict[Case, list[str]], results: Results
    ) -> None:
        self.plan = plan
        self.suite = suite
        self.names = names
        self.results = results
        self.end = float("inf")
        self.floors = {
            one: (0.0, "") if one.target.models else floor.floor_ms(one, results.rates)
            for one in names
        }

    def left(self) -> float:
        return self.end - time.time()

    def items(self, phase: str) -> list[str]:
        if phase == "times":
            return [one.key for one in self.names]
        if phase == "memory":
            groups = {name: self.suite[name] for name in PEAKS if name in self.suite}
            return [one.key for one in cases_of(groups)]
        return list(self.results.settings)[1:]

    # --- times ---------------------------------------------------------------------------------

    def measure_times(self, pending: list[str]) -> None:
        self._time(self.plan, self.names, "main", pending)

    def measure_settings(self, pending: list[str]) -> None:
        """A few cases again with another malloc, and with one thread."""
        few = [one for one in self.suite.get("headline", []) if one in self.names]
        names = {one: [n for n in self.names[one] if n in (EAGER, "compile") or n.startswith(OURS)]
                 for one in few[:4]}  # fmt: skip
        for setting in list(pending):
            self._time(replace(self.plan, visits=1, rounds=3), names, setting, [])
            if any(row.setting == setting for row in self.results.rows):
                pending.remove(setting)

    def _time(
        self, plan: Plan, names: dict[Case, list[str]], setting: str, pending: list[str]
    ) -> None:
        """In a process of its own, and another one behind a case that ends it."""
        cases = {one.key: one for one in names}
        job = timing.Job(
            cases=list(names),
            providers={one.key: chosen for one, chosen in names.items()},
            device=plan.device,
            visits=plan.visits,
            rounds=plan.rounds if plan.device == "cpu" else 4 * plan.rounds,
            deadline=self.end if self.end < float("inf") else 0.0,
        )
        visits: dict[tuple[Case, str], list[timing.Timed]] = {}
        others = list(self.results.rows)

        def tell(event: Details) -> None:
            if event["name"] not in cases:
                return
            one, found = cases[event["name"]], event.get("found", {})
            rows = [timing.Timed(**row) for row in found.get("rows", [])]
            if "failed" in found:
                rows = [timing.Timed(name, found["failed"]) for name in names[one]]
            if not rows:
                return  # it begins, or there was no time for it
            if (one, rows[0].provider) not in visits:
                number = len({case for case, _ in visits}) + 1
                plan.say(f"[{number}/{len(cases)}] {one.key} {found.get('failed', '')}")
            for row in rows:
                visits.setdefault((one, row.provider), []).append(row)
            if one.key in pending:
                pending.remove(one.key)
            self.results.rows = [
                *others,
                *(row_of(case, setting, many, self.floors[case])
                  for (case, _), many in visits.items()),
            ]  # fmt: skip
            save(self.results.rows, plan.output)

        command = [sys.executable, "-m", "benchmarks.timing", job.to_json()]
        ran = follow(command, tell, self._execute(setting))
        if ran.code != 0:
            raise RuntimeError(f"the timing process ended with {ran.code}:\n{ran.tail}")

    def _execute(self, setting: str) -> Callable[..., Any]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        if self.plan.device == "cpu" and setting != "default-malloc":
            environment |= TUNED_MALLOC
        if setting == "1 thread":
            environment["OMP_NUM_THREADS"] = "1"
        return partial(execute, environment=environment)

    # --- memory --------------------------------------------------------------------------------

    def measure_memory(self, pending: list[str]) -> None:
        if self.plan.device == "cpu" and (reason := memory.supported()):
            self.plan.say(f"   left out: {reason}")
            pending.clear()
            return
        for key in list(pending):
            one = next(case for case in self.names if case.key == key)
            rows = self.results.of(one)
            if not rows:
                continue  # its time was over
            able = {name: row for name, row in rows.items() if row.total}
            if any(name.startswith(OURS) and name != REFERENCE for name in able):
                able.pop(REFERENCE, None)  # it is there for want of a kernel only
            for name, row in able.items():
                if self.left() < 0:
                    return
                if row.peak_mib is None:  # on a GPU it was measured beside the times
                    try:
                        peak = memory.peak_bytes(one, name, self.plan.device)
                    except RuntimeError as error:
                        self.plan.say(f"   {key}: {name}: {error}")
                        continue
                    row.peak_mib = round(peak / MIB, 2)
            peaks = [f"{name} {row.peak_mib:.0f} MiB" for name, row in able.items() if row.peak_mib]
            self.plan.say(f"   {key}: {', '.join(peaks)}")
            pending.remove(key)
            save(self.results.rows, self.plan.output)
