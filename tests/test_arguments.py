"""Arguments of the losses: as attributes, from NumPy, in subclasses of tensors, in copies; and what
is said about those that do not fit."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import BACKENDS, F32, every_cpu_backend, make_batch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from heteroakd_fast import (
    ChannelWiseLoss,
    HeteroAKDLoss,
    Projection,
    SegmentationLoss,
    functional,
)
from heteroakd_fast._evaluate import LossOptions
from heteroakd_fast.channelwise import channel_wise_distillation
from heteroakd_fast.integrations.smp import DistillationLoss
from heteroakd_fast.losses import HeteroAKDOptions
from heteroakd_fast.projector import Projector
from heteroakd_fast.terms import KD, CrossEntropy

S, T, Y = make_batch(grid=(2, 3), teacher_grid=(3, 2), size=(5, 6), dtype=F32)
FEATURES = {
    "student_features": torch.randn(2, 7, 2, 3),
    "teacher_features": torch.randn(2, 9, 2, 3),
}

# --- attributes ----------------------------------------------------------------------------------

#: Each argument that may be set, with a value that counts and what has to be set beside it.
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ce_weight": (0.5, {}),
    "kd_weight": (np.float32(0.75), {}),
    "hetero_weight": (0.0, {}),
    "feature_weight": (0.3, {}),
    "projector_weight": (0.0, {}),
    "preset": ("paper", {}),
    "temperature": (2.5, {}),
    "tau": (0.5, {}),
    "mix": ("teacher", {}),
    "evaluation": ("none", {}),
    "weight_axis": ("space", {"preset": "paper"}),
    "kd_divergence": ("reverse", {}),
    "kd_beta": (0.25, {"kd_divergence": "js"}),
    "kd_alpha": (0.25, {"kd_divergence": "skew"}),
    "kd_standardize": (True, {}),
    "ignore_index": (np.int64(0), {"allow_ignored_class": True}),
    "unlabelled_index": (254, {}),
    "allow_ignored_class": (True, {}),
    "align_corners": (True, {}),
    "label_smoothing": (0.25, {}),
    "resolution": ("logits", {}),
    "backend": ("reference", {"backend": "cpu"}),
    "class_weight": ([1.0, 2.0, 3.0, 4.0, 5.0], {}),
}
#: Those that say who computes, or only what else may be set.
WITHOUT_EFFECT = {"backend", "allow_ignored_class"}


def call(loss: HeteroAKDLoss) -> list[Tensor]:
    """The loss and the gradients that its parameters get."""
    target = Y.where(Y != 255, 1) if loss.ignore_index == 0 else Y
    if loss.unlabelled_index is not None:
        target = target.where(target != 2, loss.unlabelled_index)
    output = loss(S, target, teacher_logits=T, **FEATURES)
    parameters = [loss.student_projector.conv.weight, loss.teacher_projector.conv.weight]
    return [output.loss.detach(), *torch.autograd.grad(output.loss, parameters, allow_unused=True)]


@pytest.mark.parametrize("name", HeteroAKDLoss._adjustable)
def test_what_is_set_later_counts_as_in_the_constructor(name: str) -> None:
    value, beside = SETTINGS[name]
    beside = {"projector": "linear", **beside}
    loss = HeteroAKDLoss(5, 7, 9, **beside)
    expected = HeteroAKDLoss(5, 7, 9, **{**beside, name: value})
    expected.load_state_dict(loss.state_dict(), strict=False)
    before = call(loss)
    setattr(loss, name, value)
    for got, wanted in zip(call(loss), call(expected), strict=True):
        assert (got is None and wanted is None) or torch.equal(got, wanted)
    assert name in WITHOUT_EFFECT or call(loss)[0] != before[0]
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == repr(loss)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 1.5), ("ignore_index", 7), ("resolution", "label")]
)
def test_channel_wise_attributes_count(name: str, value: Any) -> None:
    target = Y.where(Y != 255, 7)
    loss, expected = ChannelWiseLoss(ignore_index=-1), ChannelWiseLoss(**{name: value})
    setattr(loss, name, value)
    if name != "ignore_index":
        target, expected.ignore_index = Y, -1
        target = Y.clamp(max=4)
    assert loss(S, target, teacher_logits=T).loss == expected(S, target, teacher_logits=T).loss


def test_smps_attributes_count() -> None:
    loss = DistillationLoss("multiclass", 5, kd_weight=0.1)
    expected = DistillationLoss("multiclass", 5, True, 255, 0.1, kd_weight=0.7)
    loss.kd_weight, loss.ignore_index, loss.smooth_factor = 0.7, 255, 0.1
    assert loss(S, Y, T) == expected(S, Y, T)
    assert (loss.kd_weight, loss.smooth_factor) == (0.7, 0.1)
    with pytest.raises(AttributeError, match="mode: is fixed"):
        loss.mode = "binary"
    with pytest.raises(AttributeError, match="kd_weigth: DistillationLoss has no such"):
        loss.kd_weigth = 1.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kd_weight", "1", "kd_weight: got '1', expected a number"),
        ("temperature", 0.0, "temperature: got 0.0, expected a number > 0"),
        ("preset", "papers", "preset: got 'papers'"),
        ("mix", "probs", "mix: got 'probs', the preset 'paper' mixes logits"),
        ("ignore_index", 3, "ignore_index: got 3, which is also one of the 5 classes"),
        ("align_corners", 1, "align_corners: got int, expected True or False"),
        ("class_weight", [1.0], r"class_weight: got shape \(1,\), expected \(5,\)"),
        ("backend", "gpu", "backend: got 'gpu'"),
        ("num_classes", 7, "num_classes: is fixed when the loss is built"),
        ("projector", "linear", "projector: is fixed"),
        ("student_channels", 3, "student_channels: is fixed"),
        ("kd_wieght", 1.0, "kd_wieght: .* no such attribute; did you mean kd_weight"),
        ("kl_weight", 1.0, "kl_weight: .* did you mean kd_weight"),
        ("T", 2.0, "T: .* it is called temperature here"),
        ("options", {}, "options"),
    ],
)
def test_refuses_attributes_that_would_not_count(name: str, value: Any, message: str) -> None:
    loss = HeteroAKDLoss(5, preset="paper")
    before = repr(loss)
    with pytest.raises((AttributeError, TypeError, ValueError), match=message):
        setattr(loss, name, value)
    assert repr(loss) == before
    with pytest.raises(TypeError):
        loss.options["temperature"] = 3.0  # type: ignore[index]


def test_other_attributes_are_the_callers() -> None:
    class Mine(HeteroAKDLoss):
        dice_weight = 0.0

    loss = Mine(5)
    loss.dice_weight, loss.name, loss._handle = 2.0, "mine", object()
    assert loss.dice_weight == 2.0
    assert loss.student_channels is None
    assert HeteroAKDLoss(5, 7, 9).teacher_channels == 9


def test_annealed_attributes_count_in_a_compiled_module() -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    loss = HeteroAKDLoss(5, hetero_weight=0.0)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for weight, temperature in ((0.5, 4.0), (0.25, 2.0)):
        loss.kd_weight, loss.temperature = weight, temperature
        expected = functional.distillation_loss(
            S, Y, T, kd_weight=weight, temperature=temperature
        ).loss
        torch.testing.assert_close(compiled(S, Y, teacher_logits=T).loss, expected)


@pytest.mark.parametrize(
    ("name", "value"), [("kd_weight", float("nan")), ("kd_weight", True), ("kd_beta", 3.0)]
)
def test_numbers_are_checked_in_compiled_code(name: str, value: Any) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    options = {"kd_weight": 0.5, name: value}
    compiled = torch.compile(
        lambda s: functional.distillation_loss(s, Y, T, **options).loss, backend="eager"
    )
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        compiled(S)


def test_unknown_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="tau: there is no such argument; it is called temperature"):
        ChannelWiseLoss(tau=4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tau: .* it is called temperature here"):
        channel_wise_distillation(S, Y, T, tau=4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kd_wight: .* did you mean kd_weight"):
        HeteroAKDLoss(5, kd_wight=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight: .* it is called class_weight here"):
        HeteroAKDLoss(5, weight=torch.ones(5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tau: got 0.*T of kd is temperature"):
        HeteroAKDLoss(5, tau=0.0)
    with pytest.warns(UserWarning, match=r"tau: .*\(mmrazor's tau\) is called temp"):
        HeteroAKDLoss(5, hetero_weight=0.0, tau=4.0)


# --- integers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_integers_are_integers(kind: Any) -> None:
    loss = HeteroAKDLoss(kind(5), kind(7), kind(9), ignore_index=kind(200))
    assert type(loss.num_classes) is type(loss.ignore_index) is int
    assert loss.student_projector.conv.weight.shape == (5, 7, 1, 1)
    assert type(loss.student_projector.conv.in_channels) is int
    target = Y.where(Y != 255, 200)
    got = loss(S, target, teacher_logits=T, **FEATURES)
    assert int(got.valid) == int((Y != 255).sum())
    cwd = ChannelWiseLoss(ignore_index=kind(200))
    assert cwd(S, target, teacher_logits=T).cwd > 0
    assert functional.cross_entropy(S, target, ignore_index=kind(200)).valid == got.valid
    smp = DistillationLoss("multiclass", kind(5), ignore_index=kind(200))
    assert smp(S, target, T) > 0
    assert Projector(kind(7), kind(5)).conv.in_channels == 7


def test_refuses_what_is_no_integer() -> None:
    for value in (5.0, "5", True, None, torch.tensor(5)):
        with pytest.raises(TypeError, match="num_classes: got .*, expected an integer"):
            HeteroAKDLoss(value)
    with pytest.raises(ValueError, match="student_channels: got 0, expected a positive integer"):
        HeteroAKDLoss(5, 0, 3)


# --- ignore_index --------------------------------------------------------------------------------


def test_a_class_is_not_ignored_unasked() -> None:
    wide, target = torch.randn(1, 300, 4, 4), torch.full((1, 8, 8), 255)
    message = "ignore_index: got 255, which is also one of the 300 classes.*None.*allow_ignored_cl"
    features, weight = torch.randn(1, 7, 4, 4), torch.randn(300, 7)
    calls = (
        lambda **o: functional.cross_entropy(wide, target, **o),
        lambda **o: functional.distillation_loss(wide, target, wide, kd_weight=1.0, **o),
        lambda **o: HeteroAKDLoss(300, **o)(wide, target, teacher_logits=wide),
        lambda **o: ChannelWiseLoss(**o)(wide, target, teacher_logits=wide),
        lambda **o: functional.cross_entropy(
            Projection(features, weight), target[:, ::2, ::2], **o
        ),
    )
    for one in calls:
        with pytest.raises(ValueError, match=message):
            one()
        with pytest.raises(ValueError, match=message):
            one(ignore_index=255)
        assert one(ignore_index=None).valid > 0
        assert one(allow_ignored_class=True).valid == 0
        with pytest.raises(TypeError, match="allow_ignored_class: got int"):
            one(allow_ignored_class=1)
    with pytest.raises(ValueError, match=message):
        DistillationLoss("multiclass", 300, ignore_index=255)
    expected = F.cross_entropy(F.interpolate(wide, (8, 8), mode="bilinear"), target)
    torch.testing.assert_close(calls[0](ignore_index=None).loss, expected)
    target[0, :2] = 0
    expected = F.cross_entropy(F.interpolate(wide, (8, 8), mode="bilinear"), target, ignore_index=0)
    torch.testing.assert_close(calls[0](ignore_index=0, allow_ignored_class=True).loss, expected)


@pytest.mark.parametrize(
    ("dtype", "label"),
    [(torch.uint8, 255), (torch.int32, -(2**31)), (torch.int64, -(2**63)), (torch.int64, -1)],
)
@every_cpu_backend
def test_without_an_ignored_label_every_other_is_wrong(
    backend: str, dtype: torch.dtype, label: int
) -> None:
    target = Y.clamp(max=4).to(dtype)
    got = functional.cross_entropy(S, target, ignore_index=None, backend=backend)
    assert int(got.valid) == target.numel()
    torch.testing.assert_close(
        got.loss, functional.cross_entropy(S, target, ignore_index=-7, backend="reference").loss
    )
    target[1, 2, 3] = label
    pattern = rf"label {label} at \(b=1, y=2, x=3\) is not in \[0, 5\); 1 such"
    with pytest.raises(ValueError, match=pattern):
        functional.cross_entropy(S, target, ignore_index=None, backend=backend)


def test_smps_nothing_is_shown_as_nothing() -> None:
    loss = DistillationLoss("multiclass", 5)
    assert "ignore_index=None" in repr(loss)
    with pytest.raises(ValueError, match=r"label 255 at .* is not in \[0, 5\); \d+ such") as caught:
        loss(S, Y, T)
    assert "-2147483648" not in str(caught.value)
    assert "9223372036854775807" not in str(caught.value)


# --- copies --------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_copies_share_the_process_group(group: Any) -> None:
    losses: tuple[nn.Module, ...] = (
        HeteroAKDLoss(5, 7, 9, process_group=group),
        ChannelWiseLoss(process_group=group),
        DistillationLoss("multiclass", 5, process_group=group),
    )
    for loss in losses:
        averaged = AveragedModel(nn.ModuleDict({"loss": loss}))
        averaged.update_parameters(nn.ModuleDict({"loss": loss}))
        copies = (copy.deepcopy(loss), copy.copy(loss), averaged.module["loss"])
        for other in (*copies, pickle.loads(pickle.dumps(loss))):
            assert type(other) is type(loss)
            assert other.process_group is group
            assert loss.process_group is group
    stored = pickle.dumps(losses[0])
    dist.destroy_process_group()
    with pytest.warns(UserWarning, match="process_group: the pickle names .* not initialised here"):
        assert pickle.loads(stored).process_group is None


# --- subclasses of tensors -----------------------------------------------------------------------


class Picture(Tensor):
    """Like fastai's TensorImage."""


