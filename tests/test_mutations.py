"""The tests notice defects: each of these breaks one promise, and the test named beside it fails.

A defect whose text is no longer in the source fails too: it would prove nothing.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED
from mutations import Compiled, Defect, Library, compiled_library, mutated
from shim_backend import USED as SHIM

from heteroakd_fast import _extension

F32 = torch.float32
# Where pytest finds the test files that are named below, if it collects them.
sys.path += [
    str(Path(__file__).parent / folder)
    for folder in ("contract", "kernels", "integrations", "train")
]


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


def _values(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_values", name, *arguments)


def _cpu(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_cpu_kernels", name, *arguments)


def _cuda(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_cuda_kernels", name, *arguments)


def _accuracy(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_accuracy", name, *arguments)


def _evaluation(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_evaluation", name, *arguments)


def _pixels(name: str, *arguments: Any) -> partial[None]:
    return test_of("test_pixels", name, *arguments)


COMPILED = (
    # formulas that CPU and CUDA share
    Compiled(
        "true class as p - 1",
        "terms/ce.h",
        "(F(0) - t.student_others) * per_e",
        "(t.label_e - (t.label_e + t.student_others)) * per_e",
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
        _cpu("test_far_from_the_origin", (2, 1500), (5, 4001)),
    ),
    Compiled(
        "cwd: the gradient without T",
        "terms/cwd.h",
        "scale * n.temperature",
        "scale",
        _values("test_every_term", "cpu", "cwd", F32),
    ),
    Compiled(
        "dice: true positives that do not follow the false negatives",
        "terms/dice.h",
        "right / (whole * whole) * b + per_right",
        "right / (whole * whole) * b",
        _values("test_every_term", "cpu", "dice", F32),
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
        "labelled += in_range && !ignored",
        "labelled += 1",
        _outputs("test_valid_is_counted", "cpu", "ce"),
    ),
    Compiled(
        "the weight d forgotten in the gradient",
        "terms/hetero.h",
        "F(scale * pass.temperature) * k.share",
        "F(scale * pass.temperature)",
        _outputs("test_any_grad_output", "cpu", "hetero-softmax-kl", 0.37),
    ),
    Compiled(
        "cpu: adjoint's last lane lost",
        "cpu/gradients.h",
        "row[F::N] += last_lane(upper)",
        "row[F::N] += T(0)",
        _cpu("test_every_term_on_every_instruction_set", "cpu", "bands", "ce", F32),
    ),
    Compiled(
        "cpu: chain across unevenly spaced rows",
        "cpu/terms.h",
        "!evenly_spaced(student_fraction)",
        "false",
        _cpu("test_integer_ratios", 4, False, 4.0, 0.0),
    ),
    Compiled(
        "1 - beta in float",
        "terms/kd.h",
        "static_cast<S>(1.0 - beta)",
        "S(1) - static_cast<S>(beta)",
        _accuracy("test_mixtures_of_almost_the_teacher_alone", "cpu", "js", 1e-4),
    ),
    Compiled(
        "log ratios without their pivot",
        "terms/kd.h",
        "reverse_ratio(F(0), t.teacher_at_top)",
        "F(0)",
        _accuracy("test_pixels_without_gradient", "cpu", "kd-reverse", 300.0),
    ),
    Compiled(
        "focal: the rise of the weight at the label only",
        "terms/focal.h",
        "F(n.gamma) * (t.label_e * t.hard_inverse)",
        "F(n.gamma)",
        _cpu("test_every_term_on_every_instruction_set", "cpu", "bands", "focal", F32),
    ),
    Compiled(
        "ofa: the label's target forgotten in the sum",
        "terms/ofa.h",
        "(own.power + label)",
        "own.power",
        _cpu("test_every_term_on_every_instruction_set", "cpu", "bands", "ofa", F32),
    ),
    Compiled(
        "skewed KL: one factor 1 - alpha for both forms",
        "terms/kd.h",
        "F(n.one_minus_beta) * more",
        "F(n.one_minus_beta)",
        _cpu("test_every_term_on_every_instruction_set", "cpu", "bands", "kd-skew", F32),
    ),
    Compiled(
        "standardised logits: the deviation held fixed",
        "terms/lskd.h",
        "k.slope * rises",
        "F(0)",
        _cpu("test_every_term_on_every_instruction_set", "cpu", "bands", "kd-standardized", F32),
    ),
    Compiled(
        "cpu: negative divergences",
        "cpu/runner.h",
        "Term::is_divergence(pass_.variant[k]) && s[k * 2] < 0.0",
        "false",
        _accuracy("test_values_near_agreement", "cpu", "kd-reverse", 1e-4, 32),
    ),
    Compiled(
        "terms of a gradient begin it each",
        "cpu/band.h",
        "gradient_first_ && p.begins[term]",
        "gradient_first_",
        _values("test_every_term", "cpu", "all", F32),
    ),
    Compiled(
        "the weight of a gradient forgotten",
        "cpu/runner.h",
        "terms_.relative_weight(k)",
        "1.0",
        _values("test_every_term", "cpu", "all", F32),
    ),
    # the CUDA kernels
    Compiled(
        "cuda: ce lost where kd joins it",
        "cuda/pixel_terms.h",
        "fma(a.student, x, g)",
        "a.student * x",
        _cuda("test_usual_terms", "stride-4", "ce+kd+hetero"),
    ),
    Compiled(
        "cuda: neighbour's half lost between lanes",
        "cuda/adjoint.h",
        "g.bottom_left + bottom_of_left",
        "g.bottom_left",
        _values("test_every_geometry", "cuda", "stride-2", False),
    ),
    Compiled(
        "cuda: halo counted twice",
        "cuda/warp_sums.h",
        "own ? x : 0.0",
        "x",
        _values("test_every_geometry", "cuda", "several-warps", False),
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
        "mixture in other units",
        "terms/hetero.h",
        "r.teacher * (t.student_total * t.teacher_inverse)",
        "r.teacher * t.teacher_inverse",
        _cuda("test_usual_terms", "stride-4", "ce+kd+hetero"),
    ),
    Compiled(
        "cuda: mean over images without pixels",
        "cuda/sums.cu",
        "pixels > 0.0 ? 1.0 : 0.0",
        "1.0",
        _values(
            "test_where_pixels_are_ignored", "cuda", "label-grid", "hetero-paper-space", "an-image"
        ),
    ),
    Compiled(
        "cuda: sums stay at their old bound",
        "cuda/pixel_terms.h",
        "s.bound[i].v[j] - now",
        "F(0)",
        _values("test_every_term", "cuda", "hetero-paper", F32),
    ),
    # unlabelled and weighted pixels
    Compiled(
        "cpu: weights of pixels are forgotten",
        "cpu/terms.h",
        "c.student * weight",
        "c.student",
        _pixels("test_values_and_gradients", "cpu", "kd", "apart", "weighted"),
    ),
    Compiled(
        "an unlabelled pixel has a cross entropy",
        "cpu/terms.h",
        "Term::kNeedsLabel ? is_labelled(labels, p.classes) : is_valid(labels)",
        "is_valid(labels)",
        _pixels("test_ce_alone_knows_of_no_unlabelled_pixels", "cpu"),
    ),
    Compiled(
        "paper: an unlabelled pixel has errors",
        "terms/paper.h",
        "select(c.unlabelled, F(0), h_s + gap)",
        "h_s + gap",
        _pixels("test_values_and_gradients", "cpu", "hetero-paper", "apart", "unlabelled"),
    ),
    Compiled(
        "cpu: the teacher is asked where nobody knows",
        "cpu/terms.h",
        "select(unlabelled, F(T(-1e30)), t.student_label)",
        "t.student_label",
        _pixels("test_the_teacher_is_reliable_where_nobody_else_is", "cpu"),
    ),
    Compiled(
        "cpu: shares of a softmax over space without weights",
        "cpu/own_loop.h",
        "weight * exp2((v - now) * F(T(kLog2E)))",
        "exp2((v - now) * F(T(kLog2E)))",
        _pixels("test_values_and_gradients", "cpu", "cwd", "apart", "weighted"),
    ),
    Compiled(
        "cuda: gradients without the pixel's weight",
        "cuda/pixel_terms.h",
        "n.term_scale[k] * weight",
        "n.term_scale[k]",
        _pixels("test_values_and_gradients", "cuda", "ce", "cells", "both"),
    ),
    Compiled(
        "cuda: terms that need a label divide by all pixels",
        "cuda/sums.cu",
        "f.pixels[f.needs_label[k] ? 1 : 2]",
        "f.pixels[2]",
        _pixels("test_values_and_gradients", "cuda", "ce", "apart", "both"),
    ),
    # evaluation
    Compiled(
        "cpu: classes left out that can win",
        "cpu/predict_kernel.h",
        "min(min(F::load(a), F::load(a + 1)), min(F::load(b), F::load(b + 1)))",
        "max(max(F::load(a), F::load(a + 1)), max(F::load(b), F::load(b + 1)))",
        _evaluation("test_every_geometry_is_evaluated", "stride-4", False, "cpu"),
    ),
    Compiled(
        "cpu: the last of equal classes wins",
        "cpu/predict_kernel.h",
        "less(best[r], here)",
        "not_less(here, best[r])",
        _evaluation("test_the_first_of_equal_classes_wins", (16, 24), "cpu"),
    ),
    Compiled(
        "cpu: a confusion matrix lies on its side",
        "cpu/predict_kernel.h",
        "label * p.classes + line[x]",
        "line[x] * p.classes + label",
        _evaluation("test_ignored_labels_are_not_counted", 255, torch.int64, "cpu"),
    ),
    Compiled(
        "cuda: classes left out that can win",
        "cuda/predict.cu",
        "most < bound",
        "most < bound + F(1)",
        _evaluation("test_every_geometry_is_evaluated", "stride-4", False, "cuda"),
    ),
    Compiled(
        "cuda: a run of equal pixels is one pixel",
        "cuda/predict.cu",
        "static_cast<unsigned long long>(run_)",
        "1ull",
        _evaluation("test_ignored_labels_are_not_counted", 255, torch.int64, "cuda"),
    ),
)

TRITON = (
    Defect(
        "triton: the label's gradient without the pixel's weight",
        "heteroakd_fast.kernels.distillation:times",
        "found.label * weight",
        "found.label",
        _pixels("test_values_and_gradients", "triton", "ce", "labels", "both"),
    ),
    Defect(
        "triton: the teacher is asked where nobody knows",
        "heteroakd_fast.kernels.statistics:find_totals",
        "tl.where(unlabelled, -1e30, x)",
        "x",
        _pixels("test_values_and_gradients", "triton", "hetero-softmax-kl", "labels", "unlabelled"),
    ),
    Defect(
        "triton: the last of equal classes wins",
        "heteroakd_fast.kernels.predict:predict_pass",
        "z > best",
        "z >= best",
        _evaluation("test_the_first_of_equal_classes_wins", (16, 24), "triton"),
    ),
    Defect(
        "triton: divergence in other units",
        "heteroakd_fast.kernels.formulas:kl",
        "LN_2 * (weighted",
        "(weighted",
        _values("test_every_term", "triton", "kd", F32),
    ),
    Defect(
        "triton: mixed the wrong way round",
        "heteroakd_fast.kernels.formulas:mixed_target",
        "teacher_weight * teacher + student_weight * student",
        "teacher_weight * student + student_weight * teacher",
        _values("test_every_term", "triton", "hetero-softmax-kl", F32),
    ),
    Defect(
        "triton: textbook gradient of the label",
        "heteroakd_fast.kernels.terms.ce:pixel",
        "-t.student_others",
        "t.label_e",
        _values("test_every_term", "triton", "ce", F32),
    ),
    Defect(
        "triton: reliability the wrong way round",
        "heteroakd_fast.kernels.formulas:reliability",
        "(student_nll - teacher_nll)",
        "(teacher_nll - student_nll)",
        _values("test_every_term", "triton", "hetero-softmax-kl", F32),
    ),
    Defect(
        "triton: edge pixels lose gradient",
        "heteroakd_fast.kernels.interpolation:fraction_in_cell",
        "tl.where(cell < 0, 1.0,",
        "tl.where(cell < 0, inside,",
        _values("test_every_geometry", "triton", "one-row", False),
    ),
    Defect(
        "triton: neighbour's half lost between lanes",
        "heteroakd_fast.kernels.tiles:add_to_corners",
        "tl.where(from_left, tl.gather(bottom_right, left_lane, 3), 0.0)",
        "0.0",
        _values("test_every_geometry", "triton", "one-row", False),
    ),
    Defect(
        "triton: chunks not joined",
        "heteroakd_fast.kernels.combine:read_slot",
        "tl.load(above, mask=has_above, other=0.0)",
        "0.0",
        _values("test_every_geometry", "triton", "other-teacher", False),
    ),
    Defect(
        "triton: log ratios without their pivot",
        "heteroakd_fast.kernels.terms.kd:other",
        "(f - known.pivot)",
        "f",
        _values("test_every_term", "triton", "kd-reverse", F32),
    ),
    Defect(
        "triton: sums keep an old bound",
        "heteroakd_fast.kernels.terms.paper:rescale",
        "own.q * both",
        "own.q",
        _values("test_every_term", "triton", "hetero-paper", F32),
    ),
)

PYTHON = (
    Defect(
        "reference: what is ignored counts as the first label",
        "heteroakd_fast.backends.reference_evaluation:confusion_matrix",
        "torch.where(counted, label, classes)",
        "torch.where(counted, label, 0)",
        _evaluation("test_ignored_labels_are_not_counted", 255, torch.int64, "reference"),
    ),
    # the oracle
    Defect(
        "kd without T^2",
        "heteroakd_fast.reference:kd",
        "temperature**2 * per_pixel",
        "per_pixel",
        _oracle("test_kd_is_torchs_kl_div"),
    ),
    Defect(
        "js weights swapped",
        "heteroakd_fast.reference:kd",
        "log_p_t + math.log(beta), log_p_s + math.log1p(-beta)",
        "log_p_s + math.log(beta), log_p_t + math.log1p(-beta)",
        _oracle("test_js_is_symmetric_at_one_half_bounded_and_reaches_its_ends"),
    ),
    Defect(
        "reliability the wrong way round",
        "heteroakd_fast.reference:_evaluate_softmax_kl",
        "torch.where(labelled, e_s - e_t, torch.inf)",
        "torch.where(labelled, e_t - e_s, torch.inf)",
        _oracle("test_softmax_kl_by_hand"),
    ),
    Defect(
        "paper: weights over the wrong axis",
        "heteroakd_fast.reference:_evaluate_paper",
        "weight = score.softmax(dim=1)",
        "weight = score.softmax(dim=2)",
        _oracle("test_paper_by_hand"),
    ),
    Defect(
        "space weights see ignored pixels",
        "heteroakd_fast.reference:space_shares",
        "torch.where(inside, exp, 0)",
        "exp",
        _oracle("test_space_weights_sum_to_one_over_valid_pixels_of_each_image_and_class"),
    ),
    Defect(
        "mixed target not detached",
        "heteroakd_fast.reference:evaluate_knowledge",
        "student_z.detach(), teacher_z.detach()",
        "student_z, teacher_z.detach()",
        _oracle("test_hetero_in_the_pass_is_the_function", "softmax-kl"),
    ),
    Defect(
        "nearest labels rounded",
        "heteroakd_fast.labels:nearest_labels",
        "* height // max(size[0], 1)",
        "* height // max(size[0], 1) + 1",
        _oracle("test_nearest_labels_are_torchs", (7, 9), (3, 5)),
    ),
    # between the losses and the backends
    Defect(
        "a further temperature in the same pass",
        "heteroakd_fast.spec:_Pass.takes",
        "temperature != self.temperature and",
        "False and",
        test_of("test_terms", "test_passes_are_as_few_as_possible"),
    ),
    Defect(
        "maps computed with weight 0 are reported as a term",
        "heteroakd_fast.spec:_pass_plan",
        "group = _MAPS_ONLY",
        "group = 0",
        test_of("test_terms", "test_maps_need_no_term"),
    ),
    Defect(
        "weights not applied",
        "heteroakd_fast.reference_pass:group",
        "options.asked[k].weight * numerators[k]",
        "numerators[k]",
        _outputs("test_loss_is_the_weighted_sum", "reference", "all"),
    ),
    Defect(
        "0 / 0 where all is ignored",
        "heteroakd_fast._evaluate:_combine",
        "denominators.reciprocal().nan_to_num(math.nan, 0.0, 0.0)",
        "denominators.reciprocal()",
        _outputs("test_all_pixels_ignored", "reference", "ce"),
    ),
    Defect(
        "normalizer replaces every denominator",
        "heteroakd_fast._evaluate:check_normalizer",
        'if kind in ("valid", "distilled")',
        "",
        _outputs("test_a_plain_normalizer_replaces_the_valid_count_and_nothing_else", "reference"),
    ),
    Defect(
        "teacher silently detached",
        "heteroakd_fast._checks:check_teacher",
        "teacher.requires_grad and not learns",
        "False",
        test_of("test_inputs", "test_refuses_a_teacher_that_would_silently_get_no_gradient"),
    ),
    Defect(
        "temperature not checked",
        "heteroakd_fast._checks:check_temperature",
        "not _SMALLEST_TEMPERATURE <= number <= 1.0 / _SMALLEST_TEMPERATURE",
        "False",
        test_of("test_inputs", "test_refuses_temperatures_that_are_not_positive", "tau", 0.0),
    ),
    Defect(
        "a class is ignored unasked",
        "heteroakd_fast._checks:check_ignored_class",
        "0 <= ignore_index < num_classes",
        "False",
        test_of("test_arguments", "test_a_class_is_not_ignored_unasked"),
    ),
    Defect(
        "labels not checked",
        "heteroakd_fast.labels:check_label_report",
        "if labels == weights == 0:",
        "if True:",
        test_of("test_inputs", "test_refuses_labels_out_of_range", "reference", torch.int64, 256),
    ),
    Defect(
        "bands without their second rows",
        "heteroakd_fast.backends.reference:_Side.add",
        "into.index_add_(2, upper, gradient * fraction)",
        "None",
        _values("test_every_term_in_every_dtype", "reference", "ce", F32),
    ),
    Defect(
        "tangents dropped",
        "heteroakd_fast._checks:refuse_forward_mode",
        "forward_ad.unpack_dual(tensor).tangent is not None",
        "False",
        test_of(
            "test_derivatives", "test_forward_mode_is_refused", "cross_entropy", "class_weight"
        ),
    ),
    Defect(
        "second order silently wrong",
        "heteroakd_fast.ops:_refuse_second_order",
        "if torch.is_grad_enabled():",
        "if False:",
        _outputs("test_second_order_is_refused", "cpu", "all"),
    ),
    Defect(
        "grad_output ignored",
        "heteroakd_fast.backends.compiled:CompiledBackend.gradient",
        "grad_totals.contiguous(),",
        "torch.ones_like(grad_totals),",
        _outputs("test_any_grad_output", "cpu", "ce", 0.37),
    ),
    Defect(
        "teacher's features not detached",
        "heteroakd_fast.losses:_projected",
        'if side == "teacher":',
        "if False:",
        _outputs("test_module_on_features", "paper"),
    ),
    Defect(
        "cwd: without T^2",
        "heteroakd_fast.reference:cwd",
        "temperature**2 * per_class.sum(dim=1)",
        "per_class.sum(dim=1)",
        test_of("test_channelwise", "test_value_and_gradient", "reference", torch.float64, "label"),
    ),
    # drop-ins and driver
    Defect(
        "a feature that was overwritten",
        "heteroakd_fast.integrations.taps:Kept.value",
        "self.original._version == self.version",
        "True",
        test_of("test_taps", "test_what_runs_after_a_module_changes_nothing", "module"),
    ),
    Defect(
        "mask not flipped",
        "heteroakd_fast.train.datasets.augment:augment",
        "image[:, ::-1], mask[:, ::-1]",
        "image[:, ::-1], mask",
        test_of("test_train_augment", "test_picture_and_mask_stay_together"),
    ),
)


def noticed() -> Any:
    """A failed assertion, `pytest.fail`, or an error of the package; no skipped test, and no test
    that was called wrongly or defect that is no program."""
    return pytest.raises((AssertionError, RuntimeError, ValueError, pytest.fail.Exception))


@pytest.mark.parametrize("defect", PYTHON, ids=lambda defect: defect.what)
def test_defects_of_the_package_are_noticed(defect: Defect) -> None:
    with mutated(defect.where, defect.old, defect.new), noticed():
        defect.check()


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled, not interpreted")
@pytest.mark.parametrize("defect", TRITON, ids=lambda defect: defect.what)
def test_defects_of_triton_kernels_are_noticed(defect: Defect) -> None:
    with mutated(defect.where, defect.old, defect.new), noticed():
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
    with library.used(number), noticed():
        defect.check()
