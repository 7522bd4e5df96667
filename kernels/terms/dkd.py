"""Decoupled distillation: `dkd` in reference.py. With b the log-odds of the label against the rest
and q the softmax over the other classes, both at T:

value    T^2 (alpha KL(sigmoid(b_t) || sigmoid(b_s)) + beta KL(q_t || q_s))
g_c      T ((beta - alpha D) q_s,c - beta q_t,c), of the label T alpha D,
         D = sigmoid(b_s) - sigmoid(b_t)
divided by |V|

q is from the maxima of the other classes alone: a confident pixel's others would all be 0 beside
its label.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import LN_2, bernoulli_kl, kl, log2, max_or_nan, reciprocal, sigmoid
from .term import OWN, Coefficients, Needs, Traits

LOWEST = tl.constexpr(-1e30)


@triton.constexpr_function
def traits(variant):
    return Traits(
        Needs(student_total=True),
        student=OWN,
        other=OWN,
        has_label=True,
        has_loop=True,
        firsts=2,
        bounds=2,
        rescales=True,
    )


class Numbers(NamedTuple):
    alpha: Any
    beta: Any


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(options[0].to(FLOAT), options[1].to(FLOAT))


class Known(NamedTuple):
    student_label: Any  # a of the label, and the maxima of the others
    teacher_label: Any
    student_bound: Any
    teacher_bound: Any


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    return Known(zero, zero, zero + LOWEST, zero + LOWEST)


@triton.jit
def first(VARIANT: tl.constexpr, n, known, c, PTX: tl.constexpr):
    student = tl.where(c.is_label, LOWEST, c.student_a)
    teacher = tl.where(c.is_label, LOWEST, c.teacher_a)
    known = Known(
        tl.where(c.is_label, c.student_a, known.student_label),
        tl.where(c.is_label, c.teacher_a, known.teacher_label),
        max_or_nan(student, known.student_bound),
        max_or_nan(teacher, known.teacher_bound),
    )
    return (student, teacher), known


class Own(NamedTuple):
    student: Any  # of the others: sum e_s, sum e_t, sum e_t (a_t - a_s)
    teacher: Any
    difference: Any


@triton.jit
def start(zero):
    return Own(zero, zero, zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    e_s = tl.where(c.is_label, 0.0, tl.exp2(first.above[0]))
    e_t = tl.where(c.is_label, 0.0, tl.exp2(first.above[1]))
    gap = first.above[1] - first.above[0]
    return (e_s, e_t), Own(own.student + e_s, own.teacher + e_t, own.difference + e_t * gap)


@triton.jit
def rescale(VARIANT: tl.constexpr, p, own, drop):
    teacher = tl.exp2(drop[1])
    moved = own.difference + own.teacher * (drop[1] - drop[0])
    return Own(own.student * tl.exp2(drop[0]), own.teacher * teacher, moved * teacher)


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    # one class has no others
    total_s = max_or_nan(own.student, 1e-30)
    total_t = max_or_nan(own.teacher, 1e-30)
    log2_s, log2_t = log2(total_s), log2(total_t)
    inverse_t = reciprocal(total_t, PTX)
    b_s = LN_2 * (known.student_label - known.student_bound - log2_s)
    b_t = LN_2 * (known.teacher_label - known.teacher_bound - log2_t)
    # p - 1 of a confident pixel keeps its relative precision in the sum of the others
    sign = tl.where(b_t > 0.0, -1.0, 1.0).to(b_t.dtype)
    d = sign * (sigmoid(sign * b_s, PTX) - sigmoid(sign * b_t, PTX))
    valid = t.labelled > 0.0
    per_p = scale * p.temperature
    value = n.alpha * bernoulli_kl(b_t, b_s, PTX)
    value += n.beta * kl(own.difference, inverse_t, log2_t, log2_s)
    student = (n.beta - n.alpha * d) * reciprocal(total_s, PTX) * per_p
    return Coefficients(
        tl.where(valid, value, 0.0),
        0.0,
        tl.where(valid, student, 0.0),
        tl.where(valid, n.beta * inverse_t * per_p, 0.0),
        tl.where(valid, n.alpha * d * per_p, 0.0),
    )


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    return p.temperature * p.temperature
