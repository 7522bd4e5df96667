"""Checkpoints with a good checksum and another content: refused in one message, each of them."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_helpers import write_config

from heteroakd_fast.train.checkpoint import _MAGIC, NEWEST, PREVIOUS, load_checkpoint
from heteroakd_fast.train.cli import main

State = dict[str, Any]
WEIGHT = "encoder.0.0.0.weight"
TRAINED = f"model.{WEIGHT}"


def write(path: Path, state: object) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path.write_bytes(_MAGIC + hashlib.sha256(content).digest() + content)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A configuration, and the state of its run at step 8 of 10."""
    folder = tmp_path_factory.mktemp("begun")
    path = write_config(folder)
    threads = torch.get_num_threads()
    assert main([str(path), "--stages", "alone"]) == 0
    torch.set_num_threads(threads)
    stage = folder / "run" / "alone"
    (stage / NEWEST).unlink()
    state = load_checkpoint(stage)
    assert state is not None
    assert state["step"] == 8
    shutil.rmtree(folder / "run")
    return path, state


def resumed(path: Path, content: object) -> tuple[int, bytes, bytes]:
    """The exit code, and the checkpoint before and after."""
    newest = path.parent / "run" / "alone" / NEWEST
    shutil.rmtree(path.parent / "run", ignore_errors=True)
    newest.parent.mkdir(parents=True)
    write(newest, content)
    before = newest.read_bytes()
    code = main([str(path), "--stages", "alone"])
    return code, before, newest.read_bytes()


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [copied(inner) for inner in value]
    return value.clone() if isinstance(value, Tensor) else value


def put(*keys: Any, value: Any) -> Callable[[State], None]:
    """Another value; where it is a function, of what was there."""

    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return change


def remove(*keys: Any) -> Callable[[State], None]:
    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def both(*changes: Callable[[State], None]) -> Callable[[State], None]:
    def change(state: State) -> None:
        for one in changes:
            one(state)

    return change


def numpys(place: int, value: Any) -> Callable[[State], None]:
    return put("random", 0, "numpy", value=lambda old: (*old[:place], value, *old[place + 1 :]))


