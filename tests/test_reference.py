"""The oracle against what is known independently of it, and its gradients by finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import VARIANTS, make_batch
from torch import Tensor

from heteroakd_fast import reference, reference_pass
from heteroakd_fast.labels import nearest_labels
from heteroakd_fast.projector import Projector
from heteroakd_fast.spec import LossSpec
from heteroakd_fast.terms import KD, CrossEntropy, Feature, HeteroAKD, TeacherCrossEntropy

C = 5


def on_grid(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """student_z, teacher_z [2, 5, 3, 4], label and valid [2, 3, 4], float64."""
    batch = make_batch(
        classes=C, grid=(3, 4), teacher_grid=None, size=(3, 4), scale=scale, seed=seed
    )
    valid = batch.target != 255
    return batch.student, batch.teacher, batch.target.where(valid, 0), valid


def mean(fraction: tuple[Tensor, Tensor]) -> Tensor:
    return fraction[0] / fraction[1]


def term_of(variant: str) -> HeteroAKD:
    return HeteroAKD(**VARIANTS[variant])


# --- known values ------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(smoothing: float, weighted: bool) -> None:
    z, _, label, valid = on_grid()
    weight = torch.rand(C, dtype=torch.float64) + 0.1 if weighted else None
    ours = mean(reference.cross_entropy(z, label, valid, weight, smoothing))
    target = label.where(valid, -100)
    torch.testing.assert_close(
        ours, F.cross_entropy(z, target, weight, label_smoothing=smoothing), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (12, 16), (7, 13), (2, 3), (1, 1)])
def test_upsample_is_torchs(size: tuple[int, int], align_corners: bool) -> None:
    z = on_grid()[0]
    expected = F.interpolate(z, size=size, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(
        reference.upsample(z, size, align_corners), expected, rtol=1e-14, atol=1e-14
    )


def test_kd_is_torchs_kl_div() -> None:
    s, t, _, valid = on_grid()
    temperature = 2.5
    log_s, log_t = (s / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    forward = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(1)[valid]
    reverse = F.kl_div(log_t, log_s, log_target=True, reduction="none").sum(1)[valid]
    for divergence, expected in (("forward", forward), ("reverse", reverse)):
        ours = mean(reference.kd(s, t, valid, temperature, divergence))
        torch.testing.assert_close(ours, temperature**2 * expected.mean())


def test_js_is_symmetric_at_one_half_bounded_and_reaches_its_ends() -> None:
    s, t, _, valid = on_grid(scale=20.0)
    js = mean(reference.kd(s, t, valid, 1.0, "js", 0.5))
    torch.testing.assert_close(js, mean(reference.kd(t, s, valid, 1.0, "js", 0.5)))
    assert 0 < js < math.log(2.0)
    s, t, _, valid = on_grid()
    near_forward = mean(reference.kd(s, t, valid, 1.0, "js", 1e-6)) / 1e-6
    torch.testing.assert_close(
        near_forward, mean(reference.kd(s, t, valid, 1.0, "forward")), rtol=1e-3, atol=0
    )


def test_feature_is_a_mean_over_classes_and_valid_pixels() -> None:
    s, t, _, valid = on_grid()
    inside = valid[:, None].expand_as(s)
    torch.testing.assert_close(
        mean(reference.feature(s, t, valid)), F.mse_loss(s[inside], t[inside])
    )


def two_class_pixel(z: float) -> Tensor:
    return torch.tensor([z, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1)


def test_softmax_kl_by_hand() -> None:
    """Two classes, one pixel, logits (a, 0): softmax is a sigmoid and all of it fits on paper."""
    a_s, a_t, tau, t = 0.4, 1.7, 0.6, 2.0
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    valid = label == 0
    term = HeteroAKD(temperature=t, tau=tau)
    knowledge = reference.evaluate_knowledge(
        two_class_pixel(a_s), two_class_pixel(a_t), label, valid, term
    )

    def sigmoid(x: float) -> float:
        return 1.0 / (1.0 + math.exp(-x))

    e_s, e_t = -math.log(sigmoid(a_s)), -math.log(sigmoid(a_t))
    r_t = math.exp(-e_t / tau) / (math.exp(-e_t / tau) + math.exp(-e_s / tau))
    p_s, p_t = sigmoid(a_s / t), sigmoid(a_t / t)
    m = r_t * p_t + (1 - r_t) * p_s

    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    assert knowledge.reliability.item() == pytest.approx(r_t, rel=1e-13)
    assert knowledge.mixed_target.exp()[0, 0].item() == pytest.approx(m, rel=1e-13)
    assert knowledge.discrepancy.item() == pytest.approx(kl(p_t, p_s), rel=1e-12)
    numerator, denominator = reference.hetero(two_class_pixel(a_s), knowledge, valid, term)
    d = kl(p_t, p_s)
    assert numerator.item() == pytest.approx(d * t**2 * kl(m, p_s), rel=1e-12)
    assert denominator.item() == pytest.approx(d, rel=1e-12)


def test_softmax_kl_gradient_is_a_scaled_difference_of_probabilities() -> None:
    """method.md, section 4: with mix="probs", dL/dz_s = d_p / sum d * T r_t (p_s - p_t)."""
    s, t, label, valid = on_grid()
    term = HeteroAKD(temperature=1.7, tau=0.8)
    knowledge = reference.evaluate_knowledge(s, t, label, valid, term)
    s = s.requires_grad_()
    mean(reference.hetero(s, knowledge, valid, term)).backward()
    p_s, p_t = (s.detach() / 1.7).softmax(1), (t / 1.7).softmax(1)
    share = (knowledge.discrepancy * valid / (knowledge.discrepancy * valid).sum())[:, None]
    expected = share * 1.7 * knowledge.reliability[:, None] * (p_s - p_t)
    torch.testing.assert_close(s.grad, expected, rtol=1e-9, atol=1e-14)


def test_mix_logits_by_hand() -> None:
    s, t, label, valid = on_grid()
    term = HeteroAKD(mix="logits", temperature=1.3)
    knowledge = reference.evaluate_knowledge(s, t, label, valid, term)
    r_t = knowledge.reliability[:, None]
    expected = ((r_t * t + (1 - r_t) * s) / 1.3).softmax(1)
    torch.testing.assert_close(knowledge.mixed_target.exp(), expected)


def without_mixing(**options: Any) -> tuple[reference.Knowledge, reference.Knowledge]:
    """What is found with mix="teacher", and with the preset's own mix."""
    s, t, label, valid = on_grid()
    term = HeteroAKD(**options)
    ablated = reference.evaluate_knowledge(s, t, label, valid, replace(term, mix="teacher"))
    return ablated, reference.evaluate_knowledge(s, t, label, valid, term)


