"""From checked arguments to a result: the plan's passes, means, and one loss.

This is what `functional` and the modules share. Options come checked (`check_options`); what is
checked here is tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import backends, ops
from ._checks import (
    RESOLUTIONS,
    Side,
    check_choice,
    check_class_weight,
    check_flag,
    check_ignore_index,
    check_ignored_class,
    check_integer,
    check_pixel_weight,
    check_scalar,
    check_sides,
    check_teacher,
    check_unlabelled_index,
    classes_of,
    plain_side,
    plain_tensor,
    tensor_of,
)
from .labels import check_synchronously, counted_pixels, nearest_labels
from .output import DistillationOutput
from .projector import Projection
from .spec import (
    DIAGNOSTICS,
    MAPS,
    STAND_IN_NUMBERS,
    LossSpec,
    Numbers,
    PassPlan,
    Shape,
    plan,
    vector,
)
from .terms import TERM_WEIGHTS, TERMS, WITHOUT_TEACHER, HeteroAKD

__all__ = [
    "DEFAULTS",
    "LossOptions",
    "Normalizer",
    "Part",
    "check_normalizer",
    "check_options",
    "count_pixels",
    "describe",
    "evaluate",
    "mean_over_ranks",
    "normalizer_of_counts",
]

Normalizer = Tensor | float | Mapping[str, Tensor | float]


_HETERO: Final = TERMS.index(HeteroAKD)


class LossOptions(TypedDict, total=False):
    """What every loss is built with, beside its terms; see `functional.segmentation_loss`."""

    class_weight: Tensor | None
    ignore_index: int | None
    unlabelled_index: int | None
    allow_ignored_class: bool
    align_corners: bool
    resolution: str
    process_group: Any
    backend: str | None


DEFAULTS: Final[Mapping[str, Any]] = {
    "class_weight": None,
    "ignore_index": 255,
    "unlabelled_index": None,
    "allow_ignored_class": False,
    "align_corners": False,
    "resolution": "label",
    "process_group": None,
    "backend": None,
}


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """All of `LossOptions`, as they are kept; tensors and the process group unchecked.

    Raises:
        TypeError, ValueError: names the option.
    """
    checked = {**DEFAULTS, **options}
    for name in ("ignore_index", "unlabelled_index"):
        if checked[name] is not None:
            checked[name] = check_integer(checked[name], name)
    check_unlabelled_index(
        checked["unlabelled_index"], check_ignore_index(checked["ignore_index"]), 0
    )
    check_flag(checked["allow_ignored_class"], "allow_ignored_class")
    check_flag(checked["align_corners"], "align_corners")
    check_choice(checked["resolution"], "resolution", RESOLUTIONS)
    if checked["backend"] is not None:
        check_choice(checked["backend"], "backend", (backends.AUTO, *backends.names()))
    return checked


class Part(NamedTuple):
    """Terms that are taken on one pair of logits, encoded (`spec.py`)."""

    shape: Shape
    numbers: Numbers
    student: Side
    teacher: Side | None = None
    names: Mapping[str, str] = {}
    """what the result calls a term of this part, if not by its name; of one name it has the sum"""
    weights: Mapping[str, str] = TERM_WEIGHTS
    """how the caller calls the weights of terms"""
    without_teacher: str = ""
    """what to do where there is none, as the end of a message"""
    called: str = "student_logits"
    """the caller's name of `student`"""


class _Pass(NamedTuple):
    plan: PassPlan
    sums: ops.SumsResult
    part: Part
    observed: Tensor | None
    """the labels, C where there is none, of a pass that wrote diagnostics"""


def evaluate(
    parts: Sequence[Part],
    target: Tensor,
    options: Mapping[str, Any],
    normalizer: Normalizer | None = None,
    return_maps: bool = False,
    pixel_weight: Tensor | None = None,
    diagnostics: bool = False,
) -> DistillationOutput:
    """Runs the passes of all parts and makes one loss of them; maps come from the last part,
    diagnostics from the first."""
    check_flag(return_maps, "return_maps")
    check_flag(diagnostics, "diagnostics")
    target, pixel_weight = plain_tensor(target), plain_tensor(pixel_weight)
    class_weight: Tensor | None = plain_tensor(options["class_weight"])
    apart = tuple(normalizer) if isinstance(normalizer, Mapping) else ()
    passes: list[_Pass] = []
    for k, part in enumerate(parts):
        mapped = return_maps or (diagnostics and any(kind == _HETERO for kind, *_ in part.shape))
        maps = mapped and k == len(parts) - 1
        unlabelled = options["unlabelled_index"] is not None
        plans = plan(part.shape, class_weight is not None, maps, apart, unlabelled)
        teacher = None if part.teacher is None else plain_side(part.teacher)
        part = part._replace(student=plain_side(part.student), teacher=teacher)
        observed = _observed(plans) if diagnostics and k == 0 else None
        passes += _run(part, plans, target, class_weight, pixel_weight, options, maps, observed)
    output = _combine(passes, options, normalizer)
    return output if return_maps else output._replace(maps=None)


