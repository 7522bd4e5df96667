"""The experiment: what it is asked for is looked at first, and what goes wrong is one message."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from train_helpers import write_config

from heteroakd_fast.train.experiment import main

ONE = ("--pairs", "pair.toml", "--methods", "task", "kd", "--seeds", "1", "--threads", "1")


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
        Image.fromarray(np.full((40, 40), 255, np.uint8)).save(path)
    os.rename("pair.toml", "[b].toml")
    assert experiment("--run", "[/x]", "--pairs", "[b].toml") == 0
    results = json.loads((place / "[/x]" / "results.json").read_text(encoding="utf-8"))
    assert [cell["miou"] for cell in results["students"]] == [None, None]
