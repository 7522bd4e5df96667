"""Networks and weights as people have them: what does not fit is refused before the first step."""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import sys
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from train_helpers import (
    CPU,
    QUIET,
    changed,
    distilling,
    plain,
    same_weights,
    weights_of,
    write_config,
)

from heteroakd_fast.train import logs, pipeline
from heteroakd_fast.train.config import Config, DistillConfig, ModelConfig
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.batches import _augmented, _read
from heteroakd_fast.train.errors import ModelError
from heteroakd_fast.train.files import locked
from heteroakd_fast.train.models import build_model, check_logits, stored_statistics
from heteroakd_fast.train.parallel import dry_run
from heteroakd_fast.train.reading import load_config
from heteroakd_fast.train.report import write_report
from heteroakd_fast.train.using import load_student

SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 1, 1],
    "decoder_hidden_size": 8,
}
State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "compiled, parallel": lambda state: prefixed("module._orig_mod.", state),
    "Lightning": lambda state: {"epoch": 3, "state_dict": prefixed("model.", state)},
    "Lightning, compiled": lambda state: {"state_dict": prefixed("net._orig_mod.", state)},
    "mmengine": lambda state: {"meta": {"epoch": 3}, "state_dict": state},
    "timm": lambda state: {
        "args": argparse.Namespace(lr=0.1),
        "state_dict": {key: value * 0 for key, value in state.items()},
        "state_dict_ema": prefixed("module.", state),
    },
    "ConvNeXt": lambda state: {"model": prefixed("x.", state), "model_ema": state},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("key", ["weights", "init"])
def test_weights_as_training_loops_save_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrapping: str, key: str
) -> None:
    caplog.set_level(logging.INFO)
    config = ModelConfig(arch="unet", steps=1)
    source = build_model(config, 3, seed=1).state_dict()
    torch.save(WRAPPINGS[wrapping](source), tmp_path / "w.pt")
    there = config.model_copy(update={key: tmp_path / "w.pt"})
    same_weights(build_model(there, 3, seed=2).state_dict(), source)
    assert ("_ema, " in caplog.text) == (wrapping in ("timm", "ConvNeXt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_half_precision_is_loaded_in_float32(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    config = ModelConfig(arch="segformer", kwargs=SEGFORMER, steps=1)
    source = build_model(config, 3, seed=1).to(dtype)
    if kind == "folder":
        source.save_pretrained(tmp_path)  # type: ignore[operator]
        path = tmp_path
    else:
        path = tmp_path / "w.safetensors"
        save_file(prefixed("_orig_mod.", source.state_dict()), path)
    model = build_model(config.model_copy(update={"weights": path}), 3, seed=2)
    same_weights(model.state_dict(), source.float().state_dict())


class Settings:
    """Whatever a training loop keeps beside its weights."""


def test_what_could_run_code_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("code of the file was run")

    caplog.set_level(logging.INFO)
    config = ModelConfig(arch="unet", steps=1, weights=tmp_path / "w.pt")
    source = build_model(config.model_copy(update={"weights": None}), 3, seed=1)
    beside = {"settings": Settings(), "log": tmp_path, "best": np.float64(0.5)}
    saved = {"state_dict": source.state_dict(), "hyper_parameters": beside}
    torch.save(saved, tmp_path / "w.pt")
    monkeypatch.setattr(Settings, "__new__", refuse)
    same_weights(build_model(config, 3, seed=2).state_dict(), source.state_dict())
    assert "scalar, numpy.dtype, pathlib.PosixPath and 1 more are left out" in caplog.text
    monkeypatch.undo()
    for content in (Settings(), source):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ModelError, match=r"holds a .*(Settings|UNet), .* state dict alone$"):
            build_model(config, 3, seed=0)
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="which could run code"):
        build_model(config, 3, seed=0)


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")


def shorter(path: Path, state: State) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)  # type: ignore[operator]
    path.write_bytes(path.read_bytes()[:-200])


def changed_weights(change: Callable[[Tensor], Tensor]) -> Callable[[Path, State], None]:
    return lambda path, state: torch.save(
        {k: change(v) if v.is_floating_point() else v for k, v in state.items()}, path
    )


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"


