"""Feature taps: those of the drop-ins, with errors as the command reports them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import integrations
from .errors import ModelError


class FeatureTap(integrations.FeatureTap):
    """As there; raises ModelError."""

    def __init__(self, model: nn.Module, name: str) -> None:
        with _as_model_error():
            super().__init__(model, name)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        with _as_model_error():
            super()._keep(module, inputs, output)

    def take(self) -> Tensor:
        with _as_model_error():
            return super().take()


@contextmanager
def _as_model_error() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(str(error)) from None


def probe_channels(
    model: nn.Module, tap: FeatureTap, side: tuple[int, int], device: torch.device
) -> int:
    """Number of channels of the tapped feature, found by a dry run."""
    was_training = model.training
    model.eval()  # a dry run in training mode would change the running statistics of BatchNorm
    try:
        with torch.no_grad(), tap.listening():
            model(torch.zeros(1, 3, *side, device=device))
            return int(tap.take().shape[1])
    finally:
        model.train(was_training)