class Mask(Tensor):
    """Like torchvision's tv_tensors.Mask and MONAI's MetaTensor: functions of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
@pytest.mark.parametrize(
    "kinds",
    [(None, None, Mask), (Picture, Picture, None), (Picture, None, Mask), (Mask, Picture, Mask)],
)
def test_subclasses_count_as_plain_tensors(kinds: tuple[Any, ...], backend: str) -> None:
    options: dict[str, Any] = {"kd_weight": 1.0, "hetero_weight": 0.5}
    options["backend"] = backend

    def run(s: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        s = s.clone().requires_grad_()
        output = functional.distillation_loss(s, y, t, **options)
        output.loss.backward()
        assert all(type(value) is Tensor for value in (output.loss, output.ce, output.valid))
        return output.loss.detach(), s.grad.as_subclass(Tensor)

    tensors = [
        x if kind is None else x.as_subclass(kind) for x, kind in zip((S, T, Y), kinds, strict=True)
    ]
    for got, expected in zip(run(*tensors), run(S, T, Y), strict=True):
        assert torch.equal(got, expected)


def test_subclasses_in_the_modules() -> None:
    loss = HeteroAKDLoss(5, 7, 9)
    features = {
        "student_features": FEATURES["student_features"].as_subclass(Picture),
        "teacher_features": FEATURES["teacher_features"].as_subclass(Mask),
    }
    options = {"normalizer": torch.tensor(9.0)}
    expected = loss(S, Y, teacher_logits=T, **FEATURES, **options).loss
    options = {"normalizer": options["normalizer"].as_subclass(Mask)}
    pictures = (S.as_subclass(Picture), Y.as_subclass(Mask))
    got = loss(*pictures, teacher_logits=T.as_subclass(Mask), **features, **options).loss
    assert type(got) is Tensor
    assert got == expected
    cwd = ChannelWiseLoss()
    got = cwd(*pictures, teacher_logits=T.as_subclass(Mask)).loss
    assert type(got) is Tensor
    assert got == cwd(S, Y, teacher_logits=T).loss


def test_subclasses_in_compiled_code() -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    loss = HeteroAKDLoss(5)
    compiled = torch.compile(loss, backend="eager")
    got = compiled(S.as_subclass(Picture), Y.as_subclass(Mask), teacher_logits=T).loss
    assert type(got) is Tensor
    torch.testing.assert_close(got, loss(S, Y, teacher_logits=T).loss)


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        (Y[:, None], r"\[B, H, W\]; drop the channel axis with target.squeeze\(1\)$"),
        (Y[..., None], r"target.squeeze\(3\)$"),
        (Y[:, None].expand(-1, 5, -1, -1), r"one-hot target, target.argmax\(1\)$"),
        (Y[:, :4, :, None].expand(-1, -1, -1, 5), r"one-hot target, target.argmax\(3\)$"),
    ],
)
def test_a_target_of_four_axes(target: Tensor, hint: str) -> None:
    for one in (
        lambda: functional.cross_entropy(S, target),
        lambda: HeteroAKDLoss(5)(S, target, teacher_logits=T),
        lambda: ChannelWiseLoss()(S, target, teacher_logits=T),
    ):
        with pytest.raises(ValueError, match=r"target: got shape \(2, .*" + hint):
            one()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": Y.float()}, r"target: got torch.float32.*no probabilities.*target.long\(\)"),
        ({"target": Y > 2}, r"target: got torch.bool, expected .*; .*target.long\(\)"),
        ({"target": Y.numpy()}, r"target: got ndarray.*torch.as_tensor\(target\)"),
        ({"target": Y.tolist()}, r"target: got list.*torch.as_tensor\(target\)"),
        ({"target": Y[0]}, r"target: got shape \(5, 6\).*batch axis: target\[None\]"),
        ({"target": Y.to("meta")}, r"target: is on meta, .* on cpu; .*\.to\('cpu'\)"),
        ({"target": Y.where(Y != 255, 99)}, r"label 99 at \(b=.* or set ignore_index=99 if such"),
        ({"student_logits": S[0]}, r"student_logits: .*batch axis: student_logits\[None\]"),
        ({"student_logits": Y}, "student_logits: .*look like labels, .* argument `target`"),
        ({"student_logits": S.numpy()}, r"student_logits: .*as_tensor\(student_logits\)"),
        ({"student_logits": {"out": S}}, r"student_logits: got dict.*, student_logits\['out'\]"),
        ({"student_logits": (S,)}, "student_logits: got tuple.*one of its tensors"),
        ({"student_logits": S.int()}, r"student_logits: .*student_logits.float\(\)"),
        ({"student_logits": S.cfloat()}, "student_logits: .*real part, student_logits.real"),
        ({"teacher_logits": T[0]}, r"teacher_logits: .*batch axis: teacher_logits\[None\]"),
        ({"teacher_logits": T.tolist()}, r"teacher_logits: .*as_tensor\(teacher_logits\)"),
        ({"teacher_logits": T.to("meta")}, r"teacher_logits: is on meta.*\.to\('cpu'\)"),
    ],
)
def test_what_came_and_what_to_do(change: dict[str, Any], message: str) -> None:
    call = {"student_logits": S, "target": Y, "teacher_logits": T, **change}
    for loss in (HeteroAKDLoss(5), SegmentationLoss(CrossEntropy(), KD()), ChannelWiseLoss()):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(**call)
    if "teacher_logits" not in change:  # whose first argument has another name
        message = message.replace("student_logits", "logits")
        with pytest.raises((TypeError, ValueError), match=f"^(target: )?{message}"):
            functional.cross_entropy(call["student_logits"], call["target"])


def test_features_that_do_not_fit_are_named() -> None:
    for change, message in (
        ({"student_features": torch.ones(1, 7, 2, 3)}, "student_features: got batch 1, .* batch 2"),
        ({"teacher_features": torch.ones(1, 9, 2, 3)}, "teacher_features: got batch 1, .* batch 2"),
        ({"student_features": torch.ones(2, 7, 0, 3)}, "student_features: got an empty grid"),
    ):
        with pytest.raises(ValueError, match=message):
            HeteroAKDLoss(5, 7, 9)(S, Y, teacher_logits=T, **{**FEATURES, **change})


def test_numpys_flags_and_arrays_are_named_as_such() -> None:
    for loss in (HeteroAKDLoss(5), SegmentationLoss(CrossEntropy(), KD())):
        for call in (loss, loss.plan):
            with pytest.raises(
                TypeError, match=r"return_maps: got numpy\.bool.*, expected True or"
            ):
                call(S, Y, T, return_maps=np.bool_(True))
        with pytest.raises(TypeError, match=r"align_corners: got numpy\.bool"):
            loss.align_corners = np.bool_(True)
        with pytest.raises(ValueError, match="resolution: got array.*expected one of 'label'"):
            loss.resolution = np.ones(2)
        with pytest.raises(TypeError, match="class_weight: got torch.complex64, expected real"):
            loss.class_weight = torch.ones(5, dtype=torch.complex64)


def test_all_weights_set_to_zero() -> None:
    with pytest.raises(ValueError, match="weights: all of ce, kd, hetero, feature are 0"):
        HeteroAKDLoss(5, ce_weight=0.0, kd_weight=0.0, hetero_weight=0.0)  # there is no projector
    for channels in ((), (7, 9)):
        loss = HeteroAKDLoss(5, *channels, hetero_weight=0.0, projector_weight=0.0, kd_weight=0.0)
        loss.ce_weight = 0.0
        features = FEATURES if channels else {}
        with pytest.raises(ValueError, match="^weights: .* 0"):
            loss(S, Y, teacher_logits=T, **features)


def test_a_teacher_of_other_classes() -> None:
    other = torch.randn(2, 8, 2, 3)
    with pytest.raises(ValueError, match=r"got C=8 classes, .* has 5; .*channels and kd_weight=0"):
        HeteroAKDLoss(5)(S, Y, teacher_logits=other)
    with pytest.raises(ValueError, match="got C=8 classes, .* kd_weight=0"):
        HeteroAKDLoss(5, 7, 9)(S, Y, teacher_logits=other, **FEATURES)
    loss = HeteroAKDLoss(5, 7, 9, kd_weight=0.0)
    assert loss(S, Y, teacher_logits=other, **FEATURES).loss == loss(S, Y, **FEATURES).loss


@pytest.mark.parametrize("loss", [HeteroAKDLoss(5, ce_weight=0.5), HeteroAKDLoss(5, 7, 9)])
def test_validation_without_a_teacher(loss: HeteroAKDLoss) -> None:
    with pytest.raises(
        ValueError, match=r"got None.*without a teacher, call .eval\(\) on the loss"
    ):
        loss.train()(S, Y)
    output = loss.eval()(S, Y)
    assert list(output.terms) == ["ce"]
    assert output.loss == loss.ce_weight * functional.cross_entropy(S, Y).loss
    with pytest.raises(ValueError, match="return_maps=True needs them"):
        loss(S, Y, return_maps=True)
    if loss.student_projector is not None:  # a teacher who is there in part is a mistake
        with pytest.raises(ValueError, match="teacher_features: got None"):
            loss(S, Y, teacher_logits=T, student_features=FEATURES["student_features"])


def test_features_with_other_axes() -> None:
    loss = HeteroAKDLoss(5, 7, 9, kd_weight=0.0)
    last = FEATURES["student_features"].permute(0, 2, 3, 1)
    for features, words in (
        (last, r"got D=2 channels.*student_channels=7; its last axis has 7.*layout=\"NHWC\""),
        (last.flatten(1, 2), r"got shape \(2, 6, 7\).*tokens.*layout=\"tokens\", grid=\(h, w\)"),
    ):
        with pytest.raises(ValueError, match=f"student_features: {words}"):
            loss(S, Y, student_features=features, teacher_features=FEATURES["teacher_features"])
    with pytest.raises(ValueError, match=r"got C=2 classes.*its last axis has 5.*permute"):
        HeteroAKDLoss(5)(S.permute(0, 2, 3, 1), Y, teacher_logits=T)
    with pytest.raises(ValueError, match=r"teacher_logits: got C=3.*last axis has 5.*: teacher_lo"):
        HeteroAKDLoss(5)(S, Y, teacher_logits=T.permute(0, 2, 3, 1))
    weight = torch.ones(5, 7)
    with pytest.raises(ValueError, match=r"features has 2; its last axis has 7.*layout=\"NHWC\""):
        functional.cross_entropy(Projection(last, weight), Y[:, :2, :3])


# --- the result ----------------------------------------------------------------------------------


def test_the_result_is_no_tensor() -> None:
    out = functional.cross_entropy(S.clone().requires_grad_(), Y)
    for operation in (
        lambda: 2 * out,
        lambda: out * 2.0,
        lambda: out + out,
        lambda: 1.0 - out,
        lambda: out / 2,
        lambda: -out,
        lambda: sum([out, out]),
        lambda: torch.ones(()) + out,
        lambda: torch.ones(()) * out,
    ):
        with pytest.raises(TypeError, match=r"is a result and not a tensor; .* out.loss"):
            operation()
    with pytest.raises(AttributeError, match=r"'backward'; it is .* not a tensor: out.loss.backw"):
        out.backward()
    with pytest.raises(AttributeError, match="no attribute 'losses'$"):
        _ = out.losses
    assert (1, *out) == (1,) + out  # noqa: RUF005
    (2 * out.loss).backward()


def test_every_argument_is_an_attribute() -> None:
    assert set(SETTINGS) == set(HeteroAKDLoss._adjustable)
    for loss in (HeteroAKDLoss(5), ChannelWiseLoss()):
        arguments = set(inspect.signature(type(loss)).parameters) - {"options"}
        if isinstance(loss, HeteroAKDLoss):
            arguments |= set(HeteroAKDOptions.__annotations__) - {"teacher_ce_weight"}
        else:
            arguments |= set(LossOptions.__annotations__) - {"class_weight"}
        assert arguments == set(loss._arguments())
        assert all(hasattr(loss, name) for name in arguments)