@pytest.mark.parametrize("key", ["weights", "init"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", LFS, "got a Git LFS pointer and not the file: run `git lfs pull`"),
        ("w.safetensors", LFS, "got a Git LFS pointer"),
        ("w.pth", b"\n<!DOCTYPE html><html>", "got an HTML or XML page.*download the file again"),
        ("w.pth", b"", "got an empty file"),
        ("w.h5", b"\x89HDF\r\n\x1a\n", "got HDF5"),
        ("w.onnx", b"\x08\x07\x12\x07pytorch", "got ONNX"),
        ("w.pkl", b"\x80\x04\x95\x0b.", "neither safetensors nor a state dict"),
        ("w.bin", bytes(range(200)), "neither safetensors nor a state dict"),
        ("w.zip", lambda path, _: zipped(path, "w.pth"), "a zip archive of w.pth: unpack"),
        (
            "w.pt",
            lambda path, _: zipped(path, "w/constants.pkl"),
            "got a TorchScript program: save",
        ),
        ("w.pth", shorter, "got an archive that is cut short"),
        ("w.safetensors", shorter, "damaged or cut short"),
        ("w.pth", lambda path, _: torch.save({}, path), "holds no tensor"),
        ("w.pth", lambda path, _: torch.save({"state_dict": {}, "a": 1}, path), "has no weights"),
        (
            "w.pth",
            lambda path, state: torch.save({"g": state, "d": state}, path),
            r"has weights in g, d .*, expected a mapping",
        ),
        ("w.pth", changed_weights(lambda v: v.to(torch.int8)), "int8.*expected dense floats"),
        ("w.pth", changed_weights(lambda v: v.to("meta")), "no content"),
        ("w.pth", changed_weights(lambda v: v * torch.nan), "not finite in classifier"),
    ],
)
def test_files_that_hold_no_weights(
    tmp_path: Path, name: str, content: Any, message: str, key: str
) -> None:
    config, path = ModelConfig(arch="unet", steps=1), tmp_path / name
    state = build_model(config, 3, seed=1).state_dict()
    path.write_bytes(content) if isinstance(content, bytes) else content(path, state)
    config = config.model_copy(update={key: path})
    with pytest.raises(ModelError, match=f"^{path}: .*{message}") as caught:
        build_model(config, 3, seed=0)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "save",
    [
        lambda path, state: save_file(state, path / "w.pth"),
        lambda path, state: torch.save(state, path / "w.safetensors"),
        lambda path, state: torch.save(
            {"model": state} | {"optimizer": {"state": {}, "param_groups": []}}, path / "w.pth"
        ),
        lambda path, state: torch.save({"epoch": 1, "model_state_dict": state}, path / "w.pth"),
        lambda path, state: torch.save({"net": state, "acc": 0.5}, path / "w.pth"),
        lambda path, state: torch.save(
            {"state_dict": {k: v * 0 for k, v in state.items()}, "ema_state_dict": state},
            path / "w.pth",
        ),
        lambda path, state: torch.save(
            {**prefixed("model.", state), "criterion.weight": torch.ones(3)}, path / "w.pth"
        ),
        lambda path, state: torch.save(
            {**prefixed("module.", state), "n_averaged": torch.tensor(3)}, path / "w.pth"
        ),
        lambda path, state: torch.save(
            state | {"total_ops": torch.zeros(1), "stem.0.total_params": torch.zeros(1)},
            path / "w.pth",
        ),
        lambda path, state: torch.save(
            {k: v for k, v in state.items() if "num_batches" not in k}, path / "w.pth"
        ),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_weights_in_other_customary_forms(tmp_path: Path, save: Any, folder: bool) -> None:
    config = ModelConfig(arch="unet", steps=1)
    source = build_model(config, 3, seed=1).state_dict()
    save(tmp_path, source)
    (path,) = tmp_path.iterdir()
    (tmp_path / "notes.txt").touch()
    there = config.model_copy(update={"weights": tmp_path if folder else path})
    same_weights(build_model(there, 3, seed=2).state_dict(), source)


def test_weights_in_shards(tmp_path: Path) -> None:
    config = ModelConfig(arch="unet", steps=1)
    source = build_model(config, 3, seed=1).state_dict()
    shards: list[State] = [{}, {}]
    for number, (name, value) in enumerate(source.items()):
        shards[number % 2][name] = value
    places = {name: f"w-{k}.safetensors" for k, shard in enumerate(shards) for name in shard}
    for k, shard in enumerate(shards):
        save_file(shard, tmp_path / f"w-{k}.safetensors")
    there = config.model_copy(update={"weights": tmp_path})
    with pytest.raises(ModelError, match="holds w-0.safetensors, w-1.safetensors; name one file"):
        build_model(there, 3, seed=2)
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    same_weights(build_model(there, 3, seed=2).state_dict(), source)
    (tmp_path / "w-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"index\.json: names w-1.safetensors, which .* lacks"):
        build_model(there, 3, seed=2)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """What save_pretrained writes."""
    config = ModelConfig(arch="segformer", kwargs=SEGFORMER, steps=1)
    build_model(config, 3, seed=1).save_pretrained(tmp_path / "w")  # type: ignore[operator]
    return tmp_path / "w"


def rewritten(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json that can be read"),
        (rewritten(model_type="dpt"), "describes a 'dpt', expected 'segformer'"),
        (rewritten(quantization_config={"quant_method": "gptq"}), "describes quantised weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(LFS), "got a Git LFS pointer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read as a folder of t"),
    ],
)
@pytest.mark.parametrize("key", ["weights", "init"])
def test_folders_of_transformers_that_cannot_be_used(
    written: Path, damage: Any, message: str, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(written)
    config = ModelConfig(arch="segformer", kwargs=SEGFORMER, steps=1, **{key: written})
    with pytest.raises(ModelError, match=message) as caught:
        build_model(config, 3, seed=0)
    assert str(caught.value).startswith(str(written))
    assert capfd.readouterr() == ("", "")


def test_a_pretrained_part_in_a_folder_of_transformers(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = ModelConfig(arch="segformer", kwargs=SEGFORMER, steps=1)
    whole = build_model(config, 3, seed=1)
    whole.segformer.save_pretrained(tmp_path / "part")  # type: ignore[union-attr,operator]
    for folder, classes, beside in ((written, 5, 2), (tmp_path / "part", 3, 16)):
        model = build_model(config.model_copy(update={"init": folder}), classes, seed=2)
        same_weights(
            model.segformer.state_dict(),
            whole.segformer.state_dict(),  # type: ignore[union-attr,operator]
        )
        assert f", {beside} of the model's start from the seed" in caplog.text
    # A file knows the names of the version that wrote it alone.
    file = config.model_copy(update={"weights": written / "model.safetensors"})
    with pytest.raises(ModelError, match="give its folder, whose names are translated"):
        build_model(file, 3, seed=2)


# -- mean and std --------------------------------------------------------------------------------

HALF = (0.5, 0.5, 0.5)


def with_preprocessor(folder: Path, **values: Any) -> None:
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **values}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (HALF, HALF)),
        ({"image_mean": 0.5, "rescale_factor": 1 / 255}, (HALF, HALF)),
        ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, (HALF, HALF)),
        ({"image_mean": None}, r"no mean and std can be read \(TypeError"),
        ({"image_std": [1.0, 0.0, 1.0]}, "expected positive numbers"),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_statistics_of_transformers(
    tmp_path: Path, values: dict[str, Any], expected: Any, folder: bool
) -> None:
    with_preprocessor(tmp_path, **values)
    weights = tmp_path if folder else tmp_path / "w.pt"
    if isinstance(expected, str):
        with pytest.raises(ModelError, match=expected):
            stored_statistics(weights)
    else:
        assert stored_statistics(weights) == (tmp_path / "preprocessor_config.json", expected)


def test_metadata_of_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"mean": "?", "std": "1"})
    with pytest.raises(ModelError, match=r"w.safetensors: no mean and std .*JSONDecodeError"):
        stored_statistics(path)
    with_preprocessor(tmp_path, do_flip_channel_order=True)
    stored_statistics(tmp_path)
    assert "asks for BGR" in caplog.text


