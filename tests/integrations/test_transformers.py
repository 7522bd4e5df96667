"""The Trainer of transformers gives what the plain loss gives, accumulated batches included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

transformers = pytest.importorskip("transformers", reason="needs it: pip install transformers")
pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")

from heteroakd_fast.integrations.transformers import DistillationTrainer  # noqa: E402

LR = 0.1


class InOrder(DistillationTrainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def dataset(count: int = 8, size: int = 16) -> list[dict[str, Tensor]]:
    images, target = tiny.data(count, size)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, target, strict=True)]


def arguments(folder: Path, **options: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **options})


def segformer(width: int) -> nn.Module:
    config = transformers.SegformerConfig(
        num_labels=tiny.CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[width] * 4,
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return transformers.SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
def test_train_is_the_plain_loop(tmp_path: Path, accumulate: int, features: bool) -> None:
    """Two steps of the Trainer; ignored pixels are spread unevenly over the batches."""
    (student, teacher), loss = tiny.models(), tiny.make_loss(features, hetero_weight=0.0)
    start = copy.deepcopy((student, loss))
    trainer = InOrder(
        student,
        arguments(tmp_path, gradient_accumulation_steps=accumulate),
        train_dataset=dataset(),
        teacher=teacher,
        loss=loss,
        features=tiny.FEATURES if features else None,
    )
    trainer.train()

    plain_student, plain_loss = copy.deepcopy(start)
    images, target = tiny.data()
    size = 2 * accumulate  # all that belongs to one step in one batch: no accumulation at all
    batches = [slice(step * size, (step + 1) * size) for step in range(2)]
    values = tiny.plain_steps(
        [*plain_student.parameters(), *plain_loss.parameters()],
        [
            lambda rows=rows: (
                tiny.plain_loss(plain_student, teacher, plain_loss, images[rows], target[rows]).loss
            )
            for rows in batches
        ],
        LR,
    )
    tiny.same_parameters(trainer.model, plain_student, start[0])
    if features:
        tiny.same_parameters(loss, plain_loss, start[1])
    logged = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(values, rel=1e-3)  # the Trainer rounds
    counts = {int((rows != 255).sum()) for rows in target.split(2)}
    assert len(counts) == 4, "the batches should differ, or the test proves nothing"


def test_denominators_of_their_own_are_averaged_over_batches(tmp_path: Path) -> None:
    """The default `hetero` divides by a sum of discrepancies: the mean of the batches' means."""
    (student, teacher), loss = tiny.models(), tiny.make_loss(ce_weight=0.0, kd_weight=0.0)
    start = copy.deepcopy(student)
    trainer = InOrder(
        student,
        arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1),
        train_dataset=dataset(4),
        teacher=teacher,
        loss=loss,
    )
    trainer.train()
    plain = copy.deepcopy(start)
    images, target = tiny.data(4)

    def both() -> Tensor:
        halves = (slice(0, 2), slice(2, 4))
        parts = [tiny.plain_loss(plain, teacher, loss, images[h], target[h]).loss for h in halves]
        return (parts[0] + parts[1]) / 2

    tiny.plain_steps(plain.parameters(), [both], LR)
    tiny.same_parameters(trainer.model, plain, start)


def test_segformer(tmp_path: Path) -> None:
    """A real model: labels are kept from it, the loss and its gradient are the plain ones."""
    torch.manual_seed(2)
    student, teacher = segformer(8), segformer(12)
    loss = tiny.make_loss()
    trainer = InOrder(
        student, arguments(tmp_path), train_dataset=dataset(4, 64), teacher=teacher, loss=loss
    )
    images, target = tiny.data(2, size=64)
    inputs = {"pixel_values": images, "labels": target}
    student.eval()  # the same running statistics for both calls
    got, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    assert set(inputs) == {"pixel_values", "labels"}
    assert outputs.loss is None
    parameters = [p for p in student.parameters() if p.requires_grad]
    grads = torch.autograd.grad(got, parameters)
    with torch.no_grad():
        taught = teacher(images).logits
    plain = tiny.make_loss()(student(images).logits, target, teacher_logits=taught).loss
    assert got == plain
    for one, two in zip(grads, torch.autograd.grad(plain, parameters), strict=True):
        assert torch.equal(one, two)
    trainer.train()  # and it trains
    assert trainer.state.global_step == 2
    assert {"loss", "ce", "kd", "hetero"} <= set(trainer.state.log_history[0])


