"""Losses as functions: checked input, one pass, means and weights.

The formulas are in `docs/method.md`, what every call promises in `docs/contract.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .checks import (
    axis_hint,
    check_choice,
    check_constant,
    check_flag,
    check_ignore_index,
    check_ignored_class,
    check_number,
    check_scalar,
    check_temperature,
    label_hint,
    plain_tensor,
    refuse_forward_mode,
    refuse_without_memory,
)
from .labels import check_synchronously, nearest_labels
from .output import DistillationOutput
from .spec import (
    EVALUATIONS,
    KD_DIVERGENCES,
    MIXES,
    PRESETS,
    TERMS,
    WEIGHT_AXES,
    LossSpec,
)

__all__ = ["Normalizer", "WeightedPass", "combine", "cross_entropy", "distillation_loss", "run"]

Normalizer = Tensor | float | Mapping[str, Tensor | float]

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)
MAX_CLASSES = 4096
#: Of any axis; the kernels number rows and columns in 32 bits, and have tables of 36 bytes a row.
LARGEST_SIZE = 2**28
RESOLUTIONS = ("label", "logits")
BACKENDS = (backends.AUTO, *backends.names())


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = 255,
    allow_ignored_class: bool = False,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    resolution: str = "label",
    normalizer: Normalizer | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> DistillationOutput:
    """Bilinear upsampling and cross entropy in one pass.

    Equal to `F.cross_entropy(F.interpolate(logits, target.shape[1:], mode="bilinear",
    align_corners=align_corners), target, class_weight, ignore_index=ignore_index,
    label_smoothing=label_smoothing)`, except that it is 0 and not NaN where every pixel is
    ignored; the compiled backends never store the upsampled logits.

    Args:
        logits: [B, C, h, w], float32, bfloat16, float16 or float64, any strides, 1 <= C <= 4096.
        target: [B, H, W], int64, int32 or uint8; values in [0, C) or `ignore_index`.
        ignore_index: label of the pixels that are excluded from every term; any integer outside
            [0, C), or None if no pixel is ignored.
        allow_ignored_class: True lets `ignore_index` be one of the classes: its pixels are then
            excluded, and the class has no loss of its own.
        align_corners: as in `torch.nn.functional.interpolate`.
        class_weight: [C] floating point, >= 0, or None for ones.
        label_smoothing: in [0, 1].
        resolution: "label" upsamples the logits to the labels; "logits" takes the labels by
            nearest neighbour on the logits' grid.
        normalizer: replaces the number of valid pixels in the mean (a scalar; with class weights,
            where the denominator is their sum, only by name: `{"ce": ...}`).
        process_group: averages the denominator over this `torch.distributed` group, so that
            gradients averaged over its ranks are those of the whole batch. A `normalizer` is
            taken as it is.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None leaves the choice to
            `use_backend`, the environment, and the device.

    Returns:
        `DistillationOutput` with `loss`, `ce` and `valid`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    return distillation_loss(
        logits,
        target,
        None,
        ignore_index=ignore_index,
        allow_ignored_class=allow_ignored_class,
        align_corners=align_corners,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        resolution=resolution,
        normalizer=normalizer,
        process_group=process_group,
        backend=backend,
    )