def said_of(config: Config) -> tuple[Config, list[str]]:
    stream = io.StringIO()
    resolved = pipeline.with_statistics(config, Console(file=stream, width=500))
    return resolved, stream.getvalue().splitlines()


def test_statistics_are_said_where_they_differ(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    assert said_of(config) == (config, [])
    with_preprocessor(tmp_path)
    config = changed(config, teacher={"weights": tmp_path / "w.pt"})
    resolved, lines = said_of(config)
    assert resolved.data_of("teacher").std == HALF
    assert resolved.data_of("alone") == config.data
    assert len(lines) == 1
    assert f"{HALF} and std {HALF}, as {tmp_path}" in lines[0]
    set_ = changed(config, teacher={"mean": config.data.mean, "std": config.data.std})
    resolved, lines = said_of(set_)
    assert resolved == set_
    assert "configured" in lines[0]
    assert lines[0].endswith(f"says {HALF} and {HALF}")
    with pytest.raises(ValueError, match="mean and std: set both or none"):
        ModelConfig(arch="unet", steps=1, mean=HALF)


class Means(nn.Module):
    """Keeps the means of what it gets."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)
        self.seen: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        if images.std() > 0:  # not in a dry run
            self.seen.append(float(images.mean()))
        logits: Tensor = self.conv(images)
        return logits


def test_each_network_gets_images_in_its_own_way(tmp_path: Path) -> None:
    """Images of 0 and 1 in turn: what a network gets has the mean (0.5 - mean) / std."""
    path = write_config(tmp_path, steps=2)
    for file in (tmp_path / "pictures" / "images").iterdir():
        pixels = np.indices((40, 40)).sum(0) % 2 * np.uint8(255)
        Image.fromarray(np.repeat(pixels[..., None], 3, 2).astype(np.uint8)).save(file)
    own = {"arch": f"{__name__}:Means", "kwargs": {}, "tap": None}
    config = changed(load_config(path), teacher={**own, "mean": HALF, "std": HALF}, student=own)
    config = changed(config, data={"mean": (0.25,) * 3, "std": (0.5,) * 3})
    outcome = pipeline.run(config, QUIET)
    write_report(outcome, outcome.config, QUIET)
    expected = {"teacher": 0.0, "alone": 0.5, "distilled": 0.5}
    for stage, model in outcome.models.items():
        assert isinstance(model, Means)
        assert len(model.seen) >= 3
        assert model.seen == pytest.approx([expected[stage]] * len(model.seen), abs=1e-5), stage
        student = load_student(config.run, stage)  # type: ignore[arg-type]
        image = np.asarray(Image.open(next((tmp_path / "pictures" / "images").iterdir())))
        assert float(student.inputs(image).mean()) == pytest.approx(expected[stage], abs=1e-5)
    used = stored_statistics(config.run / "teacher" / "model.safetensors")
    assert used == (config.run / "teacher" / "model.safetensors", (HALF, HALF))


# -- one pass before training --------------------------------------------------------------------


class FixedGrid(nn.Module):
    """Position embeddings for images of 32 x 32, as those of DPT."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, num_classes, 8, 8))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(images) + self.positions
        return logits


class PooledNorm(nn.Module):
    """A batch norm of one value for an image, as that of DeepLabV3+."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)
        self.norm = nn.BatchNorm2d(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.conv(images)
        result: Tensor = logits + self.norm(logits.mean((2, 3), keepdim=True))
        return result


class Several(nn.Module):
    """Auxiliary logits before the logits; in evaluation, the logits alone if `bare`."""

    def __init__(self, num_classes: int, kind: Any = dict, bare: bool = False) -> None:
        super().__init__()
        self.aux, self.main = nn.Conv2d(3, 7, 1), nn.Conv2d(3, num_classes, 1)
        self.kind, self.bare = kind, bare

    def forward(self, images: Tensor) -> Any:
        if self.bare and not self.training:
            return self.main(images)
        parts = {"aux": self.aux(images), "final": self.main(images)}
        return parts if self.kind is dict else self.kind(parts.values())


def namespace(parts: Iterable[Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(("aux", "final"), parts, strict=True)))


class Frozen(nn.Module):
    """What its tap gives has no gradient: frozen, or checkpointed by a copy of torch's own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.kind = kind
        self.body.requires_grad_(kind == "reentrant")

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "reentrant":
            images = images.clone().requires_grad_(torch.is_grad_enabled())
            logits: Tensor = self.head(checkpoint(self.body, images, use_reentrant=True))
        else:
            logits = self.head(self.body(images))
        return logits


def test_shapes_of_validation_are_tried(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, steps=1))
    own = {"arch": f"{__name__}:FixedGrid", "kwargs": {}, "tap": None}
    config = changed(config, student=own, teacher={"tap": None}, stages=("teacher", "distilled"))
    with pytest.raises(ModelError, match=r"^student: .* 40 x 40 .*set data.window = \[32, 32\]"):
        pipeline.run(config, QUIET)
    assert not list(config.run.glob("*/*.safetensors"))
    outcome = pipeline.run(changed(config, data={"window": 32}), QUIET)
    write_report(outcome, outcome.config, QUIET)


