"""The output of an inner module, as a feature map [B, D, h, w] for a loss."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .._checks import check_choice, check_count, check_integer

__all__ = ["LAYOUTS", "Feature", "FeatureTap", "Kept"]

LAYOUTS: Final = ("NCHW", "NHWC", "tokens")
_COMPILED: Final = "_orig_mod"  # where `torch.compile` keeps the module that it wraps


class Feature(NamedTuple):
    """A module by name, with the axes of its output; stands wherever such a name does."""

    name: str
    """Dotted name of the module, as in `model.named_modules()`."""
    layout: str = "NCHW"
    """Axes of its output: "NCHW" [B, D, h, w], "NHWC" [B, h, w, D] as in Swin of torchvision and
    timm, or "tokens" [B, skip + h * w, D] as in ViT."""
    grid: tuple[int, int] | None = None
    """(h, w) of "tokens": height and width of the images over the side of a patch."""
    skip: int = 0
    """Of "tokens", those before the patches: 1 with a class token, more with registers."""


class FeatureTap:
    """The output of one inner module, for forward passes inside the `with` block.

    The feature is what the module returned, also where a later operation overwrites it in place,
    as the ReLU of most convolutional blocks does. For that it is copied, and the copy is freed by
    `take` where nothing was overwritten.

    Args:
        model: the model, not its data-parallel wrapper; it and its parts may be compiled by
            `torch.compile`, if it has not run yet.
        name: dotted name of the module, as in `model.named_modules()`, without the `_orig_mod` of
            compiled modules; or a `Feature`. Its output is a feature map, or a sequence or mapping
            that holds one (the first counts).
        layout, grid, skip: axes of that output, see `Feature`; a permutation, never a copy.

    Raises:
        TypeError, ValueError: there is no such module (names near ones), or an option is wrong.
    """

    #: What to do with tokens where a map is expected.
    tokens_hint = '; for tokens [B, N, D] say layout="tokens", grid=(h, w)'

    def __init__(
        self,
        model: nn.Module,
        name: str | Feature,
        layout: str = "NCHW",
        grid: tuple[int, int] | None = None,
        skip: int = 0,
    ) -> None:
        if isinstance(name, Feature):
            name, layout, grid, skip = name
        modules: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            modules.setdefault(_without_compiled(path), module)  # the wrapper before the wrapped
        name = _without_compiled(name)
        if name not in modules:
            inner = getattr(model, _COMPILED, model)
            raise ValueError(
                f"feature: got {name!r}, {type(inner).__name__} has no such module; "
                f"near names: {', '.join(_near(name, list(modules)))}"
            )
        check_choice(layout, "layout", LAYOUTS)
        if (layout == "tokens") != (grid is not None):
            raise ValueError(
                f"grid: got {grid}, expected "
                + ("(h, w), the rows and columns of patches" if grid is None else "None")
                + f" for layout={layout!r}"
            )
        self.name, self.layout, self.skip = name, layout, check_integer(skip, "skip")
        self.grid = None if grid is None else tuple(check_count(side, "grid") for side in grid)
        self.module = modules[name]
        self._kept: Kept | None = None
        self._lost_graph = False
        self._listens = False
        # A compiled graph knows only the hooks that were there when it was made.
        self._stays = _in_compiled(model, self.module)
        if self._stays:
            self.module.register_forward_hook(self._keep)

    @contextlib.contextmanager
    def listening(self) -> Iterator[FeatureTap]:
        """Neither the hook nor the feature, with its whole graph, outlives the block. (In a
        compiled model the hook stays, and keeps nothing outside of it.)"""
        hook = None if self._stays else self.module.register_forward_hook(self._keep)
        self._listens = True
        try:
            yield self
        finally:
            self._listens = False
            self._kept = None
            if hook is not None:
                hook.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._listens:
            return
        parts = [output]
        if isinstance(output, Mapping):
            parts = list(output.values())
        elif isinstance(output, (tuple, list)):
            parts = list(output)
        rank = 3 if self.layout == "tokens" else 4
        for part in parts:
            if isinstance(part, Tensor) and part.dim() == rank:
                self._kept = Kept.of(part)
                self._lost_graph = _in_reentrant_checkpoint()
                return
        came = ", ".join(
            str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__
            for part in parts
        )
        tokens = any(isinstance(part, Tensor) and part.dim() == 3 for part in parts)
        raise TypeError(
            f"feature: {self.name} gave {came or 'nothing'}; expected "
            + ("tokens [B, N, D]" if rank == 3 else f"a feature map {_AXES[self.layout]}")
            + (self.tokens_hint if tokens and rank == 4 else "")
        )

    def take(self) -> Tensor:
        """The feature of the last forward pass, [B, D, h, w].

        Raises:
            RuntimeError: the module did not run, or ran where its graph is lost.
            ValueError: the number of tokens is not that of the grid.
        """
        if self._kept is None:
            raise RuntimeError(
                f"feature: {self.name} did not run in the last forward pass"
                + ("; build the tap before the compiled model runs" if self._stays else "")
            )
        feature, self._kept = self._kept.value(), None
        if self._lost_graph and torch.is_grad_enabled():
            raise RuntimeError(
                f"feature: {self.name} ran inside torch.utils.checkpoint with use_reentrant=True, "
                "so the feature has no gradient; checkpoint with use_reentrant=False, or take the "
                "feature under torch.no_grad()"
            )
        if self.layout == "NHWC":
            return feature.permute(0, 3, 1, 2)
        if self.grid is None:
            return feature
        count, (height, width) = feature.shape[1], self.grid
        if count != self.skip + height * width:
            raise ValueError(
                f"feature: {self.name} gave {tuple(feature.shape)}, {count} tokens; expected "
                f"skip + h * w = {self.skip} + {height} * {width} = {self.skip + height * width}; "
                "grid is the images' size over that of a patch, skip counts class and register "
                "tokens"
            )
        patches: Tensor = feature[:, self.skip :].transpose(1, 2)
        return patches.unflatten(2, (height, width))  # type: ignore[no-any-return]


_AXES: Final = {"NCHW": "[B, D, h, w]", "NHWC": "[B, h, w, D]"}


class Kept(NamedTuple):
    """A feature and a copy of it, until it is known whether anything writes to the first."""

    copy: Tensor
    original: Tensor | None
    version: int

    @classmethod
    def of(cls, feature: Tensor) -> Kept:
        # A graph that is traced has no versions, and inference mode counts none.
        if torch.compiler.is_compiling() or feature.is_inference():
            return cls(feature.clone(), None, 0)
        return cls(feature.clone(), feature, feature._version)

    def value(self) -> Tensor:
        if self.original is not None and self.original._version == self.version:
            return self.original
        return self.copy


def _without_compiled(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != _COMPILED)


def _in_compiled(model: nn.Module, tapped: nn.Module) -> bool:
    """Whether a graph may have been made of the tapped module together with its hooks."""
    return any(
        hasattr(module, _COMPILED) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
        if (module is not tapped or not hasattr(module, _COMPILED))
        and any(inner is tapped for inner in module.modules())
    )


def _in_reentrant_checkpoint() -> bool:
    """Whether a segment runs whose graph is only made in backward."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    code = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _near(name: str, names: list[str]) -> list[str]:
    """Names alike, and what follows the part of the name that exists."""
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    parent = name.rpartition(".")[0]
    while parent and parent not in names:
        parent = parent.rpartition(".")[0]
    children = [n for n in names if n and n.rpartition(".")[0] == parent]
    return near + [n for n in children if n not in near][: 8 - len(near)]
