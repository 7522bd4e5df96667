"""What goes wrong in the middle of a run: one clear message, and nothing of the past is lost."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import QUIET, changed, exported, same_weights, saved_step, write_config

from heteroakd_fast.train import parallel, pipeline
from heteroakd_fast.train.checkpoint import NEWEST
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.batches import Order
from heteroakd_fast.train.errors import CheckpointError, DataError
from heteroakd_fast.train.reading import load_config


def one_stage(folder: Path, run: str, steps: int = 10, **changes: Any) -> Config:
    """The student alone; pictures are not read before training."""
    config = load_config(write_config(folder, steps=steps, run=run))
    return changed(config, stages=("alone",), data={"check": False, **changes.pop("data", {})})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_file_that_breaks_while_training(tmp_path: Path, kind: str, workers: int) -> None:
    """Named, with the checkpoints intact; mended, the run ends as if nothing had happened."""
    calm = one_stage(tmp_path, "calm")
    pipeline.run(calm, QUIET)
    config = one_stage(tmp_path, "broken", data={"workers": workers})
    # The one that is first read latest, so that checkpoints exist by then.
    first_read: dict[Path, int] = {}
    data = load_data(config.data, config.seed)
    order = Order(config.seed, config.optim.batch_size, len(data.train))
    for step in range(10):
        for index in order.images(step):
            image, mask = data.train.pairs[index]  # type: ignore[attr-defined]
            first_read.setdefault(image if kind == "images" else mask, step)
    path, _ = max(first_read.items(), key=lambda item: item[1])
    good = path.read_bytes()
    if kind == "images":
        path.write_bytes(good[: len(good) // 2])
        expected = "cannot be read as an image"
    else:
        mask = np.asarray(Image.open(path)).copy()
        mask[5, 5:8] = 77
        Image.fromarray(mask).save(path)
        expected = r"has the value 77 \(3 pixels out of range\), expected 0 to 2 or 255"
    config = changed(config, log={"checkpoint_every": 1})
    with pytest.raises(DataError, match=f"{path.name}: {expected}"):
        pipeline.run(config, QUIET)
    assert 0 < saved_step(config.run / "alone") <= first_read[path]
    path.write_bytes(good)
    pipeline.run(config, QUIET)
    same_weights(exported(calm.run), exported(config.run))


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Writes beyond the limit fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_at_a_checkpoint(tmp_path: Path) -> None:
    calm = one_stage(tmp_path, "calm")
    pipeline.run(calm, QUIET)
    begun = one_stage(tmp_path, "full", steps=10)
    # The first checkpoint (step 4) finds room, the second does not.
    import heteroakd_fast.train.engine as engine

    original = engine.save_checkpoint
    count = 0

    def counting(folder: Path, state: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == 1:
            original(folder, state)
            return
        with small_disk(2000):
            original(folder, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", counting)
        with pytest.raises(CheckpointError, match=f"cannot be written.*intact: {NEWEST}"):
            pipeline.run(begun, QUIET)
    assert saved_step(begun.run / "alone") == 4
    assert not list((begun.run / "alone").glob(".*.tmp"))
    pipeline.run(begun, QUIET)
    same_weights(exported(calm.run), exported(begun.run))


@pytest.mark.parametrize(
    "scale",
    [{"channels_last": True}, {"compile": True}, {"compile": True, "tap": True}],
    ids=["channels_last", "compiled", "compiled around a tap"],
)
def test_ways_of_running_compute_the_same(
    tmp_path: Path, scale: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamo's own interpreter of graphs: what is compiled is looked at, not how fast."""
    compiled: list[str] = []

    def compile_eagerly(function: Any) -> Any:
        compiled.append(type(function.__self__).__name__)
        return real(function, backend="eager")

    real = torch.compile
    monkeypatch.setattr(parallel.torch, "compile", compile_eagerly)
    scale = dict(scale)
    tap = scale.pop("tap", False)
    first = load_config(write_config(tmp_path, steps=3, run="first"))
    pipeline.run(changed(first, stages=("teacher",)), QUIET)
    weights = first.run / "teacher" / "model.safetensors"
    plain = changed(
        first,
        run=tmp_path / "plain",
        stages=("distilled",),
        teacher={"weights": weights, "steps": 0},
        distill={"features": tap},
    )
    other = changed(plain, run=tmp_path / "other", scale=scale)
    pipeline.run(plain, QUIET)
    outcome = pipeline.run(other, QUIET)
    assert bool(compiled) == bool(scale.get("compile"))
    if tap:
        # The teacher as a whole when it was evaluated; a tap finds its modules all the same.
        assert compiled[0] == "UNet"
        assert set(compiled[1:]) == {"Sequential", "Conv2d"}
        assert len(compiled) > 5
    elif compiled:
        assert compiled == ["UNet", "UNet"]
    assert not any("forward" in vars(m) for m in outcome.models["distilled"].modules())
    weight = dict(outcome.models["distilled"].named_parameters())["encoder.1.0.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) == bool(
        scale.get("channels_last")
    )
    one, two = (exported(run, "distilled") for run in (plain.run, other.run))
    assert one.keys() == two.keys(), "names of weights stay as they are"
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4, msg=key)
