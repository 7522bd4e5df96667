"""Gradients and weights that are not finite: none is applied, none is saved, none is resumed."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_helpers import (
    after_step,
    before_step,
    changed,
    exported,
    plain,
    same_weights,
    saved_step,
    weights_of,
)
from train_helpers import trainer as make_trainer

from heteroakd_fast.train import engine
from heteroakd_fast.train.checkpoint import NEWEST, PREVIOUS, load_checkpoint, save_checkpoint
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets.batches import Order
from heteroakd_fast.train.datasets.images import SegmentationData
from heteroakd_fast.train.engine import Trainer
from heteroakd_fast.train.errors import CheckpointError, TrainingError
from heteroakd_fast.train.models import UNet


class Spoilt(UNet):
    """Its loss is finite, and one entry of one gradient is what the test says."""

    def __init__(self) -> None:
        super().__init__(3, width=4, levels=2)
        self.entry: float | None = None
        self.classifier.weight.register_hook(self._spoil)

    def _spoil(self, gradient: Tensor) -> Tensor:
        if self.entry is not None:
            gradient = gradient.clone()
            gradient.view(-1)[1] = self.entry
        return gradient


def trainer(
    config: Config, data: SegmentationData, folder: str = "one", model: nn.Module | None = None
) -> Trainer:
    torch.manual_seed(0)
    return make_trainer(config, data, plain(model or Spoilt(), config), folder)


def spoil(run: Trainer, entry: float | None) -> None:
    run.objective.model.entry = entry  # type: ignore[assignment]


def weights(run: Trainer) -> dict[str, Tensor]:
    return weights_of(run.objective.model)


def parameters(run: Trainer) -> dict[str, Tensor]:
    """Without running statistics, which a forward pass moves."""
    named = run.objective.model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named}


def batch(config: Config, data: SegmentationData, step: int) -> list[str]:
    order = Order(config.seed, config.optim.batch_size, len(data.train))
    return [data.train.name(index) for index in order.images(step - 1)]


@pytest.mark.parametrize(
    ("entry", "amp", "accumulate", "clip"),
    [
        (math.nan, "off", 1, None),
        (math.nan, "off", 1, 1.0),
        (math.inf, "off", 2, 1.0),
        (-math.inf, "bf16", 1, None),
        (3e38, "off", 1, 1.0),
    ],
    ids=["NaN", "NaN, clipped", "inf, accumulated, clipped", "-inf, bf16", "norm beyond float32"],
)
def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    config: Config,
    data: SegmentationData,
    entry: float,
    amp: str,
    accumulate: int,
    clip: float | None,
) -> None:
    """In a step that would write a checkpoint: the one before it is as it was, and is resumed."""
    config = changed(config, optim={"grad_clip": clip, "accumulate": accumulate}, amp=amp)
    whole = trainer(config, data, "whole")
    whole.run()
    run = trainer(config, data)
    before: dict[str, Tensor] = {}

    def spoilt() -> None:
        spoil(run, entry)
        before.update(parameters(run))

    before_step(run, 8, spoilt)
    with pytest.raises(TrainingError) as caught:
        run.run()
    message = str(caught.value)
    assert "alone: the gradient of step 8 is not finite: norm " in message
    assert ("in model.classifier.weight (loss " in message) == (not math.isfinite(entry))
    assert ", ce " in message
    assert all(name in message for name in batch(config, data, 8))
    same_weights(parameters(run), before)
    assert not (config.run / "one" / "model.safetensors").exists()
    assert saved_step(config.run / "one") == 4
    resumed = trainer(config, data)
    resumed.run()
    same_weights(weights(resumed), weights(whole))


def test_fp16_skips_what_overflows_and_goes_on(config: Config, data: SegmentationData) -> None:
    run = trainer(changed(config, amp="fp16"), data)
    before: dict[str, Tensor] = {}
    before_step(run, 6, lambda: (spoil(run, math.inf), before.update(parameters(run))))

    def compare() -> None:
        spoil(run, None)
        same_weights(parameters(run), before)

    before_step(run, 7, compare)
    scale = run.scaler.get_scale()
    assert run.run().steps == 10
    assert run.scaler.get_scale() == scale / 2
    written = exported(config.run, "one")
    assert all(value.isfinite().all() for value in written.values())
    assert not torch.equal(written["classifier.weight"], before["classifier.weight"])


def test_fp16_that_skips_every_step_stops(config: Config, data: SegmentationData) -> None:
    run = trainer(changed(config, amp="fp16"), data)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=10 * engine._LEAST_SCALE)
    before = parameters(run)
    spoil(run, math.nan)
    with pytest.raises(TrainingError, match=r"of step 4 is not finite, whatever the scale .*fp16"):
        run.run()
    same_weights(parameters(run), before)


@pytest.mark.parametrize("step", [8, 10], ids=["checkpoint", "end"])
def test_weights_that_are_not_finite_are_not_saved(
    config: Config, data: SegmentationData, step: int
) -> None:
    run = trainer(config, data)
    encoder: Any = run.objective.model.encoder
    after_step(run, step, lambda: encoder[0][0][1].running_var[0].fill_(math.inf))
    with pytest.raises(CheckpointError, match=r"not finite in model\.encoder\.0\.0\.1\.running_va"):
        run.run()
    assert not (config.run / "one" / "model.safetensors").exists()
    assert saved_step(config.run / "one") == {8: 4, 10: 8}[step]


def test_a_constant_that_is_not_finite_is_no_fault(config: Config, data: SegmentationData) -> None:
    """Attention keeps masks of -inf among its buffers."""
    runs = []
    for _ in range(2):
        model = Spoilt()
        model.register_buffer("mask", torch.full((2,), -math.inf))
        runs.append(trainer(config, data, model=model))
    assert runs[0].run() == runs[1].run()


def test_a_checkpoint_of_weights_that_are_not_finite_is_passed_over(
    config: Config, data: SegmentationData, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as earlier versions wrote. The good one is never replaced by it, at no time."""
    whole = trainer(config, data, "whole")
    whole.run()
    trainer(config, data).run()
    folder = config.run / "one"
    saved = load_checkpoint(folder)
    assert saved is not None
    saved["model"]["classifier.bias"][0] = math.nan
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .*model\.classifier\.bias.*not writt"):
        save_checkpoint(folder, saved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heteroakd_fast.train.checkpoint.check_finite", lambda *_: None)
        save_checkpoint(folder, saved)
        (folder / PREVIOUS).write_bytes((config.run / "whole" / PREVIOUS).read_bytes())
    resumed = trainer(config, data)
    resumed._save = lambda: None  # type: ignore[method-assign]  # killed before it saves
    with caplog.at_level(logging.WARNING):
        resumed.run()
    assert "going on from previous.ckpt, step 8" in caplog.text
    assert "model.classifier.bias" in caplog.text
    assert (folder / PREVIOUS).read_bytes() == (config.run / "whole" / PREVIOUS).read_bytes()
    assert not (folder / NEWEST).exists()
    again = trainer(config, data)
    again.run()
    same_weights(weights(again), weights(whole))
    kept = sorted(path.name for path in folder.glob("*.ckpt*"))
    assert kept == [NEWEST, f"{NEWEST}.unusable", PREVIOUS]
