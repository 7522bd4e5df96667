"""With real mmsegmentation models and mmengine's Runner; `test_zoo.py` runs it where they are."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import mmengine
import mmseg.models
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import heteroakd_fast.integrations.mmseg as ours
from heteroakd_fast import HeteroAKDLoss

assert mmseg.models, "imported, so that all of mmseg is registered"
init_default_scope("mmseg")
LR = 0.1
OURS = {"type": "HeteroAKDLoss", "kd_weight": 0.7, "temperature": 2.0, "avg_non_ignore": True}
CE = {"type": "CrossEntropyLoss", "avg_non_ignore": True}


def fcn(loss: Any = OURS, **options: Any) -> dict[str, Any]:
    """A student: ResNet-18 with an FCN head and an auxiliary one."""
    head = {"type": "FCNHead", "num_convs": 1, "num_classes": tiny.CLASSES, "dropout_ratio": 0.0}
    head["norm_cfg"] = {"type": "BN"}
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "size": (32, 32)},
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8},
        "decode_head": {
            **head, "in_channels": 64, "channels": 16, "loss_decode": loss, **options,
        },
        "auxiliary_head": {
            **head, "in_channels": 32, "in_index": 2, "channels": 8,
            "loss_decode": {**CE, "loss_weight": 0.4},
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }  # fmt: skip


def segformer(**options: Any) -> dict[str, Any]:
    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "MixVisionTransformer",
            "embed_dims": 8,
            "num_layers": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 4],
        },
        "decode_head": {
            "type": "SegformerHead",
            "in_channels": [8, 8, 16, 32],
            "in_index": [0, 1, 2, 3],
            "channels": 16,
            "num_classes": tiny.CLASSES,
            **options,
        },
    }


def distilled(teacher: Any = None, **options: Any) -> dict[str, Any]:
    student = {**fcn(options.pop("loss", OURS)), **options}
    return {**student, "type": "DistilledEncoderDecoder", "teacher": teacher or segformer()}


def build(config: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    return MODELS.build(ConfigDict(config))


def samples(count: int = 2) -> tuple[Tensor, list[SegDataSample], Tensor]:
    images, target = tiny.data(count, size=32)
    meta = {"img_shape": (32, 32), "ori_shape": (32, 32), "pad_shape": (32, 32)}
    return (
        images,
        [SegDataSample(gt_sem_seg=PixelData(data=one[None]), metainfo=meta) for one in target],
        target,
    )


def plain_loss(model: Any, images: Tensor, target: Tensor, **options: Any) -> Any:
    """The student's low-resolution logits and the teacher's, by the plain call."""
    features = model.extract_feat(images)
    teacher = model.teacher.module
    with torch.no_grad():
        taught = teacher.decode_head(teacher.extract_feat(images))
    loss = HeteroAKDLoss(tiny.CLASSES, kd_weight=0.7, temperature=2.0, **options)
    return features, loss(model.decode_head(features), target, teacher_logits=taught)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def test_the_loss_is_the_plain_loss() -> None:
    model = build(distilled()).eval()
    images, data, target = samples()
    model.decode_head.loss_by_feat = None  # would upsample: must not be needed
    losses = model.loss(images, data)
    features, plain = plain_loss(model, images, target)
    torch.testing.assert_close(losses["decode.loss_heteroakd"], plain.loss)
    for term in ("ce", "kd", "hetero"):
        torch.testing.assert_close(losses[f"decode.{term}"], getattr(plain, term))
    aux = model._auxiliary_head_forward_train(features, data)
    torch.testing.assert_close(losses["aux.loss_ce"], aux["aux.loss_ce"])
    total, _ = model.parse_losses(losses)
    expected = plain.loss + aux["aux.loss_ce"]
    torch.testing.assert_close(total, expected)
    got, wanted = gradients(model, total), gradients(model, expected)
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], msg=name)
    assert sum(grad is not None and bool(grad.any()) for grad in got.values()) > 20


def test_runner_is_the_plain_loop(tmp_path: Path) -> None:
    """Two steps of mmengine's Runner, checkpoint and all."""

    @DATASETS.register_module(force=True)
    class TinyData(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            images, data, _ = samples(4)
            return {"inputs": images[index], "data_samples": data[index]}

    config = {
        "default_scope": "mmseg",
        "model": distilled(),
        "train_dataloader": {
            "dataset": {"type": "TinyData"},
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": LR}},
        "train_cfg": {"by_epoch": False, "max_iters": 2},
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "interval": 2, "by_epoch": False}
        },
        "work_dir": str(tmp_path),
        "log_level": "ERROR",
    }
    runner = Runner.from_cfg(Config(config))
    model = runner.model
    model.init_weights()
    model._is_init = True
    start = copy.deepcopy(model)
    plain = copy.deepcopy(model).train()
    taught = {k: v.clone() for k, v in model.teacher.module.state_dict().items()}
    runner.train()

    images, data, target = samples(4)

    def step(rows: slice) -> Tensor:
        features, output = plain_loss(plain, images[rows], target[rows])
        return (
            output.loss + plain._auxiliary_head_forward_train(features, data[rows])["aux.loss_ce"]
        )

    parameters = [p for p in plain.parameters() if p.requires_grad]
    tiny.plain_steps(parameters, [lambda: step(slice(0, 2)), lambda: step(slice(2, 4))], LR)
    changed = 0
    for (name, got), wanted, before in zip(
        model.named_parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=name)
        changed += not torch.equal(got, before)
    assert changed > 20
    for name, value in model.teacher.module.state_dict().items():
        assert torch.equal(value, taught[name]), name

    # what mmengine saved is a student's checkpoint ...
    file = tmp_path / "iter_2.pth"
    saved = torch.load(file, weights_only=False)["state_dict"]
    student = build(fcn(CE))
    assert set(saved) == set(student.state_dict())
    # ... and it can teach, when trusted: it holds more than tensors
    again = distilled(teacher=fcn(CE), teacher_checkpoint=str(file))
    with pytest.raises(ValueError, match=r"teacher_checkpoint: .* set trust_checkpoint=True"):
        build(again)
    teacher = build({**again, "trust_checkpoint": True}).teacher.module
    assert torch.equal(teacher.decode_head.conv_seg.weight, model.decode_head.conv_seg.weight)


