"""What can be looked at: figures in TensorBoard, the report's page, the lines on the console."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from train_helpers import CPU, changed, distilling, same_weights, trainer, weights_of

from heteroakd_fast.integrations.metrics import Scores
from heteroakd_fast.train import logs
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets.images import Mask, Pixels, SegmentationData, spread_palette
from heteroakd_fast.train.engine import StageResult, Trainer
from heteroakd_fast.train.logs import Records, StageProgress, read_metrics
from heteroakd_fast.train.models import UNet
from heteroakd_fast.train.pipeline import Outcome
from heteroakd_fast.train.report import headline, notes, render, summary, write_report
from heteroakd_fast.train.visualization import (
    UNLABELLED,
    Gallery,
    Sample,
    colours,
    curves,
    encoded,
    sample_figure,
)

NASTY = ("<script>alert(1)</script>", "a & \"b\" 'c' [/d] :smile:", "$\\frac$")


# -- the figure of samples -----------------------------------------------------------------------


def palette_data(classes: int) -> SegmentationData:
    names = tuple(f"_class {index}" for index in range(classes))
    return SegmentationData([], [], names, spread_palette(classes), 255)  # type: ignore[arg-type]


def sample_of(height: int, width: int) -> Sample:
    """Half class 0, half class 1, a corner that is not counted; every pixel predicted as 1."""
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 1
    label[: height // 2, : width // 2] = 255
    discrepancy = np.where(label == 1, 3.0, 0.0)
    return {
        "image": np.full((height, width, 3), 77, np.uint8),
        "label": label,
        "prediction": np.ones((height, width), np.int64),
        "reliability": np.where(label == 255, np.nan, 1.0),
        "discrepancy": np.where(label == 255, np.nan, discrepancy),
    }


def opened(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def shown_in(figure: Figure) -> list[Pixels]:
    """What the figure shows of the first sample, from left to right, without the frames."""
    pixels = opened(encoded(figure, "png"))
    found = []
    for axes in figure.axes:
        if (place := axes.get_subplotspec()) is not None and place.rowspan.start == 0:
            left, bottom, right, top = np.rint(axes.get_window_extent().extents).astype(int)
            tile = pixels[len(pixels) - top : len(pixels) - bottom, left:right]
            found.append(tile[2:-2, 2:-2])
    return found


def test_every_part_of_a_sample_is_in_its_place() -> None:
    data = palette_data(3)
    samples = [sample_of(300, 600), sample_of(40, 40)]  # shrunk, and enlarged
    figure = sample_figure(samples, data, {"prediction": "ours"}, 80)
    image, label, prediction, reliability, discrepancy = shown_in(figure)
    titles = [axes.get_title() for axes in figure.axes[:5]]
    assert titles[:3] == ["image", "label", "ours"]
    assert [title.split("\n")[0] for title in titles[3:]] == ["reliability", "discrepancy"]
    assert (image == 77).all()
    # In the data's own colours, of which none are mixed.
    assert (label[5, 5] == UNLABELLED).all()
    assert (label[-5, 5] == data.palette[0]).all()
    assert (label[5, -5] == data.palette[1]).all()
    assert {tuple(c) for c in label.reshape(-1, 3)} == {UNLABELLED, *data.palette[:2]}
    assert (prediction == data.palette[1]).all()
    # Maps: nothing where nothing is counted, low and high apart elsewhere.
    for values in (reliability, discrepancy):
        assert (values[5, 5] == UNLABELLED).all()
        assert (values[-5, 5] != UNLABELLED).any()
    assert (reliability[-5, 5] == reliability[5, -5]).all()
    assert discrepancy[-5, 5].sum() < 60 < discrepancy[5, -5].sum()
    # The legend: classes that are in the images, in the data's colours.
    (legend,) = figure.legends
    names = [text.get_text().strip() for text in legend.get_texts()]
    assert names == ["_class 0", "_class 1", "not counted"]
    faces = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert np.allclose(faces, np.divide([*data.palette[:2], UNLABELLED], 255), atol=0.003)


@pytest.mark.parametrize("shapes", [[(40, 40)], [(20, 40), (30, 40)], [(60, 40), (40, 50)]])
def test_no_white_between_images(shapes: list[tuple[int, int]]) -> None:
    """Whatever their shapes; what is white is above the first row and below the last one."""
    samples = [sample_of(*shape) for shape in shapes]
    figure = sample_figure(samples, palette_data(3), {}, 80)
    pixels = opened(encoded(figure, "png"))
    first, last = figure.axes[0].get_window_extent(), figure.axes[-3].get_window_extent()
    rows = pixels[len(pixels) - int(first.y1) : len(pixels) - int(last.y0)]
    assert (rows == 255).all(axis=2).mean() < 0.07
    # The legend and the bars are right below the images, and end near the lower edge.
    below = (pixels[len(pixels) - int(last.y0) + 2 :] != 255).any(axis=(1, 2)).nonzero()[0]
    assert below[0] < 0.2 * 80
    assert len(pixels) < first.y1 - last.y0 + 1.3 * 80


def test_a_sample_without_maps_or_labels() -> None:
    sample = sample_of(20, 40)
    plain = {name: sample[name] for name in ("image", "label", "prediction")}
    assert len(shown_in(sample_figure([plain], palette_data(3), {}, 50))) == 3
    sample["label"] = np.full((20, 40), 255)
    sample["reliability"] = sample["discrepancy"] = np.full((20, 40), np.nan)
    shown = shown_in(sample_figure([sample], palette_data(3), {}, 50))
    assert all((shown[place] == UNLABELLED).all() for place in (1, 3, 4))


def test_colours_of_many_classes() -> None:
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
    """A run with images ends with the very weights, scores and logs of one without."""
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
    figures = reader.Images("val images")
    assert [event.step for event in figures] == [2, 4, 6]
    first, last = (opened(figures[index].encoded_image_string) for index in (0, -1))
    # Two rows of image, label, prediction and both maps; the student moves on.
    assert first.shape[1] > 1.7 * first.shape[0]
    assert not np.array_equal(first, last)
    assert {UNLABELLED, *data.palette} <= {tuple(colour) for colour in last.reshape(-1, 3)}
    without = events.EventAccumulator(str(config.run / "without" / "tensorboard")).Reload()
    assert without.Tags()["images"] == []
    assert without.Scalars("val/miou")


def test_nobody_looks_without_tensorboard(
    config: Config, data: SegmentationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = Mock(side_effect=AssertionError("images were chosen for nobody"))
    monkeypatch.setattr("heteroakd_fast.train.visualization.choose_samples", refuse)
    assert distilled(config, data, "off").run().steps == 6
    with pytest.raises(AssertionError, match="for nobody"):
        distilled(changed(config, log={"tensorboard": True}), data, "on").run()


# -- the report ----------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Text, tags and attributes; complains about tags that do not match."""

    VOID = frozenset({"meta", "img"})

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

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.text.append(data.strip())


