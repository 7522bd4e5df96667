"""Pixels that only the teacher labels, and weights of pixels, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from common import (
    BACKENDS,
    F32,
    TERM_CASES,
    Batch,
    assert_accurate,
    check,
    complete,
    evaluate,
    every_backend,
    every_cpu_backend,
    every_kernel,
    loss_of,
    make_batch,
    truth,
)

from heteroakd_fast import (
    ChannelWiseLoss,
    HeteroAKDLoss,
    Projection,
    SegmentationLoss,
    functional,
)
from heteroakd_fast.terms import (
    CWD,
    DKD,
    KD,
    CrossEntropy,
    Dice,
    Feature,
    HeteroAKD,
    TeacherCrossEntropy,
    Term,
    Tversky,
)

#: Logits' grid, teacher's grid, labels: a grid of its own each, cells of 4 x 4, the label grid.
GRIDS = {
    "apart": ((4, 6), (8, 3), (13, 17)),
    "cells": ((6, 9), None, (24, 36)),
    "labels": ((13, 17), None, (13, 17)),
}
KINDS = ("unlabelled", "weighted", "both")


def pixels(batch: Batch, kind: str, seed: int = 5) -> tuple[Batch, dict[str, Any]]:
    """A third of the labelled pixels lose their label, one image all of them; weights from 0 to 2,
    a tenth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    target, options = batch.target.clone(), {}
    if kind != "weighted":
        without = torch.rand(target.shape, generator=generator) < 0.3
        without[1] = True
        target[without & (target != 255)] = 254
        options["unlabelled_index"] = 254
    if kind != "unlabelled":
        weight = 2 * torch.rand(target.shape, generator=generator)
        weight[torch.rand(target.shape, generator=generator) < 0.1] = 0
        options["pixel_weight"] = weight
    return batch._replace(target=target), options


@pytest.mark.parametrize(
    ("grids", "kind"),
    [*(("apart", kind) for kind in KINDS), ("cells", "both"), ("labels", "both")],
)
@pytest.mark.parametrize("case", TERM_CASES)
@every_kernel
def test_values_and_gradients(backend: str, case: str, grids: str, kind: str) -> None:
    grid, teacher_grid, size = GRIDS[grids]
    batch = make_batch(2, 5, grid, teacher_grid, size, dtype=F32)
    batch, options = pixels(batch, kind)
    check(batch, backend=backend, **options, **TERM_CASES[case])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 19])
@every_backend
def test_other_dtypes_and_classes(backend: str, classes: int, dtype: torch.dtype) -> None:
    grid, _teacher_grid, size = GRIDS["cells"]
    batch, options = pixels(make_batch(2, classes, grid, None, size, dtype=dtype), "both")
    options["pixel_weight"] = options["pixel_weight"].to(dtype)
    check(batch, backend=backend, **options, **TERM_CASES["all+objects"])


@pytest.mark.parametrize("case", ["all+objects", "hetero-paper", "hetero-mix-logits"])
@every_backend
def test_confident_logits_and_other_layouts(backend: str, case: str) -> None:
    grid, teacher_grid, size = GRIDS["apart"]
    batch, options = pixels(make_batch(2, 7, grid, teacher_grid, size, dtype=F32), "both")
    sides = (1e4 / 3 * batch.student / 3, 1e4 / 3 * batch.teacher / 3)
    student, teacher = (x.to(memory_format=torch.channels_last) for x in sides)
    # weights with gaps between them, and of another order
    weight = options["pixel_weight"]
    strided = torch.full((weight.shape[2], 2, weight.shape[0], weight.shape[1]), torch.nan)
    strided[:, 1] = weight.permute(2, 0, 1)
    options["pixel_weight"] = strided[:, 1].permute(1, 2, 0)
    batch = Batch(student, teacher, batch.target.to(torch.uint8))
    got = evaluate(batch, 2.5, backend=backend, **options, **TERM_CASES[case])
    expected = truth(batch, 2.5, **options, **TERM_CASES[case])
    assert torch.isfinite(got.loss)
    assert torch.isfinite(got.student_grad).all()
    assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert_accurate(got.student_grad, expected.student_grad)


