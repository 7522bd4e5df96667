"""Distillation of softened distributions: `kd` in reference.py.

    forward  value T^2 KL(p_t || p_s)                                  g_c = T (p_s,c - p_t,c)
    reverse  value T^2 KL(p_s || p_t)
    js       value T^2 (beta KL(p_t || m) + (1 - beta) KL(p_s || m))
             of both   g_c = T p_s,c (f_c - sum_c p_s,c f_c)
             reverse   f_c = log p_s,c - log p_t,c
             js        f_c = (1 - beta) (log p_s,c - log m_c)
    divided by |V|

g_c of the last two does not change when a constant is subtracted from every f_c. It is the f_c of
the student's most likely class, the pivot: that class of a confident pixel then gets 0 - 0, where
it would get the difference of two numbers as large as the logits. f_c is in units of log2, and with
a_c in the place of log2 p_c = a_c - log2(total), which is a constant too. (Of js, a_s,c - log2 of
total_s m_c: near agreement both are as small as the a_c, where log2 m_c is as large as log2 C, and
its rounding with it.)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import LN_2, log2_of_share, mixed_target, reverse_ratio
from .term import OWN, STUDENT, TEACHER, Coefficients, Needs, Traits

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JS = tl.constexpr(2)


class Numbers(NamedTuple):
    beta: Any
    one_minus_beta: Any


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(options[1].to(FLOAT), (1.0 - options[1]).to(FLOAT))


def variant(term: Any) -> int:
    return ("forward", "reverse", "js").index(term.divergence)


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
    teacher: Any  # js: total_s m_c = teacher e_t,c + student e_s,c
    student: Any


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    pivot, teacher, student = 0.0, 0.0, 0.0
    if VARIANT == REVERSE:
        pivot = reverse_ratio(t.student_at_top, t.teacher_at_top)
    if VARIANT == JS:
        teacher = n.beta * (t.student_total * t.teacher_inverse)
        student = n.one_minus_beta
        m = mixed_target(teacher, tl.exp2(t.teacher_at_top), student, tl.exp2(t.student_at_top))
        pivot = t.student_at_top - log2_of_share(m, PTX)
    return Known(pivot, teacher, student)


class Own(NamedTuple):
    student: Any  # sum_c e_s (f_c - pivot)
    teacher: Any  # js: sum_c e_t (a_t - log2 m_c)


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
        log2_m = log2_of_share(m, PTX)
        of_teacher += c.teacher_e * (c.teacher_a - log2_m)
        f = c.student_a - log2_m
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
