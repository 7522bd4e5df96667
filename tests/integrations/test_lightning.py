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
def test_validation_logs_every_term(parts: dict[str, Any]) -> None:
    module = DistillationModule(**parts, optimizer=torch.optim.SGD)
    (result,) = lightning.Trainer(**QUIET).validate(module, loader(), verbose=False)
    parts["student"].eval()
    with torch.no_grad():
        values = [
            tiny.plain_loss(parts["student"], parts["teacher"], parts["loss"], *batch)
            for batch in loader()
        ]
    for name in ("loss", "ce", "kd", "hetero"):
        mean = sum(getattr(value, name) for value in values) / len(values)
        assert result[f"val/{name}"] == pytest.approx(float(mean), rel=1e-5)


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
