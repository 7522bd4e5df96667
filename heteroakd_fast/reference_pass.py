"""The oracle's pass: all terms of a call over one label grid, by the formulas of `reference.py`.

`sums` materialises full-resolution logits; the backend `reference` runs the same formulas over
bands of rows (`backends/reference.py`). Autograd does the gradients in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import (
    Fraction,
    Knowledge,
    Pixels,
    Shares,
    diagnostics,
    evaluate_knowledge,
    fraction,
    upsample,
)
from .spec import Options
from .terms import HeteroAKD

__all__ = ["PassSums", "group", "pixels_of", "sums", "terms_on_grid"]


class PassSums(NamedTuple):
    """Terms of one pass, in the order of `Options.asked`, before any mean is taken."""

    numerators: Tensor
    """[K], float64, differentiable"""
    denominators: Tensor
    """[K], float64"""
    maps: Tensor
    """[planes, B, H, W] (`LossSpec.planes`; 0 at ignored pixels) or [0]"""


def sums(
    student_logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    pixel_weight: Tensor | None = None,
) -> PassSums:
    """All terms of a pass over one label grid.

    Args:
        student_logits: [B, C, h, w], any floating dtype; computed in float32 or wider.
        target: [B, H, W] class indices, `ignore_index` or `unlabelled_index`; already checked.
        teacher_logits: [B, C, h', w'] or None when no term needs it.
        class_weight: [C] or None.
        options: what to compute.
        pixel_weight: [B, H, W] or None.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    size = (target.shape[1], target.shape[2])
    pixels = pixels_of(target, pixel_weight, student_logits.shape[1], options, dtype)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)

    def on_label_grid(logits: Tensor) -> Tensor:
        z = upsample(logits.to(dtype), size, options.align_corners)
        return torch.where(pixels.valid[:, None], z, 0)

    student_z = on_label_grid(student_logits)
    teacher_z = student_z if teacher_logits is None else on_label_grid(teacher_logits)
    fractions, planes = terms_on_grid(student_z, teacher_z, pixels, class_weight, options)
    return PassSums(
        numerators=torch.stack([numerator for numerator, _ in fractions]),
        denominators=torch.stack([denominator.detach() for _, denominator in fractions]),
        maps=student_z.new_empty(0) if planes is None else planes,
    )


def pixels_of(
    target: Tensor,
    pixel_weight: Tensor | None,
    num_classes: int,
    options: Options,
    dtype: torch.dtype,
) -> Pixels:
    """Of [B, H, W] each; a weight or a label out of range is the caller's check to report."""
    target = target.long()
    valid = target != options.ignore_index
    if pixel_weight is not None:
        pixel_weight = pixel_weight.to(dtype)
        valid = valid & (pixel_weight != 0)
    labelled = valid & (target >= 0) & (target < num_classes)
    if options.unlabelled_index == options.ignore_index:  # a wrong label must only be no index
        return Pixels(torch.where(labelled, target, 0), valid, valid, pixel_weight)
    return Pixels(torch.where(labelled, target, 0), labelled, valid, pixel_weight)


def terms_on_grid(
    student_z: Tensor,
    teacher_z: Tensor,
    pixels: Pixels,
    class_weight: Tensor | None,
    options: Options,
    knowledge: Knowledge | None = None,
    shares: tuple[Shares, Shares] | None = None,
    slopes: Mapping[str, Tensor] | None = None,
) -> tuple[list[Fraction], Tensor | None]:
    """The terms that are asked for, in their order, and what is written of each pixel, or None.

    Args:
        student_z, teacher_z: [B, C, H, W], the same floating dtype, finite where not valid; one
            that no term reads may be the other.
        pixels: [B, H, W].
        class_weight: [C] in the dtype of `student_z`, or None.
        options: what to compute.
        knowledge: what `evaluate_knowledge` found, if it was called already.
        shares: of `cwd`, where the rows are not all of the images.
        slopes: by the names of terms over classes, where the pixels are not all: the derivatives
            [3, C] of their values by `overlaps`, of which the numerator then is the linear form.
    """
    label, labelled, valid, weight = pixels
    mixing: HeteroAKD | None = options.find(HeteroAKD.name)
    if knowledge is None and mixing is not None:
        knowledge = evaluate_knowledge(
            student_z, teacher_z, label, valid, mixing, options.maps, labelled, weight
        )
    slopes_of = [(slopes or {}).get(term.name) for term in options.asked]
    fractions = [
        fraction(
            term,
            student_z,
            teacher_z,
            pixels,
            class_weight,
            knowledge,
            shares,
            (slopes or {}).get(term.name),
        )
        for term, slope in zip(options.asked, slopes_of, strict=True)
    ]
    planes = []
    if options.maps and knowledge is not None:
        planes += [knowledge.reliability, knowledge.discrepancy]
    if options.diagnostics:
        planes += diagnostics(student_z.detach(), teacher_z.detach(), pixels)
    return fractions, torch.where(valid, torch.stack(planes), 0) if planes else None


def group(numerators: Tensor, denominators: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Of each group the sum of weight * numerator, and the denominator; [groups] each."""
    totals, of_group = [], []
    for index in range(options.group_count):
        members = [
            k for k, group in enumerate(g for g in options.groups if g >= 0) if group == index
        ]
        parts = [options.asked[k].weight * numerators[k] for k in members]
        totals.append(torch.stack(parts).sum())
        of_group.append(denominators[members[0]])
    return torch.stack(totals), torch.stack(of_group)
