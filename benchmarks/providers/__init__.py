"""Who computes a case: eager PyTorch, `torch.compile`, this package's backends, public peers.

A provider is checked for equal results before it is timed, and says "cannot" with the reason
where it cannot. Adding one: a class with the members of `Provider`, and its place in `find`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..cases import Case
from ..inputs import Inputs

__all__ = ["EAGER", "Forward", "Provider", "find"]

#: Computes the loss of its inputs, a scalar; `.backward()` of it fills the leaves.
Forward = Callable[[], Tensor]

#: The baseline of every ratio.
EAGER = "eager"


class Provider(Protocol):
    @property
    def name(self) -> str:
        """What tables call it; with the version, where it is not this package or PyTorch."""

    def cannot(self, case: Case, device: str) -> str | None:
        """Why this case cannot run on this device ("cpu" or "cuda"); None when it can."""

    def build(self, case: Case, inputs: Inputs) -> Forward:
        """The loss as a function of nothing; whatever it compiles, its first call may compile."""


def find() -> dict[str, Provider]:
    """Every provider by name, in the order of the tables."""
    from . import baselines, ours, peers

    return {
        one.name: one for one in (*baselines.providers(), *ours.providers(), *peers.providers())
    }
