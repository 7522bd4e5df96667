"""A teacher that stays as it is, and what a loss wants to see of both models."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .resolution import low_resolution, warn_of_full_resolution
from .taps import Feature, FeatureTap

__all__ = ["FeatureTap", "FrozenTeacher", "logits_of"]


def logits_of(output: Any) -> Tensor:
    """The logits [B, C, h, w] in what a segmentation model returns.

    A tensor, an object or mapping with `logits` (transformers) or `out` (torchvision), or a
    sequence that begins with them.

    Raises:
        TypeError: it is none of these.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits", output.get("out"))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"logits: the model returned a {type(output).__name__}, expected a tensor, or an "
            "object or mapping with `logits` or `out`; pass logits= to say where they are"
        )
    return found


class FrozenTeacher:
    """A teacher in eval mode, without gradients, on the device of its input.

    No `nn.Module`, and so never a submodule: what holds it does not train it, save it, wrap it,
    initialise it again or put it in training mode.

    Args:
        module: the trained network; its parameters stop requiring gradients.
        feature: dotted name of the module whose output is `teacher_features`, or a `Feature`
            that says its axes too; None for none.
        logits: finds the logits in the network's output.
        align_corners: that of the loss. UperNet (False) and DPT (True) of transformers upsample
            their logits themselves; where the loss does the same, it gets them before that step
            (see `low_resolution`). Where it does not, a warning says so.
    """

    def __init__(
        self,
        module: nn.Module,
        feature: str | Feature | None = None,
        logits: Callable[[Any], Tensor] = logits_of,
        align_corners: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"teacher: got {type(module).__name__}, expected a torch.nn.Module")
        warn_of_full_resolution(module, align_corners, "teacher")
        self.module = module.eval().requires_grad_(False)
        self.tap = None if feature is None else FeatureTap(module, feature)
        self.logits = logits
        self.align_corners = align_corners

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`teacher_logits`, and `teacher_features` if asked for: keyword arguments of the loss."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self.to(value.device)
                break
        self.module.eval()  # somebody else may hold it too
        listening = contextlib.nullcontext() if self.tap is None else self.tap.listening()
        leave_out = low_resolution(self.module, align_corners=self.align_corners)
        with torch.no_grad(), listening, leave_out:
            found = {"teacher_logits": self.logits(self.module(*args, **kwargs))}
            if self.tap is not None:
                found["teacher_features"] = self.tap.take()
        return found

    def to(self, device: torch.device) -> None:
        """Moves it there, once."""
        parameter = next(self.module.parameters(), None)
        if parameter is not None and parameter.device != device:
            self.module.to(device)


def freeze(
    teacher: nn.Module | FrozenTeacher,
    feature: str | Feature | None,
    loss: Any,
    logits: Callable[[Any], Tensor] = logits_of,
) -> FrozenTeacher:
    """The teacher as `loss` takes it, from a network or from a `FrozenTeacher` of one."""
    align_corners = loss.align_corners
    if not isinstance(teacher, FrozenTeacher):
        return FrozenTeacher(teacher, feature, logits, align_corners)
    warn_of_full_resolution(teacher.module, align_corners, "teacher")
    frozen = copy.copy(teacher)  # the caller's may serve another loss, too
    frozen.tap = None if feature is None else FeatureTap(frozen.module, feature)
    frozen.align_corners = align_corners
    return frozen


def world(process_group: Any) -> Any:
    """ "auto" becomes the group of all ranks where there are several, otherwise None."""
    if process_group != "auto":
        return process_group
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def projects(loss: Any) -> bool:
    """Whether the loss wants features."""
    return getattr(loss, "student_projector", None) is not None


def check_features(loss: Any, features: Any) -> tuple[str | Feature | None, str | Feature | None]:
    """Names of the two tapped modules, as the loss needs them."""
    if projects(loss) != (features is not None):
        raise ValueError(
            f"features: got {features!r}, but the loss has "
            + (
                "projectors; expected (module of the student, module of the teacher)"
                if features is None
                else "no projectors; build it with student_channels and teacher_channels"
            )
        )
    if features is None:
        return (None, None)
    student, teacher = features
    return (student, teacher)
