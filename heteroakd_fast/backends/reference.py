"""Backend `reference`: the formulas of `reference.py` over bands of rows, in plain PyTorch.

It runs wherever PyTorch does. A band's tensors stay in the caches, and full-resolution logits
exist for one band at a time; over whole images the same formulas are bound by memory. Autograd
differentiates each band on the spot, so that forward keeps one gradient per term at the logits'
own resolution and nothing else; backward adds them up.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..labels import count_valid
from ..spec import LossSpec
from . import ForwardResult

__all__ = ["BACKEND", "ReferenceBackend"]

#: Elements of a band's logits, [B, C, rows, W]. On a CPU a few such tensors fit the caches and are
#: enough work for many threads; elsewhere a band takes longer than launching its kernels.
_BAND_ON_CPU: Final = 2**19
_BAND_ELSEWHERE: Final = 2**24


class ReferenceBackend:
    """The methods of `Backend` that an eager call needs; a tracer gets `reference` itself."""

    name = "reference"

    def backward_reads_inputs(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> bool:
        return False

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> ForwardResult:
        """Sums of one pass; `target` is not empty. Saved: the unscaled gradients of the numerators,
        [terms, B, C, h, w] of the student, then [1, B, C, h', w'] of the teacher."""
        batch, classes = student_logits.shape[:2]
        height, width = target.shape[1:]
        valid_count = count_valid(target, classes, spec.ignore_index)
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        if class_weight is not None:
            class_weight = class_weight.to(dtype)
        numerators = student_logits.new_zeros(len(spec.terms), dtype=torch.float64)
        denominators = torch.zeros_like(numerators)
        maps = student_logits.new_empty((2, *target.shape) if spec.maps else 0, dtype=dtype)
        of_student = _terms_of_student(spec)
        sides = [
            _Side(logits, terms if learns else (), (height, width), spec.align_corners, dtype)
            for logits, terms, learns in (
                (student_logits if of_student or spec.maps else None, of_student, student_grad),
                (teacher_logits, ("teacher_ce",), teacher_grad),
            )
            if logits is not None
        ]
        budget = _BAND_ON_CPU if target.device.type == "cpu" else _BAND_ELSEWHERE
        images = max(1, budget // (classes * height * width))
        rows = max(1, budget // (classes * width * images))
        for first in range(0, batch, images):
            chunk = slice(first, first + images)
            label, valid = reference.labels_and_valid(target[chunk], classes, spec.ignore_index)
            bands = [
                _Band(slice(y, y + rows), label[:, y : y + rows], valid[:, y : y + rows])
                for y in range(0, height, rows)
            ]
            for side in sides:
                side.open(chunk)
            knowledge: list[reference.Knowledge | None] = [None] * len(bands)
            over_space = "hetero" in spec.terms and spec.weighs_space
            if over_space:
                knowledge = list(_knowledge_over_space(sides, bands, spec))
            for band, known in zip(bands, knowledge, strict=True):
                z = [side.on_grid(band) for side in sides]
                for leaf, side in zip(z, sides, strict=True):
                    leaf.requires_grad_(bool(side.terms))
                with torch.enable_grad():
                    fractions, band_maps = reference.terms_on_grid(
                        z[0], z[-1], band.label, band.valid, class_weight, spec, known
                    )
                for k, (numerator, denominator) in enumerate(fractions):
                    term = spec.terms[k]
                    numerators[k] += numerator.detach()
                    if not (over_space and term == "hetero"):
                        denominators[k] += denominator.detach()
                    for leaf, side in zip(z, sides, strict=True):
                        if term in side.terms:
                            (gradient,) = torch.autograd.grad(numerator, leaf, retain_graph=True)
                            side.add(term, gradient, band.rows)
                if band_maps is not None:
                    maps[:, chunk, band.rows] = band_maps
            if knowledge[0] is not None and knowledge[0].shares is not None:
                # an image and class once, not in each of its bands
                denominators[spec.terms.index("hetero")] += (knowledge[0].shares[1] != 0).sum()
            for side in sides:
                side.close()
        saved = [side.gradients for side in sides if side.terms]
        return ForwardResult(numerators, denominators, valid_count, maps, saved)

    def backward(
        self,
        grad_numerators: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        class_weight: Tensor | None,
        saved: list[Tensor],
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        remaining = iter(saved)
        scales = dict(zip(spec.terms, grad_numerators.unbind(), strict=True))
        student = teacher = None
        if student_grad:
            of_student = [scales[term] for term in _terms_of_student(spec)]
            student = _combine(next(remaining), of_student, student_logits)
        if teacher_grad and teacher_logits is not None:
            teacher = _combine(next(remaining), [scales["teacher_ce"]], teacher_logits)
        return student, teacher


def _terms_of_student(spec: LossSpec) -> tuple[str, ...]:
    return tuple(term for term in spec.terms if term != "teacher_ce")


class _Band(NamedTuple):
    """Rows of the label grid, of some images."""

    rows: slice
    label: Tensor
    """[B, rows, W], as is `valid`"""
    valid: Tensor


def _knowledge_over_space(
    sides: list[_Side], bands: list[_Band], spec: LossSpec
) -> list[reference.Knowledge]:
    """Of each band, with weights that are a softmax over all of them."""
    student, teacher = sides
    return reference.join_over_space(
        [
            reference.evaluate_knowledge(
                student.on_grid(band), teacher.on_grid(band), band.label, band.valid, spec
            )
            for band in bands
        ]
    )


def _combine(gradients: Tensor, scales: list[Tensor], logits: Tensor) -> Tensor:
    """The sum of the terms' gradients, in the dtype of `logits`, rounded once."""
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
        terms: tuple[str, ...],
        size: tuple[int, int],
        align_corners: bool,
        dtype: torch.dtype,
    ) -> None:
        """terms: those that send a gradient to these logits."""
        self.terms = terms
        self.gradients = logits.new_empty((len(terms), *logits.shape), dtype=dtype)
        self._logits = logits.detach()
        self._dtype = dtype
        self._align_corners = align_corners
        self._width = size[1]
        self._taps = None
        if logits.shape[2] != size[0]:
            self._taps = _taps(logits.shape[2], size[0], align_corners, dtype, logits.device)

    def open(self, images: slice) -> None:
        """Takes up these images."""
        self._low = self._wide = self._logits[images].to(self._dtype)
        self._into = self._gradients = self.gradients[:, images]
        if self._low.shape[3] != self._width:
            self._low.requires_grad_(bool(self.terms))
            with torch.enable_grad():
                self._wide = _widen(self._low, self._width, self._align_corners)
            self._gradients = self._low.new_empty((len(self.terms), *self._wide.shape))
        if self._taps is not None:  # else `add` writes each row once
            self._gradients.zero_()

    def on_grid(self, band: _Band) -> Tensor:
        """[images, C, rows, W] of the label grid, 0 at ignored pixels."""
        wide = self._wide.detach()
        if self._taps is None:
            return _zero_where_ignored(wide[:, :, band.rows], band.valid)
        lower, upper, fraction = (tap[band.rows] for tap in self._taps)
        # Two products, not a + (b - a) f: the difference of the dtype's largest would overflow.
        z = wide.index_select(2, lower).mul_(1 - fraction)
        z.addcmul_(wide.index_select(2, upper), fraction)
        return _zero_where_ignored(z, band.valid)

    def add(self, term: str, gradient: Tensor, rows: slice) -> None:
        """Adds a term's gradient with respect to the logits of these rows."""
        into = self._gradients[self.terms.index(term)]
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


def _taps(
    in_size: int, out_size: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each output row the two input rows and the second one's share [rows, 1], as
    `F.interpolate` has them."""
    row = torch.arange(out_size, dtype=torch.float64, device=device)
    if align_corners:
        source = row * ((in_size - 1) / max(out_size - 1, 1))
    else:
        source = ((row + 0.5) * (in_size / out_size) - 0.5).clamp(min=0.0)
    lower = source.floor().clamp(max=in_size - 1)
    upper = (lower + 1).clamp(max=in_size - 1)
    return lower.long(), upper.long(), (source - lower).to(dtype)[:, None]


BACKEND = ReferenceBackend()
