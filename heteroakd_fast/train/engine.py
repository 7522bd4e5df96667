"""The training loop of one stage: resumable, interruptible, and exact about both."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .._evaluate import count_pixels
from ..integrations.metrics import Scores
from .checkpoint import (
    NOT_WRITTEN,
    check_finite,
    load_checkpoint,
    non_finite,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from .config import Config, OptimConfig
from .datasets.batches import Normalizer, TrainingSet, training_batches
from .datasets.images import SegmentationData
from .distributed import ALONE, World
from .errors import CheckpointError, ConfigError, StoppedError, TrainingError, shortened
from .files import write_file
from .logs import Records, StageProgress, say
from .objectives import LossNormalizer, Objective, Teaching
from .parallel import Parallel, rehearsal
from .reading import as_toml
from .resuming import check_content, check_types
from .scoring import autocast, evaluate
from .visualization import Gallery

log = logging.getLogger("heteroakd_fast.train")

# Ctrl-C reaches a rank twice, from the terminal and from torchrun: within this many seconds it is
# one request.
_SAME_REQUEST = 2.0
_RANK_SEED = 1_000_003
# A scale of fp16 below this cannot be what makes gradients overflow.
_LEAST_SCALE = 1e-4


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """The device of this rank: "cuda" means a GPU of its own."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and world.size > 1:
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("its tensors hold no values")
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
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


def optimizer_entry(config: OptimConfig) -> dict[str, Tensor]:
    """What the optimiser keeps of a parameter of the shape [3, 2] from its first step on."""
    probe = nn.Linear(2, 3, bias=False)
    optimizer = make_optimizer(probe, config)
    probe.weight.grad = torch.zeros(3, 2)
    optimizer.step()
    return dict(optimizer.state[probe.weight])


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is appended to; a later one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    first = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if not received:
            received.append(number)
            first = time.monotonic()
        elif time.monotonic() - first > _SAME_REQUEST:
            raise KeyboardInterrupt

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