NAN = torch.tensor(float("nan"))
CASES: dict[str, tuple[Callable[[State], None], str]] = {
    "model is a list": (put("model", value=[1]), "model: got list"),
    "model lacks a weight": (remove("model", WEIGHT), f"model.{WEIGHT}: missing"),
    "model has another weight": (put("model", "x", value=NAN * 0 + 1), "not finite"),
    "model has one more": (put("model", "x", value=torch.ones(1)), "model.x: unknown"),
    "weight of another shape": (
        put("model", WEIGHT, value=torch.ones(2)),
        f"model.{WEIGHT}: got float32 (2,), expected float32 (6, ",
    ),
    "weight of another dtype": (
        put("model", WEIGHT, value=lambda w: w.double()),
        f"model.{WEIGHT}: got float64 ",
    ),
    "weight of integers": (put("model", WEIGHT, value=lambda w: w.long()), "got int64"),
    "weight is a number": (put("model", WEIGHT, value=3), "got int, expected float32"),
    "weight is None": (put("model", WEIGHT, value=None), "got NoneType, expected float32"),
    "weight is sparse": (put("model", WEIGHT, value=lambda w: w.to_sparse()), ""),
    "weight on no device": (
        put("model", WEIGHT, value=lambda w: torch.empty_like(w, device="meta")),
        "",
    ),
    "weight of a terabyte": (
        put("model", WEIGHT, value=torch.ones(1).expand(1 << 40)),
        "got float32 (1099511627776,)",
    ),
    "weight that is not finite": (put("model", WEIGHT, value=lambda w: w / 0), "not finite"),
    "weight excused": (
        both(
            put("model", WEIGHT, value=lambda w: w * NAN),
            put("never_finite", value=[f"model.{WEIGHT}"]),
        ),
        "which are trained",
    ),
    "loss has a weight": (put("loss", "x", value=torch.ones(1)), "loss.x: unknown"),
    "loss is None": (put("loss", value=None), "loss: got NoneType"),
    "never_finite is a number": (put("never_finite", value=3), ""),
    "never_finite has numbers": (put("never_finite", value=[3]), "never_finite.0: got int 3"),
    "optimizer is a list": (put("optimizer", value=[]), "optimizer: got list"),
    "optimizer is empty": (put("optimizer", value={}), "missing"),
    "optimizer lacks a weight": (
        remove("optimizer", TRAINED),
        f"optimizer.{TRAINED}: missing",
    ),
    "optimizer lacks it twice": (
        both(remove("optimizer", TRAINED), put("optimized", value=[])),
        "unknown",
    ),
    "optimizer knows another": (
        both(
            put("optimizer", "x", value={"step": torch.ones(())}),
            put("optimized", value=lambda names: [*names, "x"]),
        ),
        "optimizer.x: unknown",
    ),
    "optimizer's entry is None": (put("optimizer", TRAINED, value=None), "got NoneType"),
    "optimizer lacks a momentum": (
        remove("optimizer", TRAINED, "exp_avg"),
        f"optimizer.{TRAINED}.exp_avg: missing",
    ),
    "optimizer has one more": (
        put("optimizer", TRAINED, "momentum_buffer", value=torch.ones(1)),
        "momentum_buffer: unknown",
    ),
    "momentum of another shape": (
        put("optimizer", TRAINED, "exp_avg", value=torch.ones(3)),
        "exp_avg: got float32 (3,)",
    ),
    "momentum of another dtype": (
        put("optimizer", TRAINED, "exp_avg_sq", value=lambda m: m.half()),
        "exp_avg_sq: got float16",
    ),
    "count of -1": (put("optimizer", TRAINED, "step", value=-torch.ones(())), "got -1, expected 1"),
    "count above the step": (
        put("optimizer", TRAINED, "step", value=torch.tensor(9.0)),
        "got 9, expected 1 to 8",
    ),
    "count is no tensor": (
        put("optimizer", TRAINED, "step", value=8),
        "got int, expected float32 ()",
    ),
    "scaler of fp16": (put("scaler", value={"scale": 2.0}), "scaler.scale: unknown"),
    "scaler is a list": (put("scaler", value=[]), "scaler: got list"),
    "random is empty": (put("random", value=[]), "random: got list of 0"),
    "random is a dict": (put("random", value=lambda r: r[0]), "random: got dict"),
    "random of None": (put("random", value=[None]), "random.0: got NoneType"),
    "random lacks torch": (remove("random", 0, "torch"), "random.0.torch: missing"),
    "random has one more": (put("random", 0, "jax", value=1), "random.0.jax: unknown"),
    "torch's is short": (put("random", 0, "torch", value=lambda t: t[:9]), "got uint8 (9,)"),
    "torch's is of floats": (put("random", 0, "torch", value=lambda t: t.float()), "got float32"),
    "torch's is zero": (put("random", 0, "torch", value=lambda t: t * 0), "random.0: "),
    "python's is a list": (put("random", 0, "python", value=[3]), "random.0.python: got list"),
    "python's is short": (
        put("random", 0, "python", value=lambda p: (p[0], p[1][:9], p[2])),
        "random.0.python.1: got tuple of 9",
    ),
    "python's is of words": (
        put("random", 0, "python", value=lambda p: (p[0], ("x",) * 625, p[2])),
        "random.0.python.1.0: got str",
    ),
    "python's version": (put("random", 0, "python", value=lambda p: (9, *p[1:])), "random.0: "),
    "python's position": (
        put("random", 0, "python", value=lambda p: (p[0], (*p[1][:-1], 10**6), p[2])),
        "random.0: ",
    ),
    "numpy's name": (numpys(0, "PCG64"), "random.0: "),
    "numpy's keys": (numpys(1, torch.ones(3, dtype=torch.int64)), "numpy.1: got int64 (3,)"),
    "numpy's position": (numpys(2, 10**9), "expected 0 to 624"),
    "numpy is None": (put("random", 0, "numpy", value=None), "numpy: got NoneType"),
    "best_miou is a word": (put("best_miou", value="0.5"), "best_miou: got str '0.5'"),
    "best_miou is NaN": (put("best_miou", value=float("nan")), "best_miou: got float nan"),
    "best_miou is 5": (
        put("best_miou", value=5.0),
        "best_miou: got float 5.0; Input should be less than or equal to 1",
    ),
    "scores are a list": (put("scores", value=[0.5]), "scores: got list"),
    "scores lack one": (remove("scores", "miou"), "scores.miou: got dict; Field required"),
    "scores have one more": (put("scores", "dice", value=0.5), "scores.dice: got float 0.5; Extra"),
    "scores of two classes": (put("scores", "class_iou", value=(0.5, 0.5)), "got tuple of 2"),
    "scores of words": (put("scores", "class_iou", value=("a",) * 3), "class_iou.0: got str"),
    "scores of no class": (put("scores", "class_iou", value=3), "class_iou: got int"),
    "scores above 1": (put("scores", "miou", value=7.0), "scores.miou: got float 7.0"),
    "seconds below 0": (put("seconds", value=-1.0), "seconds: got float -1.0"),
    "seconds without end": (put("seconds", value=float("inf")), "seconds: got float inf"),
    "seconds is a word": (put("seconds", value="x"), "seconds: got str"),
    "names of numbers": (put("names", value=lambda n: [0] * len(n)), "names.0: got int"),
    "a name too few": (put("names", value=lambda n: n[1:]), "rows: got float32"),
    "rows of one axis": (put("rows", value=torch.ones(4)), "rows: got float32 (4,)"),
    "rows are a list": (put("rows", value=[1.0]), "rows: got list"),
    "rows of integers": (put("rows", value=lambda r: r.long()), "rows: got int64"),
    "step below 0": (put("step", value=-1), "step: got int -1"),
    "step beyond the end": (put("step", value=11), "step: got 11, expected 0 to 10"),
    "step is a word": (put("step", value="8"), "step: got str '8'"),
    "step is a fraction": (put("step", value=8.5), "step: got float 8.5"),
    "step is true": (put("step", value=True), "step: got bool True"),
    "step of an earlier time": (put("step", value=3), "got 8, expected 1 to 3"),
    "another stage": (put("stage", value="teacher"), "stage: got 'teacher', expected 'alone'"),
    "fingerprint is a list": (put("fingerprint", value=[]), "fingerprint: got list"),
    "fingerprint is empty": (put("fingerprint", value={}), "absent"),
    "fingerprint of numbers": (put("fingerprint", "seed", value=1), "fingerprint.seed: got int 1"),
    "a key too many": (put("x", value=1), "x: got int 1"),
    "a key too few": (remove("rows"), "lacks rows"),
    "keys that are no names": (put(3, value=1), "expected a dict with names for keys"),
}