def test_predicts_as_the_student_alone() -> None:
    model, student = build(distilled()).eval(), build(fcn(CE)).eval()
    assert model.state_dict().keys() == student.state_dict().keys()
    student.load_state_dict(model.state_dict())
    images, data, _ = samples()
    with torch.no_grad():
        one, two = model.predict(images, data), student.predict(images, copy.deepcopy(data))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)


def test_the_teacher_is_nobodys_child() -> None:
    model = build(distilled())
    model.train()
    assert not model.teacher.module.training
    assert not any(p.requires_grad for p in model.teacher.module.parameters())
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in model.teacher.module.parameters()}
    weight = model.teacher.module.decode_head.conv_seg.weight.clone()
    model.init_weights()  # the Runner does it, after the teacher was loaded
    assert torch.equal(model.teacher.module.decode_head.conv_seg.weight, weight)


def test_a_list_of_losses() -> None:
    dice = {"type": "DiceLoss", "loss_weight": 3.0}
    half = {**OURS, "loss_weight": 0.5}
    model = build(distilled(loss=[OURS, dice, half])).eval()
    images, data, target = samples()
    losses = model.loss(images, data)
    _, plain = plain_loss(model, images, target)
    torch.testing.assert_close(losses["decode.loss_heteroakd"], 1.5 * plain.loss)
    alone = build(fcn(dice)).eval()
    alone.load_state_dict(model.state_dict())
    expected = alone.loss(images, data)
    for name in ("decode.loss_dice", "decode.acc_seg", "aux.loss_ce"):
        torch.testing.assert_close(losses[name], expected[name])


