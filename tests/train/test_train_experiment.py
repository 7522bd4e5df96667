"""The experiment: what it is asked for is looked at first, and what goes wrong is one message."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn
from train_helpers import write_config

from heteroakd_fast.train.comparison import Cell, Options, Place, gain, verdict
from heteroakd_fast.train.experiment import main
from heteroakd_fast.train.objectives import TeacherMemory

ONE = ("--pairs", "pair.toml", "--methods", "task", "kd", "--seeds", "1", "--threads", "1")
ONE += ("--labelled", "2", "--more-labelled")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a pair that train for two steps."""
    lines = write_config(tmp_path, steps=2).read_text(encoding="utf-8").splitlines()
    pair, rest = lines.index("[teacher]"), lines.index("[optim]")
    data = [line for line in lines[:pair] + lines[rest:] if not line.startswith(("run", "thre"))]
    (tmp_path / "data.toml").write_text("\n".join(data), encoding="utf-8")
    (tmp_path / "pair.toml").write_text("\n".join(lines[pair:rest]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def experiment(*arguments: str) -> int:
    return main(["--data", "data.toml", "--run", "run", *ONE, *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seeds", "0"), "--seeds is 0, expected 1 or more"),
        (("--steps", "0"), "--steps is 0, expected 1"),
        (("--teacher-steps", "0"), "--teacher-steps is 0, expected 1"),
        (("--threads", "0"), "--threads is 0, expected 1"),
        (("--workers", "-1"), "--workers is -1, expected 0"),
        (("--labelled", "0"), "--labelled is 0, expected 1"),
        (("--first-seed", "-1"), "--first-seed is -1, expected 0"),
        (("--pairs",), "--pairs is empty"),
        (("--methods",), "--methods is empty"),
        (("--methods", "task", "task"), "each once"),
        (("--pairs", "pair.toml", "other/pair.toml"), "name of its own"),
        # Not when the teacher and the first student have been trained.
        (("--methods", "task", "heteroakdd"), "did you mean heteroakd?"),
    ],
)
def test_options_are_checked_before_training(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert experiment(*arguments) == 2
    assert expected in capsys.readouterr().err.replace("\n", " ")
    assert not (place / "run").exists()


def test_a_folder_that_cannot_be_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment("--run", "data.toml") == 1
    assert "data.toml: File exists" in capsys.readouterr().err
    (place / "run").mkdir()
    with FileLock(place / "run" / ".lock"):
        assert experiment() == 1
    assert "another experiment is using this folder" in capsys.readouterr().err


def test_nothing_to_score_and_names_that_mean_something_elsewhere(place: Path) -> None:
    """After hours of training, neither may cost the table."""
    for path in (place / "pictures" / "masks").iterdir():
        if path.stem != "p0":  # which is trained on
            Image.fromarray(np.full((40, 40), 255, np.uint8)).save(path)
    os.rename("pair.toml", "[b].toml")
    assert experiment("--run", "[/x]", "--pairs", "[b].toml") == 0
    results = json.loads((place / "[/x]" / "results.json").read_text(encoding="utf-8"))
    assert [cell["miou"] for cell in results["students"]] == [None, None]


def test_an_interrupted_experiment_trains_only_what_it_lacks(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from heteroakd_fast.train import pipeline

    more = ("--more-labelled", "3", "--more-methods", "task", "kd", "--more-seeds", "2")
    assert experiment("--seeds", "2", *more) == 0
    whole = (place / "run" / "results.json").read_text(encoding="utf-8")
    lines = (place / "run" / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 * 2 + 2 * 2
    table = (place / "run" / "table.md").read_text(encoding="utf-8")
    assert "| 2 labels | 3 labels |" in table
    assert not list((place / "run" / "pair").glob("kd-*"))  # not needed any more

    trained = []
    original = pipeline.run
    monkeypatch.setattr(
        pipeline, "run", lambda c, *a, **k: trained.append(c.run) or original(c, *a, **k)
    )
    kept = "\n".join([*lines[:3], lines[3][:20]])
    (place / "run" / "cells.jsonl").write_text(kept + "\n", encoding="utf-8")
    assert experiment("--seeds", "2", *more) == 0
    assert len(trained) == 6
    again = (place / "run" / "results.json").read_text(encoding="utf-8")
    assert [
        {k: v for k, v in cell.items() if k != "seconds"} for cell in json.loads(again)["students"]
    ] == [
        {k: v for k, v in cell.items() if k != "seconds"} for cell in json.loads(whole)["students"]
    ]


def test_gains_are_taken_seed_by_seed() -> None:
    same = gain({0: 50.0, 1: 60.0, 2: 40.0}, {0: 48.0, 1: 58.0, 2: 38.0, 7: 99.0})
    assert same == pytest.approx((2.0, 2.0, 2.0))
    assert str(same) == "+2.0 (+2.0 to +2.0)"
    low, high = gain(dict(enumerate([0.0, 1.0, 2.0, 3.0])), dict.fromkeys(range(4), 0.0))[1:]
    assert 0.0 < low < 1.5 < high < 3.0
    assert str(gain({0: 1.0}, {0: 3.0})) == "-2.0"


@pytest.mark.parametrize(
    ("better", "said"), [(3.0, "beats KD:"), (-1.0, "does not beat KD beyond")]
)
def test_the_first_sentence(better: float, said: str) -> None:
    options = Options(pairs=("a", "b"), seeds=3)
    cells = {}
    for pair in options.pairs:
        for seed in range(3):
            for method, miou in (("kd", 40.0), ("kd-t2", 42.0), ("heteroakd", 42.0 + better)):
                scores = miou + seed
                cells[Place(pair, 12, method, seed)] = Cell(scores / 100, 0.5, {"x": 0.5}, 1.0)
    assert said in verdict(options, cells)
    assert f"a {better:+.1f}" in verdict(options, cells)


def test_a_teachers_memory() -> None:
    asked = []

    class Teacher(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            return images[:, :2, ::4, ::4].contiguous()

    memory, images = TeacherMemory(), torch.randn(5, 3, 8, 8)
    whole = memory.logits(Teacher(), images)
    assert torch.equal(whole, images[:, :2, ::4, ::4])
    assert torch.equal(memory.logits(Teacher(), images[[3, 1, 3]]), whole[[3, 1, 3]])
    assert asked == [1] * 5
    small = TeacherMemory(2 * whole[0].nbytes)
    assert torch.equal(small.logits(Teacher(), images), whole)
    assert torch.equal(small.logits(Teacher(), images[:1]), whole[:1])
    assert small.room >= 0
