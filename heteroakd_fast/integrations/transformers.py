"""For Hugging Face transformers: a `Trainer` whose loss is the distillation loss.

trainer = DistillationTrainer(
    student, TrainingArguments("out", remove_unused_columns=False), train_dataset=data,
    teacher=teacher, loss=HeteroAKDLoss(19),
)
trainer.train()
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import DistillationOutput, HeteroAKDLoss
from ..checks import check_ignore_index
from .taps import Feature
from .teacher import FeatureTap, FrozenTeacher, check_features, logits_of, world

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"heteroakd_fast.integrations.transformers needs transformers and accelerate ({error}): "
        "pip install transformers accelerate"
    ) from error

__all__ = ["DistillationTrainer"]

_FILE = "distillation_loss.pt"


class _ZeroGradients(TrainerCallback):
    """The Trainer zeroes the gradients of its model, and knows no other parameters."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.loss.zero_grad()


class DistillationTrainer(Trainer):
    """Trains a `...ForSemanticSegmentation` from a frozen teacher.

    `labels` are kept from the model, so that it upsamples nothing and computes no loss of its own.
    With gradient accumulation, terms whose denominator is the number of valid pixels are exact
    means over all of them, over processes and accumulated batches alike; the others (`hetero` of
    "softmax-kl", a class-weighted `ce`, everything at `resolution="logits"`) are means of the
    batches' means. Terms are logged beside `loss`. Projectors, where the loss has them, are trained
    with the student's learning rate and kept in its checkpoints as `distillation_loss.pt`.

    Args:
        *args, **kwargs: of `transformers.Trainer`.
        teacher: model called on the same inputs, without gradients; or a `FrozenTeacher`.
        loss: the loss; its `ignore_index` says which labels are ignored (the Trainer itself
            knows -100 only).
        features: (module of the student, module of the teacher), dotted names of the feature
            maps for a loss with projectors; or `Feature`s, for maps with other axes.
        teacher_inputs: names of the inputs that the teacher gets.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and what was expected.
    """

    # Each batch's loss is a mean: the Trainer divides it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | FrozenTeacher,
        loss: HeteroAKDLoss,
        features: tuple[str | Feature, str | Feature] | None = None,
        teacher_inputs: Sequence[str] = ("pixel_values",),
        **kwargs: Any,
    ) -> None:
        student_feature, teacher_feature = check_features(loss, features)
        super().__init__(*args, **kwargs)
        # What older releases look at instead of `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = False
        if features is not None and self.args.n_gpu > 1:
            raise ValueError(
                f"features: {self.args.n_gpu} GPUs in one process (DataParallel) each see a part "
                "of them; start one process per GPU (torchrun, accelerate launch)"
            )
        self.distillation_loss = loss.to(self.args.device)
        self.teacher = (
            teacher
            if isinstance(teacher, FrozenTeacher)
            else FrozenTeacher(teacher, teacher_feature)
        )
        self.teacher_inputs = tuple(teacher_inputs)
        student: nn.Module = self.accelerator.unwrap_model(self.model)
        self._tap = None if student_feature is None else FeatureTap(student, student_feature)
        self._loss: nn.Module = self.distillation_loss
        self.add_callback(_ZeroGradients(self.distillation_loss))
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, or with `return_outputs` the loss and the student's outputs.

        Args:
            num_items_in_batch: valid pixels of all accumulated batches, of all processes if
                `average_tokens_across_devices`; None takes those of this batch.

        Raises:
            ValueError: there are no labels.
        """
        if inputs.get("labels") is None:
            raise ValueError(
                f"labels: not among the inputs ({', '.join(inputs)}); the loss needs them, and the "
                "Trainer drops what forward() does not name unless remove_unused_columns=False"
            )
        given = {name: value for name, value in inputs.items() if name != "labels"}
        self.distillation_loss.process_group = world("auto") if model.training else None
        with contextlib.nullcontext() if self._tap is None else self._tap.listening():
            outputs = model(**given)
            found = self.teacher(**{name: given[name] for name in self.teacher_inputs})
            if self._tap is not None:
                found["student_features"] = self._tap.take()
        output: DistillationOutput = self._loss(
            logits_of(outputs),
            inputs["labels"],
            normalizer=self._normalizer(num_items_in_batch) if model.training else None,
            **found,
        )
        if model.training:
            self._batches += 1
            for name, value in output.terms().items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        return (output.loss, outputs) if return_outputs else output.loss

    def _normalizer(self, items: Tensor | int | None) -> Tensor | float | None:
        """What a batch divides by, so that after the division by the number of accumulated
        batches, and data parallelism's by that of processes, all valid pixels count alike."""
        if items is None or self.distillation_loss.resolution == "logits":
            return None
        batches = getattr(self, "current_gradient_accumulation_steps", None)
        shares: int = batches or self.args.gradient_accumulation_steps
        if self.args.average_tokens_across_devices:
            shares *= self.accelerator.num_processes
        return items / shares

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The Trainer's, with a count of the pixels that this loss takes for valid."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        ignored = check_ignore_index(self.distillation_loss.ignore_index)
        if not batches or any(batch.get("labels") is None for batch in batches):
            return batches, None
        counts = [(batch["labels"] != ignored).sum().to(device) for batch in batches]
        count = torch.stack(counts).sum()
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return batches, count

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, and the projectors as one more group of it."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = [p for p in self.distillation_loss.parameters() if id(p) not in known]
        if own:
            optimizer.add_param_group({"params": own})
            if self.accelerator.num_processes > 1:
                # Wrapped as the model is: its gradients, too, are means over the processes.
                self._loss = self.accelerator.prepare_model(self.distillation_loss)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the terms' means since the last time, of this process."""
        if "loss" in logs:
            logs = {**logs, **{k: v.item() / self._batches for k, v in self._sums.items()}}
            self._sums, self._batches = {}, 0
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super().save_model(output_dir, *args, **kwargs)
        state = self.distillation_loss.state_dict()
        if state and self.args.should_save:
            torch.save(state, Path(output_dir or self.args.output_dir) / _FILE)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        if self.distillation_loss.state_dict():
            state = torch.load(Path(checkpoint) / _FILE, map_location="cpu", weights_only=True)
            self.distillation_loss.load_state_dict(state)
