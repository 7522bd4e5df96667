"""This package: every registered backend, through the public functions."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from heteroakd_fast import backends, functional

from ..cases import OBJECTIVES, Case
from ..inputs import IGNORE_INDEX, Inputs
from ..oracle import evaluation
from . import Forward, Provider
from .baselines import student_and_teacher

__all__ = ["providers"]


class Ours:
    def __init__(self, backend: str) -> None:
        self.name = f"heteroakd[{backend}]"
        self.backend = backend

    def cannot(self, case: Case, device: str) -> str | None:
        return _refusal(self.backend, case.objective, case.align_corners, case.dtype, device)

    def build(self, case: Case, inputs: Inputs) -> Forward:
        options = {
            "ignore_index": IGNORE_INDEX,
            "align_corners": case.align_corners,
            "backend": self.backend,
            **case.target.options,
        }
        if case.target.evaluates:
            return partial(evaluation, case, inputs, self.backend)

        def forward() -> Tensor:
            student, teacher = student_and_teacher(case, inputs)
            return functional.distillation_loss(
                student, inputs.target, teacher if case.target.needs_teacher else None, **options
            ).loss

        return forward


@cache
def _refusal(
    backend: str, objective: str, align_corners: bool, dtype: str, device: str
) -> str | None:
    """Asked by a call on a few pixels: what can run is the backend's own knowledge."""
    logits = torch.zeros(1, 2, 2, 2, device=device, dtype=getattr(torch, dtype))
    target = torch.zeros(1, 4, 4, dtype=torch.int64, device=device)
    wanted = OBJECTIVES[objective]
    try:
        functional.distillation_loss(
            logits,
            target,
            logits if wanted.needs_teacher else None,
            align_corners=align_corners,
            backend=backend,
            **wanted.options,
        )
    except backends.BackendUnavailableError as refused:
        text = str(refused)
        return text.split("cannot run here: ")[-1].split(" `python -m")[0].rstrip(". ")
    return None


def providers() -> list[Provider]:
    return [Ours(name) for name in backends.names()]
