"""The oracle: the whole method in plain PyTorch.

The formulas are those of `docs/method.md`, in its order and under its names; the compiled
kernels are laid out in the same order, so that the three can be read side by side.

Every function works on the label grid, class axis 1, in the dtype it is given; run it in float64
and it is the ground truth of the tests. `reference_pass.py` makes a call's pass of them.

Shapes: B images, C classes, label grid H x W; `student_z` and `teacher_z` [B, C, H, W];
`label` and `valid` [B, H, W], where `label` holds a class index everywhere (0 where there is none).
`valid` are the pixels that a term counts: labelled ones for cross entropies, `dkd` and `focal`,
unlabelled ones too for the others; `pixel_weight` [B, H, W] or None multiplies their shares in
every sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import (
    CWD,
    DKD,
    KD,
    OFA,
    CrossEntropy,
    Dice,
    Feature,
    Focal,
    HeteroAKD,
    TeacherCrossEntropy,
    Term,
    Tversky,
)

__all__ = [
    "Knowledge",
    "Pixels",
    "bernoulli_kl",
    "cross_entropy",
    "cwd",
    "diagnostics",
    "dice",
    "dkd",
    "evaluate_knowledge",
    "feature",
    "focal",
    "fraction",
    "hetero",
    "join_over_space",
    "join_shares",
    "kd",
    "negative_log_likelihood",
    "of_overlaps",
    "ofa",
    "overlaps",
    "project",
    "space_shares",
    "standardized",
    "tversky",
    "upsample",
]

#: Keeps the paper's reliability defined where both sides are perfect; there it is one half.
RELIABILITY_EPS = 1e-6

#: Least denominator of an overlap and, before its logarithm, least overlap.
OVERLAP_EPS = 1e-7

# A term before its mean is taken: (numerator, denominator), both scalars.
Fraction = tuple[Tensor, Tensor]


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
    shares: Shares | None = None
    """Of weights over space, what the softmax divided by"""


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


def _total(per_pixel: Tensor, valid: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
    """Sum over valid pixels in float64; `where`, not a product, so that ignored NaNs stay out."""
    if pixel_weight is not None:
        per_pixel = per_pixel * pixel_weight
    return torch.where(valid, per_pixel, 0).sum(dtype=torch.float64)


def _total_divergence(
    per_pixel: Tensor, valid: Tensor, pixel_weight: Tensor | None = None
) -> Tensor:
    """`_total` of what is never negative, though its rounding may be; the gradient is the sum's."""
    total = _total(per_pixel, valid, pixel_weight)
    return total - total.detach().clamp(max=0.0)