def test_a_batch_norm_of_one_value(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, steps=1))
    own = {"arch": f"{__name__}:PooledNorm", "kwargs": {}, "tap": None}
    config = changed(config, student=own, stages=("alone",))
    message = "^student: PooledNorm: a batch norm has one value .* micro-batch of 1 images of 32 x"
    with pytest.raises(ModelError, match=message):
        pipeline.run(changed(config, optim={"accumulate": 2}), QUIET)
    pipeline.run(config, QUIET)


@pytest.mark.parametrize(
    ("kind", "output"), [(dict, "final"), (dict, 1), (tuple, 1), (list, -1), (namespace, "final")]
)
@pytest.mark.parametrize("bare", [True, False])
def test_the_output_that_holds_the_logits(kind: Any, output: int | str, bare: bool) -> None:
    arch, kwargs = f"{__name__}:Several", {"kind": kind, "bare": bare}
    config = ModelConfig.model_construct(arch=arch, kwargs=kwargs, output=output, steps=1)
    model = build_model(config, 3, seed=0)
    check_logits(model, 3, (8, 8), CPU)
    assert model.train()(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        (dict, None, r"returned a dict \(aux: .*\); expected .* by student.output or teacher.outp"),
        (
            tuple,
            None,
            r"logits have shape \(1, 7, .* of a tuple \(0: .*\), choose by student.outp",
        ),
        (dict, "logit", r"output: got 'logit', but the network returned a dict \(aux: \(1, 7, 8"),
        (tuple, 2, "output: got 2, but"),
    ],
)
def test_several_outputs(kind: type, output: int | str | None, message: str) -> None:
    arch, kwargs = f"{__name__}:Several", {"kind": kind}
    config = ModelConfig.model_construct(arch=arch, kwargs=kwargs, output=output, steps=1)
    with pytest.raises(ModelError, match=message):
        check_logits(build_model(config, 3, seed=0), 3, (8, 8), CPU)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", ["frozen", "reentrant"])
