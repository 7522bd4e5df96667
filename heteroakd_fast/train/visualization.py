"""Validation images beside what the networks and the loss make of them, and curves, as figures."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot: servers have no screen
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checkpoint import random_states, restore_random_states
from .config import Config
from .datasets.augment import fit_image
from .datasets.batches import Normalizer, to_tensors
from .datasets.images import Mask, Pixels, SegmentationData
from .logs import Record, Records
from .models import evaluating
from .objectives import DistillObjective, Objective
from .parallel import uncompiled
from .scoring import autocast, predict

TITLES = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}
COLOURS = {"teacher": "#8a6bd6", "alone": "#8a94a3", "distilled": "#2f8fd8"}
UNLABELLED = (128, 128, 128)

#: Of each map of the loss: title, colour map, words at its bar, and which end means "and more".
MAPS: dict[str, tuple[str, str | None, str, str]] = {
    "reliability": ("reliability\nof the teacher", "RdYlBu", "0 student, 1 teacher", "neither"),
    "discrepancy": ("discrepancy\nteacher / student", "magma", "KL, nats", "max"),
}
_LOOKED_AT = 200  # a large validation set is not read through for a handful of images
_NO_TERMS = {"kind", "step", "lr", "seconds", "wait"}

#: One validation image by name: "image" (pixels); "label" and the networks' predictions (class
#: ids); those of `MAPS` that the loss has (NaN where nothing is counted).
Sample = dict[str, NDArray[Any]]
Models = Mapping[str, nn.Module]


def choose_samples(data: SegmentationData, count: int) -> list[int]:
    """Validation images with many classes in them: those show most."""
    variety = []
    for index in range(min(len(data.val), _LOOKED_AT)):
        mask = data.val.read(index)[1]
        shares = np.bincount(mask[mask < data.num_classes]) / mask.size
        variety.append((-int((shares > 0.02).sum()), index))
    return sorted(index for _, index in sorted(variety)[:count])


@dataclass
class Gallery:
    """The same few validation images, whenever they are shown."""

    config: Config
    data: SegmentationData
    device: torch.device
    count: int
    stage: str = "distilled"
    """What a model whose name is none is of."""

    def _normalized(self, image: Tensor, name: str) -> Tensor:
        used = self.config.data_of(name if name in TITLES else self.stage)
        return Normalizer(used, self.device, self.config.scale.channels_last)(image[None])

    @cached_property
    def _chosen(self) -> list[int]:
        return choose_samples(self.data, self.count)

    def show(self, records: Records, objective: Objective, step: int) -> None:
        """A figure in TensorBoard."""
        if records.tensorboard and self.count:
            figure = self.figure({"prediction": objective.model}, objective, {})
            records.tensorboard.add_figure("val images", figure, step, close=False)

    def figure(self, models: Models, loss: Objective | None, titles: Mapping[str, str]) -> Figure:
        """Predictions and the loss's own maps; training goes on as if nobody had looked."""
        modules = [*models.values(), *([] if loss is None else [loss])]
        states = random_states()
        with evaluating(*modules):
            samples = [self.sample(index, models, loss) for index in self._chosen]
        restore_random_states(states)
        return sample_figure(samples, self.data, titles, self.config.report.dpi)

    def sample(self, index: int, models: Models, loss: Objective | None) -> Sample:
        """One image, at the size of its label; networks are in evaluation mode."""
        shown, label = self.data.val.read(index)
        sample: Sample = {"image": shown, "label": label}
        # The networks get what they get in an evaluation.
        image, target = to_tensors(fit_image(shown, self.config.data), label)
        size = label.shape[0], label.shape[1]
        maps: dict[str, Tensor] = {}
        # Not compiled, as in evaluations: images of many shapes.
        with autocast(self.device, self.config.amp), uncompiled():
            for name, model in models.items():
                images = self._normalized(image, name)
                sample[name] = predict(model, images, size, self.config.data)[0].cpu().numpy()
            # Whole images, which may not be what networks evaluated by windows can take.
            if isinstance(loss, DistillObjective) and self.config.data.windows is None:
                images = self._normalized(image, "distilled")
                maps = loss.maps(images, target[None].to(self.device))
        for name in MAPS.keys() & maps.keys():
            values = maps[name][0].float().cpu().numpy()
            sample[name] = np.where(label == self.data.ignore_index, np.nan, values)
        return sample


def colours(mask: Mask, data: SegmentationData) -> Pixels:
    """Class ids in the data's own colours; what is not counted is grey."""
    table = np.array([*data.palette, UNLABELLED], np.uint8)
    # int64: with 256 classes the index of grey fits into no byte.
    image: Pixels = table[np.minimum(mask.astype(np.int64), data.num_classes)]
    return image


