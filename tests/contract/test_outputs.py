"""docs/contract.md, "Outputs" and "Gradients"."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from common import (
    BACKENDS,
    CPU_BACKENDS,
    DTYPES_16,
    F32,
    TERM_CASES,
    Batch,
    assert_accurate,
    assert_maps_match,
    assert_same_bits,
    check,
    eager_cross_entropy,
    evaluate,
    every_backend,
    every_cpu_backend,
    every_kernel,
    make_batch,
    maps_relative,
    terms_of,
    truth,
)
from geometries import batch_of

from heteroakd_fast import DistillationOutput, HeteroAKDLoss, backends, functional

both_cases = pytest.mark.parametrize("case", ["ce", "all"])


def loss_of(backend: str, case: str, batch: Batch) -> torch.Tensor:
    """The loss of these leaves, which get gradients; the teacher where a term trains it."""
    options = TERM_CASES[case]
    student = batch.student.requires_grad_()
    teacher = batch.teacher.requires_grad_("teacher_ce_weight" in options)
    return functional.distillation_loss(
        student, batch.target, teacher, backend=backend, **options
    ).loss


# --- outputs -----------------------------------------------------------------------------------


def test_a_term_that_was_not_asked_for_is_none() -> None:
    batch = make_batch(dtype=F32)
    batch.student.requires_grad_()
    output = functional.distillation_loss(*batch.arguments, kd_weight=0.5)
    assert isinstance(output, DistillationOutput)
    assert output.ce is not None
    assert output.kd is not None
    missing = ("teacher_ce", "hetero", "feature", "projector", "maps")
    assert all(getattr(output, name) is None for name in missing)
    assert not output.ce.requires_grad
    assert not output.kd.requires_grad
    assert output.loss.requires_grad
    torch.testing.assert_close(output.loss.detach(), output.ce + 0.5 * output.kd)


@every_backend
@pytest.mark.parametrize("case", TERM_CASES)
def test_loss_is_the_weighted_sum(backend: str, case: str) -> None:
    options = TERM_CASES[case]
    got = evaluate(make_batch(), backend=backend, **options)
    weights = {term.name: term.weight for term in terms_of(options)}
    expected = sum(weights[name] * value for name, value in got.terms.items())
    assert float(got.loss) == pytest.approx(expected, rel=1e-12)
    assert float(got.loss) > 0


@every_cpu_backend
@both_cases
def test_valid_is_counted(backend: str, case: str) -> None:
    options = {**TERM_CASES[case], "teacher_ce_weight": 0.0, "backend": backend}
    batch = make_batch(dtype=F32)
    output = functional.distillation_loss(*batch.arguments, **options)
    assert output.valid.dtype == torch.int64
    assert int(output.valid) == int((batch.target != 255).sum())


@pytest.mark.parametrize(
    "case",
    ["hetero-softmax-kl", "hetero-mix-teacher", "hetero-paper", "hetero-paper-mix-teacher", "kd"],
)
@every_kernel
def test_maps(backend: str, case: str) -> None:
    options = {**TERM_CASES[case], "return_maps": True}
    batch = make_batch(dtype=F32)
    got = evaluate(batch, backend=backend, **options)
    maps = got.maps
    for values in maps.values():
        assert values.shape == batch.target.shape
        assert not values.requires_grad
        assert (values[batch.target == 255] == 0).all()
    inside = batch.target != 255
    assert ((maps["reliability"][inside] > 0) & (maps["reliability"][inside] < 1)).all()
    assert (maps["discrepancy"] >= 0).all()
    assert maps["discrepancy"].max() > 0
    assert_maps_match(got, truth(batch, **options), maps_relative(backend))


@every_backend
@pytest.mark.parametrize("case", TERM_CASES)
def test_all_pixels_ignored(backend: str, case: str) -> None:
    options = TERM_CASES[case]
    batch = make_batch(dtype=F32, ignored=2.0)
    batch.student.fill_(float("nan"))
    batch.teacher.fill_(float("inf"))
    got = evaluate(batch, 3.0, backend=backend, **options)
    assert got.loss == 0
    assert all(value == 0 for value in got.terms.values())
    assert not any(grad.any() for grad in (got.student_grad, got.teacher_grad) if grad is not None)


@every_backend
@pytest.mark.parametrize("case", [name for name in TERM_CASES if "mix-teacher" in name])
def test_what_is_not_mixed_does_not_reach_the_target(backend: str, case: str) -> None:
    """A class that the student's logits exclude: 0 times their infinity would be NaN. (Its loss is
    infinite, or as large as the numbers go.)"""
    options = {**TERM_CASES[case], "evaluation": "none"}
    batch = make_batch(dtype=F32, size=(4, 6))
    batch.student[:, 2] = -math.inf
    batch.target[batch.target == 2] = 3
    got = evaluate(batch, backend=backend, **options)
    expected = truth(batch, **options)
    assert expected.loss == math.inf
    assert got.loss > 1e30
    assert expected.student_grad.isfinite().all()
    assert_accurate(got.student_grad, expected.student_grad)


@every_backend
@pytest.mark.parametrize("case", TERM_CASES)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upsampled", [False, True])
def test_large_logits(backend: str, case: str, dtype: torch.dtype, upsampled: bool) -> None:
    """+-1e4: finite, and as accurate as float32 can be.

    On the label grid the logits are exact and so is the result. Interpolated, they carry a
    rounding of 1e4 * 2^-24, which a softmax near a tie turns into a relative error of that size;
    so do the cross entropies of 1e4 whose difference is the reliability of `hetero`.
    """
    options = TERM_CASES[case]
    size = (8, 12) if upsampled else (4, 6)
    batch = make_batch(dtype=F32, teacher_grid=None, size=size)
    extreme = Batch(
        batch.student.sign().mul(1e4).to(dtype),
        batch.teacher.sign().mul(1e4).to(dtype),
        batch.target,
    )
    got = evaluate(extreme, backend=backend, **options)
    expected = truth(extreme, **options)
    assert math.isfinite(got.loss)
    tolerance = 2e-3 if upsampled or options.get("hetero_weight") else 2e-6
    for name, value in expected.terms.items():
        assert got.terms[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    for ours, theirs in (
        (got.student_grad, expected.student_grad),
        (got.teacher_grad, expected.teacher_grad),
    ):
        if ours is not None and theirs.abs().max() > 0:
            signal = theirs.abs().max()
            error = (ours.double() - theirs).abs().max()
            info = torch.finfo(dtype)  # a gradient may be denormal, too
            assert error <= (tolerance + info.eps) * signal + info.eps * info.smallest_normal


@every_backend
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_cross_entropy_at_the_dtypes_largest_is_as_finite_as_torchs(
    backend: str, dtype: torch.dtype
) -> None:
    largest = torch.finfo(dtype).max
    for values in ([largest, 0.0, 0.0], [0.0, -largest, 0.0], [largest, largest, -largest / 4]):
        logits = torch.tensor(values, dtype=dtype).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
        target = torch.zeros(1, 2, 2, dtype=torch.int64)
        batch = Batch(logits, logits, target)
        x = logits.float().requires_grad_()
        theirs = torch.nn.functional.cross_entropy(x, target).detach()
        got = evaluate(batch, backend=backend)
        assert math.isfinite(theirs)
        assert float(got.loss) == pytest.approx(float(theirs), rel=1e-6, abs=1e-30)
        assert got.student_grad.isfinite().all()


@every_backend
@pytest.mark.parametrize("lead", [5.0, 15.0, 30.0, 60.0])
def test_gradient_of_confident_pixels(backend: str, lead: float) -> None:
    """float32: the true-class gradient p - 1 to a relative 1e-5 even where it is 1e-26."""
    target = torch.randint(0, 19, (1, 8, 8))
    logits = torch.randn(1, 19, 8, 8)
    logits.scatter_add_(1, target[:, None], torch.full((1, 1, 8, 8), lead))
    batch = Batch(logits, logits, target)
    got = evaluate(batch, backend=backend)
    others = logits.double().softmax(1).scatter(1, target[:, None], 0.0)
    expected = -others.sum(1, keepdim=True) / 64
    ours = got.student_grad.gather(1, target[:, None]).double()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    nll = -torch.log1p(-others.sum(1)).mean()
    assert float(got.loss) == pytest.approx(nll.item(), rel=1e-5)


# --- gradients ---------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("case", TERM_CASES)
@pytest.mark.parametrize("grad_output", [-0.37, 0.0, 1e4])
def test_any_grad_output(backend: str, case: str, grad_output: float) -> None:
    options = TERM_CASES[case]
    batch = make_batch(dtype=F32)
    if grad_output == 0.0:
        got = evaluate(batch, grad_output, backend=backend, **options)
        assert got.student_grad is None or not got.student_grad.any()
    else:
        check(batch, grad_output, backend=backend, **options)


@every_cpu_backend
@both_cases
def test_backward_twice_with_retain_graph(backend: str, case: str) -> None:
    batch = make_batch(dtype=F32)
    student, loss = batch.student, loss_of(backend, case, batch)
    three = torch.tensor(3.0)
    (first,) = torch.autograd.grad(loss, student, three, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, three, retain_graph=True)
    (third,) = torch.autograd.grad(loss, student, 2 * three)
    assert torch.equal(first, second)
    torch.testing.assert_close(third, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student, three)


@every_cpu_backend
@both_cases
def test_second_order_is_refused(backend: str, case: str) -> None:
    batch = make_batch(dtype=F32)
    student, loss = batch.student, loss_of(backend, case, batch)
    with pytest.raises(RuntimeError, match="differentiable once.*create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


@every_cpu_backend
@both_cases
def test_without_gradients_none_are_made(backend: str, case: str) -> None:
    options = {**TERM_CASES[case], "teacher_ce_weight": 0.0}
    batch = make_batch(dtype=F32)
    with_grad = evaluate(batch, backend=backend, **options)
    output = functional.distillation_loss(*batch.arguments, backend=backend, **options)
    assert not output.loss.requires_grad
    with torch.no_grad():
        student = batch.student.clone().requires_grad_()
        inside = functional.distillation_loss(
            student, batch.target, batch.teacher, backend=backend, **options
        )
    assert not inside.loss.requires_grad
    with torch.inference_mode():
        frozen = functional.distillation_loss(*batch.arguments, backend=backend, **options)
    assert output.loss == inside.loss == frozen.loss == with_grad.loss


@both_cases
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_compiled_backends_are_told_which_gradients_to_make(
    backend: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TERM_CASES[case]
    asked: list[tuple[bool, bool]] = []
    kernel = backends.get(backend)
    original = kernel.sums

    def spy(call: backends.Call) -> Any:
        asked.append((call.wants[0], call.wants[3]))
        return original(call)

    monkeypatch.setattr(kernel, "sums", spy)
    batch = make_batch(dtype=F32)
    evaluate(batch, backend=backend, **options)
    with torch.no_grad():
        functional.distillation_loss(
            batch.student.requires_grad_(), batch.target, batch.teacher, backend=backend, **options
        )
    functional.distillation_loss(
        batch.student.detach(), batch.target, batch.teacher, backend=backend, **options
    )
    trains_teacher = "teacher_ce_weight" in options
    assert asked == [(True, trains_teacher), (False, False), (False, False)]


@both_cases
@every_backend
def test_only_teacher_ce_reaches_the_teacher(backend: str, case: str) -> None:
    """Whatever else is computed, the teacher's gradient is that of `teacher_ce` alone."""
    options = {**TERM_CASES[case], "teacher_ce_weight": 0.5}
    batch = make_batch(dtype=F32)
    got = evaluate(batch, student_requires_grad=False, backend=backend, **options)
    alone = truth(batch, ce_weight=0.0, teacher_ce_weight=0.5)
    assert got.student_grad is None
    assert_accurate(got.teacher_grad, alone.teacher_grad)


