"""Students that see the labels of a few images, and the pixels of all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import QUIET, changed, write_config

from heteroakd_fast import functional
from heteroakd_fast.train import pipeline
from heteroakd_fast.train.config import Config, DataConfig
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.images import SegmentationData
from heteroakd_fast.train.datasets.labelled import balanced_weights, labelled_images
from heteroakd_fast.train.errors import ConfigError, DataError
from heteroakd_fast.train.reading import load_config

FREE = 254  # the largest value of a byte that is neither a class nor to be ignored


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path, steps=4))


def data_of(config: Config) -> SegmentationData:
    return load_data(config.data, config.distill.unlabelled_index)


def asked(config: Config, labelled: object, **more: object) -> Config:
    return changed(config, data={"labelled": labelled, **more}).with_unlabelled_index()


def test_what_each_stage_sees(config: Config) -> None:
    config = asked(config, 3)
    data = data_of(config)
    sets, labelled = pipeline.training_sets(config, data)
    assert labelled is not None
    assert len(labelled) == 3
    assert len(sets["teacher"].source) == len(sets["distilled"].source) == len(data.train) > 3
    assert [sets["alone"].source.name(k) for k in range(3)] == [
        data.train.name(k) for k in labelled
    ]
    assert len(sets["alone"].source) == 3
    for index in range(len(data.train)):
        image, mask = data.train.read(index)
        seen, label = sets["distilled"].source.read(index)
        assert np.array_equal(image, seen)
        assert np.array_equal(label, mask if index in labelled else np.full(mask.shape, FREE))
    assert sets["distilled"].order.labelled == labelled
    assert sets["distilled"].order.labelled_slots == (config.optim.batch_size + 1) // 2
    assert sets["alone"].order.labelled_slots == sets["teacher"].order.labelled_slots == 0


def test_the_seed_draws_them(config: Config) -> None:
    data = data_of(config)
    drawn = {labelled_images(data, asked(config, 2).data, seed) for seed in range(20)}
    assert len(drawn) > 5
    assert labelled_images(data, config.data, 0) is None
    half = labelled_images(data, asked(config, 0.5).data, 0)
    assert half is not None
    assert len(half) == round(len(data.train) / 2)
    names = [Path(data.train.name(k)).name for k in (2, 0)]
    stems = [Path(name).stem for name in names]
    for some in (tuple(names), tuple(stems), tuple(f"images/{name}" for name in stems)):
        assert labelled_images(data, asked(config, some).data, 0) == (0, 2)


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        (500, r"data\.labelled is 500, but \d+ training images have a mask"),
        (("nowhere.png",), r"names 'nowhere\.png', and no training image with a mask is called so"),
    ],
)
def test_what_is_not_there(config: Config, labelled: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pipeline.run(asked(config, labelled), QUIET)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("labelled = 0", r"data\.labelled is 0"),
        ("labelled = 1.5", r"data\.labelled is 1\.5, expected a share"),
        ("labelled_per_batch = 2", r"data\.labelled_per_batch needs data\.labelled"),
        (
            "labelled = 3\nlabelled_per_batch = 99",
            r"labelled_per_batch is 99, but optim\.batch_size",
        ),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, line: str, message: str) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("[data]\n", f"[data]\n{line}\n"))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_images_without_a_mask(config: Config) -> None:
    """They are an error, unless somebody says that the teacher labels them."""
    masks = sorted((Path(str(config.data.root)) / "masks").iterdir())
    for path in masks[:4]:
        path.unlink()
    with pytest.raises(DataError, match=r'has no mask .* data\.labelled = "masks"'):
        data_of(config)
    config = asked(config, "masks")
    data = data_of(config)
    assert data.with_mask is not None
    assert len(data.train) == len(data.with_mask) + 4
    sets, labelled = pipeline.training_sets(config, data)
    assert labelled == data.with_mask
    assert len(sets["teacher"].source) == len(sets["alone"].source) == len(labelled)
    without = next(k for k in range(len(data.train)) if k not in labelled)
    assert (sets["distilled"].source.read(without)[1] == FREE).all()
    outcome = pipeline.run(config, QUIET)
    assert outcome.results.keys() == {"teacher", "alone", "distilled"}
    fewer = labelled_images(data, asked(config, 2).data, 0)
    assert fewer is not None
    assert set(fewer) < set(labelled)


def test_no_mask_at_all(config: Config) -> None:
    for path in (Path(str(config.data.root)) / "masks").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="fewer than two images with a mask"):
        data_of(asked(config, "masks"))


def test_a_value_that_is_free() -> None:
    values = {
        "kind": "folder",
        "root": ".",
        "num_classes": 300,
        "labelled": 1,
        "ignore_index": 65535,
    }
    data = DataConfig.model_validate_json(json.dumps(values), strict=True)
    network = {"arch": "unet", "steps": 1}
    config = Config.model_validate({"data": data, "teacher": network, "student": network})
    assert config.with_unlabelled_index().distill.unlabelled_index == 65534
    other = changed(config, data={"num_classes": 254, "ignore_index": 255})
    assert other.with_unlabelled_index().distill.unlabelled_index == 254


class Masks:
    """A source of masks alone."""

    def __init__(self, *masks: list[int]) -> None:
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((1, 1, 3), np.uint8), np.array([self.masks[index]])

    def name(self, index: int) -> str:
        return str(index)


def test_balanced_weights() -> None:
    """w_c = N / (K n_c); a class without a pixel has 0; what is ignored is not counted."""
    source = Masks([0, 0, 0, 1, 255], [0, 3, 254, 254])
    weights = balanced_weights(source, 4)
    assert weights == pytest.approx((6 / (3 * 4), 6 / (3 * 1), 0.0, 6 / (3 * 1)))
    assert balanced_weights(Masks([255]), 2) == (0.0, 0.0)
    # Every class has the same share of the loss, and a labelled pixel the weight 1 on average.
    assert np.mean([weights[label] for label in (0, 0, 0, 1, 0, 3)]) == pytest.approx(1.0)


@pytest.mark.parametrize("labelled", [None, 2])
def test_balanced_losses(config: Config, labelled: int | None) -> None:
    """Of each stage with the weights of the labels it sees, which are counted once."""
    config = asked(config, labelled) if labelled else config
    config = changed(config, distill={"class_weight": "balanced", "features": False})
    data = data_of(config)
    sets, _ = pipeline.training_sets(config, data)
    losses = pipeline.losses(config, sets, 3)
    every = balanced_weights(data.train, 3)
    some = balanced_weights(sets["alone"].source, 3)
    assert (some != every) == (labelled is not None)
    assert losses["teacher"].class_weight == every
    assert losses["alone"].class_weight == losses["distilled"].class_weight == some
    outcome = pipeline.run(config, QUIET)
    assert outcome.results.keys() == {"teacher", "alone", "distilled"}
    assert outcome.distillation is not None
    loss = outcome.distillation
    logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    given = loss.loss(logits, target, teacher_logits=logits)
    expected = functional.cross_entropy(logits, target, class_weight=torch.tensor(some))
    torch.testing.assert_close(given.terms["ce"], expected.terms["ce"])


def test_balanced_weights_are_part_of_what_a_run_was_begun_with(config: Config) -> None:
    plain = pipeline.fingerprint(config, "alone")
    balanced = pipeline.fingerprint(changed(config, distill={"class_weight": "balanced"}), "alone")
    assert plain != balanced
    assert balanced["distill.class_weight"] == '"balanced"'