class Pictures:
    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> tuple[Pixels, Mask]:
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 255, (24, 32, 3), np.uint8)
        mask = np.full((24, 32), index % self.classes, np.uint8)
        mask[:4, :5] = 255
        return picture, mask


def outcome_of(config: Config, stages: tuple[str, ...], names: tuple[str, ...]) -> Outcome:
    """What the pipeline leaves behind, without having trained; the first class has no score."""
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
    return Outcome(data, CPU, models, results, distillation, config)


@pytest.mark.parametrize(
    "stages", [("teacher", "alone", "distilled"), ("teacher", "distilled"), ("alone",)]
)
def test_page(config: Config, stages: tuple[str, ...]) -> None:
    outcome = outcome_of(config, stages, NASTY)
    for stage in stages:
        with Records(config.run / stage, 0, tensorboard=False) as records:
            for step in (3, 6):
                records.line({"kind": "train", "step": step, "loss": 2.0 / step, "wait": 0.25})
            records.line({"kind": "val", "step": 6, "miou": 0.4})
    results = summary(outcome, config)
    page = Reader(render(outcome, config, results, b"content"))
    text = page.text
    for name in NASTY:
        assert name in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert "credit <to>" in text

    # It opens with the outcome and what is to be known of it.
    opening = text[: text.index("IoU of each class")]
    assert opening[0] == opening[1] == headline(results)  # the title and the heading
    assert opening[3:] == notes(results)

    # One file: nothing is loaded from elsewhere, and the images are in it.
    for tag, attributes in page.tags:
        assert not {"href", "srcset"} & attributes.keys(), tag
    figure, chart = (attributes["src"] or "" for tag, attributes in page.tags if tag == "img")
    assert figure == "data:image/png;base64," + base64.b64encode(b"content").decode()
    kind, _, content = chart.partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert b"</svg>" in base64.b64decode(content)

    # Scores, facts, configuration.
    row = text[text.index(NASTY[1]) + 1 :][: len(stages) + 1]
    assert row[:-1] == [f"{25 * (number + 1):.1f}" for number in range(len(stages))]
    assert row[-1] == ("+25.0" if {"alone", "distilled"} <= set(stages) else "-")
    assert text[text.index(NASTY[0]) + 1 :][: len(stages)] == ["-"] * len(stages)
    for fact in ("unet", "40", "0:00:12", "25.0 %", "90.0"):
        assert fact in text[text.index("Run") :]
    assert any("[distill]" in line for line in text)
    assert torch.__version__ in " ".join(text)


