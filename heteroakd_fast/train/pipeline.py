"""The whole job: teacher, student alone, student distilled, report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .config import Config, ModelConfig
from .data import SegmentationData, load_data
from .engine import StageResult, Trainer, choose_device
from .models import build_model, check_logits, count_parameters
from .objectives import DistillObjective, Objective, PlainObjective, dry_run

STAGES = ("teacher", "alone", "distilled")


@dataclass
class Outcome:
    """Everything the report needs."""

    data: SegmentationData
    device: torch.device
    models: dict[str, nn.Module]
    results: dict[str, StageResult]
    distillation: DistillObjective


def fingerprint(config: Config, stage: str) -> dict[str, str]:
    """The keys that decide what a stage computes; those of display and speed are left out."""
    sections = {
        "teacher": ("seed", "amp", "data", "teacher", "optim"),
        "alone": ("seed", "amp", "data", "student", "optim"),
        "distilled": ("seed", "amp", "data", "teacher", "student", "optim", "distill"),
    }[stage]
    table = config.model_dump(mode="json")
    # Neither changes a batch.
    for key in ("check", "workers"):
        del table["data"][key]
    if stage != "distilled":
        for role in ("teacher", "student"):
            del table[role]["tap"]
        sections += ("distill.label_smoothing",)
        table["distill.label_smoothing"] = table["distill"]["label_smoothing"]
    return _flat({name: table[name] for name in sections})


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


def run(config: Config, console: Console, resume_anyway: bool = False) -> Outcome:
    """Run or resume every stage."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    data = load_data(config.data, config.seed)
    console.print(
        f"{len(data.train)} training and {len(data.val)} validation pictures, "
        f"{data.num_classes} classes, on {device}",
        highlight=False,
    )
    crop = config.data.crop_size
    side = min(crop) if crop else int(data.train.read(0)[1].shape[0])
    models: dict[str, nn.Module] = {}
    results: dict[str, StageResult] = {}

    def build(model_config: ModelConfig, seed: int) -> nn.Module:
        model = build_model(model_config, data.num_classes, seed).to(device)
        check_logits(model, data.num_classes, side, device)
        return model

    def train(stage: str, objective: Objective, model_config: ModelConfig) -> None:
        trainer = Trainer(
            stage,
            objective,
            config=config,
            data=data,
            folder=config.run / stage,
            steps=model_config.steps,
            lr=model_config.lr or config.optim.lr,
            fingerprint=fingerprint(config, stage),
            device=device,
            console=console,
            resume_anyway=resume_anyway,
        )
        models[stage] = objective.model
        results[stage] = trainer.run()
        console.print(
            f"{stage}: {count_parameters(objective.model) / 1e6:.2f} M parameters, "
            f"{results[stage].steps} steps, {results[stage].seconds:.0f} s, "
            f"val mIoU {results[stage].scores.miou:.4f}",
            highlight=False,
        )

    # All three are built before the first is trained: a mistake in the student's part of the
    # configuration should not show up only when the teacher has been trained.
    # Both students start from the same weights and see the same batches.
    teacher = build(config.teacher, 2 * config.seed)
    alone = build(config.student, 2 * config.seed + 1)
    student = build(config.student, 2 * config.seed + 1)
    taps = None
    if config.student.tap is not None and config.teacher.tap is not None:
        taps = (config.student.tap, config.teacher.tap)
    distillation = DistillObjective(
        student,
        teacher,
        config.distill,
        num_classes=data.num_classes,
        ignore_index=data.ignore_index,
        taps=taps,
        side=side,
        device=device,
        seed=config.seed,
    )
    plain = [PlainObjective(model, config.distill, data.ignore_index) for model in (teacher, alone)]
    for objective in (*plain, distillation):
        dry_run(objective, side, device)
    train("teacher", plain[0], config.teacher)
    train("alone", plain[1], config.student)
    train("distilled", distillation, config.student)
    return Outcome(data, device, models, results, distillation)
