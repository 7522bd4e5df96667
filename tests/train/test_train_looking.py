"""What can be looked at: strips in TensorBoard, the report's page, the lines on the console."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from train_helpers import changed, distilling, same_weights, trainer, weights_of

from heteroakd_fast.integrations.metrics import Scores
from heteroakd_fast.train import logs
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets.images import Mask, Pixels, SegmentationData, spread_palette
from heteroakd_fast.train.engine import StageResult, Trainer
from heteroakd_fast.train.logs import MetricsFile, StageProgress, duration, read_metrics, throughput
from heteroakd_fast.train.looking import (
    TILE_WIDTH,
    UNLABELLED,
    Sample,
    choose_samples,
    colour_map,
    coloured,
    colours,
    named_tiles,
    strip,
)
from heteroakd_fast.train.models import UNet
from heteroakd_fast.train.page import chart, curves, render
from heteroakd_fast.train.pipeline import Outcome
from heteroakd_fast.train.report import collect, draw, summary, table, write_report

NASTY = ("<script>alert(1)</script>", "a & \"b\" 'c' [/d]", "$\\frac$")


# -- strips --------------------------------------------------------------------------------------


def palette_data(classes: int) -> SegmentationData:
    names = tuple(f"class {index}" for index in range(classes))
    return SegmentationData([], [], names, spread_palette(classes), 255)  # type: ignore[arg-type]


def sample_of(height: int, width: int) -> Sample:
    picture = np.full((height, width, 3), 77, np.uint8)
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 1
    label[: height // 2, : width // 2] = 255
    prediction = np.ones((height, width), np.int64)
    reliability = np.where(label == 255, np.nan, 1.0).astype(np.float32)
    discrepancy = np.where(label == 255, np.nan, 0.0).astype(np.float32)
    discrepancy[:, width // 2 :] = 3.0
    return Sample(picture, label, {"prediction": prediction}, reliability, discrepancy)


def test_strip_has_every_tile_in_its_place() -> None:
    data = palette_data(3)
    shown = strip(sample_of(20, 40), data)
    assert shown.dtype == np.uint8
    assert shown.shape == (14 + 20, 5 * 40 + 4 * 4, 3)
    tiles = [shown[14:, left : left + 40] for left in range(0, 5 * 44, 44)]
    assert (tiles[0] == 77).all()
    assert (tiles[1][2, 2] == UNLABELLED).all()
    assert (tiles[1][15, 2] == data.palette[0]).all()
    assert (tiles[1][2, 30] == data.palette[1]).all()
    assert (tiles[2] == data.palette[1]).all()
    assert (tiles[3][2, 2] == UNLABELLED).all()
    assert (tiles[3][15, 2] == colour_map("reliability")[255]).all()
    assert (tiles[4][2, 2] == UNLABELLED).all()
    assert (tiles[4][15, 2] == colour_map("discrepancy")[0]).all()
    assert (tiles[4][2, 30] == colour_map("discrepancy")[255]).all()
    assert (shown[14:, 40:44] == 255).all()
    # The names: dark on white, over every tile.
    for left in range(0, 5 * 44, 44):
        assert shown[:14, left : left + 40].min() < 100


def test_without_a_teacher_there_are_no_maps() -> None:
    sample = dataclasses.replace(sample_of(20, 40), reliability=None, discrepancy=None)
    assert strip(sample, palette_data(3)).shape == (34, 3 * 40 + 2 * 4, 3)


def test_large_pictures_are_shrunk() -> None:
    tiles = named_tiles(sample_of(1024, 2048), palette_data(3), 3.0)
    assert {tile.shape for _, tile in tiles} == {(TILE_WIDTH // 2, TILE_WIDTH, 3)}
    label = dict(tiles)["label"]
    # Classes are picked and not mixed: no colour in between.
    expected = {UNLABELLED, *palette_data(3).palette[:2]}
    assert {tuple(colour) for colour in np.unique(label.reshape(-1, 3), axis=0)} == expected


def test_a_picture_without_labels() -> None:
    sample = sample_of(20, 40)
    nothing = np.full((20, 40), np.nan, np.float32)
    sample = dataclasses.replace(
        sample, label=np.full((20, 40), 255), reliability=nothing, discrepancy=nothing
    )
    shown = strip(sample, palette_data(3))
    assert (shown[14:, 3 * 44 : 3 * 44 + 40] == UNLABELLED).all()
    assert (shown[14:, 4 * 44 : 4 * 44 + 40] == UNLABELLED).all()


def test_values_beyond_a_map() -> None:
    beyond = coloured(np.array([-1.0, 2.0, np.nan, np.inf], np.float32), "reliability")
    first, last = (tuple(colour_map("reliability")[index]) for index in (0, 255))
    assert [tuple(colour) for colour in beyond] == [first, last, UNLABELLED, last]


def test_colours_of_many_classes() -> None:
    data = palette_data(150)
    shown = colours(np.array([[0, 149, 255]], np.uint8), data)
    assert [tuple(c) for c in shown[0]] == [data.palette[0], data.palette[149], UNLABELLED]
    # The index of grey does not fit into the mask's byte.
    full = palette_data(256)
    assert (colours(np.array([[255]], np.uint8), full)[0, 0] == full.palette[255]).all()


# -- in the training loop ------------------------------------------------------------------------


class Moody(UNet):
    """Draws at random in every pass, and has a part that is kept in evaluation mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = nn.BatchNorm2d(3)
        self.kept.eval()

    def train(self, mode: bool = True) -> Moody:
        super().train(mode)
        if hasattr(self, "kept"):
            self.kept.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        # A model that draws in evaluations as well.
        return super().forward(nn.functional.dropout(self.kept(images), 0.1, training=True))


