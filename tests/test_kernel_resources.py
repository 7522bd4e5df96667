"""What the GPU kernels are compiled to, without a GPU (benchmarks/kernels.py).

The build of `python3 dev.py test` compiles every source of csrc/cuda for sm_90a and takes warnings
for errors; here some are, for the other architectures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import kernels  # noqa: E402

#: Cases of Triton that have nothing that the others lack.
LIKE_OTHERS = ("ce", "ce + hetero", "ce + hetero (stride 8)", "ce + hetero (150 classes)")
CEILINGS = json.loads(kernels.CEILINGS.read_text())

cuda = pytest.mark.skipif(
    any(kernels.tool(x) is None for x in ("nvcc", "cuobjdump", "nvdisasm")),
    reason="nvcc, cuobjdump or nvdisasm was not found",
)
triton = pytest.mark.skipif(
    kernels.tool("ptxas") is None or kernels.tool("nvdisasm") is None,
    reason="there is no Triton for Linux here",
)


def skip_other_compiler(name: str) -> None:
    """Counts and spills are those of one compiler."""
    found, known = kernels.compilers()[name], CEILINGS["compilers"][name]
    if found != known:
        pytest.skip(f"the ceilings are of {name} {known}, this is {found}")


def test_every_kernel_of_the_table_has_a_ceiling() -> None:
    assert CEILINGS.keys() - {"compilers"} == set(kernels.NAMES)


@pytest.mark.parametrize("column", kernels.HELD)
def test_a_kernel_over_its_ceiling_is_caught(column: str) -> None:
    ceilings = {"a": dict.fromkeys(kernels.HELD, 40.0), "b": dict.fromkeys(kernels.HELD, 50.0)}
    rows = [{"kernel": name, "loops": {}, **limits} for name, limits in ceilings.items()]
    assert kernels.over(rows, ceilings) == []
    rows[0][column] += 1
    assert kernels.over(rows, ceilings) == [f"a: {column}: got 41, expected at most 40"]
    assert kernels.over(rows[1:], {}) == ["b: no ceiling"]


@cuda
def test_cuda_kernels_keep_their_ceilings() -> None:
    """Those that are compiled in seconds; the table has more."""
    skip_other_compiler("CUDA")
    names = ("CUDA cells: ce", "CUDA labels: forward", "CUDA labels: backward")
    assert kernels.over(kernels.rows_of(names), CEILINGS) == []


@cuda
@pytest.mark.parametrize("arch", ["80", "100"])
def test_cuda_compiles_for_other_architectures(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources that have nearly all of csrc/cuda between them, without a warning; where nvcc can, it
    does not optimise them, which takes minutes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = tmp_path / "several.cu"
    files = ("cells_ce_hetero.cu", "labels_grid.cu", "sums.cu")
    source.write_text("".join(f'#include "{ROOT / "csrc" / "cuda" / x}"\n' for x in files))
    quick = ["-Ofc=max"] if "-Ofc" in kernels._output("nvcc", "--help") else []
    assert b"cell_kernel" in kernels.compile_cuda(source, arch, *quick)


@cuda
@pytest.mark.parametrize("arch", ["80", "100"])
def test_cuda_evaluation_compiles_for_other_architectures(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = ROOT / "csrc" / "cuda" / "predict.cu"
    quick = ["-Ofc=max"] if "-Ofc" in kernels._output("nvcc", "--help") else []
    assert b"predict_kernel" in kernels.compile_cuda(source, arch, *quick)


@cuda
def test_a_warning_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "careless.cu"
    source.write_text("__global__ void kernel(int* out) {\n  int nothing = 3;\n  out[0] = 1;\n}\n")
    with pytest.raises(RuntimeError, match="never referenced"):
        kernels.compile_cuda(source, "90a")


def run_with_triton(script: str) -> None:
    """In a process of its own: the other tests turn the kernels into Python functions."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", f"from benchmarks.kernels import *\n{script}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@triton
def test_triton_kernels_keep_their_ceilings() -> None:
    """Of ce and hetero that of the kernel with kd. An exact fallback compiles as well."""
    skip_other_compiler("Triton")
    names = [x for x in kernels.NAMES if "Triton" in x and x[7:] not in LIKE_OTHERS]
    run_with_triton(
        f"problems = over(rows_of({names}), json.loads(CEILINGS.read_text()))\n"
        "assert not problems, problems\n"
        'compile_triton("reverse kd", 90, careful=True)'
    )


@triton
def test_triton_compiles_nothing_for_another_number() -> None:
    """Integers in tuples are looked at whatever a kernel says: whether 16 divides them, say."""
    run_with_triton(
        "one = partial(TRITON['ce + hetero'], 'ce', 'kd', 'hetero')\n"
        "found = set()\n"
        "for t, tau, weight in (1.7, 1, 1), (3, 0.5, 1e-30), (0.01, 0.02, 0.04):\n"
        "    TRITON['one'] = partial(one, temperature=t, tau=tau, kd_weight=weight)\n"
        "    found.add(tuple(kernel.hash for kernel, _ in compile_triton('one', 90)))\n"
        "assert len(found) == 1, found"
    )


