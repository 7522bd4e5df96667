"""Unlabelled and weighted pixels in the trainers: what the plain loss gives, accumulated or not."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heteroakd_fast import HeteroAKDLoss
from heteroakd_fast.integrations.smp import DistillationLoss

UNLABELLED = 254
LR = 0.1
OPTIONS: dict[str, Any] = {"unlabelled_index": UNLABELLED, "feature_weight": 0.3}


def data(count: int = 8) -> tuple[Tensor, ...]:
    """The first images; labels, of which each has its own number of each kind; weights."""
    images, target = tiny.data()
    for number in range(8):
        target[number, :, : 2 * number % 9] = UNLABELLED
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(3))
    return images[:count], target[:count], torch.where(weight < 0.2, 0.0, weight)[:count]


def plain_loss(
    student: Any,
    teacher: Any,
    loss: HeteroAKDLoss,
    rows: slice,
    weighted: bool,
    **options: Any,
) -> Any:
    images, target, weight = (part[rows] for part in data())
    with torch.no_grad():
        features = {"teacher_features": teacher.body(images)}
        teacher_logits = teacher(images)["logits"]
    features["student_features"] = student.body(images)
    logits = student.classifier(torch.relu(features["student_features"]))
    if loss.student_projector is None:
        features = {}
    pixel_weight = weight if weighted else None
    return loss(logits, target, teacher_logits, pixel_weight=pixel_weight, **features, **options)


def mean_iou(student: nn.Module, rows: slice = slice(None)) -> float:
    """Of the labelled pixels, whatever their weights."""
    images, target, _ = (part[rows] for part in data())
    return tiny.mean_iou(student, images, target.masked_fill(target == UNLABELLED, 255))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize("preset", ["softmax-kl", "paper"])
def test_counts_make_the_mean_over_batches_that_over_all(
    preset: str, features: bool, weighted: bool
) -> None:
    (student, teacher), loss = tiny.models(), tiny.make_loss(features, preset=preset, **OPTIONS)
    loss.eval()  # the batch norm of its projectors looks at the whole batch
    if preset == "softmax-kl":
        loss.hetero_weight = 0.0  # has a denominator of its own
    batches = [slice(0, 2), slice(2, 4), slice(4, 8)]
    _, target, weight = data()
    counts = [loss.count_pixels(target[b], weight[b] if weighted else None) for b in batches]
    normalizer = loss.normalizer_of(torch.stack(counts).mean(0))
    whole = plain_loss(student, teacher, loss, slice(0, 8), weighted)
    parts = [
        plain_loss(student, teacher, loss, b, weighted, normalizer=normalizer) for b in batches
    ]
    torch.testing.assert_close(sum(part.loss for part in parts) / 3, whole.loss)
    naive = sum(plain_loss(student, teacher, loss, b, weighted).loss for b in batches) / 3
    assert abs(naive - whole.loss) > 1e-4, "the batches should differ, or the test proves nothing"
    if not weighted:
        assert torch.equal(counts[0], torch.stack([parts[0].valid, parts[0].distilled]).double())


def test_what_is_replaced() -> None:
    counts = torch.tensor([3.0, 5.0])
    labelled, distilled = counts
    loss = tiny.make_loss(**OPTIONS)
    names = {"ce": labelled, "kd": distilled, "feature": distilled}
    assert loss.normalizer_of(counts) == names
    assert loss.normalizer_of(counts, with_teacher=False) == {"ce": labelled}
    loss.class_weight = [1.0] * tiny.CLASSES
    assert loss.normalizer_of(counts) == {"kd": distilled, "feature": distilled}
    with_projectors = tiny.make_loss(True, preset="paper", **OPTIONS)
    assert with_projectors.normalizer_of(counts) == {
        **names,
        "teacher_ce": labelled,
        "hetero": distilled,
    }
    assert tiny.make_loss().normalizer_of(counts) == labelled


@pytest.mark.filterwarnings("ignore")
def test_lightning() -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="needs it: pip install lightning")
    from test_lightning import QUIET

    from heteroakd_fast.integrations.lightning import DistillationModule

    (student, teacher), loss = tiny.models(), tiny.make_loss(**OPTIONS)
    start = copy.deepcopy(student)
    images, target, weight = data(4)
    module = DistillationModule(student, teacher, loss, partial(torch.optim.SGD, lr=LR))
    batch = {"image": images, "mask": target, "pixel_weight": weight}
    loader = DataLoader([batch], batch_size=None)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, loader)
    plain = copy.deepcopy(start)
    step = partial(plain_loss, plain, teacher, loss, slice(0, 4), True)
    tiny.plain_steps(plain.parameters(), [lambda: step().loss], LR)
    tiny.same_parameters(module.student, plain, start)
    (metrics,) = trainer.validate(module, loader, verbose=False)
    with torch.no_grad():
        assert metrics["val/kd"] == pytest.approx(float(step().kd), rel=1e-5)
    assert metrics["val/miou"] == pytest.approx(mean_iou(student, slice(0, 4)))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
def test_transformers(tmp_path: Path, features: bool, weighted: bool) -> None:
    """A step over two accumulated batches is one over all images."""
    pytest.importorskip("transformers", reason="needs it: pip install transformers accelerate")
    from test_transformers import InOrder, arguments

    options = {**OPTIONS, "hetero_weight": 0.0}
    (student, teacher), loss = tiny.models(), tiny.make_loss(features, **options)
    start = copy.deepcopy((student, loss))
    names = ("pixel_values", "labels", *(["pixel_weight"] if weighted else []))
    dataset = [dict(zip(names, item, strict=False)) for item in zip(*data(4), strict=True)]
    trainer = InOrder(
        student,
        arguments(
            tmp_path, gradient_accumulation_steps=2, max_steps=1, remove_unused_columns=False
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        teacher=teacher,
        loss=loss,
        features=tiny.FEATURES if features else None,
    )
    trainer.train()
    plain, plain_of = copy.deepcopy(start)
    step = partial(plain_loss, plain, teacher, plain_of, slice(0, 4), weighted)
    tiny.plain_steps([*plain.parameters(), *plain_of.parameters()], [lambda: step().loss], LR)
    tiny.same_parameters(trainer.model, plain, start[0])
    if features:
        tiny.same_parameters(loss, plain_of, start[1])
    metrics = trainer.evaluate()
    with torch.no_grad():
        assert metrics["eval_ce"] == pytest.approx(float(step().ce), rel=1e-4)
        assert metrics["eval_kd"] == pytest.approx(float(step().kd), rel=1e-4)
    assert metrics["eval_miou"] == pytest.approx(mean_iou(student, slice(0, 4)))
    for item in dataset:
        del item["labels"]
    found = torch.from_numpy(trainer.predict(dataset).predictions)  # weights are not the model's
    with torch.no_grad():
        torch.testing.assert_close(found, student(data(4)[0])["logits"])


def test_smp() -> None:
    (student, teacher), (images, target, weight) = tiny.models(), data(2)
    options = {"kd_weight": 0.5, "unlabelled_index": UNLABELLED}
    ours = DistillationLoss("multiclass", tiny.CLASSES, ignore_index=255, **options)
    assert ours.unlabelled_index == UNLABELLED
    logits, taught = student(images)["logits"], teacher(images)["logits"].detach()
    plain = HeteroAKDLoss(tiny.CLASSES, align_corners=True, **options)
    expected = plain(logits, target, taught, pixel_weight=weight)
    assert ours(logits, target[:, None], taught, pixel_weight=weight) == expected.loss
    assert ours.terms.distilled == expected.distilled > expected.valid
    ours.unlabelled_index = None
    with pytest.raises(ValueError, match="label 254"):
        ours(logits, target, taught)


@pytest.mark.parametrize("given", ["list", "tensor", None])
def test_segmentation_maps_of_transformers(given: str | None) -> None:
    transformers = pytest.importorskip("transformers", reason="needs it: pip install transformers")
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    from test_transformers import segformer

    from heteroakd_fast.integrations.transformers import post_process_semantic_segmentation

    torch.manual_seed(4)
    model = segformer(8).eval()
    with torch.no_grad():
        outputs = model(torch.randn(3, 3, 64, 64))
        outputs.logits = 5 * torch.randn_like(outputs.logits)
    # larger and smaller than the logits, 16 x 16
    sizes: Any = None if given is None else [(64, 64), (37, 90), (9, 7)]
    processor = transformers.SegformerImageProcessor()
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    sizes = torch.tensor(sizes) if given == "tensor" else sizes
    found = post_process_semantic_segmentation(outputs, target_sizes=sizes)
    assert len(found) == 3
    for one, two, logits in zip(found, expected, outputs.logits, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        wide = nn.functional.interpolate(logits[None], two.shape, mode="bilinear")[0]
        top = wide.topk(2, dim=0).values
        clear = top[0] - top[1] > 1e-3
        assert clear.float().mean() > 0.99
        assert torch.equal(one[clear], two[clear])
    with pytest.raises(ValueError, match="target_sizes: got 2, the logits have batch 3"):
        post_process_semantic_segmentation(outputs, [(4, 4)] * 2)