def test_evaluation(tmp_path: Path) -> None:
    (student, teacher), loss = tiny.models(), tiny.make_loss()
    trainer = DistillationTrainer(
        student, arguments(tmp_path), eval_dataset=dataset(), teacher=teacher, loss=loss
    )
    images, target = tiny.data()
    with torch.no_grad():
        halves = [
            tiny.plain_loss(student, teacher, loss, images[rows], target[rows]).loss
            for rows in (slice(0, 4), slice(4, 8))
        ]
    expected = float(sum(halves)) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = trainer.predict(dataset())
    assert predicted.predictions.shape == (8, tiny.CLASSES, 4, 4)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("resolution", ["label", "logits"])
def test_count_of_pixels(tmp_path: Path, resolution: str) -> None:
    student, teacher = tiny.models()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, gradient_accumulation_steps=4),
        teacher=teacher,
        loss=tiny.make_loss(resolution=resolution),
    )
    _, target = tiny.data(4)
    batches, count = trainer.get_batch_samples(iter([{"labels": target}]), 4, torch.device("cpu"))
    assert len(batches) == 1
    assert count == (target != 255).sum()
    trainer.current_gradient_accumulation_steps = len(batches)
    # at the logits' resolution other pixels count, which the Trainer has not seen
    assert trainer._normalizer(count) == (count if resolution == "label" else None)


def test_projectors_are_saved_and_resumed(tmp_path: Path) -> None:
    def trained(folder: Path, resume: str | None, **options: Any) -> tuple[nn.Module, nn.Module]:
        (student, teacher), loss = tiny.models(), tiny.make_loss(features=True)
        settings = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", **options}
        trainer = InOrder(
            student,
            arguments(folder, **settings),
            train_dataset=dataset(),
            teacher=teacher,
            loss=loss,
            features=tiny.FEATURES,
        )
        trainer.train(resume_from_checkpoint=resume)
        return student, loss

    whole = trained(tmp_path / "whole", None)
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-1"))
    started = (tiny.models()[0], tiny.make_loss(features=True))
    for one, two, start in zip(resumed, whole, started, strict=True):
        tiny.same_parameters(one, two, start)
    saved = torch.load(tmp_path / "whole" / "checkpoint-1" / "distillation_loss.pt")
    assert set(saved) == set(started[1].state_dict())


def test_logs_the_mean_of_the_terms(tmp_path: Path) -> None:
    """Over the batches since the last time, accumulated ones included."""
    (student, teacher), loss = tiny.models(), tiny.make_loss(hetero_weight=0.0)
    trainer = InOrder(
        student,
        arguments(
            tmp_path,
            gradient_accumulation_steps=2,
            learning_rate=0.0,
            average_tokens_across_devices=False,
        ),
        train_dataset=dataset(),
        teacher=teacher,
        loss=loss,
    )
    trainer.train()
    images, target = tiny.data()
    for step, entry in enumerate(trainer.state.log_history[:2]):
        rows = slice(4 * step, 4 * step + 4)
        with torch.no_grad():
            plain = tiny.plain_loss(student, teacher, loss, images[rows], target[rows])
        assert float(entry["ce"]) == pytest.approx(float(plain.ce), rel=1e-3)
        assert float(entry["kd"]) == pytest.approx(float(plain.kd), rel=1e-3)


def test_refuses_features_under_data_parallel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny.models()
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="features: 2 GPUs in one process"):
        DistillationTrainer(
            student,
            arguments(tmp_path),
            teacher=teacher,
            loss=tiny.make_loss(features=True),
            features=tiny.FEATURES,
        )


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    student, teacher = tiny.models()
    with pytest.raises(ValueError, match="features: got None, but the loss has projectors"):
        DistillationTrainer(
            student, arguments(tmp_path), teacher=teacher, loss=tiny.make_loss(features=True)
        )
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, loss=tiny.make_loss()
    )
    with pytest.raises(ValueError, match=r"labels: not among the inputs \(pixel_values\)"):
        trainer.compute_loss(student, {"pixel_values": tiny.data()[0]})