def _observed(plans: Sequence[PassPlan]) -> int:
    """The pass that writes the diagnostics: the first that reads both models, if there is one, else
    the first over the student's logits."""
    own = [k for k, one in enumerate(plans) if one.of_student]
    if not own:
        raise ValueError(
            "diagnostics: got True, but no term reads the student's logits; add one, such as "
            "CrossEntropy()"
        )
    return next((k for k in own if plans[k].compares), own[0])


def _run(
    part: Part,
    plans: list[PassPlan],
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    options: Mapping[str, Any],
    maps: bool,
    observed: int | None,
) -> list[_Pass]:
    """observed: the pass that writes the diagnostics."""
    student, teacher = part.student, part.teacher
    classes = _check_part(part, plans, target, class_weight, pixel_weight, options, maps)
    ignore_index = check_ignore_index(options["ignore_index"])
    unlabelled_index = check_unlabelled_index(options["unlabelled_index"], ignore_index, classes)
    grid = tensor_of(student).shape[2:]
    if options["resolution"] == "logits" and target.shape[1:] != grid:
        if target.device.type == "cpu" or check_synchronously():
            # Those that resampling skips count too.
            ops.count(target, pixel_weight, classes, ignore_index, unlabelled_index)
        target = nearest_labels(target, (grid[0], grid[1]))
        if pixel_weight is not None:
            pixel_weight = nearest_labels(pixel_weight, (grid[0], grid[1]))
    labels = None
    if observed is not None:
        labels = target.long()
        known = (labels >= 0) & (labels < classes)
        known = known & counted_pixels(target, pixel_weight, ignore_index)
        labels = torch.where(known, labels, classes)
    done = []
    for k, one in enumerate(plans):
        written = MAPS * one.maps + DIAGNOSTICS * (k == observed)
        head = (ignore_index, int(options["align_corners"]), written, unlabelled_index)
        spec = LossSpec((*head, *one.structure), _numbers_of(part, one))
        with nullcontext() if one.names else torch.no_grad():
            sums = ops.sums(
                student,
                target,
                teacher if one.needs_teacher else None,
                class_weight if one.weighted else None,
                pixel_weight,
                spec,
                backends.select(options["backend"], spec.structure, tensor_of(student).device.type),
            )
        if not one.names:
            numerators, totals, denominators = (x[:0] for x in sums[:3])
            sums = sums._replace(numerators=numerators, totals=totals, denominators=denominators)
        done.append(_Pass(one, sums, part, labels if k == observed else None))
    return done


def _check_part(
    part: Part,
    plans: list[PassPlan],
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    options: Mapping[str, Any],
    maps: bool,
) -> int:
    """Everything that is checked before a pass; returns the number of classes."""
    names = [name for one in plans for name in one.names]
    if not names:
        weights = ", ".join(part.weights.values())
        raise ValueError(f"weights: every term has weight 0; give at least one of {weights}")
    classes = check_sides(part.student, target, part.teacher, part.called)
    kinds = {name: name.rstrip("0123456789").rstrip("_") for name in names}
    needing = [name for name in names if kinds[name] not in WITHOUT_TEACHER]
    check_teacher(part.teacher, needing, maps, part.weights, part.without_teacher)
    check_ignored_class(options["ignore_index"], classes, options["allow_ignored_class"])
    if class_weight is not None:
        check_class_weight(class_weight, classes, tensor_of(part.student), part.called)
    if pixel_weight is not None:
        check_pixel_weight(pixel_weight, target, tensor_of(part.student), part.called)
    return classes


def _numbers_of(part: Part, one: PassPlan) -> Numbers:
    numbers = part.numbers
    if one.numbers is not None:
        if isinstance(numbers, tuple):
            numbers = tuple(numbers[k] for k in one.numbers)
        else:
            numbers = numbers[list(one.numbers)]
    if one.names:
        return numbers
    if isinstance(numbers, tuple):
        return (*STAND_IN_NUMBERS, *numbers)
    return torch.cat((vector(STAND_IN_NUMBERS), numbers))


