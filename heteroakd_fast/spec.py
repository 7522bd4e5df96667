"""What a loss call asks for, as one immutable value that every layer below `functional` reads.

Adding a term: one line in `TERMS`. Adding an option: one field in `LossSpec` and the same name
in the operator schema of `ops.py` (a test holds the two together).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

__all__ = [
    "EVALUATIONS",
    "KD_DIVERGENCES",
    "MIXES",
    "PRESETS",
    "TERMS",
    "WEIGHT_AXES",
    "LossSpec",
    "Term",
]


@dataclass(frozen=True)
class Term:
    """What a caller must bring for a term."""

    name: str
    needs_teacher: bool


TERMS: Final[dict[str, Term]] = {
    term.name: term
    for term in (
        Term("ce", needs_teacher=False),
        Term("teacher_ce", needs_teacher=True),
        Term("kd", needs_teacher=True),
        Term("hetero", needs_teacher=True),
        Term("feature", needs_teacher=True),
    )
}

PRESETS: Final = ("softmax-kl", "paper")
MIXES: Final = ("probs", "logits", "teacher")
EVALUATIONS: Final = ("discrepancy", "none")
WEIGHT_AXES: Final = ("class", "space")
KD_DIVERGENCES: Final = ("forward", "reverse", "js")


@dataclass(frozen=True)
class LossSpec:
    """One pass over the label grid: the terms to compute and how.

    Values are checked where they enter (`functional`); below that they are trusted. The label
    grid of a pass is the grid of its `target`: `resolution="logits"` is settled above, by
    resampling the labels, so no backend needs to know of it.
    """

    terms: tuple[str, ...]
    preset: str = "softmax-kl"
    mix: str = "probs"
    evaluation: str = "discrepancy"
    weight_axis: str = "class"
    kd_divergence: str = "forward"
    kd_beta: float = 0.5
    temperature: float = 1.0
    tau: float = 1.0
    ignore_index: int = 255
    align_corners: bool = False
    label_smoothing: float = 0.0
    maps: bool = False

    @property
    def weighs_space(self) -> bool:
        """Whether `hetero` divides by sums over whole images."""
        return self.weight_axis == "space" and self.evaluation == "discrepancy"

    def options(self) -> dict[str, Any]:
        """The fields by name, as the operators take them (lists, not tuples)."""
        options = {name: getattr(self, name) for name in _FIELDS}
        options["terms"] = list(self.terms)
        return options

    def structure(self) -> dict[str, Any]:
        """The options that decide which code can run; the numbers among them do not."""
        return {name: value for name, value in self.options().items() if name in _STRUCTURE}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> LossSpec:
        """The inverse of `options` (and of `structure`, with default numbers)."""
        return cls(**{**options, "terms": tuple(options["terms"])})


_FIELDS: Final = tuple(field.name for field in fields(LossSpec))
_STRUCTURE: Final = tuple(
    field.name for field in fields(LossSpec) if field.type in ("tuple[str, ...]", "str", "bool")
)
