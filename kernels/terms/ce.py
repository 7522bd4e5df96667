"""Cross entropy: `cross_entropy` in reference.py; of the teacher's logits in a pass over those.

value    w_y (1 - s) nll + s / C (W log(total) - sum_c w_c (z_c - m)),    W = sum_c w_c
g_c      ((1 - s) w_y + s W / C) p_c - (s / C) w_c; of the label (1 - s) w_y (p_y - 1) + ...
divided by |V|, or the sum of w_y over V
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import log
from .term import CLASS_WEIGHT, NONE, STUDENT_HARD, Coefficients, Needs, Traits

PLAIN = tl.constexpr(0)
SMOOTHED = tl.constexpr(1)


class Numbers(NamedTuple):
    hard: Any  # 1 - s
    soft: Any  # s / C


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers((1.0 - options[0]).to(FLOAT), options[0].to(FLOAT) / classes)


def variant(term: Any) -> int:
    return int(term.label_smoothing != 0.0)


@triton.constexpr_function
def traits(variant):
    return Traits(
        Needs(student_nll=True, weighted_z=variant == 1),
        student=STUDENT_HARD,
        other=CLASS_WEIGHT if variant == 1 else NONE,
        has_label=True,
        is_divergence=False,
    )


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    hard = t.label_weight
    if VARIANT == SMOOTHED:
        hard *= n.hard
    per_e = scale * hard * t.hard_inverse
    value = hard * t.student_nll
    student = per_e
    other = 0.0
    # p - 1 of a confident pixel keeps its relative precision in the sum of the others
    label = -t.student_others * per_e
    if VARIANT == SMOOTHED:
        soft = n.soft * t.labelled
        other = soft * scale
        value += soft * (p.weight_sum * log(t.hard_total) - t.weighted_z)
        student += other * p.weight_sum * t.hard_inverse
        label += other * (p.weight_sum * (t.label_e * t.hard_inverse) - t.label_weight)
    return Coefficients(value, t.label_weight, student, other, label)