def _combine(
    passes: Sequence[_Pass], options: Mapping[str, Any], normalizer: Normalizer | None
) -> DistillationOutput:
    """Denominators (global if asked, in one collective), means, weighted sum."""
    # of each term of all passes its name and the position of its group among all groups
    terms: list[tuple[str, int]] = []
    kinds: list[str] = []
    for one in passes:
        terms += zip(one.plan.names, (len(kinds) + k for k in one.plan.groups), strict=True)
        kinds += one.plan.denominators
    replaced = check_normalizer(normalizer, terms, kinds)
    denominators = _joined([one.sums.denominators for one in passes])
    if options["process_group"] is not None:
        denominators = mean_over_ranks(denominators, options["process_group"])
    per_group = denominators.unbind()
    own: dict[str, Tensor] = {}
    for name, group in terms:
        own.setdefault(name, per_group[group])
    if replaced:
        denominators = torch.stack(
            [
                denominator
                if k not in replaced
                else torch.as_tensor(
                    plain_tensor(replaced[k]), dtype=denominators.dtype, device=denominators.device
                ).reshape(())
                for k, denominator in enumerate(per_group)
            ]
        )
    # A mean over nothing is 0, with a graph. NaN stays NaN.
    inverse = denominators.reciprocal().nan_to_num(math.nan, 0.0, 0.0)
    totals = _joined([one.sums.totals for one in passes])
    dtype = torch.promote_types(tensor_of(passes[0].part.student).dtype, torch.float32)
    # not `dot`, whose order of four and more addends depends on where they lie in memory
    loss = (totals * inverse).sum().to(dtype)
    numerators = _joined([one.sums.numerators for one in passes])
    if len(kinds) > 1:
        scales = inverse.unbind()
        inverse = torch.stack([scales[group] for _, group in terms])
    means = (numerators * inverse).to(dtype).unbind()
    reported: dict[str, Tensor] = {}
    names = [one.part.names.get(name, name) for one in passes for name in one.plan.names]
    for name, mean in zip(names, means, strict=True):
        reported[name] = reported[name] + mean if name in reported else mean
    maps = next((one.sums.maps for one in passes if one.plan.maps), None)
    valid, distilled = passes[0].sums.counts.unbind()
    return DistillationOutput(
        loss=loss,
        terms=reported,
        valid=valid,
        denominators=own,
        maps=None if maps is None else {"reliability": maps[0], "discrepancy": maps[1]},
        distilled=distilled,
        diagnostics=_diagnostics(passes),
    )


def _diagnostics(passes: Sequence[_Pass]) -> dict[str, Tensor] | None:
    """Means over pixels, of what passes wrote of each."""
    observed = next((one for one in passes if one.observed is not None), None)
    if observed is None or observed.observed is None:
        return None
    classes, labels = classes_of(observed.part.student), observed.observed.flatten()
    labelled, distilled = observed.sums.counts.unbind()
    nll, right, agrees = observed.sums.maps[-3:]
    of_class = nll.new_zeros((2, classes + 1), dtype=torch.float64)
    of_class[0].index_add_(0, labels, nll.double().flatten())
    of_class[1].index_add_(0, labels, torch.ones_like(of_class[0, :1]).expand(len(labels)))
    found = {
        "pixel_accuracy": right.sum(dtype=torch.float64) / labelled,
        "class_loss": (of_class[0] / of_class[1])[:classes],
    }
    if observed.plan.compares:
        found["agreement"] = agrees.sum(dtype=torch.float64) / distilled
    mapped = next((one for one in passes if one.plan.maps), None)
    if mapped is not None:
        for name, values in zip(("reliability", "discrepancy"), mapped.sums.maps[:2], strict=True):
            found[name] = values.sum(dtype=torch.float64) / mapped.sums.counts[1]
    return {name: value.float() for name, value in found.items()}


def describe(
    parts: Sequence[Part], target: Tensor, options: Mapping[str, Any], return_maps: bool = False
) -> str:
    """The passes of such a call, a paragraph each; runs nothing, and refuses what a call does."""
    lines: list[str] = []
    class_weight = options["class_weight"]
    for k, part in enumerate(parts):
        maps = return_maps and k == len(parts) - 1
        unlabelled = options["unlabelled_index"]
        plans = plan(part.shape, class_weight is not None, maps, (), unlabelled is not None)
        classes = _check_part(part, plans, target, class_weight, None, options, maps)
        check_unlabelled_index(unlabelled, check_ignore_index(options["ignore_index"]), classes)
        device = tensor_of(part.student).device.type
        for one in plans:
            head = (255, int(options["align_corners"]), int(one.maps))
            structure = (*head, 255 if unlabelled is None else 254, *one.structure)
            decoded = LossSpec(structure, _numbers_of(part, one)).options()
            groups: dict[str, list[str]] = {}
            for name, group in zip(one.names, one.groups, strict=True):
                groups.setdefault(f"{one.denominators[group]}, {group}", []).append(name)
            shared = "; ".join(
                f"{' + '.join(names)} over {kind.split(',')[0]}" for kind, names in groups.items()
            )
            lines += [
                f"pass {len(lines) // 4 + 1}: {', '.join(map(repr, decoded.terms))}",
                f"  denominators, and one gradient for each: {shared or 'none'}",
                f"  backend: {backends.explain(options['backend'], structure, device)}",
                f"  {_source(part, target, structure, options)}",
            ]
    return "\n".join(lines)