def distillation_loss(
    student_logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    ce_weight: float = 1.0,
    teacher_ce_weight: float = 0.0,
    kd_weight: float = 0.0,
    hetero_weight: float = 0.0,
    feature_weight: float = 0.0,
    preset: str = "softmax-kl",
    temperature: float = 1.0,
    tau: float = 1.0,
    mix: str | None = None,
    evaluation: str | None = None,
    weight_axis: str = "class",
    kd_divergence: str = "forward",
    kd_beta: float = 0.5,
    ignore_index: int | None = 255,
    allow_ignored_class: bool = False,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    resolution: str = "label",
    normalizer: Normalizer | None = None,
    process_group: Any = None,
    return_maps: bool = False,
    backend: str | None = None,
) -> DistillationOutput:
    """Weighted sum of segmentation distillation terms in one pass over the label grid.

    A term with weight 0 is not computed. Source: HeteroAKD (Huang et al., AAAI 2025,
    arXiv 2504.07691), from public descriptions of it; `kd` is Hinton et al., 2015.

    Args:
        student_logits: [B, C, h, w], float32, bfloat16, float16 or float64, any strides.
        teacher_logits: [B, C, h', w'], same dtype choices, h', w' free; None when no term needs
            it. Only `teacher_ce` sends a gradient to it, so without that term it must not
            require one.
        target: [B, H, W], int64, int32 or uint8; values in [0, C) or `ignore_index`.
        ce_weight, teacher_ce_weight: cross entropy of the student and of the teacher.
        kd_weight: T^2 times the divergence named by `kd_divergence`: "forward" KL(p_t || p_s),
            "reverse", or "js" with `kd_beta` in (0, 1).
        hetero_weight: the HeteroAKD term. Its weight depends on `preset`: a mean weighted by the
            discrepancy ("softmax-kl") or by a softmax over classes ("paper", about C times
            smaller).
        feature_weight: mean squared difference of the logits.
        preset: "softmax-kl" or "paper" (equations 5 to 10 as public reimplementations state
            them; no results of the paper are claimed for it).
        temperature: T of `kd` and `hetero`, from 1e-4 to 1e4.
        tau: how sharply reliability follows the difference in cross entropy ("softmax-kl"), from
            1e-4 to 1e4.
        mix: "probs" (default of "softmax-kl"), "logits" (default of "paper", which has no
            "probs"), or "teacher": the target is the teacher's own knowledge, the ablation
            without knowledge mixing.
        evaluation: "discrepancy" (default) or "none" (every pixel and class counts alike, the
            ablation without knowledge evaluation).
        weight_axis: "class" (default) or "space" ("paper" only): axis of the weights' softmax.
        return_maps: fills `DistillationOutput.maps`.
        normalizer: a scalar that replaces the number of valid pixels wherever that is the
            denominator, or a mapping from term names to denominators.
        ignore_index, allow_ignored_class, align_corners, class_weight, label_smoothing,
            resolution, process_group, backend: as in `cross_entropy`.

    Returns:
        `DistillationOutput`; `loss` is the weighted sum.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    weights = {
        "ce": ce_weight,
        "teacher_ce": teacher_ce_weight,
        "kd": kd_weight,
        "hetero": hetero_weight,
        "feature": feature_weight,
    }
    one_pass = run(
        student_logits,
        teacher_logits,
        target,
        weights,
        preset=preset,
        temperature=temperature,
        tau=tau,
        mix=mix,
        evaluation=evaluation,
        weight_axis=weight_axis,
        kd_divergence=kd_divergence,
        kd_beta=kd_beta,
        ignore_index=ignore_index,
        allow_ignored_class=allow_ignored_class,
        align_corners=align_corners,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        resolution=resolution,
        return_maps=return_maps,
        backend=backend,
    )
    loss, (terms,), denominators = combine([one_pass], normalizer, process_group)
    return DistillationOutput(
        loss=loss,
        valid=one_pass.sums.valid,
        maps=one_pass.maps,
        denominators=denominators,
        **terms,
    )


# --- one pass: check, choose, run --------------------------------------------------------------


class WeightedPass:
    """Sums of one pass with the weights its terms will get; `combine` turns them into a loss."""

    def __init__(
        self,
        sums: ops.SumsResult,
        weights: dict[str, float],
        spec: LossSpec,
        weighted_ce: bool,
        dtype: torch.dtype,
    ) -> None:
        self.sums = sums
        self.weights = weights
        self.spec = spec
        self.weighted_ce = weighted_ce
        self.dtype = dtype

    @property
    def maps(self) -> dict[str, Tensor] | None:
        if not self.spec.maps:
            return None
        return {"reliability": self.sums.maps[0], "discrepancy": self.sums.maps[1]}

    def counts_valid_pixels(self, term: str) -> bool:
        """Whether the term's own denominator is the number of valid pixels."""
        if term in ("ce", "teacher_ce"):
            return not self.weighted_ce
        if term != "hetero":
            return True
        if self.spec.evaluation == "none":
            return True
        return self.spec.preset == "paper" and self.spec.weight_axis == "class"