def test_accuracy_is_that_of_mmseg() -> None:
    model, alone = build(distilled()).eval(), build(fcn(CE)).eval()
    alone.load_state_dict(model.state_dict())
    images, data, _ = samples()
    got, expected = model.loss(images, data), alone.loss(images, data)
    torch.testing.assert_close(got["decode.acc_seg"], expected["decode.acc_seg"][0])
    assert "decode.acc_seg" not in build(distilled(log_accuracy=False)).loss(images, data)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_without_a_teacher_it_is_the_cross_entropy(avg_non_ignore: bool) -> None:
    """In an ordinary head, called as mmseg calls its losses."""
    theirs = {**CE, "avg_non_ignore": avg_non_ignore, "loss_weight": 0.7}
    only_ce = {
        "type": "HeteroAKDLoss",
        "kd_weight": 0.0,
        "hetero_weight": 0.0,
        "use_sigmoid": False,
    }
    mine = {**only_ce, "avg_non_ignore": avg_non_ignore, "loss_weight": 0.7}
    results = []
    images, data, _ = samples()
    for loss in (theirs, mine):
        model = build(fcn(loss)).eval()
        value = model.loss(images, data)[
            "decode.loss_ce" if loss is theirs else "decode.loss_heteroakd"
        ]
        results.append((value, gradients(model, value)["decode_head.conv_seg.weight"]))
    torch.testing.assert_close(results[1], results[0])
    with pytest.raises(ValueError, match="teacher_logits: got None, but kd_weight is not 0"):
        build(fcn(OURS)).loss(images, data)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("channel", [False, True])
def test_weights_of_pixels_are_those_of_the_cross_entropy(
    avg_non_ignore: bool, channel: bool
) -> None:
    theirs = MODELS.build({**CE, "avg_non_ignore": avg_non_ignore})
    mine = ours.HeteroAKDLoss(kd_weight=0.0, hetero_weight=0.0, avg_non_ignore=avg_non_ignore)
    logits = torch.randn(2, tiny.CLASSES, 32, 32, requires_grad=True)
    target, weight = samples()[2], torch.rand(2, 32, 32)
    weight[0, :, :7] = 0.0
    expected = theirs(logits, target, weight=weight, ignore_index=255)
    got = mine(logits, target, weight=weight[:, None] if channel else weight, ignore_index=255)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits)[0] for value in (got, expected))
    )
    got = mine(logits, target, weight=weight, avg_factor=77.0, ignore_index=255)
    expected = theirs(logits, target, weight=weight, avg_factor=77.0, ignore_index=255)
    torch.testing.assert_close(got, expected)


def with_sampler(**options: Any) -> dict[str, Any]:
    sampler = {"type": "OHEMPixelSampler", "thresh": 0.21, "min_kept": 100, **options}
    return {"decode_head": {**distilled()["decode_head"], "sampler": sampler}}


def test_a_sampler_of_pixels() -> None:
    """As mmseg does it: sampled on upsampled logits, and its weights multiply."""
    model = build(distilled(**with_sampler())).eval()
    images, data, target = samples()
    got = model.loss(images, data)
    features, _ = plain_loss(model, images, target)
    logits = model.decode_head(features)
    full = F.interpolate(logits, (32, 32), mode="bilinear")
    weight = model.decode_head.sampler.sample(full, target[:, None])
    assert 0 < weight.sum() < (target != 255).sum()
    with torch.no_grad():
        taught = model.teacher.module.decode_head(model.teacher.module.extract_feat(images))
    loss = HeteroAKDLoss(tiny.CLASSES, kd_weight=0.7, temperature=2.0)
    count = (target != 255).sum()
    plain = loss(logits, target, taught, pixel_weight=weight, normalizer=count)
    torch.testing.assert_close(got["decode.loss_heteroakd"], plain.loss)
    with pytest.raises(
        ValueError, match="decode_head.sampler: got OHEMPixelSampler without thresh"
    ):
        build(distilled(**with_sampler(thresh=None)))


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_unlabelled_pixels(avg_non_ignore: bool, sampled: bool) -> None:
    """To the auxiliary head, other losses and the accuracy they are ignored ones."""
    # mmseg's DiceLoss takes no weights of pixels
    other_loss = CE if sampled else {"type": "DiceLoss", "loss_weight": 3.0}
    mine = {**OURS, "avg_non_ignore": avg_non_ignore, "unlabelled_index": 254}
    options = with_sampler() if sampled else {"decode_head": distilled()["decode_head"]}
    options["decode_head"]["loss_decode"] = [mine, other_loss]
    model = build({**distilled(), **options}).eval()
    images, data, target = samples()
    ignored = copy.deepcopy(data)
    for one, other in zip(data, ignored, strict=True):
        one.gt_sem_seg.data[:, :, :9] = 254
        other.gt_sem_seg.data[:, :, :9] = 255
    target[:, :, :9] = 254  # as `data`
    got = model.loss(images, data)
    assert (data[0].gt_sem_seg.data == 254).any(), "the caller's labels stay as they are"

    logits = model.decode_head(model.extract_feat(images))
    teacher = model.teacher.module
    with torch.no_grad():
        taught = teacher.decode_head(teacher.extract_feat(images))
    loss = HeteroAKDLoss(tiny.CLASSES, kd_weight=0.7, temperature=2.0, unlabelled_index=254)
    normalizer: Any = None
    if sampled or not avg_non_ignore:
        counts = [target.numel()] * 2
        if avg_non_ignore:
            counts = [int((target < 254).sum()), int((target != 255).sum())]
        normalizer = dict(zip(("ce", "kd"), counts, strict=True))
    weight = None
    if sampled:
        full = F.interpolate(logits, (32, 32), mode="bilinear")
        known = target.masked_fill(target == 254, 255)
        weight = model.decode_head.sampler.sample(full, known[:, None])
        weight[target == 254] = 1.0
    plain = loss(logits, target, taught, pixel_weight=weight, normalizer=normalizer)
    torch.testing.assert_close(got["decode.loss_heteroakd"], plain.loss)
    assert plain.distilled > plain.valid
    sampler = options["decode_head"].get("sampler")
    alone = build(fcn(other_loss, sampler=sampler)).eval()
    alone.load_state_dict(model.state_dict())
    expected = alone.loss(images, ignored)
    own = "decode.loss_ce" if sampled else "decode.loss_dice"
    for name in (own, "decode.acc_seg", "aux.loss_ce"):
        torch.testing.assert_close(got[name], expected[name])
    # the accuracy without other losses
    options["decode_head"]["loss_decode"] = mine
    one = build({**distilled(), **options}).eval()
    one.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        one.loss(images, data)["decode.acc_seg"], expected["decode.acc_seg"][0]
    )


