"""The training loop of one stage: resumable, interruptible, and exact about both."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .checkpoint import load_checkpoint, random_states, restore_random_states, save_checkpoint
from .config import Config, ModelConfig, OptimConfig
from .data import Normalizer, SegmentationData, Source, evaluation_batches, training_batches
from .errors import CheckpointError, ConfigError, StoppedError, TrainingError
from .files import write_atomically
from .logs import MetricsFile, StageProgress, TensorBoard
from .metrics import ConfusionMatrix, Scores
from .models import logits_of
from .objectives import Objective

log = logging.getLogger("heteroakd_fast.train")

_TERMS = ("ce", "teacher_ce", "kd", "hetero", "feature", "projector", "cwd")
_EVALUATION_BATCH = 16


def choose_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return device


def learning_rate(step: int, steps: int, peak: float, config: OptimConfig) -> float:
    """Linear warm-up, then polynomial decay; a function of the step, so without a state to save."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    left = (steps - step) / max(1, steps - config.warmup_steps)
    return peak * float(left**config.power)


def optimizer_config(optim: OptimConfig, model: ModelConfig) -> OptimConfig:
    """What the network says of itself, on top of what holds for all."""
    own = {"name": model.optimizer, "lr": model.lr, "weight_decay": model.weight_decay}
    return optim.model_copy(update={key: value for key, value in own.items() if value is not None})