@every_backend
def test_the_teacher_is_reliable_where_nobody_else_is(backend: str) -> None:
    grid, teacher_grid, size = GRIDS["apart"]
    batch, options = pixels(make_batch(2, 5, grid, teacher_grid, size, dtype=F32), "unlabelled")
    for preset in ("softmax-kl", "paper"):
        maps = check(
            batch, backend=backend, hetero_weight=1.0, preset=preset, return_maps=True, **options
        ).maps
        without = batch.target == 254
        assert without.any()
        assert (maps["reliability"][without] == 1).all()
        assert (maps["discrepancy"][without] == 0).all() == (preset == "paper")


@every_cpu_backend
def test_counts_and_denominators(backend: str) -> None:
    batch, options = pixels(make_batch(dtype=F32), "both")
    terms = (CrossEntropy(), KD(), HeteroAKD(evaluation="none"), CWD(), DKD())
    target, weight = batch.target, options["pixel_weight"]
    out = loss_of(*batch.arguments, terms=terms, ce_weight=0.0, backend=backend, **options)
    counted = (target != 255) & (weight > 0)
    labelled = counted & (target != 254)
    assert int(out.valid) == int(labelled.sum())
    assert int(out.distilled) == int(counted.sum())
    of_labelled, of_all = (float(weight.double()[mask].sum()) for mask in (labelled, counted))
    for name in ("ce", "dkd"):
        assert float(out.denominators[name]) == pytest.approx(of_labelled, rel=1e-6)
    for name in ("kd", "hetero"):
        assert float(out.denominators[name]) == pytest.approx(of_all, rel=1e-6)
    assert float(out.denominators["cwd"]) == 2 * 5
    plain = loss_of(*batch._replace(target=target.clamp(max=4)).arguments, backend=backend)
    assert torch.equal(plain.valid, plain.distilled)


@complete
@every_backend
def test_a_pixel_of_weight_0_is_one_that_is_ignored(backend: str) -> None:
    batch = make_batch(dtype=F32)
    weight = torch.ones(batch.target.shape)
    weight[:, 3:9] = 0
    ignored = batch._replace(target=batch.target.masked_fill(weight == 0, 255))
    case = TERM_CASES["all+objects"]
    ours = evaluate(batch, 2.5, backend=backend, pixel_weight=weight, **case)
    theirs = evaluate(ignored, 2.5, backend=backend, **case)
    assert ours.terms == pytest.approx(theirs.terms, rel=1e-6)
    assert_accurate(ours.student_grad, theirs.student_grad)
    # whatever it holds
    broken = Batch(batch.student.clone(), batch.teacher.clone(), batch.target)
    on_grid = make_batch(grid=(13, 17), teacher_grid=(13, 17), dtype=F32)
    broken = Batch(on_grid.student, on_grid.teacher, batch.target)
    broken.student[:, :, 3:9], broken.teacher[:, :, 3:9] = torch.nan, torch.inf
    got = evaluate(broken, backend=backend, pixel_weight=weight, **case)
    assert torch.isfinite(got.loss)
    assert not got.student_grad[:, :, 3:9].any()


@complete
@every_backend
def test_weights_have_no_scale_and_ones_change_nothing(backend: str) -> None:
    batch = make_batch(dtype=F32)
    case = dict(TERM_CASES["all+objects"])
    # what is added to sums of weights is one thing that has a scale
    case["terms"] = tuple(
        replace(term, smooth=0.0) if hasattr(term, "smooth") else term for term in case["terms"]
    )
    plain = evaluate(batch, backend=backend, **case)
    for scale in (1.0, 0.125, 4.0):
        weight = torch.full(batch.target.shape, scale)
        got = evaluate(batch, backend=backend, pixel_weight=weight, **case)
        assert got.terms == pytest.approx(plain.terms, rel=2e-6)
        assert_accurate(got.student_grad, plain.student_grad)


