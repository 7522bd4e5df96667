"""A whole training step of a distillation: what a faster loss is worth to a user.

Student forward, teacher forward, loss, backward, AdamW; the loss by each provider, everything else
the same. The models are real ones (a SegFormer taught by a ConvNeXt with an UperNet head), built by
configuration: time and memory do not depend on the weights, so none are fetched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from .cases import Case
from .inputs import Inputs, make_inputs
from .memory import fresh_process, high_water
from .providers import EAGER, Provider, find
from .results import spread

__all__ = [
    "MODELS",
    "STEP_CASES",
    "StepCase",
    "largest_batch",
    "measure_steps",
]

OBJECTIVE: Final = "ce+hetero"
TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}
"""Relative, against eager in float32 at the same logits; eager itself upsamples in 16 bits."""
_SEED = 0
_SPREAD = 3.0
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
    autocast: str = ""
    """dtype of the models' autocast, such as "bfloat16"; "" for float32 throughout"""

    @property
    def key(self) -> str:
        """Unique and stable: what two result files are compared by."""
        size = f"B{self.batch} C{self.classes} {self.height}x{self.width}"
        return f"step | {self.teacher} -> {self.student} | {size} | {self.autocast or 'float32'}"


class _Segformer(nn.Module):
    """Logits at stride 4."""

    def __init__(self, classes: int, **options: Any) -> None:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        super().__init__()
        config = SegformerConfig(**{"num_labels": classes, **options})
        self.model = SegformerForSemanticSegmentation(config)
        self.classifier: nn.Conv2d = self.model.decode_head.classifier

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, H/4, W/4]"""
        logits: Tensor = self.model(images).logits
        return logits


class _ConvNextUperNet(nn.Module):
    """Logits at stride 4: the library's own `forward` would upsample them, which is the loss's."""

    def __init__(self, classes: int, widths: list[int], depths: list[int], head: int) -> None:
        from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

        super().__init__()
        stages: dict[str, Any] = {
            "hidden_sizes": widths,
            "depths": depths,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }
        options: dict[str, Any] = {
            "backbone_config": ConvNextConfig(**stages),
            "num_labels": classes,
            "hidden_size": head,
            "use_auxiliary_head": False,
        }
        self.model = UperNetForSemanticSegmentation(UperNetConfig(**options))
        self.classifier: nn.Conv2d = self.model.decode_head.classifier

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, H/4, W/4]"""
        features = self.model.backbone(images).feature_maps
        logits: Tensor = self.model.decode_head(features)
        return logits


#: name -> classes -> model
MODELS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "SegFormer-B0": lambda classes: _Segformer(
        classes, hidden_sizes=[32, 64, 160, 256], depths=[2, 2, 2, 2], decoder_hidden_size=256
    ),
    "SegFormer-B2": lambda classes: _Segformer(
        classes, hidden_sizes=[64, 128, 320, 512], depths=[3, 4, 6, 3], decoder_hidden_size=768
    ),
    "SegFormer-tiny": lambda classes: _Segformer(
        classes,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "UperNet-ConvNeXt-T": lambda classes: _ConvNextUperNet(
        classes, widths=[96, 192, 384, 768], depths=[3, 3, 9, 3], head=512
    ),
    "UperNet128-ConvNeXt-T": lambda classes: _ConvNextUperNet(
        classes, widths=[96, 192, 384, 768], depths=[3, 3, 9, 3], head=128
    ),
    "UperNet-ConvNeXt-tiny": lambda classes: _ConvNextUperNet(
        classes, widths=[8, 8, 16, 16], depths=[1, 1, 1, 1], head=16
    ),
}

_ADE20K_CPU: Final = StepCase(
    "ADE20K", 1, 150, 256, 256, student="SegFormer-B0", teacher="UperNet128-ConvNeXt-T"
)
_ADE20K_GPU: Final = StepCase(
    "ADE20K", 8, 150, 512, 512, "SegFormer-B0", "UperNet-ConvNeXt-T", "bfloat16"
)
_SMOKE: Final = StepCase("smoke", 1, 5, 64, 64, "SegFormer-tiny", "UperNet-ConvNeXt-tiny")
STEP_CASES: Final[dict[str, list[StepCase]]] = {
    # A narrower head than the published 512: on a CPU the teacher would be most of the step.
    "cpu": [_ADE20K_CPU],
    "gpu": [_ADE20K_GPU],
    "full": [
        _ADE20K_CPU,
        replace(_ADE20K_CPU, batch=2, height=512, width=512, teacher="UperNet-ConvNeXt-T"),
        replace(_ADE20K_CPU, teacher="SegFormer-B2"),
        replace(_ADE20K_CPU, name="Cityscapes", classes=19, height=512, width=512),
    ],
    "smoke": [_SMOKE],
}