def run(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    weights: Mapping[str, float],
    *,
    preset: str = "softmax-kl",
    temperature: float = 1.0,
    tau: float = 1.0,
    mix: str | None = None,
    evaluation: str | None = None,
    weight_axis: str = "class",
    kd_divergence: str = "forward",
    kd_beta: float = 0.5,
    ignore_index: int | None = 255,
    allow_ignored_class: bool = False,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    resolution: str = "label",
    return_maps: bool = False,
    backend: str | None = None,
) -> WeightedPass:
    """Checks the input of one pass and runs it; arguments as in `distillation_loss`."""
    student_logits, teacher_logits = plain_tensor(student_logits), plain_tensor(teacher_logits)
    target, class_weight = plain_tensor(target), plain_tensor(class_weight)
    checked = {
        name: check_number(weights[name], f"{name}_weight") for name in TERMS if name in weights
    }
    asked = {name: weight for name, weight in checked.items() if weight != 0.0}
    spec = LossSpec(
        terms=tuple(asked),
        preset=preset,
        mix=resolve_mix(preset, mix),
        evaluation="discrepancy" if evaluation is None else evaluation,
        weight_axis=weight_axis,
        kd_divergence=kd_divergence,
        kd_beta=check_number(kd_beta, "kd_beta"),
        temperature=check_number(temperature, "temperature"),
        tau=check_number(tau, "tau"),
        ignore_index=check_ignore_index(ignore_index),
        align_corners=check_flag(align_corners, "align_corners"),
        label_smoothing=check_number(label_smoothing, "label_smoothing"),
        maps=check_flag(return_maps, "return_maps"),
    )
    check_spec(spec)
    check_choice(resolution, "resolution", RESOLUTIONS)
    _check_tensors(student_logits, teacher_logits, target, class_weight, spec)
    check_ignored_class(ignore_index, student_logits.shape[1], allow_ignored_class)
    if resolution == "logits":
        if target.device.type == "cpu" or check_synchronously():
            # Those that resampling skips count too.
            ops.valid_count(target, student_logits.shape[1], spec.ignore_index)
        target = nearest_labels(target, (student_logits.shape[2], student_logits.shape[3]))
    needs_teacher = spec.maps or any(TERMS[term].needs_teacher for term in spec.terms)
    if teacher_logits is not None and "teacher_ce" not in spec.terms:
        teacher_logits = teacher_logits.detach()
    if class_weight is not None and not {"ce", "teacher_ce"} & set(spec.terms):
        class_weight = None
    sums = ops.distillation_sums(
        student_logits,
        teacher_logits if needs_teacher else None,
        target,
        class_weight,
        spec,
        backends.select(backend, spec, student_logits.device.type),
    )
    return WeightedPass(
        sums,
        asked,
        spec,
        weighted_ce=class_weight is not None,
        dtype=torch.promote_types(student_logits.dtype, torch.float32),
    )


def combine(
    passes: Sequence[WeightedPass],
    normalizer: Normalizer | None = None,
    process_group: Any = None,
) -> tuple[Tensor, list[dict[str, Tensor]], dict[str, Tensor]]:
    """Denominators (global if asked, in one collective), means, weighted sum.

    Returns the loss, for each pass its terms by name, detached, and the denominators by term
    before `normalizer` replaced any: of the first pass that has the term.
    """
    replaced = _check_normalizer(normalizer, passes)
    denominators = torch.cat([one.sums.denominators for one in passes])
    if process_group is not None:
        denominators = mean_over_ranks(denominators, process_group)
    names = [name for one in passes for name in one.weights]
    own = dict(zip(reversed(names), reversed(denominators.detach().unbind()), strict=True))
    if replaced:
        denominators = torch.stack(
            [
                denominators[i]
                if i not in replaced
                else torch.as_tensor(
                    plain_tensor(replaced[i]), dtype=denominators.dtype, device=denominators.device
                ).reshape(())
                for i in range(len(denominators))
            ]
        )
    numerators = torch.cat([one.sums.numerators for one in passes])
    # A mean over nothing is 0, with a graph. NaN stays NaN.
    means = numerators * torch.where(denominators == 0, 0.0, 1.0 / denominators)

    weights = [weight for one in passes for weight in one.weights.values()]
    values = means.unbind()
    loss = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        loss = loss + weight * value
    dtype = passes[0].dtype
    detached = iter(means.detach().to(dtype).unbind())
    terms = [{name: next(detached) for name in one.weights} for one in passes]
    return loss.to(dtype), terms, own


