"""The loop: exact resume after a kill, interrupts, bad losses, mixed precision."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_helpers import (
    QUIET,
    after_step,
    before_step,
    changed,
    command,
    environment,
    exported,
    plain,
    same_weights,
    saved_step,
    weights_of,
    write_config,
)
from train_helpers import trainer as make_trainer

from heteroakd_fast.integrations.metrics import Scores
from heteroakd_fast.train import pipeline
from heteroakd_fast.train.checkpoint import NEWEST, PREVIOUS, load_checkpoint, save_checkpoint
from heteroakd_fast.train.config import STAGES, Config, OptimConfig
from heteroakd_fast.train.datasets.images import SegmentationData
from heteroakd_fast.train.engine import (
    StageResult,
    Trainer,
    choose_device,
    learning_rate,
    make_optimizer,
)
from heteroakd_fast.train.errors import CheckpointError, ConfigError, StoppedError, TrainingError
from heteroakd_fast.train.logs import Records
from heteroakd_fast.train.models import UNet


class Dropping(UNet):
    """Draws from the global random state at every step, as dropout does."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.2, self.training))


def trainer(config: Config, data: SegmentationData, folder: str = "one", **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = options.pop("model", None) or Dropping(3, width=4, levels=3)
    return make_trainer(config, data, plain(model, config), folder, **options)


def records(path: Path, drop: tuple[str, ...] = ("seconds", "wait")) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in drop} for line in lines]


class KilledError(Exception):
    """Stands for a kill at a given step."""


def kill() -> None:
    raise KilledError


