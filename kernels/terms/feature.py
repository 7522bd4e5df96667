"""Squared difference in the aligned logits space: `feature` in reference.py.

value    sum_c (z_s,c - z_t,c)^2 / C          g_c = 2 / C (z_s,c - z_t,c)
divided by |V|
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .term import STUDENT_Z, TEACHER_Z, Coefficients, Needs, Traits


class Numbers(NamedTuple):
    mean: Any  # 1 / C


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(1.0 / classes)


@triton.constexpr_function
def traits(variant):
    return Traits(
        Needs(raw_logits=True),
        student=STUDENT_Z,
        other=TEACHER_Z,
        has_value_loop=True,
        is_divergence=False,
    )


class Own(NamedTuple):
    sum: Any


@triton.jit
def start(zero):
    return Own(zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    gap = c.student_z - c.teacher_z
    return (0.0, 0.0), Own(own.sum + gap * gap)


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    both = t.one * (scale * 2.0 * n.mean)
    return Coefficients(t.one, 0.0, both, both, 0.0)


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    return n.mean
