"""Losses as modules: the part of a trainer's configuration that has parameters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final, NoReturn

import torch
from torch import Tensor

from . import functional
from .checks import (
    axis_hint,
    check_choice,
    check_constant,
    check_count,
    check_flag,
    check_ignore_index,
    check_ignored_class,
    check_integer,
    check_number,
    plain_tensor,
    refuse_forward_mode,
    refuse_unknown,
)
from .functional import Normalizer
from .modules import AdjustableLoss
from .output import DistillationOutput
from .projector import PROJECTORS, Projector
from .spec import LossSpec

__all__ = ["HeteroAKDLoss"]

_WEIGHTS: Final = tuple(f"{name}_weight" for name in ("ce", "kd", "hetero", "feature", "projector"))
_OPTIONS: Final = (
    "preset",
    "temperature",
    "tau",
    "mix",
    "evaluation",
    "weight_axis",
    "kd_divergence",
    "kd_beta",
    "ignore_index",
    "allow_ignored_class",
    "align_corners",
    "label_smoothing",
    "resolution",
    "backend",
)
_NUMBERS: Final = (*_WEIGHTS, "temperature", "tau", "kd_beta", "label_smoothing")
_SPEC_FIELDS: Final = {field.name for field in dataclasses.fields(LossSpec)}
_WITHOUT_TEACHER: Final = (
    "; to validate without a teacher, call .eval() on the loss, which then computes ce alone if "
    "ce_weight is not 0"
)


class HeteroAKDLoss(AdjustableLoss):
    """Distillation across architectures (HeteroAKD; Huang et al., AAAI 2025, arXiv 2504.07691).

    With `student_channels` and `teacher_channels` the module owns two 1x1 projectors that map
    intermediate features to aligned logits: `ce` and `kd` are taken on the final logits,
    `hetero`, `feature` and `projector` on the projected pair. Without them every term is taken on
    the final logits. Give the module's parameters to the optimizer, and keep its state in your
    checkpoints, when it has projectors.

    Every argument is an attribute too. Weights and options may be set during training, as in
    `loss.kd_weight = 0.5`; what is set is checked as in the constructor and counts from the next
    call. `num_classes`, the channels and the kind of projector are fixed.

    Reimplemented from public descriptions: there is no official code and no result of the paper
    is claimed. The formulas are in `docs/method.md`.

    Args:
        num_classes: C, 1 to 4096.
        student_channels, teacher_channels: channels of the features, both or neither.
        preset: "softmax-kl" or "paper".
        ce_weight, kd_weight, hetero_weight, feature_weight, projector_weight: weights of the
            terms; 0 leaves a term out. `projector` is the cross entropy of both projected logits
            and the only term that trains the teacher's projector.
        temperature: T of `kd` and `hetero`, from 1e-4 to 1e4.
        tau: sharpness of the reliability ("softmax-kl"), from 1e-4 to 1e4; no temperature.
        mix, evaluation, weight_axis, kd_divergence, kd_beta: see `functional.distillation_loss`;
            mix="teacher" and evaluation="none" are the ablations without knowledge mixing and
            without knowledge evaluation.
        projector: "linear" or "conv-bn-relu"; None takes the preset's own.
        ignore_index, allow_ignored_class, align_corners, label_smoothing, resolution,
            process_group, backend: see `functional.cross_entropy`. Copies of the module share
            the process group.
        class_weight: [C] tensor or sequence, >= 0, of the cross entropies; copied into a buffer.

    Raises:
        TypeError, ValueError: an option is wrong; names it and what was expected.
    """

    _adjustable = (*_WEIGHTS, *_OPTIONS, "class_weight")
    _fixed = ("num_classes", "student_channels", "teacher_channels", "projector")
    _renamed: ClassVar = {"T": "temperature", "weight": "class_weight"}

    num_classes: int
    ce_weight: float
    kd_weight: float
    hetero_weight: float
    feature_weight: float
    projector_weight: float
    preset: str
    temperature: float
    tau: float
    mix: str | None
    evaluation: str | None
    weight_axis: str
    kd_divergence: str
    kd_beta: float
    ignore_index: int | None
    allow_ignored_class: bool
    align_corners: bool
    label_smoothing: float
    resolution: str
    backend: str | None
    projector: str
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        preset: str = "softmax-kl",
        ce_weight: float = 1.0,
        kd_weight: float = 0.1,
        hetero_weight: float = 1.0,
        feature_weight: float = 0.0,
        projector_weight: float = 1.0,
        temperature: float = 1.0,
        tau: float = 1.0,
        mix: str | None = None,
        evaluation: str | None = None,
        weight_axis: str = "class",
        kd_divergence: str = "forward",
        kd_beta: float = 0.5,
        projector: str | None = None,
        ignore_index: int | None = 255,
        allow_ignored_class: bool = False,
        align_corners: bool = False,
        class_weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        resolution: str = "label",
        process_group: Any = None,
        backend: str | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown, self._arguments(), self._renamed)
        given = locals()
        classes = check_count(num_classes, "num_classes", functional.MAX_CLASSES)
        if (student_channels is None) != (teacher_channels is None):
            raise ValueError(
                f"student_channels, teacher_channels: got {student_channels} and "
                f"{teacher_channels}; give both (features are projected) or neither"
            )
        kind = projector
        if kind is None:
            kind = "conv-bn-relu" if preset == "paper" else "linear"
        self.__dict__["num_classes"] = classes
        # A typo in a config should fail when the trainer is built, not at the first batch.
        settings = self._check_settings({name: given[name] for name in self._adjustable})
        check_choice(kind, "projector", PROJECTORS)
        if not any(settings[name] for name in _WEIGHTS):
            terms = ", ".join(name.removesuffix("_weight") for name in _WEIGHTS)
            raise ValueError(f"weights: all of {terms} are 0; nothing to compute")
        if settings["tau"] != 1.0 and not settings["hetero_weight"]:
            warnings.warn(
                "tau: only the reliability of hetero reads it, and hetero_weight is 0; the "
                "temperature of kd (mmrazor's tau) is called temperature",
                stacklevel=2,
            )
        self.register_buffer("class_weight", settings.pop("class_weight"))
        self.__dict__.update(settings, projector=kind)
        self.process_group = process_group
        self.student_projector: Projector | None = None
        self.teacher_projector: Projector | None = None
        if student_channels is not None and teacher_channels is not None:
            self.student_projector = Projector(
                check_count(student_channels, "student_channels"), classes, kind
            )
            self.teacher_projector = Projector(
                check_count(teacher_channels, "teacher_channels"), classes, kind
            )

    @property
    def student_channels(self) -> int | None:
        """Channels of the student's features, None without projectors."""
        return None if self.student_projector is None else self.student_projector.conv.in_channels

    @property
    def teacher_channels(self) -> int | None:
        """Channels of the teacher's features, None without projectors."""
        return None if self.teacher_projector is None else self.teacher_projector.conv.in_channels

    @property
    def options(self) -> Mapping[str, Any]:
        """All options but the weights, by name, to read; they are set as attributes."""
        return MappingProxyType(self._settings(*_OPTIONS))

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        checked = {
            name: check_number(value, name) if name in _NUMBERS else value
            for name, value in settings.items()
        }
        if settings["ignore_index"] is not None:
            checked["ignore_index"] = check_integer(settings["ignore_index"], "ignore_index")
        check_ignored_class(
            settings["ignore_index"], self.num_classes, settings["allow_ignored_class"]
        )
        check_flag(settings["align_corners"], "align_corners")
        functional.check_spec(LossSpec(terms=("ce",), **_spec_fields(checked)))
        check_choice(settings["resolution"], "resolution", functional.RESOLUTIONS)
        if settings["backend"] is not None:
            check_choice(settings["backend"], "backend", functional.BACKENDS)
        return checked | {"class_weight": self._own_weight(settings["class_weight"])}

    def _own_weight(self, value: Any) -> Tensor | None:
        """Class weights as the buffer keeps them: a copy, floating point, on the module's device
        where a sequence comes."""
        current = self._buffers.get("class_weight")
        if value is None or value is current:
            return current if value is current else None
        device = None if current is None or isinstance(value, Tensor) else current.device
        given = plain_tensor(torch.as_tensor(value, device=device))
        check_constant(given, "class_weight")
        weight = given.detach().clone()
        weight = weight if weight.is_floating_point() else weight.float()
        if weight.shape != (self.num_classes,):
            raise ValueError(
                f"class_weight: got shape {tuple(weight.shape)}, expected ({self.num_classes},)"
            )
        return weight

    def extra_repr(self) -> str:
        names = ("num_classes", *_OPTIONS, *_WEIGHTS)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        student_logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        *,
        student_features: Tensor | None = None,
        teacher_features: Tensor | None = None,
        normalizer: Normalizer | None = None,
        return_maps: bool = False,
    ) -> DistillationOutput:
        """The weighted sum of the terms.

        Args:
            student_logits: [B, C, h, w], the student's final logits at any resolution.
            target: [B, H, W], int64, int32 or uint8.
            teacher_logits: [B, C, h', w'], without gradient; needed by `kd`, and without
                projectors by `hetero` and `feature`.
            student_features, teacher_features: [B, D_s, ., .] and [B, D_t, ., .]; needed with
                projectors. The teacher's are detached.
            normalizer: see `functional.distillation_loss`; applies to every pass.
            return_maps: fills `maps` (reliability and discrepancy).

        Raises:
            TypeError, ValueError: an argument is missing, superfluous or has the wrong type,
                dtype, shape or device.
        """
        student_logits = plain_tensor(student_logits)
        student_features = plain_tensor(student_features)
        teacher_features = plain_tensor(teacher_features)
        self._check_classes(student_logits)
        features = {"student_features": student_features, "teacher_features": teacher_features}
        absent = teacher_logits is None and all(value is None for value in features.values())
        if absent and not self.training and self.ce_weight:
            weights = {"ce": self.ce_weight}
            return self._on_logits(student_logits, target, None, weights, normalizer, return_maps)
        if self.student_projector is not None:
            return self._on_features(
                student_logits,
                target,
                teacher_logits,
                student_features,
                teacher_features,
                normalizer,
                return_maps,
            )
        for name, value in features.items():
            if value is not None:
                raise ValueError(
                    f"{name}: given, but the loss has no projectors; build it with "
                    "student_channels and teacher_channels, or leave the features out"
                )
        weights = self._weights("ce", "kd", "hetero", "feature")
        _check_teacher_is_there(teacher_logits, weights)
        return self._on_logits(
            student_logits, target, teacher_logits, weights, normalizer, return_maps
        )

    def _weights(self, *terms: str) -> dict[str, float]:
        return {term: getattr(self, f"{term}_weight") for term in terms}

    def _on_logits(
        self,
        student_logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None,
        weights: dict[str, float],
        normalizer: Normalizer | None,
        return_maps: bool,
    ) -> DistillationOutput:
        one = functional.run(
            student_logits,
            teacher_logits,
            target,
            weights,
            class_weight=self.class_weight,
            return_maps=return_maps,
            **self._settings(*_OPTIONS),
        )
        loss, (terms,), denominators = functional.combine([one], normalizer, self.process_group)
        return DistillationOutput(
            loss=loss, valid=one.sums.valid, maps=one.maps, denominators=denominators, **terms
        )

    def _on_features(
        self,
        student_logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None,
        student_features: Tensor | None,
        teacher_features: Tensor | None,
        normalizer: Normalizer | None,
        return_maps: bool,
    ) -> DistillationOutput:
        assert self.student_projector is not None
        assert self.teacher_projector is not None
        on_final = self._weights("ce", "kd")
        on_projected = {
            "ce": self.projector_weight,
            "teacher_ce": self.projector_weight,
            **self._weights("hetero", "feature"),
        }
        passes: list[functional.WeightedPass] = []
        options = {"class_weight": self.class_weight, **self._settings(*_OPTIONS)}
        if any(on_final.values()):
            _check_teacher_is_there(teacher_logits, on_final)
            # Without kd nothing reads its logits, which may be of other classes.
            passes.append(
                functional.run(
                    student_logits,
                    teacher_logits if self.kd_weight else None,
                    target,
                    on_final,
                    **options,
                )
            )
        projected = None
        if any(on_projected.values()) or return_maps:
            student_features = _checked(self.student_projector, student_features, "student")
            teacher_features = _checked(self.teacher_projector, teacher_features, "teacher")
            if self.resolution == "logits" and not return_maps:
                projected = self._fused(student_features, teacher_features, target, on_projected)
            if projected is None:
                student_z: Tensor = self.student_projector(student_features)
                teacher_z: Tensor = self.teacher_projector(teacher_features)
                if not self.projector_weight:
                    refuse_forward_mode(teacher_z, "teacher_projector")
                    teacher_z = teacher_z.detach()
                projected = functional.run(
                    student_z, teacher_z, target, on_projected, return_maps=return_maps, **options
                )
            passes.append(projected)
        if not passes:
            raise ValueError("weights: every term has weight 0; nothing to compute")
        loss, terms, denominators = functional.combine(passes, normalizer, self.process_group)
        reported: dict[str, Tensor] = {}
        for one, values in zip(passes, terms, strict=True):
            if one is not projected:
                reported |= values
                continue
            if self.projector_weight:
                reported["projector"] = values["ce"] + values["teacher_ce"]
            reported |= {name: values[name] for name in ("hetero", "feature") if name in values}
        return DistillationOutput(
            loss=loss,
            valid=passes[0].sums.valid,
            maps=None if projected is None else projected.maps,
            # On two grids "ce" has two denominators, and a name stands for one.
            denominators=None if self.resolution == "logits" else denominators,
            **reported,
        )

    def _fused(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        target: Tensor,
        weights: dict[str, float],
    ) -> functional.WeightedPass | None:
        """Projection and loss in one kernel, where one exists for this call: nothing is
        interpolated at the features' own resolution, so the logits need not be stored."""
        assert self.student_projector is not None
        assert self.teacher_projector is not None
        if self.student_projector.bn is not None:
            return None
        from . import projected  # its operators are defined when they are first needed

        student, teacher = (
            projected.Projection(features, projector.conv.weight, projector.conv.bias)
            for features, projector in (
                (student_features, self.student_projector),
                (teacher_features, self.teacher_projector),
            )
        )
        return projected.fused_pass(
            student,
            teacher,
            plain_tensor(target),
            weights,
            class_weight=self.class_weight,
            backend=self.backend,
            **_spec_fields(self._settings(*_OPTIONS)),
        )

    def _check_classes(self, student_logits: Tensor) -> None:
        functional.check_tensor(
            student_logits, "student_logits", 4, "[B, C, h, w]", functional.LOGITS_DTYPES
        )
        if student_logits.shape[1] != self.num_classes:
            raise ValueError(
                f"student_logits: got C={student_logits.shape[1]} classes, the loss was built "
                f"with num_classes={self.num_classes}"
                + axis_hint(student_logits.shape, self.num_classes, "student_logits", tapped=False)
            )


