"""A whole training step of a distillation: what a faster loss is worth to a user.

    python -m benchmarks.steps JOB [--start N]     JOB: JSON of the arguments of `items`

Student forward, teacher forward, loss, backward, AdamW; the loss by each provider, everything else
the same. The models are real ones (a SegFormer taught by a ConvNeXt with an UperNet head), built by
configuration: time and memory do not depend on the weights, so none are fetched.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from heteroakd_fast.integrations import low_resolution

from .cases import Case
from .inputs import Inputs, make_inputs
from .memory import fresh_process, high_water
from .providers import EAGER, Forward, Provider, find
from .results import spread
from .stages import Details, Item, go_through
from .timing import elapsed_ms, first_line

__all__ = ["MODELS", "STEP_CASES", "StepCase", "items", "largest_batch", "measure"]

TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}
"""Relative, against eager in float32 at the same logits; eager itself upsamples in 16 bits."""
BUDGET: Final = {"cpu": 4 * 2**30, "cuda": 40 * 2**30}
"""Bytes that a step may take above models and optimizer."""
_SEED: Final = 0
_SPREAD: Final = 3.0
"""Standard deviation that the logits are scaled to: fresh models give nearly uniform ones, which
the evaluation-weighted loss divides by their (then tiny) divergence."""


@dataclass(frozen=True)
class StepCase:
    """One training step, before it is known who computes its loss."""

    name: str
    batch: int
    classes: int
    height: int
    width: int
    student: str
    teacher: str
    """Names in `MODELS`."""
    dtype: str = "float32"
    """Of the logits; 16 bits by the models' autocast"""

    @property
    def key(self) -> str:
        """Unique and stable: what tables call it."""
        size = f"B{self.batch} C{self.classes} {self.height}x{self.width}"
        return f"step | {self.teacher} -> {self.student} | {size} | {self.dtype}"

    @property
    def loss(self) -> Case:
        """What the loss sees of it: logits at stride 4."""
        size = (self.batch, self.classes, self.height, self.width)
        return Case("ce+hetero", self.name, *size, 4, 4, dtype=self.dtype)


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


_B0: Final[dict[str, Any]] = {"widths": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "head": 256}
_T: Final[dict[str, Any]] = {"widths": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
_TINY: Final[dict[str, Any]] = {"widths": [8, 16, 40, 64], "depths": [1, 1, 1, 1], "head": 16}
#: name -> classes -> model, whose logits are at stride 4
MODELS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "SegFormer-B0": partial(_segformer, **_B0),
    "SegFormer-tiny": partial(_segformer, **_TINY),
    "UperNet-ConvNeXt-T": partial(_convnext, **_T, head=512),
    # A narrower head than the published 512: on a CPU the teacher would be most of the step.
    "UperNet128-ConvNeXt-T": partial(_convnext, **_T, head=128),
    "UperNet-ConvNeXt-tiny": partial(_convnext, **_TINY),
}
#: suite -> its training step
STEP_CASES: Final[dict[str, StepCase]] = {
    "cpu": StepCase("ADE20K", 1, 150, 256, 256, "SegFormer-B0", "UperNet128-ConvNeXt-T"),
    "gpu": StepCase("ADE20K", 8, 150, 512, 512, "SegFormer-B0", "UperNet-ConvNeXt-T", "bfloat16"),
    "smoke": StepCase("smoke", 1, 5, 64, 64, "SegFormer-tiny", "UperNet-ConvNeXt-tiny"),
}


