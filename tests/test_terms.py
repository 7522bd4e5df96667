"""Terms as objects, the plan of their passes, and that every spelling of a loss is the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import BACKENDS, TERM_CASES, make_batch, terms_of, truth

import heteroakd_fast as hf
from heteroakd_fast import functional
from heteroakd_fast.spec import plan, shape_of
from heteroakd_fast.terms import (
    FLAT,
    FLAT_DEFAULTS,
    FLAT_TERMS,
    KD,
    OFA,
    TERMS,
    CrossEntropy,
    Feature,
    Focal,
    HeteroAKD,
    TeacherCrossEntropy,
)

BATCH = make_batch(dtype=torch.float32)


def passes(*terms: Any, maps: bool = False, weighted: bool = False) -> list[tuple[str, ...]]:
    return [one.names for one in plan(shape_of(terms), weighted, maps, ())]


def test_passes_are_as_few_as_possible() -> None:
    assert passes(CrossEntropy(), KD(), HeteroAKD(), Feature()) == [
        ("ce", "kd", "hetero", "feature")
    ]
    # a pass has one temperature beside the cross entropies' own, and a kind of term once
    assert passes(CrossEntropy(), KD(), HeteroAKD(temperature=2.0)) == [("ce", "kd"), ("hetero",)]
    assert passes(KD(temperature=2.0), KD(temperature=4.0), HeteroAKD(temperature=4.0)) == [
        ("kd",),
        ("kd_2", "hetero"),
    ]
    assert passes(CrossEntropy(), CrossEntropy(0.5, 0.1)) == [("ce",), ("ce_2",)]
    assert passes(CrossEntropy(), KD(0.0, temperature=3.0), HeteroAKD()) == [("ce", "hetero")]


def test_groups_follow_denominators() -> None:
    def groups(*terms: Any, weighted: bool = False, apart: tuple[str, ...] = ()) -> Any:
        (one,) = plan(shape_of(terms), weighted, False, apart)
        return one.groups, one.denominators

    terms = (CrossEntropy(), KD(), HeteroAKD(), Feature(), TeacherCrossEntropy())
    assert groups(*terms) == ((0, 0, 1, 0, 0), ("valid", "discrepancy"))
    assert groups(*terms, weighted=True)[0] == (0, 1, 2, 1, 0)
    assert groups(*terms, apart=("kd",))[0] == (0, 1, 2, 0, 0)
    assert groups(CrossEntropy(), HeteroAKD(evaluation="none"))[0] == (0, 0)


def test_maps_need_no_term() -> None:
    for terms in ((CrossEntropy(),), (CrossEntropy(), HeteroAKD(0.0, tau=0.5))):
        out = functional.segmentation_loss(*BATCH.arguments, terms=terms, return_maps=True)
        assert list(out.terms) == ["ce"]
        assert out.maps is not None
        tau = 1.0 if len(terms) == 1 else 0.5
        expected = truth(BATCH, hetero_weight=1.0, tau=tau, return_maps=True)
        torch.testing.assert_close(
            out.maps["reliability"].double(), expected.maps["reliability"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("case", TERM_CASES)
def test_every_spelling_gives_the_same_bits(case: str) -> None:
    options = {**FLAT_DEFAULTS, **TERM_CASES[case]}
    terms = terms_of(options)
    student = BATCH.student.clone().requires_grad_()
    teacher = BATCH.teacher.clone().requires_grad_("teacher_ce_weight" in TERM_CASES[case])
    arguments = (student, BATCH.target, teacher)
    spellings = [
        lambda: functional.segmentation_loss(*arguments, terms=terms),
        lambda: hf.SegmentationLoss(*terms)(*arguments),
    ]
    if "terms" not in options:
        spellings.append(lambda: functional.distillation_loss(*arguments, **TERM_CASES[case]))
    if not {"teacher_ce_weight", "terms"} & TERM_CASES[case].keys():
        flat = {name: value for name, value in options.items() if name != "teacher_ce_weight"}
        spellings.append(lambda: hf.HeteroAKDLoss(5, **flat)(*arguments))
    if case == "ce-smoothed":
        spellings.append(
            lambda: functional.cross_entropy(student, BATCH.target, label_smoothing=0.1)
        )
    wanted = [x for x in (student, teacher) if x.requires_grad]
    results = []
    for spelling in spellings:
        out = spelling()
        grads = torch.autograd.grad(out.loss, wanted, allow_unused=True)
        results.append(
            (out.loss.detach(), *out.terms.values(), *(g for g in grads if g is not None))
        )
    for other in results[1:]:
        assert len(other) == len(results[0])
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_several_passes_are_the_sum() -> None:
    terms = (CrossEntropy(), KD(0.3), KD(0.2, temperature=4.0), HeteroAKD(2.0, temperature=2.0))
    double = BATCH._replace(student=BATCH.student.double().requires_grad_(),
                            teacher=BATCH.teacher.double())  # fmt: skip
    together = functional.segmentation_loss(*double.arguments, terms=terms, backend="reference")
    apart = [
        functional.segmentation_loss(*double.arguments, terms=[term], backend="reference")
        for term in terms
    ]
    expected = sum(one.loss for one in apart)
    torch.testing.assert_close(together.loss, expected)
    assert list(together.terms) == ["ce", "kd", "kd_2", "hetero"]
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, double.student)[0] for loss in (together.loss, expected))
    )
    # of the kernels likewise
    student = BATCH.student.clone().requires_grad_()
    got = functional.segmentation_loss(student, BATCH.target, BATCH.teacher, terms=terms)
    torch.testing.assert_close(got.loss.double(), together.loss, rtol=1e-5, atol=1e-6)
    again = functional.segmentation_loss(*double.arguments, terms=terms, backend="reference")
    (grad,), (wanted,) = (
        torch.autograd.grad(loss, x)
        for loss, x in ((got.loss, student), (again.loss, double.student))
    )
    assert (grad.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("weights", [(1.0, 0.3, 2.0, 0.7), (1e-6, 3.0, 1e4, 2.0)])
@pytest.mark.parametrize("evaluation", ["discrepancy", "none"])
def test_weights_of_a_group(weights: tuple[float, ...], evaluation: str) -> None:
    """Terms of a group share a gradient; far apart, with class weights or without."""
    names = ("ce_weight", "kd_weight", "hetero_weight", "feature_weight")
    options = {**dict(zip(names, weights, strict=True)), "evaluation": evaluation}
    for class_weight in (None, torch.rand(5) + 0.1):
        student = BATCH.student.clone().requires_grad_()
        out = functional.distillation_loss(
            student, BATCH.target, BATCH.teacher, class_weight=class_weight, **options
        )
        (grad,) = torch.autograd.grad(out.loss, student)
        expected = truth(BATCH, class_weight=class_weight, **options)
        assert (grad.double() - expected.student_grad).abs().max() <= (
            1e-5 * expected.student_grad.abs().max()
        )


# --- public formulas, written as a researcher writes them ----------------------------------------


def on_label_grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of both sides and labels of the valid pixels, [pixels, C]; student's with a graph."""
    size, valid = BATCH.target.shape[1:], BATCH.target != 255
    z = [F.interpolate(x.double(), size, mode="bilinear") for x in (BATCH.student, BATCH.teacher)]
    student, teacher = (x.permute(0, 2, 3, 1)[valid] for x in z)
    return student.requires_grad_(), teacher, BATCH.target[valid]