def _valid_count(valid: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
    """|V|, or the sum of the weights over V."""
    if pixel_weight is None:
        return valid.sum(dtype=torch.float64)
    return torch.where(valid, pixel_weight, 0).sum(dtype=torch.float64)


def _at_label(per_class: Tensor, label: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W]: the entry of the labelled class."""
    return per_class.gather(1, label[:, None]).squeeze(1)


def _one_hot(z: Tensor, label: Tensor) -> Tensor:
    """[B, C, H, W] bool. By comparison: `F.one_hot` breaks compiled graphs."""
    classes = torch.arange(z.shape[1], device=z.device)
    return classes[:, None, None] == label[:, None]


def negative_log_likelihood(z: Tensor, label: Tensor) -> Tensor:
    """-log softmax(z)_label, [B, H, W]."""
    nll: Tensor = _NegativeLogLikelihood.apply(z, label[:, None])[0]
    return nll


class _NegativeLogLikelihood(torch.autograd.Function):
    """With p_c = exp(z_c) / total and "others" the classes that are not the label's:

        -log p_label = log(total) - z_label,        d / dz_c = p_c,
                                                    d / dz_label = p_label - 1 = -p_others.

    A confident pixel's value and its p_label - 1 are differences of near-equal numbers; taken from
    the sum of the others, which leaves out the label's, both keep their relative precision.
    """

    @staticmethod
    def forward(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        largest = z.amax(dim=1, keepdim=True)
        z_label = (z.gather(1, index) - largest).squeeze(1)
        exp_others = (z - largest).exp_().scatter_(1, index, 0.0)
        others = exp_others.sum(dim=1)
        total = others + z_label.exp()
        nll = torch.where(z_label == 0.0, others.log1p(), total.log() - z_label)
        return nll, exp_others, others, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1], *output[1:])

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, *unused: None
    ) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        index, exp_others, others, total = ctx.saved_tensors
        scale = (grad / total)[:, None]
        return (exp_others * scale).scatter_(1, index, -others[:, None] * scale), None


def cross_entropy(
    z: Tensor,
    label: Tensor,
    valid: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    pixel_weight: Tensor | None = None,
) -> Fraction:
    """`torch.nn.functional.cross_entropy`, its weighted mean and its label smoothing included."""
    nll = negative_log_likelihood(z, label)
    label_weight = torch.ones_like(nll) if class_weight is None else class_weight[label]
    per_pixel = label_weight * nll
    if label_smoothing > 0.0:  # -log p_c = nll + z_label - z_c
        weight = torch.ones_like(z[0, :, 0, 0]) if class_weight is None else class_weight
        behind = z.gather(1, label[:, None]) - z
        behind = behind if class_weight is None else behind * weight[:, None, None]
        uniform = (nll * weight.sum() + behind.sum(dim=1)) / z.shape[1]
        per_pixel = (1.0 - label_smoothing) * per_pixel + label_smoothing * uniform
    return _total(per_pixel, valid, pixel_weight), _total(label_weight, valid, pixel_weight)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per pixel, [B, H, W], from log-probabilities over axis 1."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=1)


def standardized(z: Tensor) -> Tensor:
    """(z - mean) / (1e-7 + standard deviation) over the classes; 0 of one class."""
    if z.shape[1] == 1:
        return 0 * z
    x = z - z.amax(dim=1, keepdim=True).detach()  # exact where the logits are near each other
    return (x - x.mean(dim=1, keepdim=True)) / (1e-7 + x.std(dim=1, keepdim=True))


def kd(
    student_z: Tensor,
    teacher_z: Tensor,
    valid: Tensor,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    alpha: float = 0.1,
    standardize: bool = False,
    pixel_weight: Tensor | None = None,
) -> Fraction:
    """T^2 times the divergence of the softened distributions (Hinton et al., 2015).

    "forward" KL(p_t || p_s), "reverse" KL(p_s || p_t), "js" the generalised Jensen-Shannon
    divergence beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s, "skew"
    KL(p_t || alpha p_t + (1 - alpha) p_s).

    standardize: of `standardized` logits (Sun et al., CVPR 2024).
    """
    if standardize:
        student_z, teacher_z = standardized(student_z), standardized(teacher_z)
    log_p_s = (student_z / temperature).log_softmax(dim=1)
    log_p_t = (teacher_z / temperature).log_softmax(dim=1)
    if divergence == "forward":
        per_pixel = _kl(log_p_t, log_p_s)
    elif divergence == "reverse":
        per_pixel = _kl(log_p_s, log_p_t)
    elif divergence == "skew":
        log_m = torch.logaddexp(log_p_t + math.log(alpha), log_p_s + math.log1p(-alpha))
        per_pixel = _kl(log_p_t, log_m)
    else:
        log_m = torch.logaddexp(log_p_t + math.log(beta), log_p_s + math.log1p(-beta))
        per_pixel = beta * _kl(log_p_t, log_m) + (1.0 - beta) * _kl(log_p_s, log_m)
    total = _total_divergence(temperature**2 * per_pixel, valid, pixel_weight)
    return total, _valid_count(valid, pixel_weight)


def feature(
    student_z: Tensor, teacher_z: Tensor, valid: Tensor, pixel_weight: Tensor | None = None
) -> Fraction:
    """Mean over classes of the squared difference in the aligned logits space."""
    total = _total((student_z - teacher_z).square().mean(dim=1), valid, pixel_weight)
    return total, _valid_count(valid, pixel_weight)


#: Of a softmax over space, [B, C, 1, 1] each: the largest logit m and the sum of w exp(x - m) over
#: the valid pixels (0 where there is none), w = 1 without weights.
Shares = tuple[Tensor, Tensor]


def space_shares(x: Tensor, valid: Tensor, pixel_weight: Tensor | None = None) -> Shares:
    """Of logits x [B, C, H, W] over the pixels of each image and class."""
    inside = valid[:, None]
    largest = x.masked_fill(~inside, torch.finfo(x.dtype).min).amax(dim=(2, 3), keepdim=True)
    exp = _times((x - largest).exp(), pixel_weight)
    return largest, torch.where(inside, exp, 0).sum(dim=(2, 3), keepdim=True)


def _times(per_class: Tensor, pixel_weight: Tensor | None) -> Tensor:
    """[B, C, H, W], of each pixel times its weight."""
    return per_class if pixel_weight is None else per_class * pixel_weight[:, None]


def join_shares(bands: Sequence[Shares]) -> Shares:
    """Those of bands of rows, over all of them."""
    largest = torch.stack([m for m, _ in bands]).amax(dim=0)
    return largest, torch.stack([total * (m - largest).exp() for m, total in bands]).sum(dim=0)


def _images_times_classes(z: Tensor, valid: Tensor) -> Tensor:
    return valid.flatten(1).any(dim=1).sum(dtype=torch.float64) * z.shape[1]


def cwd(
    student_z: Tensor,
    teacher_z: Tensor,
    valid: Tensor,
    temperature: float = 4.0,
    shares: tuple[Shares, Shares] | None = None,
    pixel_weight: Tensor | None = None,
) -> Fraction:
    """T^2 KL(p_t || p_s) of the softmaxes over the valid pixels of each image and class.

    With weights p = w exp(x) / sum of w exp(x).

    Shu et al., ICCV 2021, Eq. 4.

    shares: those of student and teacher where the rows at hand are not all of an image.
    """
    inside = valid[:, None]
    x_s, x_t = student_z / temperature, teacher_z / temperature
    if shares is None:
        # An image without a valid pixel has no softmax: any numbers, which `_total` leaves out.
        counted = valid.flatten(1).any(dim=1)[:, None, None, None]
        nothing = torch.where(counted, -torch.inf, 0.0).to(x_s.dtype)
        if pixel_weight is not None:
            log_w = torch.where(valid, pixel_weight, 1).log()[:, None]
            x_s, x_t = x_s + log_w, x_t + log_w
        log_p_s, log_p_t = (
            torch.where(inside, x, nothing).flatten(2).log_softmax(dim=2).view(x.shape)
            for x in (x_s, x_t)
        )
        difference = torch.where(inside, log_p_t - log_p_s, 0)
        per_class = torch.where(inside, log_p_t.exp(), 0) * difference
    else:
        log_p_s, log_p_t = (
            x.detach() - m - torch.where(total == 0, 1, total).log()
            for x, (m, total) in zip((x_s, x_t), shares, strict=True)
        )
        p_s, p_t = (
            torch.where(inside, _times(log_p.exp(), pixel_weight), 0)
            for log_p in (log_p_s, log_p_t)
        )
        # The totals are of all rows and have no graph: the gradient p_s - p_t is given to autograd.
        per_class = torch.where(p_t > 0, p_t * (log_p_t - log_p_s), 0)
        per_class = per_class + torch.where(inside, (p_s - p_t) * (x_s - x_s.detach()), 0)
    total = _total_divergence(temperature**2 * per_class.sum(dim=1), valid)
    return total, _images_times_classes(student_z, valid)


def dkd(
    student_z: Tensor,
    teacher_z: Tensor,
    label: Tensor,
    valid: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    pixel_weight: Tensor | None = None,
) -> Fraction:
    """T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s)): label against rest, and the rest alone.

    Zhao et al., CVPR 2022, Eq. 7.
    """
    if student_z.shape[1] == 1:  # there is no rest
        return _total(0 * student_z.sum(dim=1), valid), _valid_count(valid, pixel_weight)
    is_label = _one_hot(student_z, label)
    of_label, log_q = [], []
    for z in (student_z, teacher_z):
        # Relative to the largest of the rest: the difference of two large logits is exact.
        largest = z.masked_fill(is_label, -torch.inf).amax(dim=1, keepdim=True).detach()
        x = (z - largest) / temperature
        log_total = x.masked_fill(is_label, -torch.inf).exp().sum(dim=1, keepdim=True).log()
        of_label.append(_at_label(x - log_total, label))
        log_q.append((x - log_total).masked_fill(is_label, 0.0))
    b_s, b_t = of_label
    of_rest = log_q[1].exp() * (log_q[1] - log_q[0])  # 0 of the label
    per_pixel = alpha * bernoulli_kl(b_t, b_s) + beta * of_rest.sum(dim=1)
    total = _total_divergence(temperature**2 * per_pixel, valid, pixel_weight)
    return total, _valid_count(valid, pixel_weight)


def overlaps(
    student_z: Tensor, label: Tensor, valid: Tensor, pixel_weight: Tensor | None = None
) -> Tensor:
    """[3, C] float64: soft false positives, false negatives and true positives of each class."""
    p = student_z.log_softmax(dim=1).exp()
    is_label = _one_hot(student_z, label)
    others = p.masked_fill(is_label, 0)
    # 1 - p, whose value is not a difference; and whose gradient goes to p alone
    missed = torch.where(is_label, others.sum(dim=1, keepdim=True).detach() + (p.detach() - p), 0)
    parts = (others, missed, torch.where(is_label, p, 0))
    return torch.stack(
        [
            torch.where(valid[:, None], _times(x, pixel_weight), 0).sum(
                (0, 2, 3), dtype=torch.float64
            )
            for x in parts
        ]
    )


def dice(overlaps: Tensor, smooth: float = 0.0, log: bool = False) -> Tensor:
    """Of the classes that occur the sum of 1 - (TP + s) / (TP + (FP + FN) / 2 + s), or of -log.

    Milletari et al., 3DV 2016, as in segmentation_models_pytorch.
    """
    wrong, missed, right = overlaps
    whole = (right + (wrong + missed) / 2 + smooth).clamp(min=OVERLAP_EPS)
    score = (right + smooth) / whole
    loss = -score.clamp(min=OVERLAP_EPS).log() if log else 1 - score
    return torch.where(right + missed == 0, 0, loss).sum()


def tversky(
    overlaps: Tensor,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    smooth: float = 0.0,
) -> Tensor:
    """C times (the mean over classes of 1 - TP / (TP + alpha FP + beta FN))^gamma, smoothed.

    Salehi et al., 2017, as in segmentation_models_pytorch.
    """
    wrong, missed, right = overlaps
    denominator = (right + alpha * wrong + beta * missed + smooth).clamp(min=OVERLAP_EPS)
    loss = 1 - (right + smooth) / denominator
    mean = torch.where(right + missed == 0, 0, loss).mean().clamp(min=0.0)
    perfect = mean == 0  # where the power has no derivative, or none that helps
    return torch.where(perfect, 0, torch.where(perfect, 1, mean) ** gamma) * len(right)


def of_overlaps(term: Term, overlaps: Tensor) -> Tensor:
    """The numerator of a term over classes."""
    if isinstance(term, Dice):
        return dice(overlaps, term.smooth, term.log)
    assert isinstance(term, Tversky), term
    return tversky(overlaps, term.alpha, term.beta, term.gamma, term.smooth)


def focal(
    z: Tensor,
    label: Tensor,
    valid: Tensor,
    gamma: float = 2.0,
    alpha: float = 1.0,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Fraction:
    """alpha (1 - p_y)^gamma (-log p_y), a weighted mean like that of `cross_entropy`.

    Lin et al., ICCV 2017, Eq. 4, of a softmax.
    """
    nll = negative_log_likelihood(z, label)
    label_weight = torch.ones_like(nll) if class_weight is None else class_weight[label]
    if z.shape[1] > 1:  # of one class the likelihood is 1
        x = z - z.amax(dim=1, keepdim=True).detach()
        others = x.masked_fill(_one_hot(z, label), -torch.inf)
        log_rest = others.logsumexp(dim=1) - x.logsumexp(dim=1)
        nll = (gamma * log_rest).exp() * nll
    total = _total(alpha * label_weight * nll, valid, pixel_weight)
    return total, _total(label_weight, valid, pixel_weight)


def ofa(
    student_z: Tensor,
    teacher_z: Tensor,
    label: Tensor,
    labelled: Tensor,
    valid: Tensor,
    eps: float = 1.0,
    temperature: float = 1.0,
    pixel_weight: Tensor | None = None,
) -> Fraction:
    """-sum_c ((p_t,c + [c = y])^eps - [c = y]) log p_s,c; without a label there is no [c = y].

    Hao et al., NeurIPS 2023, as their code has it.
    """
    log_p_s = (student_z / temperature).log_softmax(dim=1)
    log_p_t = (teacher_z / temperature).log_softmax(dim=1)
    of_label = (eps * log_p_t.exp().log1p()).expm1()
    is_label = _one_hot(student_z, label) & labelled[:, None]
    target = torch.where(is_label, of_label, (eps * log_p_t).exp())
    total = _total(-(target * log_p_s).sum(dim=1), valid, pixel_weight)
    return total, _valid_count(valid, pixel_weight)


# --- sections 4 and 5: mixing (KMM) and evaluation (KEM) ---------------------------------------


def evaluate_knowledge(
    student_z: Tensor,
    teacher_z: Tensor,
    label: Tensor,
    valid: Tensor,
    term: HeteroAKD,
    maps: bool = False,
    labelled: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Knowledge:
    """Reliability, mixed target and discrepancy; everything returned is detached.

    Where a valid pixel is not `labelled` (None: all are) the teacher alone can be asked: r_t = 1.

    maps: whether the discrepancy is wanted though the term does not evaluate.
    """
    student_z, teacher_z = student_z.detach(), teacher_z.detach()
    labelled = valid if labelled is None else labelled
    if term.preset == "paper":
        pixels = (label, labelled, valid, pixel_weight)
        return _evaluate_paper(student_z, teacher_z, *pixels, term)
    return _evaluate_softmax_kl(student_z, teacher_z, label, labelled, valid, term, maps)


def _evaluate_softmax_kl(
    student_z: Tensor,
    teacher_z: Tensor,
    label: Tensor,
    labelled: Tensor,
    valid: Tensor,
    term: HeteroAKD,
    maps: bool,
) -> Knowledge:
    t = term.temperature
    log_p_s = (student_z / t).log_softmax(dim=1)
    log_p_t = (teacher_z / t).log_softmax(dim=1)

    # reliability: (r_t, r_s) = softmax(-e_t / tau, -e_s / tau)
    e_t = negative_log_likelihood(teacher_z, label)
    e_s = negative_log_likelihood(student_z, label)
    gap = torch.where(labelled, e_s - e_t, torch.inf)[:, None]
    log_r_t, log_r_s = F.logsigmoid(gap / term.tau), F.logsigmoid(-gap / term.tau)

    # mixed_target, as log m
    if term.mix == "probs":
        mixed_target = torch.logaddexp(log_r_t + log_p_t, log_r_s + log_p_s)
    elif term.mix == "teacher":
        mixed_target = log_p_t
    else:
        z_h = log_r_t.exp() * teacher_z + log_r_s.exp() * student_z
        mixed_target = (z_h / t).log_softmax(dim=1)

    # discrepancy: a KL is never negative, its rounding may be
    d = torch.ones_like(e_s)
    discrepancy = d
    if term.evaluation == "discrepancy" or maps:
        discrepancy = _kl(log_p_t, log_p_s).clamp(min=0.0)
    if term.evaluation == "discrepancy":
        d = discrepancy
    return Knowledge(
        mixed_target=mixed_target,
        weight=torch.where(valid, d, 0)[:, None],
        reliability=log_r_t.exp().squeeze(1),
        discrepancy=discrepancy,
    )


def _evaluate_paper(
    student_z: Tensor,
    teacher_z: Tensor,
    label: Tensor,
    labelled: Tensor,
    valid: Tensor,
    pixel_weight: Tensor | None,
    term: HeteroAKD,
) -> Knowledge:
    # BCE(sigmoid(z), [c = label]) is -log sigmoid of z or, for the other classes, of -z
    sign = torch.full_like(student_z, -1.0).scatter_(1, label[:, None], 1.0)

    def error(z: Tensor) -> Tensor:
        return -F.logsigmoid(sign * z)

    # reliability, per class (Eq. 5 and 6)
    h_s, h_t = error(student_z), error(teacher_z)
    r_t = (h_s + RELIABILITY_EPS) / (h_t + h_s + 2.0 * RELIABILITY_EPS)
    without = valid & ~labelled
    has_label = ~without[:, None]
    r_t = torch.where(has_label, r_t, 1)

    # mixed_target (Eq. 7)
    z_h = teacher_z if term.mix == "teacher" else r_t * teacher_z + (1.0 - r_t) * student_z

    # discrepancy: the positive reliability gap (Eq. 8), and the class weights (Eq. 9)
    discrepancy = (h_s - error(z_h)).clamp(min=0.0)
    # Without a label there are no errors, and no gap between them: W is uniform over the classes.
    score = torch.where(has_label, h_s + discrepancy, 0)
    inside = valid[:, None]
    shares = None
    if term.evaluation == "none":
        weight = torch.ones_like(h_s)
    elif term.weight_axis == "class":
        weight = score.softmax(dim=1)
    else:
        shares = space_shares(score, valid, pixel_weight)
        weight = _times((score - shares[0]).exp(), pixel_weight)
        weight = torch.where(inside, weight, 0) / shares[1]

    softened = z_h / term.temperature
    return Knowledge(
        mixed_target=softened.log_softmax(dim=1) if term.weight_axis == "class" else softened,
        weight=torch.where(inside, weight, 0),
        reliability=_at_label(r_t, label),
        discrepancy=torch.where(without, 0, _at_label(discrepancy, label)),
        shares=shares,
    )


def join_over_space(bands: Sequence[Knowledge]) -> list[Knowledge]:
    """The same, with the weights of each band of rows normalised over all of them."""
    found = [band.shares for band in bands if band.shares is not None]
    largest, total = join_shares(found)
    totals = [own * (m - largest).exp() for m, own in found]
    return [
        band._replace(
            weight=torch.where(own == 0, 0, band.weight * (own / total)), shares=(largest, total)
        )
        for band, own in zip(bands, totals, strict=True)
    ]


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL of sigmoid(a) from sigmoid(b), elementwise, from logits."""
    p = a.sigmoid()
    return p * (F.logsigmoid(a) - F.logsigmoid(b)) + (1.0 - p) * (
        F.logsigmoid(-a) - F.logsigmoid(-b)
    )


