"""Focal loss: `focal` in reference.py. With p = softmax(z), q = 1 - p_y as the sum of the others:

value    alpha w_y q^gamma nll
g_c      alpha w_y f p_c, of the label - alpha w_y f q,   f = q^gamma (1 + gamma p_y nll / q)
divided by |V|, or the sum of w_y over V
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..formulas import log2, max_or_nan, reciprocal
from .term import STUDENT_HARD, Coefficients, Needs, Traits


class Numbers(NamedTuple):
    gamma: Any
    alpha: Any


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers(options[0].to(FLOAT), options[1].to(FLOAT))


@triton.constexpr_function
def traits(variant):
    return Traits(
        Needs(student_nll=True),
        student=STUDENT_HARD,
        has_label=True,
        is_divergence=False,
    )


@triton.jit
def pixel(VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    # where the others underflow there is nothing to weigh
    q = max_or_nan(t.student_others * t.hard_inverse, 1e-37)
    weight = n.alpha * t.label_weight * tl.exp2(n.gamma * log2(q))
    # nll / q is 1 where both vanish; where nll is infinite, p_y is 0
    ratio = -max_or_nan(-t.student_nll * reciprocal(q, PTX), -1e30)
    rises = 1.0 + n.gamma * (t.label_e * t.hard_inverse) * ratio
    student = scale * weight * rises * t.hard_inverse
    return Coefficients(
        weight * t.student_nll, t.label_weight, student, 0.0, -t.student_others * student
    )