def test_features_and_projectors() -> None:
    loss = {**OURS, "student_channels": 32, "teacher_channels": 16}
    config = distilled(loss=loss, feature_index=(2, 2))
    model = build(config).eval()
    images, data, target = samples()
    losses = model.loss(images, data)
    features = model.extract_feat(images)
    teacher = model.teacher.module
    with torch.no_grad():
        taught = teacher.extract_feat(images)
    plain = HeteroAKDLoss(tiny.CLASSES, 32, 16, kd_weight=0.7, temperature=2.0)
    plain.load_state_dict(model.distillation[0].loss.state_dict())
    expected = plain(
        model.decode_head(features),
        target,
        teacher_logits=teacher.decode_head(taught).detach(),
        student_features=features[2],
        teacher_features=taught[2],
    )
    torch.testing.assert_close(losses["decode.loss_heteroakd"], expected.loss)
    assert "decode.projector" in losses
    names = [name for name, _ in model.named_parameters() if "projector" in name]
    assert len(names) == 4, "the optimizer gets them"


def test_features_are_what_the_backbone_gave() -> None:
    """Also where the head begins with an operation in place."""
    loss = {**OURS, "student_channels": 32, "teacher_channels": 16}
    model = build(distilled(loss=loss, feature_index=(2, 2))).eval()
    images, data, _ = samples()
    before = model.loss(images, data)["decode.projector"]
    for segmentor in (model, model.teacher.module):
        head, forward = segmentor.decode_head, segmentor.decode_head.forward
        head.forward = lambda features, forward=forward: forward([x.mul_(2.0) for x in features])
    assert model.loss(images, data)["decode.projector"] == before


def test_arguments_are_attributes() -> None:
    images, data, _ = samples()
    model, other = build(distilled()).eval(), build(distilled(loss={**OURS, "kd_weight": 0.2}))
    other.eval().load_state_dict(model.state_dict())
    other.teacher.module.load_state_dict(model.teacher.module.state_dict())
    loss = model.distillation[0]
    loss.kd_weight = 0.2
    name = "decode.loss_heteroakd"
    assert model.loss(images, data)[name] == other.loss(images, data)[name]
    assert loss.kd_weight == 0.2
    loss.bind(7, 255, True)  # for another head
    assert loss.loss.kd_weight == 0.2
    unbound = ours.HeteroAKDLoss()
    unbound.kd_weight = 0.2
    assert unbound.bind(5, 255, False).kd_weight == 0.2
    for wrong, value in (("kd_weight", "x"), ("kd_wieght", 1.0), ("ignore_index", 3)):
        for one in (loss, ours.HeteroAKDLoss()):
            with pytest.raises((AttributeError, TypeError), match=f"{wrong}: "):
                setattr(one, wrong, value)
    with pytest.raises(ValueError, match="ignore_index: got 4, which is also one of the 5 classes"):
        build(distilled(decode_head={**distilled()["decode_head"], "ignore_index": 4}))