def test_features_without_a_graph(kind: str) -> None:
    objective = distilling(Frozen(kind), Frozen("frozen"), DistillConfig(), taps=("body", "body"))
    with pytest.raises(ModelError, match="use_reentrant=False"):
        dry_run(objective, (8, 8), CPU, 2)
    dry_run(objective, (8, 8), CPU)


def test_a_network_that_is_frozen_as_a_whole(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    with pytest.raises(ModelError, match="every parameter is frozen"):
        dry_run(plain(nn.Conv2d(3, 3, 1).requires_grad_(False), config), (8, 8), CPU, 2)


def test_a_dry_run_leaves_no_trace(tmp_path: Path) -> None:
    objective = plain(PooledNorm(3), load_config(write_config(tmp_path)))
    before, state = weights_of(objective), torch.get_rng_state()
    dry_run(objective, (8, 8), CPU, 2)
    same_weights(objective.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in objective.parameters())


# -- environments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")]
)
def test_a_file_system_without_locks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=error))
    with locked(tmp_path / "run", "run"):
        assert (tmp_path / "run").is_dir()
    assert f"file system has no locks ({error}); let no other run" in caplog.text
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=denied))
    with pytest.raises(PermissionError), locked(tmp_path / "run", "run"):
        pass


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("labelled", [None, 2])
def test_workers_that_are_no_forks(tmp_path: Path, method: str, labelled: int | None) -> None:
    config = changed(load_config(write_config(tmp_path)), data={"labelled": labelled})
    config = config.with_unlabelled_index()
    data = load_data(config.data, config.distill.unlabelled_index)
    source, order = pipeline.training_sets(config, data)[0]["distilled"]
    read = partial(_augmented, source, config.data, order)
    keys = [[(step, slot) for slot in range(2)] for step in range(2)]
    found = list(_read(read, keys, 1, multiprocessing_context=method))
    for one, other in zip(found, map(read, keys), strict=True):
        assert all(map(torch.equal, one, other))


def test_tensorboard_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    logs._say_without_tensorboard.cache_clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for _ in range(2):
        with logs.Records(tmp_path, 0, tensorboard=True) as records:
            records.line({"kind": "train", "step": 1, "loss": 1.0})
    assert caplog.text.count("TensorBoard is not installed") == 1