def mean_over_ranks(denominators: Tensor, process_group: Any) -> Tensor:
    """The mean, not the sum: data-parallel training averages gradients over the ranks, and
    R * (sum over ranks) / R leaves exactly the gradient of the whole batch."""
    import torch.distributed as dist

    total = denominators.clone()
    dist.all_reduce(total, group=process_group)
    return total / dist.get_world_size(process_group)


# --- checks ------------------------------------------------------------------------------------


def resolve_mix(preset: str, mix: str | None) -> str:
    """The preset's own mix when none is named."""
    check_choice(preset, "preset", PRESETS)
    if mix is None:
        return "logits" if preset == "paper" else "probs"
    return mix


def check_spec(spec: LossSpec) -> None:
    """Everything about the options that does not depend on tensors."""
    if not spec.terms:
        raise ValueError(
            "weights: every term has weight 0; give at least one of "
            + ", ".join(f"{name}_weight" for name in TERMS)
        )
    check_choice(spec.preset, "preset", PRESETS)
    check_choice(spec.mix, "mix", MIXES)
    check_choice(spec.evaluation, "evaluation", EVALUATIONS)
    check_choice(spec.weight_axis, "weight_axis", WEIGHT_AXES)
    check_choice(spec.kd_divergence, "kd_divergence", KD_DIVERGENCES)
    if spec.preset == "paper" and spec.mix == "probs":
        raise ValueError(
            f"mix: got {spec.mix!r}, the preset 'paper' mixes logits (Eq. 7) or, with "
            "mix='teacher', nothing; leave mix=None or use preset='softmax-kl'"
        )
    if spec.preset != "paper" and spec.weight_axis != "class":
        raise ValueError(
            f"weight_axis: got {spec.weight_axis!r}, only preset='paper' has class weights"
        )
    for name in ("temperature", "tau"):
        check_temperature(getattr(spec, name), name)
    if not 0.0 < spec.kd_beta < 1.0:
        raise ValueError(
            f"kd_beta: got {spec.kd_beta}, expected a number in (0, 1); the ends are "
            "kd_divergence='forward' and 'reverse'"
        )
    if not 0.0 <= spec.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {spec.label_smoothing}, expected [0, 1]")


