"""HeteroAKD, preset softmax-kl: `hetero` and `_evaluate_softmax_kl` in reference.py.

reliability  (r_t, r_s) = softmax(-nll_t / tau, -nll_s / tau)
target       m = r_t p_t + r_s p_s ("probs"), softmax(r_t z_t + r_s z_s) ("logits") or p_t
discrepancy  d = KL(p_t || p_s), or 1 without evaluation
value        d T^2 KL(m || p_s)            g_c = d T (p_s,c - m_c), r and d held fixed;
                                           of "probs" d T r_t (p_s,c - p_t,c)
divided by the sum of d over V
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import (
    LN_2,
    kl,
    log2,
    log2_of_share,
    max_or_nan,
    mixed_target,
    reciprocal,
    reliability,
)
from .term import OWN, STUDENT, TEACHER, Coefficients, Needs, Traits

PROBS = tl.constexpr(0)
LOGITS = tl.constexpr(1)
TEACHER_ONLY = tl.constexpr(2)
EVALUATES = tl.constexpr(4)  # a bit; csrc has it among the numbers


class Numbers(NamedTuple):
    inverse_tau: Any


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(1.0 / options[1].to(FLOAT))


def variant(term: Any) -> int:
    mix = ("probs", "logits", "teacher").index(term.mix)
    return mix + 4 * int(term.evaluation == "discrepancy")


@triton.constexpr_function
def traits(variant):
    mix = variant & 3
    return Traits(
        Needs(student_nll=True, teacher_nll=True, pair=True),
        student=STUDENT,
        other=TEACHER if mix == 2 else OWN,
        has_loop=mix == 1,
        has_value_loop=mix == 0,
        firsts=int(mix == 1),
        bounds=int(mix == 1),
        mapped=True,
        own_gradient=True,
    )


class Known(NamedTuple):
    reliability: Any
    discrepancy: Any
    # probs: total_s m_c = teacher e_t,c + student e_s,c;
    # logits: a_h,c = teacher a_t,c + student a_s,c
    teacher: Any
    student: Any


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    r_t, r_s = reliability(t.teacher_nll, t.student_nll, n.inverse_tau, PTX)
    gap = max_or_nan(t.kl, 0.0)  # a KL is never negative, its rounding may be
    teacher = r_t
    if VARIANT % 4 == PROBS:
        teacher = r_t * (t.student_total * t.teacher_inverse)
    return Known(r_t, gap, teacher, r_s)


@triton.jit
def first(VARIANT: tl.constexpr, n, known, c, PTX: tl.constexpr):
    a = mixed_target(known.teacher, c.teacher_a, known.student, c.student_a)
    return (a, a), known


class Own(NamedTuple):
    sum: Any  # probs: sum_c x_c (log2 x_c - a_s,c), x_c = total_s m_c
    total: Any  # logits: sum_c e_h
    difference: Any  # sum_c e_h (a_h - a_s)


@triton.jit
def start(zero):
    return Own(zero, zero, zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    if VARIANT % 4 == PROBS:
        y = known.teacher * c.teacher_e  # total_s r_t p_t,c
        x = mixed_target(known.teacher, c.teacher_e, known.student, c.student_e)
        own = Own(own.sum + x * (log2_of_share(x, PTX) - c.student_a), own.total, own.difference)
    else:
        a = first.above[0]
        y = tl.exp2(a)
        own = Own(own.sum, own.total + y, own.difference + y * (a - c.student_a))
    return (y, y), own


@triton.jit
def least(own):
    return own.total


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    share = t.one
    if VARIANT >= EVALUATES:
        share *= known.discrepancy
    per_p = share * (scale * p.temperature)
    student = per_p * t.student_inverse
    if VARIANT % 4 == PROBS:
        # The value's coefficient is this one of the gradient, whose `scale` is 1 where a value is
        # read: one number less per pixel in the loop over classes.
        other = student
        value = other
        student *= known.reliability
    elif VARIANT % 4 == LOGITS:
        total = tl.where(t.one > 0.0, own.total, 1.0)
        inverse = reciprocal(total, PTX)
        other = per_p * inverse
        value = share * kl(own.difference, inverse, log2(total), t.student_log2)
    else:
        other = per_p * t.teacher_inverse
        value = share * t.kl
    return Coefficients(value, share, student, other, 0.0)


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    if VARIANT % 4 == PROBS:
        found = p.temperature * LN_2
    else:
        found = p.temperature * p.temperature
    return found
