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

from .. import DistillationOutput, HeteroAKDLoss, functional
from .._evaluate import Normalizer
from .metrics import ConfusionMatrix
from .resolution import low_resolution, unwrapped, warn_of_full_resolution
from .taps import Feature
from .teacher import FeatureTap, FrozenTeacher, check_features, freeze, logits_of, world

try:
    import accelerate  # noqa: F401  (without it, the Trainer fails later)
    from transformers import PreTrainedModel, Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"heteroakd_fast.integrations.transformers needs transformers and accelerate ({error}): "
        "pip install transformers accelerate"
    ) from error

__all__ = ["DistillationTrainer", "post_process_semantic_segmentation"]

_FILE = "distillation_loss.pt"
_WEIGHT = "pixel_weight"
# Inputs that the model does not get.
_OF_THE_LOSS = ("labels", _WEIGHT)


def post_process_semantic_segmentation(
    outputs: Any, target_sizes: Sequence[Sequence[int]] | Tensor | None = None
) -> list[Tensor]:
    """Return the class of every pixel, of each image at a size of its own.

    What the method of this name of transformers' image processors returns (up to ties; those
    upsample with `align_corners=False`), without the upsampled logits.

    Args:
        outputs: of a `...ForSemanticSegmentation`, or anything that `logits_of` takes.
        target_sizes: (height, width) of each image, a sequence or a tensor [B, 2]; None leaves the
            resolution of the logits.

    Returns:
        One [height, width] of each image, int64.

    Raises:
        TypeError, ValueError: the outputs have no logits, or not as many images as `target_sizes`.
    """
    logits = logits_of(outputs)
    if target_sizes is None:
        return [*functional.predict(logits, logits.shape[-2:], dtype=torch.int64)]
    sizes = target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes
    if len(sizes) != len(logits):
        raise ValueError(f"target_sizes: got {len(sizes)}, the logits have batch {len(logits)}")
    return [
        functional.predict(image[None], [*size], dtype=torch.int64)[0]
        for image, size in zip(logits, sizes, strict=True)
    ]


