"""The whole job: teacher, student alone, student distilled, report."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .config import STAGES, Config, DistillConfig, ModelConfig
from .datasets import load_data
from .datasets.augment import fit_image
from .datasets.batches import Normalizer, Order, TrainingSet
from .datasets.images import SegmentationData, Source
from .datasets.labelled import (
    Chosen,
    PartlyLabelled,
    balanced_weights,
    labelled_images,
    with_masks,
)
from .datasets.splits import keep_split
from .distributed import ALONE, World
from .engine import StageResult, Trainer, choose_device
from .errors import ConfigError, ModelError
from .logs import say
from .memory import too_large
from .models import build_model, check_logits, count_parameters, stored_statistics
from .objectives import DistillObjective, Objective, PlainObjective, TeacherMemory
from .parallel import dry_run, synchronise_batch_norms
from .scoring import autocast

# Validation images whose shape is looked at, and shapes that networks are tried on.
_READ_SHAPES, _TRIED_SHAPES = 8, 4


@dataclass
class Outcome:
    """Everything the report needs."""

    data: SegmentationData
    device: torch.device
    models: dict[str, nn.Module]
    results: dict[str, StageResult]
    distillation: DistillObjective | None
    config: Config
    """With the values that follow from the data and from weights files."""


def fingerprint(config: Config, stage: str) -> dict[str, str]:
    """The keys that decide what a stage computes; those of display and speed are left out."""
    sections = {
        "teacher": ("seed", "amp", "data", "teacher", "optim", "scale"),
        "alone": ("seed", "amp", "data", "student", "optim", "scale"),
        "distilled": ("seed", "amp", "data", "teacher", "student", "optim", "distill", "scale"),
    }[stage]
    # These change no batch, and nothing that is computed, up to rounding.
    left_out = {"data": {"check", "workers"}, "scale": {"parallel", "timeout"}}
    left_out["optim"] = {"accumulate", "eval_batch_size"}
    if stage == "teacher":  # which has all labels
        left_out["data"] |= {"labelled", "labelled_per_batch"}
    if stage != "distilled":
        left_out |= {"teacher": {"tap"}, "student": {"tap"}}
        kept = config.distill.of_cross_entropy().keys() - {"backend"}
        left_out["distill"] = DistillConfig.model_fields.keys() - kept
        sections += ("distill",)
    table = config.model_dump(mode="json", exclude=left_out)
    if isinstance(path := config.data.palette, Path):
        table["data"]["palette content"] = _content(path)
    for role in ("teacher", "student"):
        for key in ("weights", "init"):
            if (path := getattr(getattr(config, role), key)) is not None:
                table[role][f"{key} content"] = _content(path)
    return _flat({name: table[name] for name in sections})


@lru_cache(maxsize=16)
def _content(path: Path) -> str:
    """A digest of a weights file or folder: the same name may hold other weights tomorrow."""
    digest = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        with contextlib.suppress(OSError), file.open("rb") as content:  # reading it reports it
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


def run(
    config: Config,
    console: Console,
    resume_anyway: bool = False,
    world: World = ALONE,
    memory: TeacherMemory | None = None,
) -> Outcome:
    """Run or resume every stage, together with the other ranks; `memory`: of this teacher."""
    check_shares(config, world)
    config = with_statistics(config.with_unlabelled_index(), console)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device, world)
    # Rank 0 first: what it fetches, prepares and checks the others need not.
    own = config.data if world.main else config.data.model_copy(update={"check": False})
    data = world.on_main_first(lambda: load_data(own, config.distill.unlabelled_index))
    training, labelled = training_sets(config, data)
    text = f"{len(data.train)} training and {len(data.val)} validation images"
    if labelled is not None:
        text += f", {len(labelled)} of the former with labels for the students"
    say(console, f"{text}, {data.num_classes} classes, on {device}")
    side = _side(config, data)
    check_memory(config, side, world)
    distill = world.on_main(lambda: losses(config, training, data.num_classes))
    shapes = world.on_main(lambda: _shapes(config, data, side))

    def build(stage: str) -> nn.Module:
        # Both students start from the same weights and see the same batches.
        seed = 2 * config.seed + (stage != "teacher")
        with _named(stage):
            model = build_model(config.network(stage), data.num_classes, seed)
            model = synchronise_batch_norms(model, config.scale, world, device).to(device)
            if config.scale.channels_last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with autocast(device, config.amp):
                for shape, hint in shapes.items():
                    check_logits(model, data.num_classes, shape, device, hint)
        return model

    # All are built before the first is trained: a mistake in the student's part of the
    # configuration should not show up only when the teacher has been trained.
    needed = {*config.stages, *(["teacher"] if "distilled" in config.stages else [])}
    models: dict[str, nn.Module] = {s: build(s) for s in STAGES if s in needed}
    shared = {"ignore_index": data.ignore_index, "process_group": world.process_group}
    objectives: dict[str, Objective] = {
        stage: PlainObjective(model, distill[stage], **shared)
        for stage, model in models.items()
        if stage != "distilled"
    }
    distillation = None
    if "distilled" in models:
        objectives["distilled"] = distillation = DistillObjective(
            models["distilled"],
            models["teacher"],
            distill["distilled"],
            num_classes=data.num_classes,
            taps=config.taps,
            side=side,
            device=device,
            seed=config.seed,
            memory=memory,
            normalize=_teacher_normalizer(config, device),
            **shared,
        )
        distillation.loss = synchronise_batch_norms(distillation.loss, config.scale, world, device)
    images = config.optim.batch_size // (world.size * config.optim.accumulate)
    for stage, objective in objectives.items():
        trains = stage in config.stages and config.network(stage).steps > 0
        with _named(stage), autocast(device, config.amp):
            dry_run(objective, side, device, images if trains else None)
    if (root := config.data.root) is not None:
        path = config.run / "split.txt"
        world.on_main(lambda: keep_split(data, root.expanduser(), path))
    results: dict[str, StageResult] = {}
    for stage, objective in objectives.items():
        results[stage] = result = Trainer(
            stage,
            objective,
            config=config,
            data=data,
            training=training[stage],
            folder=config.run / stage,
            # A teacher that is only used is only evaluated.
            steps=config.network(stage).steps if stage in config.stages else 0,
            fingerprint=fingerprint(config, stage),
            device=device,
            console=console,
            side=side,
            world=world,
            resume_anyway=resume_anyway,
        ).run()
        text = f"{stage}: {count_parameters(objective.model) / 1e6:.2f} M parameters, "
        text += f"{result.steps} steps, {result.seconds:.0f} s, "
        say(console, f"{text}val mIoU {result.scores.miou:.4f}")
    return Outcome(data, device, models, results, distillation, config)


def with_statistics(config: Config, console: Console) -> Config:
    """The same with each network's mean and std: set, or what comes with its weights."""
    for role in ("teacher", "student"):
        network: ModelConfig = getattr(config, role)
        weights = network.weights or network.init
        path, found = (weights and stored_statistics(weights)) or (None, None)
        if found and network.mean is None:
            own = dict(zip(("mean", "std"), found, strict=True))
            config = config.model_copy(update={role: network.model_copy(update=own)})
        data = config.data_of(role)
        used, said = (data.mean, data.std), f"as {path} says"
        if used != found:
            said = "as configured" + (f"; {path} says {found[0]} and {found[1]}" if found else "")
        if used != (config.data.mean, config.data.std) or used != (found or used):
            say(console, f"{role}: images normalised with mean {used[0]} and std {used[1]}, {said}")
    return config


