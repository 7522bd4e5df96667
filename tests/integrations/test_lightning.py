"""Lightning's own loop gives what the plain loss gives, in both of its packages."""

from __future__ import annotations

import copy
import importlib
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip(
    "lightning.pytorch", reason="needs lightning: pip install lightning"
)

from heteroakd_fast.integrations import FrozenTeacher  # noqa: E402
from heteroakd_fast.integrations.lightning import DistillationModule  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
LR = 0.1


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*tiny.data()), batch_size=4)


@pytest.fixture(params=[False, True], ids=["logits", "features"])
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    student, teacher = tiny.models(norm=True)
    student.eval()  # as from_pretrained returns it; Lightning leaves it so
    features = tiny.FEATURES if request.param else None
    return {
        "student": student,
        "teacher": teacher,
        "loss": tiny.make_loss(request.param),
        "features": features,
    }


@pytest.mark.filterwarnings("ignore")
def test_fit_is_the_plain_loop(parts: dict[str, Any], tmp_path: Path) -> None:
    start = copy.deepcopy(parts)
    module = DistillationModule(**parts, optimizer=partial(torch.optim.SGD, lr=LR))
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, loader())

    plain = copy.deepcopy(start)
    student, teacher, loss = plain["student"].train(), plain["teacher"], plain["loss"]
    batches = list(loader())
    outputs = []

    def step(batch: Any) -> torch.Tensor:
        outputs.append(tiny.plain_loss(student, teacher, loss, *batch))
        return outputs[-1].loss

    tiny.plain_steps(
        [*student.parameters(), *loss.parameters()], [partial(step, b) for b in batches], LR
    )
    tiny.same_parameters(module.student, student, start["student"])
    tiny.same_parameters(module.loss, loss, start["loss"])
    logged = trainer.callback_metrics
    names = {"train/loss", "train/ce", "train/kd", "train/hetero"}
    assert set(logged) == names | ({"train/projector"} if parts["features"] else set())
    for name, value in logged.items():
        torch.testing.assert_close(value, getattr(outputs[-1], name.split("/")[1]).detach())

    # the teacher: as it was, and not in the checkpoint
    for name, value in parts["teacher"].state_dict().items():
        assert torch.equal(value, start["teacher"].state_dict()[name]), name
    assert not parts["teacher"].training
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in saved} <= {"student", "loss"}
    assert len(saved) == len(student.state_dict()) + len(loss.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_logs_every_term_and_the_mean_iou(parts: dict[str, Any], stage: str) -> None:
    module = DistillationModule(**parts, optimizer=torch.optim.SGD)
    trainer = lightning.Trainer(**QUIET)
    run = trainer.validate if stage == "val" else trainer.test
    parts["student"].eval()
    with torch.no_grad():
        values = [
            tiny.plain_loss(parts["student"], parts["teacher"], parts["loss"], *batch)
            for batch in loader()
        ]
    names = ["loss", "ce", "kd", "hetero", *(["projector"] if parts["features"] else [])]
    expected = {
        f"{stage}/{name}": float(sum(getattr(value, name) for value in values)) / len(values)
        for name in names
    }
    expected[f"{stage}/miou"] = tiny.mean_iou(parts["student"], *tiny.data())
    for _ in range(2):  # the second time starts anew
        (result,) = run(module, loader(), verbose=False)
        assert result == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_evaluation_of_several_loaders() -> None:
    student, teacher = tiny.models()
    module = DistillationModule(student, teacher, tiny.make_loss(), torch.optim.SGD)
    images, target = tiny.data()
    halves = [(images[:4], target[:4]), (images[4:], target[4:])]
    loaders = [DataLoader(TensorDataset(*half), batch_size=4) for half in halves]
    results = lightning.Trainer(**QUIET).validate(module, loaders, verbose=False)
    for number, (half, result) in enumerate(zip(halves, results, strict=True)):
        expected = pytest.approx(tiny.mean_iou(student, *half))
        assert result[f"val/miou/dataloader_idx_{number}"] == expected
        assert f"val/ce/dataloader_idx_{number}" in result


@pytest.mark.filterwarnings("ignore")
def test_predictions_are_the_students_classes() -> None:
    student, teacher = tiny.models()
    module = DistillationModule(student, teacher, tiny.make_loss(), torch.optim.SGD)

    def silent(*args: Any) -> None:
        raise AssertionError("the teacher was called")

    teacher.register_forward_pre_hook(silent)
    images, target = tiny.data(4)
    with torch.no_grad():
        logits = student(images)["logits"]
    wide = torch.nn.functional.interpolate(logits, size=images.shape[2:], mode="bilinear")
    for batch in (images, (images, target), {"image": images}, {"image": images, "mask": target}):
        data = DataLoader([batch], batch_size=None)
        (found,) = lightning.Trainer(**QUIET).predict(module, data)
        assert torch.equal(found, wide.argmax(1))


def test_unpacks_batches_or_says_what_is_missing() -> None:
    student, teacher = tiny.models()
    keys = ("pixel_values", "labels")
    module = DistillationModule(
        student, teacher, tiny.make_loss(), torch.optim.SGD, batch_keys=keys
    )
    images, target = tiny.data(2)
    batch = {"labels": target, "pixel_values": images, "name": "a"}
    assert module.unpack(batch)[0] is images
    assert module.unpack(batch)[1] is target
    del batch["labels"]
    message = (
        r"batch_keys: got \('pixel_values', 'labels'\), but the batch has 'pixel_values', 'name'; "
        "expected its keys of images and labels"
    )
    with pytest.raises(ValueError, match=message):
        module.unpack(batch)
    for wrong, came in (([images] * 3, "list of 3"), (images, "Tensor")):
        with pytest.raises(TypeError, match=f"batch: got a {came}, expected a pair"):
            module.unpack(wrong)


def test_a_teacher_that_is_frozen_already() -> None:
    student, teacher = tiny.models()
    frozen = FrozenTeacher(teacher, logits=lambda output: 2 * output["logits"])
    loss = tiny.make_loss(True)
    module = DistillationModule(student, frozen, loss, torch.optim.SGD, features=tiny.FEATURES)
    images = tiny.data(2)[0]
    found = module.teacher(images)
    assert torch.equal(found["teacher_logits"], 2 * teacher(images)["logits"])
    assert torch.equal(found["teacher_features"], teacher.body(images))
    assert set(frozen(images)) == {"teacher_logits"}, "the caller's own is left as it was"


@pytest.mark.filterwarnings("ignore")
def test_batches_that_are_mappings_and_schedulers(parts: dict[str, Any]) -> None:
    images, target = tiny.data(4)
    batch = {"image": images, "mask": target}
    module = DistillationModule(
        **parts,
        optimizer=partial(torch.optim.SGD, lr=LR),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )
    trainer = lightning.Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, DataLoader([batch], batch_size=None))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(LR / 4)


