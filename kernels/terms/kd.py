"""Distillation of softened distributions: `kd` in reference.py.

    forward  value T^2 KL(p_t || p_s)                                  g_c = T (p_s,c - p_t,c)
    reverse  value T^2 KL(p_s || p_t)
    js       value T^2 (beta KL(p_t || m) + (1 - beta) KL(p_s || m)), m = beta p_t + (1 - beta) p_s
    skew     value T^2 KL(p_t || m), with alpha in the place of beta
             of these  g_c = T p_s,c (f_c - sum_c p_s,c f_c)
             reverse   f_c = log p_s,c - log p_t,c
             js        f_c = (1 - beta) (log p_s,c - log m_c)
             skew      f_c = (1 - alpha)^2 (p_s,c - p_t,c) / m_c, or - (1 - alpha) p_t,c / m_c
    divided by |V|

Both f_c of skew differ by a constant. The first is exact to rounding where both agree, the second
where the student's classes are none of the teacher's: a pixel has that of its student's most likely
class.

g_c of the last three does not change when a constant is subtracted from every f_c. It is the f_c of
the student's most likely class, the pivot: that class of a confident pixel then gets 0 - 0, where
it would get the difference of two numbers as large as the logits. Logarithms in f_c are in units of
log2, and with a_c in the place of log2 p_c = a_c - log2(total), which is a constant too. (Of js,
a_s,c - log2 of total_s m_c: near agreement both are as small as the a_c, where log2 m_c is as large
as log2 C, and its rounding with it.)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import LN_2, log2_of_share, max_or_nan, mixed_target, reciprocal, reverse_ratio
from .term import OWN, STUDENT, TEACHER, Coefficients, Needs, Traits

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JS = tl.constexpr(2)
SKEW = tl.constexpr(3)


class Numbers(NamedTuple):
    beta: Any
    one_minus_beta: Any
    alpha: Any
    one_minus_alpha: Any


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(
        options[1].to(FLOAT),
        (1.0 - options[1]).to(FLOAT),
        options[2].to(FLOAT),
        (1.0 - options[2]).to(FLOAT),
    )


def variant(term: Any) -> int:
    return ("forward", "reverse", "js", "skew").index(term.divergence)


@triton.constexpr_function
def traits(variant):
    forward = variant == 0
    return Traits(
        Needs(pair=True, at_top=not forward),
        student=STUDENT,
        other=TEACHER if forward else OWN,
        has_loop=not forward,
    )


class Known(NamedTuple):
    pivot: Any
    ratio: Any  # js, skew: total_s / total_t; total_s m_c = teacher e_t,c + student e_s,c
    teacher: Any
    student: Any
    first: Any  # skew: 1, or 0 of a pixel with the second f_c


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    pivot, ratio, teacher, student, first = 0.0, 0.0, 0.0, 0.0, 0.0
    if VARIANT == REVERSE:
        pivot = reverse_ratio(t.student_at_top, t.teacher_at_top)
    if VARIANT == JS or VARIANT == SKEW:
        ratio = t.student_total * t.teacher_inverse
        teacher = (n.alpha if VARIANT == SKEW else n.beta) * ratio
        student = n.one_minus_alpha if VARIANT == SKEW else n.one_minus_beta
        e_s, e_t = tl.exp2(t.student_at_top), tl.exp2(t.teacher_at_top)
        m = mixed_target(teacher, e_t, student, e_s)
        if VARIANT == SKEW:
            first = tl.where(ratio * e_t < 0.5 * m, 0.0, 1.0).to(m.dtype)
            pivot = (first * e_s - ratio * e_t) * reciprocal(max_or_nan(m, 1e-37), PTX)
        else:
            pivot = t.student_at_top - log2_of_share(m, PTX)
    return Known(pivot, ratio, teacher, student, first)


class Own(NamedTuple):
    student: Any  # sum_c e_s (f_c - pivot)
    teacher: Any  # js: sum_c e_t (a_t - log2 m_c); skew: sum_c e_t log2(p_t,c / m_c)


@triton.jit
def start(zero):
    return Own(zero, zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    of_teacher = own.teacher
    if VARIANT == REVERSE:
        f = reverse_ratio(c.student_a, c.teacher_a)
    else:
        m = mixed_target(known.teacher, c.teacher_e, known.student, c.student_e)
        if VARIANT == JS:
            log2_m = log2_of_share(m, PTX)
            of_teacher += c.teacher_e * (c.teacher_a - log2_m)
            f = c.student_a - log2_m
        else:  # all of it times total_s
            p_t = known.ratio * c.teacher_e
            inverse = reciprocal(max_or_nan(m, 1e-37), PTX)
            of_teacher += c.teacher_e * log2_of_share(p_t * inverse, PTX)
            f = (known.first * c.student_e - p_t) * inverse
    y = c.student_e * (f - known.pivot)
    return (y, y), Own(own.student + y, of_teacher)


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    per_p = t.one * (scale * p.temperature)
    if VARIANT == FORWARD:
        value = t.kl
        student = per_p * t.student_inverse
        other = per_p * t.teacher_inverse
    else:
        log2_ratio = t.student_log2 - t.teacher_log2
        mean = own.student * t.student_inverse
        other = t.one * (scale * p.temperature * -LN_2) * t.student_inverse
        if VARIANT == REVERSE:
            value = mean + known.pivot - log2_ratio
        elif VARIANT == SKEW:
            value = own.teacher * t.teacher_inverse
            more = tl.where(known.first > 0.0, n.one_minus_alpha, 1.0).to(value.dtype)
            per_f = scale * p.temperature * -n.one_minus_alpha
            other = t.one * per_f * more * t.student_inverse
        else:
            of_teacher = own.teacher * t.teacher_inverse + log2_ratio
            value = n.beta * of_teacher + n.one_minus_beta * (mean + known.pivot)
            other *= n.one_minus_beta
        student = other * mean
    return Coefficients(t.one * value, 0.0, student, other, 0.0)


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    square = p.temperature * p.temperature
    if VARIANT != FORWARD:  # values are in units of log2
        square *= LN_2
    return square
