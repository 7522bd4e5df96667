"""What a program of a pass leaves for `combine.py`: its row of sums, and how pixels are counted."""

import triton
import triton.language as tl

from . import terms
from .tiles import over_pixels, over_program

# What a program leaves in its row of `partials`, [programs, ROW] float64: by the index of a term
# its numerator, from SHARES on its denominator, and the following; what is behind FLAG only if the
# call has unlabelled pixels or weights.
ROW = tl.constexpr(2 * terms.COUNT.value + 7)
SHARES = terms.COUNT
VALID = tl.constexpr(2 * terms.COUNT.value)  # pixels with or without a label
BAD = tl.constexpr(VALID.value + 1)
FLAG = tl.constexpr(VALID.value + 2)
LABELLED = tl.constexpr(VALID.value + 3)
VALID_WEIGHT = tl.constexpr(VALID.value + 4)
LABELLED_WEIGHT = tl.constexpr(VALID.value + 5)
BAD_WEIGHTS = tl.constexpr(VALID.value + 6)


@triton.jit
def with_pixels(counts, found, classes, UNLABELLED: tl.constexpr, WEIGHTS: tl.constexpr):
    """The counts of a thread, [1, 1, N, L] each, with the pixels of a step (`read_labels`)."""
    label, weight, bad, bad_weight = found
    valid_count, labelled_count, bad_count, bad_weights, valid_weight, labelled_weight = counts
    valid = label >= 0
    labelled = valid
    valid_count += over_pixels(valid.to(tl.int32))
    bad_count += over_pixels(bad)
    if UNLABELLED:
        labelled = valid & (label < classes)
        labelled_count += over_pixels(labelled.to(tl.int32))
    if WEIGHTS:
        bad_weights += over_pixels(bad_weight)
        valid_weight += over_pixels(tl.where(valid, weight, 0.0))
        labelled_weight += over_pixels(tl.where(labelled, weight, 0.0))
    return valid_count, labelled_count, bad_count, bad_weights, valid_weight, labelled_weight


@triton.jit
def store_counts(partial, counts, own_lane, UNLABELLED: tl.constexpr, WEIGHTS: tl.constexpr):
    valid_count, labelled_count, bad_count, bad_weights, valid_weight, labelled_weight = counts
    tl.store(partial + VALID, over_program(tl.where(own_lane, valid_count, 0)))
    tl.store(partial + BAD, over_program(tl.where(own_lane, bad_count, 0)))
    if UNLABELLED:
        tl.store(partial + LABELLED, over_program(tl.where(own_lane, labelled_count, 0)))
    if WEIGHTS:
        tl.store(partial + BAD_WEIGHTS, over_program(tl.where(own_lane, bad_weights, 0)))
        tl.store(partial + VALID_WEIGHT, over_program(tl.where(own_lane, valid_weight, 0.0)))
        tl.store(partial + LABELLED_WEIGHT, over_program(tl.where(own_lane, labelled_weight, 0.0)))


@triton.jit
def store_sums(partial, values, shares, numbers, p, own_lane, TERMS: tl.constexpr):
    for k in tl.static_range(len(TERMS)):
        factor = terms.factor(TERMS[k][0], TERMS[k][1], numbers[k], p)
        value = over_program(tl.where(own_lane, values[k] * factor, 0.0))
        tl.store(partial + TERMS[k][0], value)
        if TERMS[k][3]:
            share = over_program(tl.where(own_lane, shares[k], 0.0))
            tl.store(partial + SHARES + TERMS[k][0], share)
