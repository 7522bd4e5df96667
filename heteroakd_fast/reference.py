"""The oracle: the whole method in plain PyTorch, and the backend that always works.

The formulas are those of `docs/method.md`, in its order and under its names; the compiled
kernels are laid out in the same order, so that the three can be read side by side.

Every function works on the label grid, class axis 1, in the dtype it is given; run it in
float64 and it is the ground truth of the tests. Nothing here is tuned: full-resolution logits
are materialised and autograd does the gradients, which is what the kernels are measured against.

Shapes: B images, C classes, label grid H x W; `student_z` and `teacher_z` [B, C, H, W];
`label` and `valid` [B, H, W], where `label` holds a class index everywhere (0 where not `valid`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import LossSpec

__all__ = [
    "Knowledge",
    "PassSums",
    "bernoulli_kl",
    "cross_entropy",
    "distillation_sums",
    "evaluate_knowledge",
    "feature",
    "hetero",
    "kd",
    "negative_log_likelihood",
    "project",
    "upsample",
]

#: Keeps the paper's reliability defined where both sides are perfect; there it is one half.
RELIABILITY_EPS = 1e-6

# A term before its mean is taken: (numerator, denominator), both scalars.
Fraction = tuple[Tensor, Tensor]


class PassSums(NamedTuple):
    """Terms of one pass, in the order of `LossSpec.terms`, before any mean is taken."""

    numerators: Tensor
    """[K], float64, differentiable"""
    denominators: Tensor
    """[K], float64"""
    maps: Tensor
    """[2, B, H, W] (reliability, discrepancy; 0 at ignored pixels) or [0]"""


class Knowledge(NamedTuple):
    """What mixing (KMM) and evaluation (KEM) found; all of it detached."""

    mixed_target: Tensor
    """[B, C, H, W]: log m where the term is a KL, z_h / T where it is a Bernoulli KL"""
    weight: Tensor
    """[B, 1, H, W] (d_p) or [B, C, H, W] (W_c); 0 at ignored pixels"""
    reliability: Tensor
    """[B, H, W]: r_t, of the labelled class in the preset `paper`"""
    discrepancy: Tensor
    """[B, H, W]: d_p, or dH of the labelled class"""


# --- section 1: projection ---------------------------------------------------------------------


def project(
    feature_map: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """Z = ReLU?(BN?(W f + b)); `feature_map` [B, D, h, w], `weight` [C, D] -> [B, C, h, w].

    BN is in training mode (statistics of this batch), and is left out without `norm_weight`.
    """
    z = torch.einsum("bdhw,cd->bchw", feature_map, weight)
    if bias is not None:
        z = z + bias[:, None, None]
    if norm_weight is not None:
        z = F.batch_norm(z, None, None, norm_weight, norm_bias, training=True, eps=eps)
    return z.relu() if relu else z


# --- section 2: upsampling ---------------------------------------------------------------------


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear resampling of [B, C, h, w] to [B, C, H, W]; any ratio, up or down."""
    if tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)


# --- section 3: terms --------------------------------------------------------------------------