@pytest.mark.share(7)
@pytest.mark.parametrize(
    "geometry",
    ["label-grid", "label-grid-warps", "several-programs", "several-blocks", "threads",
     "threads-uneven", "threads-label-grid"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (backend, case)
        for backend in BACKENDS
        for case in ("ce", "all", "ce-smoothed", "kd-js", "hetero-paper", "hetero-paper-space")
        # torch's own functions of the others depend on how threads divide a tensor
        if backend != "reference" or case in ("ce", "all")
    ],
)
def test_bits_do_not_depend_on_threads_or_runs(backend: str, geometry: str, case: str) -> None:
    """Also with other memory in between, and not because of PyTorch's own deterministic mode."""
    torch.use_deterministic_algorithms(backend == "reference")
    options = {**TERM_CASES[case], "backend": backend}
    options["return_maps"] = bool(options.get("hetero_weight"))
    batch = batch_of(geometry, classes=6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = evaluate(batch, **options)
        for threads in (2, 3, 5, 7) if backend in ("cpu", "reference") else (1,):
            torch.set_num_threads(threads)
            garbage = torch.full((12345 * threads,), math.nan)
            assert_same_bits(evaluate(batch, **options), first)
            del garbage
    finally:
        torch.set_num_threads(before)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES_16)
