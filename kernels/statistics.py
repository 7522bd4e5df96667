"""Loops over the classes that end in sums per pixel. Shapes: see `interpolation.py`.

Each loop reads the logits again instead of keeping them: they are low-resolution and in the first
cache, and registers are what limits this kernel. What a call does not need is compiled away.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import terms
from .formulas import LOG2_E, log2, max_or_nan, negative_log_likelihood, power, reciprocal
from .formulas import kl as kl_of
from .interpolation import CORNERS, exactly_scaled, read_logits
from .terms.term import Class, Totals
from .tiles import over_pixels, over_program

# A bound may lie so far above the maximum that totals are no smaller than this.
SMALLEST_TOTAL = tl.constexpr(2.0**-32)


class Model(NamedTuple):
    plane: Any  # where class 0 lies
    class_stride: Any
    taps: Any  # what `read_logits` takes
    fractions: Any
    fold: Any
    m: Any  # the bound
    exact_m: Any  # of the careful pass: the maximum, and the pixels that need it
    troubled: Any


class Pixels(NamedTuple):
    """What a loop over the classes takes."""

    student: Any  # Model
    teacher: Any
    classes: Any
    label: Any
    valid: Any
    scale: Any  # a = (z - m) scale
    hard_exponent: Any  # e at T = 1 is e to this power
    class_weight: Any
    weight: Any  # of the pixel, read if WEIGHTS
    space: Any  # of the image, as in `distillation_pass`: [places, 3, B, C]
    space_step: Any  # from one row to the next, B C


class How(NamedTuple):
    """The same, of what is known when a kernel is compiled."""

    STUDENT: int  # as in `distillation_pass`
    TEACHER: int
    FOLDED: bool  # bounds are folded into the corners of cells; there is no z then, only a
    WEIGHTED: bool  # by classes
    UNLABELLED: bool  # whether there may be pixels without a label, whose `label` is `classes`
    WEIGHTS: bool  # of pixels
    POWER: int
    PICK_LABEL: bool
    CAREFUL: bool
    PTX: bool
    FLOAT: Any


@triton.constexpr_function
def how(*options):
    return How(*options)


@triton.jit
def read(
    model,
    plane,
    scale,
    valid,
    SOURCE: tl.constexpr,
    FOLD: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """z and a = (z - m) * scale of the class at `plane`; FOLD: no z of
    cells, unless CAREFUL."""
    FOLDED: tl.constexpr = FOLD and SOURCE == CORNERS
    _, _, taps, fractions, fold, m, exact_m, troubled = model
    if CAREFUL and SOURCE == CORNERS:
        # an ordinary pixel gets the bits that it has beside other neighbours
        z = read_logits(
            plane, taps, fractions, fold, scale, valid, SOURCE, FOLDED, True, False, FLOAT
        )
        a = z if FOLDED else (z - m) * scale
        exact_z = read_logits(
            plane, taps, fractions, fold, scale, valid, SOURCE, False, False, True, FLOAT
        )
        a = tl.where(troubled, exactly_scaled(exact_z, exact_m, scale, FLOAT), a)
        z = exact_z if FOLDED else tl.where(troubled, exact_z, z)
    else:
        z = read_logits(
            plane, taps, fractions, fold, scale, valid, SOURCE, FOLDED, False, CAREFUL, FLOAT
        )
        if FOLDED:
            a = z
        elif CAREFUL:
            a = exactly_scaled(z, exact_m, scale, FLOAT)
        else:
            a = (z - m) * scale
    return z, a


@triton.jit
def usual_totals(
    model,
    classes,
    valid,
    scale,
    temperature,
    SOURCE: tl.constexpr,
    FOLDED: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """The smaller of both temperatures' sums of e over the model's bound."""
    total = tl.zeros(valid.shape, FLOAT)
    hard = total
    plane = model[0]
    for _ in range(classes):
        _, a = read(model, plane, scale, valid, SOURCE, FOLDED, CAREFUL, FLOAT)
        total += tl.exp2(a)
        hard += tl.exp2(a * temperature)
        plane += model[1]
    return tl.minimum(total, hard)


@triton.jit
def read_class(at, c, student_plane, teacher_plane, BOTH: tl.constexpr, HOW: tl.constexpr):
    """One class of both models, or of the student's alone."""
    z_s, a_s = read(
        at.student,
        student_plane,
        at.scale,
        at.valid,
        HOW.STUDENT,
        HOW.FOLDED,
        HOW.CAREFUL,
        HOW.FLOAT,
    )
    e_s = tl.exp2(a_s)
    z_t, a_t, e_t = z_s, a_s, e_s
    if BOTH:
        z_t, a_t = read(
            at.teacher,
            teacher_plane,
            at.scale,
            at.valid,
            HOW.TEACHER,
            HOW.FOLDED,
            HOW.CAREFUL,
            HOW.FLOAT,
        )
        e_t = tl.exp2(a_t)
    h = hard(a_s, e_s, at, HOW)
    unlabelled = at.label == at.classes
    return Class(z_s, z_t, a_s, a_t, e_s, e_t, at.label == c, unlabelled, h, (h, h))


