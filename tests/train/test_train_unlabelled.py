"""A folder of which some masks, or parts of them, are labelled by nobody but the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from train_helpers import CPU, QUIET, changed, write_config

from heteroakd_fast.train import pipeline
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.batches import Normalizer
from heteroakd_fast.train.errors import ConfigError, DataError
from heteroakd_fast.train.reading import load_config
from heteroakd_fast.train.scoring import evaluate
from heteroakd_fast.train.visualization import choose_samples

UNLABELLED = 254


@pytest.fixture
def partly(tmp_path: Path) -> Config:
    config = load_config(write_config(tmp_path, steps=4))
    for number, path in enumerate(sorted((tmp_path / "pictures" / "masks").iterdir())):
        mask = np.asarray(Image.open(path)).copy()
        mask[:, : 40 if number == 0 else 4 * number] = UNLABELLED
        Image.fromarray(mask).save(path)
    return changed(config, distill={"unlabelled_index": UNLABELLED})


class Truth(nn.Module):
    """Class 1 everywhere."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = images.new_zeros(len(images), 3, 10, 10)
        logits[:, 1] = 1.0
        return logits


def test_a_run(partly: Config) -> None:
    outcome = pipeline.run(changed(partly, optim={"accumulate": 2}), QUIET)
    assert outcome.data.num_classes == 3
    assert (partly.run / "distilled" / "model.safetensors").is_file()


def test_diagnostics_are_logged(partly: Config) -> None:
    pipeline.run(changed(partly, log={"every": 3, "diagnostics": True}), QUIET)
    lines = [json.loads(line) for line in (partly.run / "distilled" / "metrics.jsonl").open()]
    logged = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in logged] == [3, 4]
    for line in logged:
        assert len(line["class_loss"]) == 3
        shares = ("pixel_accuracy", "agreement", "reliability")
        assert all(0 <= line[name] <= 1 for name in shares)
        assert line["discrepancy"] >= 0


def test_unlabelled_pixels_are_not_scored(partly: Config) -> None:
    data = load_data(partly.data, UNLABELLED)
    masks = np.concatenate([data.val.read(k)[1].ravel() for k in range(len(data.val))])
    assert (masks == UNLABELLED).any()
    normalize = Normalizer(partly.data, CPU)
    scores = evaluate(Truth(), data, normalize, config=partly, device=CPU)
    labelled = masks[masks < 3]
    assert scores.pixel_accuracy == pytest.approx((labelled == 1).mean())
    assert choose_samples(data, 2)


def test_their_label_is_refused_where_nobody_named_it(partly: Config) -> None:
    with pytest.raises(DataError, match=r"has the value 254 .*, expected 0 to 2 or 255 \(ign"):
        load_data(partly.data)
    masks = Path(str(partly.data.root)) / "masks"
    mask = np.asarray(Image.open(masks / "p1.png")).copy()
    mask[0, 0] = 77
    Image.fromarray(mask).save(masks / "p1.png")
    expected = r"value 77 .*, expected 0 to 2 or 255 \(ignored\), or 254 \(only the teacher labels"
    with pytest.raises(DataError, match=expected):
        load_data(partly.data, UNLABELLED)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("-3", "distill.unlabelled_index is -3, expected a mask value: 0 to 65535"),
        ("255", "unlabelled_index: got 255, which is also ignore_index"),
        ("2", "unlabelled_index: got 2, which is also one of the 3 classes"),
    ],
)
def test_values_that_mean_something_else(tmp_path: Path, value: str, message: str) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text() + f"\n[distill]\nunlabelled_index = {value}\n")
    with pytest.raises(ConfigError, match=message):
        pipeline.run(load_config(path), QUIET)
