"""Gradients and weights that are not finite: none is applied, none is saved, none is resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from train_helpers import write_config

from heteroakd_fast.train import engine, pipeline
from heteroakd_fast.train.checkpoint import NEWEST, PREVIOUS, load_checkpoint, save_checkpoint
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.data import SegmentationData, load_data, sample_index
from heteroakd_fast.train.engine import Trainer
from heteroakd_fast.train.errors import CheckpointError, TrainingError
from heteroakd_fast.train.models import UNet
from heteroakd_fast.train.objectives import PlainObjective
from heteroakd_fast.train.reading import load_config


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


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


@pytest.fixture
def data(config: Config) -> SegmentationData:
    return load_data(config.data, config.seed)


def trainer(
    config: Config, data: SegmentationData, folder: str = "one", model: nn.Module | None = None
) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        "alone",
        PlainObjective(model or Spoilt(), config.distill, 255),
        config=config,
        data=data,
        folder=config.run / folder,
        steps=config.student.steps,
        model_config=config.student,
        fingerprint=pipeline.fingerprint(config, "alone"),
        device=torch.device("cpu"),
        console=Console(quiet=True),
        side=(32, 32),
    )


def before_step(run: Trainer, step: int, action: Callable[[], None]) -> None:
    original = run._step

    def stepped(micro_batches: Any) -> None:
        if run.step + 1 == step:
            action()
        original(micro_batches)

    run._step = stepped  # type: ignore[method-assign]


def spoil(run: Trainer, entry: float | None) -> None:
    run.objective.model.entry = entry  # type: ignore[assignment]


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.objective.model.state_dict().items()}


def batch(config: Config, data: SegmentationData, step: int) -> list[str]:
    size = config.optim.batch_size
    indices = [
        sample_index(config.seed, step - 1, slot, size, len(data.train)) for slot in range(size)
    ]
    return [str(data.train.pairs[index][0]) for index in indices]  # type: ignore[attr-defined]


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
    optim = config.optim.model_copy(update={"grad_clip": clip, "accumulate": accumulate})
    config = config.model_copy(update={"optim": optim, "amp": amp})
    whole = trainer(config, data, "whole")
    whole.run()
    run, before = trainer(config, data), {}

    def spoilt() -> None:
        spoil(run, entry)
        before.update(weights(run))

    before_step(run, 8, spoilt)
    with pytest.raises(TrainingError) as caught:
        run.run()
    message = str(caught.value)
    assert "alone: the gradient of step 8 is not finite: norm " in message
    assert ("in model.classifier.weight (loss " in message) == (not math.isfinite(entry))
    assert ", ce " in message
    assert all(name in message for name in batch(config, data, 8))
    for name, parameter in run.objective.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not (config.run / "one" / "model.safetensors").exists()
    saved = load_checkpoint(config.run / "one")
    assert saved is not None
    assert saved["step"] == 4
    resumed = trainer(config, data)
    resumed.run()
    for name, value in weights(whole).items():
        assert torch.equal(value, resumed.objective.model.state_dict()[name]), name


def test_fp16_skips_what_overflows_and_goes_on(config: Config, data: SegmentationData) -> None:
    run = trainer(config.model_copy(update={"amp": "fp16"}), data)
    before: dict[str, Tensor] = {}
    before_step(run, 6, lambda: (spoil(run, math.inf), before.update(weights(run)))[0])

    def compare() -> None:
        spoil(run, None)
        for name, parameter in run.objective.model.named_parameters():
            assert torch.equal(parameter, before[name]), name

    before_step(run, 7, compare)
    scale = run.scaler.get_scale()
    assert run.run().steps == 10
    assert run.scaler.get_scale() == scale / 2
    exported = load_file(config.run / "one" / "model.safetensors")
    assert all(value.isfinite().all() for value in exported.values())
    assert not torch.equal(exported["classifier.weight"], before["classifier.weight"])


def test_fp16_that_skips_every_step_stops(config: Config, data: SegmentationData) -> None:
    run = trainer(config.model_copy(update={"amp": "fp16"}), data)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=10 * engine._LEAST_SCALE)
    before = weights(run)
    spoil(run, math.nan)
    with pytest.raises(TrainingError, match=r"of step 4 is not finite, whatever the scale .*fp16"):
        run.run()
    for name, parameter in run.objective.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("step", [8, 10], ids=["checkpoint", "end"])
def test_weights_that_are_not_finite_are_not_saved(
    config: Config, data: SegmentationData, step: int
) -> None:
    run = trainer(config, data)
    original = run._step

    def stepped(micro_batches: Any) -> None:
        original(micro_batches)
        if run.step == step:
            with torch.no_grad():
                run.objective.model.encoder[0][0][1].running_var[0] = math.inf  # type: ignore

    run._step = stepped  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"not finite in model\.encoder\.0\.0\.1\.running_va"):
        run.run()
    assert not (config.run / "one" / "model.safetensors").exists()
    saved = load_checkpoint(config.run / "one")
    assert saved is not None
    assert saved["step"] == {8: 4, 10: 8}[step]


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
    for name, value in weights(whole).items():
        assert torch.equal(value, again.objective.model.state_dict()[name]), name
    kept = sorted(path.name for path in folder.glob("*.ckpt*"))
    assert kept == [NEWEST, f"{NEWEST}.unusable", PREVIOUS]