def _transformers_missing() -> str | None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return 'transformers is not installed (pip install "heteroakd_fast[bench]")'
    return None


class _Trainer:
    """A student, its optimizer, and one provider's loss; the teacher and the data are shared."""

    def __init__(
        self,
        case: StepCase,
        provider: Provider,
        device: str,
        images: Tensor,
        target: Tensor,
        teacher: nn.Module,
    ) -> None:
        self.case = case
        self.provider = provider
        self.device = torch.device(device)
        self.images = images
        self.teacher = teacher
        self.student = _model(case.student, case.classes, device, _SEED, images, train=True)
        # The recipe's learning rate: the losses' rounding must not be what the copies differ by.
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=6e-5, weight_decay=0.01)
        nothing = torch.empty(0, device=device)
        self.inputs = Inputs(target, nothing, nothing.clone(), nothing, nothing)
        self.loss: Callable[[], Tensor] | None = None
        self.steps = 0

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.case.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.case.autocast))

    def logits(self) -> tuple[Tensor, Tensor]:
        """[B, C, h, w] of the student, [B, C, h', w'] of the teacher."""
        # Dropout and stochastic depth must drop the same units whoever computes the loss.
        torch.manual_seed(_SEED + self.steps)
        with self._autocast():
            student = self.student(self.images)
            with torch.no_grad():
                teacher = self.teacher(self.images)
        return student, teacher

    def compute_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar. Outside autocast: providers convert as they do in the loss's own tables."""
        self.inputs.student_logits = student
        if self.loss is None:
            self.inputs.teacher_logits = teacher.detach()
            self.loss = self.provider.build(loss_case(self.case, student, teacher), self.inputs)
        else:
            # A provider may hold the teacher's tensor since `build`, and building anew would
            # compile anew; this makes that tensor the new one without a copy.
            self.inputs.teacher_logits.data = teacher
        return self.loss()

    def step(self) -> Tensor:
        """One training step; the loss before it, a scalar tensor."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compute_loss(*self.logits())
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.inputs.student_logits = self.inputs.student_features  # let the graph go
        return loss.detach()


def _model(
    name: str, classes: int, device: str, seed: int, images: Tensor, train: bool
) -> nn.Module:
    """A model from its seed alone, its classifier scaled to logits as spread as trained ones."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = MODELS[name](classes).to(device).train(train)
        # In the mode it will run in: a fresh batch norm gives other magnitudes in the other one.
        spread = model(images[:1]).float().std().item()
        for parameter in model.classifier.parameters():  # type: ignore[union-attr]
            parameter.mul_(_SPREAD / max(spread, 1e-6))
    return model


def loss_case(case: StepCase, student: Tensor, teacher: Tensor) -> Case:
    """What the loss sees of a step, in the words of the loss's own tables.

    Args:
        student: [B, C, h, w]
        teacher: [B, C, h', w']
    """
    return Case(
        objective=OBJECTIVE,
        dataset=case.name,
        batch=case.batch,
        classes=case.classes,
        height=case.height,
        width=case.width,
        stride=case.height // student.shape[2],
        teacher_stride=case.height // teacher.shape[2],
        dtype=str(student.dtype).removeprefix("torch."),
    )


def _batch(case: StepCase, device: str) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] images and [B, H, W] labels."""
    generator = torch.Generator().manual_seed(_SEED)
    images = torch.randn(case.batch, 3, case.height, case.width, generator=generator)
    # Of an objective without a teacher and at a coarse stride: only its labels are wanted.
    labels = make_inputs(
        Case("ce", case.name, case.batch, case.classes, case.height, case.width, 32, 32)
    ).target
    return images.to(device), labels.to(device)


def _trainers(case: StepCase, providers: Sequence[Provider], device: str) -> list[_Trainer]:
    images, target = _batch(case, device)
    teacher = _model(case.teacher, case.classes, device, _SEED + 1, images, train=False)
    return [_Trainer(case, one, device, images, target, teacher) for one in providers]


def _planned_case(case: StepCase) -> Case:
    """As `loss_case`, before there are logits: what `cannot` is asked about."""
    logits = torch.empty(
        case.batch, case.classes, -(-case.height // 4), -(-case.width // 4), device="meta"
    )
    logits = logits.to(getattr(torch, case.autocast or "float32"))
    return loss_case(case, logits, logits)


def _refusal(case: StepCase, provider: Provider | None, device: str) -> str | None:
    if provider is None:
        return "no such provider"
    return _transformers_missing() or provider.cannot(_planned_case(case), device)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _ms(work: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def measure_steps(
    cases: Sequence[StepCase],
    provider_names: Sequence[str],
    device: str,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Times of a step and of the loss within it, one row per case and provider.

    The providers take turns in one process (A B A B), so that a machine that slows down slows all
    of them. Each has its own student and optimizer, equal at the start.

    Args:
        rounds: turns of every provider, at most.
        seconds: of all cases together, building the models and compiling included; a round that
            has begun is finished, and one is always made.

    Returns:
        Rows with `key`, `provider`, the fields of the case, and either `cannot` (why there are no
        figures) or `step_ms`, `step_p10_ms`, `step_p90_ms`, `loss_forward_ms`,
        `loss_backward_ms`, `loss_ms`, `loss_share` (of the step's time), `loss` (the first
        step's), `relative_error` and `rounds`.
    """
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(cases):
        # What is left is shared by the cases that are left.
        share = (deadline - time.monotonic()) / (len(cases) - index)
        rows += _measure_case(case, provider_names, device, rounds, time.monotonic() + share)
    return rows


