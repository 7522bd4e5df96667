"""For Lightning: `lightning` and `pytorch_lightning`, whichever your program imported.

module = DistillationModule(student, teacher, HeteroAKDLoss(19), optimizer=AdamW)
Trainer(max_epochs=1).fit(module, loader)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import DistillationOutput, HeteroAKDLoss, functional
from ..modules import SharesGroup
from .metrics import ConfusionMatrix
from .resolution import low_resolution, warn_of_full_resolution
from .taps import Feature
from .teacher import FeatureTap, FrozenTeacher, check_features, freeze, logits_of, world

# A Trainer takes modules of its own library only. Both are often installed; the one that the
# program has imported is the one it trains with.
try:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import LightningModule
    else:
        from lightning.pytorch import LightningModule
except ImportError:
    try:
        from pytorch_lightning import LightningModule
    except ImportError as error:
        raise ImportError(
            f"heteroakd_fast.integrations.lightning needs Lightning ({error}): "
            "pip install lightning"
        ) from error

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["DistillationModule"]


class DistillationModule(SharesGroup, LightningModule):
    """Trains a student, and the loss's projectors, from a frozen teacher.

    Logs the loss and every term as `train/ce`, `val/kd`, `test/hetero` and so on, and the student's
    mean IoU at the labels' size as `val/miou` and `test/miou`; `predict` gives the student's class
    ids. The state dict holds `student` and `loss`; the teacher is in none of checkpoints,
    `parameters()` and training mode, and follows the images to their device.

    Args:
        student, teacher: networks from images to logits; see `logits_of` for what they may return.
            The student is put in training mode (afterwards set what shall stay in eval mode). The
            teacher may be a `FrozenTeacher`, whose `logits` then applies to it.
        loss: the loss, with projectors if `features` are given.
        optimizer: gets the parameters to train and returns the optimizer, e.g.
            `functools.partial(torch.optim.AdamW, lr=1e-4)`.
        scheduler: gets the optimizer and returns what `configure_optimizers` may return as
            `lr_scheduler`, or None.
        features: (module of the student, module of the teacher), dotted names of the feature
            maps for a loss with projectors; or `Feature`s, for maps with other axes.
        process_group: "auto" makes the denominators global over all ranks while training; None
            leaves each rank its own.
        batch_keys: keys of images [B, 3, H, W] and labels [B, H, W] where a batch is a mapping,
            e.g. ("pixel_values", "labels") for data made for transformers; otherwise it is a pair.
            An entry `pixel_weight` [B, H, W] of a mapping is passed on to the loss.
        logits: finds the logits in what both networks return.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and what was expected.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | FrozenTeacher,
        loss: HeteroAKDLoss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        scheduler: Callable[[Optimizer], Any] | None = None,
        features: tuple[str | Feature, str | Feature] | None = None,
        process_group: Any = "auto",
        batch_keys: tuple[str, str] = ("image", "mask"),
        logits: Callable[[Any], Tensor] = logits_of,
    ) -> None:
        super().__init__()
        student_feature, teacher_feature = check_features(loss, features)
        if not callable(optimizer):
            raise TypeError(
                f"optimizer: got {type(optimizer).__name__}, expected a callable that takes the "
                "parameters, such as functools.partial(torch.optim.AdamW, lr=1e-4)"
            )
        # Lightning trains modules in the mode that they come in; from_pretrained gives eval mode.
        self.student = student.train()
        self.loss = loss
        self.teacher = freeze(teacher, teacher_feature, loss, logits)
        self.align_corners: bool = loss.align_corners
        warn_of_full_resolution(student, self.align_corners, "student")
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.process_group = process_group
        self.batch_keys = batch_keys
        self.logits = logits
        self._tap = None if student_feature is None else FeatureTap(student, student_feature)
        self._matrices: dict[int, ConfusionMatrix] = {}

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits [B, C, h, w], before an upsampling that the loss does itself."""
        with low_resolution(self.student, align_corners=self.align_corners):
            return self.logits(self.student(images))

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels [B, H, W] of a batch; override it for batches of another kind.

        Raises:
            TypeError, ValueError: the batch is neither a pair nor a mapping with `batch_keys`.
        """
        if isinstance(batch, Mapping):
            images, target = (self._item(batch, key) for key in self.batch_keys)
            return images, target
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            came = type(batch).__name__
            if isinstance(batch, (tuple, list)):
                came += f" of {len(batch)}"
            raise TypeError(
                f"batch: got a {came}, expected a pair of images and labels, or a mapping that "
                "holds them under batch_keys; override unpack() for others"
            )
        return batch[0], batch[1]

    def pixel_weight(self, batch: Any) -> Tensor | None:
        """Weights [B, H, W] of the pixels of a batch, or None; override it for other batches."""
        return batch.get("pixel_weight") if isinstance(batch, Mapping) else None

    def _item(self, batch: Mapping[str, Any], key: str) -> Tensor:
        if key not in batch:
            raise ValueError(
                f"batch_keys: got {self.batch_keys!r}, but the batch has "
                f"{', '.join(map(repr, batch)) or 'nothing'}; expected its keys of images and "
                "labels"
            )
        found: Tensor = batch[key]
        return found

    def distill(
        self, images: Tensor, target: Tensor, pixel_weight: Tensor | None = None
    ) -> DistillationOutput:
        """Both networks and the loss; what a step of your own would call."""
        return self._distill(images, target, pixel_weight)[0]

    def _distill(
        self, images: Tensor, target: Tensor, pixel_weight: Tensor | None
    ) -> tuple[DistillationOutput, Tensor]:
        # Ranks may have different numbers of validation batches: no collective there.
        self.loss.process_group = world(self.process_group) if self.training else None
        listening = contextlib.nullcontext() if self._tap is None else self._tap.listening()
        with listening:
            student_logits = self(images)
            found = self.teacher(images)
            if self._tap is not None:
                found["student_features"] = self._tap.take()
        output: DistillationOutput = self.loss(
            student_logits, target, pixel_weight=pixel_weight, **found
        )
        return output, student_logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = self.unpack(batch)
        output = self.distill(images, target, self.pixel_weight(batch))
        self._log(output, "train", len(images))
        return output.loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self._evaluation_step(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self._evaluation_step(batch, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The student's class ids [B, H, W], int64, at the images' size.

        A batch is images, alone or as the first of a sequence, or a mapping that holds them; the
        teacher is not called.
        """
        if isinstance(batch, Mapping):
            images = self._item(batch, self.batch_keys[0])
        else:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return functional.predict(
            self(images), images.shape[-2:], align_corners=self.align_corners, dtype=torch.int64
        )

    def on_validation_epoch_start(self) -> None:
        self._matrices.clear()

    def on_test_epoch_start(self) -> None:
        self._matrices.clear()

    def on_validation_epoch_end(self) -> None:
        self._log_miou("val")

    def on_test_epoch_end(self) -> None:
        self._log_miou("test")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(
            [parameter for parameter in self.parameters() if parameter.requires_grad]
        )
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def _evaluation_step(self, batch: Any, stage: str, loader: int) -> Tensor:
        images, target = self.unpack(batch)
        output, logits = self._distill(images, target, self.pixel_weight(batch))
        self._log(output, stage, len(images), sync_dist=True)
        if loader not in self._matrices:
            loss = self.loss
            self._matrices[loader] = ConfusionMatrix(
                loss.num_classes, loss.ignore_index, loss.unlabelled_index, self.align_corners
            )
        self._matrices[loader].update(logits, target)
        return output.loss

    def _log_miou(self, stage: str) -> None:
        for loader, matrix in self._matrices.items():
            counts = matrix.counts.to(self.device)
            matrix.counts = self.trainer.strategy.reduce(counts, reduce_op="sum").cpu()
            # Named as Lightning names the terms where there are several loaders.
            several = f"/dataloader_idx_{loader}" if len(self._matrices) > 1 else ""
            self.log(
                f"{stage}/miou{several}",
                matrix.scores().miou,
                add_dataloader_idx=False,
                sync_dist=True,  # the same on every rank; without it Lightning warns
            )

    def _log(self, output: DistillationOutput, stage: str, size: int, **options: Any) -> None:
        values = {"loss": output.loss.detach(), **output.terms}
        self.log_dict(
            {f"{stage}/{name}": value for name, value in values.items()},
            batch_size=size,
            **options,
        )
