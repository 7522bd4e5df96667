"""Networks and weights as people have them: what does not fit is refused before the first step."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from train_helpers import same_weights

from heteroakd_fast.train.config import ModelConfig
from heteroakd_fast.train.errors import ModelError
from heteroakd_fast.train.models import build_model

SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 1, 1],
    "decoder_hidden_size": 8,
}
State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "compiled, parallel": lambda state: prefixed("module._orig_mod.", state),
    "Lightning": lambda state: {"epoch": 3, "state_dict": prefixed("model.", state)},
    "Lightning, compiled": lambda state: {"state_dict": prefixed("net._orig_mod.", state)},
    "mmengine": lambda state: {"meta": {"epoch": 3}, "state_dict": state},
    "timm": lambda state: {
        "args": argparse.Namespace(lr=0.1),
        "state_dict": {key: value * 0 for key, value in state.items()},
        "state_dict_ema": prefixed("module.", state),
    },
    "ConvNeXt": lambda state: {"model": prefixed("x.", state), "model_ema": state},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("key", ["weights", "init"])
def test_weights_as_training_loops_save_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrapping: str, key: str
) -> None:
    caplog.set_level(logging.INFO)
    config = ModelConfig(arch="unet", steps=1)
    source = build_model(config, 3, seed=1).state_dict()
    torch.save(WRAPPINGS[wrapping](source), tmp_path / "w.pt")
    there = config.model_copy(update={key: tmp_path / "w.pt"})
    same_weights(build_model(there, 3, seed=2).state_dict(), source)
    assert ("_ema, " in caplog.text) == (wrapping in ("timm", "ConvNeXt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_half_precision_is_loaded_in_float32(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    config = ModelConfig(arch="segformer", kwargs=SEGFORMER, steps=1)
    source = build_model(config, 3, seed=1).to(dtype)
    if kind == "folder":
        source.save_pretrained(tmp_path)  # type: ignore[operator]
        path = tmp_path
    else:
        path = tmp_path / "w.safetensors"
        save_file(prefixed("_orig_mod.", source.state_dict()), path)
    model = build_model(config.model_copy(update={"weights": path}), 3, seed=2)
    same_weights(model.state_dict(), source.float().state_dict())


class Settings:
    """Whatever a training loop keeps beside its weights."""


def test_weights_that_would_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "settings": Settings()}, tmp_path / "w.pt")
    config = ModelConfig(arch="unet", steps=1, weights=tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"holds a .*Settings, .* save its state dict alone$"):
        build_model(config, 3, seed=0)
