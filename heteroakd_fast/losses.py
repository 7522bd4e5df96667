"""Losses as modules: the part of a trainer's configuration that has parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .functional import Normalizer
from .output import DistillationOutput
from .projector import PROJECTORS, Projector
from .spec import LossSpec

__all__ = ["HeteroAKDLoss"]


class HeteroAKDLoss(nn.Module):
    """Distillation across architectures (HeteroAKD; Huang et al., AAAI 2025, arXiv 2504.07691).

    With `student_channels` and `teacher_channels` the module owns two 1x1 projectors that map
    intermediate features to aligned logits: `ce` and `kd` are taken on the final logits,
    `hetero`, `feature` and `projector` on the projected pair. Without them every term is taken on
    the final logits. Give the module's parameters to the optimizer, and keep its state in your
    checkpoints, when it has projectors.

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
        tau: sharpness of the reliability ("softmax-kl"), from 1e-4 to 1e4.
        mix, evaluation, weight_axis, kd_divergence, kd_beta: see `functional.distillation_loss`;
            mix="teacher" and evaluation="none" are the ablations without knowledge mixing and
            without knowledge evaluation.
        projector: "linear" or "conv-bn-relu"; None takes the preset's own.
        ignore_index, align_corners, label_smoothing, resolution, process_group, backend: see
            `functional.cross_entropy`.
        class_weight: [C] tensor or sequence, >= 0, of the cross entropies; copied into a buffer.

    Raises:
        TypeError, ValueError: an option is wrong; names it and what was expected.
    """

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
        ignore_index: int = 255,
        align_corners: bool = False,
        class_weight: Tensor | list[float] | tuple[float, ...] | None = None,
        label_smoothing: float = 0.0,
        resolution: str = "label",
        process_group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = _positive_int(num_classes, "num_classes", functional.MAX_CLASSES)
        if (student_channels is None) != (teacher_channels is None):
            raise ValueError(
                f"student_channels, teacher_channels: got {student_channels} and "
                f"{teacher_channels}; give both (features are projected) or neither"
            )
        self.weights = {
            name: functional.check_number(weight, f"{name}_weight")
            for name, weight in (
                ("ce", ce_weight),
                ("kd", kd_weight),
                ("hetero", hetero_weight),
                ("feature", feature_weight),
                ("projector", projector_weight),
            )
        }
        if not any(self.weights.values()):
            raise ValueError(f"weights: all of {', '.join(self.weights)} are 0; nothing to compute")
        self.options: dict[str, Any] = {
            "preset": preset,
            "temperature": functional.check_number(temperature, "temperature"),
            "tau": functional.check_number(tau, "tau"),
            "mix": functional.resolve_mix(preset, mix),
            "evaluation": "discrepancy" if evaluation is None else evaluation,
            "weight_axis": weight_axis,
            "kd_divergence": kd_divergence,
            "kd_beta": functional.check_number(kd_beta, "kd_beta"),
            "ignore_index": ignore_index,
            "align_corners": align_corners,
            "label_smoothing": functional.check_number(label_smoothing, "label_smoothing"),
        }
        # A typo in a config should fail when the trainer is built, not at the first batch.
        functional.check_spec(LossSpec(terms=("ce",), **self.options))
        functional.check_choice(resolution, "resolution", functional.RESOLUTIONS)
        if backend is not None:
            functional.check_choice(backend, "backend", functional.BACKENDS)
        kind = projector
        if kind is None:
            kind = "conv-bn-relu" if preset == "paper" else "linear"
        functional.check_choice(kind, "projector", PROJECTORS)
        self.options |= {"resolution": resolution, "backend": backend}
        self.process_group = process_group

        weight = None
        if class_weight is not None:
            weight = torch.as_tensor(class_weight).detach().clone()
            weight = weight if weight.is_floating_point() else weight.float()
            if weight.shape != (num_classes,):
                raise ValueError(
                    f"class_weight: got shape {tuple(weight.shape)}, expected ({num_classes},)"
                )
        self.register_buffer("class_weight", weight)

        self.student_projector: Projector | None = None
        self.teacher_projector: Projector | None = None
        if student_channels is not None and teacher_channels is not None:
            self.student_projector = Projector(
                _positive_int(student_channels, "student_channels"), num_classes, kind
            )
            self.teacher_projector = Projector(
                _positive_int(teacher_channels, "teacher_channels"), num_classes, kind
            )

    def extra_repr(self) -> str:
        parts = {"num_classes": self.num_classes, **self.options}
        parts |= {f"{name}_weight": weight for name, weight in self.weights.items()}
        return ", ".join(f"{name}={value!r}" for name, value in parts.items())

    def forward(
        self,
        student_logits: Tensor,
        target: Tensor,
        *,
        teacher_logits: Tensor | None = None,
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
        self._check_classes(student_logits)
        if self.student_projector is None or self.teacher_projector is None:
            return self._on_logits(
                student_logits,
                target,
                teacher_logits,
                student_features,
                teacher_features,
                normalizer,
                return_maps,
            )
        return self._on_features(
            student_logits,
            target,
            teacher_logits,
            student_features,
            teacher_features,
            normalizer,
            return_maps,
        )

    def _on_logits(
        self,
        student_logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None,
        student_features: Tensor | None,
        teacher_features: Tensor | None,
        normalizer: Normalizer | None,
        return_maps: bool,
    ) -> DistillationOutput:
        for features, name in (
            (student_features, "student_features"),
            (teacher_features, "teacher_features"),
        ):
            if features is not None:
                raise ValueError(
                    f"{name}: given, but the loss has no projectors; build it with "
                    "student_channels and teacher_channels, or leave the features out"
                )
        one = functional.run(
            student_logits,
            teacher_logits,
            target,
            {name: self.weights[name] for name in ("ce", "kd", "hetero", "feature")},
            class_weight=self.class_weight,
            return_maps=return_maps,
            **self.options,
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
        on_final = {name: self.weights[name] for name in ("ce", "kd")}
        on_projected = {
            "ce": self.weights["projector"],
            "teacher_ce": self.weights["projector"],
            "hetero": self.weights["hetero"],
            "feature": self.weights["feature"],
        }
        passes: list[functional.WeightedPass] = []
        options = {"class_weight": self.class_weight, **self.options}
        if any(on_final.values()):
            passes.append(
                functional.run(student_logits, teacher_logits, target, on_final, **options)
            )
        projected = None
        if any(on_projected.values()) or return_maps:
            student_features = _checked(self.student_projector, student_features, "student")
            teacher_features = _checked(self.teacher_projector, teacher_features, "teacher")
            if self.options["resolution"] == "logits" and not return_maps:
                projected = self._fused(student_features, teacher_features, target, on_projected)
            if projected is None:
                student_z: Tensor = self.student_projector(student_features)
                teacher_z: Tensor = self.teacher_projector(teacher_features)
                if not self.weights["projector"]:
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
            if self.weights["projector"]:
                reported["projector"] = values["ce"] + values["teacher_ce"]
            reported |= {name: values[name] for name in ("hetero", "feature") if name in values}
        return DistillationOutput(
            loss=loss,
            valid=passes[0].sums.valid,
            maps=None if projected is None else projected.maps,
            # On two grids "ce" has two denominators, and a name stands for one.
            denominators=None if self.options["resolution"] == "logits" else denominators,
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

        options = dict(self.options)
        backend = options.pop("backend")
        del options["resolution"], options["align_corners"]
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
            target,
            weights,
            class_weight=self.class_weight,
            backend=backend,
            **options,
        )

    def _check_classes(self, student_logits: Tensor) -> None:
        functional.check_tensor(
            student_logits, "student_logits", 4, "[B, C, h, w]", functional.LOGITS_DTYPES
        )
        if student_logits.shape[1] != self.num_classes:
            raise ValueError(
                f"student_logits: got C={student_logits.shape[1]} classes, the loss was built "
                f"with num_classes={self.num_classes}"
            )


def _checked(projector: Projector, features: Tensor | None, side: str) -> Tensor:
    """The features, as a projector can take them."""
    name = f"{side}_features"
    if features is None:
        raise ValueError(
            f"{name}: got None, but the loss was built with projectors; pass the {side}'s feature "
            "map, or build the loss without student_channels and teacher_channels"
        )
    functional.check_tensor(features, name, 4, "[B, D, h, w]", functional.LOGITS_DTYPES)
    if features.shape[1] != projector.conv.in_channels:
        raise ValueError(
            f"{name}: got D={features.shape[1]} channels, the loss was built with "
            f"{side}_channels={projector.conv.in_channels}"
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


def _positive_int(value: object, name: str, largest: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive integer")
    if largest is not None and value > largest:
        raise ValueError(f"{name}: got {value}, expected at most {largest}")
    return value
