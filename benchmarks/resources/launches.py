"""Records the launches of a case on tensors that have shapes and strides but no memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .cases import CASES
from .loops import LoopCount


class Launch(NamedTuple):
    """One launch of a kernel, as the package asked for it."""

    function: Any
    """a triton.JITFunction"""
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        careful = " (careful)" if self.careful else ""
        return f"{self.function.__name__}{careful}"

    def values(self) -> dict[str, Any]:
        """Arguments by name; numbers and constants only."""
        bound = dict(zip(self.function.arg_names, self.arguments, strict=False))
        bound.update(self.keywords)
        return {k: v for k, v in bound.items() if isinstance(v, (bool, int, float))}

    def tensors(self) -> list[Tensor]:
        """Each tensor once, however often it stands among the arguments."""
        every = (*self.arguments, *self.keywords.values())
        return list({id(x): x for x in every if isinstance(x, Tensor)}.values())

    @property
    def bytes(self) -> int:
        """Every tensor read or written once."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    @property
    def warps(self) -> int:
        return int(self.keywords.get("num_warps", 4))

    @property
    def pixels_per_thread(self) -> float:
        """What a step of a thread covers: pixels, or elements of a plain kernel."""
        values = self.values()
        if "R" in values and "S" in values:
            return float(values["R"] * values["S"])
        block = values.get("BLOCK", 1) * values.get("BLOCK_C", 1)
        return max(1.0, float(block / (32 * self.warps)))

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def careful(self) -> bool:
        """The twin that is launched behind a kernel and works where logits are extreme."""
        return bool(self.keywords.get("CAREFUL"))

    @property
    def images(self) -> int:
        """The first axis of the grid counts the programs of all images."""
        values = self.values()
        return int(self.grid[0]) // int(values["blocks" if "blocks" in values else "programs"])

    @property
    def elements(self) -> float | None:
        """Pixels times classes of a pass, logits of a sum of gradients."""
        values = self.values()
        if "label_h" in values:
            pixels = values["label_h"] * values["label_w"]
        elif "height" in values:
            pixels = values["height"] * values["width"]
        else:
            return None
        return float(pixels * values["classes"] * self.images)

    def trips(self, loop: LoopCount) -> float | None:
        """The length of a `range(...)` over the arguments; None where it needs other numbers."""
        if not loop.iterable.startswith("range("):
            return None
        try:
            names = {"__builtins__": {}, "range": range}
            return float(len(eval(loop.iterable, names, self.values())))
        except (NameError, TypeError):
            return None


class _Gpu(Tensor):
    """A tensor without memory that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _GPU


_GPU: Final = torch.device("cuda", 0)
_META: Final = torch.device("meta")


class _PretendGpu(TorchFunctionMode):
    """Whatever torch is asked for is done without memory; a torch without CUDA will do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_without_memory, (args, dict(kwargs or {})))
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return tree_map(_on_gpu, func(*args, **kwargs))


def _without_memory(x: Any) -> Any:
    if isinstance(x, _Gpu):
        return x.as_subclass(Tensor)
    return _META if isinstance(x, torch.device) else x


def _on_gpu(x: Any) -> Any:
    return x.as_subclass(_Gpu) if type(x) is Tensor else x


@cache
def launches_of(case: str) -> tuple[Launch, ...]:
    """Runs a case without a GPU and keeps what it would have launched."""
    from triton.runtime.jit import KernelInterface

    found: list[Launch] = []

    def record(function: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            found.append(Launch(function, tuple(grid), arguments, keywords))

        return call

    with (
        mock.patch.object(KernelInterface, "__getitem__", record),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        _PretendGpu(),
    ):
        CASES[case][1]()
    return tuple(found)


def method_bytes(launches: Sequence[Launch]) -> int | None:
    """What any implementation moves: logits and labels read once, the gradient written once; None
    for launches of other kernels."""
    passes = [x for x in launches if x.function.__name__ == "distillation_pass"]
    if not passes:
        return None
    first = passes[0]
    names = dict(zip(first.function.arg_names, first.arguments, strict=False))
    moved = {id(names[x]): names[x] for x in ("student", "teacher", "target")}
    total = sum(x.numel() * x.element_size() for x in moved.values())
    if any(x.function.__name__ == "combine_gradients" or x.values().get("GRAD") for x in launches):
        total += names["student"].numel() * names["student"].element_size()
    return int(total)
