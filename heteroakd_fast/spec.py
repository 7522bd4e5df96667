"""The options of a loss as the operators take them, and the plan of its passes.

A loss is encoded as its `shape` (which terms, which of their choices: integers that decide what
code runs and what a compiler specialises on) and its numbers (weights, temperatures, ...: a float64
vector, so that a new value compiles nothing). `plan` turns a shape into passes; a `LossSpec` is one
pass with its numbers, and what `csrc/spec.h` decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from .terms import TERMS, CrossEntropy, HeteroAKD, TeacherCrossEntropy, Term

__all__ = [
    "STAND_IN_NUMBERS",
    "LossSpec",
    "Numbers",
    "Options",
    "PassPlan",
    "Shape",
    "choices_of",
    "constant_while_tracing",
    "groups_of",
    "names_of",
    "numbers_of",
    "plan",
    "shape_of",
    "vector",
    "who_learns",
]

_F = TypeVar("_F", bound=Callable[..., Any])

#: Of each term: its index in `TERMS`, whether its weight is not 0, which of the loss's temperatures
#: it has (-1: none), and the index of each of its choices.
Shape = tuple[tuple[int, ...], ...]

#: Values in eager calls; in a compiled graph `vector` of them, which a new value does not change.
Numbers = tuple[float, ...] | Tensor

_MAPS_ONLY: Final = -1
#: What a pass writes of each pixel: (reliability, discrepancy), and (-log p_y; whether the
#: student's largest logit is the label's; whether the teacher's is where the student's is).
MAPS: Final = 1
DIAGNOSTICS: Final = 2
# No backend has a pass without a term: the cross entropy stands in, and what it gives is dropped.
_STAND_IN: Final = (TERMS.index(CrossEntropy), 0)
STAND_IN_NUMBERS: Final = (1.0, 0.0)


def constant_while_tracing(function: _F) -> _F:
    """What `torch.compiler.assume_constant_result` does, which would import the whole tracer, and
    Triton with it, in every process that imports this package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Of each term the options that are choices, and the names of those that are numbers.
_CHOICES: Final = {
    term: tuple(option for option in fields(term) if "choices" in option.metadata) for term in TERMS
}
_NUMBERS: Final = {
    term: tuple(option.name for option in fields(term) if "choices" not in option.metadata)
    for term in TERMS
}


def _temperature_of_pass(term: Term) -> float | None:
    return getattr(term, "temperature", None) if term.shares_temperature else None


def shape_of(terms: Sequence[Term]) -> Shape:
    temperatures: list[float] = []
    shape = []
    for term in terms:
        temperature = _temperature_of_pass(term)
        if temperature is not None and temperature not in temperatures:
            temperatures.append(temperature)
        choices = (
            option.metadata["choices"].index(getattr(term, option.name))
            for option in _CHOICES[type(term)]
        )
        shape.append(
            (
                TERMS.index(type(term)),
                int(term.weight != 0.0),
                -1 if temperature is None else temperatures.index(temperature),
                *choices,
            )
        )
    return tuple(shape)


@constant_while_tracing
def names_of(shape: Shape) -> tuple[str, ...]:
    """What the terms are called in a result: `kd`, and `kd_2` for a second one."""
    kinds = [kind for kind, *_ in shape]
    earlier = [kinds[:k].count(kind) for k, kind in enumerate(kinds)]
    return tuple(
        TERMS[kind].name + (f"_{before + 1}" if before else "")
        for kind, before in zip(kinds, earlier, strict=True)
    )


def numbers_of(terms: Sequence[Term]) -> tuple[float, ...]:
    """Weight and other numbers of each term."""
    return tuple(getattr(term, name) for term in terms for name in _NUMBERS[type(term)])


def vector(numbers: Sequence[float]) -> Tensor:
    """The numbers as the operators take them: float64 on the CPU."""
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


_kept_vector = lru_cache(maxsize=256)(vector)


