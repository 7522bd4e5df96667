"""All terms, in one place: what loops over them (term.py says what a term is).

The index of a term here is the kernels'; `of` has it for an object of terms.TERMS, where one class
may stand for several terms of the kernels. A call's terms are a tuple of `Entry`, known when a
kernel is compiled: what is chosen here is chosen then.
"""

import hashlib
import inspect
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import formulas
from . import ce, cwd, dice, dkd, feature, focal, hetero, kd, lskd, ofa, paper, tversky
from . import term as defaults
from .term import OWN, First, Needs
from .term import Traits as Traits

FILES = (ce, kd, hetero, paper, feature, cwd, dkd, focal, ofa, dice, tversky, lskd)
COUNT = tl.constexpr(len(FILES))
CE, KD, HETERO, FEATURE = (tl.constexpr(FILES.index(file)) for file in (ce, kd, hetero, feature))

# Triton keeps what it has compiled until the source of a function that is called changes, and does
# not see those that `member` finds. A constant is part of the key.
SOURCES = tl.constexpr(
    hashlib.sha256(
        "".join(inspect.getsource(file) for file in (formulas, defaults, *FILES)).encode()
    ).hexdigest()
)


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
    name = "paper" if getattr(term, "preset", None) == "paper" else term.name
    name = "lskd" if getattr(term, "standardize", False) else name
    names = [file.__name__.rpartition(".")[2] for file in FILES]
    index = names.index(name.removeprefix("teacher_"))
    return index, member(index, "variant")(term)


# The tuple is a default of an argument: Triton would copy a global variable, which modules refuse.
@triton.constexpr_function
def member(term, name, files=FILES):
    """A function or class of a term's file, or else term.py's."""
    assert SOURCES
    return getattr(files[term], name, None) or getattr(defaults, name)


@triton.constexpr_function
def traits(term, variant):
    return member(term, "traits")(variant)


@triton.constexpr_function
def needs_of(entries, diagnostics):
    """What one of these terms needs, or the diagnostics."""
    found = [traits(entry[0], entry[1]).needs for entry in entries]
    found += [Needs(student_nll=True)] if diagnostics else []
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
    """Where they are among those of all terms; of len(entries), how many there are. Numbers of
    classes have a place as well."""
    own = [traits(entry[0], entry[1]).numbers_of_classes for entry in entries[:k]]
    return sum([spaces(entry) for entry in entries[:k]]) + sum(own)


@triton.constexpr_function
def tallies_of(entries):
    """Of the pass that collects sums of one term over classes: how many there are."""
    return sum([traits(entry[0], entry[1]).tallies for entry in entries])


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
    its = traits(entry[0], entry[1])
    return sums_late(entry, maps) or (entry[2] >= 0 and OWN in (its.student, its.other))


@triton.constexpr_function
def maps_early(entry):
    """Whether the maps are known before the loop over gradients."""
    its = traits(entry[0], entry[1])
    return its.mapped and (its.has_loop or its.firsts == 0)


@triton.constexpr_function
def maps_late(entry):
    return traits(entry[0], entry[1]).mapped and not maps_early(entry)


# Names of what is in tuples of terms are given again: the oldest Triton loses them.


@triton.jit
def numbers(TERM: tl.constexpr, bits, classes, FLOAT: tl.constexpr):
    """bits: of the weight and the other numbers of its class."""
    options = ()
    for j in tl.static_range(1, len(bits)):
        options = options + (formulas.number(bits[j], tl.float64),)
    return member(TERM, "numbers")(options, classes, FLOAT)


@triton.jit
def begin(TERM: tl.constexpr, VARIANT: tl.constexpr, n, t, zero, PTX: tl.constexpr):
    n = member(TERM, "Numbers")(*n)
    return member(TERM, "begin")(VARIANT, n, t, zero, PTX)


@triton.jit
def first(TERM: tl.constexpr, VARIANT: tl.constexpr, n, known, c, PTX: tl.constexpr):
    """Two numbers, and what is known now."""
    n = member(TERM, "Numbers")(*n)
    known = member(TERM, "Known")(*known)
    return member(TERM, "first")(VARIANT, n, known, c, PTX)


@triton.jit
def start(TERM: tl.constexpr, zero):
    return member(TERM, "start")(zero)


@triton.jit
def other(
    TERM: tl.constexpr,
    VARIANT: tl.constexpr,
    n,
    p,
    known,
    c,
    above,
    shares,
    logs,
    own,
    PTX: tl.constexpr,
):
    """x_c and y_c, as far as they are the term's own, and its sums."""
    n = member(TERM, "Numbers")(*n)
    known = member(TERM, "Known")(*known)
    own = member(TERM, "Own")(*own)
    found = First(above, shares, logs)
    return member(TERM, "other")(VARIANT, n, p, known, c, found, own, PTX)


@triton.jit
def tally(TERM: tl.constexpr, t, c):
    return member(TERM, "tally")(t, c)


@triton.jit
def gather(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p, c, own, PTX: tl.constexpr):
    n = member(TERM, "Numbers")(*n)
    own = member(TERM, "Own")(*own)
    return member(TERM, "gather")(VARIANT, n, p, c, own, PTX)


@triton.jit
def learn(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p, known, own, PTX: tl.constexpr):
    n = member(TERM, "Numbers")(*n)
    known = member(TERM, "Known")(*known)
    own = member(TERM, "Own")(*own)
    return member(TERM, "learn")(VARIANT, n, p, known, own, PTX)


@triton.jit
def close(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p, known, own, PTX: tl.constexpr):
    n = member(TERM, "Numbers")(*n)
    known = member(TERM, "Known")(*known)
    own = member(TERM, "Own")(*own)
    return member(TERM, "close")(VARIANT, n, p, known, own, PTX)


@triton.jit
def rescale(TERM: tl.constexpr, VARIANT: tl.constexpr, p, own, drop):
    own = member(TERM, "Own")(*own)
    return member(TERM, "rescale")(VARIANT, p, own, drop)


@triton.jit
def least(TERM: tl.constexpr, own):
    own = member(TERM, "Own")(*own)
    return member(TERM, "least")(own)


@triton.jit
def pixel(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p, t, known, own, scale, PTX: tl.constexpr):
    n = member(TERM, "Numbers")(*n)
    known = member(TERM, "Known")(*known)
    own = member(TERM, "Own")(*own)
    return member(TERM, "pixel")(VARIANT, n, p, t, known, own, scale, PTX)


@triton.jit
def factor(TERM: tl.constexpr, VARIANT: tl.constexpr, n, p):
    n = member(TERM, "Numbers")(*n)
    return member(TERM, "factor")(VARIANT, n, p)