def test_report_with_names_that_mean_something_elsewhere(config: Config) -> None:
    """No emoji, no markup of the console, no formula of the figure; scores that are not there."""
    outcome = outcome_of(config, ("teacher", "alone", "distilled"), NASTY)
    nothing = Scores(math.nan, math.nan, (math.nan,) * 3)
    outcome.results["alone"] = StageResult(nothing, -1.0, 0.0, 0)
    config = changed(config, run=config.run / ":smile:" / "[bold]", report={"samples": 3})
    stream = io.StringIO()
    write_report(outcome, config, Console(file=stream, width=120))
    printed = stream.getvalue()
    for name in NASTY:
        assert printed.count(name) == 2  # in the table, and as one without a score
    assert f"{config.run / 'report.html'}, " in printed
    assert printed.splitlines()[-1] == "Student distilled: mIoU 75.0 % (one seed)."
    results = json.loads((config.run / "results.json").read_text())
    assert results["gain"] is None
    assert results["stages"]["alone"]["miou"] is None
    assert results["stages"]["alone"]["class_iou"] == dict.fromkeys(NASTY)
    page = (config.run / "report.html").read_text(encoding="utf-8")
    Reader(page)
    assert base64.b64encode((config.run / "report.png").read_bytes()).decode() in page


def results_of(**mious: float) -> dict[str, Any]:
    stages = {
        stage: {"miou": miou, "pixel_accuracy": 0.5, "class_iou": {"a": miou, "b": miou}}
        for stage, miou in mious.items()
    }
    gain = mious["distilled"] - mious["alone"]
    return {"gain": gain, "stages": stages, "config": {"data.kind": "landcover"}}


def test_headline_and_notes() -> None:
    results = results_of(teacher=0.6, alone=0.33, distilled=0.471)
    assert headline(results) == (
        "Distilled: mIoU 47.1 %, student alone 33.0 %: gain +14.1 points "
        "(one seed; the experiment has ten)."
    )
    results["config"]["data.kind"] = "folder"
    assert headline(results).endswith("gain +14.1 points (one seed).")
    assert notes(results) == []
    results = results_of(teacher=0.25, alone=0.4, distilled=0.39999)
    assert "gain +0.0 points" in headline(results)  # never minus zero
    assert notes(results) == [
        "The teacher (25.0 %) is worse than the student alone (40.0 %), so that distillation from "
        "it cannot help; train it longer or take a larger one."
    ]
    results = results_of(teacher=0.6, alone=0.33, distilled=0.471)
    # A network that predicts the absent class has 0.
    results["stages"]["teacher"]["class_iou"]["b"] = None
    results["stages"]["alone"]["class_iou"]["b"] = 0.0
    (note,) = notes(results)
    assert note.startswith("Never in the validation labels: b. Such classes have no score and are ")