def _teacher_normalizer(config: Config, device: torch.device) -> Normalizer | None:
    """From the student's images to the teacher's; None where they are the same."""
    own, given = config.data_of("teacher"), config.data_of("distilled")
    if (own.mean, own.std) == (given.mean, given.std):
        return None
    return Normalizer(own, device, config.scale.channels_last, given)


@contextlib.contextmanager
def _named(stage: str) -> Iterator[None]:
    """Put the network's name before what is wrong with it."""
    try:
        yield
    except ModelError as error:
        role = "teacher" if stage == "teacher" else "student"
        raise ModelError(f"{role}: {error}") from error


def training_sets(
    config: Config, data: SegmentationData
) -> tuple[dict[str, TrainingSet], tuple[int, ...] | None]:
    """What each stage learns from, and the images whose labels the students see (None: all).

    The teacher has all masks, the student alone the labelled images; distilled it sees all images,
    with the labels of those.
    """
    labelled = labelled_images(data, config.data, config.seed)

    def drawn(source: Source, **options: Any) -> TrainingSet:
        order = Order(config.seed, config.optim.batch_size, len(source), **options)
        return TrainingSet(source, order)

    sets = {"teacher": drawn(with_masks(data))}
    if labelled is None:
        sets |= {"alone": drawn(data.train), "distilled": drawn(data.train)}
        return sets, None
    index = config.distill.unlabelled_index
    assert index is not None
    partly = PartlyLabelled(data.train, frozenset(labelled), index)
    slots = {"labelled": labelled, "labelled_slots": config.labelled_slots}
    sets |= {"alone": drawn(Chosen(data.train, labelled)), "distilled": drawn(partly, **slots)}
    return sets, labelled


