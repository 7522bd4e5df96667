"""Channel-wise distillation alone, as a module; beside other terms it is `terms.CWD`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ._checks import check_temperature, refuse_unknown
from ._evaluate import DEFAULTS, LossOptions, Normalizer, check_options
from .functional import CWD_OPTIONS, CWD_RENAMED, channel_wise_distillation
from .modules import AdjustableLoss
from .output import DistillationOutput
from .projector import Projection

__all__ = ["ChannelWiseLoss", "channel_wise_distillation"]


class ChannelWiseLoss(AdjustableLoss):
    """`functional.channel_wise_distillation` as a module; arguments as there, and attributes: they
    may be set, and are checked then.

    Published weights: 3 beside the cross entropy for logits (T = 4, mean over images and classes);
    5 on Cityscapes and 10 on ADE20K with T = 1 in other configurations.
    """

    _adjustable = ("temperature", *(name for name in CWD_OPTIONS if name != "process_group"))
    _renamed: ClassVar = CWD_RENAMED

    def __init__(self, *, temperature: float = 4.0, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        refuse_unknown(options.keys() - set(CWD_OPTIONS), self._arguments(), self._renamed)
        settings = {**DEFAULTS, **options, "temperature": temperature}
        self.__dict__.update(self._check_settings(settings))
        self.process_group = options.get("process_group")

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        checked = check_options({k: v for k, v in settings.items() if k in DEFAULTS})
        temperature = check_temperature(settings["temperature"], "temperature")
        return {"temperature": temperature, **{k: checked[k] for k in self._adjustable[1:]}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def forward(
        self,
        student_logits: Tensor | Projection,
        target: Tensor,
        teacher_logits: Tensor | Projection,
        *,
        pixel_weight: Tensor | None = None,
        normalizer: Normalizer | None = None,
    ) -> DistillationOutput:
        options = {**self._settings(), "process_group": self.process_group}
        return channel_wise_distillation(
            student_logits,
            target,
            teacher_logits,
            pixel_weight=pixel_weight,
            normalizer=normalizer,
            **options,
        )
