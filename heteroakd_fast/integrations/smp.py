"""For segmentation_models_pytorch: the loss as `smp.losses` build and call theirs.

    loss_fn = DistillationLoss("multiclass", num_classes=19, ignore_index=255)
    with low_resolution(student, teacher):  # leaves out the networks' own upsampling
        y_pred, teacher_pred = student(images), teacher(images)
    loss_fn(y_pred, y_true, teacher_pred).backward()

Nothing of the library is needed for it, and nothing is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .. import DistillationOutput, HeteroAKDLoss
from ..modules import AdjustableLoss, forwarded

__all__ = ["DistillationLoss", "low_resolution"]


class DistillationLoss(AdjustableLoss):
    """`HeteroAKDLoss` with the conventions of `smp.losses`; returns the loss alone.

    Args:
        mode: "multiclass"; the others have no distribution over classes to distil.
        num_classes: C, `classes=` of the models.
        from_logits: must be True.
        ignore_index: label of the pixels that are excluded, None for none.
        smooth_factor: label smoothing, None for 0.
        align_corners: True, as in the upsampling that `low_resolution` leaves out.
        **options: every other one of `HeteroAKDLoss`.

    Its arguments are attributes and may be set, as in `HeteroAKDLoss`. After a call, `terms` holds
    its `DistillationOutput` without graph, for logs.

    Raises:
        TypeError, ValueError: an option is wrong; names it and what was expected.
    """

    _fixed = ("mode", "from_logits", *HeteroAKDLoss._fixed)
    smooth_factor = forwarded("label_smoothing")

    @classmethod
    def _arguments(cls) -> tuple[str, ...]:
        return (*HeteroAKDLoss._arguments(), "smooth_factor")

    def __init__(
        self,
        mode: str,
        num_classes: int,
        from_logits: bool = True,
        ignore_index: int | None = None,
        smooth_factor: float | None = None,
        *,
        align_corners: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if mode in ("binary", "multilabel"):
            raise ValueError(
                f"mode: got {mode!r}, expected 'multiclass': the loss compares distributions "
                "over classes that exclude each other; a binary task is one of two classes "
                "(classes=2, labels 0 and 1)"
            )
        if mode != "multiclass":
            raise ValueError(f"mode: got {mode!r}, expected 'multiclass'")
        if from_logits is not True:
            raise ValueError(
                f"from_logits: got {from_logits!r}, expected True: probabilities cannot be "
                "upsampled and softened as logits are; build the models with activation=None"
            )
        for name, ours in (("label_smoothing", "smooth_factor"), ("reduction", None)):
            if name in options:
                raise ValueError(
                    f"{name}: "
                    + (f"is called {ours} here" if ours else "the loss is always a mean")
                )
        self.__dict__["mode"] = mode
        self.loss = HeteroAKDLoss(
            num_classes,
            ignore_index=ignore_index,
            label_smoothing=0.0 if smooth_factor is None else smooth_factor,
            align_corners=align_corners,
            **options,
        )
        self.terms: DistillationOutput | None = None

    def forward(
        self, y_pred: Tensor, y_true: Tensor, teacher_pred: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """The weighted sum of the terms.

        Args:
            y_pred: [B, C, h, w], the student's logits at any resolution.
            y_true: [B, H, W] or [B, 1, H, W].
            teacher_pred: [B, C, h', w'], the teacher's logits.
            **inputs: `student_features`, `teacher_features`, `pixel_weight` ([B, H, W]) and
                `normalizer` of `HeteroAKDLoss`.
        """
        if y_true.dim() == 4 and y_true.shape[1] == 1:
            y_true = y_true.squeeze(1)
        output: DistillationOutput = self.loss(
            y_pred, y_true, teacher_logits=teacher_pred, **inputs
        )
        self.terms = output._replace(loss=output.loss.detach())
        return output.loss


for _name in (*HeteroAKDLoss._adjustable, "process_group"):
    if _name != "label_smoothing":
        setattr(DistillationLoss, _name, forwarded(_name))


@contextlib.contextmanager
def low_resolution(*models: nn.Module) -> Iterator[None]:
    """Inside the block, the models give their logits before their own bilinear upsampling.

    FPN, DeepLabV3(+), PAN, PSPNet, UPerNet and Segformer upsample 4 to 32 times; Unet, Unet++,
    MAnet and Linknet end at full resolution by themselves, and nothing changes for them.

    Raises:
        ValueError: a model does not end in `segmentation_head`, a convolution, upsampling and
            activation; or it has an activation.
    """
    heads = []
    for number, model in enumerate(models):
        head = getattr(model, "segmentation_head", None)
        if not isinstance(head, nn.Sequential) or len(head) != 3:
            raise ValueError(
                f"models[{number}]: {type(model).__name__} has no segmentation_head of "
                "convolution, upsampling and activation"
            )
        activation = getattr(head[2], "activation", head[2])
        if not isinstance(activation, nn.Identity):
            raise ValueError(
                f"models[{number}]: ends in {type(activation).__name__}, the loss needs logits; "
                "build it with activation=None"
            )
        heads.append((head, head[1]))
    try:
        for head, _ in heads:
            head[1] = nn.Identity()
        yield
    finally:
        for head, upsampling in heads:
            head[1] = upsampling
