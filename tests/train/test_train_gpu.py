"""The driver on a GPU: every way of running it, on one card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"scale": {"channels_last": True}},
        {"scale": {"compile": True}, "amp": "bf16"},
        {"optim": {"accumulate": 2}, "distill": {"cwd_weight": 1.0}},
    ],
    ids=["plain", "bf16", "fp16", "channels_last", "compiled", "accumulated"],
)
def test_a_run_learns_and_is_not_repeated(tmp_path: Path, changes: dict[str, Any]) -> None:
    # Not at the top: a machine lent for its GPU may have torch and nothing else.
    for library in ("pydantic", "tyro", "rich", "safetensors", "filelock"):
        pytest.importorskip(library)
    from train_helpers import QUIET, changed, write_config

    from heteroakd_fast.train import pipeline
    from heteroakd_fast.train.reading import load_config

    config = changed(load_config(write_config(tmp_path, steps=80)), device="cuda", **changes)
    outcome = pipeline.run(config, QUIET)
    for stage, result in outcome.results.items():
        assert result.scores.miou > 0.5, stage
        assert next(outcome.models[stage].parameters()).is_cuda
    again = pipeline.run(config, QUIET)
    assert again.results == outcome.results
