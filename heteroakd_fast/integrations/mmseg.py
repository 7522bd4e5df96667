"""For mmengine and mmsegmentation: a loss and a segmentor for configs.

    custom_imports = dict(imports=["heteroakd_fast.integrations.mmseg"])
    model = dict(
        type="DistilledEncoderDecoder",  # instead of EncoderDecoder: everything else is the student
        teacher=dict(type="EncoderDecoder", ...),
        teacher_checkpoint="teacher.pth",
        decode_head=dict(..., loss_decode=dict(type="HeteroAKDLoss", kd_weight=0.1)),
    )

Registered with mmseg's MODELS, or with mmengine's where mmseg cannot be imported (then without the
segmentor). The module does not need mmcv's compiled operators.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import DistillationOutput, functional
from .. import HeteroAKDLoss as PlainLoss
from .._evaluate import Normalizer, mean_over_ranks
from ..labels import nearest_labels
from ..modules import AdjustableLoss
from .taps import Kept
from .teacher import FrozenTeacher, projects, world

try:
    from mmengine.registry import MODELS
    from mmengine.runner import CheckpointLoader
except ImportError as error:
    raise ImportError(
        f"heteroakd_fast.integrations.mmseg needs mmengine ({error}): pip install mmengine"
    ) from error

_missing: ImportError | None = None
try:
    from mmseg.models.segmentors import EncoderDecoder
    from mmseg.registry import MODELS
except ImportError as error:  # the loss does without
    EncoderDecoder, _missing = object, error

__all__ = ["DistilledEncoderDecoder", "HeteroAKDLoss"]


_HEADS = ("num_classes", "align_corners", "ignore_index")


@MODELS.register_module()
class HeteroAKDLoss(AdjustableLoss):
    """`heteroakd_fast.HeteroAKDLoss` with the conventions of mmseg's losses.

    In the decode head of a `DistilledEncoderDecoder`, alone or in a list with others, it gets the
    logits as the heads made them, and the teacher's. In any other head it gets upsampled logits
    and no teacher: then only `ce_weight` may be other than 0, and it equals `CrossEntropyLoss`.

    The number of classes, `align_corners` and `ignore_index` are the decode head's. The other
    arguments are attributes, too, and may be set in a hook: `model.distillation[0].kd_weight = 1`.

    Args:
        loss_weight: weight of the whole.
        loss_name: key in the dict of losses; must begin with "loss" to be part of the sum.
        avg_non_ignore: True divides by the pixels that are not ignored, False (mmseg's default)
            by all, wherever the number of pixels is the denominator, be they weighted or not. It
            changes no class-weighted cross entropy, which divides by the sum of the weights of the
            valid labels (times those of their pixels).
        class_weight: list, or a file that holds one.
        use_sigmoid, use_mask: only False; accepted for configs of `CrossEntropyLoss`.
        process_group: "auto" makes the denominators global over all ranks in training; None
            leaves each rank its own, as mmseg's losses do.
        **options: every other one of `heteroakd_fast.HeteroAKDLoss`. mmrazor's `tau` is
            `temperature`; `tau` is another option here.

    Raises:
        TypeError, ValueError: an option is wrong; names it and what was expected.
    """

    _adjustable = tuple(name for name in PlainLoss._adjustable if name not in _HEADS)
    _fixed = (*PlainLoss._fixed, *_HEADS, "use_sigmoid", "use_mask")
    loss_weight: float = 1.0

    def __init__(
        self,
        loss_weight: float = 1.0,
        loss_name: str = "loss_heteroakd",
        avg_non_ignore: bool = False,
        class_weight: Any = None,
        use_sigmoid: bool = False,
        use_mask: bool = False,
        process_group: Any = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("use_sigmoid", use_sigmoid), ("use_mask", use_mask)):
            if value:
                raise ValueError(
                    f"{name}: got {value!r}, expected False: classes exclude each other"
                )
        for name in _HEADS:
            if name in options:
                raise ValueError(f"{name}: is the decode head's; leave it out of the loss")
        if isinstance(class_weight, str):
            from mmseg.models.losses.utils import get_class_weight

            class_weight = get_class_weight(class_weight)
        if class_weight is not None:
            options["class_weight"] = [float(value) for value in class_weight]
        self.loss_weight = loss_weight
        self._loss_name = loss_name
        self.avg_non_ignore = avg_non_ignore
        self.process_group = process_group
        self.loss: PlainLoss | None = None
        self.terms: DistillationOutput | None = None
        self._options = options
        self._check_options(options)  # a typo shows now

    @property
    def loss_name(self) -> str:
        return self._loss_name

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        PlainLoss(len(options.get("class_weight") or [0]), ignore_index=None, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._adjustable:
            super().__setattr__(name, value)
            return
        options = {**self._options, name: value}
        if self.loss is None:
            self._check_options(options)
        else:
            setattr(self.loss, name, value)
        self._options = options

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._adjustable and self.loss is not None:
            return getattr(self.loss, name)
        return super().__getattr__(name)

    @property
    def needs_features(self) -> bool:
        return self._options.get("student_channels") is not None

    def bind(self, num_classes: int, ignore_index: int, align_corners: bool) -> PlainLoss:
        """Builds the loss for a head, or returns the one built for it already.

        Raises:
            ValueError: it was built for another head and has projectors.
        """
        head: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
        built = self.loss
        if built is not None:
            same = all(getattr(built, name) == value for name, value in head.items())
            if same and built.num_classes == num_classes:
                return built
            if projects(built):
                raise ValueError(f"loss_decode: {self.loss_name} was built for another decode head")
        self.loss = PlainLoss(num_classes, **head, **self._options)
        return self.loss

    def forward(
        self,
        seg_logits: Tensor,
        seg_label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """`loss_weight` times the weighted sum of the terms; `terms` then holds them.

        Args:
            seg_logits: [B, C, h, w], the student's logits at any resolution.
            seg_label: [B, H, W].
            weight: [B, H, W] or [B, 1, H, W], of the pixels, such as a sampler's: what other losses
                call `pixel_weight`. Without class weights they change numerators only, as in
                mmseg: the number of pixels stays the denominator.
            avg_factor: replaces the number of pixels.
            reduction_override: None or "mean".
            **inputs: `teacher_logits`, `student_features`, `teacher_features`.
        """
        if reduction_override not in (None, "mean"):
            raise ValueError(f"reduction_override: got {reduction_override!r}, expected 'mean'")
        loss = self.bind(seg_logits.shape[1], ignore_index, align_corners)
        loss.to(seg_logits.device)
        loss.process_group = world(self.process_group) if self.training else None
        if weight is not None and weight.dim() == 4 and weight.shape[1] == 1:
            weight = weight.squeeze(1)
        counts = self._counts(loss, seg_logits, seg_label, weight is not None, avg_factor)
        normalizer: Normalizer | None = None
        if counts is not None:
            taught = loss.training or any(value is not None for value in inputs.values())
            normalizer = loss.normalizer_of(counts, with_teacher=taught)
        output: DistillationOutput = loss(
            seg_logits, seg_label, pixel_weight=weight, normalizer=normalizer, **inputs
        )
        self.terms = output._replace(loss=output.loss.detach())
        return self.loss_weight * output.loss

    def _counts(
        self,
        loss: PlainLoss,
        seg_logits: Tensor,
        seg_label: Tensor,
        weighted: bool,
        avg_factor: float | Tensor | None,
    ) -> Any:
        """What takes the place of the numbers of labelled and of distilled pixels, or None."""
        grid = (seg_logits if loss.resolution == "logits" else seg_label).shape[-2:]
        if avg_factor is None and not self.avg_non_ignore:
            avg_factor = float(len(seg_label) * grid[0] * grid[1])
        if avg_factor is not None:
            return avg_factor, avg_factor
        if not weighted:
            return None
        if seg_label.shape[1:] != grid:
            seg_label = nearest_labels(seg_label, (grid[0], grid[1]))
        counts = loss.count_pixels(seg_label)
        group = loss.process_group
        return counts if group is None else mean_over_ranks(counts, group)


class DistilledEncoderDecoder(EncoderDecoder):  # type: ignore[misc]
    """An `EncoderDecoder`, the student, that learns from a frozen teacher.

    Its configuration, weights, checkpoints and predictions are those of an `EncoderDecoder`: what
    was trained with it is tested and deployed with the student's own config. Only `loss` differs:
    every `HeteroAKDLoss` of the decode head gets both models' logits before they are upsampled;
    other losses of the list and auxiliary heads are computed as always.

    Args:
        teacher: config of an `EncoderDecoder` with as many classes. It gets the images as the
            student's data preprocessor makes them.
        teacher_checkpoint: file or URL with its weights; None leaves them to its own `init_cfg`.
        trust_checkpoint: True reads a file that holds more than tensors, as the checkpoints that
            mmengine writes while training do. That may run code of the file: only for your own.
        feature_index: (index in the student's features, in the teacher's) as backbone or neck
            give them, for a loss with projectors.
        log_accuracy: logs `decode.acc_seg` as mmseg does.
        **student: of `EncoderDecoder`.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and what was expected.
        ImportError: mmseg cannot be imported; says why and what to install.
    """

    def __init__(
        self,
        teacher: Any,
        teacher_checkpoint: str | None = None,
        trust_checkpoint: bool = False,
        feature_index: tuple[int, int] = (-1, -1),
        log_accuracy: bool = True,
        **student: Any,
    ) -> None:
        if _missing is not None:
            raise ImportError(
                f"DistilledEncoderDecoder needs mmsegmentation ({_missing}): "
                'pip install mmsegmentation "mmcv>=2.0.0,<2.2.0" ftfy regex'
            ) from _missing
        if isinstance(student.get("decode_head"), (list, tuple)):
            raise ValueError("decode_head: got a list, expected one; cascades are not supported")
        _check_preprocessors(student.get("data_preprocessor"), teacher.get("data_preprocessor"))
        super().__init__(**student)
        head = self.decode_head
        losses = head.loss_decode
        losses = list(losses) if isinstance(losses, nn.ModuleList) else [losses]
        self.distillation = nn.ModuleList(one for one in losses if isinstance(one, HeteroAKDLoss))
        # What is left is the head's own business; it upsamples for nothing else.
        head.loss_decode = nn.ModuleList(
            one for one in losses if not isinstance(one, HeteroAKDLoss)
        )
        if not self.distillation:
            raise ValueError(
                "decode_head.loss_decode: has no dict(type='HeteroAKDLoss', ...); "
                f"found {', '.join(type(one).__name__ for one in losses)}"
            )
        sampler = getattr(head, "sampler", None)
        if sampler is not None and getattr(sampler, "thresh", 0.0) is None:
            raise ValueError(
                f"decode_head.sampler: got {type(sampler).__name__} without thresh, which asks for "
                "the loss of every pixel; give it a thresh, as in thresh=0.7"
            )
        if head.out_channels != head.num_classes:
            raise ValueError(
                f"decode_head.out_channels: got {head.out_channels}, expected "
                f"num_classes={head.num_classes}; a binary task is one of two classes"
            )
        one: Any
        for one in self.distillation:
            one.bind(head.num_classes, head.ignore_index, head.align_corners)
        self.feature_index = feature_index
        self.log_accuracy = log_accuracy
        self.teacher = FrozenTeacher(
            _build_teacher(teacher, teacher_checkpoint, trust_checkpoint, head.num_classes)
        )

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """Losses and logged values by name, as `EncoderDecoder.loss` gives them."""
        features = self.extract_feat(inputs)
        losses = {
            f"decode.{name}": value
            for name, value in self._distill(inputs, features, data_samples).items()
        }
        if self.with_auxiliary_head:
            others = self._without_unlabelled(data_samples)
            losses.update(self._auxiliary_head_forward_train(features, others))
        return losses

    def _unlabelled(self, target: Tensor) -> Tensor | None:
        """Where the labels are those of unlabelled pixels; None where no loss knows of such."""
        known: set[Any] = {one.unlabelled_index for one in self.distillation} - {None}
        masks: list[Tensor] = [target.eq(index) for index in known]
        return torch.stack(masks).any(0) if masks else None

    def _without_unlabelled(self, data_samples: Any) -> Any:
        """For losses and metrics of mmseg, to which unlabelled pixels are ignored ones."""
        found = []
        for sample in data_samples:
            labels = sample.gt_sem_seg.data
            mask = self._unlabelled(labels)
            if mask is None:
                return data_samples
            sample = copy.copy(sample)
            sample.gt_sem_seg = type(sample.gt_sem_seg)(
                data=labels.masked_fill(mask, self.decode_head.ignore_index)
            )
            found.append(sample)
        return found

    @torch.no_grad()
    def _pixel_weight(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """What the head's sampler makes of the pixels, as mmseg's heads ask it; unlabelled pixels
        have weight 1."""
        head = self.decode_head
        if getattr(head, "sampler", None) is None:
            return None
        mask = self._unlabelled(target)
        known = target if mask is None else target.masked_fill(mask, head.ignore_index)
        full = F.interpolate(
            logits, target.shape[1:], mode="bilinear", align_corners=head.align_corners
        )
        weight: Tensor = head.sampler.sample(full, known[:, None])
        return weight if mask is None else weight.masked_fill(mask, 1.0)

    def _distill(self, inputs: Tensor, features: Any, data_samples: Any) -> dict[str, Any]:
        head = self.decode_head
        projecting = any(one.needs_features for one in self.distillation)
        # A head may begin with an operation in place.
        kept = Kept.of(features[self.feature_index[0]]) if projecting else None
        logits = head.forward(features)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"decode_head: {type(head).__name__} gave a {type(logits).__name__}, expected "
                "logits [B, C, h, w]"
            )
        student_feature = None if kept is None else kept.value()
        target = torch.stack([sample.gt_sem_seg.data for sample in data_samples]).squeeze(1)
        teacher_logits, teacher_feature = self._teach(inputs, target, projecting)
        weight = self._pixel_weight(logits, target)
        losses: dict[str, Any] = {}
        one: Any
        for one in self.distillation:
            extra: dict[str, Any] = {}
            if one.needs_features:
                extra["student_features"] = student_feature
                extra["teacher_features"] = teacher_feature
            value = one(
                logits,
                target,
                weight=weight,
                ignore_index=head.ignore_index,
                align_corners=head.align_corners,
                teacher_logits=teacher_logits,
                **extra,
            )
            losses[one.loss_name] = losses.get(one.loss_name, 0.0) + value
            # None has "loss" in its name: shown, and not added up again.
            losses.update(one.terms.terms)
        if len(head.loss_decode):
            others = self._without_unlabelled(data_samples)
            for name, value in head.loss_by_feat(logits, others).items():
                losses[name] = losses[name] + value if name in losses else value
        elif self.log_accuracy:
            mask = self._unlabelled(target)
            known = target if mask is None else target.masked_fill(mask, head.ignore_index)
            losses["acc_seg"] = _accuracy(logits, known, head)
        return losses

    @torch.no_grad()
    def _teach(
        self, inputs: Tensor, target: Tensor, projecting: bool
    ) -> tuple[Tensor, Tensor | None]:
        self.teacher.to(inputs.device)
        teacher: Any = self.teacher.module.eval()
        features = teacher.extract_feat(inputs)
        kept = Kept.of(features[self.feature_index[1]]) if projecting else None
        logits = teacher.decode_head.forward(features)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"teacher.decode_head: {type(teacher.decode_head).__name__} gave a "
                f"{type(logits).__name__}, expected logits [B, C, h, w]"
            )
        if teacher.align_corners != self.align_corners:
            # The loss interpolates both alike; on the label grid there is nothing left to do.
            logits = F.interpolate(
                logits, target.shape[1:], mode="bilinear", align_corners=teacher.align_corners
            )
        return logits, None if kept is None else kept.value()


if _missing is None:
    MODELS.register_module()(DistilledEncoderDecoder)


def _check_preprocessors(student: Any, teacher: Any) -> None:
    """One preprocessor serves both: what it does to the colours must suit the teacher."""
    if student is None or teacher is None:
        return
    for name in ("mean", "std", "bgr_to_rgb", "rgb_to_bgr"):
        if student.get(name) != teacher.get(name):
            raise ValueError(
                f"teacher.data_preprocessor: has {name}={teacher.get(name)}, the student's "
                f"{student.get(name)}; both get the same images"
            )


def _build_teacher(config: Any, checkpoint: str | None, trusted: bool, classes: int) -> Any:
    config = config.copy()
    config.pop("auxiliary_head", None)  # only training needs them
    teacher: Any = MODELS.build(config)
    if not isinstance(teacher, EncoderDecoder) or isinstance(teacher.decode_head, nn.ModuleList):
        raise ValueError(
            f"teacher: got {type(teacher).__name__}, expected an EncoderDecoder with one "
            "decode head"
        )
    found = getattr(teacher, "out_channels", None)
    if found != classes:
        raise ValueError(f"teacher: has {found} classes, the student {classes}")
    if checkpoint is None:
        if hasattr(teacher, "init_weights"):
            teacher.init_weights()
        return teacher
    try:
        result = teacher.load_state_dict(_read(checkpoint, trusted), strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"teacher_checkpoint: {checkpoint} does not fit the teacher: {error}"
        ) from error
    unknown = [
        name
        for name in result.unexpected_keys
        if not name.startswith(("auxiliary_head.", "decode_head.loss_decode.", "distillation."))
    ]
    if result.missing_keys or unknown:
        raise ValueError(
            f"teacher_checkpoint: {checkpoint} does not fit the teacher: missing "
            f"{result.missing_keys[:4]}, unknown {unknown[:4]}"
        )
    return teacher


def _read(checkpoint: str, trusted: bool) -> dict[str, Tensor]:
    try:
        if trusted:
            content = torch.load(checkpoint, map_location="cpu", weights_only=False)
        else:
            content = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu", logger=None)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"teacher_checkpoint: {checkpoint} holds more than tensors, as checkpoints that "
            "mmengine writes while training do; if it is your own, set trust_checkpoint=True"
        ) from error
    state = content.get("state_dict", content)
    return {name.removeprefix("module."): value for name, value in state.items()}


def _accuracy(logits: Tensor, target: Tensor, head: Any) -> Tensor:
    """Percentage of right pixels, without logits of full resolution."""
    matrix = functional.confusion_matrix(
        logits, target, ignore_index=head.ignore_index, align_corners=head.align_corners
    )
    percentage: Tensor = 100.0 * matrix.trace() / matrix.sum().clamp(min=1)
    return percentage