def _source(
    part: Part, target: Tensor, structure: tuple[int, ...], options: Mapping[str, Any]
) -> str:
    """Where the logits of a pass come from, in words."""
    student = part.student
    grid = tuple(tensor_of(student).shape[2:])
    size = grid if options["resolution"] == "logits" else tuple(target.shape[1:])
    if not isinstance(student, Projection):
        return f"logits: {grid} to {size}"
    backend = backends.select(options["backend"], structure, tensor_of(student).device.type)
    if grid != size:
        return f"projection: first, because it is interpolated from {grid} to {size} afterwards"
    if backends.projects(backend, structure, classes_of(student), False):
        return f"projection: in the kernel of {backend}"
    return f"projection: first, because {backend} has no kernel that projects for these terms"


def _joined(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def mean_over_ranks(denominators: Tensor, process_group: Any) -> Tensor:
    """The mean, not the sum: data-parallel training averages gradients over the ranks, and
    R * (sum over ranks) / R leaves exactly the gradient of the whole batch."""
    import torch.distributed as dist

    total = denominators.clone()
    dist.all_reduce(total, group=process_group)
    return total / dist.get_world_size(process_group)


def count_pixels(
    target: Tensor, options: Mapping[str, Any], pixel_weight: Tensor | None = None
) -> Tensor:
    """What terms with labels and terms of distillation divide by on this grid: the numbers of
    labelled and of distilled pixels, or the sums of their weights. float64 [2], on the device of
    the labels; waits for nothing.

    For callers that know the labels before the loss does, such as those that accumulate batches.
    """
    kept = counted_pixels(target, pixel_weight, check_ignore_index(options["ignore_index"]))
    labelled = kept
    if options["unlabelled_index"] is not None:
        labelled = kept & counted_pixels(target, None, options["unlabelled_index"])
    if pixel_weight is None:
        return torch.stack([labelled.sum(dtype=torch.float64), kept.sum(dtype=torch.float64)])
    weight = pixel_weight.detach().double()
    return torch.stack([weight.where(one, 0.0).sum() for one in (labelled, kept)])


def normalizer_of_counts(
    shapes: Sequence[Shape], options: Mapping[str, Any], counts: Tensor | Sequence[float]
) -> Normalizer:
    """The `normalizer` that makes `counts`, labelled and distilled pixels, the denominators of all
    terms of these shapes that divide by a number of pixels; the others keep their own."""
    labelled, distilled = counts
    if options["unlabelled_index"] is None:
        return labelled
    of_kind = {"valid": labelled, "distilled": distilled}
    weighted = options["class_weight"] is not None
    found: dict[str, Tensor | float] = {}
    for shape in shapes:
        for one in plan(shape, weighted, False, (), True):
            kinds = zip(one.names, (one.denominators[k] for k in one.groups), strict=True)
            found |= {name: of_kind[kind] for name, kind in kinds if kind in of_kind}
    return found


def check_normalizer(
    normalizer: Normalizer | None, terms: Sequence[tuple[str, int]], kinds: Sequence[str]
) -> dict[int, Tensor | float]:
    """Which groups' denominators are replaced, and by what.

    terms: names and groups; kinds: of each group (`Term.denominator`).
    """
    if normalizer is None:
        return {}
    if isinstance(normalizer, Mapping):
        asked = {name for name, _ in terms}
        for name, value in normalizer.items():
            if name not in asked:
                raise ValueError(
                    f"normalizer: names the term {name!r}, this call computes "
                    f"{', '.join(sorted(asked))}"
                )
            check_scalar(value, f"normalizer[{name!r}]")
        return {group: normalizer[name] for name, group in terms if name in normalizer}
    check_scalar(normalizer, "normalizer")
    if {"valid", "distilled"} <= set(kinds):
        both = ", ".join(f'"{kind}": ...' for kind in dict.fromkeys(name for name, _ in terms))
        raise ValueError(
            "normalizer: got a scalar, but with unlabelled_index the terms have two denominators, "
            f"labelled pixels and all distilled ones; give one of each term, {{{both}}}"
        )
    return {group: normalizer for group, kind in enumerate(kinds) if kind in ("valid", "distilled")}