def assert_is(term: Any, public: Any) -> None:
    """The kernels' value, and its gradient by logits on the label grid, are those of `public`."""
    student, teacher, label = on_label_grid()
    expected = public(student, teacher, label)
    (wanted,) = torch.autograd.grad(expected, student)
    z_s, z_t = (x.detach().T[None, :, None].float() for x in (student, teacher))
    z_s.requires_grad_()
    got = functional.segmentation_loss(z_s, label[None, None], z_t, terms=[term]).loss
    assert got.item() == pytest.approx(expected.item(), rel=2e-6)
    (grad,) = torch.autograd.grad(got, z_s)
    assert (grad[0, :, 0].T - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_focal_is_the_public_formula() -> None:
    def public(z: torch.Tensor, _: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(z, dim=1).gather(1, y[:, None])
        return (-0.25 * (1 - log_p.exp()) ** 2 * log_p).mean()

    assert_is(Focal(alpha=0.25), public)
    weight = torch.rand(5) + 0.1
    losses = [
        functional.segmentation_loss(*BATCH.arguments, terms=[term], class_weight=weight).loss
        for term in (Focal(gamma=0.0), CrossEntropy())
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_skewed_kl_is_the_public_formula(alpha: float) -> None:
    def public(s: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        p_s, p_t = (F.softmax(z / 2.0, dim=1) for z in (s, t))
        mixed = alpha * p_t + (1 - alpha) * p_s
        return 4.0 * F.kl_div(mixed.log(), p_t, reduction="batchmean")

    assert_is(KD(temperature=2.0, divergence="skew", alpha=alpha), public)


def test_standardized_kd_is_the_public_formula() -> None:
    def normalize(z: torch.Tensor) -> torch.Tensor:
        return (z - z.mean(dim=-1, keepdim=True)) / (1e-7 + z.std(dim=-1, keepdim=True))

    def public(s: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        log_p_s = F.log_softmax(normalize(s) / 2.0, dim=1)
        p_t = F.softmax(normalize(t) / 2.0, dim=1)
        return F.kl_div(log_p_s, p_t, reduction="batchmean") * 2.0**2

    assert_is(KD(temperature=2.0, standardize=True), public)


@pytest.mark.parametrize(("eps", "temperature"), [(1.0, 1.0), (1.5, 2.0), (0.5, 1.0)])
def test_ofa_is_the_public_formula(eps: float, temperature: float) -> None:
    def public(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        p_s, p_t = (F.softmax(z / temperature, dim=1) for z in (s, t))
        one_hot = F.one_hot(y, s.shape[1])
        target = (p_t + one_hot) ** eps - one_hot
        return -(target * torch.log(p_s)).sum(dim=1).mean()

    assert_is(OFA(eps=eps, temperature=temperature), public)


def test_ofa_without_labels_has_the_teachers_power_for_a_target() -> None:
    student, teacher, _ = on_label_grid()
    z_s, z_t = (x.detach().T[None, :, None] for x in (student, teacher))
    target = torch.full((1, 1, len(student)), 254)
    terms = [OFA(eps=1.5)]
    got = functional.segmentation_loss(z_s, target, z_t, terms=terms, unlabelled_index=254)
    p_t, log_p_s = teacher.softmax(dim=1), student.log_softmax(dim=1)
    torch.testing.assert_close(got.loss, -(p_t**1.5 * log_p_s).sum(dim=1).mean())


# --- the classes ---------------------------------------------------------------------------------


def of_terms(**options: Any) -> Any:
    return functional.segmentation_loss(*BATCH.arguments, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KD("1"), "weight: got '1', expected a number"),
        (lambda: KD(temperature=0.0), "temperature: got 0.0"),
        (
            lambda: KD(divergence="backward"),
            "divergence: got 'backward', expected one of 'forward'",
        ),
        (lambda: Focal(gamma=-1.0), r"gamma: got -1.0, expected \[0, 16\]"),
        (lambda: Focal(alpha=-1.0), "alpha: got -1.0"),
        (lambda: KD(alpha=0.0), "alpha: got 0.0.*divergence='forward'"),
        (lambda: KD(divergence="js", standardize=True), "standardize: got True with .*'js'"),
        (lambda: OFA(eps=0.0), r"eps: got 0.0, expected \[0.01, 16\]"),
        (lambda: KD(beta=1.0), "beta: got 1.0.*divergence='forward'"),
        (lambda: CrossEntropy(label_smoothing=1.5), "label_smoothing: got 1.5"),
        (lambda: HeteroAKD(preset="paper", mix="probs"), "mix: got 'probs'"),
        (lambda: HeteroAKD(weight_axis="space"), "weight_axis: got 'space'"),
        (lambda: HeteroAKD(tau=float("nan")), "tau: got nan"),
        (lambda: hf.SegmentationLoss(), "terms: got 0"),
        (lambda: hf.SegmentationLoss(KD(0.0)), "terms: got 1, expected one whose weight is not 0"),
        (lambda: hf.SegmentationLoss("ce"), "terms: got str"),  # type: ignore[arg-type]
        (lambda: hf.SegmentationLoss(KD(), ignore_label=0), "ignore_label: there is no such"),  # type: ignore[call-arg]
        (lambda: hf.SegmentationLoss(KD()).set_weights(ce=1.0), "ce: there is no such"),
        (lambda: hf.SegmentationLoss(KD()).set_weights(KD=1.0), "KD: .* it is called kd here"),
        (lambda: hf.SegmentationLoss(KD()).set_weights(kd_weight=1.0), "is called kd here"),
        (lambda: hf.SegmentationLoss([KD()]), r"terms: got list, .*SegmentationLoss\(\*terms\)"),  # type: ignore[arg-type]
        (lambda: hf.SegmentationLoss(KD), r"terms: got the class KD, .* call it, KD\(\)"),  # type: ignore[arg-type]
        (lambda: hf.SegmentationLoss(type("My", (KD,), {})()), "terms: got My, .*no kernel"),
        (lambda: setattr(hf.SegmentationLoss(KD()), "terms", KD()), r"got KD, .* write \[KD\("),
        (lambda: hf.SegmentationLoss(KD(), class_weight="abc"), "class_weight: got str, expected"),  # type: ignore[arg-type]
        (lambda: of_terms(terms=KD()), r"terms: got KD, expected a sequence .* write \[KD\("),
        (lambda: of_terms(terms=None), "terms: got NoneType, expected terms"),
        (lambda: of_terms(terms=[]), "terms: got 0, expected one whose weight is not 0"),
        (lambda: of_terms(terms=[KD(0.0)]), "terms: got 1, expected one whose weight is not 0"),
        (lambda: of_terms(terms=[KD()], kd_weight=1.0), r"kd_weight: .* called KD\(weight=...\)"),
        (lambda: functional.cross_entropy(*BATCH.arguments[:2], weight=1.0), "called class_weight"),  # type: ignore[call-arg]
    ],
)
def test_errors_name_the_option(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_terms_are_values() -> None:
    assert KD(1, temperature=2) == KD(1.0, temperature=2.0)
    assert len({KD(), KD(1.0), KD(2.0)}) == 2
    assert HeteroAKD(preset="paper").mix == "logits"
    with pytest.raises(dataclasses.FrozenInstanceError):
        KD().weight = 2.0  # type: ignore[misc]
    for term in (term() for term in TERMS):
        assert pickle.loads(pickle.dumps(term)) == term
        assert "Denominator: " in (type(term).__doc__ or "")


def test_every_option_has_one_flat_keyword() -> None:
    found = sorted(
        (term.__name__, option.name) for targets in FLAT.values() for term, option in targets
    )
    expected = sorted((t.__name__, f.name) for t in FLAT_TERMS for f in dataclasses.fields(t))
    assert found == expected


def test_segmentation_loss_as_a_module() -> None:
    loss = hf.SegmentationLoss(CrossEntropy(), KD(0.1), class_weight=[1.0] * 5, ignore_index=-1)
    assert "KD(weight=0.1" in repr(loss)
    assert loss.class_weight.dtype == torch.float32
    assert dict(loss.weights) == {"ce": 1.0, "kd": 0.1}
    loss.set_weights(kd=0.4)
    loss.align_corners = True
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        target = BATCH.target.where(BATCH.target != 255, -1)
        got = other(BATCH.student, target, BATCH.teacher)
        expected = functional.distillation_loss(
            *BATCH.arguments, kd_weight=0.4, align_corners=True, class_weight=torch.ones(5)
        )
        assert torch.equal(got.loss, expected.loss)
    loss.eval()
    assert list(loss(BATCH.student, BATCH.target.clamp(max=4)).terms) == ["ce"]
    loss.train()
    with pytest.raises(ValueError, match=r"got None, but the weight of KD is not 0.*\.eval\(\)"):
        loss(BATCH.student, BATCH.target.clamp(max=4))
    with pytest.raises(AttributeError, match="did you mean terms"):
        loss.term = ()


@pytest.mark.parametrize(
    "value", [-0.1, -1, float("nan"), float("inf"), -float("inf"), True, "1", None]
)
def test_a_weight_that_is_none_is_named_as_the_caller_did(value: Any) -> None:
    terms = hf.SegmentationLoss(CrossEntropy(), KD(0.1), KD(0.2))
    flat = hf.HeteroAKDLoss(5, kd_weight=0.1)
    before = repr(terms), repr(flat)
    for make, name in (
        *((lambda term=term: term(value), "weight") for term in TERMS),
        (lambda: terms.set_weights(ce=0.5, kd=value), "kd"),
        (lambda: terms.set_weights(kd_2=value), "kd_2"),
        (lambda: flat.set_weights(ce=0.5, kd=value), "kd"),
        (lambda: setattr(flat, "kd_weight", value), "kd_weight"),
        (lambda: setattr(flat, "projector_weight", value), "projector_weight"),
        (lambda: hf.HeteroAKDLoss(5, hetero_weight=value), "hetero_weight"),
        (lambda: functional.distillation_loss(*BATCH.arguments, kd_weight=value), "kd_weight"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected a .*number"):
            make()
    assert (repr(terms), repr(flat)) == before


def test_weights_by_name_of_every_loss() -> None:
    flat = hf.HeteroAKDLoss(5)
    flat.set_weights(kd=0.0, projector=0.25)
    assert (flat.kd_weight, flat.projector_weight) == (0.0, 0.25)
    with pytest.raises(TypeError, match="kd_weight: there is no such term .* called kd here"):
        flat.set_weights(kd_weight=1.0)
    terms = hf.SegmentationLoss(CrossEntropy(), KD(0.1))
    terms.set_weights(kd=0.0)
    assert list(terms(*BATCH.arguments).terms) == ["ce"]


def test_a_missing_teacher_is_said_in_the_callers_words() -> None:
    student, target, teacher = BATCH.arguments
    terms = [CrossEntropy(), KD(0.0), KD(temperature=2.0), KD(temperature=3.0)]
    grad = teacher.clone().requires_grad_()
    for loss, weight in (
        (hf.SegmentationLoss(*terms), "the weight of KD"),
        (lambda *x: functional.segmentation_loss(*x, terms=terms), "the weight of KD"),
        (lambda *x: functional.distillation_loss(*x, kd_weight=1.0), "kd_weight"),
        (hf.HeteroAKDLoss(5), "kd_weight"),
    ):
        message = f"got None, but {weight} is not 0; pass the .* or set {weight} to 0"
        with pytest.raises(ValueError, match=f"teacher_logits: {message}"):
            loss(student, target)
        other = weight.replace("KD", "TeacherCrossEntropy").replace("kd_", "teacher_ce_")
        with pytest.raises(ValueError, match="teacher_logits: requires grad") as caught:
            loss(student, target, grad)
        # HeteroAKDLoss has no such weight
        assert (f"set {other}" in str(caught.value)) != isinstance(loss, hf.HeteroAKDLoss)


@pytest.mark.parametrize(
    "terms",
    [
        (KD(temperature=2.0),),
        (CrossEntropy(), KD(temperature=2.0), HeteroAKD(0.0, preset="paper")),
        (CrossEntropy(), KD(temperature=2.0), KD(temperature=3.0), HeteroAKD(0.0)),
    ],
)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
def test_maps_of_a_temperature_that_no_term_has(terms: tuple[Any, ...], backend: str) -> None:
    """They take a pass of their own, which adds nothing to the loss."""
    hetero = terms[-1] if isinstance(terms[-1], HeteroAKD) else HeteroAKD(0.0)
    student = BATCH.student.clone().requires_grad_()
    arguments = (student, BATCH.target, BATCH.teacher)
    loss = hf.SegmentationLoss(*terms, backend=backend)
    got, expected = loss(*arguments, return_maps=True), loss(*arguments)
    assert torch.equal(got.loss, expected.loss)
    assert got.terms == expected.terms
    assert got.denominators == expected.denominators
    gradients = [torch.autograd.grad(one.loss, student)[0] for one in (got, expected)]
    assert torch.equal(*gradients)
    maps = functional.segmentation_loss(
        *arguments, terms=[CrossEntropy(), hetero], return_maps=True, backend=backend
    ).maps
    for name, value in maps.items():
        torch.testing.assert_close(got.maps[name], value)
    assert "HeteroAKD(weight=0.0" in loss.plan(*arguments, return_maps=True)


def test_plan_refuses_what_the_call_does() -> None:
    student, target, teacher = BATCH.arguments
    loss = hf.SegmentationLoss(CrossEntropy(), KD(0.1))
    for arguments, message in (
        ((student.numpy(), target, teacher), "student_logits: got ndarray"),
        ((student, target[:, None], teacher), "target: got shape"),
        ((student, target), "teacher_logits: got None"),
    ):
        for call in (loss, loss.plan):
            with pytest.raises((TypeError, ValueError), match=message):
                call(*arguments)


def test_plan_says_passes_backends_and_reasons() -> None:
    loss = hf.SegmentationLoss(CrossEntropy(), KD(0.1), HeteroAKD(1.0, temperature=2.0))
    text = loss.plan(*BATCH.arguments)
    assert text.count("pass ") == 2
    assert "ce + kd over valid" in text
    assert "hetero over discrepancy" in text
    assert "backend: cpu (tried in order: cpu, reference)" in text or "backend: reference" in text
    assert "logits: (4, 6) to (13, 17)" in text
    projecting = hf.HeteroAKDLoss(5, 7, 9, resolution="logits")
    features = {
        "student_features": torch.randn(2, 7, 4, 4),
        "teacher_features": torch.randn(2, 9, 4, 4),
    }
    text = projecting.plan(*BATCH.arguments, **features)
    assert text.count("pass ") == 2
    assert "projection: first, because " in text


def test_options_of_terms_are_no_attributes_of_the_loss() -> None:
    loss = hf.SegmentationLoss(CrossEntropy(), KD(0.1))
    instead = {"kd_weight": "set_weights.kd=", "kd_beta": "KD.beta=", "preset": "HeteroAKD.preset="}
    for name, hint in instead.items():
        with pytest.raises(AttributeError, match=f"{name}: .*{hint}"):
            setattr(loss, name, 0.5)
        with pytest.raises(TypeError, match=f"{name}: .*{hint}"):
            hf.SegmentationLoss(CrossEntropy(), **{name: 0.5})


def test_target_and_teacher_in_the_old_order() -> None:
    loss = hf.SegmentationLoss(CrossEntropy(), KD(0.1))
    student, target, teacher = BATCH.arguments
    with pytest.raises(ValueError, match="the order is .student_logits, target, teacher_logits"):
        loss(student, teacher, target)
