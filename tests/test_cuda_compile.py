"""What the CUDA C++ kernels are compiled to, without a GPU: registers, spills, instructions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.resources import cplusplus, cuda, cuda_rows, nvcc  # noqa: E402

LABELS = ROOT / "csrc" / "cuda" / "labels.cu"
NAME = "label_report_kernel<long>"

compiler = pytest.mark.skipif(nvcc.unavailable() is not None, reason=str(nvcc.unavailable()))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.resources", "--backend", "cuda", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@compiler
def test_kernels_keep_their_ceilings() -> None:
    """All files for sm_90a, some for sm_80 and sm_100; what was compiled before is not again."""
    done = _run("--check", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr


@compiler
def test_a_ceiling_that_is_exceeded_is_caught(tmp_path: Path) -> None:
    """Fewer registers and a shorter loop than the kernel has, a loop that it lacks, and a kernel
    that has no ceiling."""
    ceilings = json.loads(cuda_rows.CEILINGS.read_text())
    entries: dict[str, Any] = ceilings["kernels"]["sm_90a"]
    entries[NAME] |= {"registers": 16, "loops": {"labels": 1.0, "nonsense": 1.0}}
    del entries["label_report_kernel<int>"]
    ceilings["nvcc"] = nvcc.nvcc_version()
    file = tmp_path / "doctored.json"
    file.write_text(json.dumps(ceilings))
    done = _run("--check", "--arch", "90a", "--source", str(LABELS), "--ceilings", str(file))
    assert done.returncode == 1, done.stdout + done.stderr
    count, *problems = done.stdout.splitlines()
    assert count == "3 kernels, 4 problems"
    assert [line.rsplit(",", 1)[-1] for line in problems] == [
        "label_report_kernel<int> | sm_90a: no ceiling (--update writes one)",
        " ceiling 16",
        f"{NAME} | sm_90a: loop nonsense is gone",
        " ceiling 1",
    ]


@compiler
def test_a_warning_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "careless.cu"
    source.write_text("__global__ void kernel(int* out) {\n  int nothing = 3;\n  out[0] = 1;\n}\n")
    done = _run("--check", "--arch", "90a", "--source", str(source))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "careless.cu | sm_90a does not compile" in done.stdout
    assert "never referenced" in done.stdout


# A cell kernel in small: a loop over steps around two loops over classes, pixels in registers,
# a switch that takes one of two loops, and a function that is called.
_KERNEL = """
#include "pixels.h"

__global__ void __launch_bounds__(64) cell_kernel(const float* in, float* out, int steps) {
  int n = 3;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    n = static_cast<int>(in[0]);
    Pixels<2> pixels;
    switch (n & 1) {
      case 0: pixels.sums<1>(in, n); break;
      default: pixels.sums<2>(in, n); break;
    }
    // the total is read by gradients
    gradients(pixels, in, out, n);
    in += n;
  }
  if (out[0] < 0.0f) out[0] = rare(out, n);
}
"""
_HEADER = """
#pragma once
template <class T, int N>
struct Array { T at[N]; };

template <int R>
struct Pixels {
  Array<float, R * R> total = {};
  template <int kPower>
  __device__ __forceinline__ void sums(const float* in, int n) {
#pragma unroll 1
    for (int c = 0; c < n; ++c) {
      const float x = in[c];
      each([&](int k) { total.at[k] += exp2f(kPower * x * (k + 1)); });
    }
  }
  template <typename F>
  static __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int s = 0; s < R; ++s) f(r * R + s);
  }
};

template <int R>
__device__ __forceinline__ void gradients(const Pixels<R>& p, const float* in, float* out, int n) {
#pragma unroll 1
  for (int c = 0; c < n; ++c) {
    float sum = 0.0f;
    for (int k = 0; k < R * R; ++k) sum += exp2f(in[c] * p.total.at[k]);
    out[c] += sum;
  }
}

