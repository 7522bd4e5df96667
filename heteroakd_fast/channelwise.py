"""Channel-wise distillation (CWD): where in the picture a class lies, rather than which it is.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, Eq. 4. In plain
PyTorch: at the logits' own resolution, as published, it costs little. What the published code does
otherwise: it takes the logarithm of a softmax (not finite for confident logits), counts ignored
pixels, and needs both sides on one grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, NoReturn

import torch
from torch import Tensor

from . import functional, ops, reference
from .checks import (
    check_choice,
    check_constant,
    check_flag,
    check_ignore_index,
    check_ignored_class,
    check_integer,
    check_scalar,
    check_temperature,
    plain_tensor,
    refuse_unknown,
)
from .labels import nearest_labels
from .modules import AdjustableLoss
from .output import DistillationOutput

__all__ = ["ChannelWiseLoss", "channel_wise_distillation"]

_OPTIONS: Final = (
    "temperature",
    "ignore_index",
    "allow_ignored_class",
    "align_corners",
    "resolution",
)
_RENAMED: Final = {"tau": "temperature", "T": "temperature"}  # mmrazor and others


def channel_wise_distillation(
    student_logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    ignore_index: int | None = 255,
    allow_ignored_class: bool = False,
    align_corners: bool = False,
    resolution: str = "label",
    normalizer: functional.Normalizer | None = None,
    process_group: Any = None,
    **unknown: NoReturn,
) -> DistillationOutput:
    """T^2 / (N C) sum over images and classes of KL(softmax over space of z_t / T, of z_s / T).

    N counts the images that have a valid pixel; ignored pixels are in no softmax. Computed in
    float32 or wider; the gradient reaches the student only.

    Args:
        student_logits: [B, C, h, w], float32, bfloat16, float16 or float64.
        teacher_logits: [B, C, h', w'], resampled to the grid of the loss.
        target: [B, H, W], int64, int32 or uint8; only which pixels are ignored matters.
        temperature: T, from 1e-4 to 1e4; 4 in the paper. mmrazor calls it tau.
        ignore_index, allow_ignored_class: see `functional.cross_entropy`.
        align_corners: of the bilinear resampling.
        resolution: "logits": on the student's grid, labels by nearest neighbour (as published);
            "label": on the label grid, which materialises both sides' full-resolution logits.
        normalizer: replaces N C; a number, or {"cwd": number} as in `denominators`.
        process_group: makes N C the mean over these ranks.

    Returns:
        A `DistillationOutput` with `loss`, `cwd`, `valid` and `denominators`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    refuse_unknown(unknown, _OPTIONS, _RENAMED)
    temperature = check_temperature(temperature, "temperature")
    check_choice(resolution, "resolution", functional.RESOLUTIONS)
    check_flag(align_corners, "align_corners")
    ignored = check_ignore_index(ignore_index)
    if teacher_logits is None:
        raise TypeError("teacher_logits: got None, expected a tensor [B, C, h', w']")
    student_logits, teacher_logits = plain_tensor(student_logits), plain_tensor(teacher_logits)
    target = plain_tensor(target)
    functional.check_pair(student_logits, teacher_logits, target)
    _, classes, height, width = student_logits.shape
    check_ignored_class(ignore_index, classes, allow_ignored_class)
    check_constant(teacher_logits, "teacher_logits")
    valid_count = ops.valid_count(target, classes, ignored)
    if resolution == "logits":
        target = nearest_labels(target, (height, width))
    if target.numel() == 0:
        numerator = student_logits[:0].sum(dtype=torch.float64)
        images = torch.zeros_like(numerator)
    else:
        numerator, images = _sums(
            student_logits, teacher_logits, target != ignored, temperature, align_corners
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    denominator = images * classes
    if process_group is not None:
        denominator = functional.mean_over_ranks(denominator, process_group)
    divisor = denominator
    if isinstance(normalizer, Mapping):
        if normalizer.keys() != {"cwd"}:
            raise ValueError(
                f"normalizer: names {', '.join(map(str, normalizer)) or 'nothing'}, this call "
                "computes cwd"
            )
        normalizer = normalizer["cwd"]
    if normalizer is not None:
        check_scalar(normalizer, "normalizer")
        divisor = torch.as_tensor(
            plain_tensor(normalizer), dtype=torch.float64, device=target.device
        )
    cwd = (numerator * torch.where(divisor == 0, 0.0, 1.0 / divisor.reshape(()))).to(dtype)
    return DistillationOutput(
        loss=cwd,
        valid=valid_count,
        denominators={"cwd": denominator},
        cwd=cwd.detach(),
    )


def _sums(
    student_logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor,
    temperature: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """T^2 KL summed over images and classes, on the grid of `valid` [B, H, W], and the number of
    images that have a valid pixel; float64 scalars."""
    size = (valid.shape[1], valid.shape[2])
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_z, teacher_z = (
        reference.upsample(z.to(dtype), size, align_corners).flatten(2)
        for z in (student_logits, teacher_logits)
    )
    # `where` on the way in and on the way out: what an ignored pixel holds, NaN included, must
    # reach neither the values nor the gradients. A picture without a valid pixel has no softmax.
    valid = valid.flatten(1)[:, None]
    counted = valid.any(dim=2, keepdim=True)
    nothing = torch.where(counted, -torch.inf, 0.0).to(dtype)
    log_p_s, log_p_t = (
        torch.where(valid, z / temperature, nothing).log_softmax(dim=2)
        for z in (student_z, teacher_z)
    )
    difference = torch.where(valid, log_p_t - log_p_s, 0.0)
    divergence = (torch.where(valid, log_p_t.exp(), 0.0) * difference).sum(dim=(1, 2))
    total = temperature**2 * divergence.sum(dtype=torch.float64)
    # A sum of divergences is never negative, its rounding may be; the gradient is the sum's.
    return total - total.detach().clamp(max=0.0), counted.sum(dtype=torch.float64)


class ChannelWiseLoss(AdjustableLoss):
    """`channel_wise_distillation` as a module; arguments as there, and attributes: they may be
    set, and are checked then.

    Published weights: 3 beside the cross entropy for logits (T = 4, mean over images and classes);
    5 on Cityscapes and 10 on ADE20K with T = 1 in other configurations.
    """

    _adjustable = _OPTIONS
    _renamed: ClassVar = _RENAMED

    temperature: float
    ignore_index: int | None
    allow_ignored_class: bool
    align_corners: bool
    resolution: str

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ignore_index: int | None = 255,
        allow_ignored_class: bool = False,
        align_corners: bool = False,
        resolution: str = "label",
        process_group: Any = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown, self._arguments(), self._renamed)
        given = locals()
        self.__dict__.update(self._check_settings({name: given[name] for name in _OPTIONS}))
        self.process_group = process_group

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        checked = {
            **settings,
            "temperature": check_temperature(settings["temperature"], "temperature"),
        }
        if settings["ignore_index"] is not None:
            checked["ignore_index"] = check_integer(settings["ignore_index"], "ignore_index")
        check_flag(settings["allow_ignored_class"], "allow_ignored_class")
        check_flag(settings["align_corners"], "align_corners")
        check_choice(settings["resolution"], "resolution", functional.RESOLUTIONS)
        return checked

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def forward(
        self,
        student_logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor,
        *,
        normalizer: functional.Normalizer | None = None,
    ) -> DistillationOutput:
        return channel_wise_distillation(
            student_logits,
            target,
            teacher_logits,
            normalizer=normalizer,
            process_group=self.process_group,
            **self._settings(),
        )