class Options(NamedTuple):
    """A `LossSpec`, decoded."""

    terms: tuple[Term, ...]
    """each at most once; those of group -1 are there for the maps alone, behind all others"""
    groups: tuple[int, ...]
    """of each term: terms of one group have one denominator"""
    ignore_index: int
    align_corners: bool
    maps: bool
    diagnostics: bool
    unlabelled_index: int
    """`ignore_index` where no pixel is unlabelled"""

    @property
    def asked(self) -> tuple[Term, ...]:
        """The terms to compute, in the order of the numerators."""
        return tuple(
            term for term, group in zip(self.terms, self.groups, strict=True) if group >= 0
        )

    @property
    def group_count(self) -> int:
        return max(self.groups, default=-1) + 1

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.terms)

    def find(self, name: str) -> Any:
        """The term of that name, or None."""
        return next((term for term in self.terms if term.name == name), None)


class LossSpec(NamedTuple):
    """One pass over the label grid: the terms to compute and how.

    The label grid of a pass is the grid of its `target`: `resolution="logits"` is settled above, by
    resampling the labels, so no backend needs to know of it.
    """

    structure: tuple[int, ...]
    """ignore_index, align_corners, MAPS and DIAGNOSTICS as bits, unlabelled_index (`ignore_index`
    where no pixel is unlabelled); of each term its index in `TERMS`, group and choices"""
    numbers: Numbers
    """of each term its weight and other numbers"""

    @classmethod
    def of(
        cls,
        *terms: Term,
        groups: Sequence[int] | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        maps: bool = False,
        unlabelled_index: int | None = None,
        diagnostics: bool = False,
    ) -> LossSpec:
        """A pass with these terms, each with a denominator of its own unless `groups` are given."""
        groups = range(len(terms)) if groups is None else groups
        entries = (
            (shape[0], group, *shape[3:])
            for shape, group in zip(shape_of(terms), groups, strict=True)
        )
        unlabelled_index = ignore_index if unlabelled_index is None else unlabelled_index
        written = MAPS * maps + DIAGNOSTICS * diagnostics
        head = (ignore_index, int(align_corners), written, unlabelled_index)
        return cls((*head, *(n for entry in entries for n in entry)), numbers_of(terms))

    def options(self) -> Options:
        """Raises: ValueError: it is no encoding of terms that can be in one pass."""
        numbers = self.numbers if isinstance(self.numbers, tuple) else self.numbers.tolist()
        return _decode(tuple(self.structure), tuple(numbers))

    def vector(self) -> Tensor:
        """The numbers, float64 on the CPU; not to be written to."""
        return _kept_vector(self.numbers) if isinstance(self.numbers, tuple) else self.numbers

    @property
    def ignore_index(self) -> int:
        return self.structure[0]

    @property
    def align_corners(self) -> bool:
        return bool(self.structure[1])

    @property
    def maps(self) -> bool:
        return bool(self.structure[2] & MAPS)

    @property
    def diagnostics(self) -> bool:
        return bool(self.structure[2] & DIAGNOSTICS)

    @property
    def planes(self) -> int:
        """How many [B, H, W] the pass writes: two maps, then three diagnostics."""
        return planes_of(self.structure)

    @property
    def unlabelled_index(self) -> int:
        return self.structure[3]


def planes_of(structure: tuple[int, ...]) -> int:
    return 2 * bool(structure[2] & MAPS) + 3 * bool(structure[2] & DIAGNOSTICS)