def sample_figure(
    samples: Sequence[Sample], data: SegmentationData, titles: Mapping[str, str], dpi: int
) -> Figure:
    """A row per sample, a column per name; below, the classes that are in the images, and bars.

    Sizes are in inches and follow from the images, so that no layout leaves gaps between them.
    """
    masks = [name for name in samples[0] if name not in {"image", *MAPS}]
    maps = [name for name in MAPS if name in samples[0]]
    names = ["image", *masks, *maps]
    found = np.unique(np.concatenate([s[name].ravel() for s in samples for name in masks]))
    shown = [(data.class_names[k], data.palette[k]) for k in found if k < data.num_classes]
    # The space: some versions leave out a name that begins with an underscore.
    entries = [
        Patch(label=f" {name}", facecolor="#{:02x}{:02x}{:02x}".format(*colour), edgecolor="0.4")
        for name, colour in (*shown, ("not counted", UNLABELLED))
    ]
    # A few pixels at borders have much the highest discrepancy, and would leave the rest dark.
    known = np.concatenate([s.get("discrepancy", np.empty(0)).ravel() for s in samples])
    known = known[np.isfinite(known)]
    top = max(float(np.quantile(known, 0.98)), 1e-6) if known.size else 1.0
    aspects = [sample["label"].shape[0] / sample["label"].shape[1] for sample in samples]
    # Street scenes, which are wide, show nothing at the size of a stamp.
    cell = 1.9 * max(1.0, float(np.mean(aspects)) ** -0.5)
    heights = [cell * min(aspect, 1.5) for aspect in aspects]
    # The legend ends where the bars begin; an entry is a box of colour and letters of 8 points.
    entry = 0.5 + 0.075 * max(len(str(patch.get_label())) for patch in entries)
    per_row = max(1, int(cell * (1 + len(masks)) / entry))
    gap, head, foot = 0.06, 0.45, max(0.3 + 0.19 * math.ceil(len(entries) / per_row), 0.65)
    width = len(names) * (cell + gap) + gap
    height = head + sum(heights) + gap * (len(samples) - 1) + foot
    # A dollar sign in a name begins no formula.
    with mpl.rc_context({"text.parse_math": False, "font.size": 8}):
        figure = Figure(figsize=(width, height), dpi=dpi)
        axes = figure.subplots(len(samples), len(names), squeeze=False, height_ratios=heights)
        figure.subplots_adjust(gap / width, foot / height, 1 - gap / width, 1 - head / height)
        figure.subplots_adjust(wspace=gap / cell, hspace=gap * len(heights) / sum(heights))
        for column, name in zip(axes.T, names, strict=True):
            title, cmap, unit, extend = MAPS.get(name, (titles.get(name, name), None, "", ""))
            column[0].set_title(title)
            for axis, sample in zip(column, samples, strict=True):
                # Where a map is NaN, the ground shows.
                axis.set(xticks=[], yticks=[], facecolor=np.divide(UNLABELLED, 255))
                pixels = colours(sample[name], data) if name in masks else sample[name]
                smooth = None if name == "image" else "nearest"  # classes are not mixed
                end = top if name == "discrepancy" else 1.0
                image = axis.imshow(pixels, cmap, vmin=0.0, vmax=end, interpolation=smooth)
            if name in MAPS:
                left, _, wide, _ = column[0].get_position().bounds
                box = (left + 0.05 * wide, (foot - 0.18) / height, 0.9 * wide, 0.1 / height)
                bar: Any = {"label": unit, "extend": extend, "orientation": "horizontal"}
                figure.colorbar(image, figure.add_axes(box), **bar)
        corner: Any = {"loc": "upper left", "bbox_to_anchor": (0.0, (foot - 0.03) / height)}
        figure.legend(handles=entries, ncols=per_row, frameon=False, **corner)
        figure.text(gap / width, 0.05 / height, data.credit, fontsize=6, color="0.35")
    return figure


def encoded(figure: Figure, kind: str) -> bytes:
    """The content of a file with the figure: "png" or "svg"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def curves(metrics: Mapping[str, Sequence[Record]]) -> Figure:
    """The mIoU of all stages and the terms of each one's loss over the steps; what a line ends at
    is in the legend."""
    panels: Any = defaultdict(lambda: defaultdict(list))
    mious = panels["validation mIoU, %"]
    for stage, records in metrics.items():
        for record in records:
            for name, value in record.items():
                if isinstance(value, float) and name not in _NO_TERMS:
                    if record.get("kind") == "train":
                        terms = panels[f"{TITLES[stage]}: loss and its terms"]
                        terms[name].append((record["step"], value))
                    elif name == "miou":
                        mious[stage].append((record["step"], 100 * value))
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12.0, 3.4 * rows), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, 2, place, title=title, xlabel="steps")
        axis.grid(axis="y", alpha=0.3)
        for name, points in lines.items():
            label = f"{TITLES.get(name, name)} {points[-1][1]:.3g}"
            # A teacher that was only evaluated is one point.
            axis.plot(*np.transpose(points), ".-", label=label, color=COLOURS.get(name))
        if lines:
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            axis.legend(frameon=False)
    return figure