@pytest.mark.parametrize("teachers", [False, True])
def test_align_corners_are_the_heads(teachers: bool) -> None:
    config = distilled(teacher=segformer(align_corners=teachers))
    config["decode_head"] = {**config["decode_head"], "align_corners": True}
    model = build(config).eval()
    images, data, target = samples()
    got = model.loss(images, data)["decode.loss_heteroakd"]
    # as mmseg does it: each upsamples its own logits
    teacher = model.teacher.module
    with torch.no_grad():
        taught = teacher.decode_head(teacher.extract_feat(images))
        taught = F.interpolate(taught, (32, 32), mode="bilinear", align_corners=teachers)
    logits = F.interpolate(
        model.decode_head(model.extract_feat(images)), (32, 32), mode="bilinear", align_corners=True
    )
    plain = HeteroAKDLoss(tiny.CLASSES, kd_weight=0.7, temperature=2.0)
    expected = plain(logits, target, teacher_logits=taught).loss
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": CE}, "decode_head.loss_decode: has no .*; found CrossEntropyLoss"),
        ({"decode_head": [fcn()["decode_head"]]}, "decode_head: got a list, expected one"),
        (
            {
                "teacher": {
                    **segformer(),
                    "type": "CascadeEncoderDecoder",
                    "num_stages": 1,
                    "decode_head": [segformer()["decode_head"]],
                }
            },
            "teacher: got CascadeEncoderDecoder, expected an EncoderDecoder with one decode head",
        ),
        ({"teacher": segformer(num_classes=4)}, "teacher: has 4 classes, the student 5"),
        (
            {"teacher": {**segformer(), "data_preprocessor": {"mean": [1.0]}}},
            r"teacher.data_preprocessor: has mean=\[1.0\], the student's None",
        ),
        ({"loss": {**OURS, "align_corners": True}}, "align_corners: is the decode head's"),
        ({"loss": {**OURS, "use_sigmoid": True}}, "use_sigmoid: got True, expected False"),
        ({"loss": {**OURS, "tau": 0.0}}, "tau: got 0.0, expected a number > 0"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(distilled(**change))


def test_refuses_checkpoints_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"state_dict": build(fcn(CE)).state_dict()}, file)
    with pytest.raises(ValueError, match=r"teacher_checkpoint: .* does not fit the teacher: Error"):
        build(distilled(teacher_checkpoint=str(file)))
    state = build(segformer()).state_dict()
    torch.save({"state_dict": state | {"auxiliary_head.conv.weight": torch.zeros(1)}}, file)
    assert build(distilled(teacher_checkpoint=str(file)))  # heads that only training needs
    state.popitem()
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"does not fit the teacher: missing \['decode_head"):
        build(distilled(teacher_checkpoint=str(file)))
    loss = ours.HeteroAKDLoss(kd_weight=0.0, hetero_weight=0.0)
    logits, target = torch.randn(1, 5, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"pixel_weight: .*\(1, 4, 5\)"):
        loss(logits, target, weight=torch.ones(1, 4, 5))
    with pytest.raises(ValueError, match="reduction_override: got 'sum', expected 'mean'"):
        loss(logits, target, reduction_override="sum")


def test_with_mmengine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is registered with mmengine; the segmentor says what it lacks."""
    name = "heteroakd_fast.integrations.mmseg"
    monkeypatch.setitem(sys.modules, "mmseg.models.segmentors", None)
    monkeypatch.delitem(sys.modules, name)
    alone = importlib.import_module(name)
    assert alone is not ours
    assert mmengine.registry.MODELS.get("HeteroAKDLoss") is alone.HeteroAKDLoss
    with pytest.raises(ImportError, match="DistilledEncoderDecoder needs mmseg.*: pip install mms"):
        alone.DistilledEncoderDecoder(teacher={})


def test_example() -> None:
    tiny.run_example("mmseg_config")