def hetero(
    student_z: Tensor,
    knowledge: Knowledge,
    valid: Tensor,
    term: HeteroAKD,
    pixel_weight: Tensor | None = None,
) -> Fraction:
    """The HeteroAKD term (Eq. 10, or the KL form of the preset `softmax-kl`)."""
    t = term.temperature
    weight = knowledge.weight
    if term.preset == "softmax-kl":
        log_m, log_p_s = knowledge.mixed_target, (student_z / t).log_softmax(dim=1)
        per_pixel = weight.squeeze(1) * (t**2 * _kl(log_m, log_p_s))
        total = _total_divergence(per_pixel, valid, pixel_weight)
        return total, _total(weight.squeeze(1), valid, pixel_weight)
    if term.weight_axis == "class":
        m, log_p_s = knowledge.mixed_target.exp(), (student_z / t).log_softmax(dim=1)
        total = _total(-(weight * m * log_p_s).sum(dim=1), valid, pixel_weight)
        return total, _valid_count(valid, pixel_weight)
    per_pixel = (weight * bernoulli_kl(knowledge.mixed_target, student_z / t)).sum(dim=1)
    if term.evaluation == "none":  # W = 1: a mean over pixels and classes, as the weights' own is
        total = _total_divergence(t**2 * per_pixel / student_z.shape[1], valid, pixel_weight)
        return total, _valid_count(valid, pixel_weight)
    return _total_divergence(t**2 * per_pixel, valid), _images_times_classes(student_z, valid)