def make_optimizer(objective: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Weight decay on weight matrices and kernels only, as is usual."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Class ids at `size`."""
    logits = logits_of(model(images)).float()
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def evaluate(
    model: nn.Module,
    source: Source,
    data: SegmentationData,
    normalize: Normalizer,
    device: torch.device,
    amp: str,
) -> Scores:
    """Scores over a whole set, the pictures in full."""
    was_training = model.training
    model.eval()
    matrix = ConfusionMatrix(data.num_classes, data.ignore_index)
    with autocast(device, amp):
        for images, target in evaluation_batches(source, _EVALUATION_BATCH):
            height, width = target.shape[-2:]
            matrix.update(predict(model, normalize(images), (height, width)), target.to(device))
    model.train(was_training)
    return matrix.scores()


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is appended to; a second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class StageResult:
    """What a finished stage leaves behind (and its checkpoint keeps)."""

    scores: Scores
    best_miou: float
    seconds: float
    steps: int


class Trainer:
    """Trains one objective for a number of steps in a folder of its own."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        *,
        config: Config,
        data: SegmentationData,
        folder: Path,
        steps: int,
        model_config: ModelConfig,
        fingerprint: dict[str, str],
        device: torch.device,
        console: Console,
        resume_anyway: bool = False,
    ) -> None:
        self.name, self.objective, self.config, self.data = name, objective, config, data
        self.folder, self.steps = folder, steps
        self.fingerprint, self.resume_anyway = fingerprint, resume_anyway
        self.device, self.console = device, console
        self.normalize = Normalizer(config.data, device)
        optim = optimizer_config(config.optim, model_config)
        self.lr = optim.lr
        self.optimizer = make_optimizer(objective, optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.step = 0
        self.seconds = 0.0
        self.best_miou = -1.0
        self.scores: Scores | None = None
        # Terms of the steps since the last log line: on the device, so that a GPU is not made to
        # wait at every step; in the checkpoint, so that a resumed run logs the same averages.
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    def run(self) -> StageResult:
        """Train from the newest checkpoint (or from the start) to the end."""
        torch.manual_seed(self.config.seed)
        self._resume()
        if self.scores is None or self.step < self.steps:
            self._train()
        assert self.scores is not None
        return StageResult(self.scores, self.best_miou, self.seconds, self.step)

    # -- state ---------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "step": self.step,
            "model": self.objective.model.state_dict(),
            "loss": self.objective.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states(),
            "best_miou": self.best_miou,
            "scores": asdict(self.scores) if self.scores else None,
            "seconds": self.seconds,
            "names": self._names,
            "rows": torch.stack(self._rows).cpu() if self._rows else None,
            "fingerprint": self.fingerprint,
        }

    def _resume(self) -> None:
        state = load_checkpoint(self.folder)
        if state is None:
            return
        saved: dict[str, str] = state["fingerprint"]
        changed = [
            f"  {key}: {saved.get(key, 'absent')} -> {self.fingerprint.get(key, 'absent')}"
            for key in sorted(saved.keys() | self.fingerprint.keys())
            if saved.get(key) != self.fingerprint.get(key)
        ]
        if changed:
            message = f"{self.folder}: was begun with another configuration:\n" + "\n".join(changed)
            if not self.resume_anyway:
                raise ConfigError(
                    f"{message}\n"
                    "Take another --run folder, or go on all the same with --resume-anyway"
                )
            log.warning(message)
        try:
            self.objective.model.load_state_dict(state["model"])
            self.objective.loss.load_state_dict(state["loss"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: the checkpoint does not fit the model: {error}"
            ) from None
        self.scaler.load_state_dict(state["scaler"])
        restore_random_states(state["random"])
        self.step, self.best_miou, self.seconds = (
            state["step"],
            state["best_miou"],
            state["seconds"],
        )
        self._names = state["names"]
        self._rows = [] if state["rows"] is None else list(state["rows"].to(self.device))
        if state["scores"] is not None:
            scores = state["scores"]
            self.scores = Scores(
                scores["miou"], scores["pixel_accuracy"], tuple(scores["class_iou"])
            )
        if self.step < self.steps:
            self.console.print(f"{self.name}: going on at step {self.step}", highlight=False)

    # -- loop ----------------------------------------------------------------------------------

    def _train(self) -> None:
        optim, logging_ = self.config.optim, self.config.log
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.step)
        self.tensorboard = TensorBoard(self.folder / "tensorboard", self.step, logging_.tensorboard)
        batches = training_batches(
            self.data.train,
            self.config.data,
            seed=self.config.seed,
            batch_size=optim.batch_size,
            start=self.step,
            stop=self.steps,
        )
        began, before = time.monotonic(), self.seconds
        self.objective.train()
        try:
            with (
                stop_requests() as stop,
                StageProgress(self.console, self.name, self.steps, self.step) as progress,
            ):
                if self.steps == 0:
                    self._evaluate(progress)
                    self._save()
                for images, target in batches:
                    self._step(images, target)
                    terms = None
                    if self.step % logging_.every == 0 or self.step == self.steps:
                        terms = self._log(self.seconds)
                    elif self.device.type == "cpu":
                        self._check_finite()  # costs nothing where there is no device to wait for
                    evaluated = self.step % logging_.eval_every == 0 or self.step == self.steps
                    self.seconds = before + time.monotonic() - began
                    if evaluated:
                        self._evaluate(progress)
                    if evaluated or stop or self.step % logging_.checkpoint_every == 0:
                        self._save()
                    progress.advance(self.step, terms, optim.batch_size)
                    if stop:
                        raise StoppedError(
                            f"{self.name}: stopped by {signal.Signals(stop[0]).name} at step "
                            f"{self.step} of {self.steps}; the state is saved, "
                            "the same command goes on from there"
                        )
        finally:
            self.metrics.close()
            self.tensorboard.close()

    def _step(self, images: Tensor, target: Tensor) -> None:
        rate = learning_rate(self.step, self.steps, self.lr, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.device, self.config.amp):
            output = self.objective(
                self.normalize(images), target.to(self.device, non_blocking=True)
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.loss).backward()  # type: ignore[no-untyped-call]
        if self.config.optim.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        terms = {name: getattr(output, name) for name in _TERMS}
        self._names = ["loss", *(name for name, value in terms.items() if value is not None)]
        values = [output.loss.detach(), *(value for value in terms.values() if value is not None)]
        self._rows.append(torch.stack([value.float() for value in values]))
        self.step += 1

    def _check_finite(self) -> None:
        """Stop at the first step whose loss was not finite, before anything of it is saved."""
        if not self._rows:
            return
        rows = torch.stack(self._rows).cpu()
        bad = ~rows[:, 0].isfinite()
        if bad.any():
            index = int(bad.nonzero()[0])
            step = self.step - len(rows) + index + 1
            terms = ", ".join(
                f"{name} {value:g}"
                for name, value in zip(self._names, rows[index].tolist(), strict=True)
            )
            raise TrainingError(
                f"{self.name}: the loss of step {step} is not finite ({terms}); "
                'a lower optim.lr, optim.grad_clip, or amp = "off" may help'
            )

    def _log(self, seconds: float) -> dict[str, float]:
        self._check_finite()
        means = torch.stack(self._rows).mean(0).tolist()
        self._rows.clear()
        terms = dict(zip(self._names, means, strict=True))
        rate = self.optimizer.param_groups[0]["lr"]
        self.metrics.write(
            {"kind": "train", "step": self.step, "lr": rate, **terms, "seconds": round(seconds, 2)}
        )
        self.tensorboard.write(
            {f"train/{name}": value for name, value in terms.items()} | {"train/lr": rate},
            self.step,
        )
        return terms

    def _evaluate(self, progress: StageProgress) -> None:
        self._check_finite()
        self.scores = evaluate(
            self.objective.model,
            self.data.val,
            self.data,
            self.normalize,
            self.device,
            self.config.amp,
        )
        scores = self.scores
        per_class = dict(zip(self.data.class_names, scores.class_iou, strict=True))
        self.metrics.write(
            {
                "kind": "val",
                "step": self.step,
                "miou": scores.miou,
                "pixel_accuracy": scores.pixel_accuracy,
                "class_iou": per_class,
            }
        )
        self.tensorboard.write(
            {"val/miou": scores.miou, "val/pixel_accuracy": scores.pixel_accuracy}, self.step
        )
        progress.say(
            f"{self.name} step {self.step}: val mIoU {scores.miou:.4f}, "
            f"pixel accuracy {scores.pixel_accuracy:.4f}"
        )
        if scores.miou > self.best_miou:
            self.best_miou = scores.miou
            self._export("best.safetensors")

    def _save(self) -> None:
        self._check_finite()
        if self.step == self.steps:
            self._export(
                "model.safetensors"
            )  # before the checkpoint that declares the stage finished
        save_checkpoint(self.folder, self._state())

    def _export(self, file_name: str) -> None:
        path = self.folder / file_name
        # clone: tied weights share memory, which the format refuses.
        weights = {
            key: value.detach().cpu().clone()
            for key, value in self.objective.model.state_dict().items()
        }
        try:
            write_atomically(path, (serialize(weights),))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