@triton
def test_triton_compiles_a_changed_term_anew() -> None:
    """It looks for functions where they are called by name, and terms are called by index."""
    run_with_triton(
        "from heteroakd_fast.kernels import terms\n"
        "from triton.language import constexpr\n"
        "before = terms.member.cache_key\n"
        "terms.member.hash, terms.SOURCES = None, constexpr('other')\n"
        "assert terms.member.cache_key != before"
    )


@triton
def test_triton_compiles_for_other_variants_and_architectures() -> None:
    cases = [(case, 90) for case in [*kernels.TRITON][10:]]
    cases += [(case, arch) for case in ("ce + hetero", "labels: backward") for arch in (80, 100)]
    run_with_triton(f"for case, arch in {cases}: compile_triton(case, arch)")


# Statistics (a loop unrolled by two, and what it leaves over), then a loop around gradients, from
# which a block out of line and a table of jumps come back; the trap behind the last instruction; a
# function that is called.
_HEADER = """
template <int kPower>
HAKD_DEVICE void statistics(const float* in, int n) {
  for (int c = 0; c < n; ++c) use<kPower>(in[c]);
}
__global__ void __launch_bounds__(64)
    cell_kernel(const float* in, int n) {
  case 2: statistics<Set, 2, float>(in, n); break;
  for (int k = 0; k < n; ++k) {
    for (int c = 0; c < n; ++c) out[c] = in[c];
  }
}
"""
_SASS = """
.text.kernel:
	//## File "{file}", line 4 inlined at "{file}", line 8
	//## File "{file}", line 8
.L_x_1:
        /*0000*/                   LDS.128 R2, [R4] ;
        /*0010*/                   LDS.128 R3, [R4+0x10] ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/                   MUFU.EX2 R3, R3 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   LDS.128 R2, [R4] ;
        /*0060*/                   MUFU.EX2 R2, R2 ;
        /*0070*/                   BRA P1, `(.L_x_2) ;
	//## File "{file}", line 9
.L_x_3:
        /*0080*/                   STL.64 [R1], R2 ;
	//## File "{file}", line 10
.L_x_4:
        /*0090*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*00a0*/              @!P1 BRA `(.L_x_6) ;
.L_x_5:
        /*00b0*/                   BRX R8 -0xc0 (*"BRANCH_TARGETS .L_x_4,.L_x_7"*);
.L_x_7:
	//## File "{file}", line 9
        /*00c0*/                   BRA.DIV UR4, `(.L_x_8) ;
        /*00d0*/               @P0 BRA `(.L_x_3) ;
        /*00e0*/                   EXIT ;
.L_x_6:
        /*00f0*/                   LDL R2, [R1] ;
        /*0100*/                   BRA `(.L_x_5) ;
.L_x_8:
        /*0110*/                   BRA `(.L_x_8);
$kernel$slow:
        /*0120*/                   STL [R1], R2 ;
"""


def test_machine_code_is_read(tmp_path: Path) -> None:
    header = tmp_path / "kernel.h"
    header.write_text(_HEADER)
    code = kernels.parse_sass(_SASS.format(file=header))
    assert [x.opcode for x in code[:3]] == ["LDS.128", "LDS.128", "MUFU.EX2"]
    assert code[7].frames == ((str(header), 4), (str(header), 8))
    loops, around = kernels.loops_of(code)
    assert loops == [
        ("statistics<2, float>", Counter(LDS=2, MUFU=2, BRA=1), 2),
        ("statistics<2, float>", Counter(LDS=1, MUFU=1, BRA=1), 0),
        ("cell_kernel", Counter(LDG=1, LDL=1, BRA=2, BRX=1), 1),
    ]
    assert around == 3  # STL, BRA.DIV, BRA

    row = kernels.row_of("k", (32, 1024, code), 4, {"statistics<2, float>": 1, "cell_kernel": 2})
    assert row["loops"] == {"statistics<2, float>": 5 / 8, "cell_kernel": 5 / 8}
    assert (row["instructions"], row["special"], row["per pixel"]) == (10 / 8, 2 / 8, 3 / 4)
    assert (row["shared"], row["global"], row["local"]) == (2 / 8, 1 / 8, 1 / 8)
    assert (row["registers"], row["block"], row["spilled"]) == (32, 1024, 8 + 4)
    with pytest.raises(RuntimeError, match="k: got no loop gradients"):
        kernels.row_of("k", (32, 1024, code), 4, {"gradients": 1})
