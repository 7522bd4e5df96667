"""HeteroAKD, preset paper (Eq. 5 to 10): `_evaluate_paper` and `hetero` in reference.py.

errors       H = BCE(sigmoid(z_c), [c = y]), of student and teacher
reliability  r_t,c = (H_s + eps) / (H_t + H_s + 2 eps)
target       z_h = r_t z_t + (1 - r_t) z_s, or z_t
discrepancy  dH = max(0, H_s - H_h); W = softmax(H_s + dH) over classes, or over space
value        -sum_c W_c m_c log p_s,c,  m = softmax_T(z_h)      q_c = W_c m_c,
             g_c = (p_s,c sum_c q_c - q_c) / T                  divided by |V|
no label     r_t = 1, and no errors: H_s + dH is 0 of every class
over space   T^2 sum_c W_c KL(sigmoid(z_h / T) || sigmoid(z_s / T)), divided by images x C,
             g_c = T W_c (sigmoid(z_s / T) - sigmoid(z_h / T)); without evaluation W = 1 / C
             and it is divided by |V|
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import (
    LN_2,
    LOG2_E,
    bernoulli_kl,
    bernoulli_kl_gradient,
    binary_cross_entropy,
    class_discrepancy,
    class_reliability,
    mixed_target,
    reciprocal,
)
from .term import NONE, OWN, STUDENT, Coefficients, Needs, Traits

MIXES = tl.constexpr(1)  # bits
EVALUATES = tl.constexpr(2)
SPACE = tl.constexpr(4)


def variant(term: Any) -> int:
    mixes, evaluates = term.mix == "logits", term.evaluation == "discrepancy"
    return int(mixes) + 2 * int(evaluates) + 4 * int(term.weight_axis == "space")


@triton.constexpr_function
def traits(variant):
    space = variant & 4 != 0
    return Traits(
        Needs(student_total=not space, raw_logits=True),
        student=NONE if space else STUDENT,
        other=OWN,
        has_loop=not space,
        has_value_loop=space,
        firsts=2,
        bounds=0 if space else 2,
        spaces=int(variant & 6 == 6),
        rescales=True,
        mapped=True,
        own_gradient=True,
    )


class Known(NamedTuple):
    reliability: Any  # of the labelled class
    discrepancy: Any


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    return Known(zero, zero)


@triton.jit
def first(VARIANT: tl.constexpr, n, known, c, PTX: tl.constexpr):
    """H_s + dH and z_h."""
    h_s = binary_cross_entropy(c.student_z, c.is_label)
    h_t = binary_cross_entropy(c.teacher_z, c.is_label)
    r_t = tl.where(c.unlabelled, 1.0, class_reliability(h_t, h_s, PTX))
    z_h = c.teacher_z  # without a product by 0 that an infinite z_s would turn into NaN
    if MIXES & VARIANT:
        z_h = mixed_target(r_t, c.teacher_z, 1.0 - r_t, c.student_z)
        z_h = tl.where(c.unlabelled, c.teacher_z, z_h)
    gap = class_discrepancy(h_s, binary_cross_entropy(z_h, c.is_label))
    known = Known(
        tl.where(c.is_label | c.unlabelled, r_t, known.reliability),
        tl.where(c.is_label, gap, known.discrepancy),
    )
    return (tl.where(c.unlabelled, 0.0, h_s + gap), z_h), known


class Own(NamedTuple):
    sum: Any  # over space
    weight_total: Any  # without the denominators of W and m
    mixed_total: Any
    q: Any
    q_a: Any  # sum q_c a_s,c


@triton.jit
def start(zero):
    return Own(zero, zero, zero, zero, zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    if SPACE & VARIANT:
        a = first.above[1] * p.inverse_temperature
        b = c.student_z * p.inverse_temperature
        value = bernoulli_kl(a, b, PTX)
        y = bernoulli_kl_gradient(a, b, PTX)
        if EVALUATES & VARIANT:
            value *= first.shares[0]
            y *= first.shares[0]
        own = Own(own.sum + value, own.weight_total, own.mixed_total, own.q, own.q_a)
    else:
        y = tl.exp2(first.above[1] * p.scale)
        mixed_total = own.mixed_total + y
        weight_total = own.weight_total
        if EVALUATES & VARIANT:
            w = tl.exp2(first.above[0] * LOG2_E)
            weight_total += w
            y *= w
        own = Own(own.sum, weight_total, mixed_total, own.q + y, own.q_a + y * c.student_a)
    return (y, y), own


@triton.jit
def rescale(VARIANT: tl.constexpr, p, own, drop):
    both = tl.exp2(drop[1] * p.scale)
    mixed_total = own.mixed_total * both
    weight_total = own.weight_total
    if EVALUATES & VARIANT:
        factor = tl.exp2(drop[0] * LOG2_E)
        weight_total *= factor
        both *= factor
    return Own(own.sum, weight_total, mixed_total, own.q * both, own.q_a * both)


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    if SPACE & VARIANT:
        mean = 1.0
        if not EVALUATES & VARIANT:
            mean = 1.0 / p.classes
        value = t.one * mean
        student = 0.0
        other = -value * (scale * p.temperature)
    else:
        total = own.mixed_total
        if EVALUATES & VARIANT:
            total *= own.weight_total
        inverse = t.one * reciprocal(total, PTX)
        value = (t.student_log2 * own.q - own.q_a) * inverse
        other = inverse * (scale * p.inverse_temperature)
        student = other * own.q * t.student_inverse
    return Coefficients(value, 0.0, student, other, 0.0)


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    if SPACE & VARIANT:
        found = p.temperature * p.temperature
    else:
        found = p.temperature * 0.0 + LN_2
    return found
