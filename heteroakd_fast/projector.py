"""The 1x1 projection of features into the aligned logits space (docs/method.md, section 1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PRECISIONS", "PROJECTORS", "Projection", "Projector", "project"]

PROJECTORS: Final = ("linear", "conv-bn-relu")
PRECISIONS: Final = ("ieee", "tf32x3", "tf32")


class Projection(NamedTuple):
    """Features and a 1x1 convolution over them, in the place of logits: z = W f + b.

    Losses take it as `student_logits` and `teacher_logits`. Where features and labels have one grid
    and the backend `triton` runs, one kernel projects and computes the terms, and the projected
    logits are never stored; elsewhere `project` comes first. The teacher's features never get a
    gradient, its weight and bias through `teacher_ce` alone.
    """

    features: Tensor
    """[B, D, h, w], float32, bfloat16, float16 or float64, any strides"""
    weight: Tensor
    """[C, D] or, as `torch.nn.Conv2d` keeps it, [C, D, 1, 1], the same dtypes"""
    bias: Tensor | None = None
    """[C]"""
    precision: str = "ieee"
    """How float32 is multiplied on tensor cores: "ieee" not at all, "tf32x3" in three passes that
    keep about 22 bits, "tf32" in one that keeps 11. Products of two 16-bit factors are exact in
    each of them; those of a 16-bit and a float32 factor take "tf32x3", which there loses nothing
    that float32 keeps, or "tf32" where that is asked."""


def project(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W f + b as [B, C, h, w], in float32 or wider whatever autocast says: what is rounded to 16
    bits here cannot be repaired by losses that compute in 32."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    if not torch.compiler.is_compiling() and features.is_inference():
        features = features.clone()  # a convolution saves its input, which inference forbids
    with _no_autocast(features.device.type):
        return F.conv2d(
            features.to(dtype),
            weight.flatten(1)[:, :, None, None].to(dtype),
            None if bias is None else bias.to(dtype),
        )


class Projector(nn.Module):
    """Z = ReLU?(BN?(W f + b)).

    Computed in float32 or wider whatever autocast says (`project`).

    Args:
        in_channels: D, channels of the feature.
        num_classes: C.
        kind: "linear" (convolution alone) or "conv-bn-relu" (the paper's).

    Shape:
        [B, D, h, w] -> [B, C, h, w], float32 (float64 for float64 input or weights).
    """

    def __init__(self, in_channels: int, num_classes: int, kind: str = "linear") -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, kernel_size=1)
        self.bn = nn.BatchNorm2d(num_classes) if kind == "conv-bn-relu" else None

    def forward(self, features: Tensor) -> Tensor:
        z = project(features, self.conv.weight, self.conv.bias)
        if self.bn is None:
            return z
        with _no_autocast(features.device.type):
            return self._normalise(z).relu()

    def _normalise(self, z: Tensor) -> Tensor:
        """The batch norm, in the dtype of `z` whatever its own parameters have."""
        assert self.bn is not None
        if self.bn.weight.dtype == z.dtype:
            normalised: Tensor = self.bn(z)
            return normalised
        state = {**dict(self.bn.named_parameters()), **dict(self.bn.named_buffers())}
        wide = {k: v.to(z.dtype) if v.is_floating_point() else v for k, v in state.items()}
        normalised = torch.func.functional_call(self.bn, wide, (z,))
        with torch.no_grad():
            for name, buffer in self.bn.named_buffers():
                buffer.copy_(wide[name])
        return normalised


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
