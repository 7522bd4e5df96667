"""Instances and launches of the CUDA C++ kernels, and the ceilings that instances keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from . import cuda_cases, nvcc
from .ceilings import DEFAULTS as SHARED_DEFAULTS
from .ceilings import loop_ceilings
from .cuda import MAIN_ARCH, Instance, taken
from .cuda_launches import Launch, Template, names_of
from .kernel import Row


def instance_rows(instances: Sequence[Instance]) -> list[Row[Launch]]:
    """Every instance, whether or not a case launches it: what ceilings hold."""
    return [
        Row("", x.name, x.arch, _described(x, Launch(x.name, 1, 32, 0)), x.kernel, "", _main(x))
        for x in instances
    ]


def _main(instance: Instance) -> bool:
    return instance.arch == MAIN_ARCH


def _described(instance: Instance, launch: Launch) -> Launch:
    template = cuda_cases.TEMPLATES.get(instance.template, Template())
    arguments = nvcc.arguments_of(instance.name)
    return replace(launch, pixels=template.pixels(arguments), careful=template.careful(arguments))


def case_rows(
    instances: Sequence[Instance], cases: Sequence[str]
) -> tuple[list[Row[Launch]], list[str]]:
    """The launches of the cases, for the main architecture; and launches of what is not there."""
    known = {x.name: x for x in instances if _main(x)}
    rows: list[Row[Launch]] = []
    missing = []
    seen: dict[str, str] = {}
    for case in cases:
        launches = cuda_cases.CASES[case].launches
        for number, launch in enumerate(launches):
            instance = known.get(launch.kernel)
            if instance is None:
                missing.append(f"{case}: no kernel is called {launch.kernel}")
                continue
            before = [x.kernel for x in launches[:number]].count(launch.kernel)
            name = f"{launch.kernel} {before + 1}" if before else launch.kernel
            kernel = taken(instance.kernel, launch.without)
            kernel.shared += launch.shared
            first = seen.setdefault(launch.kernel, case)
            same = "" if first == case and not before else first
            described = _described(instance, launch)
            rows.append(Row(case, name, instance.arch, described, kernel, same, True))
    return rows, missing


def table_problems(
    instances: Sequence[Instance], rows: Sequence[Row[Launch]], every_file: bool
) -> list[str]:
    """Where the tables of cuda_cases.py and the kernels disagree."""
    templates = sorted({x.template for x in instances} - cuda_cases.TEMPLATES.keys())
    problems = [f"{x}: no entry in cuda_cases.TEMPLATES" for x in templates]
    names = Counter((x.name, x.arch) for x in instances)
    problems += [
        f"{n} | sm_{a}: {k} kernels have this name" for (n, a), k in names.items() if k > 1
    ]
    if every_file:
        gone = sorted(cuda_cases.TEMPLATES.keys() - {x.template for x in instances})
        problems += [f"{x}: in cuda_cases.TEMPLATES, but there is no such kernel" for x in gone]
    for row in rows:
        found = [x.name for x in row.kernel.loops]
        known = {name for x in found for name in names_of(x)}
        unused = sorted(row.launch.loops.keys() - known)
        problems += [f"{row.key}: no loop is called {x}; there are {found}" for x in unused]
    return problems


# --- ceilings -----------------------------------------------------------------------------------

CEILINGS: Final = Path(__file__).with_name("cuda.json")
DEFAULTS: Final = {**SHARED_DEFAULTS, "spills in called functions": 0}
#: Registers are handed out to a thread by this many.
_GRANULE: Final = 8


def new_ceilings(
    rows: Sequence[Row[Launch]], version: str, old: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every instance gets an entry. `old`: ceilings of instances that were not looked at now."""
    same = old is not None and old.get("nvcc") == version
    kernels: dict[str, dict[str, Any]] = {
        arch: dict(entries) for arch, entries in (old or {}).get("kernels", {}).items() if same
    }
    for row in rows:
        registers = -(-row.kernel.registers // _GRANULE) * _GRANULE
        entry: dict[str, Any] = {"registers": min(registers, 255)}
        if row.kernel.spills:
            entry["spills"] = row.kernel.spills
        if row.kernel.called_spills:
            entry["spills in called functions"] = row.kernel.called_spills
        if row.kernel.shared > DEFAULTS["shared"]:
            entry["shared"] = row.kernel.shared
        inner = row.kernel.inner_spills
        if row.held:
            inner = min(inner, cuda_cases.INNER_SPILLS.get(row.name, 0))
        if inner:
            entry["spills in an innermost loop"] = inner
        if row.held:
            entry["loops"] = loop_ceilings(row)
        kernels.setdefault(f"sm_{row.arch}", {})[row.key] = entry
    ordered = {arch: dict(sorted(entries.items())) for arch, entries in kernels.items()}
    return {"nvcc": version, "defaults": dict(DEFAULTS), "kernels": ordered}


def without_ceiling(rows: Sequence[Row[Launch]], ceilings: Mapping[str, Any]) -> list[str]:
    """An instance that nobody has looked at yet."""
    return [
        f"{row.key} | sm_{row.arch}: no ceiling (--update writes one)"
        for row in rows
        if row.key not in ceilings["kernels"].get(f"sm_{row.arch}", {})
    ]
