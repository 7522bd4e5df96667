"""`python -m benchmarks.resources --backend cuda`."""

from __future__ import annotations

import argparse
import json
import sys

from . import cuda, cuda_cases, cuda_record, cuda_rows
from .ceilings import check
from .cuda_report import print_tables, write_report
from .nvcc import CSRC, nvcc_version, unavailable


def run(options: argparse.Namespace) -> int:
    if reason := unavailable():
        print(f"benchmarks.resources: {reason}", file=sys.stderr)
        return 2
    unknown = [x for x in options.cases or () if x not in cuda_cases.CASES]
    if unknown:
        known = [*cuda_cases.CASES]
        print(f"benchmarks.resources: no case {unknown}; known: {known}", file=sys.stderr)
        return 2
    every_file = options.source is None
    archs = options.arch or cuda.ARCHS
    jobs = cuda.chosen(cuda.sources_in(options.source or [CSRC / "cuda"]), archs, options.quick)
    digest = cuda_record.digest(nvcc_version())
    result = cuda.compile_jobs(
        jobs, options.processes, tell=lambda text: print(text, file=sys.stderr)
    )
    if digest != cuda_record.digest(nvcc_version()):
        print("benchmarks.resources: sources changed while they were compiled", file=sys.stderr)
        return 2
    failures = [x.text for x in result.failures]
    held = cuda_rows.instance_rows(result.instances)
    # launches of what does not compile, or was not asked for, are not missed
    complete = every_file and not options.quick and not failures and cuda.MAIN_ARCH in archs
    launched, missing = cuda_rows.case_rows(
        result.instances, options.cases or list(cuda_cases.CASES)
    )
    disagreements = cuda_rows.table_problems(result.instances, launched, complete)
    disagreements += missing if complete else []
    disagreements += cuda.arms_without_lines(CSRC / "cuda") if every_file else []

    file = options.ceilings or cuda_rows.CEILINGS
    if options.update:
        whole = complete and set(archs) == set(cuda.ARCHS)
        old = json.loads(file.read_text()) if file.exists() and not whole else None
        ceilings = cuda_rows.new_ceilings(held, nvcc_version(), old)
        file.write_text(json.dumps(ceilings, indent=1) + "\n")
    if options.check:
        ceilings = json.loads(file.read_text())
        failures += cuda_rows.without_ceiling(held, ceilings)
        failures += check(held, ceilings, nvcc_version(), compiler="nvcc")
        failures += disagreements
        print(f"{len(held)} kernels, {len(failures)} problems")
        if failures:
            print(f"to record these numbers: {cuda_record.UPDATE}")
    if options.output is not None:
        write_report(
            result, held, launched, nvcc_version(), digest if complete else "", options.output
        )
    for failure in failures:
        print(failure)
    if not (options.check or options.update or options.output):
        print_tables(held, launched)
        for disagreement in disagreements:
            print(disagreement)
    return 1 if failures else 0
