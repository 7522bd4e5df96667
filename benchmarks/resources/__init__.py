"""What kernels are compiled to, without a GPU: `python -m benchmarks.resources` (command.py).

Read `sass.py`, `flow.py` and `loops.py` for how machine code becomes instructions per loop,
`times.py` for what a launch should cost, `cases.py` (Triton) and `cuda_cases.py` for what is looked
at. Triton is the rest but for `nvcc.py`, `cplusplus.py` and what begins with `cuda`.
"""

from .cases import CASES
from .ceilings import CEILINGS, check, new_ceilings
from .command import main
from .flow import loops_of
from .kernel import Kernel, Row
from .launches import Launch, launches_of
from .loops import LoopCount, Place, SourceLoop, Sources, count_loops
from .sass import Instruction, parse_sass
from .triton import unavailable

__all__ = [
    "CASES",
    "CEILINGS",
    "Instruction",
    "Kernel",
    "Launch",
    "LoopCount",
    "Place",
    "Row",
    "SourceLoop",
    "Sources",
    "check",
    "count_loops",
    "launches_of",
    "loops_of",
    "main",
    "new_ceilings",
    "parse_sass",
    "unavailable",
]
