"""Backend `reference`: the formulas of `reference.py` over bands of rows, in plain PyTorch.

It runs wherever PyTorch does. A band's tensors stay in the caches, and full-resolution logits
exist for one band at a time; over whole images the same formulas are bound by memory. Autograd
differentiates each band on the spot, so that forward keeps one gradient per term at the logits'
own resolution and nothing else; backward adds them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference, reference_pass
from ..labels import checked_counts
from ..spec import groups_of
from ..terms import CWD, HeteroAKD, TeacherCrossEntropy, Term
from . import Call, Sums, reference_evaluation
from .compiled import compute_dtype

__all__ = ["BACKEND", "ReferenceBackend"]


class ReferenceBackend:
    """Any terms on any device. Eager calls in float64 get `reference_pass.sums` (`ops.py`)."""

    name = "reference"

    def devices(self) -> tuple[str, ...]:
        return ()

    def unavailable(self) -> str | None:
        return None

    def projects(self, structure: tuple[int, ...], classes: int, float64: bool) -> bool:
        return False

    def reads_inputs(self, call: Call) -> bool:
        return False

    def saved_shapes(self, call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [
            ((len(groups), *logits.shape), compute_dtype(call.student))
            for logits, groups, wanted in zip(
                (call.student, call.teacher), _groups(call), call.wants[::3], strict=True
            )
            if wanted and groups and logits is not None
        ]

    def sums(self, call: Call) -> Sums:
        with _autograd():
            return self._sums(call)

    def _sums(self, call: Call) -> Sums:
        """Saved: the gradients of the totals, [groups, B, C, h, w] of the student, then of the
        teacher; of the groups that send one there."""
        options, target, class_weight = call.spec.options(), call.labels, call.class_weight
        batch, classes = call.student.shape[:2]
        height, width = target.shape[1:]
        dtype = compute_dtype(call.student)
        pixel_weight = None if call.pixel_weight is None else call.pixel_weight.to(dtype)
        counts = checked_counts(
            target, pixel_weight, classes, options.ignore_index, options.unlabelled_index
        )
        if class_weight is not None:
            class_weight = class_weight.to(dtype)
        numerators = call.student.new_zeros(len(options.asked), dtype=torch.float64)
        denominators = torch.zeros_like(numerators)
        planes = call.spec.planes
        maps = call.student.new_empty((planes, *target.shape) if planes else 0, dtype=dtype)
        positions: dict[bool, list[int]] = {False: [], True: []}  # of the terms, by who learns
        for k, term in enumerate(options.asked):
            positions[isinstance(term, TeacherCrossEntropy)].append(k)
        asked_groups = [group for group in options.groups if group >= 0]
        sides = [
            _Side(
                logits,
                {
                    group: [k for k in terms if asked_groups[k] == group]
                    for group in dict.fromkeys(asked_groups[k] for k in terms)
                }
                if learns
                else {},
                (height, width),
                options.align_corners,
                dtype,
            )
            for logits, terms, learns in (
                (
                    call.student if positions[False] or planes else None,
                    positions[False],
                    call.wants[0],
                ),
                (call.teacher, positions[True], call.wants[3]),
            )
            if logits is not None
        ]
        budget = reference_evaluation.elements_of_band(target.device)
        images = max(1, budget // (classes * height * width))
        rows = max(1, budget // (classes * width * images))

        def chunks() -> Iterator[tuple[slice, reference.Pixels, list[_Band]]]:
            """Images that are worked on together, their pixels, and these by bands of rows."""
            for first in range(0, batch, images):
                chunk = slice(first, first + images)
                weight = None if pixel_weight is None else pixel_weight[chunk]
                pixels = reference_pass.pixels_of(target[chunk], weight, classes, options, dtype)
                bands = [
                    _Band(slice(y, y + rows), pixels.rows(slice(y, y + rows)))
                    for y in range(0, height, rows)
                ]
                for side in sides:
                    side.open(chunk)
                yield chunk, pixels, bands

        slopes: dict[str, Tensor] = {}
        if any(term.over_classes for term in options.asked):
            found = numerators.new_zeros(3, classes)
            for _, _, bands in chunks():
                for band in bands:
                    pixels = band.pixels
                    found += reference.overlaps(
                        sides[0].on_grid(band), pixels.label, pixels.labelled, pixels.weight
                    )
            for k, term in enumerate(options.asked):
                if term.over_classes:
                    numerators[k], slopes[term.name] = _settle(term, found)
        for chunk, pixels, bands in chunks():
            knowledge: list[reference.Knowledge | None] = [None] * len(bands)
            shares = None
            for term in options.asked:
                if isinstance(term, HeteroAKD) and term.over_space:
                    knowledge = list(_knowledge_over_space(sides, bands, term))
                elif isinstance(term, CWD):
                    shares = _shares(sides[0], bands, term), _shares(sides[-1], bands, term)
            for band, known in zip(bands, knowledge, strict=True):
                z = [side.on_grid(band) for side in sides]
                for leaf, side in zip(z, sides, strict=True):
                    leaf.requires_grad_(bool(side.groups))
                with torch.enable_grad():
                    fractions, band_maps = reference_pass.terms_on_grid(
                        z[0], z[-1], band.pixels, class_weight, options, known, shares, slopes
                    )
                for k, (numerator, denominator) in enumerate(fractions):
                    term = options.asked[k]
                    if term.over_classes:  # which count once, not in each of the bands
                        denominators[k] = torch.maximum(denominators[k], denominator)
                        continue
                    numerators[k] += numerator.detach()
                    if not term.over_space:
                        denominators[k] += denominator.detach()
                for leaf, side in zip(z, sides, strict=True):
                    for slot, members in enumerate(side.groups.values()):
                        with torch.enable_grad():
                            parts = [options.asked[k].weight * fractions[k][0] for k in members]
                            total = torch.stack(parts).sum()
                        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
                        side.add(slot, gradient, band.rows)
                if band_maps is not None:
                    maps[:, chunk, band.rows] = band_maps
            for k, term in enumerate(options.asked):
                if term.over_space:  # an image and class once, not in each of its bands
                    denominators[k] += pixels.valid.flatten(1).any(dim=1).sum() * classes
            for side in sides:
                side.close()
        saved = [side.gradients for side in sides if side.groups]
        totals, per_group = reference_pass.group(numerators, denominators, options)
        return Sums(numerators, totals, per_group, counts, maps, saved)

    def gradient(self, call: Call, grad_totals: Tensor, saved: list[Tensor]) -> list[Tensor | None]:
        remaining = iter(saved)
        scales = grad_totals.unbind()
        grads: list[Tensor | None] = [None] * 6
        for at, logits, groups in zip(
            (0, 3), (call.student, call.teacher), _groups(call), strict=True
        ):
            if call.wants[at] and logits is not None:
                grads[at] = _combine(next(remaining), [scales[group] for group in groups], logits)
        return grads

    def predict(
        self, logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
    ) -> Tensor:
        return reference_evaluation.predict(logits, size, align_corners, dtype)

    def confusion_matrix(
        self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        return reference_evaluation.confusion_matrix(logits, target, ignore_index, align_corners)


def _groups(call: Call) -> tuple[list[int], list[int]]:
    """The groups that send a gradient to the student, and to the teacher, in order."""
    asked = groups_of(call.spec.structure)
    student = dict.fromkeys(group for name, group in asked.items() if name != "teacher_ce")
    return list(student), [group for name, group in asked.items() if name == "teacher_ce"]


def _autograd() -> AbstractContextManager[object]:
    """Compiled graphs call operators below autograd, which the formulas are differentiated with."""
    key = torch._C.DispatchKey.AutogradFunctionality
    if torch._C._dispatch_tls_is_dispatch_key_excluded(key):
        guard: AbstractContextManager[object] = torch._C._SetExcludeDispatchKeyGuard(key, False)
        return guard
    return nullcontext()


class _Band(NamedTuple):
    """Rows of the label grid, of some images."""

    rows: slice
    pixels: reference.Pixels


def _knowledge_over_space(
    sides: list[_Side], bands: list[_Band], term: HeteroAKD
) -> list[reference.Knowledge]:
    """Of each band, with weights that are a softmax over all of them."""
    student, teacher = sides
    return reference.join_over_space(
        [
            reference.evaluate_knowledge(
                student.on_grid(band),
                teacher.on_grid(band),
                band.pixels.label,
                band.pixels.valid,
                term,
                labelled=band.pixels.labelled,
                pixel_weight=band.pixels.weight,
            )
            for band in bands
        ]
    )


def _shares(side: _Side, bands: list[_Band], term: CWD) -> reference.Shares:
    """Of its softmax over all bands."""
    return reference.join_shares(
        [
            reference.space_shares(
                side.on_grid(band) / term.temperature, band.pixels.valid, band.pixels.weight
            )
            for band in bands
        ]
    )


def _settle(term: Term, found: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a term over classes, and its derivatives by `found`."""
    leaf = found.clone().requires_grad_()
    with torch.enable_grad():
        value = reference.of_overlaps(term, leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _combine(gradients: Tensor, scales: list[Tensor], logits: Tensor) -> Tensor:
    """The sum of the groups' gradients, in the dtype of `logits`, rounded once."""
    total = gradients[0] * scales[0].to(gradients.dtype)
    for gradient, scale in zip(gradients[1:], scales[1:], strict=True):
        total.addcmul_(gradient, scale.to(gradients.dtype))
    out = torch.empty_like(logits)
    as_they_are = out.dtype == total.dtype and out.is_contiguous()
    return total if as_they_are else out.copy_(total)


class _Side:
    """One model's logits: bands of their bilinear upsampling, and the way back of gradients.

    Columns are interpolated for whole images, rows band by band: either way an image's rows apart,
    so that what an ignored pixel holds reaches its neighbours only.
    """

    def __init__(
        self,
        logits: Tensor,
        groups: Mapping[int, list[int]],
        size: tuple[int, int],
        align_corners: bool,
        dtype: torch.dtype,
    ) -> None:
        """groups: those that send a gradient to these logits, and their terms."""
        self.groups = groups
        self.gradients = logits.new_empty((len(groups), *logits.shape), dtype=dtype)
        self._logits = logits.detach()
        self._dtype = dtype
        self._align_corners = align_corners
        self._width = size[1]
        self._taps = None
        if logits.shape[2] != size[0]:
            lower, upper, fraction = reference_evaluation.taps(
                logits.shape[2], size[0], align_corners, dtype, logits.device
            )
            self._taps = lower, upper, fraction[:, None]

    def open(self, images: slice) -> None:
        """Takes up these images."""
        self._low = self._wide = self._logits[images].to(self._dtype)
        self._into = self._gradients = self.gradients[:, images]
        if self._low.shape[3] != self._width:
            self._low.requires_grad_(bool(self.groups))
            with torch.enable_grad():
                self._wide = _widen(self._low, self._width, self._align_corners)
            self._gradients = self._low.new_empty((len(self.groups), *self._wide.shape))
        if self._taps is not None:  # else `add` writes each row once
            self._gradients.zero_()

    def on_grid(self, band: _Band) -> Tensor:
        """[images, C, rows, W] of the label grid, 0 at ignored pixels."""
        wide = self._wide.detach()
        if self._taps is None:
            return _zero_where_ignored(wide[:, :, band.rows], band.pixels.valid)
        lower, upper, fraction = (tap[band.rows] for tap in self._taps)
        # Two products, not a + (b - a) f: the difference of the dtype's largest would overflow.
        z = wide.index_select(2, lower).mul_(1 - fraction)
        z.addcmul_(wide.index_select(2, upper), fraction)
        return _zero_where_ignored(z, band.pixels.valid)

    def add(self, slot: int, gradient: Tensor, rows: slice) -> None:
        """Adds a group's gradient with respect to the logits of these rows."""
        into = self._gradients[slot]
        if self._taps is None:
            into[:, :, rows] = gradient
            return
        lower, upper, fraction = (tap[rows] for tap in self._taps)
        into.index_add_(2, lower, gradient * (1 - fraction))
        into.index_add_(2, upper, gradient * fraction)

    def close(self) -> None:
        """Takes the gradients of these images from wide rows to the logits' own."""
        if self._gradients is self._into:
            return
        for into, gradient in zip(self._into, self._gradients, strict=True):
            (low,) = torch.autograd.grad(self._wide, self._low, gradient, retain_graph=True)
            into.copy_(low)


def _widen(logits: Tensor, width: int, align_corners: bool) -> Tensor:
    """[B, C, h, w] -> [B, C, h, width]."""
    rows = logits.flatten(1, 2)
    if logits.device.type == "cpu":
        wide = F.interpolate(rows, width, mode="linear", align_corners=align_corners)
    else:  # of the two, the one that torch has a deterministic backward for
        wide = F.interpolate(
            rows[:, :, None], (1, width), mode="bilinear", align_corners=align_corners
        )
    return wide.view(*logits.shape[:3], width)


def _zero_where_ignored(z: Tensor, valid: Tensor) -> Tensor:
    """`torch.where(valid, z, 0)`, four times as fast on a CPU: an `and` of bits is vectorised."""
    integer = torch.int32 if z.dtype == torch.float32 else torch.int64
    return (z.view(integer) & -valid.to(integer)[:, None]).view(z.dtype)


BACKEND = ReferenceBackend()
