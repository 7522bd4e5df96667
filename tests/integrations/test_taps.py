"""A tap gives what the module returned: whatever overwrites it, compiles it, or orders its axes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from heteroakd_fast import HeteroAKDLoss
from heteroakd_fast.integrations import Feature, FeatureTap, FrozenTeacher

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A norm whose output the rest of the network overwrites, in one way or another."""

    def __init__(self, after: Callable[[Tensor], Any] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.after, self.head = after, nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.after is not None:
            self.after(x)
        return self.head(x)


def without_grad(x: Tensor) -> None:
    with torch.no_grad():
        x.zero_()


OVERWRITE: dict[str, Callable[[Tensor], Any]] = {
    "module": nn.ReLU(inplace=True),
    "function": F.relu_,
    "operator": lambda x: x.add_(1.0),  # `x += identity` of residual blocks
    "view": lambda x: x[:, :2].mul_(0.0),
    "detached": lambda x: x.detach().mul_(2.0),
    "without grad": without_grad,
}


@pytest.mark.parametrize("name", OVERWRITE)
def test_what_runs_after_a_module_changes_nothing(name: str) -> None:
    model, plain = Net(OVERWRITE[name]), Net(None)
    expected = plain.norm(plain.conv(X))
    tap = FeatureTap(model, "norm")
    with tap.listening():
        logits = model(X)
        feature = tap.take()
    assert torch.equal(feature, expected)
    assert not torch.equal(logits, plain.head(expected))  # it was overwritten
    (grad,) = torch.autograd.grad(feature.square().sum(), model.conv.weight)
    torch.testing.assert_close(
        grad, torch.autograd.grad(expected.square().sum(), plain.conv.weight)[0]
    )

    expected = plain.eval().norm(plain.conv(X))
    found = FrozenTeacher(model.eval(), feature="norm")(X)
    assert torch.equal(found["teacher_features"], expected)
    with torch.inference_mode():
        found = FrozenTeacher(model, feature="norm")(X)
    assert torch.equal(found["teacher_features"], expected)


def test_the_copy_of_what_nothing_overwrites_is_freed() -> None:
    model, kept = Net(None), []
    tap = FeatureTap(model, "norm")
    with tap.listening():
        model.head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        model(X)
        copy = weakref.ref(tap._kept.copy)
        assert tap.take() is kept[0]
        assert copy() is None


def compiled(kind: str, after: Callable[[Tensor], Any] | None) -> tuple[nn.Module, str]:
    """A model that is compiled, in whole or in part, and the name of the tapped module in it."""
    torch._dynamo.reset()
    model: Any = nn.Sequential(nn.Identity(), Net(after))
    if kind == "whole":
        return torch.compile(model, backend="eager"), "1.norm"
    if kind == "whole, its own name":
        return torch.compile(model, backend="eager"), "_orig_mod.1.norm"
    if kind == "in place":
        model.compile(backend="eager")
    elif kind == "part":
        model[1] = torch.compile(model[1], backend="eager")
    elif kind == "tapped":
        model[1].norm = torch.compile(model[1].norm, backend="eager")
    return model, "1.norm"


@pytest.mark.parametrize("kind", ["whole", "whole, its own name", "in place", "part", "tapped"])
def test_taps_into_compiled_modules(kind: str) -> None:
    torch.use_deterministic_algorithms(False)
    model, name = compiled(kind, torch.relu_)
    plain = Net(None)
    tap = FeatureTap(model, name)
    for _ in range(2):
        with tap.listening():
            model(X)
            assert torch.equal(tap.take(), plain.norm(plain.conv(X)))
        model(X)
        assert tap._kept is None  # nothing is kept outside


def test_a_tap_into_a_graph_that_was_made_before_it() -> None:
    model, name = compiled("whole", None)
    model(X)
    tap = FeatureTap(model, name)
    with tap.listening():
        model(X)
        with pytest.raises(RuntimeError, match="did not run .*; build the tap before the compiled"):
            tap.take()
    with pytest.raises(ValueError, match=r"got '1.nrm', Sequential has no .* near names: 1.norm"):
        FeatureTap(model, "1.nrm")


# --- axes ----------------------------------------------------------------------------------------


def taken(model: nn.Module, images: Tensor, *feature: Any) -> Tensor:
    tap = FeatureTap(model, *feature)
    with torch.no_grad(), tap.listening():
        model(images)
        return tap.take()


def test_tokens_of_a_vit() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.ViTConfig(
        image_size=(32, 48),
        patch_size=16,
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
    )
    model = transformers.ViTModel(config).eval()
    images = torch.randn(2, 3, 32, 48)
    feature = taken(model, images, "layernorm", "tokens", (2, 3), 1)
    with torch.no_grad():
        tokens = model(images).last_hidden_state
    assert feature.shape == (2, 6, 2, 3)
    assert torch.equal(feature[1, :, 1, 2], tokens[1, 1 + 5])  # row by row, after the class token
    found = FrozenTeacher(model, Feature("layernorm", "tokens", (2, 3), 1), lambda o: o[0])(images)
    assert torch.equal(found["teacher_features"], feature)
    with pytest.raises(TypeError, match=r'\(2, 7, 6\); expected .* layout="tokens", grid=\(h, w\)'):
        taken(model, images, "layernorm")
    with pytest.raises(ValueError, match=r"7 tokens; expected skip \+ h \* w = 0 \+ 2 \* 3 = 6"):
        taken(model, images, Feature("layernorm", "tokens", (2, 3)))


def test_tokens_of_a_swin() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.SwinConfig(
        image_size=32, embed_dim=4, depths=[1, 1], num_heads=[1, 1], window_size=4
    )
    model = transformers.SwinModel(config).eval()
    images = torch.randn(2, 3, 32, 32)
    feature = taken(model, images, "encoder.layers.0.blocks.0", "tokens", (8, 8))
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).reshaped_hidden_states[1]
        reduced = taken(model, images, "encoder.layers.0")  # a map, behind tokens in its tuple
    assert feature.shape == (2, 4, 8, 8)
    assert torch.equal(reduced, expected)
    # What the next stage merges are 2x2 patches of the right neighbours.
    merged = torch.cat([feature[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
    norm = model.encoder.layers[0].downsample.norm
    with torch.no_grad():
        own = taken(model, images, "encoder.layers.0.downsample.norm", "tokens", (4, 4))
        torch.testing.assert_close(norm(merged.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), own)


def test_channels_last_of_a_convnext() -> None:
    """Between its linear layers; every feature of Swin in torchvision and timm is such a one."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[5], depths=[1], num_stages=1)
    model = transformers.ConvNextModel(config).eval()
    name = next(name for name, _ in model.named_modules() if name.endswith("pwconv2"))
    images = torch.randn(1, 3, 32, 48)
    plain = taken(model, images, name)
    assert plain.shape == (1, 8, 12, 5)
    feature = taken(model, images, name, "NHWC")
    assert torch.equal(feature, plain.permute(0, 3, 1, 2))
    loss = HeteroAKDLoss(3, 5, 5, kd_weight=0.0)
    logits, target = torch.randn(1, 3, 8, 12), torch.zeros(1, 32, 48, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'student_features: got D=8 .*FeatureTap.*layout="NHWC"'):
        loss(logits, target, student_features=plain, teacher_features=plain)
    output = loss(logits, target, student_features=feature, teacher_features=feature)
    assert output.loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("NWHC",), "layout: got 'NWHC', expected one of 'NCHW', 'NHWC', 'tokens'"),
        (("tokens",), r"grid: got None, expected \(h, w\), .* for layout='tokens'"),
        (("NCHW", (2, 2)), r"grid: got \(2, 2\), expected None for layout='NCHW'"),
        (("tokens", (0, 2)), "grid: got 0, expected a positive integer"),
        (("tokens", (2, 2), 0.5), "skip: got float, expected an integer"),
    ],
)
def test_refuses_options_that_do_not_fit(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        FeatureTap(Net(None), "norm", *options)


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(None)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(
            lambda z: self.norm(self.conv(z)), x, use_reentrant=self.reentrant
        )
        return self.head(x)


def test_a_feature_without_its_graph_is_refused() -> None:
    """Reentrant checkpointing runs its segment without gradients, and again in backward."""
    x = X.clone().requires_grad_()
    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        tap = FeatureTap(model, "norm")
        with tap.listening():
            model(x)
            if not reentrant:
                assert tap.take().requires_grad
                continue
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                tap.take()
    assert not FrozenTeacher(model, feature="norm")(x)["teacher_features"].requires_grad
