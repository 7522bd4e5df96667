# ruff: noqa: E501
"""Breaks one promise at a time in a copy of the repository and checks that its test fails.

    python tests/break_on_purpose.py [words in the names of those to try]

Not part of the suite (it takes a quarter of an hour); run it when tests or contracts change. Exits
with 1 if a defect survives.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "heteroakd_fast"
REFERENCE, FUNCTIONAL, OPS, LOSSES, LABELS, SPEC, CPU, REGISTRY, PROJECTOR, EXTENSION = (
    f"{PACKAGE}/{name}.py"
    for name in (
        "reference",
        "functional",
        "ops",
        "losses",
        "labels",
        "spec",
        "backends/cpu",
        "backends/__init__",
        "projector",
        "_extension",
    )
)
PARTS, PROJECTED = f"{PACKAGE}/backends/_parts.py", f"{PACKAGE}/projected.py"
T_FORMULAS, T_TILES, T_TAPS, T_STATISTICS, T_PASS, T_SPACE, T_COMBINE, T_LAUNCH, T_PROJECTION = (
    f"kernels/{name}.py"
    for name in (
        "formulas",
        "tiles",
        "interpolation",
        "statistics",
        "distillation",
        "space",
        "combine",
        "launch",
        "projection",
    )
)
BAND, TERMS, CHAIN, STATISTICS, PAPER, GRADIENTS, ROWS, GEOMETRY, STRIDED = (
    f"csrc/cpu/{name}.h"
    for name in (
        "band",
        "terms",
        "chain",
        "statistics",
        "paper",
        "gradients",
        "rows",
        "geometry",
        "strided",
    )
)
MATH, TAPS, ELEMENTARY = (
    f"csrc/math/{name}.h" for name in ("distillation", "interpolation", "elementary")
)
RUNNER, AVX512 = "csrc/cpu/distillation.cpp", "csrc/cpu/lanes_avx512.h"
(
    G_CELLS,
    G_ADJOINT,
    G_STAGING,
    G_PIXEL,
    G_CELL,
    G_KERNEL,
    G_SEGMENT,
    G_SEGMENTS,
    G_LABELS,
    G_SUMS,
) = (
    f"csrc/cuda/{name}.h"
    for name in (
        "cells",
        "adjoint",
        "staging",
        "pixel",
        "cell_pass",
        "cell_kernel",
        "segment",
        "segment_pass",
        "label_kernel",
        "warp_sums",
    )
)
G_COMBINE, G_OPERATORS = "csrc/cuda/sums.cu", "csrc/cuda/operators.cu"


class Defect(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest arguments


INPUTS, OUTPUTS, SYSTEMS, ORACLE, CPU_CE = (
    f"tests/test_{name}.py" for name in ("inputs", "outputs", "systems", "reference", "cpu_kernels")
)

TRITON = "tests/test_triton_kernels.py"
PROJECTING = "tests/test_projection.py"
CUDA = "tests/test_cuda_kernels.py"
TRAINERS = "tests/integrations"
TEACHER, LIGHTNING, HUGGING = (
    f"{PACKAGE}/integrations/{name}.py" for name in ("teacher", "lightning", "transformers")
)
TRAINS = "tests/train/test_train"
D_PARALLEL, D_ENGINE, D_OBJECTIVES, D_DATA, D_AUGMENT, D_FILES, D_CHECKPOINT, D_PAIRS = (
    f"{PACKAGE}/train/{name}.py"
    for name in (
        "parallel",
        "engine",
        "objectives",
        "data",
        "augment",
        "files",
        "checkpoint",
        "pairs",
    )
)
CHANNELWISE, CWD = f"{PACKAGE}/channelwise.py", "tests/test_channelwise.py"

DEFECTS = [
    # CUDA kernels, through the shim
    Defect("cuda: edge pixels lose gradient", G_CELLS, "if (cell < 0) return T(1);", "if (cell < 0) return T(0);", f"{CUDA} -k every_geometry"),
    Defect("cuda: fraction of the next cell", G_CELLS, "return n >= axis.unit ? T(1) : fraction_of<T>(n, axis.unit);", "return fraction_of<T>(n + 1, axis.unit);", f"{CUDA} -k usual_terms"),
    Defect("cuda: neighbour's half lost between lanes", G_ADJOINT, "g.bottom_left + bottom_of_left", "g.bottom_left", f"{CUDA} -k every_geometry"),
    Defect("cuda: rows of a chunk overwritten", G_ADJOINT, "rows.from_above = t > 0;", "rows.from_above = false;", f"{CUDA} -k every_geometry"),
    Defect("cuda: later steps of a cell overwrite", G_ADJOINT, "reads_bottom_(used_ && rows.written && rows.again)", "reads_bottom_(false)", f"{CUDA} -k every_geometry"),
    Defect("cuda: warp does not wait for what it staged", G_STAGING, "first_row, region.logits + m * kPlane, kModels * kPlane);\n      });\n    }\n    __syncwarp();", "first_row, region.logits + m * kPlane, kModels * kPlane);\n      });\n    }", f"{CUDA} -k every_geometry"),
    Defect("cuda: last column not staged", G_STAGING, "c < end - begin; c += kWarpSize", "c < 0; c += kWarpSize", f"{CUDA} -k several"),
    Defect("cuda: limit raises no flag", G_STAGING, "return (largest - smallest) * scale <= limit;", "return true;", f"{CUDA} -k handed_over"),
    Defect("cuda: halo counted twice", G_SUMS, "own ? x : 0.0", "x", f"{CUDA} -k every_geometry"),
    Defect("cuda: exponentials of the column above", G_CELL, "e[r] = e[r - 1] * q;", "e[r] = e[r - 1];", f"{CUDA} -k usual_terms"),
    Defect("cuda: label's gradient is that of the others", G_CELL, "if (is_label) g[r] = k.ce_label[r][s];", "", f"{CUDA} -k usual_terms"),
    Defect("cuda: label among the others", G_CELL, "if (!is_label) {", "{", f"{CUDA} -k usual_terms"),
    Defect("cuda: logarithm of the mixture without the student's", G_CELL, "fma(m, fast_log2(m) - a, k.late[r][s])", "fma(m, fast_log2(m), k.late[r][s])", f"{CUDA} -k usual_terms"),
    Defect("cuda: pixels left over are forgotten", G_KERNEL, "if (__any_sync(kAllLanes, left_over != 0))", "if (left_over == 0xffffffffu)", f"{CUDA} -k handed_over"),
    Defect("cuda: only the first pixel of a row is handed over", G_KERNEL, "((1u << kHandedOver) - 1u)", "1u", f"{CUDA} -k handed_over"),
    Defect("cuda: blocks of classes begin at the first", G_KERNEL, "staging_.template bring<2>(p, image_, begin, end, t);", "staging_.template bring<2>(p, image_, 0, end - begin, t);", f"{CUDA} -k numbers_of_classes"),
    Defect("cuda: label of another row of labels", G_KERNEL, "load_labels(p, image_, y_, x_, high_, wide_, label", "load_labels(p, image_, y_ + (high_ > 1), x_, high_, wide_, label", f"{CUDA} -k usual_terms"),
    Defect("cuda: huge corners are not read with care", G_SEGMENTS, "if (__any_sync(kAllLanes, !maxima_are_finite()))", "if (!maxima_are_finite() && p.classes < 0)", f"{CUDA} -k weight_zero"),
    Defect("cuda: js without its own share", G_SEGMENTS, "(F(1) - beta) * js_student_[i]);", "beta * js_student_[i]);", f"{CUDA} -k every_term"),
    Defect("cuda: space weights of a halo", "csrc/cuda/segment_kernel.h", "if (!column.own || at.label[s] < 0) continue;", "if (at.label[s] < 0) continue;", f"{CUDA} -k other_terms"),
    Defect("cuda: invalid pixels have gradients", G_LABELS, "if (label_[i] < 0) g[i] = 0.0f;", "", f"{CUDA} -k on_the_label_grid"),
    Defect("cuda: invalid pixels are read with care", G_SEGMENT, "z[s] = label[s] >= 0 ? read_pixel_carefully(model, u, c, s) : F(0);", "z[s] = read_pixel_carefully(model, u, c, s);", f"{CUDA} -k ignored_pixel"),
    Defect("cuda: general power from e", G_LABELS, "kGrad && kPower != 0 ? e_s : a_s", "kGrad ? e_s : a_s", f"{CUDA} -k usual_terms"),
    Defect("cuda: chunks not joined", G_COMBINE, "if (above != nullptr) g += above[s * slot + x];", "", f"{CUDA} -k every_geometry"),
    Defect("cuda: scales of terms swapped", f"{PACKAGE}/backends/cuda.py", "places = [part.spec.terms.index(name) for name in part.terms.values()]", "places = list(range(len(part.terms)))", f"{CUDA} -k every_term"),
    Defect("cuda: mean over images without pixels", G_COMBINE, "images_with_pixels += pixels > 0.0 ? 1.0 : 0.0;", "images_with_pixels += 1.0;", f"{CUDA} -k image_without"),
    Defect("cuda: labels out of range pass", f"{PACKAGE}/backends/_gpu.py", "if int(report[1]) > 0:", "if int(report[1]) > 10**9:", f"{INPUTS} -k label"),
    Defect("cuda: without mixing, the student is the target", G_PIXEL, "Reliability<F>{F(1), F(0)}", "Reliability<F>{F(0), F(1)}", f"{CUDA} -k without_mixing"),
    Defect("cuda: without mixing, a kernel compiled for a mixture", "csrc/cuda/segments_fixed.cu", "mix == Mix::kTeacher) return nullptr;", "mix == Mix::kTeacher) return &kPaper;", f"{CUDA} -k without_mixing"),
    Defect("cuda: paper mixes all the same", G_SEGMENTS, "const F z_h = mixes ?", "const F z_h = true ?", f"{CUDA} -k without_mixing"),
    # Triton kernels
    Defect("triton: paper mixes all the same", T_STATISTICS, "    if MIX_TEACHER:\n        z_h", "    if False:\n        z_h", f"{TRITON} -k 'every_term and mix-teacher'"),
    Defect("triton: without mixing, the value of a mixture", T_PASS, "                    value = kl_teacher_student\n                    hetero_sum", "                    value = r_t * kl_teacher_student\n                    hetero_sum", f"{TRITON} -k 'every_term and mix-teacher'"),
    Defect("triton: projection without mixing, gradient of a mixture", T_PROJECTION, "                    push += on_student\n", "                    push += on_student * r_t\n", f"{PROJECTING} -k mix-teacher"),
    Defect("triton: reliability the wrong way round", T_FORMULAS, "a = (student_nll - teacher_nll) * inverse_tau", "a = (teacher_nll - student_nll) * inverse_tau", f"{TRITON} -k every_term"),
    Defect("triton: textbook gradient of the label", T_FORMULAS, "return tl.where(is_label, -others, e)", "return e", f"{TRITON} -k every_term"),
    Defect("triton: discrepancy may be negative", T_FORMULAS, "return max_or_nan(kl_teacher_student, 0.0)", "return kl_teacher_student - 0.01", f"{TRITON} -k every_term"),
    Defect("triton: logarithm drops NaN", T_FORMULAS, "y = log1p_near_zero(t) * LOG2_E + n + (x - x)", "y = log1p_near_zero(t) * LOG2_E + n", f"{TRITON} -k logarithms"),
    Defect("triton: edge pixels lose gradient", T_TAPS, "tl.where(cell < 0, 1.0, tl.where", "tl.where(cell < 0, inside, tl.where", f"{TRITON} -k every_geometry"),
    Defect("triton: neighbour's half lost between lanes", T_TILES, "tl.where(from_left, tl.gather(bottom_right, left_lane, 3), 0.0)", "0.0", f"{TRITON} -k every_geometry"),
    Defect("triton: halo counted twice", T_PASS, "over_program(tl.where(own, ce_sum, 0.0))", "over_program(ce_sum)", f"{TRITON} -k every_geometry"),
    Defect("triton: rows of a chunk overwritten", T_TILES, "top += tl.load(top_row, mask=written & from_above, other=0.0)", "top += 0.0", f"{TRITON} -k every_geometry"),
    Defect("triton: chunks not joined", T_COMBINE, "g += tl.load(above, mask=has_above, other=0.0)", "g += 0.0", f"{TRITON} -k every_geometry"),
    Defect("triton: flag never raised", T_PASS, "found = tl.where(smallest > SMALLEST_TOTAL, 0.0, 1.0)", "found = tl.where(smallest > -1.0, 0.0, 0.0)", f"{TRITON} -k confident"),
    Defect("triton: huge logits not traced", T_TAPS, "trace = z00 * much + (z01 * much + (z10 * much + (z11 * much + trace)))", "trace = trace * 0.0", f"{TRITON} -k ignored_pixel"),
    Defect("triton: careful pass reads ignored pixels", T_TAPS, "    if CAREFUL:\n        z = tl.where(valid, z, 0.0)\n", "", f"{TRITON} -k ignored_pixel"),
    Defect("triton: offsets of 32 bits at best", T_LAUNCH, "return tl.int64 if largest > _INT32 else tl.int32", "return tl.int8", f"{TRITON} -k 64_bit"),
    Defect("triton: scales of terms swapped", T_LAUNCH, "return run.places[run.slots.index(k)] if k < len(run.terms) else -1", "return k if k < len(run.terms) else -1", f"{TRITON} -k every_term"),
    Defect("triton: space weights of other pixels too", T_SPACE, "valid = (label >= 0) & own", "valid = own", f"{TRITON} -k every_term"),
    Defect("triton: labels out of range pass", f"{PACKAGE}/backends/_gpu.py", "if int(report[1]) > 0:", "if int(report[1]) > 10**9:", f"{INPUTS} -k label"),
    Defect("loss module fuses what it must not", LOSSES, "if self.student_projector.bn is not None:", "if False:", f"{PROJECTING} -k module"),
    # formulas
    Defect("kd without T^2", REFERENCE, "_total(temperature**2 * per_pixel", "_total(per_pixel", f"{ORACLE} -k kd_is_torchs"),
    Defect("kd directions swapped", REFERENCE, 'if divergence == "forward":', 'if divergence == "reverse":', f"{ORACLE} -k kd_is_torchs"),
    Defect("js weights swapped", REFERENCE, "log_p_t + math.log(beta), log_p_s + math.log1p(-beta)", "log_p_s + math.log(beta), log_p_t + math.log1p(-beta)", f"{ORACLE} -k js"),
    Defect("reliability ignores tau", REFERENCE, "(e_s - e_t) / spec.tau", "(e_s - e_t)", f"{ORACLE} -k by_hand"),
    Defect("reliability the wrong way round", REFERENCE, "F.logsigmoid((e_s - e_t) / spec.tau)", "F.logsigmoid((e_t - e_s) / spec.tau)", f"{ORACLE} -k by_hand"),
    Defect("discrepancy the wrong way round", REFERENCE, "discrepancy = _kl(log_p_t, log_p_s)", "discrepancy = _kl(log_p_s, log_p_t)", f"{ORACLE} -k softmax_kl"),
    Defect("without mixing, the student is the target", REFERENCE, "mixed_target = log_p_t\n", "mixed_target = log_p_s\n", f"{ORACLE} -k mix_teacher"),
    Defect("without mixing, infinite logits of the student count", REFERENCE, 'z_h = teacher_z if spec.mix == "teacher" else', 'z_h = teacher_z + 0.0 * student_z if spec.mix == "teacher" else', f"{OUTPUTS} -k 'not_mixed and reference'"),
    Defect("paper: gap without its positive part", REFERENCE, "(h_s - error(z_h)).clamp(min=0.0)", "(h_s - error(z_h))", f"{ORACLE} -k paper_by_hand"),
    Defect("paper: tie goes to the teacher", REFERENCE, "(h_s + RELIABILITY_EPS) / (h_t + h_s + 2.0 * RELIABILITY_EPS)", "(h_s + 2.0 * RELIABILITY_EPS) / (h_t + h_s + 2.0 * RELIABILITY_EPS)", f"{ORACLE} -k half_and_half"),
    Defect("paper: weights over the wrong axis", REFERENCE, "weight = (h_s + discrepancy).softmax(dim=1)", "weight = (h_s + discrepancy).softmax(dim=2)", f"{ORACLE} -k paper_by_hand"),
    Defect("space weights see ignored pixels", REFERENCE, ".masked_fill(~inside, -math.inf)", "", f"{ORACLE} -k space_weights"),
    Defect("mixed target not detached", REFERENCE, "student_z, teacher_z = student_z.detach(), teacher_z.detach()", "teacher_z = teacher_z.detach()", f"{ORACLE} -k hetero_in_the_pass"),
    Defect("feature term sums over classes", REFERENCE, ".square().mean(dim=1)", ".square().sum(dim=1)", f"{ORACLE} -k feature_is_a_mean"),
    Defect("smoothing ignores class weights", REFERENCE, "class_weight[:, None, None] * log_p", "log_p", f"{ORACLE} -k cross_entropy_is_torchs"),
    Defect("textbook nll", REFERENCE, "return torch.logaddexp(a, torch.zeros_like(a))", "return -_at_label(z.log_softmax(dim=1), label)", f"{ORACLE} -k confident"),
    Defect("maximum not subtracted first", REFERENCE, "z = z - z.detach().amax(dim=1, keepdim=True)", "z = z * 1.0", f"{OUTPUTS} -k large_logits"),
    Defect("align_corners lost", REFERENCE, 'mode="bilinear", align_corners=align_corners', 'mode="bilinear", align_corners=False', f"{ORACLE} -k upsample"),
    Defect("projection without bias", REFERENCE, "z = z + bias[:, None, None]", "z = z + 0.0", f"{ORACLE} -k projection_is"),
    Defect("nearest labels rounded", LABELS, "* height // max(size[0], 1)", "* height // max(size[0], 1) + 1", f"{ORACLE} -k nearest"),
    # inputs
    Defect("computed in 16 bits", REFERENCE, "dtype = torch.promote_types(student_logits.dtype, torch.float32)\n    size", "dtype = student_logits.dtype\n    size", f"{INPUTS} -k every_dtype"),
    Defect("ignore_index cut to 8 bits", LABELS, "_extension.operators().label_report(target, num_classes, ignore_index)", "_extension.operators().label_report(target, num_classes, ignore_index % 256)", f"{INPUTS} -k any_integer"),
    Defect("one class is NaN", REFERENCE, "return z[:, 0] - z[:, 0]", "return z[:, 0] / 0.0", f"{INPUTS} -k one_class"),
    Defect("more than 1024 classes refused", FUNCTIONAL, "MAX_CLASSES = 4096", "MAX_CLASSES = 1024", f"{INPUTS} -k 4096"),
    Defect("empty batches crash", REFERENCE, "if target.numel() == 0:", "if False:", f"{INPUTS} -k empty"),
    Defect("resolution ignored", FUNCTIONAL, 'if resolution == "logits":', 'if resolution == "never":', f"{INPUTS} -k resolution"),
    Defect("autocast reaches the formulas", REFERENCE, "z = upsample(logits.to(dtype), size", "z = upsample(logits.to(torch.bfloat16 if torch.is_autocast_enabled('cpu') else dtype).to(dtype), size", f"{INPUTS} -k autocast_changes"),
    Defect("autocast reaches the projection", PROJECTOR, "with _no_autocast(features.device.type):", "if True:", f"{INPUTS} -k projection"),
    Defect("rank not checked", FUNCTIONAL, "if tensor.dim() != rank:", "if False:", f"{INPUTS} -k ranks_and_shapes"),
    Defect("classes not compared", FUNCTIONAL, "if teacher_logits.shape[1] != classes:", "if False:", f"{INPUTS} -k ranks_and_shapes"),
    Defect("dtype not checked", FUNCTIONAL, "if tensor.dtype not in dtypes:", "if False:", f"{INPUTS} -k types_and_dtypes"),
    Defect("device not checked", FUNCTIONAL, "if tensor.device != student_logits.device:", "if False:", f"{INPUTS} -k devices"),
    Defect("temperature not checked", FUNCTIONAL, "if not _SMALLEST_TEMPERATURE <= value <= 1.0 / _SMALLEST_TEMPERATURE:", "if False:", f"{INPUTS} -k temperatures"),
    Defect("options not checked", FUNCTIONAL, "    if value not in choices:", "    if False:", f"{INPUTS} -k out_of_range"),
    Defect("teacher silently detached", FUNCTIONAL, 'if teacher_logits.requires_grad and "teacher_ce" not in spec.terms:', "if False:", f"{INPUTS} -k silently"),
    Defect("normalizer not checked", FUNCTIONAL, "if value.numel() != 1:", "if False:", f"{INPUTS} -k wrong_normalizers"),
    Defect("labels not checked (reference)", OPS, 'if target.device.type == "cpu" or check_synchronously():', "if check_synchronously():", f"{INPUTS} -k labels_out_of_range"),
    Defect("DTensors not refused", FUNCTIONAL, "if _is_dtensor(tensor):", "if False:", f"{INPUTS} -k dtensors"),
    Defect("module checks no features", LOSSES, "if features.shape[1] != projector.conv.in_channels:", "if False:", f"{INPUTS} -k module_refuses"),
    # outputs
    Defect("terms not detached", FUNCTIONAL, "means.detach().to(dtype).unbind()", "means.to(dtype).unbind()", f"{OUTPUTS} -k not_asked_for"),
    Defect("weights not applied", FUNCTIONAL, "loss = loss + weight * value", "loss = loss + value", f"{OUTPUTS} -k weighted_sum"),
    Defect("maps show ignored pixels", REFERENCE, "maps = torch.where(valid, pair, 0)", "maps = pair", f"{OUTPUTS} -k maps"),
    Defect("maps swapped", FUNCTIONAL, '"reliability": self.sums.maps[0], "discrepancy": self.sums.maps[1]', '"reliability": self.sums.maps[1], "discrepancy": self.sums.maps[0]', f"{OUTPUTS} -k 'maps or reliable'"),
    Defect("0 / 0 when all is ignored", FUNCTIONAL, "torch.where(denominators == 0, 0.0, 1.0 / denominators)", "1.0 / denominators", f"{OUTPUTS} -k all_pixels_ignored"),
    Defect("ignored pixels by a factor 0 (reference)", REFERENCE, "return torch.where(valid[:, None], z, 0)", "return z", f"{OUTPUTS} -k ignored_pixels"),
    # gradients
    Defect("second order silently wrong", OPS, "    if torch.is_grad_enabled():\n        raise", "    if False:\n        raise", f"{OUTPUTS} -k second_order"),
    Defect("gradients made without need", OPS, "    student_grad = (\n        grad_mode\n", "    student_grad = (\n        True\n", f"{OUTPUTS} -k told_which_gradients"),
    Defect("teacher gets the hetero gradient", REFERENCE, "frozen_teacher_z = teacher_z.detach()", "frozen_teacher_z = teacher_z", f"{OUTPUTS} -k only_teacher_ce_reaches"),
    Defect("normalizer replaces every denominator", FUNCTIONAL, "if one.counts_valid_pixels(term)}", "if True}", f"{OUTPUTS} -k plain_normalizer"),
    Defect("normalizer ignored by name", FUNCTIONAL, "if term in normalizer}", "if False}", f"{OUTPUTS} -k micro_batches"),
    Defect("kd taken on the projected pair", LOSSES, '("ce", "kd")}\n        on', '("ce",)}\n        on', f"{OUTPUTS} -k module_on_features"),
    Defect("teacher's projector trained by every term", LOSSES, 'if not self.projector_weight:', "if False:", f"{OUTPUTS} -k only_teacher_ce"),
    Defect("teacher features not detached", LOSSES, 'if side == "teacher":', "if False:", f"{OUTPUTS} -k module_on_features"),
    # the CPU backend
    Defect("writes to the caller's logits", CPU, "            by_term = sums.tolist()", "            student_logits.detach().zero_()\n            by_term = sums.tolist()", f"{INPUTS} -k never_written"),
    Defect("ignore_index cut to 8 bits (kernel)", CPU, "        spec.ignore_index,\n        spec.align", "        spec.ignore_index % 256,\n        spec.align", f"{INPUTS} -k any_integer"),
    Defect("labels not checked (kernel)", CPU, "            raise_bad_label(", "            (lambda *a: None)(", f"{INPUTS} -k labels_out_of_range"),
    Defect("grad_output ignored", CPU, "factors = [scales[name] for", "factors = [1.0 for", f"{OUTPUTS} -k any_grad_output"),
    Defect("full-resolution logits stored", CPU, "        fractions: dict[", "        full = torch.nn.functional.interpolate(student_logits.detach(), target.shape[1:])\n        fractions: dict[", f"{CPU_CE} -k peak_memory"),
    Defect("inputs kept for backward", CPU, "        return (student_grad and student is not None and", "        return True or (student_grad and student is not None and", f"{OUTPUTS} -k overwritten"),
    Defect("gradients in the wrong order", PARTS, "own: dict[str, str] = {term: term for term in KERNEL_TERMS if term in spec.terms}", "own: dict[str, str] = {term: term for term in reversed(KERNEL_TERMS) if term in spec.terms}", f"{CPU_CE} -k every_call"),
    # the kernels: rows and labels
    Defect("bfloat16 read as float16", ROWS, "bfloat16_to_float(reinterpret_cast<const uint16_t*>(view.data)[offset])", "half_to_float(reinterpret_cast<const uint16_t*>(view.data)[offset])", f"{INPUTS} -k every_dtype"),
    Defect("channel stride assumed dense", ROWS, "read_dense<T>(view, offset + c * view.stride[1], count, out + c * step);", "read_dense<T>(view, offset + c * view.stride[2] * 4, count, out + c * step);", f"{INPUTS} -k strides_do_not"),
    Defect("batch stride assumed dense", ROWS, "const int64_t offset = b * view.stride[0] + row * view.stride[2] + x0 * view.stride[3];\n  if (view.stride[3] == 1 || count == 1) {", "const int64_t offset = b * view.stride[1] * 5 + row * view.stride[2] + x0 * view.stride[3];\n  if (view.stride[3] == 1 || count == 1) {", f"{INPUTS} -k expanded"),
    Defect("label stride assumed dense", BAND, "if (view.stride[2] != 1 && p.label_width > 1) return false;", "", f"{INPUTS} -k strides_do_not"),
    Defect("valid counts all pixels (kernel)", BAND, "valid += in_range && !ignored;", "valid += 1;", f"{OUTPUTS} -k valid_is_counted"),
    Defect("a bad label passes the dense reader", BAND, "bad += !in_range && !ignored;", "", f"{INPUTS} -k labels_out_of_range"),
    Defect("labels checked in 32 bits", BAND, "const int64_t label = static_cast<int64_t>(in[x]);", "const int64_t label = static_cast<int32_t>(in[x]);", f"{INPUTS} -k labels_out_of_range"),
    Defect("absent classes' weights multiplied by 0", TERMS, "    if (p.smoothing != T(0)) {\n        run = power_ == 2", "    if (true) {\n        run = power_ == 2", f"{INPUTS} -k absent_class"),
    Defect("freed memory read", STRIDED, "data != nullptr || tensor.numel() == 0", "true", f"{INPUTS} -k without_memory"),
    Defect("the padding before a row is not folded", BAND, "row[0] += row[-1];", "", f"{CPU_CE} -k integer_ratios"),
    Defect("edge rows lost", RUNNER, "out[x] += edge[c * width_ + x]", "out[x] += T(0) * edge[c * width_ + x]", f"{CPU_CE} -k integer_ratios"),
    Defect("taps in float", TAPS, "double fraction = source - static_cast<double>(lower);", "double fraction = static_cast<float>(source) - static_cast<float>(lower);", f"{CPU_CE} -k far_from_the_origin"),
    Defect("a tap of weight zero is read", STATISTICS, "select(bad, select(equal(f, F(T(0))), a, mixed), y)", "select(bad, mixed, y)", f"{CPU_CE} -k infinite"),
    Defect("huge logits not looked for", ROWS, "  return any(bad);", "  return any(bad) && false;", f"{OUTPUTS} -k 'largest or ignored_pixels'"),
    Defect("float sums over any ratio", RUNNER, "kMaxFloatRatio = 64", "kMaxFloatRatio = 1 << 30", f"{CPU_CE} -k great_many"),
    Defect("sums depend on threads", RUNNER, "        kernels_.run_band(pass_, band, memory, report);", "        kernels_.run_band(pass_, band, memory, report);\n        if (begin > 0) sums_[static_cast<size_t>(band * kTerms * 2)] *= 1.0 + 1e-9 * static_cast<double>(begin);", f"{OUTPUTS} -k bits_do_not"),
    # the kernels: formulas
    Defect("no maximum in the kernel", STATISTICS, "m[r] = max(y, m[r]);", "m[r] = F(T(0));", f"{OUTPUTS} -k 'large_logits or largest'"),
    Defect("true class as p - 1", MATH, "return select(is_label, F(0) - others, e);", "return select(is_label, e - (e + others), e);", f"{OUTPUTS} -k confident_pixels"),
    Defect("nll as log(total)", MATH, "const auto confident = less(ratio, F(1));", "const auto confident = less(ratio, F(0));", f"{OUTPUTS} -k confident_pixels"),
    Defect("NaN hidden in the discrepancy", MATH, "return max(F(0), kl_teacher_student);", "return max(kl_teacher_student, F(0));", f"{OUTPUTS} -k nan_in_a_valid"),
    Defect("reliability swapped", MATH, "select(student_is_better, smaller, larger), select(student_is_better, larger, smaller)", "select(student_is_better, larger, smaller), select(student_is_better, smaller, larger)", f"{OUTPUTS} -k 'test_maps and cpu'"),
    Defect("the weight d forgotten in the gradient", TERMS, "F(p.scale[kHetero] * t) * x.weight * x.reliable.teacher", "F(p.scale[kHetero] * t) * x.one * x.reliable.teacher", f"{OUTPUTS} -k any_grad_output"),
    Defect("exponentials two digits short", ELEMENTARY, "F p = F(0.00015353361959569156f);", "F p = F(0.00016f);", f"{CPU_CE} -k exp2"),
    Defect("a table entry two digits short", AVX512, "1.021897149f", "1.02189f", f"{CPU_CE} -k exp2"),
    Defect("without mixing, infinite logits of the student count", PAPER, "F z_h = z_t;", "F z_h = mixed_target(F(T(1)), z_t, F(T(0)), z_s);", f"{OUTPUTS} -k 'not_mixed and cpu'"),
    Defect("without mixing, the gradient of a mixture", TERMS, "const F gradient = F(p.scale[kHetero] * t) * x.weight;\n      on_student = gradient * x.student_inverse;\n      on_other = gradient * x.teacher_inverse;", "const F gradient = F(p.scale[kHetero] * t) * x.weight * x.reliable.student;\n      on_student = gradient * x.student_inverse;\n      on_other = gradient * x.teacher_inverse;", f"{OUTPUTS} -k 'any_grad_output and mix-teacher and cpu'"),
    Defect("paper: reliability of the wrong side", PAPER, "class_reliability(h_t, h_s)", "class_reliability(h_s, h_t)", f"{OUTPUTS} -k any_grad_output"),
    Defect("space: a band's maximum forgotten", RUNNER, "largest = std::max(largest, maxima.get()[first + k * classes]);", "", f"{CPU_CE}"),
    # the kernels: ways that only some calls take
    Defect("chain across unevenly spaced rows", TERMS, "if (!evenly_spaced(student_fraction)) return false;", "", f"{CPU_CE} -k integer_ratios"),
    Defect("chain out of the range of floats", CHAIN, "return !any(not_less(max(lo, hi) * F(scale), F(kChainSpan<T>)));", "return true;", f"{CPU_CE}"),
    Defect("chain below its bound", CHAIN, "return !any(less(select(valid, total, F(T(1))), F(kChainSlack<T>)));", "return true;", f"{CPU_CE}"),
    Defect("last vectors of a row on the label grid", BAND, "for (int64_t v = vectors_end; v < end; ++v) identity_group<1>(y, v, v - first);", "", f"{CPU_CE}"),
    Defect("adjoint's last lane lost", GRADIENTS, "row[F::N] += last_lane(upper);", "", f"{CPU_CE} -k integer_ratios"),
    Defect("lanes that are not consecutive taken so", GEOMETRY, "consecutive = consecutive && (lower[l] == start + l || before);", "", f"{CPU_CE}"),
    # systems
    Defect("fake kernel with a wrong dtype", OPS, "student_logits.new_empty(terms, dtype=torch.float64),\n        student_logits.new_empty((), ", "student_logits.new_empty(terms),\n        student_logits.new_empty((), ", f"{SYSTEMS} -k opcheck"),
    Defect("fake count with a wrong dtype", OPS, "return target.new_empty((), dtype=torch.int64)", "return target.new_empty((), dtype=torch.int32)", f"{SYSTEMS} -k valid_count"),
    Defect("a graph break", FUNCTIONAL, "    check_spec(spec)\n    check_choice(resolution", "    check_spec(spec)\n    torch._dynamo.graph_break()\n    check_choice(resolution", f"{SYSTEMS} -k 'fullgraph and ce-'"),
    Defect("numbers traced as constants only", SPEC, "if name in _STRUCTURE}", "if True}", f"{SYSTEMS} -k annealed"),
    Defect("label check dropped by the compiler", OPS, "numerators = torch.where(valid >= 0, numerators, math.nan)", "pass", f"{SYSTEMS} -k bad_labels"),
    Defect("kernel silently not used", f"{PACKAGE}/backends/order.py", '"cpu": ("cpu",),', '"cpu": (),', f"{SYSTEMS} -k there_and_chosen"),
    Defect("context ignored", REGISTRY, "requested if requested is not None else _requests[-1].name", "requested if requested is not None else _requests[0].name", f"{SYSTEMS} -k argument_beats"),
    Defect("environment ignored", REGISTRY, 'os.environ.get("HETEROAKD_BACKEND", AUTO) or AUTO', "AUTO", f"{SYSTEMS} -k environment_variable"),
    Defect("falls back silently", REGISTRY, "        if reason is not None:\n            raise", "        if False:\n            raise", f"{SYSTEMS} -k says_why"),
    Defect("import loads the extension", f"{PACKAGE}/__init__.py", "from .version import __version__", "from .version import __version__\nfrom ._extension import loaded as _loaded\n_loaded()", f"{SYSTEMS} -k import_loads"),
    Defect("needs the extension", LABELS, "and _extension.loaded():", ":", f"{SYSTEMS} -k without_the_extension"),
    Defect("local denominators", FUNCTIONAL, "    if process_group is not None:\n", "    if False:\n", "tests/test_distributed.py"),
    Defect("summed, not averaged, over ranks", FUNCTIONAL, "return total / dist.get_world_size(process_group)", "return total", "tests/test_distributed.py"),
    Defect("CPython API in the library", "csrc/library.cpp", "std::string build_info() {", 'extern "C" int PyRun_SimpleString(const char*);\nstd::string build_info() {\n  if (__builtin_expect(std::string(__FILE__).empty(), 0)) PyRun_SimpleString("");', f"{SYSTEMS} -k stable_abi"),
    # what hostile input found
    Defect("options coerced", FUNCTIONAL, "    if not isinstance(value, bool):", "    if False:", f"{INPUTS} -k types_and_dtypes"),
    Defect("None means 0", FUNCTIONAL, "for name in TERMS if name in weights", "for name in TERMS if weights.get(name)", f"{INPUTS} -k types_and_dtypes"),
    Defect("forward mode dropped", OPS, "_refuse_forward_mode(student_logits, teacher_logits)", "pass", f"{OUTPUTS} -k forward_mode"),
    Defect("blocks end each other", REGISTRY, "_requests.remove(request)", "_requests.pop()", f"{SYSTEMS} -k two_threads"),
    Defect("operators compute something else", OPS, "    if refusal is not None:", "    if False:", f"{SYSTEMS} -k refuse_what"),
    Defect("labels that resampling skips", FUNCTIONAL, 'if target.device.type == "cpu" or check_synchronously():', "if False:", f"{INPUTS} -k resampling_would_skip"),
    Defect("batch norm in mixed dtypes", PROJECTOR, "if self.bn.weight.dtype == z.dtype:", "if True:", f"{INPUTS} -k mix_of_dtypes"),
    Defect("running statistics lost", PROJECTOR, "buffer.copy_(wide[name])", "pass", f"{INPUTS} -k mix_of_dtypes"),
    Defect("inference tensors refused", LOSSES, "features.is_inference():", "False:", f"{INPUTS} -k inference_mode_made"),
    Defect("class weights shared with the caller", LOSSES, "torch.as_tensor(class_weight).detach().clone()", "torch.as_tensor(class_weight)", f"{OUTPUTS} -k own_class_weights"),
    # drop-ins for other trainers
    Defect("trainers: teacher left in training mode", TEACHER, "        self.module.eval()  # somebody else may hold it too\n", "", f"{TRAINERS}/test_teacher.py"),
    Defect("trainers: tap outlives its block", TEACHER, "            hook.remove()\n", "", f"{TRAINERS}/test_teacher.py"),
    Defect("trainers: Lightning's denominators of one rank", LIGHTNING, "world(self.process_group) if self.training else None", "None", f"{TRAINERS}/test_ranks.py"),
    Defect("trainers: accumulated batches count alike", HUGGING, "self._normalizer(num_items_in_batch) if model.training else None", "None", f"{TRAINERS}/test_transformers.py"),
    Defect("trainers: gradients of projectors add up", HUGGING, "        self.loss.zero_grad()\n", "        pass\n", f"{TRAINERS}/test_transformers.py"),
    Defect("trainers: gradients of projectors of one rank", HUGGING, "self._loss = self.accelerator.prepare_model(self.distillation_loss)", "pass", f"{TRAINERS}/test_ranks.py"),
    Defect("trainers: projectors not resumed", HUGGING, "            self.distillation_loss.load_state_dict(state)\n", "            pass\n", f"{TRAINERS}/test_transformers.py"),
    Defect("trainers: counts what the Trainer ignores", HUGGING, "!= ignored)", "!= -100)", f"{TRAINERS}/test_transformers.py"),
    # the driver
    Defect("driver: rehearsal leaves its statistics", D_PARALLEL, "            own[name].copy_(buffer)\n", "            pass\n", f"{TRAINS}_distributed.py -k rehearsal"),
    Defect("driver: momenta not resumed", D_PARALLEL, "        optimizer.load_state_dict(own)\n", "", f"{TRAINS}_engine.py -k resumed_weights"),
    Defect("driver: random states not resumed", D_ENGINE, '            restore_random_states(state["random"][self.world.rank])\n', "            pass\n", f"{TRAINS}_engine.py -k resumed_weights"),
    Defect("driver: log rows not resumed", D_ENGINE, 'self._rows = [] if state["rows"] is None else list(state["rows"].to(self.device))', "self._rows = []", f"{TRAINS}_engine.py"),
    Defect("driver: denominators of the first micro-batch", D_ENGINE, "torch.stack([one[name] for one in own]).mean() for name in own[0]", "own[0][name] for name in own[0]", f"{TRAINS}_distributed.py -k accumulation_alone"),
    Defect("driver: pixels of the first micro-batch", D_ENGINE, "self.world.mean(torch.stack(counts).mean())", "self.world.mean(counts[0])", f"{TRAINS}_distributed.py -k accumulation_alone"),
    Defect("driver: pixels of this rank only", D_ENGINE, "self.world.mean(torch.stack(counts).mean())", "torch.stack(counts).mean()", f"{TRAINS}_distributed.py -k ranks_take"),
    Defect("driver: losses of micro-batches add up", D_ENGINE, "loss = output.loss / len(prepared) if len(prepared) > 1 else output.loss", "loss = output.loss", f"{TRAINS}_distributed.py -k accumulation_alone"),
    Defect("driver: scores of this rank only", D_ENGINE, "    matrix.counts = world.total(matrix.counts)\n", "", f"{TRAINS}_distributed.py -k ranks"),
    Defect("driver: terms of this rank only", D_ENGINE, "return self.world.total(torch.stack(self._rows)) / self.world.size", "return torch.stack(self._rows)", f"{TRAINS}_distributed.py -k ranks"),
    Defect("driver: denominators of this rank only", D_OBJECTIVES, "        self.loss.process_group = self.cwd.process_group = group\n", "        self.cwd.process_group = group\n", f"{TRAINS}_distributed.py -k ranks_take"),
    Defect("driver: channel-wise term of this rank only", D_OBJECTIVES, "        self.loss.process_group = self.cwd.process_group = group\n", "        self.loss.process_group = group\n", f"{TRAINS}_distributed.py -k ranks_take"),
    Defect("driver: sharded weights not saved", D_PARALLEL, "            self.objective.load_state_dict(get_model_state_dict(self.module, options=_FULL))\n", "", f"{TRAINS}_distributed.py -k ranks_take"),
    Defect("driver: sharded weights not resumed", D_PARALLEL, "            set_model_state_dict(self.module, self.objective.state_dict(), options=_FULL)\n", "            pass\n", f"{TRAINS}_distributed.py -k another_number"),
    Defect("driver: ranks read the same pictures", D_DATA, "(micro * world + rank) * size", "micro * world * size", f"{TRAINS}_data.py -k share_out"),
    Defect("driver: the same augmentation at every step", D_DATA, "(self.seed, _AUGMENT, step, slot)", "(self.seed, _AUGMENT, slot)", f"{TRAINS}_data.py -k augmented_anew"),
    Defect("driver: a worker's error in a wrapping", D_DATA, "            if isinstance(batch, UserError):\n                raise batch\n", "            if isinstance(batch, UserError):\n                raise RuntimeError(str(batch))\n", f"{TRAINS}_data.py -k comes_out_of_a_worker"),
    Defect("driver: mask not flipped", D_AUGMENT, "picture, mask = picture[:, ::-1], mask[:, ::-1]", "picture = picture[:, ::-1]", f"{TRAINS}_data.py -k move"),
    Defect("driver: padding counts", D_AUGMENT, "np.pad(mask, ((0, y), (0, x)), constant_values=ignore)", "np.pad(mask, ((0, y), (0, x)))", f"{TRAINS}_data.py -k pads"),
    Defect("driver: largest class not limited", D_AUGMENT, "if 0 < counts.max() <= config.crop_max_ratio * counts.sum():", "if 0 < counts.max():", f"{TRAINS}_augment.py"),
    Defect("driver: hue as large as saturation", D_AUGMENT, "_HUE = 0.1", "_HUE = 0.5", f"{TRAINS}_augment.py"),
    Defect("driver: checkpoint written in place", D_FILES, 'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")', "temporary = path", f"{TRAINS}_faults.py -k disk"),
    Defect("driver: damage is not noticed", D_CHECKPOINT, "if hashlib.sha256(content).digest() != data[len(_MAGIC) : head]:", "if False:", f"{TRAINS}_engine.py -k damaged_newest"),
    Defect("driver: no checkpoint before the newest", D_CHECKPOINT, ", keep_as=folder / PREVIOUS)", ")", f"{TRAINS}_engine.py -k damaged_newest"),
    Defect("driver: ADE20K's 0 is a class", D_PAIRS, "(value, value - 1) for value in range(1, num_classes + 1)", "(value, value) for value in range(num_classes)", f"{TRAINS}_layouts.py -k ade20k"),
    Defect("driver: values beyond the classes pass", D_PAIRS, "        if wrong.size:", "        if wrong.size > 10**9:", f"{TRAINS}_layouts.py -k none_of_the_classes"),
    Defect("driver: Cityscapes ids shifted", f"{PACKAGE}/train/cityscapes.py", "(value, index) for index, value in enumerate(_IDS)", "(value, index) for index, value in enumerate(_IDS[::-1])", f"{TRAINS}_layouts.py -k cityscapes"),
    Defect("driver: VOC validates what it trains on", f"{PACKAGE}/train/voc.py", "stems = sorted(listed - set(val_stems))", "stems = sorted(listed)", f"{TRAINS}_layouts.py -k mat_files"),
    # channel-wise distillation
    Defect("cwd: softmax over classes", CHANNELWISE, ".log_softmax(dim=2)", ".log_softmax(dim=1)", CWD),
    Defect("cwd: without T^2", CHANNELWISE, "temperature**2 * divergence", "divergence", CWD),
    Defect("cwd: images without a pixel count", CHANNELWISE, "counted.sum(dtype=torch.float64) * classes", "float(counted.numel()) * counted.new_ones((), dtype=torch.float64) * classes", CWD),
    Defect("cwd: ignored pixels in the softmax", CHANNELWISE, "torch.where(valid, z.flatten(2) / temperature, nothing)", "(z.flatten(2) / temperature)", CWD),
]  # fmt: skip


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "HETEROAKD_BUILD_CUDA": "0"}
    environment["CXXFLAGS"] = "-O1"  # a defect is one at any optimisation, and compiles sooner
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def build(copy: Path) -> bool:
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], copy).returncode == 0


def test(copy: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    return run([*command, *shlex.split(arguments)], copy)


def main(words: list[str]) -> int:
    chosen = [d for d in DEFECTS if not words or any(w in d.what for w in words)]
    survivors: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        ignore = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignore)
        # where an installed package has it; an editable one would lend its own
        (copy / PACKAGE / "kernels").symlink_to("../kernels")
        if not build(copy):
            raise SystemExit("the unbroken copy does not build")
        files = " ".join(sorted({defect.tests.split()[0] for defect in chosen}))
        unbroken = test(copy, files)
        if unbroken.returncode != 0:
            raise SystemExit(f"the unbroken copy fails:\n{unbroken.stdout}")
        stale = False
        for number, defect in enumerate(chosen, 1):
            path = copy / defect.file
            text = path.read_text()
            if text.count(defect.old) != 1:
                raise SystemExit(
                    f"{defect.what}: found {text.count(defect.old)} times in {defect.file}, "
                    f"expected once: {defect.old!r}"
                )
            # tests compile csrc/cuda themselves
            compiled = defect.file.startswith("csrc") and "/cuda/" not in defect.file
            path.write_text(text.replace(defect.old, defect.new))
            if (compiled or stale) and not build(copy):
                raise SystemExit(f"{defect.what}: does not compile, so it proves nothing")
            code = test(copy, defect.tests).returncode
            caught = code == 1 or code < 0  # a failed test, or a crash; not a test that is missing
            path.write_text(text)
            stale = compiled  # built again with the next defect, or before the next test
            verdict = "caught" if caught else "SURVIVED"
            print(f"{number:3}/{len(chosen)} {verdict:9}{defect.what}", flush=True)
            if not caught:
                survivors.append(defect.what)
    print(f"{len(chosen) - len(survivors)} caught, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