def check_tensor(
    tensor: object,
    name: str,
    rank: int,
    shape: str,
    dtypes: Sequence[torch.dtype],
    hint: str = "",
) -> Tensor:
    """Type, rank and dtype of one argument; `hint` is for one of another rank."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor {shape}")
    if _is_dtensor(tensor):
        raise TypeError(
            f"{name}: got a DTensor; pass its local shard (`.to_local()`) and process_group= for "
            "global denominators"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name}: got {kind}, expected a dense tensor {shape}")
    if tensor.dim() != rank:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {rank} dimensions {shape}{hint}"
        )
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{name}: got {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}"
        )
    if not torch.compiler.is_compiling() and any(n > LARGEST_SIZE for n in tensor.shape):
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected sizes up to {LARGEST_SIZE}"
        )
    refuse_without_memory(tensor, name)
    refuse_forward_mode(tensor, name)
    return tensor


def check_target(target: object, num_classes: int) -> None:
    """Type, rank and dtype of labels, before they meet the logits of `num_classes`."""
    hint = label_hint(target.shape, num_classes) if isinstance(target, Tensor) else ""
    check_tensor(target, "target", 3, "[B, H, W]", LABEL_DTYPES, hint)


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _check_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> None:
    check_pair(student_logits, teacher_logits, target)
    classes = student_logits.shape[1]
    if teacher_logits is not None:
        if teacher_logits.requires_grad and "teacher_ce" not in spec.terms:
            raise ValueError(
                "teacher_logits: requires grad, but only the term teacher_ce sends it one; run "
                "the teacher under torch.no_grad(), pass .detach(), or set teacher_ce_weight"
            )
    else:
        for term in spec.terms:
            if TERMS[term].needs_teacher:
                raise ValueError(
                    f"teacher_logits: got None, but {term}_weight is not 0; pass the teacher's "
                    f"logits or set {term}_weight=0"
                )
        if spec.maps:
            raise ValueError("teacher_logits: got None, but return_maps=True needs them")
    if class_weight is not None:
        check_class_weight(class_weight, classes, student_logits, "student_logits")


def check_class_weight(class_weight: Tensor, classes: int, logits: Tensor, name: str) -> None:
    """logits, name: the tensor whose device it must be on."""
    check_tensor(class_weight, "class_weight", 1, "[C]", LOGITS_DTYPES)
    check_constant(class_weight, "class_weight")
    if class_weight.shape[0] != classes:
        raise ValueError(f"class_weight: got {class_weight.shape[0]} entries, expected C={classes}")
    if class_weight.device != logits.device:
        raise ValueError(
            f"class_weight: is on {class_weight.device}, {name} on {logits.device}; move it with "
            f".to({str(logits.device)!r})"
        )


def check_pair(student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> None:
    """Types, shapes and devices of what every loss on logits takes."""
    check_tensor(student_logits, "student_logits", 4, "[B, C, h, w]", LOGITS_DTYPES)
    batch, classes = student_logits.shape[:2]
    check_target(target, classes)
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"student_logits: got C={classes} classes, expected 1 to {MAX_CLASSES}")
    _check_beside(target, "target", batch, student_logits)
    _check_grid(student_logits, "student_logits", target)
    if teacher_logits is None:
        return
    check_tensor(teacher_logits, "teacher_logits", 4, "[B, C, h', w']", LOGITS_DTYPES)
    _check_beside(teacher_logits, "teacher_logits", batch, student_logits)
    if teacher_logits.shape[1] != classes:
        hint = axis_hint(teacher_logits.shape, classes, "teacher_logits", tapped=False)
        raise ValueError(
            f"teacher_logits: got C={teacher_logits.shape[1]} classes, student_logits has {classes}"
            + (
                hint
                or "; to distil from a teacher of other classes, project features: HeteroAKDLoss "
                "with student_channels, teacher_channels and kd_weight=0"
            )
        )
    _check_grid(teacher_logits, "teacher_logits", target)


def _check_beside(tensor: Tensor, name: str, batch: int, student_logits: Tensor) -> None:
    if tensor.shape[0] != batch:
        raise ValueError(f"{name}: got batch {tensor.shape[0]}, student_logits has batch {batch}")
    if tensor.device != student_logits.device:
        raise ValueError(
            f"{name}: is on {tensor.device}, student_logits on {student_logits.device}; move one"
        )


def _check_grid(logits: Tensor, name: str, target: Tensor) -> None:
    if target.numel() and 0 in logits.shape[2:]:
        raise ValueError(
            f"{name}: got an empty grid {tuple(logits.shape[2:])} for a target of "
            f"{tuple(target.shape[1:])}"
        )


def _check_normalizer(
    normalizer: Normalizer | None, passes: Sequence[WeightedPass]
) -> dict[int, Tensor | float]:
    """Which of the concatenated denominators are replaced, and by what."""
    if normalizer is None:
        return {}
    slots = [(one, term) for one in passes for term in one.weights]
    if isinstance(normalizer, Mapping):
        asked = {term for _, term in slots}
        for name, value in normalizer.items():
            if name not in asked:
                raise ValueError(
                    f"normalizer: names the term {name!r}, this call computes "
                    f"{', '.join(sorted(asked))}"
                )
            check_scalar(value, f"normalizer[{name!r}]")
        return {i: normalizer[term] for i, (_, term) in enumerate(slots) if term in normalizer}
    check_scalar(normalizer, "normalizer")
    return {i: normalizer for i, (one, term) in enumerate(slots) if one.counts_valid_pixels(term)}