def test_images_get_the_size_of_the_evaluation(config: Config) -> None:
    """With data.resize the networks see the resized image; what is shown has the label's size."""
    outcome = outcome_of(config, ("teacher", "distilled"), NASTY)
    seen = []
    outcome.models["teacher"].register_forward_hook(
        lambda _, inputs, __: seen.append(tuple(inputs[0].shape[-2:]))
    )
    gallery = Gallery(changed(config, data={"resize": (64, 48)}), outcome.data, CPU, 1)
    sample = gallery.sample(0, outcome.models, outcome.distillation)
    assert set(seen) == {(48, 64)}
    assert set(sample) == {"image", "label", "teacher", "distilled", "reliability", "discrepancy"}
    assert {shown.shape[:2] for shown in sample.values()} == {(24, 32)}
    for name in ("reliability", "discrepancy"):
        assert np.array_equal(np.isnan(sample[name]), sample["label"] == 255)


def test_compiled_networks_are_looked_at_as_they_are(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images come in many shapes, and each would be compiled anew."""
    recorded = Mock(side_effect=torch.compiler.set_stance)
    monkeypatch.setattr(torch.compiler, "set_stance", recorded)
    outcome = outcome_of(config, ("alone",), NASTY)
    Gallery(config, outcome.data, CPU, 1).figure(outcome.models, None, {})
    recorded.assert_called_once_with("force_eager")


# -- curves --------------------------------------------------------------------------------------


def test_curves_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    with Records(tmp_path, 0, tensorboard=False) as file:
        for step in (4, 8):
            terms = {"lr": 0.1, "loss": 1.0 / step, "kd": math.nan}
            file.line({"kind": "train", "step": step, **terms})
        file.line({"kind": "val", "step": 8, "miou": 0.25, "class_iou": {"a": 0.5}})
    whole = path.read_bytes()
    records = read_metrics(path)
    for damage in (b'{"kind": "train", "st', b"\xff\xfe\n[1]\n3\nnull\n", b'{"step": "x"}\n'):
        path.write_bytes(whole + damage)
        assert read_metrics(path) == records
    assert [record["step"] for record in read_metrics(path, 4)] == [4]

    scores, losses = curves({"alone": records, "teacher": []}).axes
    (line,) = scores.lines
    assert (line.get_label(), line.get_xdata(), line.get_ydata()) == ("student alone 25", [8], [25])
    assert to_rgb(line.get_color()) == to_rgb("#8a94a3")
    assert losses.get_title() == "student alone: loss and its terms"
    (line,) = losses.lines
    assert line.get_label() == "loss 0.125"
    assert line.get_xydata().tolist() == [[4, 0.25], [8, 0.125]]


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [1e30, -1e30], []])
def test_curves_of_odd_values(values: list[float]) -> None:
    records = [{"kind": "train", "step": k, "loss": value} for k, value in enumerate(values)]
    assert b"</svg>" in encoded(curves({"teacher": records}), "svg")


# -- the console ---------------------------------------------------------------------------------


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first logged step, then every 15 seconds at most, and at the end."""
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(file=stream, width=20, force_terminal=False)
    with StageProgress(console, "teacher", 1000, 100) as progress:
        for step in range(101, 106):
            now[0] += 10.0
            progress.advance(step, {"loss": 0.5} if step > 101 else None, 16)
        progress.waited(26.0)
        now[0] += 2.0
        progress.advance(1000, None, 16)
    assert stream.getvalue().splitlines() == [
        "teacher 102/1000  loss 0.500  1.6 img/s, 2:29:40 left",
        "teacher 104/1000  loss 0.500  1.6 img/s, 2:29:20 left",
        "teacher 1000/1000  loss 0.500  277 img/s, 50 % waiting for images (data.workers)",
    ]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_progress_on_a_terminal(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar; but lines where the cursor cannot move, or there would be nothing at all."""
    monkeypatch.setenv("TERM", term)
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True)
    with StageProgress(console, "teacher", 10, 0) as progress:
        progress.advance(3, {"loss": 0.5}, 16)
        assert term == "xterm" or "3/10  loss 0.500" in stream.getvalue()
        progress.say("teacher :smile: [bold]step[/bold] 3")
    shown = stream.getvalue()
    assert "3/10  loss 0.500" in shown
    assert "teacher :smile: [bold]step[/bold] 3\n" in shown
    assert ("\x1b" in shown) == (term == "xterm")