@pytest.mark.parametrize("confident", [False, True])
def test_three_way_rule_for_16_bits(backend: str, dtype: torch.dtype, confident: bool) -> None:
    """Error of the kernel <= error of the same-dtype eager version + one rounding."""
    batch = make_batch(classes=19, grid=(16, 16), size=(64, 64), dtype=torch.float64)
    logits = batch.student
    if confident:
        labels = batch.target.where(batch.target != 255, 0)[:, ::4, ::4]
        logits = logits.scatter_add(
            1, labels[:, None], torch.full((2, 1, 16, 16), 12.0, dtype=torch.float64)
        )
    batch = batch._replace(student=logits.to(dtype))
    expected = truth(batch, 2.5).student_grad
    got = evaluate(batch, 2.5, backend=backend).student_grad
    x = batch.student.clone().requires_grad_()
    (eager,) = torch.autograd.grad(
        eager_cross_entropy(x, batch.target), x, torch.tensor(2.5, dtype=dtype)
    )
    signal = expected.abs().max()
    rounding = torch.finfo(dtype).eps / 2 * signal
    ours, theirs = ((g.double() - expected).abs().max() for g in (got, eager))
    assert ours <= theirs + rounding
    assert ours < 0.01 * signal
    assert_accurate(got, expected)


@pytest.mark.parametrize(
    ("backend", "geometry"),
    [
        *itertools.product(CPU_BACKENDS, ("other-teacher", "teacher-on-label-grid")),
        *itertools.product({"cpu"} & {*CPU_BACKENDS}, ("student-on-label-grid",)),
    ],
)
def test_logits_and_labels_may_be_overwritten_before_backward(backend: str, geometry: str) -> None:
    """Metrics computed in place, reused label buffers: a backend keeps neither."""
    batch, weight = batch_of(geometry), torch.rand(3) + 0.5
    options = {"hetero_weight": 1.0, "class_weight": weight, "backend": backend}
    expected = evaluate(batch, **options).student_grad
    student = batch.student.clone().requires_grad_()
    logits = student * 1.0
    loss = functional.distillation_loss(logits, batch.target, batch.teacher, **options).loss
    with torch.no_grad():
        logits.sigmoid_()
        batch.teacher.fill_(math.nan)
        weight.zero_()
    batch.target.fill_(255)
    loss.backward()
    assert torch.equal(student.grad, expected)