@complete
@pytest.mark.parametrize("everything", [255, 254])
@every_backend
def test_without_any_label(backend: str, everything: int) -> None:
    batch = make_batch(dtype=F32)
    batch.target[:] = everything
    case = TERM_CASES["all+objects"]
    got = check(batch, backend=backend, unlabelled_index=254, **case)
    assert got.terms["ce"] == got.terms["teacher_ce"] == got.terms["dkd"] == 0
    distils = got.terms["kd"] > 0 and got.terms["hetero"] > 0 and got.terms["cwd"] > 0
    assert distils == (everything == 254)
    assert torch.isfinite(got.student_grad).all()
    weight = torch.zeros(batch.target.shape)
    got = evaluate(batch, backend=backend, unlabelled_index=254, pixel_weight=weight, **case)
    assert float(got.loss) == 0
    assert not got.student_grad.any()


@every_cpu_backend
def test_ce_alone_knows_of_no_unlabelled_pixels(backend: str) -> None:
    batch, options = pixels(make_batch(dtype=F32), "unlabelled")
    ignored = batch._replace(target=batch.target.masked_fill(batch.target == 254, 255))
    got = evaluate(batch, 2.5, backend=backend, label_smoothing=0.1, **options)
    expected = evaluate(ignored, 2.5, backend=backend, label_smoothing=0.1)
    assert torch.equal(got.student_grad, expected.student_grad)
    assert torch.equal(got.loss, expected.loss)


def test_gradcheck() -> None:
    batch, options = pixels(make_batch(2, 3, (2, 3), (3, 2), (4, 5)), "both")
    weight = options["pixel_weight"].double()

    def loss(student: torch.Tensor, teacher: torch.Tensor, *terms: Term) -> torch.Tensor:
        return functional.segmentation_loss(
            student,
            batch.target,
            teacher,
            terms=terms,
            unlabelled_index=254,
            pixel_weight=weight,
            backend="reference",
        ).loss

    terms = (CrossEntropy(), KD(0.5, 2.0), Feature(0.4), CWD(0.3), DKD(0.2, beta=2.0))
    student, teacher = batch.student.requires_grad_(), batch.teacher
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, *terms), student)
    student, teacher = batch.student.detach(), batch.teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(student, z, TeacherCrossEntropy()), teacher)


@every_cpu_backend
@pytest.mark.parametrize(
    ("value", "label"), [(-1.0, 1), (float("nan"), 1), (float("inf"), 1), (-0.5, 255)]
)
def test_wrong_weights(backend: str, value: float, label: int) -> None:
    batch = make_batch(dtype=F32)
    weight = torch.ones(batch.target.shape)
    weight[1, 2, 3], batch.target[1, 2, 3] = value, label
    with pytest.raises(ValueError, match=r"pixel_weight: got .* at \(b=1, y=2, x=3\)"):
        functional.cross_entropy(batch.student, batch.target, pixel_weight=weight, backend=backend)


@every_cpu_backend
def test_wrong_labels_beside_unlabelled_ones(backend: str) -> None:
    batch, options = pixels(make_batch(dtype=F32), "both")
    batch.target[1, 2, 3] = 77
    with pytest.raises(ValueError, match=r"label 77 at .*nor ignore_index=255 nor unlabelled_"):
        loss_of(*batch.arguments, backend=backend, **options)
    batch.target[1, 2, 3] = 254
    with pytest.raises(ValueError, match="label 254 at"):
        functional.cross_entropy(batch.student, batch.target, backend=backend)


