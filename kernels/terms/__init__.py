"""All terms, in one place: what loops over them (term.py says what a term is).

The index of a term here is the kernels'; `of` has it for an object of terms.TERMS, where one class
may stand for several terms of the kernels. A call's terms are a tuple of `Entry`, known when a
kernel is compiled: what is chosen here is chosen then.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import ce, cwd, dkd, feature, hetero, kd, paper
from .term import OWN, Needs
from .term import Traits as Traits

CE = tl.constexpr(0)
KD = tl.constexpr(1)
HETERO = tl.constexpr(2)
PAPER = tl.constexpr(3)
FEATURE = tl.constexpr(4)
CWD = tl.constexpr(5)
DKD = tl.constexpr(6)
COUNT = tl.constexpr(7)


class Entry(NamedTuple):
    """A term of a call."""

    term: int
    variant: int
    slot: int
    """where its gradient is (logits on a grid of cells) or its group's scale; -1: it is there for
    the maps alone"""
    shares: bool
    """whether it has a denominator of its own"""


def of(term: Any) -> tuple[int, int]:
    """Index and variant of a term of terms.py."""
    names = ("ce", "kd", "hetero", "paper", "feature", "cwd", "dkd")
    name = "paper" if getattr(term, "preset", None) == "paper" else term.name
    index = names.index(name.removeprefix("teacher_"))
    files: Any = (ce, kd, hetero, paper, feature, cwd, dkd)
    return index, files[index].variant(term)


@triton.constexpr_function
def traits(term, variant):
    if term == CE:
        return ce.traits(variant)
    if term == KD:
        return kd.traits(variant)
    if term == HETERO:
        return hetero.traits(variant)
    if term == PAPER:
        return paper.traits(variant)
    if term == FEATURE:
        return feature.traits(variant)
    return cwd.traits(variant) if term == CWD else dkd.traits(variant)


@triton.constexpr_function
def needs_of(entries):
    """What one of these terms needs."""
    found = [traits(entry[0], entry[1]).needs for entry in entries]
    return Needs(*[True in column for column in zip(*found, strict=True)])


@triton.constexpr_function
def leads(entries, k):
    """Whether term k is the first one of its slot."""
    return entries[k][2] not in [entry[2] for entry in entries[:k]]


@triton.constexpr_function
def spaces(entry):
    """How many softmaxes over space a term has."""
    return traits(entry[0], entry[1]).spaces if entry[2] >= 0 else 0


@triton.constexpr_function
def place_over_space(entries, k):
    """Where they are among those of all terms; of len(entries), how many there are."""
    return sum([spaces(entry) for entry in entries[:k]])


@triton.constexpr_function
def adds(entries, k, slot):
    """Whether term k has a gradient in that slot; slot < 0: at all."""
    return entries[k][2] >= 0 and slot in (-1, entries[k][2])


@triton.constexpr_function
def adds_first(entries, k, slot):
    return not any(adds(entries, j, slot) for j in range(k))


@triton.constexpr_function
def shares_slots(entries, slots):
    return sum([entry[2] >= 0 for entry in entries]) > slots


@triton.constexpr_function
def sums_late(entry, maps):
    """Whether there are sums over the classes that only a value, or the maps, need."""
    its = traits(entry[0], entry[1])
    return its.has_value_loop and (entry[2] >= 0 or (maps and its.firsts > 0))


@triton.constexpr_function
def some_late(entries, maps):
    return any(sums_late(entry, maps) for entry in entries)


@triton.constexpr_function
def has_other(entry, maps):
    """Whether the loop over gradients asks for `other`."""
    return sums_late(entry, maps) or (entry[2] >= 0 and traits(entry[0], entry[1]).other == OWN)


@triton.constexpr_function
def maps_early(entry):
    """Whether the maps are known before the loop over gradients."""
    its = traits(entry[0], entry[1])
    return its.mapped and (its.has_loop or its.firsts == 0)


@triton.constexpr_function
def maps_late(entry):
    return traits(entry[0], entry[1]).mapped and not maps_early(entry)


@triton.jit
def numbers(TERM: tl.constexpr, options, classes, FLOAT: tl.constexpr):
    if TERM == CE:
        found = ce.numbers(options, classes, FLOAT)
    elif TERM == KD:
        found = kd.numbers(options, classes, FLOAT)
    elif TERM == HETERO:
        found = hetero.numbers(options, classes, FLOAT)
    elif TERM == FEATURE:
        found = feature.numbers(options, classes, FLOAT)
    elif TERM == CWD:
        found = cwd.numbers(options, classes, FLOAT)
    elif TERM == DKD:
        found = dkd.numbers(options, classes, FLOAT)
    else:
        found = ()
    return found


# Names of what is in tuples of terms are given again: the oldest Triton loses them.


@triton.jit
def begin(TERM: tl.constexpr, VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    if TERM == KD:
        known = kd.begin(VARIANT, kd.Numbers(*n), t, PTX)
    elif TERM == HETERO:
        known = hetero.begin(VARIANT, hetero.Numbers(*n), t, PTX)
    elif TERM == PAPER:
        known = paper.begin(zero)
    elif TERM == DKD:
        known = dkd.begin(zero)
    else:
        known = ()
    return known


@triton.jit
def first(TERM: tl.constexpr, VARIANT: tl.constexpr, n, known, c, PTX: tl.constexpr):
    """Two numbers, and what is known now."""
    if TERM == PAPER:
        found, known = paper.first(VARIANT, paper.Known(*known), c, PTX)
    elif TERM == CWD:
        found = cwd.first(cwd.Numbers(*n), c)
    elif TERM == DKD:
        found, known = dkd.first(dkd.Known(*known), c)
    else:
        a = hetero.first(hetero.Known(*known), c)
        found = (a, a)
    return found, known


@triton.jit
def start(TERM: tl.constexpr, zero):
    if TERM == KD:
        own = kd.start(zero)
    elif TERM == HETERO:
        own = hetero.start(zero)
    elif TERM == PAPER:
        own = paper.start(zero)
    elif TERM == FEATURE:
        own = feature.start(zero)
    elif TERM == CWD:
        own = cwd.start(zero)
    elif TERM == DKD:
        own = dkd.start(zero)
    else:
        own = ()
    return own


@triton.jit
def other(
    TERM: tl.constexpr,
    VARIANT: tl.constexpr,
    n,
    p,
    known,
    c,
    found,
    shares,
    logs,
    own,
    PTX: tl.constexpr,
):
    """x_c and y_c, as far as they are the term's own, and its sums."""
    if TERM == KD:
        y, own = kd.other(VARIANT, kd.Known(*known), c, kd.Own(*own), PTX)
    elif TERM == HETERO:
        y, own = hetero.other(VARIANT, hetero.Known(*known), c, found[0], hetero.Own(*own), PTX)
    elif TERM == PAPER:
        y, own = paper.other(VARIANT, p, c, found, shares, paper.Own(*own), PTX)
    elif TERM == CWD:
        pair, own = cwd.other(cwd.Numbers(*n), c, shares, logs, cwd.Own(*own))
    elif TERM == DKD:
        pair, own = dkd.other(c, found, dkd.Own(*own))
    else:
        y, own = feature.other(c, feature.Own(*own))
    if TERM < CWD:
        pair = (y, y)
    return pair, own


