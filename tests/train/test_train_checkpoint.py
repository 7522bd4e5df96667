"""Checkpoints survive damage and full disks, and say what happened."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import small_disk

from heteroakd_fast.train.checkpoint import (
    NEWEST,
    PREVIOUS,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from heteroakd_fast.train.errors import CheckpointError


def state(step: int) -> dict[str, object]:
    return {"step": step, "model": {"w": torch.full((64,), float(step))}, "random": random_states()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    return tmp_path


def loaded_step(folder: Path) -> int:
    found = load_checkpoint(folder)
    assert found is not None
    assert torch.equal(found["model"]["w"], torch.full((64,), float(found["step"])))
    return int(found["step"])


def test_newest_and_previous_are_kept(folder: Path) -> None:
    save_checkpoint(folder, state(3))
    assert sorted(path.name for path in folder.iterdir()) == sorted([NEWEST, PREVIOUS])
    assert loaded_step(folder) == 3
    (folder / NEWEST).unlink()
    assert loaded_step(folder) == 2


def test_nothing_there(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "none") is None


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "empty":
        content = bytearray()
    elif kind == "one bit":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"something else entirely, and long enough to hold a whole header")
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "empty", "one bit", "foreign"])
def test_damaged_newest_falls_back(
    folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / NEWEST, kind)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(folder) == 1
    assert NEWEST in caplog.text
    assert "step 1" in caplog.text


def test_both_damaged(folder: Path) -> None:
    damage(folder / NEWEST, "one bit")
    damage(folder / PREVIOUS, "truncated")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert NEWEST in str(caught.value)
    assert PREVIOUS in str(caught.value)


def test_full_disk_leaves_the_earlier_ones(folder: Path) -> None:
    big = {"step": 3, "model": {"w": torch.zeros(200_000)}}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = f"step 3 cannot be written.*intact: {NEWEST}"
    with small_disk(100_000), pytest.raises(CheckpointError, match=expected):
        save_checkpoint(folder, big)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert loaded_step(folder) == 2


def test_left_over_temporary_file_is_removed(folder: Path) -> None:
    (folder / f".{NEWEST}.123.tmp").write_bytes(b"half")
    assert loaded_step(folder) == 2
    assert not list(folder.glob(".*"))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    save_checkpoint(tmp_path, {"step": 1, "harmful": Harmful()})
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_random_states_come_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    drawn = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    found = load_checkpoint(tmp_path)
    assert found is not None
    restore_random_states(found["random"])
    again = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]
