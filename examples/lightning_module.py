"""Distillation with Lightning: `DistillationModule`, and the same in a module of one's own.

    pip install lightning
    python examples/lightning_module.py

Replace the networks and the data by yours; `pytorch_lightning` works the same way.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from heteroakd_fast import HeteroAKDLoss
from heteroakd_fast.integrations import FrozenTeacher
from heteroakd_fast.integrations.lightning import DistillationModule

CLASSES = 4


def network(width: int) -> nn.Module:
    """Logits at half the resolution; the loss upsamples them itself."""
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, CLASSES, 1))


def loader() -> DataLoader:
    """Patches whose colour tells the class."""
    target = torch.randint(0, CLASSES, (32, 4, 4))
    target = target.repeat_interleave(8, 1).repeat_interleave(8, 2)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    images = colours[target].permute(0, 3, 1, 2) + 0.1 * torch.randn(32, 3, 32, 32)
    return DataLoader(TensorDataset(images, target), batch_size=4)


class OwnModule(LightningModule):
    """A module of one's own needs two lines: a teacher, and a loss called with what it gives."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = FrozenTeacher(teacher)  # no submodule: not trained, not saved
        self.loss = HeteroAKDLoss(CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        out = self.loss(self.student(images), target, **self.teacher(images))
        self.log_dict({"train/loss": out.loss, "train/ce": out.ce})
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Record(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def main() -> list[float]:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data, teacher = loader(), network(width=32)  # load your trained one: this knows nothing
    modules = {
        "DistillationModule": DistillationModule(
            network(width=8), teacher, HeteroAKDLoss(CLASSES), partial(torch.optim.AdamW, lr=1e-2)
        ),
        "OwnModule": OwnModule(network(width=8), teacher),
    }
    record = Record()
    for name, module in modules.items():
        record = Record()
        Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[record],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)
        print(f"{name}: loss from {record.losses[0]:.3f} to {record.losses[-1]:.3f}")
    return record.losses


if __name__ == "__main__":
    main()