@pytest.mark.filterwarnings("ignore")
def test_with_pytorch_lightning(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    other = pytest.importorskip(
        "pytorch_lightning", reason="needs pytorch-lightning: pip install pytorch-lightning"
    )
    name = "heteroakd_fast.integrations.lightning"
    monkeypatch.delitem(sys.modules, "lightning.pytorch")  # a program that did not import it
    monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module(name)
    start = copy.deepcopy(parts["student"])
    built = module.DistillationModule(**parts, optimizer=partial(torch.optim.SGD, lr=LR))
    assert isinstance(built, other.LightningModule)
    other.Trainer(max_epochs=1, **QUIET).fit(built, loader())
    assert not torch.equal(built.student.classifier.weight, start.classifier.weight)


def test_refuses_what_does_not_fit() -> None:
    student, teacher = tiny.models()
    sgd = torch.optim.SGD
    with pytest.raises(ValueError, match="features: got None, but the loss has projectors"):
        DistillationModule(student, teacher, tiny.make_loss(True), sgd)
    with pytest.raises(ValueError, match="but the loss has no projectors"):
        DistillationModule(student, teacher, tiny.make_loss(), sgd, features=tiny.FEATURES)
    with pytest.raises(TypeError, match="optimizer: got SGD, expected a callable"):
        DistillationModule(student, teacher, tiny.make_loss(), sgd(student.parameters(), lr=1.0))
    with pytest.raises(TypeError, match="teacher: got str, expected a torch.nn.Module"):
        DistillationModule(student, "teacher", tiny.make_loss(), sgd)