static __device__ __noinline__ float rare(const float* x, int n) {
  float found = 0.0f;
#pragma unroll 1
  for (int c = 0; c < n; ++c) found = fmaxf(found, x[c]);
  return found;
}
"""


def _small_kernel(folder: Path) -> Path:
    (folder / "pixels.h").write_text(_HEADER)
    source = folder / "small.cu"
    source.write_text(_KERNEL)
    return source


@compiler
def test_loops_are_told_apart(tmp_path: Path) -> None:
    """A loop has the name of the function that contains it; unrolled ones are not mistaken for it,
    and a function that is called is no part of the kernel."""
    result = cuda.compile_jobs([cuda.Job(_small_kernel(tmp_path), "90a")], 1, tmp_path / "cache")
    assert not result.failures
    (instance,) = result.instances
    assert instance.name == "cell_kernel"
    kernel = instance.kernel
    by_name = {x.name: x for x in kernel.loops}
    assert by_name.keys() == {"cell_kernel", "Pixels::sums<1>", "Pixels::sums<2>", "gradients"}
    assert len(kernel.loops) == 4
    step = kernel.loops.index(by_name["cell_kernel"])
    assert by_name["cell_kernel"].parent == -1
    for name in by_name.keys() - {"cell_kernel"}:
        assert by_name[name].parent == step
        assert by_name[name].kinds["MUFU"] == 4
        assert by_name[name].kinds["LDG"] >= 1
    assert kernel.called_code_bytes > 0
    assert kernel.registers == instance.usage.registers > 0


@compiler
def test_nothing_is_compiled_twice(tmp_path: Path) -> None:
    """Unless a header has changed."""
    source = _small_kernel(tmp_path)
    folder = tmp_path / "cache"
    first = nvcc.compile_source(source, "90a", folder=folder)
    again = nvcc.compile_source(source, "90a", folder=folder)
    assert first.fresh
    assert not again.fresh
    assert again.cubin == first.cubin
    assert (again.seconds, again.log) == (first.seconds, first.log)
    with open(tmp_path / "pixels.h", "a") as header:
        header.write("// lines are part of what is compiled\n")
    changed = nvcc.compile_source(source, "90a", folder=folder)
    assert changed.fresh
    assert changed.cubin != first.cubin


def test_functions_and_loops_are_found() -> None:
    header = cplusplus.read(_HEADER, "pixels.h")
    functions = {x.name: (x.first, x.last) for x in header.functions}
    assert functions == {
        "Pixels::sums": (9, 16),
        "Pixels::each": (17, 23),
        "gradients": (26, 34),
        "rare": (36, 41),
    }
    loops = [(x.function, x.first, x.last, x.nested, x.unrolled) for x in header.loops]
    assert loops == [
        ("Pixels::sums", 12, 15, False, False),
        ("Pixels::each", 20, 22, False, True),
        ("Pixels::each", 22, 22, False, True),
        ("gradients", 29, 33, False, False),
        ("gradients", 31, 31, True, False),
        ("rare", 39, 39, False, False),
    ]
    other = cplusplus.read(
        """
namespace a::b {  // for (;;) {
const char* kText = "for (;;) {";
template <typename T, int N = sizeof(T)>
T MACRO(1) Owner<T>::run(T x, const Set& s) const {
  if (x > 0) for (auto y : s) { use(y); } else while (x < 0)
    ++x;
  do {
    x -= 1'000;
  } while (x > 3);
}
}  // namespace a::b
""",
        "other.h",
    )
    assert other.functions == [cplusplus.Function("Owner::run", 4, 11)]
    assert [(x.iterable, x.first, x.last) for x in other.loops] == [
        ("auto y : s", 6, 6),
        ("x < 0", 6, 7),
        ("do", 8, 10),
    ]


def test_output_of_ptxas_is_read() -> None:
    log = """
ptxas info    : Compiling entry function '_Z1lPfi' for 'sm_90a'
ptxas info    : Function properties for _Z1lPfi
    160 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 25 registers, used 1 barriers, 160 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 12.639 ms
ptxas info    : Function properties for _Z4slowPfi
    8 bytes stack frame, 9 bytes spill stores, 7 bytes spill loads
ptxas info    : Compiling entry function '_Z1kPi' for 'sm_90a'
ptxas info    : Function properties for _Z1kPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert nvcc.usages(log) == {
        "_Z1lPfi": nvcc.Usage(25, 160, 12, 24, 256, 1),
        "_Z1kPi": nvcc.Usage(8, 0, 0, 0, 0, 0),
    }


def test_names_are_short() -> None:
    assert nvcc.readable("a::b::finish_sums_kernel(a::b::Finish)") == "finish_sums_kernel"
    name = nvcc.readable(
        "void a::(anonymous namespace)::cell_kernel<a::Fixed<true, false>, (a::Dtype)2, 4>(a::Pass)"
    )
    assert name == "cell_kernel<Fixed<true, false>, Dtype(2), 4>"
    assert nvcc.arguments_of(name) == ("Fixed<true, false>", "Dtype(2)", "4")
    assert nvcc.arguments_of("finish_sums_kernel") == ()