def test_mix_teacher_changes_the_target_only() -> None:
    """method.md, section 4: m = p_t; what weighs the pixels, and what maps show, stays."""
    t = on_grid()[1]
    ablated, mixed = without_mixing(temperature=1.3, tau=0.8)
    torch.testing.assert_close(ablated.mixed_target.exp(), (t / 1.3).softmax(1))
    assert (ablated.mixed_target - mixed.mixed_target).abs().max() > 0.1
    assert torch.equal(ablated.weight, mixed.weight)
    assert torch.equal(ablated.discrepancy, mixed.discrepancy)
    assert torch.equal(ablated.reliability, mixed.reliability)


def test_mix_teacher_without_evaluation_is_kd() -> None:
    """Without both ideas of the method its term is plain distillation, to the last bit."""
    s, t, label, valid = on_grid()
    term = HeteroAKD(mix="teacher", evaluation="none", temperature=1.7)
    ours, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
    knowledge = reference.evaluate_knowledge(ours, t, label, valid, term)
    got = mean(reference.hetero(ours, knowledge, valid, term))
    expected = mean(reference.kd(plain, t, valid, 1.7))
    assert got == expected > 0
    (grad,) = torch.autograd.grad(got, ours)
    (expected_grad,) = torch.autograd.grad(expected, plain)
    assert torch.equal(grad, expected_grad)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("weight_axis", ["class", "space"])
def test_paper_mix_teacher_by_hand(weight_axis: str) -> None:
    """z_h = z_t, and with it dH = max(0, H_s - H_t), W and m; r_t is shown as it is."""
    s, t, label, valid = on_grid()
    ablated, mixed = without_mixing(
        preset="paper", mix="logits", weight_axis=weight_axis, temperature=1.3
    )
    one_hot = F.one_hot(label, C).movedim(3, 1).double()
    h_s, h_t = (F.binary_cross_entropy_with_logits(z, one_hot, reduction="none") for z in (s, t))
    gap = (h_s - h_t).relu()
    torch.testing.assert_close(ablated.discrepancy, gap.gather(1, label[:, None])[:, 0])
    if weight_axis == "class":
        weight = (h_s + gap).softmax(1)
        torch.testing.assert_close(ablated.mixed_target, (t / 1.3).log_softmax(1))
    else:
        inside = valid[:, None].expand_as(gap)
        weight = (h_s + gap).where(inside, -torch.inf).flatten(2).softmax(2).reshape(gap.shape)
        torch.testing.assert_close(ablated.mixed_target, t / 1.3)
    torch.testing.assert_close(ablated.weight, weight * valid[:, None])
    assert (ablated.weight - mixed.weight).abs().max() > 0.01
    assert torch.equal(ablated.reliability, mixed.reliability)