def cut_after(run: Trainer, step: int) -> None:
    before_step(run, step + 1, kill)
    with pytest.raises(KilledError):
        run.run()


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("step", [2, 7])
def test_resumed_weights_are_identical(
    config: Config, data: SegmentationData, step: int, amp: str
) -> None:
    config = changed(config, amp=amp)

    def fresh(folder: str) -> Trainer:
        run = trainer(config, data, folder)
        # Its scale changes within the few steps of this test.
        run.scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16", growth_interval=4)
        return run

    whole = fresh("whole")
    result = whole.run()
    cut_after(fresh("cut"), step)
    resumed = fresh("cut")
    again = resumed.run()
    assert resumed.scaler.get_scale() == whole.scaler.get_scale()
    same_weights(resumed.objective.state_dict(), whole.objective.state_dict())
    assert again.scores == result.scores
    assert again.best_miou == result.best_miou
    logged = [records(config.run / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert logged[0] == logged[1]
    assert [line["step"] for line in logged[0] if line["kind"] == "train"] == [3, 6, 9, 10]
    assert [line["step"] for line in logged[0] if line["kind"] == "val"] == [8, 10]


def test_kill_minus_nine_and_resume(tmp_path: Path) -> None:
    """The whole command, killed again and again, ends with the very weights of a calm run."""
    calm = write_config(tmp_path, steps=24, run="calm")
    subprocess.run(command(calm), check=True, env=environment(), timeout=120, capture_output=True)
    killed = write_config(tmp_path, steps=24, run="killed")
    kills = 0
    for stage, step in (("teacher", 7), ("alone", 13), ("distilled", 4), ("distilled", 18)):
        process = subprocess.Popen(
            command(killed), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        log = tmp_path / "killed" / stage / "metrics.jsonl"
        limit = time.monotonic() + 60
        # Lines come every 3 steps, checkpoints every 4: the kill mostly lands between two.
        while process.poll() is None and time.monotonic() < limit:
            if log.exists() and f'"step": {step - step % 3},' in log.read_text():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3  # one may come too late on a fast machine
    done = subprocess.run(
        command(killed), env=environment(), timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        same_weights(*(exported(tmp_path / run, stage) for run in ("calm", "killed")))
        logs = [records(tmp_path / run / stage / "metrics.jsonl") for run in ("calm", "killed")]
        assert logs[0] == logs[1]
    # Both students began with the same weights, but did not end there.
    alone, distilled = (exported(tmp_path / "calm", stage) for stage in ("alone", "distilled"))
    assert not torch.equal(alone["classifier.weight"], distilled["classifier.weight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(
    config: Config, data: SegmentationData, number: signal.Signals
) -> None:
    run = trainer(config, data)
    after_step(run, 5, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(
        StoppedError, match=f"{number.name} at step 5 of 10.*same command"
    ) as caught:
        run.run()
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is before
    assert saved_step(config.run / "one") == 5


def test_not_finite_loss_is_reported_and_not_saved(config: Config, data: SegmentationData) -> None:
    run = trainer(config, data, model=UNet(3, width=4, levels=3))
    classifier: Any = run.objective.model.classifier
    before_step(run, 7, lambda: classifier.bias.data.fill_(float("nan")))
    with pytest.raises(TrainingError, match=r"loss of step 7 is not finite \(loss nan, ce nan\)"):
        run.run()
    saved = load_checkpoint(config.run / "one")
    assert saved is not None
    assert saved["step"] == 4
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_changed_configuration_is_refused(
    config: Config, data: SegmentationData, caplog: pytest.LogCaptureFixture
) -> None:
    cut_after(trainer(config, data), 5)
    other = changed(config, optim={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003 -> 0\.5\n.*--resume-anyway"):
        trainer(other, data).run()
    with caplog.at_level(logging.WARNING):
        result = trainer(other, data, resume_anyway=True).run()
    assert result.steps == 10
    assert "optim.lr" in caplog.text


@pytest.mark.parametrize("steps", [2, 4])
def test_fewer_steps_than_were_taken(config: Config, data: SegmentationData, steps: int) -> None:
    """The last checkpoint (step 4) is the end, or beyond it."""
    cut_after(trainer(config, data), 6)
    run = trainer(changed(config, student={"steps": steps}), data, resume_anyway=True)
    if steps == 2:
        with pytest.raises(ConfigError, match="at step 4 already, and 2 are asked for"):
            run.run()
        return
    assert run.run().steps == 4
    assert (config.run / "one" / "model.safetensors").is_file()


def test_going_on_anyway_with_other_terms_and_mixed_precision(
    config: Config, data: SegmentationData
) -> None:
    cut_after(trainer(config, data), 6)
    saved = load_checkpoint(config.run / "one")
    assert saved is not None
    assert saved["rows"] is not None
    saved |= {"rows": torch.ones(1, 5), "names": list("abcde")}
    save_checkpoint(config.run / "one", saved)
    assert trainer(changed(config, amp="fp16"), data, resume_anyway=True).run().steps == 10


@pytest.mark.parametrize("key", ["fingerprint", "random", "rows"])
def test_a_checkpoint_of_another_version(config: Config, data: SegmentationData, key: str) -> None:
    cut_after(trainer(config, data), 6)
    saved = load_checkpoint(config.run / "one")
    assert saved is not None
    del saved[key]
    save_checkpoint(config.run / "one", saved)
    with pytest.raises(CheckpointError, match=f"lacks {key}: written by another version"):
        trainer(config, data).run()


def test_what_does_not_change_the_result_may_change(config: Config) -> None:
    other = changed(config, run=Path("elsewhere"), threads=2, log={"every": 1})
    other = changed(other, data={"workers": 3, "check": False})
    distill = changed(config, distill={"kd_weight": 0.7})
    for stage in STAGES:
        assert pipeline.fingerprint(other, stage) == pipeline.fingerprint(config, stage)
    # The teacher need not be trained again for another distillation.
    for stage in ("teacher", "alone"):
        assert pipeline.fingerprint(distill, stage) == pipeline.fingerprint(config, stage)
    assert pipeline.fingerprint(distill, "distilled") != pipeline.fingerprint(config, "distilled")


def test_other_weights_under_the_same_name_are_noticed(config: Config, tmp_path: Path) -> None:
    seen = []
    for content in (b"first", b"second"):
        path = tmp_path / "teacher.safetensors"
        path.write_bytes(content)
        pipeline._content.cache_clear()
        other = changed(config, teacher={"weights": path})
        seen.append([pipeline.fingerprint(other, stage) for stage in STAGES])
    for stage, before, after in zip(STAGES, *seen, strict=True):
        assert (before == after) == (stage == "alone"), stage


def test_both_students_start_alike(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, dict[str, Tensor]] = {}

    class Recorder(Trainer):
        def run(self) -> StageResult:
            begun[self.name] = weights_of(self.objective.model)
            return StageResult(Scores(0.5, 0.5, (0.5,) * 3), 0.5, 1.0, self.steps)

    monkeypatch.setattr(pipeline, "Trainer", Recorder)
    pipeline.run(config, QUIET)
    assert list(begun) == list(STAGES)
    same_weights(begun["alone"], begun["distilled"])


def test_finished_stage_is_not_trained_again(config: Config, data: SegmentationData) -> None:
    result = trainer(config, data).run()
    again = trainer(config, data)
    again._step = None  # type: ignore[assignment, method-assign]
    assert again.run() == result


@pytest.mark.parametrize("damage", ["cut short", "a bit of a weight"])
def test_damaged_newest_checkpoint_costs_only_its_steps(
    config: Config, data: SegmentationData, damage: str
) -> None:
    whole = trainer(config, data, "whole")
    whole.run()
    cut_after(trainer(config, data, "cut"), 9)
    newest = config.run / "cut" / NEWEST
    assert (config.run / "cut" / PREVIOUS).exists()
    content = bytearray(newest.read_bytes())
    if damage == "cut short":
        del content[-100:]
    else:
        state = load_checkpoint(config.run / "cut")
        assert state is not None
        weight = max(state["model"].values(), key=torch.Tensor.numel)
        content[content.index(weight.numpy().tobytes()) + 2] ^= 1
    newest.write_bytes(content)
    resumed = trainer(config, data, "cut")
    resumed.run()
    same_weights(resumed.objective.state_dict(), whole.objective.state_dict())
    logs = [records(config.run / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_sgd_and_gradient_clipping(config: Config, data: SegmentationData) -> None:
    run = trainer(changed(config, optim={"name": "sgd", "grad_clip": 1e-9}), data)
    before = weights_of(run.objective.model)
    run.run()
    for key, value in run.objective.model.named_parameters():
        if value.dim() == 1:  # no decay there: only the clipped gradient can move it
            assert (value - before[key]).abs().max() < 1e-7


def test_schedule() -> None:
    optim = OptimConfig(warmup_steps=4, power=2.0)
    rates = [learning_rate(step, 12, 0.5, optim) for step in range(12)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[8] == pytest.approx(0.5 * (4 / 8) ** 2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0


def test_no_weight_decay_on_norms_and_biases() -> None:
    model = UNet(3, width=4)
    groups = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.dim() == 4 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_unknown_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'nonsense' cannot be used here"):
        choose_device("nonsense")


def test_metrics_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (3, 6, 9)]
    path.write_text("\n".join(lines) + '\n{"step": 1')  # the last one was being written
    with Records(tmp_path, 6, tensorboard=False) as records:
        records.line({"step": 7, "class_iou": {"a": float("nan"), "b": 1.0}})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 6, 7]
    assert json.loads(path.read_text().splitlines()[-1])["class_iou"] == {"a": None, "b": 1.0}


def test_metrics_that_are_damaged_or_cannot_be_written(tmp_path: Path) -> None:
    """Neither costs more than its own lines; a message says which file it was."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 3}\n\xff\xfe{"st\n' + b"[" * 100_000 + b"\n")
    with Records(tmp_path, 6, tensorboard=False) as records:
        pass
    assert path.read_bytes() == b'{"step": 3}\n'
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    records._file = io.FileIO("/dev/full", "a")
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"), records:
        records.line({"step": 1})


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = {"kind": "train", "step": 3, "loss": 0.5, "kd": float("nan"), "seconds": 1.0}
    with Records(tmp_path, 0, tensorboard=True) as records:
        records.line(line)
        records.line({"kind": "val", "step": 4, "miou": 0.25, "class_iou": {"a": 0.125}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "val iou/a", "val/miou"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]
    with Records(tmp_path / "silent", 0, tensorboard=True, enabled=False) as records:
        records.line(line)
    assert not (tmp_path / "silent").exists()
    with Records(tmp_path / "off", 0, tensorboard=False) as records:
        records.line(line)
    assert [path.name for path in (tmp_path / "off").iterdir()] == ["metrics.jsonl"]