def losses(
    config: Config, training: dict[str, TrainingSet], num_classes: int
) -> dict[str, DistillConfig]:
    """The loss of each stage: `distill`, with the balanced class weights of its own labels."""
    if config.distill.class_weight != "balanced":
        return dict.fromkeys(training, config.distill)
    # Distilled, a student has the labels that it has alone.
    students = training["alone"].source
    own = balanced_weights(students, num_classes)
    teacher = training["teacher"].source
    weights = {"teacher": own if teacher is students else balanced_weights(teacher, num_classes)}
    return {
        stage: config.distill.model_copy(update={"class_weight": weights.get(stage, own)})
        for stage in training
    }


def check_memory(config: Config, side: tuple[int, int], world: World) -> None:
    """Refuse images that cannot be in memory, before they take all of it: those of a step, as bytes
    and as float32 with int64 labels, and the largest that validation can meet.

    Raises:
        ConfigError: they cannot.
    """
    factor = 1.0 if config.data.crop is not None else config.data.scale[1]
    images = config.optim.batch_size // world.size
    if problem := too_large(images * side[0] * side[1] * factor**2 * (3 + 12 + 8)):
        raise ConfigError(
            f"optim.batch_size = {config.optim.batch_size} images of {side[1]} x {side[0]} pixels "
            f"would {problem}; lower optim.batch_size, data.crop or data.scale"
        )
    long, short = config.data.resize or (0, 0)
    if problem := too_large(long * short * (3 + 12)):
        raise ConfigError(
            f"data.resize = {[long, short]}: one image for validation would {problem}; lower it"
        )


def check_shares(config: Config, world: World) -> None:
    """Whether every rank gets the same number of images in every micro-batch.

    Raises:
        ConfigError: the batch cannot be shared out.
    """
    shares = world.size * config.optim.accumulate
    if config.optim.batch_size % shares:
        raise ConfigError(
            f"optim.batch_size is {config.optim.batch_size}, which {world.size} ranks times "
            f"optim.accumulate = {config.optim.accumulate} cannot share; "
            f"take a multiple of {shares}"
        )
    if world.size > 1 and config.scale.parallel == "fsdp" and config.amp == "fp16":
        raise ConfigError('amp = "fp16" does not go with scale.parallel = "fsdp"; take "bf16"')


def _side(config: Config, data: SegmentationData) -> tuple[int, int]:
    """Height and width of the images that the networks train on."""
    if config.data.crop_size is not None:
        return config.data.crop_size
    mask = data.train.read(0)[1]
    return mask.shape[0], mask.shape[1]


def _shapes(
    config: Config, data: SegmentationData, side: tuple[int, int]
) -> dict[tuple[int, int], str]:
    """Heights and widths that the networks meet, in training and in the first few validation images
    of different shapes; and what to do where a network cannot take them."""
    shapes = {side: "; data.crop decides the size of training images"}
    for index in range(min(len(data.val), _READ_SHAPES)):
        height, width = fit_image(data.val.read(index)[0], config.data).shape[:2]
        if config.data.windows:
            window = config.data.windows[0]
            height, width = min(height, window[0]), min(width, window[1])
        text = f"; {data.val.name(index)}, for validation, has this size: set data.window = "
        text += f"{list(side)} to evaluate by windows of the training size, or data.resize"
        shapes.setdefault((height, width), text)
    return dict(list(shapes.items())[:_TRIED_SHAPES])