def test_paper_by_hand() -> None:
    """Equations 5 to 10 on one pixel of two classes."""
    z_s, z_t, t, eps = (0.3, -0.8), (2.0, 0.5), 1.5, reference.RELIABILITY_EPS

    def tensor(z: tuple[float, float]) -> Tensor:
        return torch.tensor(z, dtype=torch.float64).reshape(1, 2, 1, 1)

    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    valid = label == 0
    term = HeteroAKD(preset="paper", mix="logits", temperature=t)
    knowledge = reference.evaluate_knowledge(tensor(z_s), tensor(z_t), label, valid, term)
    numerator, denominator = reference.hetero(tensor(z_s), knowledge, valid, term)

    def bce(z: float, positive: bool) -> float:
        return math.log1p(math.exp(-z if positive else z))

    h_s = [bce(z_s[0], True), bce(z_s[1], False)]
    h_t = [bce(z_t[0], True), bce(z_t[1], False)]
    r_t = [(hs + eps) / (ht + hs + 2 * eps) for hs, ht in zip(h_s, h_t, strict=True)]
    z_h = [r * zt + (1 - r) * zs for r, zt, zs in zip(r_t, z_t, z_s, strict=True)]
    gap = [max(0.0, h_s[0] - bce(z_h[0], True)), max(0.0, h_s[1] - bce(z_h[1], False))]
    exps = [math.exp(h + g) for h, g in zip(h_s, gap, strict=True)]
    w = [e / sum(exps) for e in exps]
    m = [math.exp(z / t) / sum(math.exp(v / t) for v in z_h) for z in z_h]
    log_p = [z / t - math.log(sum(math.exp(v / t) for v in z_s)) for z in z_s]
    expected = -sum(wc * mc * lp for wc, mc, lp in zip(w, m, log_p, strict=True))
    assert gap[0] > 0, "the case should exercise both branches"
    assert gap[1] == 0
    assert numerator.item() == pytest.approx(expected, rel=1e-12)
    assert denominator.item() == 1.0
    assert knowledge.reliability.item() == pytest.approx(r_t[0], rel=1e-12)
    assert knowledge.discrepancy.item() == pytest.approx(gap[0], rel=1e-12)


