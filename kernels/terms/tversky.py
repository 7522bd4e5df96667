"""Tversky loss: `tversky` in reference.py, of the sums of dice.py.

value    C m^gamma, m = 1 / C sum over the classes that occur of
         (a FP + b FN) / (TP + a FP + b FN + s)
g_c      as in dice.py
divided by C
"""

from typing import Any

import torch

from .dice import (
    Known,
    Own,
    begin,
    first,
    other,
    overlap,
    pixel,
    rescale,
    start,
    tally,
    traits,
)

__all__ = [
    "Known",
    "Own",
    "begin",
    "first",
    "other",
    "pixel",
    "rescale",
    "settle",
    "start",
    "tally",
    "traits",
]


def settle(term: Any, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, numbers = overlap(sums, term.alpha, term.beta, term.smooth, False)
    mean = value.sum() / len(value)
    perfect = mean <= 0
    power = torch.where(perfect, 0, torch.where(perfect, 1, mean) ** (term.gamma - 1))
    return len(value) * mean * power, numbers * (term.gamma * power)
