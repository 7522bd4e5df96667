"""Diagnostics of the training pass: accuracy, agreement, means, loss per class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    F32,
    TERM_CASES,
    Batch,
    assert_same_bits,
    complete,
    device_of,
    evaluate,
    every_backend,
    every_cpu_backend,
    loss_of,
    make_batch,
    moved,
)
from test_pixels import GRIDS, pixels

from heteroakd_fast import HeteroAKDLoss, SegmentationLoss, functional
from heteroakd_fast.terms import CWD, KD, CrossEntropy, Feature, TeacherCrossEntropy

#: Of the cross entropy alone, beside exponentials at another temperature, of terms that have none.
CASES: dict[str, dict[str, Any]] = {
    "ce": {},
    "kd": TERM_CASES["kd"],
    "hetero": {"hetero_weight": 1.0, "temperature": 2.0},
    "paper": TERM_CASES["hetero-paper"],
    "feature": TERM_CASES["feature"],
    "cwd": TERM_CASES["cwd"],
    "all": TERM_CASES["all+objects"],
}


def expected(batch: Batch, unlabelled: int | None, weight: Any) -> dict[str, torch.Tensor]:
    """From full-resolution logits, in float64."""
    size = batch.target.shape[1:]
    z_s, z_t = (
        F.interpolate(z.double(), size, mode="bilinear") for z in (batch.student, batch.teacher)
    )
    valid = batch.target != 255
    if weight is not None:
        valid &= weight != 0
    labelled = valid & (batch.target != unlabelled) if unlabelled is not None else valid
    label = torch.where(labelled, batch.target, 0)
    nll = F.cross_entropy(z_s, label, reduction="none")
    classes = torch.arange(z_s.shape[1])
    return {
        "pixel_accuracy": (z_s.argmax(1) == label)[labelled].double().mean(),
        "agreement": (z_s.argmax(1) == z_t.argmax(1))[valid].double().mean(),
        "class_loss": torch.stack([nll[labelled & (label == c)].mean() for c in classes]),
    }


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("case", CASES)
@every_backend
def test_against_full_resolution(backend: str, case: str, grids: str) -> None:
    grid, teacher_grid, size = GRIDS[grids]
    batch = make_batch(2, 5, grid, teacher_grid, size, dtype=F32)
    batch, options = pixels(batch, "both" if case != "ce" else "weighted")
    there = device_of(backend, batch)
    arguments = [moved(x, there) for x in batch.arguments]
    given = {name: moved(value, there) for name, value in options.items()}
    out = loss_of(*arguments, backend=backend, diagnostics=True, **given, **CASES[case])
    want = expected(batch, options.get("unlabelled_index"), options.get("pixel_weight"))
    found = {name: value.cpu().double() for name, value in out.diagnostics.items()}
    for name in ("pixel_accuracy", "class_loss"):
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-6)
    assert ("agreement" in found) == (case != "ce")
    if case != "ce":
        torch.testing.assert_close(found["agreement"], want["agreement"], rtol=1e-5, atol=0)
    assert ("reliability" in found) == (case in ("hetero", "paper", "all"))
    if "reliability" in found:
        mapped = loss_of(*arguments, backend=backend, return_maps=True, **given, **CASES[case]).maps
        for name, values in mapped.items():
            mean = values.double().sum().cpu() / int(out.distilled)
            torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=1e-7)
    assert out.maps is None


@complete
@every_backend
def test_the_loss_is_what_it_was(backend: str) -> None:
    batch = make_batch(dtype=F32)
    case = TERM_CASES["all+objects"]
    plain = evaluate(batch, 2.5, backend=backend, **case)
    looked = evaluate(batch, 2.5, backend=backend, diagnostics=True, **case)
    torch.testing.assert_close(looked.loss, plain.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(looked.student_grad, plain.student_grad, rtol=1e-4, atol=1e-7)
    if backend == "reference":
        assert_same_bits(looked, plain)


@every_cpu_backend
def test_confident_pixels_absent_classes_and_nothing(backend: str) -> None:
    batch = make_batch(2, 5, (13, 17), (13, 17), (13, 17), dtype=F32)
    batch.target[batch.target == 3] = 2
    confident = 1e4 * F.one_hot(batch.target.clamp(max=4), 5).permute(0, 3, 1, 2).float()
    out = loss_of(
        confident, batch.target, batch.teacher, backend=backend, kd_weight=1.0, diagnostics=True
    )
    found = out.diagnostics
    assert float(found["pixel_accuracy"]) == 1.0
    assert torch.isnan(found["class_loss"]).tolist() == [False, False, False, True, False]
    assert not found["class_loss"].nan_to_num(0.0).any()
    batch.target[:] = 255
    empty = loss_of(*batch.arguments, backend=backend, diagnostics=True, kd_weight=1.0).diagnostics
    assert all(torch.isnan(value).all() for value in empty.values())


@every_cpu_backend
def test_of_several_passes_and_of_projections(backend: str) -> None:
    batch = make_batch(dtype=F32)
    loss_fn = SegmentationLoss(
        CrossEntropy(), KD(1.0, 2.0), KD(1.0, 3.0), CWD(), Feature(), backend=backend
    )
    found = loss_fn(*batch.arguments, diagnostics=True).diagnostics
    want = expected(batch, None, None)
    for name, value in want.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    projecting = HeteroAKDLoss(5, 3, 4, backend=backend)
    features = {
        "student_features": torch.randn(2, 3, 4, 6),
        "teacher_features": torch.randn(2, 4, 8, 3),
    }
    found = projecting(*batch.arguments, diagnostics=True, **features).diagnostics
    torch.testing.assert_close(found["pixel_accuracy"].double(), want["pixel_accuracy"])
    assert found["reliability"].shape == ()


@every_cpu_backend
def test_beside_the_teachers_cross_entropy(backend: str) -> None:
    """Whose pass is the teacher's own: no pass compares the two."""
    batch = make_batch(1, 5, (13, 17), (4, 6), (13, 17), dtype=F32)
    student, teacher = (z.requires_grad_() for z in (batch.student, batch.teacher))
    terms = [CrossEntropy(), TeacherCrossEntropy()]
    out = functional.segmentation_loss(
        student, batch.target, teacher, terms=terms, diagnostics=True, backend=backend
    )
    out.loss.backward()
    assert out.diagnostics.keys() == {"pixel_accuracy", "class_loss"}
    with pytest.raises(ValueError, match="diagnostics: got True, but no term reads the student"):
        functional.segmentation_loss(
            student, batch.target, teacher, terms=terms[1:], diagnostics=True, backend=backend
        )


def test_compiled_and_wrong_argument() -> None:
    batch = make_batch(dtype=F32)
    loss_fn = SegmentationLoss(CrossEntropy(), KD(0.1))

    def step(student: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = loss_fn(student, batch.target, batch.teacher, diagnostics=True)
        return out.loss, out.diagnostics["pixel_accuracy"], out.diagnostics["class_loss"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(batch.student), step(batch.student), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(TypeError, match="diagnostics: got int"):
        loss_fn(*batch.arguments, diagnostics=1)
