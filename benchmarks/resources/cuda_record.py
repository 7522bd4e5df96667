"""Recorded numbers of the CUDA kernels, and whether they are those of the present sources.

To compile every kernel for three architectures takes minutes. The report therefore carries a digest
of what its numbers were made from: where the sources still have it, the recorded numbers are the
present ones, and nobody has to compile. Headers of torch are not part of it: what kernels use of
them is the conversion of 16 bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from . import cuda_cases, nvcc
from .cuda import ARCHS, Instance
from .cuda_launches import names_of
from .kernel import Kernel
from .loops import LoopCount
from .nvcc import CSRC, ROOT, Usage
from .tables import loop_json, rounded

RECORD: Final = ROOT / "docs" / "benchmarks" / "cuda" / "resources.json"
UPDATE: Final = (
    "python -m benchmarks.resources --backend cuda --update --output docs/benchmarks/cuda"
)


def digest(version: str, csrc: Path = CSRC) -> str:
    """Of all sources with their headers, the flags, the architectures and nvcc's version; wherever
    they lie."""
    files = {y for x in (csrc / "cuda").glob("*.cu") for y in nvcc.files_of(x)}
    named = sorted((x.relative_to(csrc.resolve()).as_posix(), x) for x in files)
    options = [nvcc.flags(arch, cuda_cases.FLAGS, torch_include="") for arch in ARCHS]
    found = hashlib.sha256(repr((version, options)).encode())
    for name, file in named:
        found.update(repr((name, file.read_bytes())).encode())
    return found.hexdigest()[:20]


def read() -> dict[str, Any]:
    """What is recorded."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def is_present(record: Mapping[str, Any]) -> bool:
    """Whether these numbers are those of the present sources."""
    return bool(record["digest"] == digest(record["nvcc"]))


def instances_of(record: Mapping[str, Any]) -> list[Instance]:
    """The recorded kernels, as far as ceilings and the tables of cases look at them."""
    return [_instance(x) for x in record["rows"]["kernels"]]


def _instance(entry: Mapping[str, Any]) -> Instance:
    loops = [_loop(x) for x in entry["loops"]]
    inner = entry["spills_in_innermost_loops"]
    if not loops and inner:  # of other architectures loops are not kept
        loops = [_loop({"name": "", "spills": inner, "instructions": inner, "innermost": True})]
    kernel = Kernel(
        registers=entry["registers"],
        stack=entry["stack_bytes"],
        shared=entry["shared_bytes"],
        spill_loads=entry["spill_loads"],
        spill_stores=entry["spill_stores"],
        code_bytes=entry["code_bytes"],
        outside={},
        loops=loops,
        called_spills=entry["spills_in_called_functions"],
        called_code_bytes=entry["called_code_bytes"],
    )
    usage = Usage(entry["registers"], entry["stack_bytes"], shared=entry["shared_bytes"])
    return Instance(entry["file"], entry["arch"], entry["kernel"], usage, kernel)


def _loop(entry: Mapping[str, Any]) -> LoopCount:
    spills = entry["spills"]
    return LoopCount(
        name=entry["name"],
        source=entry.get("source", ""),
        iterable=entry.get("range", ""),
        innermost=entry["innermost"],
        unroll=entry.get("unroll", 1.0),
        remainder=entry.get("remainder", False),
        parent=-1,
        kinds={"": entry["instructions"] - spills, "LDL": spills},
        calls={},
        rare=not cuda_cases.RARE.isdisjoint(names_of(entry["name"])),
    )


def instance_json(instance: Instance, row: Any) -> dict[str, Any]:
    """A kernel as it is recorded; row: the same of `cuda_rows.instance_rows`."""
    kernel = instance.kernel
    found = {
        "kernel": instance.name,
        "file": instance.file,
        "arch": instance.arch,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack,
        "spill_loads": kernel.spill_loads,
        "spill_stores": kernel.spill_stores,
        "spills_in_innermost_loops": kernel.inner_spills,
        "spills_in_called_functions": kernel.called_spills,
        "spilled_bytes_by_ptxas": {
            "loads": instance.usage.spill_loads,
            "stores": instance.usage.spill_stores,
        },
        "barriers_in_innermost_loops": kernel.inner_barriers,
        "shared_bytes": kernel.shared,
        "code_bytes": kernel.code_bytes,
        "called_code_bytes": kernel.called_code_bytes,
        "pixels_per_thread": row.launch.pixels_per_thread,
        "loops": [loop_json(row, loop) for loop in kernel.loops] if row.main else [],
    }
    result: dict[str, Any] = rounded(found)
    return result


def differences(
    instances: Sequence[Instance], rows: Sequence[Any], record: Mapping[str, Any]
) -> list[str]:
    """Where kernels that were compiled now are not what is recorded of the same sources."""
    known = {(x["kernel"], x["arch"]): x for x in record["rows"]["kernels"]}
    problems = []
    for instance, row in zip(instances, rows, strict=True):
        now = instance_json(instance, row)
        then = known.get((instance.name, instance.arch))
        if then is None:
            problems.append(f"{instance.name} | sm_{instance.arch}: it is not recorded")
            continue
        for what in now:
            if json.loads(json.dumps(now[what])) != then.get(what):
                problems.append(f"{instance.name} | sm_{instance.arch}: {what} is not as recorded")
    return problems