def _check_teacher_is_there(teacher_logits: Tensor | None, weights: Mapping[str, float]) -> None:
    needed = next((name for name, weight in weights.items() if weight and name != "ce"), None)
    if teacher_logits is None and needed is not None:
        raise ValueError(
            f"teacher_logits: got None, but {needed}_weight is not 0; pass the teacher's logits or "
            f"set {needed}_weight=0{_WITHOUT_TEACHER}"
        )


def _checked(projector: Projector, features: Tensor | None, side: str) -> Tensor:
    """The features, as a projector can take them."""
    name, depth = f"{side}_features", projector.conv.in_channels
    if features is None:
        raise ValueError(
            f"{name}: got None, but the loss was built with projectors; pass the {side}'s feature "
            "map, or build the loss without student_channels and teacher_channels"
            + _WITHOUT_TEACHER
        )
    hint = axis_hint(features.shape, depth, name) if isinstance(features, Tensor) else ""
    functional.check_tensor(features, name, 4, "[B, D, h, w]", functional.LOGITS_DTYPES, hint)
    if features.shape[1] != depth:
        raise ValueError(
            f"{name}: got D={features.shape[1]} channels, the loss was built with "
            f"{side}_channels={depth}{hint}"
        )
    if features.device != projector.conv.weight.device:
        raise ValueError(
            f"{name}: is on {features.device}, the loss's projectors on "
            f"{projector.conv.weight.device}; move the loss with .to(...)"
        )
    if side == "teacher":
        features = features.detach()
    if not torch.compiler.is_compiling() and features.is_inference():
        features = features.clone()  # a convolution saves its input, which inference forbids
    return features


def _spec_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are fields of `LossSpec`, as they are there."""
    fields = {name: value for name, value in options.items() if name in _SPEC_FIELDS}
    fields["mix"] = functional.resolve_mix(options["preset"], options["mix"])
    if options["evaluation"] is None:
        fields["evaluation"] = "discrepancy"
    fields["ignore_index"] = check_ignore_index(options["ignore_index"])
    return fields
