"""Every recipe, alone and together: valid, sourced, and its networks build, tap and distil."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from train_helpers import distilling, same_weights

from heteroakd_fast.train.cli import main
from heteroakd_fast.train.config import Config, ModelConfig
from heteroakd_fast.train.errors import ConfigError, ModelError
from heteroakd_fast.train.models import LIBRARY, build_model, forward_logits, logits_of
from heteroakd_fast.train.reading import (
    as_toml,
    embedded_recipes,
    load_config,
    parse_command_line,
    parse_config,
)

RECIPES = embedded_recipes()
KINDS = {name: text.split(":")[0].removeprefix("# ") for name, text in RECIPES.items()}
DATA = [name for name, kind in KINDS.items() if kind.startswith("Data")]
PAIRS = [name for name, kind in KINDS.items() if kind == "Pair"]
METHODS = [name for name, kind in KINDS.items() if kind == "Method"]
ROOT = ["--data.root", "somewhere"]

#: The same networks, thin enough for a test: names of modules are those of the full ones.
THIN: dict[str, dict[str, Any]] = {
    "segformer": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 20, 24],
        "num_attention_heads": [1, 2, 2, 3],
        "decoder_hidden_size": 16,
    },
    "upernet": {
        "hidden_size": 16,
        "backbone_config": {
            "model_type": "resnet",
            "depths": [1, 1, 1, 1],
            "embedding_size": 8,
            "hidden_sizes": [8, 12, 16, 20],
            "layer_type": "basic",
        },
    },
    "mobilenet-v2": {"output_stride": 16, "depth_multiplier": 0.35},
    "unet": {"width": 4, "levels": 4, "stride": 4},
    "dpt": {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
    },
    "beit": {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "out_indices": [0, 1, 2, 3],
    },
    "mobilevit": {"hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    "mobilevit-v2": {"width_multiplier": 0.5},
}


def test_the_kinds_are_all_there() -> None:
    assert set(KINDS.values()) <= {"Data", "Data and pair", "Pair", "Method"}
    assert {"landcover", "folder", "cityscapes", "voc", "ade20k"} == set(DATA)
    methods = {"task", "kd", "kd-t2", "cwd", "heteroakd", "heteroakd-paper", "kmm", "kem"}
    assert methods == set(METHODS)
    assert len(PAIRS) >= 4


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    comment = " ".join(line for line in RECIPES[name].splitlines() if line.startswith("#"))
    assert len(comment) > 100
    signs = ("20", "arXiv", "docs/", "--data.root", "satellite", "nothing but")
    assert any(sign in comment for sign in signs)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_data_and_method_go_together(data: str, method: str) -> None:
    root = [] if data == "landcover" else ROOT
    if data == "folder":
        root = [*ROOT, "--data.num-classes", "5"]
    pair = ["pair-tiny-unet-segformer"] if data == "landcover" else []
    config = parse_command_line([data, *pair, method, *root]).config
    assert config.data.kind == data
    assert config.run == Path("runs", "-".join([data, *pair, method]))
    # What is printed is a file that means the same.
    assert parse_config(as_toml(config), "printed") == config
    if method == "task":
        assert config.stages == ("alone",)
    else:
        assert (config.taps is not None) == (method == "heteroakd-paper")
        distill = config.distill
        asked = {n for n in ("kd", "hetero", "cwd") if getattr(distill, f"{n}_weight")}
        terms = {"kd": {"kd"}, "kd-t2": {"kd"}, "cwd": {"cwd"}, "heteroakd-paper": {"kd", "hetero"}}
        assert asked == terms.get(method, {"hetero"})
    assert (config.distill.mix == "teacher") == (method == "kem")
    assert (config.distill.evaluation == "none") == (method == "kmm")


def test_published_data_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cityscapes", "kd"]) == 2
    assert "data.root is required" in capsys.readouterr().err.replace("\n", " ")


def test_a_later_architecture_takes_nothing_from_an_earlier_one() -> None:
    config = load_config("landcover", "pair-tiny-unet-segformer")
    assert config.teacher.kwargs == {"width": 32, "levels": 4, "stride": 2}
    assert config.optim.warmup_steps == 50  # of landcover, which the pair says nothing about


def test_an_own_file_does_not_fall_back_to_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[teacher]\narch = "unet"\nsteps = 1\n[student]\narch = "unet"\nsteps = 1\n')
    with pytest.raises(ConfigError, match="data: missing"):
        load_config(path)
    # Nor does one that is called like a recipe, and comes before it.
    monkeypatch.chdir(tmp_path)
    path.rename("kd")
    with pytest.raises(ConfigError, match="data: missing"):
        load_config("kd")
    path = Path("kd").rename(path)
    assert load_config("landcover", path, "kd").student.arch == "unet"


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-recipes"]) == 0
    printed = capsys.readouterr().out
    for name in RECIPES:
        assert name in printed
    assert main(["cityscape"]) == 2
    assert "did you mean cityscapes?" in capsys.readouterr().err.replace("\n", " ")


def thin(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"kwargs": THIN[model.arch], "weights": None})


def configured(pair: str) -> Config:
    return parse_command_line([pair, "heteroakd-paper"]).config


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_build_tap_and_distil(pair: str) -> None:
    config = configured(pair)
    student, teacher = (
        build_model(thin(model), 5, 0) for model in (config.student, config.teacher)
    )
    assert config.taps is not None
    shape: dict[str, Any] = {"num_classes": 5, "side": (64, 96), "taps": config.taps}
    objective = distilling(student, teacher, config.distill, **shape)
    objective.train()
    output = objective(torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96)))
    output.loss.backward()
    assert output.hetero is not None
    assert output.projector is not None
    tapped = dict(student.named_modules())[config.taps[0]]
    assert any(p.grad is not None and p.grad.any() for p in tapped.parameters()) or not list(
        tapped.parameters()
    )
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("arch", LIBRARY)
def test_short_names_build_and_learn(arch: str) -> None:
    config = ModelConfig(arch=arch, kwargs=THIN[arch], steps=1)
    model = build_model(config, 5, seed=3)
    again = build_model(config, 5, seed=3)
    same_weights(model.state_dict(), again.state_dict())
    logits = forward_logits(model, torch.randn(2, 3, 64, 64))
    assert logits.shape[:2] == (2, 5)
    assert logits.shape[-1] == (64 if arch == "dpt" else logits.shape[-1])
    assert arch == "dpt" or logits.shape[-1] <= 16, "the loss upsamples, not the network"
    logits.square().mean().backward()
    with pytest.raises(ModelError, match="unknown kwargs widht"):
        build_model(ModelConfig(arch=arch, kwargs={**THIN[arch], "widht": 3}, steps=1), 5, 0)


def test_upernet_from_a_folder_leaves_the_upsampling_to_the_loss(tmp_path: Path) -> None:
    built = build_model(ModelConfig(arch="upernet", kwargs=THIN["upernet"], steps=1), 5, seed=3)
    built.save_pretrained(tmp_path)  # type: ignore[operator]
    model = build_model(ModelConfig(arch="upernet", weights=tmp_path, steps=0), 5, seed=4)
    images = torch.randn(2, 3, 64, 64)
    logits = forward_logits(model.eval(), images)
    assert logits.shape == (2, 5, 16, 16)
    torch.testing.assert_close(logits, forward_logits(built.eval(), images))


def test_upernet_without_a_backbone_says_what_is_missing() -> None:
    with pytest.raises(ModelError, match=r"backbone_config.*model_type"):
        build_model(ModelConfig(arch="upernet", steps=1), 5, 0)


class ByClasses(nn.Module):
    """Named as segmentation_models_pytorch does."""

    def __init__(self, classes: int, width: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(images))
        return logits


def test_a_constructor_that_says_classes() -> None:
    model = build_model(ModelConfig(arch=f"{__name__}:ByClasses", steps=1), 7, 0)
    assert logits_of(model(torch.zeros(1, 3, 4, 4))).shape == (1, 7, 4, 4)


def test_a_backbones_file_starts_a_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    donor = ByClasses(99)
    save_file(donor.encoder.state_dict(), tmp_path / "encoder.safetensors")
    save_file(donor.state_dict(), tmp_path / "whole.safetensors")
    for name, count in (("encoder", "2 of its 2"), ("whole", "2 of its 4")):
        config = ModelConfig(
            arch=f"{__name__}:ByClasses", steps=1, init=tmp_path / f"{name}.safetensors"
        )
        with caplog.at_level("INFO", logger="heteroakd_fast.train"):
            model = build_model(config, 5, 0)
        assert isinstance(model, ByClasses)
        assert torch.equal(model.encoder[0].weight, donor.encoder[0].weight)
        assert model.head.weight.shape[0] == 5
        assert count in caplog.text
        caplog.clear()
    save_file({"strange": torch.zeros(3)}, tmp_path / "strange.safetensors")
    with pytest.raises(ModelError, match="none of its 1 tensors fits"):
        build_model(config.model_copy(update={"init": tmp_path / "strange.safetensors"}), 5, 0)