def _measure_case(
    case: StepCase, names: Sequence[str], device: str, rounds: int, deadline: float
) -> list[dict[str, Any]]:
    known = find()
    rows = {
        name: {"key": case.key, "provider": name, "device": device, **asdict(case)}
        for name in names
    }
    usable: list[Provider] = []
    for name in names:
        reason = _refusal(case, known.get(name), device)
        if reason is None:
            usable.append(known[name])
        else:
            rows[name]["cannot"] = reason
    if not usable:
        return list(rows.values())

    trainers: list[_Trainer] = []
    reference: float | None = None
    for trainer in _trainers(case, usable, device):
        row = rows[trainer.provider.name]
        try:
            student, teacher = trainer.logits()
            if reference is None:
                reference = _reference(trainer, student, teacher)
            found = trainer.compute_loss(student, teacher)
            row["loss"] = found.item()
            row["relative_error"] = abs(row["loss"] - reference) / max(abs(reference), 1e-12)
            # Not "above", so that NaN differs too.
            if not row["relative_error"] <= TOLERANCE[case.autocast or "float32"]:
                row["cannot"] = f"differs ({row['loss']:.6g}, eager {reference:.6g})"
                continue
            del student, teacher, found
            trainer.step()  # compiles the backward, makes the optimizer's state
        except Exception as error:  # one provider's failure is its row's, not the table's
            row["cannot"] = _first_line(error)
            continue
        trainers.append(trainer)
    if not trainers:
        return list(rows.values())

    steps: dict[str, list[float]] = {one.provider.name: [] for one in trainers}
    losses: dict[str, list[tuple[float, float]]] = {one.provider.name: [] for one in trainers}
    # The loss alone, at the logits of one model for all.
    student, teacher = (one.detach() for one in trainers[0].logits())
    for one in trainers:
        _time_loss(one, student, teacher, device)  # a leaf may be a graph of its own
    for turn in range(max(rounds, 1)):
        if turn and time.monotonic() > deadline:
            break
        for one in trainers:
            steps[one.provider.name].append(_ms(one.step, device))
        for one in trainers:
            losses[one.provider.name].append(_time_loss(one, student, teacher, device))
    for name, times in steps.items():
        step = spread(times)
        assert step is not None  # one round is always made
        forward, backward = (
            statistics.median(column) for column in zip(*losses[name], strict=True)
        )
        rows[name].update(
            step_ms=step.median,
            step_p10_ms=step.low,
            step_p90_ms=step.high,
            loss_forward_ms=forward,
            loss_backward_ms=backward,
            loss_ms=forward + backward,
            loss_share=(forward + backward) / step.median,
            rounds=len(times),
        )
    return list(rows.values())


def _reference(trainer: _Trainer, student: Tensor, teacher: Tensor) -> float:
    """Eager's loss in float32 at these logits."""
    student, teacher = student.detach().float(), teacher.detach().float()
    inputs = replace(trainer.inputs, student_logits=student, teacher_logits=teacher)
    with torch.no_grad():
        loss = find()[EAGER].build(loss_case(trainer.case, student, teacher), inputs)()
    return loss.item()


def _time_loss(
    trainer: _Trainer, student: Tensor, teacher: Tensor, device: str
) -> tuple[float, float]:
    """Milliseconds of the loss's forward and of its backward to the student's logits."""
    leaf = student.clone().requires_grad_()
    found: list[Tensor] = []
    forward = _ms(lambda: found.append(trainer.compute_loss(leaf, teacher)), device)
    backward = _ms(lambda: found[0].backward(), device)
    trainer.inputs.student_logits = trainer.inputs.student_features
    return forward, backward


def _ready(case: StepCase, provider_name: str, device: str) -> _Trainer:
    """A trainer whose warm-up is behind it and whose gradients are gone."""
    provider = find().get(provider_name)
    reason = _refusal(case, provider, device)
    if reason is not None or provider is None:
        raise RuntimeError(reason)
    (trainer,) = _trainers(case, [provider], device)
    trainer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return trainer


