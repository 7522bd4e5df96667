"""The command from end to end on a tiny data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from train_helpers import run_command, write_config

from heteroakd_fast.train.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("job")
    path = write_config(folder, steps=80)
    done = run_command(path, "--amp", "bf16", "--log.eval-every", "40")
    assert done.returncode == 0, done.stderr
    return path, folder / "run", done.stdout


def test_results(finished: tuple[Path, Path, str]) -> None:
    _, run, printed = finished
    results = json.loads((run / "results.json").read_text())
    for stage in ("teacher", "alone", "distilled"):
        scores = results["stages"][stage]
        # The stripes are easy: whoever learns nothing stays below a third.
        assert scores["miou"] > 0.5, stage
        assert len(scores["class_iou"]) == 3
        assert f"{100 * scores['miou']:.1f}" in printed
    gain = results["stages"]["distilled"]["miou"] - results["stages"]["alone"]["miou"]
    assert results["gain"] == pytest.approx(gain)
    assert results["config"]["amp"] == "bf16"
    alone, distilled = (100 * results["stages"][s]["miou"] for s in ("alone", "distilled"))
    headline = (
        f"Distilled: mIoU {distilled:.1f} %, student alone {alone:.1f} %: gain "
        f"{round(100 * gain, 1) + 0.0:+.1f} points (one seed)."
    )
    assert printed.splitlines()[-1] == headline
    assert str(run / "report.html") in printed
    # The output is no terminal: every stage has a line early and one at its end.
    for stage in ("teacher", "alone", "distilled"):
        assert f"{stage} 3/80  loss" in printed
        assert f"{stage} 80/80  loss" in printed
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"<h1>{headline}</h1>" in page
    assert page.count("data:image/svg+xml") == page.count("data:image/png") == 1


def test_figure_shows_something(finished: tuple[Path, Path, str]) -> None:
    with Image.open(finished[1] / "report.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 500
    # The colours of the three classes and of both maps, not an empty canvas.
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    # A prediction that was not drawn would be black.
    assert (pixels == 0).all(axis=2).mean() < 0.04
    # Titles and the legend are on white; nothing else is.
    assert 0.1 < (pixels == 255).all(axis=2).mean() < 0.35


def test_the_same_command_again_skips_everything(
    finished: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, run, _ = finished
    before = json.loads((run / "results.json").read_text())
    weights = (run / "distilled" / "model.safetensors").stat().st_mtime_ns
    (run / "report.png").unlink()
    assert main([str(path), "--amp", "bf16", "--log.eval-every", "40"]) == 0
    assert json.loads((run / "results.json").read_text()) == before
    assert (run / "distilled" / "model.safetensors").stat().st_mtime_ns == weights
    assert (run / "report.png").exists()
    assert "going on" not in capsys.readouterr().out


def test_other_configuration_in_the_same_folder(
    finished: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, run, _ = finished
    before = sorted(run.rglob("*"))
    assert main([str(path), "--amp", "bf16", "--optim.lr", "0.01"]) == 2
    assert sorted(run.rglob("*")) == before
    assert run / ".lock" not in before
    message = capsys.readouterr().err
    assert "optim.lr: 0.003 -> 0.01" in message
    assert "--resume-anyway" in message


def test_two_runs_in_one_folder(
    finished: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, run, _ = finished
    with FileLock(run / ".lock"):
        assert main([str(path)]) == 1
    assert "another run is using this folder" in capsys.readouterr().err


def test_trained_teacher_from_a_file(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, run, _ = finished
    weights = run / "teacher" / "model.safetensors"
    arguments = ["--teacher.steps", "0", "--teacher.weights", weights, "--student.steps", "3"]
    # Logits only, and the networks of the other run's pictures.
    taps = ["--teacher.tap", "None", "--student.tap", "None", "--run", tmp_path / "run"]
    assert main(list(map(str, [path, *arguments, *taps]))) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    first = json.loads((run / "results.json").read_text())
    # Evaluated in full precision here and in bf16 there.
    assert results["stages"]["teacher"]["miou"] == pytest.approx(
        first["stages"]["teacher"]["miou"], abs=0.02
    )
    assert results["stages"]["teacher"]["steps"] == 0


def test_bad_data_stops_without_a_traceback_or_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    (tmp_path / "pictures" / "masks" / "p3.png").unlink()
    assert main([str(path), "--run", str(tmp_path / "of" / "two")]) == 1
    message = capsys.readouterr().err
    assert "p3.png" in message
    assert "Traceback" not in message
    assert not (tmp_path / "of").exists()


def test_a_run_folder_with_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, steps=1)
    folder = tmp_path / "[bold]a[" / "red]"  # a closing tag of rich's markup
    assert main([str(path), "--stages", "alone", "--run", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    (tmp_path / "file").write_text("")
    assert main([str(path), "--run", str(tmp_path / "file" / "run")]) == 1
    message = capsys.readouterr().err
    assert "Not a directory" in message
    assert "Traceback" not in message


def test_messages_come_out_as_they_are(tmp_path: Path) -> None:
    """No emoji, no markup, and a path in one piece, however long it is."""
    path = write_config(tmp_path, steps=4)
    folder = tmp_path / ":smile:" / "[bold]" / ("long-name-" * 15)
    arguments = [str(path), "--stages", "alone", "--run", str(folder)]
    assert main([*arguments, "--student.steps", "2"]) == 0
    done = run_command(*arguments, "--resume-anyway")
    assert done.returncode == 0, done.stderr
    assert f"{folder}/report.html, " in done.stdout
    assert f"WARNING: {folder}/alone: was begun with another configuration:" in done.stderr
