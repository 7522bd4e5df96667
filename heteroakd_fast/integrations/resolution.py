"""Logits of transformers' UperNet and DPT before the upsampling at the end of their forward."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["low_resolution"]

#: Class of transformers -> modules whose output it upsamples last, and that step's align_corners.
#: All other `...ForSemanticSegmentation` return what their head gives.
_UPSAMPLED = {
    "UperNetForSemanticSegmentation": (("decode_head", "auxiliary_head"), False),
    "DPTForSemanticSegmentation": (("head.head.4",), True),
}


@contextlib.contextmanager
def low_resolution(*models: nn.Module, align_corners: bool = False) -> Iterator[None]:
    """Inside the block, UperNet and DPT of transformers return logits before their upsampling.

    Logits are [B, C, H / 4, W / 4] for UperNet, [B, C, H / 2, W / 2] for DPT, instead of
    [B, C, H, W]. Other models are left alone: their logits have the resolution of their head.

    Args:
        models: the networks, wrapped (DistributedDataParallel, `torch.compile`) or not.
        align_corners: that of the loss, which upsamples instead. A model that upsamples with the
            other value is left alone, so that its predictions stay its own: UperNet has False,
            DPT True.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            found = _upsampled(model)
            if found is not None and found[1] == align_corners:
                stack.enter_context(_LeaveOut(unwrapped(model), found[0]))
        yield


def warn_of_full_resolution(model: nn.Module, align_corners: bool, argument: str) -> None:
    """Warns where `low_resolution` leaves a model alone because of `align_corners`."""
    found = _upsampled(model)
    if found is not None and found[1] != align_corners:
        warnings.warn(
            f"{argument}: {type(unwrapped(model)).__name__} upsamples its logits with "
            f"align_corners={found[1]} and the loss has align_corners={align_corners}, so they "
            f"stay at full resolution; build the loss with align_corners={found[1]} to save "
            "their memory (in a loop of your own, give it to FrozenTeacher too)",
            stacklevel=3,
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside data-parallel wrappers and `torch.compile`."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _upsampled(model: nn.Module) -> tuple[list[nn.Module], bool] | None:
    inner = unwrapped(model)
    for base in type(inner).__mro__:
        if base.__module__.startswith("transformers.") and base.__name__ in _UPSAMPLED:
            names, align_corners = _UPSAMPLED[base.__name__]
            modules = []
            for name in names:
                with contextlib.suppress(AttributeError):  # not every model has an auxiliary head
                    modules.append(inner.get_submodule(name))
            return modules, align_corners
    return None


class _LeaveOut(TorchFunctionMode):
    """Makes `F.interpolate` of what one of the modules returned give its input, until the model's
    forward ends: the logits are the caller's to upsample then.

    A forward of our own in the place of the model's would undo what accelerate and others wrap
    around it.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        super().__init__()
        self.model, self.modules = model, modules
        self.logits: list[Tensor] = []

    def __enter__(self) -> _LeaveOut:
        self.hooks = [module.register_forward_hook(self._keep) for module in self.modules]
        self.hooks.append(self.model.register_forward_hook(self._forget, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()
        self.logits.clear()

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logits.append(output)

    def _forget(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.logits.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.interpolate and any(args[0] is logits for logits in self.logits):
            return args[0]
        return func(*args, **(kwargs or {}))