def _peak_on_cpu(case: StepCase, provider_name: str, threads: int) -> tuple[int, float]:
    """Bytes and seconds of a step; runs in a process of its own."""
    torch.set_num_threads(threads)
    trainer = _ready(case, provider_name, "cpu")
    start = time.perf_counter()
    peak = high_water(trainer.step)
    return peak, time.perf_counter() - start


def _cpu_peak_and_seconds(case: StepCase, provider_name: str) -> tuple[int, float]:
    peak, seconds = fresh_process(_peak_on_cpu, case, provider_name, torch.get_num_threads())
    return peak, seconds


def _peak_on_gpu(trainer: _Trainer) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def largest_batch(
    case: StepCase,
    provider_name: str,
    device: str,
    budget_bytes: int,
    *,
    seconds: float = 60.0,
) -> dict[str, Any]:
    """The largest batch whose step takes at most `budget_bytes` above models and optimizer.

    On a GPU, a search: doubling, then bisection, with the allocator held to the budget. On the
    CPU nothing can be held to a budget without being killed, so the peaks of two small batches
    predict the answer (memory is linear in the batch), and a step at that batch confirms or
    corrects it where time and memory allow.

    Args:
        seconds: on the CPU, what all measurements together may take; two are always made.

    Returns:
        `batch`; `how`, "measured" or "fit"; `points`, each with `batch` and the peak `bytes` of
        its step (None where it did not fit).

    Raises:
        RuntimeError: the provider cannot, or no batch fits.
    """
    if torch.device(device).type == "cpu":
        return _largest_batch_on_cpu(case, provider_name, budget_bytes, seconds)
    return _largest_batch_on_gpu(case, provider_name, device, budget_bytes)


def _largest_batch_on_cpu(
    case: StepCase, provider_name: str, budget: int, seconds: float
) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    peaks: dict[int, int] = {}
    seconds_of_image = 0.0  # of the whole measurement, less what every process costs
    slowest = 0.0

    def measured(batch: int) -> int:
        nonlocal seconds_of_image, slowest
        start = time.monotonic()
        peaks[batch], step = _cpu_peak_and_seconds(replace(case, batch=batch), provider_name)
        seconds_of_image = max(seconds_of_image, step / batch)
        slowest = max(slowest, time.monotonic() - start)
        return peaks[batch]

    for batch in (1, 2):
        measured(batch)
    for _ in range(3):
        batch = _fitted_batch(peaks, budget)
        if batch == 0:
            raise RuntimeError(f"batch 1 takes {peaks[1] / 2**20:.0f} MiB, more than the budget")
        if batch in peaks:
            break
        # The warm-up, the step, and the start of a process.
        cost = slowest + 3 * batch * seconds_of_image
        if time.monotonic() + cost > deadline or _available_bytes() < 1.5 * budget:
            break
        measured(batch)
    points = [{"batch": n, "bytes": peaks[n]} for n in sorted(peaks)]
    return {"batch": batch, "how": "measured" if batch in peaks else "fit", "points": points}


def _fitted_batch(peaks: dict[int, int], budget: int) -> int:
    """The largest batch within the budget by the least-squares line through what was measured.

    What was measured overrules the line: never above a batch that did not fit, nor below one
    that did.
    """
    mean_n = statistics.fmean(peaks)
    mean_bytes = statistics.fmean(peaks.values())
    spread = sum((n - mean_n) ** 2 for n in peaks)
    slope = sum((n - mean_n) * (size - mean_bytes) for n, size in peaks.items()) / spread
    fits = [n for n, size in peaks.items() if size <= budget]
    over = [n for n, size in peaks.items() if size > budget]
    line = int(mean_n + (budget - mean_bytes) / slope) if slope > 0 else max(peaks)
    return max([min([line, *(n - 1 for n in over)]), *fits, 0])


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _largest_batch_on_gpu(
    case: StepCase, provider_name: str, device: str, budget: int
) -> dict[str, Any]:
    total = torch.cuda.get_device_properties(device).total_memory
    points: dict[int, int | None] = {}

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            trainer = _ready(replace(case, batch=batch), provider_name, device)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            allowed = torch.cuda.memory_reserved() + budget
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
            points[batch] = _peak_on_gpu(trainer)
        except torch.cuda.OutOfMemoryError:
            points[batch] = None
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return points[batch] is not None

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    if low == 0:
        raise RuntimeError("batch 1 takes more than the budget")
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return {
        "batch": low,
        "how": "measured",
        "points": [{"batch": n, "bytes": points[n]} for n in sorted(points)],
    }
