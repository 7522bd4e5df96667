"""transformers' networks that upsample their logits themselves, and the others."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers", reason="needs it: pip install transformers")

from heteroakd_fast import HeteroAKDLoss  # noqa: E402
from heteroakd_fast.integrations import FrozenTeacher, logits_of, low_resolution  # noqa: E402

CLASSES, SIDE = 7, 64
VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
}
RESNET: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 20],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
#: Name in transformers -> options of a small one.
CONFIGS: dict[str, dict[str, Any]] = {
    "UperNet": {"hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 8},
    "DPT": {
        **VIT,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
    },
    "Segformer": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 8, 8],
        "num_attention_heads": [1, 1, 1, 1],
        "decoder_hidden_size": 8,
    },
    "Beit": {**VIT, "out_indices": [1, 2, 3, 4]},
    "Data2VecVision": {**VIT, "out_indices": [1, 2, 3, 4]},
    "MobileNetV2": {"depth_multiplier": 0.35, "output_stride": 16},
    "MobileViT": {"hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    "MobileViTV2": {"width_multiplier": 0.5},
}
UPSAMPLE = {"UperNet": (4, False), "DPT": (2, True)}  # stride and align_corners
OTHERS = [name for name in CONFIGS if name not in UPSAMPLE]


def build(name: str) -> nn.Module:
    options = dict(CONFIGS[name])
    if name == "UperNet":
        options["backbone_config"] = transformers.ResNetConfig(**RESNET)
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    model: nn.Module = getattr(transformers, f"{name}ForSemanticSegmentation")(config).eval()
    assert "auxiliary" not in str(vars(config)) or config.use_auxiliary_head, "which costs memory"
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def upsampled(logits: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=align_corners)


class FullResolution(TorchDispatchMode):
    """Whether anything as large as logits at full resolution was made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.made |= tuple(result.shape[1:]) == (CLASSES, SIDE, SIDE)
        return results


class Interpolated(TorchFunctionMode):
    """Results of `F.interpolate`."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.interpolate:
            self.results.append(result)
        return result


@pytest.mark.parametrize("name", UPSAMPLE)
def test_a_teacher_gives_its_logits_before_its_own_upsampling(name: str) -> None:
    stride, align_corners = UPSAMPLE[name]
    model = build(name)
    with torch.no_grad(), FullResolution() as watch:
        own = model(images()).logits
    assert watch.made
    assert own.shape[-1] == SIDE
    before = hooks(model)
    teacher = FrozenTeacher(model, align_corners=align_corners)
    with FullResolution() as watch:
        found = teacher(images())["teacher_logits"]
    assert not watch.made
    assert found.shape == (2, CLASSES, SIDE // stride, SIDE // stride)
    torch.testing.assert_close(upsampled(found, align_corners), own, rtol=1e-6, atol=1e-7)
    # and nothing of it is left in the model
    assert torch.equal(logits_of(model(images())), own)
    assert hooks(model) == before


@pytest.mark.parametrize("name", UPSAMPLE)
def test_the_loss_is_that_of_the_models_own_logits(name: str) -> None:
    align_corners = UPSAMPLE[name][1]
    student, teacher = build(name), FrozenTeacher(build("Segformer"))
    target = torch.randint(0, CLASSES, (2, SIDE, SIDE))
    loss = HeteroAKDLoss(CLASSES, kd_weight=1.0, align_corners=align_corners)
    grads = []
    for leave_out in (True, False):
        models = [student] if leave_out else []
        with low_resolution(*models, align_corners=align_corners):
            logits = student(images()).logits
        assert (logits.shape[-1] < SIDE) == leave_out
        value = loss(logits, target, **teacher(images())).loss
        weights = [student.get_parameter(n) for n, _ in student.named_parameters()]
        grads.append([value, *torch.autograd.grad(value, weights, allow_unused=True)])
    for one, two in zip(*grads, strict=True):
        if one is not None:  # the auxiliary head has no part in the loss
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", UPSAMPLE)
def test_another_align_corners_leaves_the_model_alone_and_says_so(name: str) -> None:
    align_corners = UPSAMPLE[name][1]
    model = build(name)
    with pytest.warns(UserWarning, match=f"teacher: {name}.*align_corners={align_corners} to save"):
        teacher = FrozenTeacher(model, align_corners=not align_corners)
    found = teacher(images())["teacher_logits"]
    assert torch.equal(found, model(images()).logits)


@pytest.mark.parametrize("name", OTHERS)
def test_the_others_upsample_nothing_and_stay_as_they_are(name: str) -> None:
    model = build(name).requires_grad_(False)  # with gradients, attention has other kernels
    with torch.no_grad(), Interpolated() as watch:
        own = model(images()).logits
    assert not any(own is result for result in watch.results)
    assert own.shape[-1] < SIDE
    for align_corners in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            teacher = FrozenTeacher(model, align_corners=align_corners)
        assert torch.equal(teacher(images())["teacher_logits"], own)


def test_wrapped_models() -> None:
    stage = {"depths": [1], "hidden_sizes": [8], "out_features": ["stage1"]}
    config = transformers.UperNetConfig(
        num_labels=CLASSES,
        hidden_size=8,
        pool_scales=[1],
        use_auxiliary_head=False,
        backbone_config=transformers.ResNetConfig(**{**RESNET, **stage}),
    )  # one stage: it is compiled twice
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    own = model(images()).logits
    for wrapped in (compiled, nn.DataParallel(model)):
        for _ in range(2):
            with torch.no_grad(), low_resolution(wrapped):
                low = logits_of(wrapped(images()))
            torch.testing.assert_close(upsampled(low, False), own)
            assert low.shape[-1] == SIDE // 4
    assert compiled(images()).logits.shape == own.shape


def test_the_names_of_another_library_do_not_count() -> None:
    class UperNetForSemanticSegmentation(nn.Upsample):
        pass

    other = UperNetForSemanticSegmentation(scale_factor=2)
    with low_resolution(other):
        assert other(images()).shape[-1] == 2 * SIDE


def test_the_callers_own_upsampling_stays_inside_the_block() -> None:
    model = build("UperNet")
    kept = []
    with low_resolution(model):
        for _ in range(3):
            logits = model(torch.randn(1, 3, 64, 64)).logits
            kept.append(weakref.ref(logits))
            assert F.interpolate(logits, (64, 64), mode="bilinear").shape[2:] == (64, 64)
        del logits
        assert all(one() is None for one in kept)  # nothing holds what a forward returned
