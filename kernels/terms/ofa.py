"""One-for-all distillation: `ofa` in reference.py. With p = softmax_T(z), eps the exponent, and the
label's indicator 0 at an unlabelled pixel:

w_c      p_t,c^eps, of the label (1 + p_t,y)^eps - 1
value    - sum_c w_c log p_s,c
g_c      (W p_s,c - w_c) / T,   W = sum_c w_c
divided by |V|

Sums are of the classes that are not the label's, so that W p_s,y - w_y of the label is p_s,y times
their w less w_y times their p_s.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import LN_2, exponential_less_one, log1p_unit, negative_log_likelihood
from .term import OWN, STUDENT, Coefficients, Needs, Traits


class Numbers(NamedTuple):
    eps: Any


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(options[0].to(FLOAT))


@triton.constexpr_function
def traits(variant):
    return Traits(
        Needs(pair=True),
        student=STUDENT,
        other=OWN,
        has_label=True,
        has_loop=True,
        is_divergence=False,
    )


class Known(NamedTuple):
    log2_total: Any  # of the teacher


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    return Known(t.teacher_log2)


class Own(NamedTuple):
    power: Any  # of the others: sum w, - sum w a_s, sum e_s
    cross: Any
    student: Any
    student_label: Any  # of the label: e_s, e_t, a_s; 0 without one
    teacher_label: Any
    label_a: Any


@triton.jit
def start(zero):
    return Own(zero, zero, zero, zero, zero, zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    power = tl.where(c.is_label, 0.0, tl.exp2(n.eps * (c.teacher_a - known.log2_total)))
    own = Own(
        own.power + power,
        own.cross - power * c.student_a,
        own.student + tl.where(c.is_label, 0.0, c.student_e),
        own.student_label + tl.where(c.is_label, c.student_e, 0.0),
        own.teacher_label + tl.where(c.is_label, c.teacher_e, 0.0),
        own.label_a + tl.where(c.is_label, c.student_a, 0.0),
    )
    return (power, power), own


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    share = tl.minimum(own.teacher_label * t.teacher_inverse, 1.0, tl.PropagateNan.ALL)
    label = exponential_less_one(n.eps * log1p_unit(share))
    nll = negative_log_likelihood(own.student, own.student_label, own.label_a * LN_2, PTX)
    per_w = scale * p.inverse_temperature
    value = LN_2 * (own.power * t.student_log2 + own.cross)
    value += tl.where(label > 0.0, label * nll, 0.0)
    of_label = own.power * own.student_label - label * own.student
    valid = t.one > 0.0
    return Coefficients(
        tl.where(valid, value, 0.0),
        0.0,
        tl.where(valid, per_w * (own.power + label) * t.student_inverse, 0.0),
        t.one * per_w,
        tl.where(valid, per_w * t.student_inverse * of_label, 0.0),
    )