@constant_while_tracing
def who_learns(structure: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether a term sends a gradient to the student, and whether one does to the teacher."""
    groups = groups_of(structure)
    of_teacher = "teacher_ce" in groups
    return len(groups) > of_teacher, of_teacher


@lru_cache(maxsize=256)
def groups_of(structure: tuple[int, ...]) -> dict[str, int]:
    """The group of each term to compute, by its name."""
    return {term.name: group for term, group, _ in _entries(structure) if group >= 0}


def choices_of(structure: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """By the name of each term the options of it that are choices."""
    return {
        term.name: {
            option.name: option.metadata["choices"][choice]
            for option, choice in zip(_CHOICES[term], choices, strict=True)
        }
        for term, _, choices in _entries(structure)
    }


def _entries(structure: tuple[int, ...]) -> Iterator[tuple[type[Term], int, tuple[int, ...]]]:
    """Class, group and choices of each term.

    Raises:
        ValueError: the structure is none.
    """
    at = 4
    while at < len(structure):
        index = structure[at]
        if not 0 <= index < len(TERMS):
            raise ValueError(f"structure: got term {index}, expected 0 to {len(TERMS) - 1}")
        term = TERMS[index]
        end = at + 2 + len(_CHOICES[term])
        if end > len(structure):
            break
        yield term, structure[at + 1], tuple(structure[at + 2 : end])
        at = end
    if at != len(structure):
        raise ValueError(f"structure: got {len(structure)} integers, the terms take others")


@lru_cache(maxsize=256)
def _decode(structure: tuple[int, ...], numbers: tuple[float, ...]) -> Options:
    terms, groups, values = [], [], iter(numbers)
    for term, group, choices in _entries(structure):
        options: dict[str, Any] = {name: next(values, None) for name in _NUMBERS[term]}
        for option, choice in zip(_CHOICES[term], choices, strict=True):
            known = option.metadata["choices"]
            if not 0 <= choice < len(known):
                raise ValueError(
                    f"structure: got {option.name} {choice}, expected 0 to {len(known) - 1}"
                )
            options[option.name] = known[choice]
        terms.append(term(**options))
        groups.append(group)
    ignore_index, align_corners, written, unlabelled_index = structure[:4]
    check_pass(terms, groups, maps=bool(written & MAPS))
    if next(values, None) is not None:
        raise ValueError(f"numbers: got {len(numbers)}, the terms have fewer")
    return Options(
        tuple(terms),
        tuple(groups),
        ignore_index,
        bool(align_corners),
        bool(written & MAPS),
        bool(written & DIAGNOSTICS),
        unlabelled_index,
    )


def check_pass(terms: Sequence[Term], groups: Sequence[int], maps: bool) -> None:
    """Raises: ValueError: these terms cannot be in one pass."""
    names = [term.name for term in terms]
    if not any(group >= 0 for group in groups) or len(set(names)) != len(names):
        raise ValueError(f"terms: got {names}, expected some, each once")
    for term, group in zip(terms, groups, strict=True):
        if group >= 0 and term.weight == 0.0:
            raise ValueError(f"numbers: got weight 0 of {term.name}; leave the term out")
    if len({_temperature_of_pass(term) for term in terms} - {None}) > 1:
        raise ValueError("temperature: got different ones in one pass")
    if maps and HeteroAKD.name not in names:
        raise ValueError("maps: need the term hetero, which may have group -1")
    if not all(-1 <= group < len(terms) for group in groups):
        raise ValueError(f"groups: got {list(groups)}, expected -1 to {len(terms) - 1}")


class PassPlan(NamedTuple):
    """A pass of a plan; its numbers are those of the loss's terms `terms`, in their order."""

    terms: tuple[int, ...]
    """positions in the loss"""
    structure: tuple[int, ...]
    """as in `LossSpec`, from the terms on; where all is for the maps, a cross entropy leads"""
    numbers: tuple[int, ...] | None
    """positions among the loss's numbers; None: all, in their order"""
    names: tuple[str, ...]
    """of the terms to compute: `kd`, and `kd_2` for the second one of a loss"""
    groups: tuple[int, ...]
    """of the terms to compute"""
    denominators: tuple[str, ...]
    """of each group (`Term.denominator`)"""
    needs_teacher: bool
    of_student: bool
    """whether a term reads the student's logits"""
    compares: bool
    """whether one of these reads the teacher's, too"""
    weighted: bool
    """whether a term reads class weights"""
    maps: bool


@constant_while_tracing
def plan(
    shape: Shape, weighted: bool, maps: bool, apart: tuple[str, ...], unlabelled: bool = False
) -> list[PassPlan]:
    """The fewest passes that compute these terms.

    A pass has each kind of term once and, beside the T = 1 of the cross entropies, one temperature.
    Terms of a pass whose denominators are the same are one group, and share a gradient.

    Args:
        weighted: whether the cross entropies have class weights.
        maps: whether the maps are wanted: of the first term `hetero`, be its weight 0.
        apart: names of terms that need a group of their own, because a caller replaces their
            denominators.
        unlabelled: whether there is a label for pixels that only terms of distillation count.
    """
    return _plan(shape, weighted, maps, apart, unlabelled)


class _Pass:
    def __init__(self) -> None:
        self.kinds: set[int] = set()
        self.temperature = -1
        self.entries: list[tuple[int, bool]] = []  # position of a term, whether it is computed

    def takes(self, kind: int, temperature: int) -> bool:
        other = temperature != self.temperature and -1 not in (temperature, self.temperature)
        return kind not in self.kinds and not other

    def add(self, position: int, kind: int, temperature: int, asked: bool) -> None:
        self.kinds.add(kind)
        self.temperature = max(self.temperature, temperature)
        self.entries.append((position, asked))


@lru_cache(maxsize=256)
def _plan(
    shape: Shape, weighted: bool, maps: bool, apart: tuple[str, ...], unlabelled: bool
) -> list[PassPlan]:
    passes: list[_Pass] = []
    hetero = TERMS.index(HeteroAKD)
    of_hetero = [k for k, (kind, *_) in enumerate(shape) if kind == hetero]
    asked = [k for k, (_, weight, *_) in enumerate(shape) if weight]
    mapped = None
    if maps:
        mapped = next((k for k in of_hetero if k in asked), of_hetero[0] if of_hetero else None)
    for k in [*asked, *([mapped] if mapped is not None and mapped not in asked else [])]:
        kind, _, temperature, *_ = shape[k]
        found = next((one for one in passes if one.takes(kind, temperature)), None)
        if found is None:
            found = _Pass()
            passes.append(found)
        found.add(k, kind, temperature, k in asked)
    names = names_of(tuple(shape[k] for k in asked))
    by_position = dict(zip(asked, names, strict=True))
    return [
        _pass_plan(one, shape, by_position, weighted, apart, unlabelled, mapped) for one in passes
    ]


def _pass_plan(
    one: _Pass,
    shape: Shape,
    names: dict[int, str],
    weighted: bool,
    apart: tuple[str, ...],
    unlabelled: bool,
    mapped: int | None,
) -> PassPlan:
    keys: list[tuple[str, str]] = []
    structure: list[int] = []
    groups = []
    for position, asked in one.entries:
        kind, _, _, *choices = shape[position]
        group = _MAPS_ONLY
        if asked:
            name = names[position]
            denominator = _denominator(kind, tuple(choices), weighted, unlabelled)
            key = (denominator, name if name in apart or denominator == "discrepancy" else "")
            if key not in keys:
                keys.append(key)
            group = keys.index(key)
            groups.append(group)
        structure += (kind, group, *choices)
    if not groups:
        structure = [*_STAND_IN, *structure]
    positions = tuple(position for position, _ in one.entries)
    own = [TERMS[shape[k][0]] for k in positions if TERMS[shape[k][0]] is not TeacherCrossEntropy]
    ends = [0]
    for kind, *_ in shape:
        ends.append(ends[-1] + len(_NUMBERS[TERMS[kind]]))
    numbers = tuple(n for k in positions for n in range(ends[k], ends[k + 1]))
    return PassPlan(
        terms=positions,
        structure=tuple(structure),
        numbers=None if numbers == tuple(range(ends[-1])) else numbers,
        names=tuple(names[position] for position, asked in one.entries if asked),
        groups=tuple(groups),
        denominators=tuple(denominator for denominator, _ in keys),
        needs_teacher=any(TERMS[shape[k][0]].needs_teacher for k in positions),
        of_student=bool(own),
        compares=any(term.needs_teacher for term in own),
        weighted=any(denominator == "class_weight" for denominator, _ in keys),
        maps=mapped in positions,
    )


def _denominator(kind: int, choices: tuple[int, ...], weighted: bool, unlabelled: bool) -> str:
    """`Term.denominator` does not depend on numbers; where there are unlabelled pixels, "valid" of
    a term that counts them is "distilled"."""
    options = {
        option.name: option.metadata["choices"][choice]
        for option, choice in zip(_CHOICES[TERMS[kind]], choices, strict=True)
    }
    found = TERMS[kind](**options).denominator(weighted)
    counts_all = unlabelled and not TERMS[kind].needs_label
    return "distilled" if counts_all and found == "valid" else found
