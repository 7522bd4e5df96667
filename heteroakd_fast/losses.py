"""Losses as modules: the part of a trainer's configuration that has parameters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._checks import (
    LOGITS_DTYPES,
    MAX_CLASSES,
    Side,
    axis_hint,
    check_choice,
    check_count,
    check_flag,
    check_ignore_index,
    check_ignored_class,
    check_tensor,
    check_unlabelled_index,
    check_weight,
    plain_tensor,
    refuse_forward_mode,
    refuse_unknown,
)
from ._evaluate import (
    DEFAULTS,
    LossOptions,
    Normalizer,
    Part,
    check_options,
    count_pixels,
    describe,
    evaluate,
    normalizer_of_counts,
)
from .functional import OF_TERMS, check_terms, with_maps
from .modules import AdjustableLoss
from .output import DistillationOutput
from .projector import PROJECTORS, Projection, Projector
from .spec import Numbers, Shape, names_of, numbers_of, shape_of, vector
from .terms import (
    FLAT,
    FLAT_DEFAULTS,
    FLAT_WEIGHTS,
    TERMS,
    CrossEntropy,
    FlatOptions,
    Term,
    check_flat,
    from_flat,
)

__all__ = ["HeteroAKDLoss", "HeteroAKDOptions", "SegmentationLoss"]

_COMMON: Final = tuple(name for name in DEFAULTS if name != "process_group")


class _Encoded(NamedTuple):
    """Terms as `Part` takes them, without maps or with them."""

    shape: Shape
    numbers: tuple[float, ...]
    vector: Tensor

    def part(self, student: Side, teacher: Side | None, **more: Any) -> Part:
        compiling = torch.compiler.is_compiling()
        numbers: Numbers = self.vector if compiling else self.numbers
        return Part(self.shape, numbers, student, teacher, **more)


def _encode(terms: Sequence[Term]) -> tuple[_Encoded, _Encoded]:
    """Without maps and with them."""
    asked = tuple(term for term in terms if term.weight != 0.0)
    without, mapped = (
        _Encoded(shape_of(some), numbers_of(some), vector(numbers_of(some)))
        for some in (asked, with_maps(tuple(terms)))
    )
    return without, mapped


_WITHOUT_TEACHER: Final = (
    "; to validate without a teacher, call .eval() on the loss, which then computes ce alone"
)


def _check_named_weights(weights: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """What `set_weights` is given; names: those of the loss's terms."""
    renamed = {f"{name}_weight": name for name in names}
    renamed |= {term.__name__: term.name for term in TERMS if term.name in names}
    refuse_unknown(weights.keys() - set(names), names, renamed, "term of this loss")
    return {name: check_weight(weight, name) for name, weight in weights.items()}