# --- denominators ------------------------------------------------------------------------------


@every_cpu_backend
@both_cases
def test_denominators_make_micro_batches_exact(backend: str, case: str) -> None:
    """Gradient accumulation: the mean of the micro-batches' own denominators, given back, makes the
    mean of their losses that of the whole batch. They are what a term is known to divide by."""
    options = {**TERM_CASES[case], "backend": backend}
    whole = make_batch(batch=4, dtype=torch.float64)
    whole.target[:2, :6] = 255  # the halves have different numbers of valid pixels
    expected = evaluate(whole, **options)
    halves = [Batch(*(t[rows] for t in whole)) for rows in (slice(0, 2), slice(2, 4))]
    own = []
    for half in halves:
        teacher = half.teacher.clone().requires_grad_("teacher_ce_weight" in options)
        output = functional.distillation_loss(half.student, half.target, teacher, **options)
        assert not any(value.requires_grad for value in output.denominators.values())
        own.append(output.denominators)
    assert own[0].keys() == expected.terms.keys()
    mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
    known = dict.fromkeys(mean, float((whole.target != 255).sum()) / 2)
    if "hetero" in known:
        maps = truth(whole, **{**options, "return_maps": True}).maps
        known["hetero"] = float(maps["discrepancy"].sum()) / 2
    assert {name: float(value) for name, value in mean.items()} == pytest.approx(known, rel=1e-12)
    results = [evaluate(half, normalizer=known, **options) for half in halves]
    total = sum(float(result.loss) for result in results) / 2
    assert total == pytest.approx(float(expected.loss), rel=1e-12)
    given_back = evaluate(halves[0], normalizer=mean, **options)
    assert float(given_back.loss) == pytest.approx(float(results[0].loss), rel=1e-12)
    naive = [evaluate(half, **options) for half in halves]
    assert sum(float(result.loss) for result in naive) / 2 != pytest.approx(float(expected.loss))
    grads = torch.cat([result.student_grad for result in results]) / 2
    torch.testing.assert_close(grads, expected.student_grad, rtol=1e-11, atol=1e-15)


