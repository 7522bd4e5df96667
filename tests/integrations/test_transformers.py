"""The Trainer of transformers gives what the plain loss gives, accumulated batches included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

transformers = pytest.importorskip("transformers", reason="needs it: pip install transformers")
pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")

from heteroakd_fast import HeteroAKDLoss  # noqa: E402
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
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
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


def upernet() -> nn.Module:
    stage = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8, "out_features": ["stage1"]}
    config = transformers.UperNetConfig(
        num_labels=tiny.CLASSES,
        hidden_size=8,
        pool_scales=[1],
        use_auxiliary_head=False,
        backbone_config=transformers.ResNetConfig(**stage),
    )
    return transformers.UperNetForSemanticSegmentation(config)


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


@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
def test_evaluation(tmp_path: Path, features: bool) -> None:
    (student, teacher), loss = tiny.models(), tiny.make_loss(features)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        eval_dataset=dataset()[:7],
        teacher=teacher,
        loss=loss,
        features=tiny.FEATURES if features else None,
    )
    images, target = (part[:7] for part in tiny.data())
    with torch.no_grad():
        parts = [
            (rows, tiny.plain_loss(student, teacher, loss, images[rows], target[rows]))
            for rows in (slice(0, 4), slice(4, 7))
        ]
    names = ["loss", "ce", "kd", "hetero", *(["projector"] if features else [])]
    expected = {
        name: sum(len(images[rows]) * float(getattr(out, name)) for rows, out in parts) / 7
        for name in names
    }
    expected["miou"] = tiny.mean_iou(student, images, target)
    for prefix, metrics in (
        ("eval", trainer.evaluate()),
        ("test", trainer.predict(dataset()[:7]).metrics),
        ("eval_other", trainer.evaluate({"other": dataset()[:7]})),
    ):
        found = {name: metrics[f"{prefix}_{name}"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5)
    assert trainer.state.log_history[0]["eval_miou"] == pytest.approx(expected["miou"])


def test_metrics_of_the_users_own_are_kept(tmp_path: Path) -> None:
    student, teacher = tiny.models()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        eval_dataset=dataset(),
        teacher=teacher,
        loss=tiny.make_loss(),
        compute_metrics=lambda found: {"miou": 2.0, "size": found.predictions.shape[-1]},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_miou"] == 2.0
    assert metrics["eval_size"] == 4
    assert "eval_kd" in metrics


def test_predictions_are_the_students_alone(tmp_path: Path) -> None:
    student, teacher = tiny.models()
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, loss=tiny.make_loss()
    )
    with torch.no_grad():
        expected = student(tiny.data()[0])["logits"]
    torch.testing.assert_close(torch.from_numpy(trainer.predict(dataset()).predictions), expected)

    def silent(*args: Any) -> None:
        raise AssertionError("the teacher was called")

    trainer.teacher.module.register_forward_pre_hook(silent)
    unlabelled = [{"pixel_values": item["pixel_values"]} for item in dataset()]
    found = trainer.predict(unlabelled)
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected)
    assert "test_ce" not in found.metrics


def test_an_upernet_student_upsamples_nothing_where_nobody_wants_it(tmp_path: Path) -> None:
    student, teacher = upernet(), upernet()
    with torch.no_grad():
        teacher.decode_head.classifier.weight.mul_(100.0)
    loss = tiny.make_loss()
    sizes: list[int] = []
    loss.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    trainer = InOrder(
        student,
        arguments(tmp_path),
        train_dataset=dataset(4, 64),
        eval_dataset=dataset(2, 64),
        teacher=teacher,
        loss=loss,
    )
    trainer.train()
    assert sizes == [16, 16]
    low = trainer.evaluate()
    predicted = trainer.predict(dataset(2, 64))
    assert sizes[2:] == [16, 64]
    with torch.no_grad():
        own = student(tiny.data(2, 64)[0]).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), own)
    for name in ("loss", "ce", "kd", "hetero", "miou"):
        expected = pytest.approx(predicted.metrics[f"test_{name}"], rel=1e-4)
        assert low[f"eval_{name}"] == expected, name


@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
def test_resume_of_segformer_goes_on_where_it_was(tmp_path: Path, features: bool) -> None:
    """Its checkpoints have other names than the model: the Trainer alone loads none of them."""

    def trained(folder: Path, resume: str | None) -> tuple[nn.Module, nn.Module]:
        student, loss = segformer(8), tiny.make_loss()
        if features:
            loss = HeteroAKDLoss(tiny.CLASSES, 8, 9)
        trainer = InOrder(
            student,
            arguments(folder, save_strategy="steps", save_steps=1, optim="adamw_torch"),
            train_dataset=dataset(4, 64),
            teacher=tiny.models()[1],
            loss=loss,
            features=("decode_head.activation", "body") if features else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return student, loss

    torch.manual_seed(1)
    whole = trained(tmp_path / "whole", None)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) != set(whole[0].state_dict()), "the names differ, or the test proves nothing"
    torch.manual_seed(2)  # another start: whatever is not loaded shows
    resumed = trained(tmp_path / "resumed", str(checkpoint))
    for one, two in zip(resumed, whole, strict=True):
        for name, value in two.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-5, atol=1e-7)

    # what is saved is the student, for from_pretrained
    again = type(whole[0]).from_pretrained(tmp_path / "whole" / "checkpoint-2").eval()
    images = tiny.data(1, 64)[0]
    assert torch.equal(again(images).logits, whole[0].eval()(images).logits)


@pytest.mark.parametrize("metric", ["ce", "eval_miou"])
def test_the_best_by_a_metric_is_loaded_at_the_end(tmp_path: Path, metric: str) -> None:
    """Step 2 is good, steps 1 and 3 are not; all labels are 3, and the learning rate is 0."""
    student, loss = segformer(8), HeteroAKDLoss(tiny.CLASSES, 8, 9)

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                student.decode_head.classifier.bias[3] = [-10.0, 10.0, -20.0][state.global_step - 1]
                loss.student_projector.conv.bias.fill_(state.global_step)

    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    data = [{**item, "labels": torch.full((64, 64), 3)} for item in dataset(4, 64)]
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=3, learning_rate=0.0, **every, **best),
        train_dataset=data,
        eval_dataset=data,
        teacher=tiny.models()[1],
        loss=loss,
        features=("decode_head.activation", "body"),
        callbacks=[Steps()],
    )
    trainer.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    history = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert len(history) == 3
    assert trainer.state.best_metric == history[1]
    assert student.decode_head.classifier.bias[3] == 10.0
    assert (loss.student_projector.conv.bias == 2.0).all()


def test_refuses_a_checkpoint_that_lacks_something(tmp_path: Path) -> None:
    def trainer(**options: Any) -> DistillationTrainer:
        student, teacher = tiny.models()
        features = tiny.FEATURES if options else None
        return DistillationTrainer(
            student,
            arguments(tmp_path),
            teacher=teacher,
            loss=tiny.make_loss(**options),
            features=features,
        )

    trainer().save_model(str(tmp_path / "plain"))
    refused = pytest.raises(FileNotFoundError, match="plain/distillation_loss.pt: no such file")
    with refused:
        trainer(features=True)._load_from_checkpoint(str(tmp_path / "plain"))
    file = tmp_path / "plain" / "model.safetensors"
    state = load_file(file)
    del state["body.0.weight"]
    save_file(state, file)
    with pytest.raises(ValueError, match=r"plain: lacks body.0.weight, expected all .* of Net"):
        trainer()._load_from_checkpoint(str(tmp_path / "plain"))
    segformer(8).save_pretrained(tmp_path / "other")
    student = upernet()
    with pytest.raises(ValueError, match=r"other: lacks .* more, expected all weights of UperNet"):
        DistillationTrainer(
            student, arguments(tmp_path), teacher=student, loss=tiny.make_loss()
        )._load_from_checkpoint(str(tmp_path / "other"))


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
    images, target = tiny.data()
    with pytest.raises(ValueError, match=r"labels: not among the inputs \(pixel_values\)"):
        trainer.compute_loss(student, {"pixel_values": images})
    with pytest.raises(ValueError, match=r"teacher_inputs: pixel_values not among .* \(images\)"):
        trainer.compute_loss(student, {"images": images, "labels": target})
