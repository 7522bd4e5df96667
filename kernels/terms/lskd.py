"""Distillation of standardised logits: `kd` in reference.py with `standardize`. With the mean and
the standard deviation of a side's logits over the classes (that of C - 1), eps 1e-7 and
p = softmax(u / T):

u_c      (z_c - mean) / (eps + deviation)
value    T^2 KL(p_t || p_s)
g_c      T / (eps + deviation) (D_c - slope (z_c - mean)),   D = p_s - p_t,
         slope = sum_c D_c (z_c - mean) / ((C - 1) deviation (eps + deviation))
divided by |V|

z is a here; all but its scale comes out the same. Moments are those of Welford: of sums of squares,
what is left beside one logit far above all others has no digits. Where a bound is not the maximum,
the maximum is found beside them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import LN_2, LOG2_E, kl, log2, max_or_nan, reciprocal, root
from .term import NONE, OWN, Coefficients, Needs, Traits


@triton.constexpr_function
def traits(variant):
    return Traits(
        Needs(),
        student=OWN,
        other=NONE,
        has_loop=True,
        gathers=True,
    )


class Known(NamedTuple):
    student_scale: Any  # (a_c - mean) scale = log2(e) u_c / T
    teacher_scale: Any
    student_top: Any  # the largest a
    teacher_top: Any
    mean: Any  # of the student
    slope: Any
    student_inverse: Any
    teacher_inverse: Any


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    return Known(zero, zero, zero, zero, zero, zero, zero, zero)


class Own(NamedTuple):
    student: Any  # means, then sums of e
    teacher: Any
    student_square: Any  # sums of squares around them, then sum e_s a_s, sum e_t a_s
    teacher_square: Any
    last: Any  # classes so far, then sum e_t (b_t - b_s), b = a scale
    student_top: Any
    teacher_top: Any


@triton.jit
def start(zero):
    return Own(zero, zero, zero, zero, zero, zero - 1e30, zero - 1e30)


@triton.jit
def gather(VARIANT: tl.constexpr, n, p, c, own, PTX: tl.constexpr):
    count = own.last + 1.0
    share = reciprocal(count, PTX)
    student, teacher = c.student_a - own.student, c.teacher_a - own.teacher
    student_mean, teacher_mean = own.student + student * share, own.teacher + teacher * share
    return Own(
        student_mean,
        teacher_mean,
        own.student_square + student * (c.student_a - student_mean),
        own.teacher_square + teacher * (c.teacher_a - teacher_mean),
        count,
        max_or_nan(own.student_top, c.student_a),
        max_or_nan(own.teacher_top, c.teacher_a),
    )


@triton.jit
def learn(VARIANT: tl.constexpr, n, p, known, own, PTX: tl.constexpr):
    freedom = tl.maximum(p.classes - 1.0, 1.0)
    student = root(own.student_square / freedom, PTX)
    teacher = root(own.teacher_square / freedom, PTX)
    eps = 1e-7 * p.scale
    per_u = LOG2_E * p.inverse_temperature
    return Known(
        per_u * reciprocal(eps + student, PTX),
        per_u * reciprocal(eps + teacher, PTX),
        own.student_top,
        own.teacher_top,
        own.student,
        reciprocal(freedom * student * (eps + student), PTX),
        known.student_inverse,
        known.teacher_inverse,
    )


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    a_s = c.student_a - known.student_top
    b_s = max_or_nan(a_s * known.student_scale, -1e30)
    b_t = max_or_nan((c.teacher_a - known.teacher_top) * known.teacher_scale, -1e30)
    e_s, e_t = tl.exp2(b_s), tl.exp2(b_t)
    own = Own(
        own.student + e_s,
        own.teacher + e_t,
        own.student_square + e_s * a_s,
        own.teacher_square + e_t * a_s,
        own.last + e_t * (b_t - b_s),
        own.student_top,
        own.teacher_top,
    )
    gap = e_s * known.student_inverse - e_t * known.teacher_inverse
    x = gap - known.slope * (c.student_a - known.mean)
    return (x, x), own


@triton.jit
def close(VARIANT: tl.constexpr, n, p, known, own, PTX: tl.constexpr):
    student_inverse = reciprocal(own.student, PTX)
    teacher_inverse = reciprocal(own.teacher, PTX)
    rises = own.student_square * student_inverse - own.teacher_square * teacher_inverse
    return Known(
        known.student_scale,
        known.teacher_scale,
        known.student_top,
        known.teacher_top,
        known.mean,
        known.slope * rises,
        student_inverse,
        teacher_inverse,
    )


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    value = kl(own.last, known.teacher_inverse, log2(own.teacher), log2(own.student))
    # T / (eps + deviation) of z
    per_scale = scale * p.temperature * p.temperature * p.scale * LN_2
    return Coefficients(t.one * value, 0.0, t.one * (per_scale * known.student_scale), 0.0, 0.0)


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    return p.temperature * p.temperature
