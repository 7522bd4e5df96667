"""For Lightning: `lightning` and `pytorch_lightning`, whichever your program imported.

module = DistillationModule(student, teacher, HeteroAKDLoss(19), optimizer=AdamW)
Trainer(max_epochs=1).fit(module, loader)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import DistillationOutput, HeteroAKDLoss
from ..modules import SharesGroup
from .taps import Feature
from .teacher import FeatureTap, FrozenTeacher, check_features, logits_of, world

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

    Logs the loss and every term as `train/ce`, `val/kd` and so on. The state dict holds `student`
    and `loss`; the teacher is in none of checkpoints, `parameters()` and training mode, and
    follows the images to their device.

    Args:
        student, teacher: networks from images to logits; see `logits_of` for what they may return.
        loss: the loss, with projectors if `features` are given.
        optimizer: gets the parameters to train and returns the optimizer, e.g.
            `functools.partial(torch.optim.AdamW, lr=1e-4)`.
        scheduler: gets the optimizer and returns what `configure_optimizers` may return as
            `lr_scheduler`, or None.
        features: (module of the student, module of the teacher), dotted names of the feature
            maps for a loss with projectors; or `Feature`s, for maps with other axes.
        process_group: "auto" makes the denominators global over all ranks while training; None
            leaves each rank its own.
        batch_keys: keys of images and labels where a batch is a mapping; otherwise it is a pair.
        logits: finds the logits in what both networks return.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and what was expected.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
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
        self.student = student
        self.loss = loss
        self.teacher = FrozenTeacher(teacher, teacher_feature, logits)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.process_group = process_group
        self.batch_keys = batch_keys
        self.logits = logits
        self._tap = None if student_feature is None else FeatureTap(student, student_feature)

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits."""
        return self.logits(self.student(images))

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels [B, H, W] of a batch; override it for batches of another kind."""
        if isinstance(batch, Mapping):
            return batch[self.batch_keys[0]], batch[self.batch_keys[1]]
        images, target = batch
        return images, target

    def distill(self, images: Tensor, target: Tensor) -> DistillationOutput:
        """Both networks and the loss; what a step of your own would call."""
        # Ranks may have different numbers of validation batches: no collective there.
        self.loss.process_group = world(self.process_group) if self.training else None
        listening = contextlib.nullcontext() if self._tap is None else self._tap.listening()
        with listening:
            student_logits = self(images)
            found = self.teacher(images)
            if self._tap is not None:
                found["student_features"] = self._tap.take()
        output: DistillationOutput = self.loss(student_logits, target, **found)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = self.unpack(batch)
        output = self.distill(images, target)
        self._log(output, "train", len(images))
        return output.loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = self.unpack(batch)
        output = self.distill(images, target)
        self._log(output, "val", len(images), sync_dist=True)
        return output.loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(
            [parameter for parameter in self.parameters() if parameter.requires_grad]
        )
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def _log(self, output: DistillationOutput, stage: str, size: int, **options: Any) -> None:
        values = {"loss": output.loss.detach(), **output.terms()}
        self.log_dict(
            {f"{stage}/{name}": value for name, value in values.items()},
            batch_size=size,
            **options,
        )