@triton.jit
def hard(a, e, at, HOW: tl.constexpr):
    """e at T = 1."""
    if HOW.POWER == 0:
        h = tl.exp2(a * at.hard_exponent)
    else:
        h = power(e, HOW.POWER)
    return h


@triton.jit
def weight_of(c, at, HOW: tl.constexpr):
    w = 1.0
    if HOW.WEIGHTED:
        w = tl.load(at.class_weight + c).to(HOW.FLOAT)
    return w


@triton.jit
def class_or_0(at, HOW: tl.constexpr):
    """The pixel's class, or any if it has none."""
    label = tl.maximum(at.label, 0)
    if HOW.UNLABELLED:
        label = tl.where(label < at.classes, label, 0)
    return label


@triton.jit
def label_logit(model, picked, at, SOURCE: tl.constexpr, HOW: tl.constexpr):
    """z_label - m of each pixel; PICK_LABEL: from its `a`, which a loop has found. CAREFUL: -inf
    stays -inf, because the loss of a label on a masked class is infinite."""
    to_logits = 1.0 / at.scale
    x = picked * to_logits
    if HOW.CAREFUL or not HOW.PICK_LABEL:
        plane = model.plane + class_or_0(at, HOW).to(tl.int64) * model.class_stride
        z, a = read(model, plane, at.scale, at.valid, SOURCE, HOW.FOLDED, HOW.CAREFUL, HOW.FLOAT)
        if not HOW.PICK_LABEL:
            x = a * to_logits
        if HOW.CAREFUL:
            exact = z - model.exact_m
            x = tl.where(model.troubled | ~(exact > -1e30), exact, x)
    return x


@triton.jit
def find_totals(at, NEEDS: tl.constexpr, HOW: tl.constexpr):
    """`Totals`, sum_c w_c, and the smallest of the totals that a bound can make too small.

    An invalid pixel gets harmless numbers."""
    zero = tl.zeros(at.valid.shape, HOW.FLOAT)
    student_total, teacher_total, student_others, teacher_others = zero, zero, zero, zero
    student_label, teacher_label, difference, weighted = zero, zero, zero, zero
    lowest = -1e300 if HOW.FLOAT == tl.float64 else -3e38
    student_at_top, teacher_at_top = zero + lowest, zero
    weight_sum = tl.sum(tl.zeros([1], HOW.FLOAT))
    if NEEDS.pair or NEEDS.student_total or NEEDS.student_nll:
        student_plane = at.student.plane
        teacher_plane = at.teacher.plane
        for c in range(at.classes):
            k = read_class(at, c, student_plane, teacher_plane, NEEDS.pair, HOW)
            student_total += k.student_e
            if NEEDS.pair:
                teacher_total += k.teacher_e
                difference += k.teacher_e * (k.teacher_a - k.student_a)
            if NEEDS.at_top:
                above = k.student_a > student_at_top
                student_at_top = tl.where(above, k.student_a, student_at_top)
                teacher_at_top = tl.where(above, k.teacher_a, teacher_at_top)
            if NEEDS.student_nll:
                student_others += tl.where(k.is_label, 0.0, k.student_hard)
                if HOW.PICK_LABEL:
                    student_label = tl.where(k.is_label, k.student_a, student_label)
            if NEEDS.teacher_nll:
                h = hard(k.teacher_a, k.teacher_e, at, HOW)
                teacher_others += tl.where(k.is_label, 0.0, h)
                if HOW.PICK_LABEL:
                    teacher_label = tl.where(k.is_label, k.teacher_a, teacher_label)
            if NEEDS.weighted_z:
                w = weight_of(c, at, HOW)
                weighted += w * k.student_a
                weight_sum += w
            student_plane += at.student.class_stride
            teacher_plane += at.teacher.class_stride

    one = tl.where(at.valid, 1.0, 0.0).to(HOW.FLOAT)
    least = one * 0.0 + 1.0
    unlabelled = at.label == at.classes
    labelled = one
    if HOW.UNLABELLED:
        labelled = tl.where(unlabelled, 0.0, one)
    label_weight = labelled
    label_e, hard_total, hard_inverse = zero, zero, zero
    student_nll, teacher_nll = zero, zero
    student_inverse, student_log2, teacher_inverse, teacher_log2, kl = zero, zero, zero, zero, zero
    if NEEDS.student_nll:
        x = label_logit(at.student, student_label, at, HOW.STUDENT, HOW)
        if HOW.UNLABELLED:
            # Nobody can be asked but the teacher: reliability becomes 1 by a student that is never
            # right.
            x = tl.where(unlabelled, -1e30, x)
        label_e = tl.exp2(max_or_nan(x, -1e30) * LOG2_E)
        hard_total = tl.where(at.valid, student_others + label_e, 1.0)
        hard_inverse = reciprocal(hard_total, HOW.PTX)
        nll = negative_log_likelihood(student_others, label_e, x, HOW.PTX)
        student_nll = tl.where(at.valid, nll, 0.0)
        least = tl.minimum(least, hard_total)
        if HOW.WEIGHTED:
            label_weight = tl.load(
                at.class_weight + class_or_0(at, HOW), mask=labelled > 0.0, other=0.0
            ).to(HOW.FLOAT)
    if NEEDS.teacher_nll:
        x = label_logit(at.teacher, teacher_label, at, HOW.TEACHER, HOW)
        if HOW.UNLABELLED:
            x = tl.where(unlabelled, 0.0, x)
        e = tl.exp2(max_or_nan(x, -1e30) * LOG2_E)
        nll = negative_log_likelihood(teacher_others, e, x, HOW.PTX)
        teacher_nll = tl.where(at.valid, nll, 0.0)
        least = tl.minimum(least, tl.where(at.valid, teacher_others + e, 1.0))
    if NEEDS.pair or NEEDS.student_total:
        student_total = tl.where(at.valid, student_total, 1.0)
        student_inverse = reciprocal(student_total, HOW.PTX)
        student_log2 = log2(student_total)
        least = tl.minimum(least, student_total)
    if NEEDS.pair:
        teacher_total = tl.where(at.valid, teacher_total, 1.0)
        teacher_inverse = reciprocal(teacher_total, HOW.PTX)
        teacher_log2 = log2(teacher_total)
        least = tl.minimum(least, teacher_total)
        kl = kl_of(difference, teacher_inverse, teacher_log2, student_log2)
    totals = Totals(
        student_total,
        teacher_total,
        student_others,
        student_at_top,
        teacher_at_top,
        weighted * (1.0 / at.scale),
        one,
        labelled,
        label_weight,
        label_e,
        hard_total,
        hard_inverse,
        student_nll,
        teacher_nll,
        student_inverse,
        student_log2,
        teacher_inverse,
        teacher_log2,
        kl,
    )
    return totals, weight_sum, least