class Trainer:
    """A student, its optimizer, and one provider's loss."""

    def __init__(self, case: StepCase, provider: Provider, device: str) -> None:
        self.case = case
        self.provider = provider
        self.device = device
        generator = torch.Generator().manual_seed(_SEED)
        images = torch.randn(case.batch, 3, case.height, case.width, generator=generator)
        self.images = images.to(device)
        self.teacher = _model(case.teacher, case, _SEED + 1, self.images, train=False)
        self.student = _model(case.student, case, _SEED, self.images, train=True)
        # The recipe's learning rate: the losses' rounding must not be what the copies differ by.
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=6e-5, weight_decay=0.01)
        self.inputs = make_inputs(replace(case.loss, objective="ce", stride=32), device)
        self.loss: Forward = provider.build(case.loss, self.inputs)
        self.steps = 0

    def logits(self) -> tuple[Tensor, Tensor]:
        """[B, C, h, w] of the student and of the teacher."""
        # Dropout and stochastic depth must drop the same units whoever computes the loss.
        torch.manual_seed(_SEED + self.steps)
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.case.dtype != "float32":
            autocast = torch.autocast(self.device, getattr(torch, self.case.dtype))
        with autocast, low_resolution(self.teacher):
            student = self.student(self.images).logits
            with torch.no_grad():
                teacher = self.teacher(self.images).logits
        return student, teacher

    def loss_at(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar. Outside autocast: providers convert as they do in the loss's own tables."""
        self.inputs.student_logits, self.inputs.teacher_logits = student, teacher
        return self.loss()

    def step(self) -> Tensor:
        """One training step; the loss before it, a scalar tensor."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_at(*self.logits())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1
        self.inputs.student_logits = torch.empty(0)  # let the graph go
        return loss.detach()

    def loss_ms(self, student: Tensor, teacher: Tensor) -> float:
        """Milliseconds of the loss, forward and backward, at these logits."""
        leaf = student.clone().requires_grad_()
        self.inputs.student_logits, self.inputs.teacher_logits = leaf, teacher
        return sum(elapsed_ms(self.loss, self.inputs, self.device))


def _model(name: str, case: StepCase, seed: int, images: Tensor, train: bool) -> nn.Module:
    """A model from its seed alone, its classifier scaled to logits as spread as trained ones."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = MODELS[name](case.classes).to(images.device).train(train)
        # In the mode it will run in: a fresh batch norm gives other magnitudes in the other one.
        found = model(images[:1]).logits.float().std().item()
        for parameter in model.get_submodule("decode_head.classifier").parameters():
            parameter.mul_(_SPREAD / max(found, 1e-6))
    return model


def measure(
    case: StepCase, names: Sequence[str], device: str, rounds: int = 5, seconds: float = 60.0
) -> list[Details]:
    """Times of a step and of the loss within it, a row for each provider.

    The providers take turns in one process (A B A B), so that a machine that slows down slows all
    of them. Each has its own student and optimizer, equal at the start.

    Args:
        rounds: turns of every provider, at most.
        seconds: with compiling; a round that has begun is finished, and one is always made.

    Returns:
        Rows with `key`, `provider`, and either `cannot` (why there are no figures) or `step_ms`
        and `loss_ms` (medians), `step_p10_ms`, `step_p90_ms`, `loss_share` (of the step's time) and
        `relative_error` (of the loss).
    """
    deadline = time.monotonic() + seconds
    rows: dict[str, Details] = {name: {"key": case.key, "provider": name} for name in names}
    trainers: dict[str, Trainer] = {}
    logits: tuple[Tensor, Tensor] | None = None
    expected = 0.0
    for name, row in rows.items():
        try:
            if refusal := find()[name].cannot(case.loss, device):
                row["cannot"] = refusal
                continue
            trainer = Trainer(case, find()[name], device)
            if logits is None:
                student, teacher = trainer.logits()
                logits = student.detach(), teacher
                expected = _expected(case, logits)
            found = trainer.loss_at(logits[0].clone().requires_grad_(), logits[1]).item()
            row["relative_error"] = abs(found - expected) / max(abs(expected), 1e-12)
            # Not "above", so that NaN differs too.
            if not row["relative_error"] <= TOLERANCE[case.dtype]:
                row["cannot"] = f"differs ({found:.6g}, eager {expected:.6g})"
                continue
            trainer.step()  # compiles the backward, makes the optimizer's state
            trainer.loss_ms(*logits)  # a leaf may be a graph of its own
        except Exception as error:  # one provider's failure is its row's, not the table's
            row["cannot"] = first_line(error)
            continue
        trainers[name] = trainer
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for turn in range(max(rounds, 1)):
        if turn and time.monotonic() > deadline:
            break
        for name, trainer in trainers.items():
            assert logits is not None
            times[name].append((_step_ms(trainer), trainer.loss_ms(*logits)))
    for name, samples in times.items():
        step, loss = (spread(list(column)) for column in zip(*samples, strict=True))
        assert step is not None
        assert loss is not None
        rows[name].update(
            step_ms=step.median,
            step_p10_ms=step.low,
            step_p90_ms=step.high,
            loss_ms=loss.median,
            loss_share=loss.median / step.median,
        )
    return list(rows.values())


def _step_ms(trainer: Trainer) -> float:
    if trainer.device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.step().item()  # waits for a GPU
    if trainer.device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _expected(case: StepCase, logits: tuple[Tensor, Tensor]) -> float:
    """Eager's loss in float32 at these logits."""
    device = str(logits[0].device.type)
    labels = make_inputs(replace(case.loss, objective="ce", stride=32), device).target
    nothing = torch.empty(0)
    inputs = Inputs(labels, logits[0].float(), logits[1].float(), nothing, nothing)
    return find()[EAGER].build(replace(case.loss, dtype="float32"), inputs)().item()


def largest_batch(case: StepCase, name: str, device: str, budget: int) -> Details:
    """The largest batch whose step takes at most `budget` bytes above models and optimizer, by the
    line through the peaks of two batches: memory is linear in the batch.

    Returns:
        `key`, `provider`, `budget`, and `batch` (0: not even one fits) with `peaks`, bytes by the
        batches that were measured.

    Raises:
        RuntimeError: as `fresh_process`.
    """
    first, second = case.batch, 2 * case.batch
    peaks = {}
    for batch in (first, second):
        work = partial(_peak, replace(case, batch=batch), name, device, torch.get_num_threads())
        peaks[batch] = work() if device != "cpu" else fresh_process(work)
    of_one = max((peaks[second] - peaks[first]) / (second - first), 1.0)
    batch = max(0, int(first + (budget - peaks[first]) / of_one))
    return {"key": case.key, "provider": name, "budget": budget, "batch": batch, "peaks": peaks}


def _peak(case: StepCase, name: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    trainer = Trainer(case, find()[name], device)
    trainer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return high_water(trainer.step, device)


def items(suite: str, names: Sequence[str], device: str, deadline: float) -> list[Item]:
    """The times, which find {"rows": ...}, then each provider's largest batch, {"batch": ...}, none
    of which is begun after `deadline` (of `time.time()`)."""
    case = STEP_CASES[suite]

    def times() -> Details:
        seconds = 0.5 * (deadline - time.time())
        return {"rows": measure(case, names, device, seconds=seconds)}

    def batch(name: str) -> Details:
        if time.time() > deadline:
            return {"skipped": "the run's time was over"}
        return {"batch": largest_batch(case, name, device, BUDGET[device])}

    return [
        (case.key, times),
        *((f"largest batch, {name}", partial(batch, name)) for name in names),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps")
    parser.add_argument("job")
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args(arguments)
    go_through(items(**json.loads(options.job)), options.start)


if __name__ == "__main__":
    main()