class SegmentationLoss(AdjustableLoss):
    """A weighted sum of terms: `functional.segmentation_loss` as a module.

        loss_fn = SegmentationLoss(CrossEntropy(), KD(0.1), HeteroAKD(temperature=2.0))
        out = loss_fn(student_logits, target, teacher_logits)
        out.loss.backward()

    `terms` and the options are attributes: what is set is checked and counts from the next call.
    `set_weights` changes weights alone, which recompiles nothing under `torch.compile`, unless one
    becomes 0 or was 0. In `eval()` without a teacher the cross entropy terms are computed alone.

    Args:
        terms: of `heteroakd_fast.terms`.
        options: `class_weight` ([C] tensor or sequence, >= 0, copied into a buffer),
            `ignore_index`, `unlabelled_index`, `allow_ignored_class`, `align_corners`,
            `resolution`, `process_group` (copies of the module share it) and `backend`, as in
            `functional.segmentation_loss`.

    Raises:
        TypeError, ValueError: an option is wrong; names it and what was expected.
    """

    terms: tuple[Term, ...]

    _adjustable = ("terms", *_COMMON)
    _renamed: ClassVar = {
        **OF_TERMS,
        **{f"{term.name}_weight": f"set_weights({term.name}=...)" for term in TERMS},
    }

    def __init__(self, *terms: Term, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        refuse_unknown(options.keys() - DEFAULTS.keys(), self._arguments()[1:], self._renamed)
        settings = self._check_settings({**DEFAULTS, **options, "terms": terms})
        self.register_buffer("class_weight", settings.pop("class_weight"))
        self.process_group = settings.pop("process_group")
        self.__dict__.update(settings)
        self._encode()

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        terms = check_terms(settings["terms"])
        checked = check_options({k: v for k, v in settings.items() if k != "terms"})
        checked["class_weight"] = self._own_class_weight(checked["class_weight"], None)
        return {**checked, "terms": terms}

    def _encode(self) -> None:
        terms = self.terms
        self._encoded = _encode(terms)
        self._cross_entropies = _encode([t for t in terms if isinstance(t, CrossEntropy)])

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term, by its name in `DistillationOutput.terms`."""
        names = names_of(shape_of(self.terms))
        return MappingProxyType({n: t.weight for n, t in zip(names, self.terms, strict=True)})

    def set_weights(self, **weights: float) -> None:
        """Sets the weights of some terms, by name: `loss_fn.set_weights(kd=0.05)`.

        Raises:
            TypeError, ValueError: names the term; no weight has changed.
        """
        weights = _check_named_weights(weights, tuple(self.weights))
        self.terms = tuple(
            dataclasses.replace(term, weight=weights.get(name, term.weight))
            for name, term in zip(self.weights, self.terms, strict=True)
        )

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in _COMMON)
        return ",\n".join((*map(repr, self.terms), options))

    def forward(
        self,
        student_logits: Tensor | Projection,
        target: Tensor,
        teacher_logits: Tensor | Projection | None = None,
        *,
        pixel_weight: Tensor | None = None,
        normalizer: Normalizer | None = None,
        return_maps: bool = False,
        diagnostics: bool = False,
    ) -> DistillationOutput:
        """The weighted sum of the terms; arguments as in `functional.segmentation_loss`."""
        parts = self._parts(student_logits, teacher_logits, return_maps)
        options = self._settings(*_COMMON, "process_group")
        return evaluate(parts, target, options, normalizer, return_maps, pixel_weight, diagnostics)

    def plan(
        self,
        student_logits: Tensor | Projection,
        target: Tensor,
        teacher_logits: Tensor | Projection | None = None,
        *,
        return_maps: bool = False,
    ) -> str:
        """The passes that such a call takes, each with its terms, gradients, backend and why."""
        parts = self._parts(student_logits, teacher_logits, return_maps)
        return describe(parts, target, self._settings(*_COMMON), return_maps)

    def _parts(
        self,
        student_logits: Tensor | Projection,
        teacher_logits: Tensor | Projection | None,
        maps: bool,
    ) -> list[Part]:
        check_flag(maps, "return_maps")
        encoded, hint = self._encoded, ""
        if teacher_logits is None and not maps and self._cross_entropies[0].shape:
            hint = _WITHOUT_TEACHER
            encoded = encoded if self.training else self._cross_entropies
        return [encoded[maps].part(student_logits, teacher_logits, without_teacher=hint)]


class HeteroAKDOptions(FlatOptions, LossOptions, total=False):
    """Keywords of `HeteroAKDLoss`, all but `teacher_ce_weight`."""

    projector_weight: float


_FLAT: Final = tuple(name for name in FLAT if name != "teacher_ce_weight")
_FLAT_WEIGHTS: Final = {k: name for k, name in FLAT_WEIGHTS.items() if k != "teacher_ce"}
_WEIGHTS: Final = tuple(f"{name}_weight" for name in ("ce", "kd", "hetero", "feature", "projector"))
_OPTIONS: Final = (
    *(name for name in _FLAT if name not in _WEIGHTS),
    *(name for name in _COMMON if name != "class_weight"),
)
_DEFAULT_WEIGHTS: Final = {"kd_weight": 0.1, "hetero_weight": 1.0, "projector_weight": 1.0}


class HeteroAKDLoss(AdjustableLoss):
    """Distillation across architectures (HeteroAKD; Huang et al., AAAI 2025, arXiv 2504.07691).

    With `student_channels` and `teacher_channels` the module owns two 1x1 projectors that map
    intermediate features to aligned logits: `ce` and `kd` are taken on the final logits,
    `hetero`, `feature` and `projector` on the projected pair. Without them every term is taken on
    the final logits. Give the module's parameters to the optimizer, and keep its state in your
    checkpoints, when it has projectors.

    Every argument is an attribute too. Weights and options may be set during training, as in
    `loss.kd_weight = 0.5`; what is set is checked as in the constructor and counts from the next
    call, and under `torch.compile` a new number recompiles nothing. `num_classes`, the channels and
    the kind of projector are fixed.

    Reimplemented from public descriptions: there is no official code and no result of the paper
    is claimed. The formulas are in `docs/method.md`.

    Args:
        num_classes: C, 1 to 4096.
        student_channels, teacher_channels: channels of the features, both or neither.
        projector: "linear" or "conv-bn-relu"; None takes the preset's own.
        options: the weights `ce_weight` (1 by default), `kd_weight` (0.1), `hetero_weight` (1),
            `feature_weight` (0) and `projector_weight` (1; the cross entropy of both projected
            logits, the only term that trains the teacher's projector), of which 0 leaves a term
            out; the options of `terms.HeteroAKD`, of `terms.KD` as `kd_divergence`, `kd_beta`,
            `kd_alpha` and `kd_standardize`, and `label_smoothing`; those of `SegmentationLoss`.

    Raises:
        TypeError, ValueError: an option is wrong; names it and what was expected.
    """

    _adjustable = (*_WEIGHTS, *_OPTIONS, "class_weight")
    _fixed = ("num_classes", "student_channels", "teacher_channels", "projector")
    _renamed: ClassVar = {"T": "temperature", "weight": "class_weight"}

    def __init__(
        self,
        num_classes: int,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        projector: str | None = None,
        **options: Unpack[HeteroAKDOptions],
    ) -> None:
        super().__init__()
        known = (*self._adjustable, "process_group")
        refuse_unknown(options.keys() - set(known), self._arguments(), self._renamed)
        classes = check_count(num_classes, "num_classes", MAX_CLASSES)
        if (student_channels is None) != (teacher_channels is None):
            raise ValueError(
                f"student_channels, teacher_channels: got {student_channels} and "
                f"{teacher_channels}; give both (features are projected) or neither"
            )
        self.__dict__["num_classes"] = classes
        # A typo in a config should fail when the trainer is built, not at the first batch.
        defaults = {**FLAT_DEFAULTS, **_DEFAULT_WEIGHTS, **DEFAULTS}
        settings = self._check_settings({name: {**defaults, **options}[name] for name in known})
        kind = projector
        if kind is None:
            kind = "conv-bn-relu" if settings["preset"] == "paper" else "linear"
        check_choice(kind, "projector", PROJECTORS)
        weights = _WEIGHTS if student_channels is not None else _WEIGHTS[:-1]  # no projector
        _check_weights({name: settings[name] for name in weights})
        if settings["tau"] != 1.0 and not settings["hetero_weight"]:
            warnings.warn(
                "tau: only the reliability of hetero reads it, and hetero_weight is 0; the "
                "temperature of kd (mmrazor's tau) is called temperature",
                stacklevel=2,
            )
        self.register_buffer("class_weight", settings.pop("class_weight"))
        self.process_group = settings.pop("process_group")
        self.__dict__.update(settings, projector=kind)
        self.student_projector: Projector | None = None
        self.teacher_projector: Projector | None = None
        if student_channels is not None and teacher_channels is not None:
            self.student_projector = Projector(
                check_count(student_channels, "student_channels"), classes, kind
            )
            self.teacher_projector = Projector(
                check_count(teacher_channels, "teacher_channels"), classes, kind
            )
        self._encode()

    @property
    def student_channels(self) -> int | None:
        """Channels of the student's features, None without projectors."""
        return None if self.student_projector is None else self.student_projector.conv.in_channels

    @property
    def teacher_channels(self) -> int | None:
        """Channels of the teacher's features, None without projectors."""
        return None if self.teacher_projector is None else self.teacher_projector.conv.in_channels

    def set_weights(self, **weights: float) -> None:
        """`loss_fn.set_weights(kd=0.05)` is `loss_fn.kd_weight = 0.05`, for several at once.

        Raises:
            TypeError, ValueError: names the term; no weight has changed.
        """
        names = tuple(name.removesuffix("_weight") for name in _WEIGHTS)
        for name, weight in _check_named_weights(weights, names).items():
            setattr(self, f"{name}_weight", weight)

    @property
    def options(self) -> Mapping[str, Any]:
        """All options but the weights, by name, to read; they are set as attributes."""
        return MappingProxyType(self._settings(*_OPTIONS))

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        flat = check_flat({name: settings[name] for name in _FLAT})
        from_flat({**FLAT_DEFAULTS, **flat})  # of which some go together only
        common = check_options({k: v for k, v in settings.items() if k in DEFAULTS})
        check_ignored_class(common["ignore_index"], self.num_classes, common["allow_ignored_class"])
        ignored = check_ignore_index(common["ignore_index"])
        check_unlabelled_index(common["unlabelled_index"], ignored, self.num_classes)
        common["class_weight"] = self._own_class_weight(common["class_weight"], self.num_classes)
        weight = check_weight(settings["projector_weight"], "projector_weight")
        return {**flat, "projector_weight": weight, **common}

    def _encode(self) -> None:
        settings = {**FLAT_DEFAULTS, **self._settings(*_FLAT)}
        terms = from_flat(settings)  # ce, teacher_ce, kd, hetero, feature
        ce, _, kd, hetero, feature = terms
        self._on_logits = _encode(terms)
        self._cross_entropy = _encode([ce])
        self._on_final = _encode([ce, kd])
        weight = self.projector_weight
        supervised = from_flat({**settings, "ce_weight": weight, "teacher_ce_weight": weight})
        self._on_projected = _encode([*supervised[:2], hetero, feature])

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
        pixel_weight: Tensor | None = None,
        normalizer: Normalizer | None = None,
        return_maps: bool = False,
        diagnostics: bool = False,
    ) -> DistillationOutput:
        """The weighted sum of the terms.

        Args:
            student_logits: [B, C, h, w], the student's final logits at any resolution.
            target: [B, H, W], int64, int32 or uint8.
            teacher_logits: [B, C, h', w'], without gradient; needed by `kd`, and without
                projectors by `hetero` and `feature`.
            student_features, teacher_features: [B, D_s, ., .] and [B, D_t, ., .]; needed with
                projectors. The teacher's are detached.
            pixel_weight, normalizer: see `functional.segmentation_loss`; of every pass.
            return_maps: fills `maps` (reliability and discrepancy).
            diagnostics: fills `diagnostics`, of the final logits.

        Raises:
            TypeError, ValueError: an argument is missing, superfluous or has the wrong type,
                dtype, shape or device.
        """
        parts = self._parts(
            student_logits, teacher_logits, student_features, teacher_features, return_maps
        )
        options = self._settings(*_COMMON, "process_group")
        output = evaluate(
            parts, target, options, normalizer, return_maps, pixel_weight, diagnostics
        )
        # On two grids "ce" has two denominators, and a name stands for one.
        apart = self.student_projector is not None and self.resolution == "logits"
        return output._replace(denominators=None) if apart else output

    def plan(
        self,
        student_logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        *,
        student_features: Tensor | None = None,
        teacher_features: Tensor | None = None,
        return_maps: bool = False,
    ) -> str:
        """The passes that such a call takes, each with its terms, gradients, backend and why."""
        parts = self._parts(
            student_logits, teacher_logits, student_features, teacher_features, return_maps
        )
        return describe(parts, target, self._settings(*_COMMON), return_maps)

    def count_pixels(self, target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """Return the numbers of labelled and of distilled pixels, or the sums of their weights.

        float64 [2], on the device of the labels: what `out.valid` and `out.distilled` will be
        (without weights). For `normalizer_of`, where batches are accumulated.
        """
        return count_pixels(target, self._settings(*_COMMON), pixel_weight)

    def normalizer_of(
        self, counts: Tensor | Sequence[float], *, with_teacher: bool = True
    ) -> Normalizer:
        """Return the `normalizer` that makes these counts the denominators.

        Of every term that divides by the number of labelled or of distilled pixels; the others
        keep their own. A scalar without `unlabelled_index`, otherwise a mapping of terms.

        Args:
            counts: labelled and distilled pixels, such as the mean of `count_pixels` over
                accumulated batches and ranks.
            with_teacher: False for a call in `eval()` that has no teacher and computes ce alone.
        """
        if not with_teacher:
            encoded = [self._cross_entropy]
        elif self.student_projector is None:
            encoded = [self._on_logits]
        else:
            encoded = [self._on_final, self._on_projected]
        shapes = [without.shape for without, _ in encoded]
        return normalizer_of_counts(shapes, self._settings(*_COMMON), counts)

    def _parts(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        student_features: Tensor | None,
        teacher_features: Tensor | None,
        maps: bool,
    ) -> list[Part]:
        check_flag(maps, "return_maps")
        student_logits = plain_tensor(student_logits)
        features = {
            "student_features": plain_tensor(student_features),
            "teacher_features": plain_tensor(teacher_features),
        }
        self._check_classes(student_logits)
        absent = teacher_logits is None and all(value is None for value in features.values())
        spelling: dict[str, Any] = {"weights": _FLAT_WEIGHTS}
        if self.ce_weight:
            spelling["without_teacher"] = _WITHOUT_TEACHER
            if absent and not self.training:
                return [self._cross_entropy[maps].part(student_logits, None, **spelling)]
        if self.student_projector is None or self.teacher_projector is None:
            for name, value in features.items():
                if value is not None:
                    raise ValueError(
                        f"{name}: given, but the loss has no projectors; build it with "
                        "student_channels and teacher_channels, or leave the features out"
                    )
            return [self._on_logits[maps].part(student_logits, teacher_logits, **spelling)]
        parts = []
        if self._on_final[0].shape:
            # Without kd nothing reads the teacher's logits, which may be of other classes.
            teacher = teacher_logits if self.kd_weight else None
            parts.append(self._on_final[0].part(student_logits, teacher, **spelling))
        if self._on_projected[0].shape or maps:
            names = {"ce": "projector", "teacher_ce": "projector"}
            batch = len(student_logits)
            student_side = _projected(
                self.student_projector, features["student_features"], "student", batch
            )
            teacher_side = _projected(
                self.teacher_projector, features["teacher_features"], "teacher", batch
            )
            if isinstance(teacher_side, Tensor) and not self.projector_weight:
                refuse_forward_mode(teacher_side, "teacher_projector")
                teacher_side = teacher_side.detach()
            encoded = self._on_projected[maps]
            spelling |= {"names": names, "called": "student_features"}
            parts.append(encoded.part(student_side, teacher_side, **spelling))
        if not parts:
            _check_weights(self._settings(*_WEIGHTS))
        return parts

    def _check_classes(self, student_logits: Tensor) -> None:
        if not isinstance(student_logits, Tensor) or student_logits.dim() != 4:
            check_tensor(student_logits, "student_logits", 4, "[B, C, h, w]", LOGITS_DTYPES)
        if student_logits.shape[1] != self.num_classes:
            raise ValueError(
                f"student_logits: got C={student_logits.shape[1]} classes, the loss was built "
                f"with num_classes={self.num_classes}"
                + axis_hint(student_logits.shape, self.num_classes, "student_logits", tapped=False)
            )


def _check_weights(settings: Mapping[str, float]) -> None:
    if not any(settings.values()):
        terms = ", ".join(name.removesuffix("_weight") for name in settings)
        raise ValueError(f"weights: all of {terms} are 0; nothing to compute")


def _projected(
    projector: Projector, features: Tensor | None, side: str, batch: int
) -> Tensor | Projection:
    """The projected logits, or what makes them in the kernel: nothing stands between the
    convolution and the terms."""
    name, depth = f"{side}_features", projector.conv.in_channels
    if features is None:
        raise ValueError(
            f"{name}: got None, but the loss was built with projectors; pass the {side}'s feature "
            "map, or build the loss without student_channels and teacher_channels"
            + _WITHOUT_TEACHER
        )
    hint = axis_hint(features.shape, depth, name) if isinstance(features, Tensor) else ""
    check_tensor(features, name, 4, "[B, D, h, w]", LOGITS_DTYPES, hint)
    if features.shape[1] != depth:
        raise ValueError(
            f"{name}: got D={features.shape[1]} channels, the loss was built with "
            f"{side}_channels={depth}{hint}"
        )
    if len(features) != batch:
        raise ValueError(f"{name}: got batch {len(features)}, student_logits has batch {batch}")
    weight = projector.conv.weight
    if features.device != weight.device:
        raise ValueError(
            f"{name}: is on {features.device}, the loss's projectors on {weight.device}; move the "
            "loss with .to(...)"
        )
    if side == "teacher":
        features = features.detach()
    if projector.bn is None:
        return Projection(features, weight, projector.conv.bias)
    projected: Tensor = projector(features)
    return projected