def distilled(config: Config, data: SegmentationData, folder: str) -> Trainer:
    torch.manual_seed(0)
    student, teacher = Moody(3, width=4, levels=3), UNet(3, width=4, levels=3)
    return trainer(config, data, distilling(student, teacher, config.distill), folder, steps=6)


def test_looking_changes_no_bit(config: Config, data: SegmentationData) -> None:
    """A run with pictures ends with the very weights, scores and logs of one without."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = changed(config, log={"eval_every": 2})
    states, results, modes = [], [], []
    for folder, images in (("with", 2), ("without", 0)):
        run = distilled(changed(config, log={"tensorboard": True, "images": images}), data, folder)
        results.append(dataclasses.replace(run.run(), seconds=0.0))
        states.append(weights_of(run.objective))
        modes.append([module.training for module in run.objective.modules()])
    assert results[0] == results[1]
    same_weights(*states)
    assert modes[0] == modes[1]
    assert True in modes[0]
    assert False in modes[0]

    reader = events.EventAccumulator(
        str(config.run / "with" / "tensorboard"), size_guidance={"images": 0}
    ).Reload()
    chosen = choose_samples(data.val, data, 2)
    assert len(chosen) == 2
    assert sorted(reader.Tags()["images"]) == sorted(f"val images/{i}" for i in chosen)
    for index in chosen:
        pictures = reader.Images(f"val images/{index}")
        assert [event.step for event in pictures] == [2, 4, 6]
        decoded = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
        assert decoded.shape == (14 + 40, 5 * 40 + 4 * 4, 3)
        picture, label = data.val.read(index)
        assert np.array_equal(decoded[14:, :40], picture)
        assert np.array_equal(decoded[14:, 44:84], colours(label, data))
        # The student moves on.
        first = np.asarray(Image.open(io.BytesIO(pictures[0].encoded_image_string)))
        assert not np.array_equal(first, decoded)
    without = events.EventAccumulator(str(config.run / "without" / "tensorboard")).Reload()
    assert without.Tags()["images"] == []
    assert without.Scalars("val/miou")


def test_nobody_looks_without_tensorboard(
    config: Config, data: SegmentationData, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pictures were chosen for nobody")

    monkeypatch.setattr("heteroakd_fast.train.looking.choose_samples", refuse)
    monkeypatch.setattr("heteroakd_fast.train.looking.look", refuse)
    assert distilled(config, data, "off").run().steps == 6
    with pytest.raises(AssertionError, match="for nobody"):
        distilled(changed(config, log={"tensorboard": True}), data, "on").run()


# -- the page ------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Text, tags and attributes; complains about tags that do not match."""

    VOID = frozenset({"meta", "img", "line", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class Pictures:
    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 3

    def read(self, index: int) -> tuple[Pixels, Mask]:
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 255, (24, 32, 3), np.uint8)
        return picture, np.full((24, 32), index % self.classes, np.uint8)


def outcome_of(config: Config, stages: tuple[str, ...], names: tuple[str, ...]) -> Outcome:
    """What the pipeline leaves behind, without having trained."""
    source = Pictures(len(names))
    data = SegmentationData(source, source, names, spread_palette(len(names)), 255, "credit <to>")
    models: dict[str, nn.Module] = {
        stage: UNet(len(names), width=4, levels=2).eval() for stage in stages
    }
    distillation = None
    if "distilled" in stages:
        pair = models["distilled"], models["teacher"]
        distillation = distilling(*pair, config.distill, num_classes=len(names), side=(24, 32))
    results = {}
    for number, stage in enumerate(stages):
        iou = tuple(0.25 * (number + 1) for _ in names[1:])
        scores = Scores(0.25 * (number + 1), 0.5, (math.nan, *iou))
        results[stage] = StageResult(scores, 0.9, 12.5, 40)
    return Outcome(data, torch.device("cpu"), models, results, distillation)


def page_of(outcome: Outcome, config: Config) -> Reader:
    return Reader(render(outcome, config, summary(outcome, config), collect(outcome, config)))


SUBSETS: list[tuple[str, ...]] = [
    ("teacher", "alone", "distilled"),
    ("teacher", "distilled"),
    ("alone",),
    ("teacher",),
]


@pytest.mark.parametrize("stages", SUBSETS, ids="-".join)
def test_page(config: Config, stages: tuple[str, ...]) -> None:
    for stage in stages:
        file = MetricsFile(config.run / stage / "metrics.jsonl", 0)
        for step in (3, 6):
            file.write({"kind": "train", "step": step, "loss": 2.0 / step, "ce": 1.5 / step})
        file.write({"kind": "val", "step": 6, "miou": 0.4})
        file.write({"kind": "val", "step": 9, "miou": 0.5})
        file.close()
    page = page_of(outcome_of(config, stages, NASTY), config)
    text = page.text
    for name in NASTY:
        assert name in text
    assert not page.all("script")
    assert "credit <to>" in text

    # It opens with the outcome.
    gain = "alone" in stages and "distilled" in stages
    headings = [index for index, value in enumerate(text) if value == "IoU of each class"]
    opening = text[: headings[0]]
    assert any("One seed" in line for line in opening)
    for number in range(len(stages)):
        assert f"{25 * (number + 1):.1f} %" in opening
    assert ("+25.0" in opening) == gain
    assert ("by +25.0 points" in opening[1]) == gain

    # One file: nothing is loaded from elsewhere, and the images are in it.
    for tag, attributes in page.tags:
        assert not {"href", "srcset"} & attributes.keys(), tag
    sources = [attributes["src"] or "" for attributes in page.all("img")]
    tiles = [source for source in sources if source.startswith("data:image/png;base64,")]
    assert len(tiles) == config.report.samples * (2 + len(stages) + 2 * ("distilled" in stages))
    for source in tiles:
        content = base64.b64decode(source.partition(",")[2])
        assert Image.open(io.BytesIO(content)).size == (32, 24)
    # Validation, and the loss of each stage with its terms.
    charts = [drawn(source) for source in sources if source not in tiles]
    assert len(charts) == 1 + len(stages)
    assert "distilled 50" in charts[0] or "distilled" not in stages
    assert all("loss 0.333" in chart and "ce 0.25" in chart for chart in charts[1:])
    assert any("[distill]" in line for line in text)
    assert torch.__version__ in " ".join(text)
    if gain:
        assert text[text.index(NASTY[0]) + 1 :][:4] == ["-", "-", "-", "-"]
        assert text[text.index(NASTY[1]) + 1 :][:4] == ["25.0", "50.0", "75.0", "+25.0"]


@pytest.mark.parametrize("classes", [1, 150])
def test_page_of_few_and_many_classes(config: Config, classes: int) -> None:
    names = tuple(f"class <{index}>" for index in range(classes))
    outcome = outcome_of(config, ("teacher", "alone"), names)
    page = page_of(outcome, config)
    named = [line for line in page.text if line in names]
    assert named[:classes] == list(names)  # the table
    # The legend has what is in the pictures, if it cannot have all.
    samples = collect(outcome, config)
    masks = [mask for s in samples for mask in (s.label, *s.predictions.values())]
    assert named[classes:] == [names[index] for index in np.unique(masks)]
    draw(outcome, samples, config.run / "report.png", 30)


def test_report_with_names_that_mean_something_elsewhere(config: Config) -> None:
    """No markup of the console and no formula of the picture; scores that are not there."""
    outcome = outcome_of(config, ("teacher", "alone", "distilled"), NASTY)
    nothing = Scores(math.nan, math.nan, (math.nan,) * 3)
    outcome.results["alone"] = StageResult(nothing, -1.0, 0.0, 0)
    stream = io.StringIO()
    write_report(outcome, config, Console(file=stream, width=200))
    printed = stream.getvalue()
    for name in NASTY:
        assert name in printed
    assert str(config.run / "report.html") in printed.splitlines()[-1]
    results = json.loads((config.run / "results.json").read_text())
    assert results["gain"] is None
    assert results["stages"]["alone"]["miou"] is None
    assert results["stages"]["alone"]["class_iou"] == dict.fromkeys(NASTY)
    Reader((config.run / "report.html").read_text(encoding="utf-8"))
    assert (config.run / "report.png").exists()
    assert table(outcome).row_count == len(NASTY) + 2


def test_pictures_get_the_size_of_the_evaluation(config: Config) -> None:
    """With data.resize the networks see the resized picture; what is shown has the label's size."""
    outcome = outcome_of(config, ("teacher", "distilled"), NASTY)
    seen = []
    outcome.models["teacher"].register_forward_hook(
        lambda _, inputs, __: seen.append(tuple(inputs[0].shape[-2:]))
    )
    samples = collect(outcome, changed(config, data={"resize": (64, 48)}))
    assert set(seen) == {(48, 64)}
    for sample in samples:
        assert sample.image.shape == (24, 32, 3)
        assert sample.reliability is not None
        assert sample.discrepancy is not None
        for shown in (*sample.predictions.values(), sample.reliability, sample.discrepancy):
            assert shown.shape == (24, 32)


# -- curves --------------------------------------------------------------------------------------


def test_curves_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    file = MetricsFile(path, 0)
    for step in (4, 8):
        file.write({"kind": "train", "step": step, "lr": 0.1, "loss": 1.0 / step, "kd": math.nan})
    file.write({"kind": "val", "step": 8, "miou": 0.25, "class_iou": {"a": 0.5}})
    file.close()
    whole = path.read_bytes()
    records = read_metrics(path)
    assert curves(records, "train") == {"loss": [(4.0, 0.25), (8.0, 0.125)]}
    assert curves(records, "val") == {"miou": [(8.0, 0.25)]}
    for damage in (b'{"kind": "train", "st', b"\xff\xfe\n[1]\n3\nnull\n", b'{"step": "x"}\n'):
        path.write_bytes(whole + damage)
        assert read_metrics(path) == records
    path.write_bytes(whole[: len(whole) // 2])
    assert curves(read_metrics(path), "train") == {"loss": [(4.0, 0.25)]}


def drawn(source: str) -> str:
    """The texts of a chart."""
    kind, _, content = source.partition(",")
    assert kind == "data:image/svg+xml;base64"
    tree = ElementTree.fromstring(base64.b64decode(content))
    return "|".join(node.text or "" for node in tree.iter("{http://www.w3.org/2000/svg}text"))


def test_chart_has_every_line_and_its_end() -> None:
    source = chart("over steps", {"a": [(0.0, 0.0), (50.0, 1.0), (100.0, 4.0)], "b": [(0.0, 2.0)]})
    for text in ("over steps", "a 4", "b 2", "100"):
        assert text in drawn(source).split("|")
    assert "nothing" in drawn(chart("t", {}))


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [-3.0, 1e-12], [1e30, -1e30]])
def test_chart_of_odd_values(values: list[float]) -> None:
    assert f"a {values[-1]:.3g}" in drawn(chart("t", {"a": list(enumerate(values))}))


# -- the console ---------------------------------------------------------------------------------


def test_readable_units() -> None:
    assert [duration(s) for s in (0, 89, 91, 3600, 5399, 12_000, 190_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "60 min",
        "1 h 30 min",
        "3 h 20 min",
        "2 d 4 h",
    ]
    assert [throughput(r) for r in (123.4, 3.21, 0.05)] == ["123 img/s", "3.2 img/s", "3.0 img/min"]


def test_line_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=False)
    with StageProgress(console, "teacher", 1000, 100) as progress:
        for step in range(101, 104):
            now[0] += 10.0
            progress.advance(step, {"loss": 0.5}, 16)
        now[0] += 10.0
        progress.advance(1000, None, 16)
    lines = stream.getvalue().splitlines()
    # Every 15 seconds at most, and at the end.
    assert len(lines) == 2
    assert lines[0] == "teacher 102/1000  loss 0.500  1.6 img/s  2 h 30 min left"
    assert re.fullmatch(r"teacher 1000/1000  loss 0\.500  360 img/s", lines[1])


def test_compiled_networks_are_looked_at_as_they_are(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures come in many shapes, and each would be compiled anew."""
    stances: list[str] = []
    original = torch.compiler.set_stance

    def recorded(stance: str) -> Any:
        stances.append(stance)
        return original(stance)

    monkeypatch.setattr(torch.compiler, "set_stance", recorded)
    collect(outcome_of(config, ("alone",), NASTY), config)
    assert stances == ["force_eager"]
