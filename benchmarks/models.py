"""Real networks for a whole training step: what a faster loss is worth to a user.

They are built by configuration: time and memory do not depend on the weights, so none are fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from heteroakd_fast.integrations import low_resolution

from .cases import Case

__all__ = ["MODELS", "Logits", "make_models"]

#: Runs the networks: [B, C, h, w] of the student, with a graph, and of the teacher.
Logits = Callable[[], tuple[Tensor, Tensor]]
_SPREAD: Final = 3.0
"""Standard deviation that the logits are scaled to: fresh models give nearly uniform ones, which
the evaluation-weighted loss divides by their (then tiny) divergence."""


def _segformer(classes: int, widths: list[int], depths: list[int], head: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    options: dict[str, Any] = {"hidden_sizes": widths, "depths": depths}
    options |= {"decoder_hidden_size": head, "num_labels": classes}
    model: nn.Module = SegformerForSemanticSegmentation(SegformerConfig(**options))
    return model


def _convnext(classes: int, widths: list[int], depths: list[int], head: int) -> nn.Module:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages: dict[str, Any] = {"hidden_sizes": widths, "depths": depths}
    stages["out_features"] = [f"stage{i}" for i in (1, 2, 3, 4)]
    options: dict[str, Any] = {"hidden_size": head, "num_labels": classes}
    options |= {"backbone_config": ConvNextConfig(**stages), "use_auxiliary_head": False}
    model: nn.Module = UperNetForSemanticSegmentation(UperNetConfig(**options))
    return model


_TINY: Final[dict[str, Any]] = {"widths": [8, 16, 40, 64], "depths": [1, 1, 1, 1], "head": 16}
#: name -> classes -> model, whose logits are at stride 4
MODELS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "SegFormer-B0": partial(_segformer, widths=[32, 64, 160, 256], depths=[2, 2, 2, 2], head=256),
    # A narrower head than the published 512: on a CPU the teacher would be most of the step.
    "UperNet128-ConvNeXt-T": partial(
        _convnext, widths=[96, 192, 384, 768], depths=[3, 3, 9, 3], head=128
    ),
    "SegFormer-tiny": partial(_segformer, **_TINY),
    "UperNet-ConvNeXt-tiny": partial(_convnext, **_TINY),
}


def make_models(case: Case, device: str) -> tuple[Logits, list[Tensor]]:
    """What runs the networks of a case on its images, and the student's parameters; 16 bits by
    autocast. Equal whoever computes the loss."""
    assert case.target.models is not None
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.height, case.width)
    images = torch.randn(*shape, generator=generator).to(device)
    student, teacher = (_model(name, case.classes, images, train) for name, train
                        in zip(case.target.models, (True, False), strict=True))  # fmt: skip
    dtype = getattr(torch, case.dtype)

    def logits() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)  # dropout and stochastic depth drop the same units in each call
        autocast: AbstractContextManager[Any] = nullcontext()
        if dtype != torch.float32:
            autocast = torch.autocast(device, dtype)
        with autocast, low_resolution(teacher):
            z = student(images).logits
            with torch.no_grad():
                return z, teacher(images).logits

    return logits, list(student.parameters())


def _model(name: str, classes: int, images: Tensor, train: bool) -> nn.Module:
    """A model from a seed alone, its classifier scaled to logits as spread as trained ones."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(int(train))
        model = MODELS[name](classes).to(images.device).train(train)
        # In the mode it will run in: a fresh batch norm gives other magnitudes in the other one.
        found = model(images[:1]).logits.float().std().item()
        for parameter in model.get_submodule("decode_head.classifier").parameters():
            parameter.mul_(_SPREAD / max(found, 1e-6))
    return model
