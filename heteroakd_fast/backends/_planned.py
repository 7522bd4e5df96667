"""A backend whose place is laid out and whose loss kernels do not exist yet."""

from __future__ import annotations

from typing import NoReturn

import torch

from ..spec import LossSpec

__all__ = ["PlannedBackend"]


class PlannedBackend:
    """Known by name, so that asking for it gives the reason instead of a typo's error."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def devices(self) -> tuple[str, ...]:
        return ("cuda",)

    def unavailable(self) -> str:
        return self._reason

    def unsupported(self, spec: LossSpec) -> str:
        return self._reason

    def _refuse(self) -> NoReturn:
        raise NotImplementedError(f"backend {self.name!r}: {self._reason}")

    def forward(self, *args: object) -> NoReturn:
        self._refuse()

    def backward_reads_inputs(self, *args: object) -> bool:
        self._refuse()

    def saved_shapes(self, *args: object) -> list[tuple[tuple[int, ...], torch.dtype]]:
        self._refuse()

    def backward(self, *args: object) -> NoReturn:
        self._refuse()
