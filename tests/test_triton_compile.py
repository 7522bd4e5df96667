"""What the Triton kernels are compiled to, without a GPU: registers, spills, instructions.

The compiler runs in a process of its own, because the other tests turn the kernels into Python
functions (TRITON_INTERPRET).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import resources  # noqa: E402
from benchmarks.resources.python_source import label_of  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONWARNINGS"] = "ignore"
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.resources", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if reason := resources.unavailable():
        pytest.skip(reason)


@pytest.mark.usefixtures("compiler")
def test_kernels_keep_their_ceilings() -> None:
    """All cases for sm_90, some for sm_80 and sm_100."""
    done = _run("--check", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("compiler")
def test_a_ceiling_that_is_exceeded_is_caught(tmp_path: Path) -> None:
    """Fewer registers and a shorter loop than the kernel has, and a loop that it lacks."""
    ceilings = json.loads(resources.CEILINGS.read_text())
    name = "ce | distillation_pass"
    limits: dict[str, Any] = ceilings["kernels"]["sm_90"].setdefault(name, {})
    limits |= {"registers": 20, "loops": {"statistics": 1.0, "nonsense": 1.0}}
    ceilings["triton"] = importlib.metadata.version("triton")
    file = tmp_path / "doctored.json"
    file.write_text(json.dumps(ceilings))
    done = _run("--check", "--quick", "--arch", "90", "--cases", "ce", "--ceilings", str(file))
    assert done.returncode == 1, done.stdout + done.stderr
    problems = [line for line in done.stdout.splitlines() if line.startswith(name)]
    assert [line.rsplit(",", 1)[-1] for line in problems] == [
        " ceiling 20",
        f"{name} | sm_90: loop nonsense is gone",
        " ceiling 1",
    ]


# One loop over rows (step) around a loop over classes, unrolled by two, and its remainder; then a
# block out of line that comes back into the loop, and the trap behind the last instruction.
_SASS = """
kernel:
.text.kernel:
	//## File "/x/distillation.py", line 1
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
	//## File "/x/tiles.py", line 9 inlined at "/x/distillation.py", line 12
	//## File "/x/distillation.py", line 12
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
	//## File "/x/distillation.py", line 14
        /*0020*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0030*/                   LDG.E R3, desc[UR4][R4.64+0x4] ;
        /*0040*/                   MUFU.EX2 R2, R2 ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/              @!P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0070*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0090*/                   MUFU.EX2 R2, R2 ;
        /*00a0*/               @P0 BRA `(.L_x_2) ;
	//## File "/x/distillation.py", line 16
        /*00b0*/                   BRA P2, `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   LDL R2, [R1] ;
        /*00e0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
"""


def test_machine_code_is_read() -> None:
    instructions, labels = resources.parse_sass(_SASS)
    assert [x.opcode for x in instructions[:4]] == ["LDC", "STL", "LDG.E", "LDG.E"]
    assert instructions[1].frames == (("tiles.py", 9), ("distillation.py", 12))
    assert instructions[2].frames == (("distillation.py", 14),)
    assert labels[".L_x_2"] == 8
    step, unrolled, rest = resources.loops_of(instructions, labels)
    assert step.parent is None
    assert unrolled.parent is step
    assert rest.parent is step
    assert sorted(unrolled.body) == [2, 3, 4, 5, 6, 7, 13, 14]
    assert sorted(step.own) == [1, 11]

    file, function = "distillation.py", "distillation_pass"
    outer = resources.SourceLoop(file, function, 10, 17, "range(TI)", False)
    classes = resources.SourceLoop(file, function, 13, 15, "range(classes)", True)
    sources = resources.Sources({}, {file: [outer, classes]}, label_of)
    outside, counts = resources.count_loops(instructions, labels, sources)
    assert [(x.name, x.unroll, x.remainder) for x in counts] == [
        ("step", 1, False),
        ("gradients", 2, False),
        ("gradients", 1, True),
    ]
    assert [x.spills for x in counts] == [1, 1, 0]
    assert counts[1].kinds == {"BRA": 3, "LDG": 2, "LDL": 1, "MUFU": 2}
    assert outside == {"BRA": 1, "EXIT": 1, "LDC": 1}