@triton.jit
def tops(at, HOW: tl.constexpr):
    """1 or 0: whether the label's logit is the student's largest, and whether the teacher's largest
    is where the student's is (of several the last)."""
    lowest = tl.zeros(at.valid.shape, HOW.FLOAT) + float("-inf")
    label, student_top, teacher_there, teacher_top = lowest, lowest, lowest, lowest
    student_plane = at.student.plane
    teacher_plane = at.teacher.plane
    for c in range(at.classes):
        k = read_class(at, c, student_plane, teacher_plane, HOW.TEACHER >= 0, HOW)
        label = tl.where(k.is_label, k.student_a, label)
        teacher_there = tl.where(k.student_a >= student_top, k.teacher_a, teacher_there)
        student_top = tl.maximum(student_top, k.student_a)
        teacher_top = tl.maximum(teacher_top, k.teacher_a)
        student_plane += at.student.class_stride
        teacher_plane += at.teacher.class_stride
    right = tl.where(label == student_top, 1.0, 0.0)
    return right, tl.where(teacher_there == teacher_top, 1.0, 0.0)


@triton.jit
def with_numbers(k, at, c, PLACE: tl.constexpr):
    """Class c with its two numbers of a term over classes."""
    first = at.space + c + 3 * PLACE * at.space_step
    return Class(
        k.student_z,
        k.teacher_z,
        k.student_a,
        k.teacher_a,
        k.student_e,
        k.teacher_e,
        k.is_label,
        k.unlabelled,
        k.student_hard,
        (tl.load(first), tl.load(first + at.space_step)),
    )


@triton.jit
def add_tallies(TERM: tl.constexpr, COUNT: tl.constexpr, t, at, own, first, HOW: tl.constexpr):
    """Adds the labelled pixels of a step to the sums of a term over classes, [COUNT, C] of this
    program at `at.space`; first: whether nothing is there yet. A sum over the program for each
    class and number: written for exactness and not for speed."""
    counts = (t.labelled > 0.0) & own
    plane = at.student.plane
    for c in range(at.classes):
        found = terms.tally(TERM, t, read_class(at, c, plane, plane, False, HOW))
        for j in tl.static_range(COUNT):
            x = found[j]
            if HOW.WEIGHTS:
                x = x * at.weight
            total = over_program(over_pixels(tl.where(counts, x, 0.0)))
            place = at.space + j * at.classes + c
            tl.store(place, tl.where(first, 0.0, tl.load(place)) + total)
        plane += at.student.class_stride
    tl.debug_barrier()  # the next step reads what this one wrote