@every_backend
def test_a_plain_normalizer_replaces_the_valid_count_and_nothing_else(backend: str) -> None:
    batch = make_batch()
    valid = int((batch.target != 255).sum())
    plain = evaluate(batch, backend=backend)
    for normalizer in (
        2 * valid,
        float(2 * valid),
        torch.tensor(2 * valid),
        torch.tensor([2.0 * valid]),
    ):
        got = evaluate(batch, backend=backend, normalizer=normalizer)
        assert float(got.loss) == pytest.approx(float(plain.loss) / 2, rel=1e-12)
    weight = torch.rand(5, dtype=torch.float64)
    weighted = evaluate(batch, backend=backend, class_weight=weight)
    same = evaluate(batch, backend=backend, class_weight=weight, normalizer=2 * valid)
    assert same.loss == weighted.loss
    by_name = evaluate(batch, backend=backend, class_weight=weight, normalizer={"ce": 1.0})
    assert by_name.loss > weighted.loss


def test_a_plain_normalizer_leaves_the_sum_of_discrepancies() -> None:
    batch = make_batch()
    for case, changes in (
        ("hetero-softmax-kl", False),
        ("hetero-no-evaluation", True),
        ("hetero-paper", True),
        ("hetero-paper-space", False),
    ):
        options = {**TERM_CASES[case], "backend": "reference"}
        plain = evaluate(batch, **options)
        got = evaluate(batch, normalizer=10.0, **options)
        assert (got.loss != plain.loss) == changes, case


def test_equal_models_have_no_hetero_loss() -> None:
    """sum d = 0: the term is 0 with zero gradient, not 0/0."""
    batch = make_batch(teacher_grid=None)
    same = batch._replace(teacher=batch.student.clone())
    got = evaluate(same, **TERM_CASES["hetero-softmax-kl"])
    assert got.loss == 0
    assert (got.student_grad == 0).all()


# --- the module --------------------------------------------------------------------------------


def test_module_on_logits_is_the_function() -> None:
    batch = make_batch(dtype=F32)
    loss = HeteroAKDLoss(5, kd_weight=0.4, hetero_weight=0.6, temperature=2.0, preset="paper")
    assert not list(loss.parameters())
    got = loss(batch.student, batch.target, teacher_logits=batch.teacher)
    expected = functional.distillation_loss(
        *batch.arguments, kd_weight=0.4, hetero_weight=0.6, temperature=2.0, preset="paper"
    )
    assert got.loss == expected.loss
    assert got.projector is None


