"""Feature taps: the output of an inner module, by its dotted name, through a forward hook."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError


class FeatureTap:
    """Gives the output of one module, for forward passes inside its `with` block."""

    def __init__(self, model: nn.Module, name: str) -> None:
        modules = dict(model.named_modules())
        modules.pop("", None)
        if name not in modules:
            raise ModelError(
                f"tap {name!r}: {type(model).__name__} has no such module; "
                f"{_hint(name, list(modules))}"
            )
        self.name = name
        self.module = modules[name]
        self._value: Tensor | None = None

    def __enter__(self) -> FeatureTap:
        self._hook = self.module.register_forward_hook(self._keep)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Neither the hook nor the feature (with its whole graph) may outlive the forward pass.
        self._hook.remove()
        self._value = None

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._value = _feature_map(output, self.name)

    def take(self) -> Tensor:
        """The feature of the last forward pass."""
        if self._value is None:
            raise ModelError(f"tap {self.name!r}: the module did not run in the last forward pass")
        value, self._value = self._value, None
        return value


def probe_channels(
    model: nn.Module, tap: FeatureTap, side: tuple[int, int], device: torch.device
) -> int:
    """Number of channels of the tapped feature, found by a dry run."""
    was_training = model.training
    model.eval()  # a dry run in training mode would change the running statistics of BatchNorm
    try:
        with torch.no_grad(), tap:
            model(torch.zeros(1, 3, *side, device=device))
            return int(tap.take().shape[1])
    finally:
        model.train(was_training)


def _feature_map(output: Any, name: str) -> Tensor:
    if isinstance(output, Mapping):
        candidates = list(output.values())
    elif isinstance(output, (tuple, list)):
        candidates = list(output)
    else:
        candidates = [output]
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.dim() == 4:
            return candidate
    came = ", ".join(
        str(tuple(c.shape)) if isinstance(c, Tensor) else type(c).__name__ for c in candidates
    )
    raise ModelError(
        f"tap {name!r}: the module gave {came or 'nothing'}; expected a feature map B x D x h x w"
    )


def _hint(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    # A tap on a part that exists but goes on wrongly: show what follows that part.
    parent = name.rpartition(".")[0]
    while parent and parent not in names:
        parent = parent.rpartition(".")[0]
    children = [n for n in names if n.rpartition(".")[0] == parent]
    near += [n for n in children if n not in near][: 8 - len(near)]
    return f"near names: {', '.join(near)}"
