"""The loop over classes that ends in gradients, and in the sums that only values need."""

import triton
import triton.language as tl

from . import terms
from .formulas import LOG2_E
from .interpolation import DIRECT
from .statistics import read_class, weight_of, with_numbers
from .terms.term import (
    CLASS_WEIGHT,
    NONE,
    STUDENT,
    STUDENT_HARD,
    STUDENT_Z,
    TEACHER,
    TEACHER_Z,
    Coefficients,
)
from .tiles import add_to_corners


@triton.jit
def source(FROM: tl.constexpr, k, c, own, at, HOW: tl.constexpr):
    """x_c or y_c of a gradient (terms/term.py); own: where it is the term's."""
    x = own
    if FROM == STUDENT_HARD:
        x = k.student_hard
    elif FROM == STUDENT:
        x = k.student_e
    elif FROM == TEACHER:
        x = k.teacher_e
    elif FROM == STUDENT_Z:
        x = k.student_z
    elif FROM == TEACHER_Z:
        x = k.teacher_z
    elif FROM == CLASS_WEIGHT:
        x = weight_of(c, at, HOW)
    return x


@triton.jit
def gradient(TERM: tl.constexpr, VARIANT: tl.constexpr, a, k, c, pair, at, HOW: tl.constexpr):
    TRAITS: tl.constexpr = terms.traits(TERM, VARIANT)
    a = Coefficients(*a)
    y = source(TRAITS.other, k, c, pair[1], at, HOW)
    if TRAITS.student == NONE:
        g = -a.other * y
    else:
        g = a.student * source(TRAITS.student, k, c, pair[0], at, HOW)
        if TRAITS.other != NONE:
            g -= a.other * y
    if TRAITS.has_label:
        g = tl.where(k.is_label, a.label, g)
    if TRAITS.spaces > 0:  # an invalid pixel has no bound over space, and may be infinite
        g = tl.where(at.valid, g, 0.0)
    return g


@triton.jit
def sum_of(g, TERMS: tl.constexpr, SLOT: tl.constexpr, FROM_ZERO: tl.constexpr):
    """The sum of a slot's gradients; SLOT < 0: of all. FROM_ZERO: a product then ends where it
    stands, instead of as a multiply-add far below; an instruction more, and fewer registers."""
    total = 0.0
    for k in tl.static_range(len(TERMS)):
        if terms.adds(TERMS, k, SLOT):
            if FROM_ZERO or not terms.adds_first(TERMS, k, SLOT):
                total += g[k]
            else:
                total = g[k]
    return total


@triton.jit
def shares_of(found, weight, shift, step, SPACES: tl.constexpr):
    """What a pixel has of the softmaxes over space of `first`, and the logarithms of what those
    divided by. shift: pointer to the maximum of the first one at this class; steps further its
    inverse total and its logarithm, then the next one's maximum."""
    share = tl.exp2((found[0] - tl.load(shift)) * LOG2_E) * (tl.load(shift + step) * weight)
    log = tl.load(shift + 2 * step)
    second = share
    second_log = log
    if SPACES > 1:
        shift += 3 * step
        second = tl.exp2((found[1] - tl.load(shift)) * LOG2_E) * (tl.load(shift + step) * weight)
        second_log = tl.load(shift + 2 * step)
    return (share, second), (log, second_log)


@triton.jit
def other(
    TERM: tl.constexpr,
    VARIANT: tl.constexpr,
    p,
    state,
    k,
    c,
    at,
    PLACE: tl.constexpr,
    SPACES: tl.constexpr,
    HOW: tl.constexpr,
):
    """x_c and y_c of a term, its sums, and what it knows then."""
    TRAITS: tl.constexpr = terms.traits(TERM, VARIANT)
    n, known, bound, own = state
    found = bound
    shares = (0.0, 0.0)
    logs = shares
    if TRAITS.numbers_of_classes:
        k = with_numbers(k, at, c, PLACE)
    if TRAITS.firsts > 0:
        found, known = terms.first(TERM, VARIANT, n, known, k, HOW.PTX)
        if SPACES > 0:
            shift = at.space + c + 3 * PLACE * at.space_step
            shares, logs = shares_of(found, at.weight, shift, at.space_step, SPACES)
        if TRAITS.bounds > 0:
            found = (found[0] - bound[0], found[1] - bound[1])
    pair, own = terms.other(TERM, VARIANT, n, p, known, k, found, shares, logs, own, HOW.PTX)
    return pair, own, known


@triton.jit
def gradients(
    p,
    state,  # of each term its numbers, what it knows, its maxima, its sums, its coefficients
    gradient_plane,
    class_stride,
    slot_stride,
    place,  # DIRECT: of the pixels; CORNERS: of the logits
    lanes,  # CORNERS: see `add_to_corners`
    inside,
    at,
    TERMS: tl.constexpr,
    SLOTS: tl.constexpr,
    GRAD: tl.constexpr,
    MAPS: tl.constexpr,
    SINGLE: tl.constexpr,
    HOW: tl.constexpr,
):
    """Adds to the gradient of every class; returns the terms' sums, and what they know then."""
    numbers, knowns, bounds, owns, coefficients = state
    student_plane = at.student.plane
    teacher_plane = at.teacher.plane
    for c in range(at.classes):
        k = read_class(at, c, student_plane, teacher_plane, HOW.TEACHER >= 0, HOW)
        g = ()
        new_owns = ()
        new_knowns = ()
        for i in tl.static_range(len(TERMS)):
            y = 0.0
            pair = (y, y)
            own, known = owns[i], knowns[i]
            if terms.has_other(TERMS[i], MAPS):
                pair, own, known = other(
                    TERMS[i][0],
                    TERMS[i][1],
                    p,
                    (numbers[i], known, bounds[i], own),
                    k,
                    c,
                    at,
                    terms.place_over_space(TERMS, i),
                    terms.spaces(TERMS[i]),
                    HOW,
                )
            if terms.sums_late(TERMS[i], MAPS):
                new_owns = new_owns + (own,)
                new_knowns = new_knowns + (known,)
            else:
                new_owns = new_owns + (owns[i],)
                new_knowns = new_knowns + (knowns[i],)
            if GRAD and TERMS[i][2] >= 0:
                y = gradient(TERMS[i][0], TERMS[i][1], coefficients[i], k, c, pair, at, HOW)
            g = g + (y,)
        owns = new_owns
        knowns = new_knowns
        if GRAD and HOW.STUDENT == DIRECT:
            merged = sum_of(g, TERMS, -1, False).to(gradient_plane.dtype.element_ty)
            tl.store(gradient_plane + place, merged, mask=inside)
        elif GRAD:
            for slot in tl.static_range(SLOTS):
                add_to_corners(
                    sum_of(g, TERMS, slot, terms.shares_slots(TERMS, SLOTS)),
                    at.student.fractions,
                    gradient_plane + slot * slot_stride + place,
                    lanes,
                    SINGLE,
                )
        gradient_plane += class_stride
        student_plane += at.student.class_stride
        teacher_plane += at.teacher.class_stride
    return owns, knowns
