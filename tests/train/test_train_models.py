"""Networks, weights files and feature taps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from train_helpers import CPU, distilling, same_weights, weights_of

from heteroakd_fast.train.config import DistillConfig, ModelConfig
from heteroakd_fast.train.errors import ConfigError, ModelError
from heteroakd_fast.train.models import (
    UNet,
    build_model,
    check_logits,
    count_parameters,
    logits_of,
)
from heteroakd_fast.train.objectives import DistillObjective, PlainObjective
from heteroakd_fast.train.parallel import dry_run
from heteroakd_fast.train.reading import load_config
from heteroakd_fast.train.taps import FeatureTap, probe_channels
from heteroakd_fast.train.weights import load_weights


def custom(num_classes: int, hidden: int = 4) -> nn.Module:
    """What a user's import path may point at."""
    return nn.Sequential(nn.Conv2d(3, hidden, 3, stride=4), nn.Conv2d(hidden, num_classes, 1))


def wrong_classes(num_classes: int) -> nn.Module:
    return custom(num_classes + 1)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_unet_logits_come_at_its_stride(stride: int, size: tuple[int, int]) -> None:
    logits = UNet(5, width=4, levels=3, stride=stride)(torch.rand(2, 3, *size))
    assert logits.shape == (2, 5, -(-size[0] // stride), -(-size[1] // stride))


def test_the_embedded_pair() -> None:
    config = load_config()
    teacher = build_model(config.teacher, 8, seed=0)
    student = build_model(config.student, 8, seed=0)
    assert 1.2e6 < count_parameters(teacher) < 1.6e6
    assert 0.05e6 < count_parameters(student) < 0.2e6
    images = torch.rand(1, 3, 128, 128)
    assert logits_of(teacher(images)).shape == (1, 8, 32, 32)
    assert logits_of(student(images)).shape == (1, 8, 32, 32)
    assert config.teacher.tap is not None or config.student.tap is None
    # The tap of the default, or the one the comments in the file speak of.
    tap = FeatureTap(teacher, config.teacher.tap or "decode_head.activation")
    assert probe_channels(teacher, tap, (64, 64), CPU) == 128


def test_both_directions() -> None:
    for first, second in (("unet", "segformer"), ("segformer", "unet")):
        for arch in (first, second):
            model = build_model(ModelConfig(arch=arch, steps=1), 3, seed=0)
            check_logits(model, 3, (64, 64), CPU)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = ModelConfig(arch="unet", steps=1)
    torch.manual_seed(1)
    first = build_model(config, 3, seed=5).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_model(config, 3, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    other = build_model(config, 3, seed=6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_model_by_import_path() -> None:
    config = ModelConfig(arch="test_train_models:custom", kwargs={"hidden": 6}, steps=1)
    model = build_model(config, 3, seed=0)
    check_logits(model, 3, (32, 32), CPU)
    assert model[0].out_channels == 6  # type: ignore[index]


@pytest.mark.parametrize(
    ("arch", "kwargs", "expected"),
    [
        ("nonsense", {}, "expected unet, segformer"),
        ("no_such_module:x", {}, "no_such_module"),
        ("test_train_models:nothing", {}, "nothing"),
        ("unet", {"widht": 3}, "widht"),
        ("unet", {"stride": 3}, "power of two"),
        ("segformer", {"depth": [1, 1, 1, 1]}, "unknown kwargs depth; did you mean depths"),
        ("unet", {"width": 0}, "width is 0, expected 1 or more"),
        # Each makes the library meet an error of its own kind.
        ("segformer", {"hidden_sizes": [8]}, "'segformer' with .*IndexError"),
        ("segformer", {"hidden_sizes": "x"}, "'segformer' with .*hidden_sizes"),
        ("segformer", {"hidden_act": "nope"}, "'segformer' with .*nope"),
        ("builtins:dict", {}, "expected a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_built(arch: str, kwargs: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        build_model(ModelConfig(arch=arch, kwargs=kwargs, steps=1), 3, seed=0)


def test_wrong_number_of_classes_is_found_early() -> None:
    model = build_model(ModelConfig(arch="test_train_models:wrong_classes", steps=1), 3, seed=0)
    with pytest.raises(ModelError, match=r"\(1, 4, .*expected \(1, 3, h, w\)"):
        check_logits(model, 3, (32, 32), CPU)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "nested", "parallel"])
def test_weights_files(tmp_path: Path, kind: str) -> None:
    config = ModelConfig(arch="unet", steps=1)
    source = build_model(config, 3, seed=1).state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(source, path)
    elif kind == "parallel":
        torch.save({f"module.{key}": value for key, value in source.items()}, path)
    else:
        torch.save({"state_dict": source} if kind == "nested" else source, path)
    model = build_model(config.model_copy(update={"weights": path}), 3, seed=2)
    same_weights(model.state_dict(), source)


def test_weights_in_the_folder_layout_of_transformers(tmp_path: Path) -> None:
    sizes = {
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 1, 1],
        "decoder_hidden_size": 8,
    }
    config = ModelConfig(arch="segformer", kwargs=sizes, steps=1)
    source = build_model(config, 3, seed=1)
    source.save_pretrained(tmp_path)  # type: ignore[operator]
    there = ModelConfig(arch="segformer", weights=tmp_path, steps=0)
    model = build_model(there, 3, seed=2)
    same_weights(model.state_dict(), source.state_dict())
    with pytest.raises(ModelError, match="has 3 classes, the data has 4"):
        build_model(there, 4, seed=2)
    part = tmp_path / "part"
    source.segformer.save_pretrained(part)  # type: ignore[operator, union-attr]
    config_file = part / "config.json"
    values = json.loads(config_file.read_text()) | {"num_labels": 3}
    config_file.write_text(json.dumps(values))
    with pytest.raises(
        ModelError, match=r"not the whole of arch 'segformer', it lacks decode_head"
    ):
        build_model(there.model_copy(update={"weights": part}), 3, seed=2)


@pytest.mark.parametrize("arch", ["unet", "test_train_models:custom"])
def test_a_folder_is_no_weights_file(tmp_path: Path, arch: str) -> None:
    """A teacher that silently stays untrained would teach all the same."""
    with pytest.raises(ModelError, match="holds no weights; name one file"):
        build_model(ModelConfig(arch=arch, weights=tmp_path, steps=0), 3, seed=0)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    model = UNet(3, width=4)
    state = dict(model.state_dict())
    state["classifier.weight"] = torch.zeros(7, 4, 1, 1)
    state["extra.weight"] = state.pop("classifier.bias")
    torch.save(state, tmp_path / "w.pt")
    before = weights_of(model)
    with pytest.raises(ModelError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "missing in the file: classifier.bias" in message
    assert "unknown to the model: extra.weight" in message
    assert "classifier.weight: shape (7, 4, 1, 1) in the file, (3, 4, 1, 1) in the model" in message
    same_weights(model.state_dict(), before)


def test_unreadable_weights(tmp_path: Path) -> None:
    model = UNet(3, width=4)
    with pytest.raises(ModelError, match="no such weights file"):
        load_weights(model, tmp_path / "none.pt")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ModelError, match="cannot be read as weights"):
            load_weights(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.pt")
    for name in ("list.pt", "numbers.pt"):
        with pytest.raises(ModelError, match="expected a mapping"):
            load_weights(model, tmp_path / name)


def test_tap_gives_the_output_of_the_module() -> None:
    model = UNet(3, width=4, levels=3).eval()
    kept = []
    model.decoder[1].register_forward_hook(lambda *arguments: kept.append(arguments[2]))
    images = torch.rand(2, 3, 32, 32)
    with FeatureTap(model, "decoder.1").listening() as tap:
        model(images)
        assert tap.take() is kept[0]
        with pytest.raises(ModelError, match="did not run"):
            tap.take()


def test_tap_leaves_no_hook_and_no_feature_behind() -> None:
    model = UNet(3, width=4, levels=3)
    tap = FeatureTap(model, "decoder.1")
    model.classifier = nn.Conv2d(7, 3, 1)  # fails after the tapped module has run
    with pytest.raises(RuntimeError), tap.listening():
        model(torch.rand(1, 3, 32, 32))
    assert not model.decoder[1]._forward_hooks
    with pytest.raises(ModelError, match="did not run"):
        tap.take()


def test_tap_that_does_not_exist_names_near_ones() -> None:
    with pytest.raises(ModelError, match=r"decoder\.9.*near names:.*decoder\.1"):
        FeatureTap(UNet(3, width=4, levels=3), "decoder.9")


def test_tap_in_mappings_and_tuples() -> None:
    class Inner(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: torch.Tensor) -> Any:
            if self.kind == "tuple":
                return x.flatten(), x
            if self.kind == "mapping":
                return {"pooled": x.mean((2, 3)), "last_hidden_state": x}
            return x.flatten(2)

    for kind in ("tuple", "mapping"):
        model = nn.Sequential(nn.Conv2d(3, 5, 1), Inner(kind))
        assert probe_channels(model, FeatureTap(model, "1"), (8, 8), CPU) == 5
    model = nn.Sequential(nn.Conv2d(3, 5, 1), Inner("tokens"))
    with pytest.raises(ModelError, match=r"\(1, 5, 64\); expected a feature map"):
        probe_channels(model, FeatureTap(model, "1"), (8, 8), CPU)


class Permuted(nn.Module):
    """Its output is [B, h, w, D], as of every stage of Swin in torchvision and timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(("channels", "side"), [(96, (64, 64)), (8, (64, 128)), (5, (65, 72))])
def test_taps_of_modules_with_channels_last(channels: int, side: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 3, stride=8, padding=1), Permuted())
    assert probe_channels(model, FeatureTap(model, "0"), side, CPU) == channels
    message = r"tap '1': gave .* its channels seem to be the last axis; write \"1:NHWC\""
    with pytest.raises(ModelError, match=message):
        probe_channels(model, FeatureTap(model, "1"), side, CPU)
    assert probe_channels(model, FeatureTap(model, "1:NHWC"), side, CPU) == channels
    with pytest.raises(ModelError, match="layout: got 'NWHC'"):
        FeatureTap(model, "1:NWHC")
    with pytest.raises(ModelError, match="tap '1'; tokens have no grid here"):
        FeatureTap(model, "1:tokens")


def test_probe_leaves_running_statistics_alone() -> None:
    model = UNet(3, width=4, levels=3).train()
    before = weights_of(model)
    assert probe_channels(model, FeatureTap(model, "decoder.1"), (32, 32), CPU) == 4
    assert model.training
    same_weights(model.state_dict(), before)


def make_distillation(taps: tuple[str, str] | None, **options: Any) -> DistillObjective:
    student, teacher = UNet(3, width=4, levels=3), UNet(3, width=6, levels=3, stride=4)
    return distilling(student, teacher, DistillConfig(**options), taps=taps)


@pytest.mark.parametrize("taps", [None, ("decoder.1", "decoder.0")])
def test_distillation_trains_the_student_and_projectors_only(
    taps: tuple[str, str] | None,
) -> None:
    objective = make_distillation(taps)
    teacher = objective._teacher[0]
    frozen = weights_of(teacher)
    objective.train()
    assert objective.model.training
    assert not teacher.training
    output = objective(torch.rand(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32)))
    output.loss.backward()
    assert (output.projector is not None) == (taps is not None)
    parameters = dict(objective.named_parameters())
    assert any(name.startswith("loss.") for name in parameters) == (taps is not None)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for parameter in teacher.parameters():
        assert parameter.grad is None
    same_weights(teacher.state_dict(), frozen)
    maps = objective.maps(torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64))
    assert maps["reliability"].shape == maps["discrepancy"].shape == (1, 32, 32)
    assert (maps["reliability"] > 0).all()
    assert (maps["reliability"] < 1).all()


def test_what_the_loss_refuses_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"distill: .*backend"):
        dry_run(make_distillation(None, backend="nonsense"), (32, 32), CPU)
    plain = PlainObjective(UNet(3, width=4), DistillConfig(backend="nonsense"), 255)
    with pytest.raises(ConfigError, match=r"distill: .*backend"):
        dry_run(plain, (32, 32), CPU)
