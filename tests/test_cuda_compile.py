"""What the CUDA C++ kernels are compiled to, without a GPU: registers, spills, instructions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.resources import (  # noqa: E402
    ceilings,
    cplusplus,
    cuda,
    cuda_cases,
    cuda_record,
    cuda_rows,
    nvcc,
)

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


def _fail_with(problems: list[str]) -> None:
    assert not problems, "\n".join(
        [*problems, "to record the present numbers:", cuda_record.UPDATE]
    )


def test_recorded_kernels_keep_their_ceilings() -> None:
    """The numbers of the report, which are the present ones while the sources have its digest;
    otherwise everything is compiled."""
    record = cuda_record.read()
    limits = json.loads(cuda_rows.CEILINGS.read_text())
    assert limits["nvcc"] == record["nvcc"], cuda_record.UPDATE
    if not cuda_record.is_present(record):
        if (reason := nvcc.unavailable()) is not None:
            pytest.skip(f"other sources than recorded, and {reason}")
        if nvcc.nvcc_version() != record["nvcc"]:
            pytest.skip(
                f"recorded with nvcc {record['nvcc']}, this is {nvcc.nvcc_version()}: only the "
                "files that compile quickly are looked at"
            )
        done = _run("--check")
        return _fail_with([] if done.returncode == 0 else [done.stdout, done.stderr])
    instances = cuda_record.instances_of(record)
    rows = cuda_rows.instance_rows(instances)
    launched, missing = cuda_rows.case_rows(instances, list(cuda_cases.CASES))
    problems = cuda_rows.without_ceiling(rows, limits)
    problems += ceilings.check(rows, limits, record["nvcc"], compiler="nvcc")
    problems += cuda_rows.table_problems(instances, launched, every_file=True)
    problems += missing + cuda.arms_without_lines(nvcc.CSRC / "cuda")
    _fail_with(problems)


@compiler
def test_quick_files_are_compiled_as_recorded() -> None:
    """For all three architectures what compiles in seconds, and one kernel by cells; warnings are
    errors. Of the recorded sources every number is the recorded one."""
    sources = cuda.sources_in([nvcc.CSRC / "cuda"])
    result = cuda.compile_jobs(cuda.chosen(sources, cuda.ARCHS, quick=True), 1)
    assert {x.arch for x in result.instances} == set(cuda.ARCHS)
    problems = [x.text for x in result.failures]
    rows = cuda_rows.instance_rows(result.instances)
    limits = json.loads(cuda_rows.CEILINGS.read_text())
    problems += ceilings.check(rows, limits, nvcc.nvcc_version(), compiler="nvcc")
    record = cuda_record.read()
    if nvcc.nvcc_version() == record["nvcc"]:
        problems += cuda_rows.without_ceiling(rows, limits)
        if cuda_record.is_present(record):
            problems += cuda_record.differences(result.instances, rows, record)
    _fail_with(problems)


def test_the_digest_notices_a_header(tmp_path: Path) -> None:
    """Of either folder, that only a header includes; not where the sources lie."""
    shutil.copytree(nvcc.CSRC, tmp_path / "csrc")
    known = cuda_record.digest("13.0")
    assert cuda_record.digest("13.0", tmp_path / "csrc") == known
    assert cuda_record.digest("13.1", tmp_path / "csrc") != known
    for header in ("cuda/staging.h", "math/labels.h"):
        file = tmp_path / "csrc" / header
        text = file.read_text()
        file.write_text(text + "// changed\n")
        assert cuda_record.digest("13.0", tmp_path / "csrc") != known
        file.write_text(text)
        assert cuda_record.digest("13.0", tmp_path / "csrc") == known


def test_a_recorded_number_that_changes_is_noticed() -> None:
    record = cuda_record.read()
    instances = cuda_record.instances_of(record)[:1]
    rows = cuda_rows.instance_rows(instances)
    record["rows"]["kernels"][0] = cuda_record.instance_json(instances[0], rows[0])
    assert cuda_record.differences(instances, rows, record) == []
    record["rows"]["kernels"][0]["registers"] += 1
    (problem,) = cuda_record.differences(instances, rows, record)
    assert problem.endswith("registers is not as recorded")


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
    assert [line.rsplit(",", 1)[-1] for line in problems[1:]] == [
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


def test_lines_of_an_arm_are_found() -> None:
    source = """
void f(int x) {
  if (x == 1) {  // }
    one();
  } else if (x == 2) {
    two();
  } else {
    three(x,
          3);
  }
  if (x > 3) four();
  more();
}
"""
    (function,) = cplusplus.read(source, "f.h").functions
    found = {
        begin: cplusplus.extent(source, function, begin, end)
        for begin, end in [
            ("if (x == 1) {", ""),
            ("} else if (x == 2)", ""),
            ("three(", ""),
            ("two", "if (x > 3)"),
            ("if (x > 3)", ""),
            ("nothing", ""),
        ]
    }
    assert list(found.values()) == [(3, 5), (5, 7), (8, 9), (6, 11), (11, 11), None]


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