def test_wrong_arguments() -> None:
    batch = make_batch(dtype=F32)
    ones = torch.ones(batch.target.shape)
    for options, message in (
        ({"unlabelled_index": 255}, "unlabelled_index: got 255, which is also ignore_index"),
        ({"unlabelled_index": 3}, "unlabelled_index: got 3, which is also one of the 5 classes"),
        ({"unlabelled_index": 2.5}, "unlabelled_index: got float, expected an integer"),
        ({"pixel_weight": ones[:1]}, "pixel_weight: got shape .*, expected that of target"),
        ({"pixel_weight": ones[:, None]}, r"squeeze\(1\)"),
        ({"pixel_weight": ones.long()}, "pixel_weight: got torch.int64"),
        ({"pixel_weight": ones.clone().requires_grad_()}, "pixel_weight: requires grad"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            functional.cross_entropy(batch.student, batch.target, **options)
    for build in (
        lambda: HeteroAKDLoss(5, unlabelled_index=4),
        lambda: SegmentationLoss(CrossEntropy(), ignore_index=9, unlabelled_index=9),
    ):
        with pytest.raises(ValueError, match="unlabelled_index"):
            build()
    with pytest.raises(ValueError, match="normalizer: got a scalar, but with unlabelled_index"):
        functional.distillation_loss(
            *batch.arguments, kd_weight=1.0, unlabelled_index=254, normalizer=7.0
        )


@every_cpu_backend
@pytest.mark.parametrize("kind", KINDS)
def test_normalizers_make_micro_batches_exact(backend: str, kind: str) -> None:
    """But for terms over classes, which are no means over pixels."""
    batch, options = pixels(make_batch(4, 5, dtype=torch.float64), kind)
    case = dict(TERM_CASES["all+objects"])
    case["terms"] = tuple(term for term in case["terms"] if not term.over_classes)
    whole = evaluate(batch, backend=backend, **options, **case)
    parts = []
    for k in range(4):
        weight = options.get("pixel_weight")
        own = options | ({} if weight is None else {"pixel_weight": weight[k : k + 1]})
        parts.append((Batch(*(x[k : k + 1] for x in batch)), own))
    found = [loss_of(*part.arguments, backend=backend, **own, **case) for part, own in parts]
    normalizer = {
        name: torch.stack([out.denominators[name] for out in found]).mean()
        for name in found[0].denominators
    }
    grads = []
    for part, own in parts:
        student = part.student.clone().requires_grad_()
        out = loss_of(
            student,
            part.target,
            part.teacher,
            backend=backend,
            normalizer=normalizer,
            **own,
            **case,
        )
        (out.loss / 4).backward()
        grads.append(student.grad)
    torch.testing.assert_close(torch.cat(grads), whole.student_grad, rtol=1e-9, atol=1e-13)


@every_cpu_backend
def test_terms_over_classes_are_of_their_call(backend: str) -> None:
    """Of micro-batches, given the mean of their denominators, the mean of their own terms."""
    batch = make_batch(4, 5, dtype=torch.float64)
    terms = (Dice(0.7), Tversky(alpha=0.3, beta=0.7, gamma=0.75))
    parts = [Batch(*(x[k : k + 1] for x in batch)) for k in range(4)]
    found = [
        functional.segmentation_loss(part.student, part.target, terms=terms, backend=backend)
        for part in parts
    ]
    normalizer = {"dice": torch.tensor(5.0), "tversky": torch.tensor(5.0)}
    for part, own in zip(parts, found, strict=True):
        assert own.denominators == normalizer
        again = functional.segmentation_loss(
            part.student, part.target, terms=terms, backend=backend, normalizer=normalizer
        )
        torch.testing.assert_close(again.loss, own.loss)


@every_cpu_backend
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [None, 2**32 + 3, 256])
def test_projections_and_diagnostics_with_labels_of_any_dtype(
    backend: str, ignore_index: int | None, dtype: torch.dtype
) -> None:
    """`ignore_index` is compared as an integer, whatever the labels' dtype would make of it."""
    features, weight = torch.randn(1, 6, 4, 4), torch.randn(5, 6)
    logits = torch.einsum("bdhw,cd->bchw", features, weight)
    target = (torch.arange(16) % 5).view(1, 4, 4)
    plain, projected = (
        functional.cross_entropy(
            z, target.to(dtype), ignore_index=ignore_index, backend=backend, diagnostics=True
        )
        for z in (logits, Projection(features, weight))
    )
    torch.testing.assert_close(projected.loss, plain.loss)
    expected = torch.nn.functional.cross_entropy(logits, target)
    for output in (plain, projected):
        torch.testing.assert_close(output.diagnostics["class_loss"].mean(), _mean(logits))
    torch.testing.assert_close(plain.loss, expected)


def _mean(logits: torch.Tensor) -> torch.Tensor:
    """Over the classes of `arange(16) % 5`, of the mean loss of each."""
    target = (torch.arange(16) % 5).view(1, 4, 4)
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return torch.stack([nll[target == c].mean() for c in range(5)]).mean()


@every_cpu_backend
def test_features_of_a_pixel_of_weight_0_may_be_anything(backend: str) -> None:
    features, weight = torch.randn(1, 6, 4, 4), torch.randn(5, 6).requires_grad_()
    features[0, :, 0, 0] = torch.nan
    pixel_weight = torch.ones(1, 4, 4)
    pixel_weight[0, 0, 0] = 0
    target = (torch.arange(16) % 5).view(1, 4, 4)
    side = Projection(features, weight)
    functional.cross_entropy(
        side, target, pixel_weight=pixel_weight, backend=backend
    ).loss.backward()
    assert torch.isfinite(weight.grad).all()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_is_nowhere_has_a_softmax_over_space(backend: str, dtype: torch.dtype) -> None:
    """Its logits may be below what exp does not underflow at; an ignored pixel has none of it."""
    batch = make_batch(1, 3, (4, 4), (4, 4), (4, 4), dtype=dtype)
    for low in (-89.0, -710.0, -1e4):
        student, teacher = batch.student.clone(), batch.teacher.clone()
        student[:, 1] = teacher[:, 1] = low
        batch.target[0, 0, 0] = 255
        options = {"ce_weight": 0.0, "terms": (CWD(temperature=1.0),), "backend": backend}
        check(Batch(student, teacher, batch.target), **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_counts_for_accumulation_are_those_of_the_loss(dtype: torch.dtype) -> None:
    """`ignore_index` and `unlabelled_index` that the labels' dtype would turn into others."""
    target = (torch.arange(32) % 5).view(2, 4, 4).to(dtype)
    target[0] = 254
    weight = torch.ones(2, 4, 4)
    weight[1, 0] = 0
    for ignored, unlabelled in ((-2, 254), (254, -2), (254, 2**32 + 1), (None, 254)):
        loss = HeteroAKDLoss(5, ignore_index=ignored, unlabelled_index=unlabelled)
        z = torch.randn(2, 5, 4, 4)
        out = loss(z, target, z, pixel_weight=weight)
        assert loss.count_pixels(target, weight).tolist() == [out.valid, out.distilled]


@every_cpu_backend
def test_on_the_logits_grid(backend: str) -> None:
    """Labels and weights are resampled alike."""
    batch, options = pixels(make_batch(2, 5, (6, 8), None, (12, 16), dtype=F32), "both")
    case = TERM_CASES["all"]
    got = evaluate(batch, backend=backend, resolution="logits", **options, **case)
    there = batch._replace(target=batch.target[:, ::2, ::2])
    options["pixel_weight"] = options["pixel_weight"][:, ::2, ::2]
    expected = evaluate(there, backend=backend, **options, **case)
    assert torch.equal(got.student_grad, expected.student_grad)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_modules(backend: str) -> None:
    batch, options = pixels(make_batch(dtype=F32), "both")
    weight = options.pop("pixel_weight")
    terms = (CrossEntropy(), KD(0.1), HeteroAKD())
    loss_fn = SegmentationLoss(*terms, backend=backend, **options)
    expected = functional.segmentation_loss(
        *batch.arguments, terms=terms, pixel_weight=weight, backend=backend, **options
    )
    assert torch.equal(loss_fn(*batch.arguments, pixel_weight=weight).loss, expected.loss)
    flat = HeteroAKDLoss(5, backend=backend, **options)
    assert torch.equal(flat(*batch.arguments, pixel_weight=weight).loss, expected.loss)
    assert "distilled" in loss_fn.plan(*batch.arguments)
    cwd = ChannelWiseLoss(backend=backend, **options)(*batch.arguments, pixel_weight=weight)
    alone = functional.segmentation_loss(
        *batch.arguments, terms=[CWD()], pixel_weight=weight, backend=backend, **options
    )
    assert torch.equal(cwd.loss, alone.loss)


def test_compiled() -> None:
    batch, options = pixels(make_batch(dtype=F32), "both")

    def loss(student: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.distillation_loss(
            student,
            batch.target,
            batch.teacher,
            kd_weight=0.5,
            hetero_weight=1.0,
            unlabelled_index=254,
            pixel_weight=weight,
        ).loss

    student = batch.student.requires_grad_()
    (expected,) = torch.autograd.grad(loss(student, options["pixel_weight"]), student)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(student, options["pixel_weight"]), student)
    assert torch.equal(got, expected)
