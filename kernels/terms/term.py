"""What a term is to the Triton kernels: the contract of the files beside this one, which is that of
csrc/terms/term.h in another language, so that both files of a term can be read side by side.

Every gradient has the shape

    g_c = student x_c - other y_c,   of the labelled class, where the term says so, `label`,

and a term answers, with no loop of its own, from sums over the classes of a pixel:

    variant  the options that decide which code runs, as one integer; in Python, from its class
    traits   what there must be for it, which loops it has, where x_c and y_c come from
    numbers  what it makes of the other options, once per program
    begin    what it knows of a pixel before its loop over classes (`Known`)
    first    up to two numbers of a class, of which its loop needs the maxima (or, of terms over
             space, the totals over the pixels of an image and class) before anything else
    start    where the sums of its loop begin (`Own`)
    gather   what is summed over classes before that, where x_c or y_c are made of sums, and
    learn    what is known of it; `close` what is known of the sums of `other`
    other    x_c and y_c, as far as they are the term's own, and what is summed over classes for the
             value
    rescale  brings those sums from old maxima to new ones: one loop instead of two
    least    the sum that maxima which are not the exact ones can make too small
    pixel    value, share of the denominator and coefficients of the gradient
    factor   what the sum of the values over pixels has for a factor

A term over classes is a function of sums over all pixels of the call, a few for each class, which
a pass of its own (variant COLLECTING) finds before:

    tally    what is added up of a class at a pixel
    settle   of these sums the value, and two numbers of each class (`Class.numbers`); in torch

Nothing is written to: what `first` and `other` change they return. A file has those functions that
its term needs, with the arguments of `__init__.py`; defaults are at the end of this one. What the
sum of the values is divided by says `Term.denominator` of terms.py.

Unlike in csrc, a = (z - m) scale may have a bound for m that is a little more than the maximum: the
class at the top has exp2(t.student_at_top), not 1. Coefficients have a factor `t.one`, or are
selected by it, and a factor of the value that all pixels share (T^2) is left to `factor`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Where x_c and y_c of the gradient come from.
NONE = tl.constexpr(0)
STUDENT_HARD = tl.constexpr(1)  # e of the student at T = 1
STUDENT = tl.constexpr(2)  # e of the student at T
TEACHER = tl.constexpr(3)
STUDENT_Z = tl.constexpr(4)
TEACHER_Z = tl.constexpr(5)
CLASS_WEIGHT = tl.constexpr(6)  # w_c, 1 without class weights
OWN = tl.constexpr(7)  # `other`

# The variant of a term over classes in the pass that collects its sums.
COLLECTING = tl.constexpr(1 << 20)


# --- what a term asks for ------------------------------------------------------------------------


class Needs(NamedTuple):
    student_nll: bool = False  # at T = 1: totals, negative log likelihood of the label
    teacher_nll: bool = False
    student_total: bool = False  # at T
    pair: bool = False  # at T: both totals and KL(p_t || p_s)
    at_top: bool = False  # with `pair`: both a of the class where the student's is largest
    weighted_z: bool = False  # with `student_nll`: sum_c w_c (z_c - m)
    raw_logits: bool = False  # its loop reads z


class Traits(NamedTuple):
    needs: Needs
    student: int = 0  # where x_c comes from
    other: int = 0  # where y_c does
    has_label: bool = False
    # Whether the coefficients need `Own`, the sums of `other` over the classes; and whether the
    # value alone does: it then is Coefficients.value times the first of them, which may come last.
    has_loop: bool = False
    has_value_loop: bool = False
    firsts: int = 0  # how many numbers of `first` there are
    # Of which `other` needs the maxima over classes, or the totals over space. A term that does not
    # rescale has maxima that are at most 0, which stands for them where it is close enough.
    bounds: int = 0
    spaces: int = 0
    rescales: bool = False
    gathers: bool = False  # has `gather`, `learn` and `close`
    mapped: bool = False  # Known begins with `reliability` and `discrepancy`
    # Whether the sum of the values is one that cannot be negative, though its rounding may be.
    is_divergence: bool = True
    # Whether its gradient stands apart from those of the terms with the same denominator.
    own_gradient: bool = False
    # Of a term over classes: whether it reads numbers of the class, and how many sums its variant
    # COLLECTING has.
    numbers_of_classes: bool = False
    tallies: int = 0


# --- what a term gets ----------------------------------------------------------------------------


class PassNumbers(NamedTuple):
    """Numbers of a pass that are not a term's."""

    temperature: Any
    inverse_temperature: Any
    scale: Any  # a = (z - m) scale
    classes: Any
    weight_sum: Any  # sum_c w_c


class Totals(NamedTuple):
    """Sums over the classes of a pixel, and what follows from them; what nobody needs is 0."""

    student_total: Any
    teacher_total: Any
    student_others: Any  # of e at T = 1, without the labelled class
    student_at_top: Any
    teacher_at_top: Any
    weighted_z: Any  # sum_c w_c (z_c - m)
    one: Any  # 0 of an invalid pixel, of which the other numbers are harmless
    labelled: Any  # 0 of an unlabelled pixel too: for terms that need a label
    label_weight: Any  # w_y, 0 where `labelled` is; `labelled` without class weights
    label_e: Any  # e_y at T = 1
    hard_total: Any
    hard_inverse: Any
    student_nll: Any
    teacher_nll: Any
    student_inverse: Any
    student_log2: Any
    teacher_inverse: Any
    teacher_log2: Any
    kl: Any


class Class(NamedTuple):
    """One class of a pixel."""

    student_z: Any
    teacher_z: Any
    student_a: Any
    teacher_a: Any
    student_e: Any
    teacher_e: Any
    is_label: Any
    unlabelled: Any  # no class of the pixel is
    student_hard: Any  # e of the student at T = 1
    numbers: Any  # two, of a term over classes


class First(NamedTuple):
    """What there is of `first` at a class, where there is one."""

    above: Any  # the numbers, without their maxima where the term has bounds
    shares: Any  # of terms over space: the pixel's of each softmax
    logs: Any  # and the logarithm of what that divided by


# --- what a term gives ---------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """All 0 of an invalid pixel."""

    value: Any  # of a value loop: what its sum is multiplied by
    share: Any  # of the denominator
    student: Any
    other: Any
    label: Any


# --- what a term has that does not say otherwise -------------------------------------------------


class Numbers(NamedTuple):
    pass


class Known(NamedTuple):
    pass


class Own(NamedTuple):
    pass


def variant(term: Any) -> int:
    return 0


@triton.jit
def numbers(options, classes, FLOAT: tl.constexpr):
    return Numbers()


@triton.jit
def begin(VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    return Known()


@triton.jit
def start(zero):
    return Own()


@triton.jit
def factor(VARIANT: tl.constexpr, n, p):
    return 1.0
