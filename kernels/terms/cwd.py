"""Channel-wise distillation: `cwd` in reference.py. Softmaxes p over the valid pixels of each image
and class, at a temperature of the term's own.

value    T^2 sum_c p_t (log p_t - log p_s)         g_c = T (p_s,c - p_t,c)
divided by images with a valid pixel times C

What is summed is p_t l - p_t + p_s with l = log p_t - log p_s, which is the same, because both p
sum to 1 over the pixels: no addend is negative, and near agreement, where l is small, each is p_t
times a series that starts with l^2 / 2. An error of l, whose totals are sums over a whole image,
then counts times l.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import exponential_series, small_exponent
from .term import OWN, Coefficients, Needs, Traits


@triton.constexpr_function
def traits(variant):
    return Traits(
        Needs(raw_logits=True),
        student=OWN,
        other=OWN,
        has_value_loop=True,
        firsts=2,
        spaces=2,
    )


class Numbers(NamedTuple):
    temperature: Any
    inverse: Any


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(options[0].to(FLOAT), (1.0 / options[0]).to(FLOAT))


@triton.jit
def first(VARIANT: tl.constexpr, n, known, c, PTX: tl.constexpr):
    """z_s / T and z_t / T."""
    return (c.student_z * n.inverse, c.teacher_z * n.inverse), known


class Own(NamedTuple):
    sum: Any


@triton.jit
def start(zero):
    return Own(zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    p_s, p_t = first.shares
    log_s, log_t = first.logs
    gap = (c.teacher_z - c.student_z) * n.inverse + (log_s - log_t)
    series = exponential_series(-gap)  # (l - 1 + e^-l) / l^2 where l is small
    # of what has no share l may be infinite
    weighted = tl.where(p_t > 0.0, p_t * gap, 0.0) - p_t + p_s
    value = tl.where(tl.abs(gap) < small_exponent(gap.dtype), p_t * (gap * gap * series), weighted)
    return (p_s, p_t), Own(own.sum + value)


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    both = t.one * (scale * n.temperature)
    return Coefficients(t.one, 0.0, both, both, 0.0)


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    return n.temperature * n.temperature
