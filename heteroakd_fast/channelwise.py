"""Channel-wise distillation (CWD): where in the image a class lies, rather than which it is.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, Eq. 4. In plain
PyTorch: at the logits' own resolution, as published, it costs little. What the published code does
otherwise: it takes the logarithm of a softmax (not finite for confident logits), counts ignored
pixels, and needs both sides on one grid.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import ops, reference
from ._checks import (
    check_constant,
    check_ignore_index,
    check_ignored_class,
    check_sides,
    check_temperature,
    plain_tensor,
    refuse_unknown,
)
from ._evaluate import (
    DEFAULTS,
    LossOptions,
    Normalizer,
    check_normalizer,
    check_options,
    mean_over_ranks,
)
from .labels import nearest_labels
from .modules import AdjustableLoss
from .output import DistillationOutput

__all__ = ["ChannelWiseLoss", "channel_wise_distillation"]

_RENAMED: Final = {"tau": "temperature", "T": "temperature"}  # mmrazor and others
# It has no cross entropy, and no kernel yet.
_OPTIONS: Final = tuple(name for name in DEFAULTS if name not in ("class_weight", "backend"))


def channel_wise_distillation(
    student_logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    normalizer: Normalizer | None = None,
    **options: Unpack[LossOptions],
) -> DistillationOutput:
    """T^2 / (N C) sum over images and classes of KL(softmax over space of z_t / T, of z_s / T).

    N counts the images that have a valid pixel; ignored pixels are in no softmax. Computed in
    float32 or wider; the gradient reaches the student only.

    Args:
        student_logits: [B, C, h, w], float32, bfloat16, float16 or float64.
        target: [B, H, W], int64, int32 or uint8; only which pixels are ignored matters.
        teacher_logits: [B, C, h', w'], resampled to the grid of the loss.
        temperature: T, from 1e-4 to 1e4; 4 in the paper. mmrazor calls it tau.
        normalizer: replaces N C; a number, or {"cwd": number} as in `denominators`.
        options: `ignore_index`, `allow_ignored_class`, `align_corners`, `resolution` and
            `process_group`, as in `functional.segmentation_loss`. "label", the default resolution,
            materialises both sides' full-resolution logits; "logits" is what was published.

    Returns:
        A `DistillationOutput` with `loss`, the term `cwd`, `valid` and `denominators`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    refuse_unknown(options.keys() - set(_OPTIONS), ("temperature", *_OPTIONS), _RENAMED)
    checked = check_options(options)
    temperature = check_temperature(temperature, "temperature")
    return _evaluate(student_logits, target, teacher_logits, temperature, normalizer, checked)


def _evaluate(
    student_logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    normalizer: Normalizer | None,
    options: dict[str, Any],
) -> DistillationOutput:
    if teacher_logits is None:
        raise TypeError("teacher_logits: got None, expected a tensor [B, C, h', w']")
    student_logits, teacher_logits = plain_tensor(student_logits), plain_tensor(teacher_logits)
    target = plain_tensor(target)
    classes = check_sides(student_logits, target, teacher_logits)
    _, _, height, width = student_logits.shape
    check_ignored_class(options["ignore_index"], classes, options["allow_ignored_class"])
    check_constant(teacher_logits, "teacher_logits")
    ignored = check_ignore_index(options["ignore_index"])
    valid_count = ops.valid_count(target, classes, ignored)
    if options["resolution"] == "logits":
        target = nearest_labels(target, (height, width))
    if target.numel() == 0:
        numerator = student_logits[:0].sum(dtype=torch.float64)
        images = torch.zeros_like(numerator)
    else:
        numerator, images = _sums(
            student_logits, teacher_logits, target != ignored, temperature, options["align_corners"]
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    denominator = images * classes
    if options["process_group"] is not None:
        denominator = mean_over_ranks(denominator, options["process_group"])
    replaced = check_normalizer(normalizer, [("cwd", 0)], ["valid"])
    divisor = torch.as_tensor(
        plain_tensor(replaced.get(0, denominator)), dtype=torch.float64, device=target.device
    )
    cwd = (numerator * torch.where(divisor == 0, 0.0, 1.0 / divisor.reshape(()))).to(dtype)
    return DistillationOutput(
        loss=cwd,
        terms={"cwd": cwd.detach()},
        valid=valid_count,
        denominators={"cwd": denominator},
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
    # reach neither the values nor the gradients. An image without a valid pixel has no softmax.
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

    _adjustable = ("temperature", *(name for name in _OPTIONS if name != "process_group"))
    _renamed: ClassVar = _RENAMED

    def __init__(self, *, temperature: float = 4.0, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        refuse_unknown(options.keys() - set(_OPTIONS), self._arguments(), self._renamed)
        self.__dict__.update(self._check_settings({**options, "temperature": temperature}))
        self.process_group = options.get("process_group")

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        checked = check_options({k: v for k, v in settings.items() if k in DEFAULTS})
        temperature = check_temperature(settings["temperature"], "temperature")
        return {"temperature": temperature, **{k: checked[k] for k in self._adjustable[1:]}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def forward(
        self,
        student_logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor,
        *,
        normalizer: Normalizer | None = None,
    ) -> DistillationOutput:
        options = {**self._settings(), "process_group": self.process_group}
        temperature = options.pop("temperature")
        return _evaluate(student_logits, target, teacher_logits, temperature, normalizer, options)