@triton.jit
def own_loop(
    TERM: tl.constexpr,
    VARIANT: tl.constexpr,
    PLACE: tl.constexpr,
    n,
    p,
    known,
    bound,
    at,
    HOW: tl.constexpr,
):
    """The sums of a term that has a loop, its maxima, and what it knows then."""
    TRAITS: tl.constexpr = terms.traits(TERM, VARIANT)
    own = terms.start(TERM, tl.zeros(at.valid.shape, HOW.FLOAT))
    student_plane = at.student.plane
    teacher_plane = at.teacher.plane
    for c in range(at.classes):
        k = read_class(at, c, student_plane, teacher_plane, True, HOW)
        if TRAITS.numbers_of_classes:
            k = with_numbers(k, at, c, PLACE)
        above = bound
        if TRAITS.firsts > 0:
            found, known = terms.first(TERM, VARIANT, n, known, k, HOW.PTX)
            if TRAITS.rescales:
                new = (max_or_nan(bound[0], found[0]), max_or_nan(bound[1], found[1]))
                drop = (bound[0] - new[0], bound[1] - new[1])
                own = terms.rescale(TERM, VARIANT, p, own, drop)
                bound = new
            above = (found[0] - bound[0], found[1] - bound[1])
        _, own = terms.other(TERM, VARIANT, n, p, known, k, above, above, above, own, HOW.PTX)
        student_plane += at.student.class_stride
        teacher_plane += at.teacher.class_stride
    return own, bound, known


@triton.jit
def gathered(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p, known, at, HOW: tl.constexpr):
    """What a term knows after the loop before its own."""
    own = terms.start(TERM, tl.zeros(at.valid.shape, HOW.FLOAT))
    student_plane = at.student.plane
    teacher_plane = at.teacher.plane
    for c in range(at.classes):
        k = read_class(at, c, student_plane, teacher_plane, True, HOW)
        own = terms.gather(TERM, VARIANT, n, p, k, own, HOW.PTX)
        student_plane += at.student.class_stride
        teacher_plane += at.teacher.class_stride
    return terms.learn(TERM, VARIANT, n, p, known, own, HOW.PTX)


@triton.jit
def exact_maxima(TERM: tl.constexpr, VARIANT: tl.constexpr, n, known, at, HOW: tl.constexpr):
    """Of `first`, over the classes."""
    lowest = tl.zeros(at.valid.shape, HOW.FLOAT) + float("-inf")
    bound = (lowest, lowest)
    student_plane = at.student.plane
    teacher_plane = at.teacher.plane
    for c in range(at.classes):
        k = read_class(at, c, student_plane, teacher_plane, True, HOW)
        found, known = terms.first(TERM, VARIANT, n, known, k, HOW.PTX)
        bound = (max_or_nan(bound[0], found[0]), max_or_nan(bound[1], found[1]))
        student_plane += at.student.class_stride
        teacher_plane += at.teacher.class_stride
    return bound


@triton.jit
def own_sums(
    TERM: tl.constexpr,
    VARIANT: tl.constexpr,
    PLACE: tl.constexpr,
    n,
    p,
    known,
    at,
    HOW: tl.constexpr,
):
    """`own_loop`, and the smallest of the totals that a bound can make too small."""
    TRAITS: tl.constexpr = terms.traits(TERM, VARIANT)
    zero = tl.zeros(at.valid.shape, HOW.FLOAT)
    bound = (zero, zero)
    least = zero + 1.0
    if TRAITS.gathers:
        known = gathered(TERM, VARIANT, n, p, known, at, HOW)
    if TRAITS.rescales:
        lowest = -1e300 if HOW.FLOAT == tl.float64 else -2e38
        bound = (zero + lowest, zero + lowest)
    elif TRAITS.bounds > 0 and HOW.CAREFUL:
        own, _, _ = own_loop(TERM, VARIANT, PLACE, n, p, known, bound, at, HOW)
        close = terms.least(TERM, own) > SMALLEST_TOTAL
        exact = exact_maxima(TERM, VARIANT, n, known, at, HOW)
        bound = (tl.where(close, zero, exact[0]), tl.where(close, zero, exact[1]))
    own, bound, known = own_loop(TERM, VARIANT, PLACE, n, p, known, bound, at, HOW)
    if TRAITS.gathers:
        known = terms.close(TERM, VARIANT, n, p, known, own, HOW.PTX)
    if TRAITS.bounds > 0 and not TRAITS.rescales:
        least = tl.where(at.valid, terms.least(TERM, own), 1.0)
    return own, bound, known, least