@pytest.mark.parametrize("case", CASES)
def test_another_content_is_refused(
    begun: tuple[Path, State], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = begun
    change, expected = CASES[case]
    state = copied(state)
    change(state)
    code, before, after = resumed(path, state)
    message = capsys.readouterr().err
    assert code in (1, 2), message
    assert expected in message
    assert "last.ckpt" in message or str(path.parent / "run" / "alone") in message
    assert "Traceback" not in message
    assert before == after, "nothing was trained"


@pytest.mark.parametrize("content", [[1, 2], None, torch.ones(3), {}, "text"], ids=str)
def test_no_state_at_all(
    begun: tuple[Path, State], content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    code, before, after = resumed(begun[0], content)
    assert code == 1
    assert before == after
    assert "Traceback" not in capsys.readouterr().err


def test_what_was_not_changed_is_resumed(
    begun: tuple[Path, State], capsys: pytest.CaptureFixture[str]
) -> None:
    code, before, after = resumed(begun[0], copied(begun[1]))
    assert code == 0
    assert before != after
    assert "going on at step 8" in capsys.readouterr().out


@pytest.mark.parametrize("name", [NEWEST, PREVIOUS])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["FIFO", "directory"])
def test_a_checkpoint_is_a_regular_file(
    begun: tuple[Path, State], name: str, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = begun
    shutil.rmtree(path.parent / "run", ignore_errors=True)
    folder = path.parent / "run" / "alone"
    folder.mkdir(parents=True)
    make(folder / name)
    assert main([str(path), "--stages", "alone"]) == 1
    assert "expected a regular file" in capsys.readouterr().err
    shutil.rmtree(path.parent / "run")