class _ZeroGradients(TrainerCallback):
    """The Trainer zeroes the gradients of its model, and knows no other parameters."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.loss.zero_grad()


class DistillationTrainer(Trainer):
    """Trains a `...ForSemanticSegmentation` from a frozen teacher.

    `labels` are kept from the model, so that it upsamples nothing and computes no loss of its own;
    in training UperNet and DPT leave out their own upsampling, too (`integrations.low_resolution`).
    With gradient accumulation, terms whose denominator is the number of labelled or of distilled
    pixels are exact means over all of them, over processes and accumulated batches alike; the
    others (`hetero` of "softmax-kl", a class-weighted `ce`, everything at `resolution="logits"`)
    are means of the batches' means. Terms are logged beside `loss`. Projectors, where the loss has
    them, are trained with the student's learning rate and kept in its checkpoints as
    `distillation_loss.pt`. An input `pixel_weight` [B, H, W] goes to the loss and not to the model.

    `evaluate` and, where there are labels, `predict` add every term, a mean over the images of the
    batches' means like `eval_loss`, and the student's mean IoU at the labels' size: `eval_ce`,
    `eval_kd`, `eval_miou`. Each may be `metric_for_best_model`; for a term less is better, whatever
    `greater_is_better` says. Predictions are the student's outputs.

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
        if self.args.label_names is None:
            # The Trainer takes what forward() names, drops the rest, and then evaluates no loss.
            self.label_names = ["labels"]
        metric = self.args.metric_for_best_model
        if metric is not None and hasattr(loss, f"{metric.rpartition('_')[-1]}_weight"):
            self.args.greater_is_better = False
        # What older releases look at instead of `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = False
        if features is not None and self.args.n_gpu > 1:
            raise ValueError(
                f"features: {self.args.n_gpu} GPUs in one process (DataParallel) each see a part "
                "of them; start one process per GPU (torchrun, accelerate launch)"
            )
        self.distillation_loss = loss.to(self.args.device)
        self.teacher = freeze(teacher, teacher_feature, loss)
        self.teacher_inputs = tuple(teacher_inputs)
        student: nn.Module = self.accelerator.unwrap_model(self.model)
        self._align_corners: bool = loss.align_corners
        warn_of_full_resolution(student, self._align_corners, "model")
        self._tap = None if student_feature is None else FeatureTap(student, student_feature)
        self._loss: nn.Module = self.distillation_loss
        self.add_callback(_ZeroGradients(self.distillation_loss))
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._evaluation: _Evaluation | None = None
        self._missing: list[str] = []

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
                `average_tokens_across_devices`; with the loss's `unlabelled_index` [2], labelled
                and distilled ones; None takes those of this batch.

        Raises:
            ValueError: there are no labels.
        """
        if inputs.get("labels") is None:
            raise ValueError(
                f"labels: not among the inputs ({', '.join(inputs)}); the loss needs them, and the "
                "Trainer drops what forward() does not name unless remove_unused_columns=False"
            )
        given = {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS}
        if lacking := [name for name in self.teacher_inputs if name not in given]:
            raise ValueError(
                f"teacher_inputs: {', '.join(lacking)} not among the inputs ({', '.join(given)})"
            )
        self.distillation_loss.process_group = world("auto") if model.training else None
        listening = contextlib.nullcontext() if self._tap is None else self._tap.listening()
        leave_out = self._low_resolution(model) if model.training else contextlib.nullcontext()
        with listening:
            with leave_out:
                outputs = model(**given)
            found = self.teacher(**{name: given[name] for name in self.teacher_inputs})
            if self._tap is not None:
                found["student_features"] = self._tap.take()
        logits, labels = logits_of(outputs), inputs["labels"]
        output: DistillationOutput = self._loss(
            logits,
            labels,
            pixel_weight=inputs.get(_WEIGHT),
            normalizer=self._normalizer(num_items_in_batch) if model.training else None,
            **found,
        )
        if model.training:
            self._batches += 1
            for name, value in output.terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        elif self._evaluation is not None:
            self._evaluation.add(output.terms, logits, labels, self._own_images(labels))
        return (output.loss, outputs) if return_outputs else output.loss

    def _low_resolution(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return low_resolution(model, align_corners=self._align_corners)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The Trainer's; where nobody takes the predictions, they are not upsampled."""
        leave_out = (
            self._low_resolution(model) if prediction_loss_only else contextlib.nullcontext()
        )
        if inputs.get("labels") is None:  # then the model gets the inputs as they are
            inputs = {name: value for name, value in inputs.items() if name != _WEIGHT}
        with leave_out:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, with the terms and the mean IoU among the metrics."""
        loss = self.distillation_loss
        self._evaluation = _Evaluation(
            ConfusionMatrix(
                loss.num_classes, loss.ignore_index, loss.unlabelled_index, self._align_corners
            )
        )
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            metrics = self._evaluation.metrics(self.accelerator)
        finally:
            self._evaluation = None
        for name, value in metrics.items():  # those of `compute_metrics` go first
            output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        return output

    def _own_images(self, labels: Tensor) -> int:
        """How many images of the batch count: the last one is filled up with copies, so that all
        processes have equally many, and the Trainer cuts those off after gathering."""
        if self.accelerator.num_processes == 1:
            return len(labels)
        rank = self.accelerator.process_index
        ranks = self.gather_function(torch.full((len(labels),), rank, device=labels.device))
        return int((ranks == rank).sum())

    def _normalizer(self, items: Tensor | int | None) -> Normalizer | None:
        """What a batch divides by, so that after the division by the number of accumulated
        batches, and data parallelism's by that of processes, all valid pixels count alike."""
        if items is None or self.distillation_loss.resolution == "logits":
            return None
        batches = getattr(self, "current_gradient_accumulation_steps", None)
        shares: int = batches or self.args.gradient_accumulation_steps
        if self.args.average_tokens_across_devices:
            shares *= self.accelerator.num_processes
        if self.distillation_loss.unlabelled_index is None:
            return items / shares
        return self.distillation_loss.normalizer_of(torch.as_tensor(items) / shares)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The Trainer's, with a count of the pixels that this loss takes for valid; with
        `unlabelled_index` of labelled and of distilled ones."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        loss = self.distillation_loss
        if not batches or any(batch.get("labels") is None for batch in batches):
            return batches, None
        counts = [
            loss.count_pixels(batch["labels"], batch.get(_WEIGHT)).to(device) for batch in batches
        ]
        count = torch.stack(counts).sum(0)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count[None]).sum(0)
        return batches, count[0] if loss.unlabelled_index is None else count

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
        self._complete(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._complete(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Keeps what was missing for `_complete`, instead of a warning."""
        self._missing = list(load_result.missing_keys)
        if not self._missing:
            super()._issue_warnings_after_load(load_result)

    def _complete(self, checkpoint: str) -> None:
        """Loads what the Trainer did not: weights under other names, and the projectors.

        `save_pretrained` writes the weights of some models (SegFormer) under the names that they
        once had. `from_pretrained` translates them; the Trainer takes them for unknown and goes on
        with what the model was built with.
        """
        missing, self._missing = self._missing, []
        if missing:
            student = unwrapped(self.model)
            if isinstance(student, PreTrainedModel):
                translated: Any = type(student).from_pretrained(
                    checkpoint, config=student.config, output_loading_info=True
                )
                missing = sorted(translated[1]["missing_keys"])
                student.load_state_dict(translated[0].state_dict())
            if missing:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise ValueError(
                    f"{checkpoint}: lacks {', '.join(missing[:3])}{more}, expected all weights of "
                    f"{type(student).__name__}"
                )
        if self.distillation_loss.state_dict():
            file = Path(checkpoint) / _FILE
            if not file.exists():
                raise FileNotFoundError(
                    f"{file}: no such file, expected the loss's projectors and class weights; the "
                    "checkpoint was not saved by a DistillationTrainer with such a loss"
                )
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.distillation_loss.load_state_dict(state)


class _Evaluation:
    """Terms and counts of an evaluation, of this process until `metrics`."""

    def __init__(self, matrix: ConfusionMatrix) -> None:
        self.matrix = matrix
        self.sums: dict[str, float] = {}
        self.images = 0

    def add(
        self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, own_images: int
    ) -> None:
        for name, value in zip(terms, torch.stack([*terms.values()]).tolist(), strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value * own_images
        self.images += own_images
        self.matrix.update(logits[:own_images], labels[:own_images])

    def metrics(self, accelerator: Any) -> dict[str, float]:
        """Over all processes; empty without labels."""
        if not self.sums:
            return {}
        sums = torch.tensor([*self.sums.values(), self.images], device=accelerator.device)
        *sums, images = accelerator.reduce(sums, "sum").tolist()
        counts = self.matrix.counts.to(accelerator.device)
        self.matrix.counts = accelerator.reduce(counts, "sum").cpu()
        means = {name: value / images for name, value in zip(self.sums, sums, strict=True)}
        return {**means, "miou": self.matrix.scores().miou}