# --- a term of a pass --------------------------------------------------------------------------


class Pixels(NamedTuple):
    """What is known of the pixels of a label grid but for logits; [B, H, W] each."""

    label: Tensor
    """a class index everywhere, 0 where there is none"""
    labelled: Tensor
    valid: Tensor
    """the labelled and the unlabelled ones; none whose weight is 0"""
    weight: Tensor | None

    def rows(self, rows: slice) -> Pixels:
        return Pixels(*(None if x is None else x[:, rows] for x in self))  # type: ignore[arg-type]


def diagnostics(student_z: Tensor, teacher_z: Tensor, pixels: Pixels) -> list[Tensor]:
    """Of each pixel -log softmax(z_s)_y, whether z_s,y is the largest (1 or 0; both 0 without a
    label), and whether z_t is largest where z_s is (of several the last class)."""
    nll = negative_log_likelihood(student_z, pixels.label)
    right = _at_label(student_z, pixels.label) == student_z.amax(dim=1)
    top = student_z.shape[1] - 1 - student_z.flip(1).argmax(dim=1)
    agrees = _at_label(teacher_z, top) == teacher_z.amax(dim=1)
    zero = torch.zeros_like(nll)
    return [
        torch.where(pixels.labelled, nll, zero),
        torch.where(pixels.labelled, right.to(nll.dtype), zero),
        agrees.to(nll.dtype),
    ]


