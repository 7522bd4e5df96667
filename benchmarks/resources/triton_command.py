"""`python -m benchmarks.resources --backend triton`."""

from __future__ import annotations

import argparse
import json
import sys

from .cases import CASES
from .ceilings import CEILINGS, check, new_ceilings
from .report import write_report
from .tables import kernel_table, loop_table
from .triton import ARCHS, chosen, compile_jobs, own_launch_table, quiet, unavailable


def run(options: argparse.Namespace) -> int:
    if reason := unavailable():
        print(f"benchmarks.resources: {reason}", file=sys.stderr)
        return 2
    cases = options.cases or list(CASES)
    unknown = [x for x in cases if x not in CASES]
    if unknown:
        print(f"benchmarks.resources: no case {unknown}; known: {[*CASES]}", file=sys.stderr)
        return 2
    archs = [int(x) for x in options.arch] if options.arch else list(ARCHS)
    file = options.ceilings or CEILINGS
    quiet()
    with own_launch_table():
        rows, failures = compile_jobs(chosen(cases, archs, options.quick), options.processes)
    import triton

    if options.update:
        ceilings = new_ceilings(rows, triton.__version__)
        file.write_text(json.dumps(ceilings, indent=1) + "\n")
    if options.check:
        ceilings = json.loads(file.read_text())
        failures += check(rows, ceilings, triton.__version__)
        print(f"{len(rows)} kernels, {len(failures)} problems")
    if options.output is not None:
        write_report(rows, triton.__version__, options.output)
    for failure in failures:
        print(failure)
    if not (options.check or options.update or options.output):
        main_rows = [x for x in rows if not x.launch.careful]
        print(kernel_table(main_rows), loop_table(main_rows), sep="\n\n")
    return 1 if failures else 0
