"""Derivatives that the losses do not have: an error for every tensor of every loss, never a 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import F32, make_batch
from torch import Tensor
from torch.autograd import forward_ad

from heteroakd_fast import ChannelWiseLoss, HeteroAKDLoss, Projection, functional

_BATCH = make_batch(dtype=F32, grid=(4, 6), teacher_grid=(4, 6), size=(4, 6))
_TARGET = _BATCH.target
_FEATURES = {
    "student_features": torch.randn(2, 7, 4, 6),
    "teacher_features": torch.randn(2, 9, 4, 6),
}
_EVERY_TERM = {"kd_weight": 0.5, "hetero_weight": 0.5, "feature_weight": 0.5}
_LOGITS = {"student_logits": _BATCH.student, "teacher_logits": _BATCH.teacher}
_WEIGHT = {"class_weight": torch.rand(5) + 0.5}
_COUNT = {"normalizer": torch.tensor(40.0)}


def _module(*channels: int, **options: Any) -> Callable[..., Tensor]:
    loss = HeteroAKDLoss(5, *channels, **options)

    def call(**tensors: Tensor) -> Tensor:
        own = {name: tensors.pop(name) for name in list(tensors) if "projector" in name}
        if "class_weight" in tensors:
            loss.class_weight = tensors.pop("class_weight")
        arguments = (tensors.pop("student_logits"), _TARGET)
        output: Tensor = torch.func.functional_call(loss, own, arguments, tensors).loss
        return output

    return call


def _projectors(*sides: str) -> dict[str, Tensor]:
    parameters = HeteroAKDLoss(5, 7, 9).state_dict()
    return {
        name: value
        for name, value in parameters.items()
        if name.split("_")[0] in sides and name.endswith("weight")
    }


#: A loss as a function of tensors by name, and these.
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
    "cross_entropy": (
        lambda **x: functional.cross_entropy(x.pop("student_logits"), _TARGET, **x).loss,
        {"student_logits": _BATCH.student, **_WEIGHT},
    ),
    "distillation_loss": (
        lambda **x: functional.distillation_loss(target=_TARGET, **x, **_EVERY_TERM).loss,
        {**_LOGITS, **_WEIGHT, **_COUNT},
    ),
    "normalizer of a term": (
        lambda **x: functional.cross_entropy(_BATCH.student, _TARGET, normalizer=x).loss,
        {"ce": torch.tensor(40.0)},
    ),
    "ChannelWiseLoss": (
        lambda **x: ChannelWiseLoss()(target=_TARGET, **x).loss,
        {**_LOGITS, **_COUNT},
    ),
    "HeteroAKDLoss": (_module(), {**_LOGITS, **_WEIGHT, **_COUNT}),
    "HeteroAKDLoss of features": (
        _module(7, 9, projector_weight=0.0),
        {**_LOGITS, **_FEATURES, **_projectors("student", "teacher"), **_WEIGHT},
    ),
    "distillation_loss of projections": (
        lambda **x: (
            functional.distillation_loss(
                Projection(*(x.pop(f"student_{name}") for name in Projection._fields[:3])),
                _TARGET,
                Projection(*(x.pop(f"teacher_{name}") for name in Projection._fields[:3])),
                backend="reference",
                **x,
                **_EVERY_TERM,
            ).loss
        ),
        {
            "student_features": _FEATURES["student_features"],
            "student_weight": torch.randn(5, 7),
            "student_bias": torch.randn(5),
            "teacher_features": _FEATURES["teacher_features"],
            "teacher_weight": torch.randn(5, 9),
            "teacher_bias": torch.randn(5),
            **_WEIGHT,
            **_COUNT,
        },
    ),
}
EVERY_ARGUMENT = [(loss, name) for loss, (_, tensors) in LOSSES.items() for name in tensors]


@pytest.mark.parametrize(("loss", "argument"), EVERY_ARGUMENT)
def test_forward_mode_is_refused(loss: str, argument: str) -> None:
    function, tensors = LOSSES[loss]
    primal = tensors[argument]

    def call(x: Tensor) -> Tensor:
        return function(**{**tensors, argument: x})

    assert call(primal).isfinite()
    with pytest.raises(NotImplementedError, match="tangent.*no forward-mode"):
        torch.func.jvp(call, (primal,), (torch.ones_like(primal),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        call(forward_ad.make_dual(primal, torch.ones_like(primal)))


#: In reverse mode these get a gradient, or none by design (what only `teacher_ce` trains).
_MAY_REQUIRE_GRAD = ("student_", "teacher_features", "teacher_projector", "teacher_weight")
NO_GRADIENT = [
    (loss, name)
    for loss, name in EVERY_ARGUMENT
    if not name.startswith(_MAY_REQUIRE_GRAD) and name != "teacher_bias"
]


@pytest.mark.parametrize(("loss", "argument"), NO_GRADIENT)
def test_what_gets_no_gradient_must_not_require_one(loss: str, argument: str) -> None:
    """Neither a leaf, as a parameter is, nor a result."""
    function, tensors = LOSSES[loss]
    leaf = torch.nn.Parameter(tensors[argument])
    for x in (leaf, leaf * 1.0):
        with pytest.raises(ValueError, match=rf"^\S*{argument}.*: requires grad.*\.detach\(\)"):
            function(**{**tensors, argument: x})


def test_transforms_do_not_hide_it() -> None:
    def of_weight(weight: Tensor) -> Tensor:
        return functional.cross_entropy(_BATCH.student, _TARGET, class_weight=weight).loss

    def of_teacher(teacher: Tensor) -> Tensor:
        return functional.distillation_loss(
            _BATCH.student, _TARGET, teacher, ce_weight=0.0, kd_weight=1.0
        ).loss

    for function, x in ((of_weight, _WEIGHT["class_weight"]), (of_teacher, _BATCH.teacher)):
        with pytest.raises(ValueError, match="requires grad"):
            torch.func.grad(function)(x)
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.func.jacfwd(function)(x)
