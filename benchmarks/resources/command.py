"""`python -m benchmarks.resources`: what the kernels are compiled to, without a GPU.

Triton (the default): every case performs the package's own launches on tensors that have shapes and
strides but no memory; the launches are recorded and compiled for sm_80, sm_90 and sm_100 by the
assembler inside the Triton wheel. `--backend cuda`: every csrc/cuda/*.cu is compiled for sm_80,
sm_90a and sm_100 by nvcc, and warnings are errors; what the cases launch stands in cuda_cases.py.

The machine code is read: registers, spills, shared memory, and the instructions of each loop, by
the unit that executes them. `--check` holds the numbers under the ceilings of triton.json or
cuda.json and exits with 1 if one is over; `--update` writes new ceilings.

Loops are told apart by the line information of the machine code, see loops.py. How often a loop of
Triton runs is its `range(...)` with the launch's arguments; for CUDA the case says it.

The report on CUDA has a digest of its sources: while they have it, the test of the ceilings reads
the report and compiles only what takes seconds (cuda_record.py).

Times follow from the counts and from the rates of a unit (`UNITS`, per clock and multiprocessor),
as if nothing ever waited: bounds on paper, in which branches that are not taken count as well (for
CUDA, unless `ARMS` of cuda_cases.py names them).
Nothing here is a measurement.

To add a case, see cases.py and cuda_cases.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import cuda_command, triton_command
from .cases import CASES
from .cuda_cases import CASES as CUDA_CASES

_BACKENDS = {"triton": triton_command.run, "cuda": cuda_command.run}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return _BACKENDS[options.backend](options)


def _listed(text: str) -> list[str]:
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = f"triton: {', '.join(CASES)}; cuda: {', '.join(CUDA_CASES)}"
    parser.add_argument("--backend", choices=tuple(_BACKENDS), default="triton")
    parser.add_argument("--arch", type=_listed, help="such as 80,90,100; cuda: 80,90a,100")
    parser.add_argument("--cases", type=_listed, help=known)
    parser.add_argument("--quick", action="store_true", help="what the test looks at: a minute")
    parser.add_argument("--output", type=Path, help="directory of resources.json and resources.md")
    parser.add_argument("--check", action="store_true", help="1 if a ceiling is exceeded")
    parser.add_argument("--update", action="store_true", help="write ceilings from these numbers")
    parser.add_argument("--ceilings", type=Path, help="file of ceilings")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--source", type=Path, nargs="+", help="cuda: files or folders instead of csrc/cuda"
    )
    return parser
