"""A trained student on images: `load_student`, `heteroakd-train predict`, export, docs/using.md."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_helpers import QUIET, same_weights, write_config

from heteroakd_fast.train import Student, load_student, pipeline, using
from heteroakd_fast.train.cli import main
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets.images import spread_palette
from heteroakd_fast.train.errors import DataError, ModelError
from heteroakd_fast.train.models import UNet
from heteroakd_fast.train.reading import load_config

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "using.md").read_text()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Config, pipeline.Outcome]]:
    threads = torch.get_num_threads()
    config = load_config(write_config(tmp_path_factory.mktemp("used"), steps=8))
    yield config, pipeline.run(config, QUIET)
    torch.set_num_threads(threads)


@pytest.fixture
def here(
    outcome: tuple[Config, pipeline.Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to work in, with runs/landcover and photos/ as in docs/using.md."""
    shutil.copytree(outcome[0].run, tmp_path / "runs" / "landcover")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a.jpg", (30, 50, 3)), ("b.png", (41, 23, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_file_is_enough(outcome: tuple[Config, pipeline.Outcome], tmp_path: Path) -> None:
    config, done = outcome
    for stage in ("teacher", "alone", "distilled"):
        for name in ("model", "best"):
            path = tmp_path / f"{stage}.safetensors"
            shutil.copy(config.run / stage / f"{name}.safetensors", path)
            student = load_student(path)
            assert (student.stage, student.config) == (stage, config)
            assert student.class_names == done.data.class_names
            assert student.palette == done.data.palette
            assert not student.model.training
            same_weights(student.model.state_dict(), load_file(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["mean"]) == list(config.data.mean)
    assert json.loads(metadata["std"]) == list(config.data.std)
    assert metadata["format"] == "pt"
    with pytest.raises(ModelError, match="got the stage distilled, expected alone"):
        load_student(path, "alone")


def test_weights_that_training_began_with_need_not_be_there(
    outcome: tuple[Config, pipeline.Outcome], tmp_path: Path
) -> None:
    begun = tmp_path / "begun.safetensors"
    shutil.copy(outcome[0].run / "alone" / "model.safetensors", begun)
    path = write_config(tmp_path, steps=1)
    arguments = ["--stages", "alone", "--student.weights", str(begun), "--student.init", str(begun)]
    assert main([str(path), *arguments]) == 0
    begun.unlink()
    assert load_student(tmp_path / "run").config.student.weights == begun


@pytest.mark.parametrize("present", [["teacher"], ["teacher", "alone"], ["alone", "distilled"]])
def test_the_stage_that_is_there(here: Path, present: list[str]) -> None:
    run = here / "runs" / "landcover"
    for stage in {"teacher", "alone", "distilled"} - set(present):
        shutil.rmtree(run / stage)
    assert load_student(run).path == run / present[-1] / "model.safetensors"
    assert load_student(run, present[0]).stage == present[0]  # type: ignore[arg-type]
    (run / present[-1] / "model.safetensors").unlink()
    assert load_student(str(run)).path == run / present[-1] / "best.safetensors"


def test_predictions_are_those_that_were_scored(outcome: tuple[Config, pipeline.Outcome]) -> None:
    config, done = outcome
    student = load_student(config.run)
    counts = np.zeros((3, 3), np.int64)
    for index in range(len(done.data.val)):
        image, label = done.data.val.read(index)
        # A view with negative strides, as OpenCV's images are often turned into RGB.
        mask = student.predict(np.ascontiguousarray(image[..., ::-1])[..., ::-1])
        valid = label != 255
        np.add.at(counts, (label[valid], mask[valid]), 1)
    hits = counts.diagonal()
    scores = done.results["distilled"].scores
    assert hits.sum() / counts.sum() == pytest.approx(scores.pixel_accuracy)
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    assert iou == pytest.approx(np.array(scores.class_iou), nan_ok=True)
    with pytest.raises(DataError, match=r"got float64 \[4, 4, 3\], expected uint8 \[H, W, 3\]"):
        student.predict(np.zeros((4, 4, 3)))


def test_predict(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", "runs/landcover", "photos", "photos/a.jpg", "--output", "new/masks"]
    assert main(command) == 0
    assert "new/masks: masks and overlays of 2 images" in capsys.readouterr().out
    student = load_student("runs/landcover")
    for path in (here / "photos").iterdir():
        expected = student.predict(path)
        with Image.open(path) as image, Image.open(f"new/masks/{path.stem}.png") as mask:
            assert (mask.mode, mask.size) == ("P", image.size)
            assert np.array_equal(np.asarray(mask), expected)
            colours = np.asarray(mask.convert("RGB")).astype(int)
            assert np.array_equal(colours, np.array(student.palette)[expected])
            between = (np.asarray(image.convert("RGB")).astype(int) + colours) / 2
        with Image.open(f"new/masks/{path.stem}-overlay.png") as overlay:
            assert np.abs(np.asarray(overlay) - between).max() <= 1
    assert len(list(Path("new/masks").iterdir())) == 4


def test_many_classes(outcome: tuple[Config, pipeline.Outcome]) -> None:
    names, cpu = tuple(map(str, range(300))), torch.device("cpu")
    model = UNet(300, width=2, levels=2).eval()
    with torch.no_grad():
        model.classifier.bias[299] = 1e4
    student = Student(model, Path(), "alone", names, spread_palette(300), outcome[0], cpu)
    image = np.zeros((8, 9, 3), np.uint8)
    mask, overlay = student.draw(image, student.predict(image))
    assert mask.mode == "I;16"
    assert (np.asarray(mask) == 299).all()
    assert np.abs(np.asarray(overlay) * 2.0 - student.palette[299]).max() <= 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing", "photos"], 1, "nothing: no such run; expected the folder of a run"),
        (["photos", "photos"], 1, "photos: nothing trained in it yet; expected distilled/model"),
        (["runs/landcover", "photos/c.png"], 1, "photos/c.png: cannot be read as an image"),
        (["runs/landcover", "new.safetensors"], 1, "new.safetensors: cannot be read as an image"),
        (["runs/landcover"], 1, "IMAGE: got none, expected image files or folders of them"),
        (["runs/landcover", "runs"], 1, "runs: holds no image (.bmp, "),
        (["runs/landcover", "photos", "--output", "photos/a.jpg"], 1, "cannot be written"),
        (["runs/landcover", "photos", "--output", "photos"], 1, "b.png is taken by photos/b.png"),
        (["runs/landcover", "photos", "photos/../a.png"], 1, "taken by photos/a.jpg"),
        (["runs/landcover", "photos", "--device", "none"], 2, "device: 'none' cannot be used"),
        (["photos/a.jpg", "photos"], 1, "photos/a.jpg: cannot be read as weights"),
        (["old.safetensors", "photos"], 1, "lacks stage, config, class_names, palette; expected"),
    ],
)
def test_errors(
    here: Path,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = load_file("runs/landcover/alone/model.safetensors")
    save_file(weights, "old.safetensors")
    shutil.copy("old.safetensors", "new.safetensors")
    before = sorted(here.rglob("*"))
    extra = [] if "--output" in arguments else ["--output", "masks"]
    assert main(["predict", *arguments, *extra]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_an_interrupt(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(using, "read_image", interrupted)
    assert main(["predict", "runs/landcover", "photos", "--output", "masks"]) == 130
    assert "interrupted; the files written so far are complete" in capsys.readouterr().err


def test_export(here: Path) -> None:
    export = runpy.run_path(str(ROOT / "examples" / "export_student.py"))["main"]
    program = export(["runs/landcover", "student.pt2", "--size", "32", "48"])
    student = load_student("runs/landcover")
    image = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)
    with torch.no_grad():
        expected = student.model(student.inputs(image))
    found = program.module()(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(found, expected)


def test_the_page_runs_as_it_stands(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```(python)?\n(.*?)```", PAGE, re.DOTALL)
    for language, block in blocks:
        if language:
            exec(block, names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            if program == "python":
                monkeypatch.setattr("sys.argv", arguments)
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            else:
                assert program == "heteroakd-train"
                assert main(arguments) == 0
    assert sum(map(len, PAGE.split("```")[1::2])) > 500
    assert (here / "student.pt2").is_file()
    assert names["mask"].shape == (1, 375, 500)  # type: ignore[attr-defined]
