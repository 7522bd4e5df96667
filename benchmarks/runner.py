"""One run of a suite: times, peaks, largest crops, whole training steps, into one result file.

The file is written after each phase, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import floor, memory, provenance, steps, timing
from .cases import Case, Suite, case, cases_of, select
from .providers import EAGER, find
from .results import SCHEMA, Results

__all__ = ["Plan", "run"]

MIB = 2**20
#: Keeps freed memory in the process. With the default, page faults double the time of eager
#: PyTorch, whose tensors are larger, and flatter whoever allocates less.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "99999999999",
    "MALLOC_TOP_PAD_": "268435456",
}
PHASES = ("times", "memory", "default-malloc", "threads", "crops", "steps")
REFERENCE = "heteroakd[reference]"
CURVES = ("strides", "pixels", "classes", "batches")
#: On a CPU a graph with the interpolation inside is slower than one without: the weaker baseline.
WEAK_ON_CPU = ("compile-whole",)
#: Groups whose peaks of memory are measured
PEAKS = ("headline", "large", "objectives", "projections", "batches")
#: Objectives whose largest crop is measured
CROPS = ("ce", "ce+hetero")
CROP_BUDGET = 512 * MIB
STEP_BUDGET = {"cpu": 4096 * MIB, "cuda": 40 * 1024 * MIB}


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
    phases: tuple[str, ...] = PHASES
    say: Callable[[str], None] = field(default=print)


def run(plan: Plan) -> Results:
    """Measures, saves, and returns what it found."""
    started = time.time()
    deadline = started + plan.seconds if plan.seconds else 0.0
    suite = select(plan.suite, plan.only)
    cases = list(cases_of(suite))
    extra = _single_thread_case(suite) if plan.device == "cpu" else None
    plan.say(f"suite {plan.suite}: {len(cases)} cases on {plan.device}")
    rates = floor.measure_rates(plan.device)
    floors = {}
    for one in cases:
        milliseconds, binds = floor.floor_ms(one, rates)
        floors[one.key] = {"ms": milliseconds, "binds": binds}
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": plan.suite,
        "visits": plan.visits,
        "rounds": plan.rounds,
        "environment": provenance.describe(plan.device),
        "settings": {"main": _setting_text(plan.device)},
        "rates": rates.as_dict(),
        "floors": floors,
        "groups": {name: [one.key for one in group] for name, group in suite.items()},
        "cases": [{"key": one.key, **one.fields()} for one in cases],
        "rows": [],
        "peak_bytes": {},
        "crops": [],
        "crop_budget": CROP_BUDGET,
        "steps": [],
        "step_batches": [],
        "seconds": 0.0,
        "not_reached": {},
    }
    results = Results(data)

    def left() -> float:
        return deadline - time.time() if deadline else float("inf")

    plan.output.mkdir(parents=True, exist_ok=True)

    # Each phase leaves its share to those after it, and drops its last cases for it.
    def until(share: float) -> float:
        return started + share * plan.seconds if plan.seconds else 0.0

    def left_until(share: float) -> Callable[[], float]:
        return lambda: until(share) - time.time() if plan.seconds else float("inf")

    names = _providers_of(suite, plan)
    #: name, what it measures, and the work, which removes from a list of these what it reached
    phases: list[tuple[str, Sequence[str], Callable[[list[str]], None]]] = []

    def phase(name: str, items: Sequence[str], work: Callable[[list[str]], None]) -> None:
        if name in plan.phases:
            phases.append((name, items, work))

    phase("times", [one.key for one in cases], lambda pending: _times(
        plan, cases, names, results, "main", pending, deadline=until(0.5)))  # fmt: skip
    peaks = list(cases_of({name: suite[name] for name in PEAKS if name in suite}))
    phase("memory", [one.key for one in peaks], lambda pending: _peaks(
        plan, peaks, names, results, pending, left_until(0.7)))  # fmt: skip
    if plan.device == "cpu":
        headline = suite.get("headline", [])[:4]
        few = {key: [n for n in names[key] if n in (EAGER, "compile") or n.startswith("heteroakd")]
               for key in (one.key for one in headline)}  # fmt: skip
        data["settings"]["default-malloc"] = "as main, with malloc as the system ships it"
        phase("default-malloc", list(few), lambda pending: _times(
            replace(plan, visits=1, rounds=3), headline, few, results, "default-malloc", pending,
            deadline=until(0.76)))  # fmt: skip
        if extra is not None:
            data["settings"]["1 thread"] = "as main, with one thread"
            ours = {extra.key: [n for n in names[extra.key] if n.startswith("heteroakd")]}
            once = replace(plan, visits=1)
            phase("threads", [extra.key], lambda pending: _times(
                once, [extra], ours, results, "1 thread", pending, threads=1))  # fmt: skip
    phase("crops", CROPS if plan.suite != "smoke" else (), lambda pending: _crops(
        plan, results, pending, left_until(0.86)))  # fmt: skip
    phase("steps", [one.key for one in steps.STEP_CASES[plan.suite]], lambda pending: _steps(
        plan, results, pending, left))  # fmt: skip

    # Whenever a run is stopped, its file names what it has not come to.
    data["not_reached"] = {name: list(items) for name, items, _ in phases}
    for name, items, work in phases:
        if items and left() > 0:
            plan.say(f"-- {name} ({time.time() - started:.0f} s)")
            work(data["not_reached"][name])
            data["seconds"] = round(time.time() - started, 1)
            results.save(plan.output)
    results.save(plan.output)
    return results


def _single_thread_case(suite: Suite) -> Case | None:
    group = suite.get("objectives") or suite.get("headline") or []
    return group[0] if group else None


def _setting_text(device: str) -> str:
    if device != "cpu":
        return "CUDA events; inputs rotated through more than the second-level cache"
    return f"{torch.get_num_threads()} threads, " + " ".join(
        f"{name}={value}" for name, value in TUNED_MALLOC.items()
    )


def _providers_of(suite: Suite, plan: Plan) -> dict[str, list[str]]:
    """Whom to time on each case. Curves have many points and get the sides that matter: eager,
    and this package's compiled backends (`reference` where there is none)."""
    everyone = find()
    if unknown := set(plan.providers) - set(everyone):
        raise ValueError(f"--providers: got {sorted(unknown)}, known are {list(everyone)}")
    in_curves_only = {one.key for name in CURVES for one in suite.get(name, [])} - {
        one.key for name, group in suite.items() if name not in CURVES for one in group
    }
    chosen = {}
    for one in cases_of(suite):
        names = [n for n in everyone if not plan.providers or n in plan.providers]
        if plan.device == "cpu" and not plan.providers and plan.suite != "full":
            names = [n for n in names if n not in WEAK_ON_CPU]
            if one.key in in_curves_only:
                able = [n for n in names if n.startswith("heteroakd")
                        and everyone[n].cannot(one, plan.device) is None]  # fmt: skip
                compiled = [n for n in able if n != REFERENCE]
                names = [EAGER, *(compiled or able)]
        chosen[one.key] = names
    return chosen


