"""The tests notice defects: each of these breaks one promise, and the test named beside it fails.

A defect whose text is no longer in the source fails too: it would prove nothing.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED
from mutations import Compiled, Defect, Library, compiled_library, mutated
from shim_backend import USED as SHIM

from heteroakd_fast import _extension

F32 = torch.float32


def test_of(module: str, name: str, *arguments: Any) -> partial[None]:
    """A test of another file, called with these arguments."""
    return partial(_call, module, name, arguments)


test_of.__test__ = False  # type: ignore[attr-defined]


def _call(module: str, name: str, arguments: tuple[Any, ...]) -> None:
    getattr(importlib.import_module(module), name)(*arguments)


def _oracle(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_reference", name, *arguments)


def _outputs(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_outputs", name, *arguments)


def _cpu(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_cpu_kernels", name, *arguments)


def _cuda(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_cuda_kernels", name, *arguments)


def _triton(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_triton_kernels", name, *arguments)


def _accuracy(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_accuracy", name, *arguments)


COMPILED = (
    # formulas that CPU and CUDA share
    Compiled(
        "true class as p - 1",
        "math/distillation.h",
        "select(is_label, F(0) - others, e)",
        "select(is_label, e - (e + others), e)",
        _outputs("test_gradient_of_confident_pixels", "cpu", 40.0),
    ),
    Compiled(
        "reliability swapped",
        "math/distillation.h",
        "(student_e - teacher_e) * inverse_tau",
        "(teacher_e - student_e) * inverse_tau",
        _outputs("test_maps", "cpu", "hetero-softmax-kl"),
    ),
    Compiled(
        "taps in float",
        "math/interpolation.h",
        "source - static_cast<double>(lower)",
        "static_cast<float>(source) - static_cast<float>(lower)",
        _cpu("test_odd_ratio_far_from_the_origin"),
    ),
    # the CPU kernels
    Compiled(
        "cpu: a tap of weight zero is read",
        "cpu/statistics.h",
        "select(bad, select(equal(f, F(T(0))), a, mixed), y)",
        "select(bad, mixed, y)",
        _cpu("test_infinite_logits_spread_no_further_than_their_weights"),
    ),
    Compiled(
        "cpu: valid counts all pixels",
        "cpu/band.h",
        "valid += in_range && !ignored",
        "valid += 1",
        _outputs("test_valid_is_counted", "cpu", "ce"),
    ),
    Compiled(
        "cpu: the weight d forgotten in the gradient",
        "cpu/terms.h",
        "x.weight * x.reliable.teacher",
        "x.one * x.reliable.teacher",
        _outputs("test_any_grad_output", "cpu", "hetero-softmax-kl", 0.37),
    ),
    Compiled(
        "cpu: adjoint's last lane lost",
        "cpu/gradients.h",
        "row[F::N] += last_lane(upper)",
        "row[F::N] += T(0)",
        _cpu("test_every_term_on_every_instruction_set", "any", "ce", "stride-4"),
    ),
    Compiled(
        "cpu: chain across unevenly spaced rows",
        "cpu/terms.h",
        "!evenly_spaced(student_fraction)",
        "false",
        _cpu("test_integer_ratios", 4, False),
    ),
    Compiled(
        "cpu: 1 - beta in float",
        "cpu/distillation.cpp",
        "static_cast<T>(1.0 - o.kd_beta)",
        "T(1) - static_cast<T>(o.kd_beta)",
        _accuracy("test_js_with_almost_all_weight_on_the_teacher", "cpu", 1e-4),
    ),
    Compiled(
        "cpu: log ratios without their pivot",
        "cpu/terms.h",
        "reverse_ratio(zero, top)",
        "zero",
        _accuracy("test_pixels_without_gradient", "cpu", "reverse", 300.0),
    ),
    Compiled(
        "cpu: negative divergences",
        "cpu/distillation.cpp",
        "s[term * 2] < 0.0",
        "false",
        _accuracy("test_values_near_agreement", "cpu", "reverse", 1e-4, 32),
    ),
    # the CUDA kernels
    Compiled(
        "cuda: neighbour's half lost between lanes",
        "cuda/adjoint.h",
        "g.bottom_left + bottom_of_left",
        "g.bottom_left",
        _cuda("test_every_geometry", "stride-2", False),
    ),
    Compiled(
        "cuda: halo counted twice",
        "cuda/warp_sums.h",
        "own ? x : 0.0",
        "x",
        _cuda("test_every_geometry", "several-warps", False),
    ),
    Compiled(
        "cuda: exponentials of the column above",
        "cuda/cell_pass.h",
        "e[r - 1] * q",
        "e[r - 1]",
        _cuda("test_usual_terms", "stride-4", "ce"),
    ),
    Compiled(
        "cuda: pixels left over are forgotten",
        "cuda/cell_kernel.h",
        "__any_sync(kAllLanes, left_over != 0)",
        "false",
        _cuda("test_some_pixels_of_a_cell_are_handed_over", "ce"),
    ),
    Compiled(
        "cuda: mixture in other units",
        "cuda/pixel.h",
        "mixed.teacher * t.total_ratio",
        "mixed.teacher * t.teacher_inverse",
        _cuda("test_usual_terms", "stride-4", "ce+kd+hetero"),
    ),
    Compiled(
        "cuda: mean over images without pixels",
        "cuda/sums.cu",
        "pixels > 0.0 ? 1.0 : 0.0",
        "1.0",
        _cuda(
            "test_an_image_without_pixels_counts_for_nothing", "label-grid", "hetero-paper-space"
        ),
    ),
    Compiled(
        "cuda: log ratios without their pivot",
        "cuda/segment_pass.h",
        "log_ratio(F(0), F(1), top, exp2(top), i)",
        "F(0)",
        _accuracy("test_pixels_without_gradient", "cuda", "reverse", 300.0),
    ),
)

TRITON = (
    Defect(
        "triton: textbook gradient of the label",
        "heteroakd_fast.kernels.formulas:cross_entropy_gradient_numerator",
        "-others",
        "e",
        _triton("test_every_term", "ce", F32),
    ),
    Defect(
        "triton: reliability the wrong way round",
        "heteroakd_fast.kernels.formulas:reliability",
        "(student_nll - teacher_nll)",
        "(teacher_nll - student_nll)",
        _triton("test_every_term", "hetero-softmax-kl", F32),
    ),
    Defect(
        "triton: edge pixels lose gradient",
        "heteroakd_fast.kernels.interpolation:fraction_in_cell",
        "tl.where(cell < 0, 1.0,",
        "tl.where(cell < 0, inside,",
        _triton("test_every_geometry", "one-row", False),
    ),
    Defect(
        "triton: neighbour's half lost between lanes",
        "heteroakd_fast.kernels.tiles:add_to_corners",
        "tl.where(from_left, tl.gather(bottom_right, left_lane, 3), 0.0)",
        "0.0",
        _triton("test_every_geometry", "one-row", False),
    ),
    Defect(
        "triton: chunks not joined",
        "heteroakd_fast.kernels.combine:read_term",
        "tl.load(above, mask=has_above, other=0.0)",
        "0.0",
        _triton("test_every_geometry", "other-teacher", False),
    ),
    Defect(
        "triton: log ratios without their pivot",
        "heteroakd_fast.kernels.statistics:ratio_sums",
        "(f - pivot)",
        "f",
        _triton("test_every_term", "kd-reverse", F32),
    ),
)

PYTHON: tuple[Defect, ...] = ()

#: A failed assertion, `pytest.fail` or an error; a skipped test is none of them.
NOTICED = (Exception, pytest.fail.Exception)


@contextlib.contextmanager
def noticed(what: str) -> Iterator[None]:
    with pytest.raises(NOTICED) as caught:
        yield
    # a defect that is no program proves nothing
    assert not isinstance(caught.value, NameError), f"{what}: {caught.value}"


@pytest.mark.parametrize("defect", PYTHON, ids=lambda defect: defect.what)
def test_defects_of_the_package_are_noticed(defect: Defect) -> None:
    with mutated(defect.where, defect.old, defect.new), noticed(defect.what):
        defect.check()


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled, not interpreted")
@pytest.mark.parametrize("defect", TRITON, ids=lambda defect: defect.what)
def test_defects_of_triton_kernels_are_noticed(defect: Defect) -> None:
    with mutated(defect.where, defect.old, defect.new), noticed(defect.what):
        defect.check()


@pytest.fixture(scope="module")
def library() -> Library:
    if not (SHIM and _extension.loaded()):
        pytest.skip("needs a C++ compiler and the extension, and no GPU")
    return compiled_library(COMPILED)


@pytest.mark.parametrize(
    ("number", "defect"),
    list(enumerate(COMPILED, 1)),
    ids=[defect.what for defect in COMPILED],
)
def test_defects_of_compiled_kernels_are_noticed(
    number: int, defect: Compiled, library: Library
) -> None:
    with library.used(0):
        defect.check()
    with library.used(number), noticed(defect.what):
        defect.check()
