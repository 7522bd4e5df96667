"""`python -m benchmarks.order results.json`: which compiled backend is faster, by kind of call.

Prints the entry of `heteroakd_fast/backends/order.json` for the device that the results come from:
for each kind the backend with the smaller geometric mean of times over all cases that both can do.
With `--write` the entry goes into that file, to be committed with the results.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from heteroakd_fast.backends.order import CANDIDATES, kind_of

from heteroakd_fast.functional import resolve_mix
from heteroakd_fast.spec import TERMS, LossSpec

from .cases import Case
from .results import Results, spread, total_ms

__all__ = ["TABLE", "entry", "main", "merge"]

TABLE: Final = Path(__file__).resolve().parent.parent / "heteroakd_fast" / "backends" / "order.json"


def kind_of_case(case: Case) -> str:
    """The kind of the call that a case makes."""
    options = case.target.options
    terms = tuple(
        name for name in TERMS if options.get(f"{name}_weight", 1.0 if name == "ce" else 0.0)
    )
    fields = {k: v for k, v in options.items() if k in LossSpec.__dataclass_fields__}
    fields["mix"] = resolve_mix(options.get("preset", "softmax-kl"), options.get("mix"))
    return kind_of(LossSpec(terms=terms, **fields))


def entry(results: Results, commit: str) -> dict[str, dict[str, Any]]:
    """{kind: {faster, ratio, cases, commit}}; a kind without a case that two backends did is not
    there."""
    logarithms: dict[str, list[dict[str, float]]] = defaultdict(list)
    for key, case in results.cases.items():
        if case.target.from_features:
            continue
        rows = results.rows(key)
        medians = {}
        for name in CANDIDATES["cuda"]:
            row = rows.get(f"heteroakd[{name}]")
            found = None if row is None or row.get("cannot") else spread(total_ms(row))
            if found is not None and found.median > 0.0:
                medians[name] = math.log(found.median)
        if len(medians) > 1:
            logarithms[kind_of_case(case)].append(medians)
    table = {}
    for kind, cases in sorted(logarithms.items()):
        means = {
            name: sum(one[name] for one in cases) / len(cases)
            for name in CANDIDATES["cuda"]
            if all(name in one for one in cases)
        }
        faster, second = sorted(means, key=lambda name: means[name])[:2]
        table[kind] = {
            "faster": faster,
            "ratio": round(math.exp(means[second] - means[faster]), 3),
            "cases": len(cases),
            "commit": commit,
        }
    return table


def merge(device: str, found: dict[str, dict[str, Any]], path: Path = TABLE) -> None:
    """Puts a device's entry into the table."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    table[device] = found
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where the results say nothing about two backends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.order", description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a run on a GPU")
    parser.add_argument("--write", action="store_true", help=f"put it into {TABLE.name}")
    options = parser.parse_args(arguments)
    results = Results(json.loads(options.results.read_text()))
    environment = results.data["environment"]
    found = entry(results, str(environment.get("commit", "unknown")))
    device = str(environment.get("gpu") or environment.get("device") or "unknown")
    print(json.dumps({device: found}, indent=2))
    if not found:
        return 1
    if options.write:
        merge(device, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
