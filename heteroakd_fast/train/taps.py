"""Feature taps: those of the drop-ins, with errors as the command reports them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .. import integrations
from .errors import ModelError
from .models import evaluating


@contextmanager
def _as_model_error() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(str(error)) from None


class FeatureTap(integrations.FeatureTap):
    """As there; "name:NHWC" is for a module that gives [B, h, w, D]. Raises ModelError."""

    tokens_hint = "; tokens have no grid here, tap a module behind them that gives a map"
    take = _as_model_error()(integrations.FeatureTap.take)
    _keep = _as_model_error()(integrations.FeatureTap._keep)

    @_as_model_error()
    def __init__(self, model: nn.Module, name: str) -> None:
        name, _, layout = name.partition(":")
        if layout == "tokens":
            raise ValueError(f"tap {name!r}{self.tokens_hint}")
        super().__init__(model, name, layout or "NCHW")


def probe_channels(
    model: nn.Module, tap: FeatureTap, side: tuple[int, int], device: torch.device
) -> int:
    """Number of channels of the tapped feature, found by a dry run on images of `side`.

    Raises:
        ModelError: the axes of the feature that have the images' shape are not the last two.
    """
    # A dry run in training mode would change the running statistics of batch norms.
    with torch.no_grad(), evaluating(model), tap.listening():
        model(torch.zeros(1, 3, *side, device=device))
        shape = tap.take().shape
    if _is_grid(shape[1:3], side) and not _is_grid(shape[2:], side):
        raise ModelError(
            f"tap {tap.name!r}: gave {tuple(shape)} for images of {side}, so its channels seem to "
            f'be the last axis; write "{tap.name}:NHWC"'
        )
    return int(shape[1])


def _is_grid(shape: tuple[int, ...], side: tuple[int, int]) -> bool:
    """Whether height and width are those of `side` over one stride, rounded in one direction."""
    return abs(shape[0] * side[1] - shape[1] * side[0]) < max(side)
