"""The 1x1 projection of features into the aligned logits space (docs/method.md, section 1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PROJECTORS", "Projector"]

PROJECTORS = ("linear", "conv-bn-relu")


class Projector(nn.Module):
    """Z = ReLU?(BN?(W f + b)).

    Computed in float32 or wider whatever autocast says: a convolution that rounds its output to
    16 bits cannot be repaired by losses that compute in 32.

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
        weight = self.conv.weight
        dtype = torch.promote_types(
            torch.promote_types(features.dtype, weight.dtype), torch.float32
        )
        bias = self.conv.bias
        with _no_autocast(features.device.type):
            z = F.conv2d(
                features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            )
            return z if self.bn is None else self._normalise(z).relu()

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