@dataclass(eq=False)
class Trainer:
    """Trains one objective for a number of steps in a folder of its own."""

    name: str
    objective: Objective
    _: KW_ONLY
    config: Config
    data: SegmentationData
    training: TrainingSet
    folder: Path
    steps: int
    fingerprint: dict[str, str]
    device: torch.device
    console: Console
    side: tuple[int, int]
    world: World = ALONE
    resume_anyway: bool = False

    def __post_init__(self) -> None:
        name, objective, config, device = self.name, self.objective, self.config, self.device
        self.normalize = Normalizer(config.data_of(name), device, config.scale.channels_last)
        self.gallery = Gallery(config, self.data, device, config.log.images, name)
        self.parallel = Parallel(
            objective, config.scale, world=self.world, device=device, side=self.side
        )
        optim = config.optim_of(name)
        self.lr = optim.lr
        self.optimizer = make_optimizer(self.parallel.module, optim)
        self._entry = optimizer_entry(optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        # Such as a mask of -inf among the buffers; what is trained has no excuse.
        trained = {name for name, p in objective.named_parameters() if p.requires_grad}
        self._never_finite: list[str] = []
        self._never_finite = sorted(non_finite(self._weights()) - trained)
        self.step = 0
        self.seconds = 0.0
        self.best_miou = -1.0
        self.scores: Scores | None = None
        # Terms of the steps since the last log line: on the device, so that a GPU is not made to
        # wait at every step; in the checkpoint, so that a resumed run logs the same averages.
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._diagnostics: dict[str, Tensor] = {}

    def run(self) -> StageResult:
        """Train from the newest checkpoint (or from the start) to the end."""
        # Ranks draw different dropout masks for their different images.
        torch.manual_seed(self.config.seed + self.world.rank * _RANK_SEED)
        self._resume()
        if self.scores is None or self.step < self.steps:
            self._train()
        self.parallel.close()
        assert self.scores is not None
        return StageResult(self.scores, self.best_miou, self.seconds, self.step)

    # -- state ---------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Any]:
        return {
            "model": self.objective.model.state_dict(),
            "loss": self.objective.loss.state_dict(),
            "never_finite": self._never_finite,
        }

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds; all ranks take part, rank 0 has the result."""
        rows = self._mean_rows()
        optimizer = self.parallel.optimizer_state(self.optimizer)
        return {
            "stage": self.name,
            "step": self.step,
            **self._weights(),
            "optimizer": optimizer,
            # Parameters that no loss reached have no state; of all others it must be there.
            "optimized": list(optimizer),
            "scaler": self.scaler.state_dict(),
            "random": self.world.gather(random_states()),
            "best_miou": self.best_miou,
            "scores": asdict(self.scores) if self.scores else None,
            "seconds": self.seconds,
            "names": self._names,
            "rows": rows,
            "fingerprint": self.fingerprint,
        }

    def _resume(self) -> None:
        state = self.world.on_main(lambda: load_checkpoint(self.folder))
        if state is None:
            return
        check_types(self.folder, state, self.name)
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
            if state["step"] > self.steps:
                raise ConfigError(
                    f"{message}\nIt is at step {state['step']} already, and {self.steps} are asked "
                    "for: take another --run folder, or more steps"
                )
            log.warning(message)
        like = {**self._weights(), "scaler": self.scaler.state_dict()}
        del like["never_finite"]
        if changed and not (state["scaler"] and like["scaler"]):
            del like["scaler"]  # fp16 was switched on or off
        check_content(
            self.folder,
            state,
            objective=self.objective,
            like=like,
            entry=self._entry,
            steps=None if changed else self.steps,
            classes=self.data.num_classes,
        )
        try:
            self.objective.model.load_state_dict(state["model"])
            self.objective.loss.load_state_dict(state["loss"])
            self.parallel.distribute()
            self.parallel.load_optimizer_state(self.optimizer, state["optimizer"])
        except Exception as error:  # whatever a model's own way of loading meets
            raise CheckpointError(
                f"{self.folder}: the checkpoint does not fit the model: {error}"
            ) from None
        if state["scaler"]:  # of a run without fp16 there is none to go on with
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best_miou = state["step"], state["best_miou"]
        self.seconds, self._names = state["seconds"], state["names"]
        if len(state["random"]) == self.world.size:
            rank = self.world.rank
            restore_random_states(state["random"][rank], f"{self.folder}: random.{rank}")
        else:
            log.warning(
                "%s: was trained on %d ranks so far, now on %d: dropout goes on with other masks",
                self.name,
                len(state["random"]),
                self.world.size,
            )
            torch.manual_seed(self.config.seed + self.world.rank * _RANK_SEED + self.step)
        # With other keys the terms may be others, and what was not the last step may be it now.
        if not changed:
            self._rows = [] if state["rows"] is None else list(state["rows"].to(self.device))
            self.scores = Scores(**state["scores"]) if state["scores"] else None
        if self.step < self.steps:
            say(self.console, f"{self.name}: going on at step {self.step}")

    # -- loop ----------------------------------------------------------------------------------

    def _train(self) -> None:
        optim, logging_ = self.config.optim, self.config.log
        records = Records(
            self.folder, self.step, tensorboard=logging_.tensorboard, enabled=self.world.main
        )
        batches = training_batches(
            self.training,
            self.config.data,
            start=self.step,
            stop=self.steps,
            rank=self.world.rank,
            world=self.world.size,
            accumulate=optim.accumulate,
        )
        began, before = time.monotonic(), self.seconds
        self.parallel.module.train()
        with (
            records,
            stop_requests() as stop,
            StageProgress(self.console, self.name, self.steps, self.step) as progress,
        ):
            if self.step == self.steps:
                self._evaluate(progress, records)
                self._save()
            while self.step < self.steps:
                asked = time.monotonic()
                micro_batches = list(islice(batches, optim.accumulate))
                progress.waited(time.monotonic() - asked)
                self._step(micro_batches)
                terms = None
                if self.step % logging_.every == 0 or self.step == self.steps:
                    terms = self._log(records, progress)
                elif self.device.type == "cpu" and self.world.size == 1:
                    self._check_finite()  # costs nothing where there is nobody to wait for
                evaluated = self.step % logging_.eval_every == 0 or self.step == self.steps
                self.seconds = before + time.monotonic() - began
                if evaluated:
                    self._evaluate(progress, records)
                # A signal may reach the ranks in different steps.
                stopped_by = self.world.largest(stop[0] if stop else 0)
                if evaluated or stopped_by or self.step % logging_.checkpoint_every == 0:
                    self._save()
                progress.advance(self.step, terms, optim.batch_size)
                if stopped_by:
                    raise StoppedError(
                        f"{self.name}: stopped by {signal.Signals(stopped_by).name} at step "
                        f"{self.step} of {self.steps}; the state is saved, "
                        "the same command goes on from there"
                    )

    def _step(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        rate = learning_rate(self.step, self.steps, self.lr, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        prepared = [
            (self.normalize(images), target.to(self.device, non_blocking=True))
            for images, target in micro_batches
        ]
        normalizer: LossNormalizer | None = None
        teachings: list[Teaching | None] = [None] * len(prepared)
        if len(prepared) > 1 and self.objective.knows_denominators:
            normalizer = self._valid_pixels([target for _, target in micro_batches])
        elif len(prepared) > 1:
            normalizer, teachings = self._rehearse(prepared)
        self.optimizer.zero_grad(set_to_none=True)
        log, step = self.config.log, self.step + 1
        looks = log.diagnostics and (step % log.every == 0 or step == self.steps)
        rows = []
        for index, (images, target) in enumerate(prepared):
            with self.parallel.reducing(last=index == len(prepared) - 1):
                with autocast(self.device, self.config.amp):
                    options = {"teaching": teachings[index], "normalizer": normalizer}
                    output = self.parallel.module(images, target, diagnostics=looks, **options)
                loss = output.loss / len(prepared) if len(prepared) > 1 else output.loss
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            terms = {"loss": output.loss.detach(), **output.terms}
            self._names = list(terms)
            rows.append(torch.stack([value.float() for value in terms.values()]))
        self._diagnostics = output.diagnostics or {}
        self._rows.append(torch.stack(rows).mean(0) if len(rows) > 1 else rows[0])
        self.step += 1
        self._update()

    def _update(self) -> None:
        """The optimiser's part of a step. A gradient that is not finite is never applied: with fp16
        the scaler skips the step and lowers its scale, otherwise the run stops.

        Raises:
            TrainingError: it is not finite; on every rank, for all know the norm of all.
        """
        self.scaler.unscale_(self.optimizer)
        norm = self.parallel.gradient_norm()
        finite = bool(norm.isfinite())
        if not (finite or self.scaler.is_enabled()):
            self._report_gradient(float(norm))
        # Clipped by a norm that is not finite, every gradient would be 0 or NaN.
        if finite and self.config.optim.grad_clip is not None:
            self.parallel.clip_gradients(self.config.optim.grad_clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not finite and self.scaler.get_scale() < _LEAST_SCALE:
            self._report_gradient(float(norm), ", whatever the scale of fp16")

    def _report_gradient(self, norm: float, more: str = "") -> NoReturn:
        self._check_finite()  # which explains it, where the loss is no better
        names = self.parallel.non_finite_gradients()
        rows = self._mean_rows()
        assert rows is not None
        raise TrainingError(
            f"{self.name}: the gradient of step {self.step} is not finite{more}: norm {norm:g}"
            + (f", in {shortened(names, 4)}" if names else "")
            + f" ({self._terms(rows[-1])}); {self._batch_of(self.step)}. "
            'No weight was changed by it; a lower optim.lr or amp = "off" may help'
        )

    def _terms(self, row: Tensor) -> str:
        return ", ".join(
            f"{name} {value:g}" for name, value in zip(self._names, row.tolist(), strict=True)
        )

    def _batch_of(self, step: int) -> str:
        """The images of the step that is counted as `step`, from 1."""
        return f"its batch: {shortened(self.training.names(step - 1))}"

    def _valid_pixels(self, targets: Sequence[Tensor]) -> LossNormalizer:
        """What every micro-batch is to be divided by, so that the mean of their losses is exactly
        the loss of the whole batch: the mean over ranks and micro-batches of what they count.

        Counted where the labels were read: a GPU is not waited for.
        """
        options = {
            "ignore_index": self.data.ignore_index,
            "unlabelled_index": self.config.distill.unlabelled_index,
        }
        counts = torch.stack([count_pixels(target, options) for target in targets])
        return self.objective.normalizer_of(self.world.mean(counts.mean(0)))

    def _rehearse(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[LossNormalizer, list[Teaching | None]]:
        """The same where a term divides by more than a count of pixels: every term's denominator,
        looked at first, at the price of another forward pass of the student (in training mode,
        without a trace of it). The teacher's answers are kept, if they are only logits.
        """
        own, teachings = [], []
        with (
            rehearsal(self.parallel.module, self.device),
            autocast(self.device, self.config.amp),
        ):
            for images, target in micro_batches:
                teaching = self.objective.teach(images)
                output = self.parallel.module(images, target, teaching=teaching)
                own.append(output.denominators)
                light = teaching is not None and teaching.features is None
                teachings.append(teaching if light else None)
        mean = {name: torch.stack([one[name] for one in own]).mean() for name in own[0]}
        return mean, teachings

    def _mean_rows(self) -> Tensor | None:
        """The terms of the steps since the last log line, over all ranks."""
        if not self._rows:
            return None
        return self.world.total(torch.stack(self._rows)) / self.world.size

    def _check_finite(self) -> None:
        """Stop at the first step whose loss was not finite, before anything of it is saved."""
        rows = self._mean_rows()
        if rows is None:
            return
        bad = ~rows[:, 0].isfinite()
        if bad.any():
            index = int(bad.nonzero()[0])
            step = self.step - len(rows) + index + 1
            raise TrainingError(
                f"{self.name}: the loss of step {step} is not finite "
                f"({self._terms(rows[index])}); {self._batch_of(step)}. "
                'A lower optim.lr, optim.grad_clip, or amp = "off" may help'
            )

    def _log(self, records: Records, progress: StageProgress) -> dict[str, float]:
        self._check_finite()
        rows = self._mean_rows()
        assert rows is not None
        self._rows.clear()
        terms = dict(zip(self._names, rows.mean(0).tolist(), strict=True))
        # Of rank 0, which writes them.
        seen = {name: value.tolist() for name, value in self._diagnostics.items()}
        records.line(
            {"kind": "train", "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
            | {**terms, **seen, "wait": round(progress.waiting, 3)}
            | {"seconds": round(self.seconds, 2)}
        )
        return terms

    def _evaluate(self, progress: StageProgress, records: Records) -> None:
        self._check_finite()
        self.parallel.collect()
        options: Any = {"config": self.config, "device": self.device, "world": self.world}
        scores = evaluate(self.objective.model, self.data, self.normalize, **options)
        per_class = zip(self.data.class_names, scores.class_iou, strict=True)
        own = {**asdict(scores), "class_iou": dict(per_class)}
        records.line({"kind": "val", "step": self.step, **own})
        self.scores = scores
        self.gallery.show(records, self.objective, self.step)
        progress.say(
            f"{self.name} step {self.step}: val mIoU {scores.miou:.4f}, "
            f"pixel accuracy {scores.pixel_accuracy:.4f}"
        )
        if scores.miou > self.best_miou:
            self.best_miou = scores.miou
            self.world.on_main(lambda: self._export("best.safetensors"))

    def _save(self) -> None:
        self._check_finite()
        self.parallel.collect()
        state = self._state()

        def write() -> None:
            if self.step == self.steps:
                # Before the checkpoint that declares the stage finished.
                self._export("model.safetensors")
            save_checkpoint(self.folder, state)

        self.world.on_main(write)
        self.parallel.release()

    def _export(self, file_name: str) -> None:
        path = self.folder / file_name
        check_finite(path, self._weights(), NOT_WRITTEN)
        # The format refuses memory that is shared (tied weights) or not dense (channels-last).
        weights = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self.objective.model.state_dict().items()
        }
        # For `load_student`; `format` as other writers of the format have it.
        data, used = self.data, self.config.data_of(self.name)
        lists: dict[str, Any] = {"class_names": data.class_names, "palette": data.palette}
        lists |= {"mean": used.mean, "std": used.std}
        metadata = {"format": "pt", "stage": self.name, "config": as_toml(self.config)}
        metadata |= {key: json.dumps(value) for key, value in lists.items()}
        write_file(path, serialize(weights, metadata))