def fraction(
    term: Term,
    student_z: Tensor,
    teacher_z: Tensor,
    pixels: Pixels,
    class_weight: Tensor | None,
    knowledge: Knowledge | None,
    shares: tuple[Shares, Shares] | None,
    slopes: Tensor | None,
) -> Fraction:
    """Numerator and denominator of one term; arguments as in `reference_pass.terms_on_grid`,
    but slopes: of this term."""
    label, labelled, valid, weight = pixels
    frozen_teacher_z = teacher_z.detach()
    if isinstance(term, (CrossEntropy, TeacherCrossEntropy)):
        z = student_z if isinstance(term, CrossEntropy) else teacher_z
        return cross_entropy(z, label, labelled, class_weight, term.label_smoothing, weight)
    if isinstance(term, KD):
        options = (term.temperature, term.divergence, term.beta, term.alpha, term.standardize)
        return kd(student_z, frozen_teacher_z, valid, *options, weight)
    if isinstance(term, HeteroAKD):
        assert knowledge is not None
        return hetero(student_z, knowledge, valid, term, weight)
    if isinstance(term, CWD):
        return cwd(student_z, frozen_teacher_z, valid, term.temperature, shares, weight)
    if isinstance(term, DKD):
        parts = (term.alpha, term.beta, term.temperature)
        return dkd(student_z, frozen_teacher_z, label, labelled, *parts, weight)
    if term.over_classes:
        found = overlaps(student_z, label, labelled, weight)
        numerator = of_overlaps(term, found) if slopes is None else (slopes * found).sum()
        return numerator, labelled.any().double() * student_z.shape[1]
    if isinstance(term, Focal):
        assert term.alpha is not None
        return focal(student_z, label, labelled, term.gamma, term.alpha, class_weight, weight)
    if isinstance(term, OFA):
        both = (student_z, frozen_teacher_z, label, labelled, valid)
        return ofa(*both, term.eps, term.temperature, weight)
    assert isinstance(term, Feature), term
    return feature(student_z, frozen_teacher_z, valid, weight)