@pytest.mark.parametrize("preset", ["softmax-kl", "paper"])
def test_module_on_features(preset: str) -> None:
    batch = make_batch(dtype=F32)
    student_features = torch.randn(2, 7, 4, 4, requires_grad=True)
    teacher_features = torch.randn(2, 9, 3, 3, requires_grad=True)
    loss = HeteroAKDLoss(
        5, 7, 9, preset=preset, feature_weight=0.3, projector_weight=0.8, class_weight=torch.rand(5)
    )
    assert (loss.student_projector.bn is not None) == (preset == "paper")
    output = loss(
        batch.student,
        batch.target,
        teacher_logits=batch.teacher,
        student_features=student_features,
        teacher_features=teacher_features,
        return_maps=True,
    )
    final = functional.distillation_loss(
        *batch.arguments, kd_weight=0.1, class_weight=loss.class_weight
    )
    with torch.no_grad():
        z_s, z_t = (
            loss.student_projector(student_features),
            loss.teacher_projector(teacher_features),
        )
    projected = functional.distillation_loss(
        z_s,
        batch.target,
        z_t,
        teacher_ce_weight=1.0,
        hetero_weight=1.0,
        feature_weight=1.0,
        preset=preset,
        class_weight=loss.class_weight,
    )
    torch.testing.assert_close(output.ce, final.ce)
    torch.testing.assert_close(output.kd, final.kd)
    torch.testing.assert_close(output.projector, projected.ce + projected.teacher_ce)
    torch.testing.assert_close(output.hetero, projected.hetero)
    torch.testing.assert_close(output.feature, projected.feature)
    total = (
        final.ce + 0.1 * final.kd + 0.8 * output.projector + output.hetero + 0.3 * output.feature
    )
    torch.testing.assert_close(output.loss.detach(), total)
    output.loss.backward()
    assert student_features.grad is not None
    assert teacher_features.grad is None  # detached, though it asked for one
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters() if p.dim() == 4)


def test_only_teacher_ce_trains_the_teachers_projector() -> None:
    batch = make_batch(dtype=F32)
    features = {
        "student_features": torch.randn(2, 7, 4, 4),
        "teacher_features": torch.randn(2, 9, 3, 3),
    }
    grads = []
    for hetero in (0.0, 5.0):
        torch.manual_seed(1)
        loss = HeteroAKDLoss(5, 7, 9, kd_weight=0.0, hetero_weight=hetero)
        loss(batch.student, batch.target, **features).loss.backward()
        grads.append(
            [loss.teacher_projector.conv.weight.grad, loss.student_projector.conv.weight.grad]
        )
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])
    loss = HeteroAKDLoss(5, 7, 9, kd_weight=0.0, projector_weight=0.0)
    loss(batch.student, batch.target, **features).loss.backward()
    assert loss.teacher_projector.conv.weight.grad is None
    assert loss.student_projector.conv.weight.grad.abs().sum() > 0


def test_module_state_and_copies() -> None:
    import copy
    import pickle

    loss = HeteroAKDLoss(5, 7, 9, class_weight=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert set(loss.state_dict()) == {"class_weight"} | {
        f"{side}_projector.conv.{name}"
        for side in ("student", "teacher")
        for name in ("weight", "bias")
    }
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other.class_weight, loss.class_weight)
        assert other.options == loss.options
    assert "temperature=1.0" in repr(loss)
    assert loss.double().class_weight.dtype == torch.float64


def test_module_keeps_its_own_class_weights() -> None:
    mine = torch.rand(5, dtype=torch.float64)
    loss = HeteroAKDLoss(5, class_weight=mine)
    before = mine.clone()
    mine.zero_()
    assert torch.equal(loss.class_weight, before)  # a copy, and not rounded
    with torch.device("meta"):
        other = HeteroAKDLoss(5, class_weight=[0.0] * 5)
    other.to_empty(device="cpu").load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.class_weight.double(), before)