@triton.jit
def rescale(TERM: tl.constexpr, VARIANT: tl.constexpr, p, own, drop):
    if TERM == PAPER:
        own = paper.rescale(VARIANT, p, paper.Own(*own), drop)
    else:
        own = dkd.rescale(dkd.Own(*own), drop)
    return own


@triton.jit
def least(TERM: tl.constexpr, own):
    return hetero.least(hetero.Own(*own))


@triton.jit
def pixel(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    if TERM == CE:
        found = ce.pixel(VARIANT, ce.Numbers(*n), p, t, scale)
    elif TERM == KD:
        found = kd.pixel(VARIANT, kd.Numbers(*n), p, t, kd.Known(*known), kd.Own(*own), scale)
    elif TERM == HETERO:
        found = hetero.pixel(VARIANT, p, t, hetero.Known(*known), hetero.Own(*own), scale, PTX)
    elif TERM == PAPER:
        found = paper.pixel(VARIANT, p, t, paper.Own(*own), scale, PTX)
    elif TERM == CWD:
        found = cwd.pixel(cwd.Numbers(*n), t, scale)
    elif TERM == DKD:
        found = dkd.pixel(dkd.Numbers(*n), p, t, dkd.Known(*known), dkd.Own(*own), scale, PTX)
    else:
        found = feature.pixel(feature.Numbers(*n), t, scale)
    return found


@triton.jit
def factor(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p):
    if TERM == KD:
        found = kd.factor(VARIANT, p)
    elif TERM == HETERO:
        found = hetero.factor(VARIANT, p)
    elif TERM == PAPER:
        found = paper.factor(VARIANT, p)
    elif TERM == FEATURE:
        found = feature.factor(feature.Numbers(*n))
    elif TERM == CWD:
        found = cwd.factor(cwd.Numbers(*n))
    elif TERM == DKD:
        found = dkd.factor(p)
    else:
        found = 1.0
    return found