def _environment(setting: str, device: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if device == "cpu" and setting != "default-malloc":
        environment |= TUNED_MALLOC
    return environment


def _times(
    plan: Plan,
    cases: Sequence[Case],
    names: dict[str, list[str]],
    results: Results,
    setting: str,
    pending: list[str],
    threads: int = 0,
    deadline: float = 0.0,
) -> None:
    data = results.data
    job = timing.Job(
        cases=list(cases),
        providers=names,
        device=plan.device,
        threads=threads,
        visits=plan.visits,
        rounds=plan.rounds if plan.device == "cpu" else 4 * plan.rounds,
        seconds=3.0,
        deadline=deadline,
    )
    found: dict[str, list[dict[str, Any]]] = {}
    others = list(data["rows"])
    everyone = find()
    begun: set[str] = set()
    for event in timing.run_job(job, plan.output, _environment(setting, plan.device)):
        if "begin" in event and event["begin"] not in begun:
            begun.add(event["begin"])
            plan.say(f"[{len(begun)}/{len(cases)}] {event['begin']}")
        if "done" in event:
            found[event["done"]] = event["rows"]
            _reach(pending, event["done"])
        if "died" in event:
            key, reason = event["died"], f"the process died here: {memory.death(event['code'])}"
            plan.say(f"   {reason}")
            _reach(pending, key)
            # What an earlier visit measured stays.
            dead = [timing.Timed(everyone[name], cannot=reason) for name in names[key]]
            found.setdefault(key, [one.row(results.cases[key]) for one in dead])
        data["rows"] = others + [
            {"setting": setting, **row} for rows in found.values() for row in rows
        ]
        if "begin" not in event:
            results.save(plan.output)  # a run that is stopped leaves what it had


def _reach(pending: list[str], item: str, parts: Sequence[str] = ()) -> None:
    """Removes an item, or puts the parts that it has in its place."""
    if item in pending:
        place = pending.index(item)
        pending[place : place + 1] = parts


def _peaks(
    plan: Plan,
    cases: Sequence[Case],
    names: dict[str, list[str]],
    results: Results,
    pending: list[str],
    left: Callable[[], float],
) -> None:
    if plan.device == "cpu" and (reason := memory.supported()):
        plan.say(f"   left out: {reason}")
        pending.clear()
        return
    for one in cases:
        peaks: dict[str, Any] = results.data["peak_bytes"].setdefault(one.key, {})
        rows = results.rows(one.key)
        able = [n for n in names[one.key] if n in rows and rows[n]["cannot"] is None]
        if any(n.startswith("heteroakd") and n != REFERENCE for n in able):
            able = [n for n in able if n != REFERENCE]  # it is there for want of a kernel only
        _reach(pending, one.key, [f"{one.key}: {name}" for name in able])
        for name in able:
            if left() < 0:
                return
            try:
                measured = rows[name].get("peak_bytes")  # on a GPU, beside the times
                peaks[name] = measured or memory.peak_bytes(one, name, plan.device)
            except RuntimeError as error:
                peaks[name] = str(error)
            _reach(pending, f"{one.key}: {name}")
        plan.say(f"   {one.key}: " + ", ".join(
            f"{n} {b / MIB:.0f} MiB" for n, b in peaks.items() if isinstance(b, int)))  # fmt: skip


def _crops(plan: Plan, results: Results, pending: list[str], left: Callable[[], float]) -> None:
    everyone = find()
    for objective in CROPS:
        one = case(objective, "Cityscapes", 1, 4)
        # The case of the suite that tells who can, and who is the fastest of ours.
        key = next((key for key, known in results.cases.items() if known.objective == objective
                    and results.rows(key)), None)  # fmt: skip
        ours = results.ours(results.rows(key)) if key else None
        names = [EAGER, "compile", *([ours["provider"]] if ours else [])]
        able = [name for name in names if everyone[name].cannot(one, plan.device) is None]
        _reach(pending, objective, [f"{objective}: {name}" for name in able])
        for name in able:
            if left() < 0:
                continue
            try:
                found = memory.largest_crop(one, name, CROP_BUDGET, plan.device)
            except RuntimeError as error:
                found = {"cannot": str(error)}
            _reach(pending, f"{objective}: {name}")
            results.data["crops"].append({"objective": objective, "provider": name, **found})
            plan.say(f"   {objective}, {name}: {found.get('side', found.get('cannot'))}")


def _steps(plan: Plan, results: Results, pending: list[str], left: Callable[[], float]) -> None:
    """In a process with the same malloc as the times."""
    key = next((key for key, one in results.cases.items() if one.objective == "ce+hetero"
                and results.rows(key)), None)  # fmt: skip
    ours = results.ours(results.rows(key)) if key else None
    names = [EAGER, "compile", ours["provider"] if ours else "heteroakd[reference]"]
    job = {
        "suite": plan.suite, "names": names, "device": plan.device,
        "seconds": max(20.0, min(300.0, 0.6 * left())) if plan.seconds else 300.0,
        "budget": STEP_BUDGET[plan.device],
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.runner", json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment("main", plan.device),
    )
    pending.clear()
    if process.returncode != 0 or not process.stdout.strip():
        results.data["steps"] = [{"key": "all", "provider": "-", "cannot": (
            f"the process of the training steps ended with {process.returncode}")}]  # fmt: skip
        return
    results.data |= json.loads(process.stdout.splitlines()[-1])


def _steps_job(text: str) -> None:
    job = json.loads(text)
    started = time.time()
    cases = steps.STEP_CASES[job["suite"]]
    rows = steps.measure_steps(cases, job["names"], job["device"], 5, 0.5 * job["seconds"])
    batches: list[dict[str, Any]] = []
    able = {(row["key"], row["provider"]) for row in rows if not row.get("cannot")}
    for one in cases[:1]:
        for name in job["names"]:
            if (one.key, name) not in able:
                continue
            share = max(5.0, (started + job["seconds"] - time.time()) / len(job["names"]))
            try:
                found = steps.largest_batch(one, name, job["device"], job["budget"], seconds=share)
            except RuntimeError as error:
                found = {"cannot": str(error)}
            batches.append({"key": one.key, "provider": name, "budget": job["budget"], **found})
    print(json.dumps({"steps": rows, "step_batches": batches}))


if __name__ == "__main__":
    _steps_job(sys.argv[1])