def test_paper_two_perfect_sides_mix_half_and_half() -> None:
    z = torch.tensor([1000.0, -1000.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    term = HeteroAKD(preset="paper", mix="logits")
    knowledge = reference.evaluate_knowledge(z, 2 * z, label, label == 0, term)
    assert knowledge.reliability.item() == 0.5


def test_space_weights_sum_to_one_over_valid_pixels_of_each_image_and_class() -> None:
    s, t, label, valid = on_grid()
    valid[1] = False  # an image without a valid pixel counts for nothing
    term = term_of("paper-space")
    knowledge = reference.evaluate_knowledge(s, t, label, valid, term)
    sums = knowledge.weight.sum(dim=(2, 3))
    torch.testing.assert_close(sums[0], torch.ones(C, dtype=torch.float64))
    assert (sums[1] == 0).all()
    numerator, denominator = reference.hetero(s, knowledge, valid, term)
    assert denominator.item() == C
    alone = reference.evaluate_knowledge(s[:1], t[:1], label[:1], valid[:1], term)
    torch.testing.assert_close(numerator, reference.hetero(s[:1], alone, valid[:1], term)[0])


def test_bernoulli_kl_is_torchs() -> None:
    a, b = torch.randn(2, 50, dtype=torch.float64) * 4
    for logits, other in ((a, b), (b, a)):
        expected = torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(logits=logits),
            torch.distributions.Bernoulli(logits=other),
        )
        torch.testing.assert_close(reference.bernoulli_kl(logits, other), expected)


def test_confident_pixels_keep_their_relative_precision() -> None:
    """float32, true class 20 to 90 ahead: p - 1 and -log p are far below float32's epsilon."""
    lead = torch.arange(20.0, 90.0, 10.0)
    z = torch.zeros(1, 3, 1, len(lead))
    z[0, 0, 0] = lead
    z = z.requires_grad_()
    label = torch.zeros(1, 1, len(lead), dtype=torch.int64)
    nll = reference.negative_log_likelihood(z, label)
    nll.sum().backward()
    expected = torch.log1p(2.0 * torch.exp(-lead.double()))
    torch.testing.assert_close(nll[0, 0].double(), expected, rtol=1e-5, atol=0)
    p_minus_1 = -2.0 / (2.0 + torch.exp(lead.double()))
    assert z.grad is not None
    torch.testing.assert_close(z.grad[0, 0, 0].double(), p_minus_1, rtol=1e-5, atol=0)


def test_projection_is_the_modules() -> None:
    features = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    for kind in ("linear", "conv-bn-relu"):
        module = Projector(7, C, kind).double()
        bn = module.bn
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        expected = reference.project(
            features,
            module.conv.weight.flatten(1),
            module.conv.bias,
            norm_weight=None if bn is None else bn.weight,
            norm_bias=None if bn is None else bn.bias,
            relu=bn is not None,
        )
        torch.testing.assert_close(module(features), expected)


@pytest.mark.parametrize(("size", "out"), [((12, 16), (3, 4)), ((7, 9), (3, 4)), ((2, 3), (5, 7))])
def test_nearest_labels_are_torchs(size: tuple[int, int], out: tuple[int, int]) -> None:
    target = torch.randint(0, 200, (2, *size))
    expected = F.interpolate(target[:, None].double(), size=out, mode="nearest")[:, 0].long()
    assert torch.equal(nearest_labels(target, out), expected)


# --- gradients ---------------------------------------------------------------------------------


def gradcheck(function: object, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(
        function, [i.detach().requires_grad_() for i in inputs], eps=1e-6, atol=1e-8, rtol=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_cross_entropy(smoothing: float, weighted: bool) -> None:
    z, _, label, valid = on_grid()
    weight = torch.rand(C, dtype=torch.float64) + 0.1 if weighted else None
    gradcheck(lambda z: mean(reference.cross_entropy(z, label, valid, weight, smoothing)), z)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_gradcheck_kd(divergence: str) -> None:
    s, t, _, valid = on_grid()
    gradcheck(lambda s: mean(reference.kd(s, t, valid, 1.6, divergence, 0.3, 0.2)), s)


def test_gradcheck_feature() -> None:
    s, t, _, valid = on_grid()
    gradcheck(lambda s: mean(reference.feature(s, t, valid)), s)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_hetero(variant: str) -> None:
    """With what is detached held fixed, as the method says."""
    s, t, label, valid = on_grid()
    term = term_of(variant)
    knowledge = reference.evaluate_knowledge(s, t, label, valid, term)
    gradcheck(lambda s: mean(reference.hetero(s, knowledge, valid, term)), s)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(6, 8), (5, 9), (2, 3)])
def test_gradcheck_through_the_whole_pass(size: tuple[int, int], align_corners: bool) -> None:
    batch = make_batch(classes=3, grid=(3, 4), teacher_grid=(2, 5), size=size, ignored=0.1)
    terms = (CrossEntropy(), TeacherCrossEntropy(), KD(temperature=1.4), Feature())
    options = LossSpec.of(*terms, align_corners=align_corners).options()

    def student_terms(student: Tensor) -> Tensor:
        sums = reference_pass.sums(student, batch.target, batch.teacher, None, options)
        return sums.numerators / sums.denominators

    def teacher_terms(teacher: Tensor) -> Tensor:
        sums = reference_pass.sums(batch.student, batch.target, teacher, None, options)
        return (sums.numerators / sums.denominators)[1]

    gradcheck(student_terms, batch.student)
    gradcheck(teacher_terms, batch.teacher)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_projection(relu: bool) -> None:
    features = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    norm = torch.rand(3, dtype=torch.float64) + 0.5
    gradcheck(
        lambda f, w, b: reference.project(f, w, b, norm_weight=norm, norm_bias=norm, relu=relu).sum(
            dim=(0, 2, 3)
        ),
        features,
        weight,
        bias,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_hetero_in_the_pass_is_the_function(variant: str) -> None:
    """Equal grids, so that the pass adds nothing but the plumbing; detached parts stay so."""
    s, t, label, valid = on_grid()
    term = term_of(variant)
    target = label.where(valid, 255)
    student = s.clone().requires_grad_()
    sums = reference_pass.sums(student, target, t, None, LossSpec.of(term).options())
    (grad,) = torch.autograd.grad(sums.numerators[0] / sums.denominators[0], student)
    knowledge = reference.evaluate_knowledge(s, t, label, valid, term)
    other = s.clone().requires_grad_()
    expected = mean(reference.hetero(other, knowledge, valid, term))
    (expected_grad,) = torch.autograd.grad(expected, other)
    torch.testing.assert_close(sums.numerators[0] / sums.denominators[0], expected)
    torch.testing.assert_close(grad, expected_grad)
    assert grad.abs().max() > 0