def _total(per_pixel: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid pixels in float64; `where`, not a product, so that ignored NaNs stay out."""
    return torch.where(valid, per_pixel, 0).sum(dtype=torch.float64)


def _total_divergence(per_pixel: Tensor, valid: Tensor) -> Tensor:
    """`_total` of what is never negative, though its rounding may be; the gradient is the sum's."""
    total = _total(per_pixel, valid)
    return total - total.detach().clamp(max=0.0)


def _valid_count(valid: Tensor) -> Tensor:
    return valid.sum(dtype=torch.float64)


def _at_label(per_class: Tensor, label: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W]: the entry of the labelled class."""
    return per_class.gather(1, label[:, None]).squeeze(1)


def _one_hot(z: Tensor, label: Tensor) -> Tensor:
    """[B, C, H, W] bool. By comparison: `F.one_hot` breaks compiled graphs."""
    classes = torch.arange(z.shape[1], device=z.device)
    return classes[:, None, None] == label[:, None]


def negative_log_likelihood(z: Tensor, label: Tensor) -> Tensor:
    """-log softmax(z)_label, [B, H, W].

    As log(1 + exp(a)) with a = logsumexp of the other classes - z_label. The textbook form takes
    a difference of near-equal numbers for a confident pixel; this one keeps the value's and the
    gradient's relative precision, because the true-class gradient p - 1 comes out as minus the
    sum of the others. The maximum comes off first, where the subtraction is still exact.
    """
    if z.shape[1] == 1:
        return z[:, 0] - z[:, 0]
    z = z - z.detach().amax(dim=1, keepdim=True)
    others = z.masked_fill(_one_hot(z, label), -math.inf).logsumexp(dim=1)
    a = others - _at_label(z, label)
    return torch.logaddexp(a, torch.zeros_like(a))


def cross_entropy(
    z: Tensor,
    label: Tensor,
    valid: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Fraction:
    """`torch.nn.functional.cross_entropy`, its weighted mean and its label smoothing included."""
    nll = negative_log_likelihood(z, label)
    pixel_weight = torch.ones_like(nll) if class_weight is None else class_weight[label]
    per_pixel = pixel_weight * nll
    if label_smoothing > 0.0:
        log_p = z.log_softmax(dim=1)
        weighted = log_p if class_weight is None else class_weight[:, None, None] * log_p
        uniform = -weighted.sum(dim=1) / z.shape[1]
        per_pixel = (1.0 - label_smoothing) * per_pixel + label_smoothing * uniform
    return _total(per_pixel, valid), _total(pixel_weight, valid)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per pixel, [B, H, W], from log-probabilities over axis 1."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=1)


def kd(
    student_z: Tensor,
    teacher_z: Tensor,
    valid: Tensor,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
) -> Fraction:
    """T^2 times the divergence of the softened distributions (Hinton et al., 2015).

    "forward" KL(p_t || p_s), "reverse" KL(p_s || p_t), "js" the generalised Jensen-Shannon
    divergence beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s.
    """
    log_p_s = (student_z / temperature).log_softmax(dim=1)
    log_p_t = (teacher_z / temperature).log_softmax(dim=1)
    if divergence == "forward":
        per_pixel = _kl(log_p_t, log_p_s)
    elif divergence == "reverse":
        per_pixel = _kl(log_p_s, log_p_t)
    else:
        log_m = torch.logaddexp(log_p_t + math.log(beta), log_p_s + math.log1p(-beta))
        per_pixel = beta * _kl(log_p_t, log_m) + (1.0 - beta) * _kl(log_p_s, log_m)
    return _total_divergence(temperature**2 * per_pixel, valid), _valid_count(valid)


def feature(student_z: Tensor, teacher_z: Tensor, valid: Tensor) -> Fraction:
    """Mean over classes of the squared difference in the aligned logits space."""
    return _total((student_z - teacher_z).square().mean(dim=1), valid), _valid_count(valid)


# --- sections 4 and 5: mixing (KMM) and evaluation (KEM) ---------------------------------------


def evaluate_knowledge(
    student_z: Tensor, teacher_z: Tensor, label: Tensor, valid: Tensor, spec: LossSpec
) -> Knowledge:
    """Reliability, mixed target and discrepancy; everything returned is detached."""
    student_z, teacher_z = student_z.detach(), teacher_z.detach()
    if spec.preset == "paper":
        return _evaluate_paper(student_z, teacher_z, label, valid, spec)
    return _evaluate_softmax_kl(student_z, teacher_z, label, valid, spec)


def _evaluate_softmax_kl(
    student_z: Tensor, teacher_z: Tensor, label: Tensor, valid: Tensor, spec: LossSpec
) -> Knowledge:
    t = spec.temperature
    log_p_s = (student_z / t).log_softmax(dim=1)
    log_p_t = (teacher_z / t).log_softmax(dim=1)

    # reliability: (r_t, r_s) = softmax(-e_t / tau, -e_s / tau)
    e_t = negative_log_likelihood(teacher_z, label)
    e_s = negative_log_likelihood(student_z, label)
    log_r_t = F.logsigmoid((e_s - e_t) / spec.tau)[:, None]
    log_r_s = F.logsigmoid((e_t - e_s) / spec.tau)[:, None]

    # mixed_target, as log m
    if spec.mix == "probs":
        mixed_target = torch.logaddexp(log_r_t + log_p_t, log_r_s + log_p_s)
    elif spec.mix == "teacher":
        mixed_target = log_p_t
    else:
        z_h = log_r_t.exp() * teacher_z + log_r_s.exp() * student_z
        mixed_target = (z_h / t).log_softmax(dim=1)

    # discrepancy: a KL is never negative, its rounding may be
    discrepancy = _kl(log_p_t, log_p_s).clamp(min=0.0)

    d = discrepancy if spec.evaluation == "discrepancy" else torch.ones_like(discrepancy)
    return Knowledge(
        mixed_target=mixed_target,
        weight=torch.where(valid, d, 0)[:, None],
        reliability=log_r_t.exp().squeeze(1),
        discrepancy=discrepancy,
    )


def _evaluate_paper(
    student_z: Tensor, teacher_z: Tensor, label: Tensor, valid: Tensor, spec: LossSpec
) -> Knowledge:
    one_hot = _one_hot(student_z, label).to(student_z.dtype)

    def error(z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, one_hot, reduction="none")

    # reliability, per class (Eq. 5 and 6)
    h_s, h_t = error(student_z), error(teacher_z)
    r_t = (h_s + RELIABILITY_EPS) / (h_t + h_s + 2.0 * RELIABILITY_EPS)

    # mixed_target (Eq. 7)
    z_h = teacher_z if spec.mix == "teacher" else r_t * teacher_z + (1.0 - r_t) * student_z

    # discrepancy: the positive reliability gap (Eq. 8), and the class weights (Eq. 9)
    discrepancy = (h_s - error(z_h)).clamp(min=0.0)
    inside = valid[:, None]
    if spec.evaluation == "none":
        weight = torch.ones_like(h_s)
    elif spec.weight_axis == "class":
        weight = (h_s + discrepancy).softmax(dim=1)
    else:
        over_space = (h_s + discrepancy).masked_fill(~inside, -math.inf).flatten(2)
        weight = over_space.softmax(dim=2).reshape(h_s.shape)

    softened = z_h / spec.temperature
    return Knowledge(
        mixed_target=softened.log_softmax(dim=1) if spec.weight_axis == "class" else softened,
        weight=torch.where(inside, weight, 0),
        reliability=_at_label(r_t, label),
        discrepancy=_at_label(discrepancy, label),
    )


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL of sigmoid(a) from sigmoid(b), elementwise, from logits."""
    p = a.sigmoid()
    return p * (F.logsigmoid(a) - F.logsigmoid(b)) + (1.0 - p) * (
        F.logsigmoid(-a) - F.logsigmoid(-b)
    )


def hetero(student_z: Tensor, knowledge: Knowledge, valid: Tensor, spec: LossSpec) -> Fraction:
    """The HeteroAKD term (Eq. 10, or the KL form of the preset `softmax-kl`)."""
    t = spec.temperature
    weight = knowledge.weight
    if spec.preset == "softmax-kl":
        log_m, log_p_s = knowledge.mixed_target, (student_z / t).log_softmax(dim=1)
        per_pixel = weight.squeeze(1) * (t**2 * _kl(log_m, log_p_s))
        return _total_divergence(per_pixel, valid), _total(weight.squeeze(1), valid)
    if spec.weight_axis == "class":
        m, log_p_s = knowledge.mixed_target.exp(), (student_z / t).log_softmax(dim=1)
        return _total(-(weight * m * log_p_s).sum(dim=1), valid), _valid_count(valid)
    per_pixel = (weight * bernoulli_kl(knowledge.mixed_target, student_z / t)).sum(dim=1)
    if spec.evaluation == "none":  # W = 1: a mean over pixels and classes, as the weights' own is
        per_pixel = per_pixel / student_z.shape[1]
        return _total_divergence(t**2 * per_pixel, valid), _valid_count(valid)
    images = valid.flatten(1).any(dim=1).sum(dtype=torch.float64)
    return _total_divergence(t**2 * per_pixel, valid), images * student_z.shape[1]


# --- one pass ----------------------------------------------------------------------------------


def distillation_sums(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
) -> PassSums:
    """All terms of `spec` over one label grid.

    Args:
        student_logits: [B, C, h, w], any floating dtype; computed in float32 or wider.
        teacher_logits: [B, C, h', w'] or None when no term needs it.
        target: [B, H, W] class indices or `ignore_index`; already checked.
        class_weight: [C] or None.
        spec: what to compute.
    """
    if target.numel() == 0:
        return _empty_pass(student_logits, teacher_logits, target, spec)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    size = (target.shape[1], target.shape[2])
    target = target.long()
    valid = target != spec.ignore_index
    # A label out of range is the caller's check to report; here it must only not be an index.
    in_range = (target >= 0) & (target < student_logits.shape[1])
    label = torch.where(valid & in_range, target, 0)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)

    def on_label_grid(logits: Tensor) -> Tensor:
        z = upsample(logits.to(dtype), size, spec.align_corners)
        return torch.where(valid[:, None], z, 0)

    student_z = on_label_grid(student_logits)
    teacher_z = student_z if teacher_logits is None else on_label_grid(teacher_logits)
    frozen_teacher_z = teacher_z.detach()
    knowledge = None
    if "hetero" in spec.terms or spec.maps:
        knowledge = evaluate_knowledge(student_z, teacher_z, label, valid, spec)

    fractions: list[Fraction] = []
    for term in spec.terms:
        if term == "ce":
            fractions.append(
                cross_entropy(student_z, label, valid, class_weight, spec.label_smoothing)
            )
        elif term == "teacher_ce":
            fractions.append(
                cross_entropy(teacher_z, label, valid, class_weight, spec.label_smoothing)
            )
        elif term == "kd":
            fractions.append(
                kd(
                    student_z,
                    frozen_teacher_z,
                    valid,
                    spec.temperature,
                    spec.kd_divergence,
                    spec.kd_beta,
                )
            )
        elif term == "hetero":
            assert knowledge is not None
            fractions.append(hetero(student_z, knowledge, valid, spec))
        elif term == "feature":
            fractions.append(feature(student_z, frozen_teacher_z, valid))
        else:
            raise AssertionError(f"no formula for the term {term!r}")

    maps = student_z.new_empty(0)
    if spec.maps and knowledge is not None:
        pair = torch.stack((knowledge.reliability, knowledge.discrepancy))
        maps = torch.where(valid, pair, 0)
    return PassSums(
        numerators=torch.stack([numerator for numerator, _ in fractions]),
        denominators=torch.stack([denominator.detach() for _, denominator in fractions]),
        maps=maps,
    )


def _empty_pass(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor, spec: LossSpec
) -> PassSums:
    """No pixel at all: zeros that are still connected to both logits."""
    nothing = student_logits.flatten()[:0].sum(dtype=torch.float64)
    if teacher_logits is not None:
        nothing = nothing + teacher_logits.flatten()[:0].sum(dtype=torch.float64)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    maps_shape = (2, *target.shape) if spec.maps else (0,)
    return PassSums(
        numerators=nothing.expand(len(spec.terms)),
        denominators=torch.zeros(
            len(spec.terms), dtype=torch.float64, device=student_logits.device
        ),
        maps=torch.zeros(maps_shape, dtype=dtype, device=student_logits.device),
    )
