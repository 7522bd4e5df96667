"""Soft Dice loss: `dice` in reference.py, a function of three sums over the labelled pixels for
each class, with p = softmax(z_s): FP of p_c at pixels of other classes, FN of 1 - p_c and TP of p_c
at its own.

value    sum over the classes that occur of m / (TP + m + s), m = (FP + FN) / 2, or -log
         of the rest
g_c      p_c (f_c - sum p f),    f_c = u_c, of the label -v_c
divided by C

u_c and v_c are the derivatives of the value by FP_c and FN_c. 1 - p_y is the sum of the others.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .term import COLLECTING, OWN, Coefficients, Needs, Traits

OVERLAP_EPS = 1e-7  # least denominator, and before its logarithm least overlap


@triton.constexpr_function
def traits(variant):
    if variant == COLLECTING:
        return Traits(Needs(student_nll=True), tallies=3)
    return Traits(
        Needs(student_nll=True),
        student=OWN,
        other=OWN,
        has_loop=True,
        firsts=1,
        bounds=1,
        rescales=True,  # `other` does
        numbers_of_classes=True,
    )


@triton.jit
def tally(t, c):
    inverse = t.hard_inverse
    return (
        tl.where(c.is_label, 0.0, c.student_hard * inverse),
        tl.where(c.is_label, t.student_others * inverse, 0.0),
        tl.where(c.is_label, t.label_e * inverse, 0.0),
    )


def overlap(
    sums: torch.Tensor, a: float, b: float, smooth: float, log: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A fraction missed / whole [C], whose parts are right + smooth and a FP + b FN, and [2, C] its
    derivatives; of a class without pixels there is none. log: -log of the rest."""
    missed, right = a * sums[0] + b * sums[1], sums[2] + smooth
    whole = right + missed
    small = whole < OVERLAP_EPS
    value = torch.where(small, 1 - right / OVERLAP_EPS, missed / whole)
    u = torch.where(small, 0, right / whole**2 * a)
    v = torch.where(small, 1 / OVERLAP_EPS, right / whole**2 * b + missed / whole**2)
    if log:
        rest = 1 - value
        least = rest < OVERLAP_EPS
        value = -torch.where(least, OVERLAP_EPS - 1, -value).log1p()
        u, v = torch.where(least, 0, u / rest), torch.where(least, 0, v / rest)
    empty = sums[1] + sums[2] == 0
    return torch.where(empty, 0, value), torch.where(empty, 0, torch.stack((u, v)))


def settle(term: Any, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, numbers = overlap(sums, 0.5, 0.5, term.smooth, term.log)
    return value.sum(), numbers


class Known(NamedTuple):
    """The derivative by p of the class with the largest e so far, which all others are taken
    relative to: what a confident pixel's classes share cancels in the gradient."""

    top: Any
    pivot: Any


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    return Known(zero - 1.0, zero)


@triton.jit
def slope(c):
    return tl.where(c.is_label, -c.numbers[1], c.numbers[0])


@triton.jit
def first(VARIANT: tl.constexpr, n, known, c, PTX: tl.constexpr):
    above = c.student_hard > known.top
    known = Known(
        tl.where(above, c.student_hard, known.top), tl.where(above, slope(c), known.pivot)
    )
    return (c.student_hard, c.student_hard), known


@triton.jit
def rescale(VARIANT: tl.constexpr, p, own, drop):
    return own


class Own(NamedTuple):
    sum: Any  # sum e (slope - pivot), sum e
    total: Any
    pivot: Any


@triton.jit
def start(zero):
    return Own(zero, zero, zero)


@triton.jit
def other(VARIANT: tl.constexpr, n, p, known, c, first, own, PTX: tl.constexpr):
    x = c.student_hard * (slope(c) - known.pivot)
    moved = own.sum + (own.pivot - known.pivot) * own.total
    return (x, c.student_hard), Own(moved + x, own.total + c.student_hard, known.pivot)


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    per_e = t.labelled * scale * t.hard_inverse
    zero = t.one * 0.0
    return Coefficients(zero, zero, per_e, per_e * (own.sum * t.hard_inverse), zero)
