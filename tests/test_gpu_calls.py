"""Small calls that together reach every kernel of both GPU backends. `python3 dev.py gpu` runs them
first, and some under compute-sanitizer. Without a GPU the CUDA kernels run through the shim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cuda_shim
import pytest
import torch
from common import Batch, assert_matches, evaluate, make_batch, require, truth
from shim_backend import USED as SHIM
from test_gpu import assert_same_bits, check_graph, eager_steps, gpu, leaves_of, on_cpu, step_of

from heteroakd_fast import backends

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
HETERO = {"hetero_weight": 1.0, "temperature": 2.0}
SPACE = {**HETERO, "preset": "paper", "weight_axis": "space"}
EVERY = {"teacher_ce_weight": 0.8, "kd_weight": 0.7, "hetero_weight": 0.6, "feature_weight": 0.5,
         "temperature": 1.5}  # fmt: skip
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """Options of the loss, and logits and labels to call it on."""

    options: Mapping[str, Any]
    grid: tuple[int, int] = (9, 17)
    teacher_grid: tuple[int, int] | None = None
    size: tuple[int, int] = (37, 67)
    classes: int = 19
    dtype: torch.dtype = torch.float32
    labels: torch.dtype = torch.int64
    channels_last: bool = False
    masked: bool = False
    """One class is -1e4 everywhere, and one logit far from the others: the exact fallbacks"""


LABEL_GRID: dict[str, Any] = {"grid": (13, 20), "size": (13, 20)}
GATHER: dict[str, Any] = {"grid": (4, 6), "teacher_grid": (8, 3), "size": (13, 17)}
CALLS = {
    # by cells
    "ce": Call({}),
    "ce+kd": Call({"kd_weight": 1.0, "temperature": 2.0}, labels=torch.uint8),
    "ce+hetero": Call(HETERO),
    "ce+kd+hetero": Call({**HETERO, "kd_weight": 0.3, "temperature": 1.7}, labels=torch.int32),
    "bfloat16": Call(HETERO, dtype=BF16),
    "float16": Call(HETERO, dtype=torch.float16),
    "channels_last": Call(HETERO, channels_last=True),
    "align_corners": Call({**HETERO, "align_corners": True}),
    "40 classes": Call(HETERO, classes=40),
    "150 classes": Call(HETERO, classes=150, grid=(5, 9), size=(17, 33)),
    "masked class": Call(HETERO, masked=True),
    # on the label grid
    "label grid, ce": Call({}, **LABEL_GRID),
    "label grid": Call(HETERO, **LABEL_GRID),
    "label grid, bfloat16": Call(HETERO, **LABEL_GRID, dtype=BF16),
    "label grid, 40 classes": Call(HETERO, **LABEL_GRID, classes=40),
    "label grid, ce, 60 classes": Call({}, **LABEL_GRID, classes=60),
    # by segments; Triton's other kernels
    "smoothed, class weights": Call({"label_smoothing": 0.1, "class_weight": True}),
    "two grids": Call({**HETERO, "kd_weight": 0.3}, **GATHER),
    "mix = logits": Call({**HETERO, "mix": "logits"}),
    "paper": Call({**HETERO, "preset": "paper"}),
    "paper, space": Call(SPACE),
    "reverse kd": Call({"kd_weight": 0.3, "kd_divergence": "reverse"}),
    "js": Call({"kd_weight": 1.3, "kd_divergence": "js", "kd_beta": 0.3}),
    "maps": Call({**HETERO, "return_maps": True}),
    "every term": Call(EVERY, **GATHER),
    "every term, bfloat16": Call(EVERY, **GATHER, dtype=BF16),
    "float64": Call(EVERY, dtype=torch.float64),
    "float64, space": Call(SPACE, dtype=torch.float64),
}
#: For a sanitizer, under which kernels are slow.
SANITIZED = (
    *("ce+hetero", "bfloat16", "40 classes", "masked class", "label grid", "label grid, bfloat16"),
    *("two grids", "mix = logits", "paper, space", "js", "every term", "float64"),
)
pytestmark = pytest.mark.skipif(not (HAS_GPU or SHIM), reason="neither a GPU nor the shim")
# Not named "backend": of those that are, conftest.py runs a sample.
by = pytest.mark.parametrize("by", backends.CANDIDATES["cuda"] if HAS_GPU else ("cuda",))


def prepared(
    name: str, by: str, seed: int = 0, few_classes: bool = True
) -> tuple[Batch, dict[str, Any]]:
    """The inputs on the device, and the options; smaller for the shim, with few classes too."""
    call = CALLS[name]
    if not HAS_GPU:
        teacher = call.teacher_grid and (4, 2)
        size = (3, 4) if call.size == call.grid else (10, 13)
        classes = 3 if few_classes else call.classes
        call = replace(call, classes=classes, grid=(3, 4), teacher_grid=teacher, size=size)
    batch = make_batch(2, call.classes, call.grid, call.teacher_grid, call.size, call.dtype,
                       label_dtype=call.labels, seed=seed)  # fmt: skip
    if call.masked:
        for logits in (batch.student, batch.teacher):
            logits[:, 1] = -1e4
            logits[0, 0, 2, 3] = -400.0
        batch.target[batch.target == 1] = 0
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    student, teacher = (x.to(DEVICE, memory_format=layout) for x in (batch.student, batch.teacher))
    options: dict[str, Any] = {**call.options, "backend": by}
    if options.get("class_weight"):
        weights = torch.linspace(0.5, 1.5, call.classes, dtype=call.dtype, device=DEVICE)
        options["class_weight"] = weights
    else:
        require(by, DEVICE, **call.options)
    return Batch(student, teacher, batch.target.to(DEVICE)), options


@by
@pytest.mark.parametrize("name", CALLS)
def test_value_gradients_and_bits(name: str, by: str) -> None:
    batch, options = prepared(name, by)
    got = evaluate(batch, **options)
    on_host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = truth(Batch(*(x.cpu() for x in batch)), **on_host)
    assert_matches(on_cpu(got), expected)
    for key, wanted in (expected.maps or {}).items():
        torch.testing.assert_close(
            (got.maps or {})[key].cpu().double(), wanted, rtol=1e-5, atol=1e-5
        )
    for elements in (1, 12345, 1 << 20):
        garbage = torch.full((elements,), float("nan"), device=DEVICE)
        assert_same_bits(got, evaluate(batch, **options))
        del garbage


@gpu
@by
@pytest.mark.parametrize("name", CALLS)
def test_graph_replays(name: str, by: str) -> None:
    batches = [prepared(name, by, seed)[0] for seed in (0, 1)]
    options = prepared(name, by)[1]
    leaves = leaves_of(batches[0], options)
    step = step_of(leaves, **options)
    expected = [outputs for _, outputs in eager_steps(leaves, step, batches)]
    check_graph(step, leaves, batches[::-1], expected[::-1])


@gpu
@by
@pytest.mark.parametrize("name", SANITIZED)
def test_under_a_sanitizer(name: str, by: str) -> None:
    """The tool finds what there is to find; without it this runs the kernels."""
    batch, options = prepared(name, by)
    evaluate(batch, **options)
    torch.cuda.synchronize()


@pytest.mark.skipif(HAS_GPU, reason="a GPU does not say which kernels ran")
def test_the_calls_reach_every_kernel() -> None:
    named = set()
    for file in (ROOT / "csrc" / "cuda").glob("*.cu"):
        pattern = r'"((?:cells|label grid|segments)(?:: [^"]+| in double)?)"'
        named |= set(re.findall(pattern, file.read_text()))
    assert len(named) >= 16
    cuda_shim.launched()
    for name in CALLS:
        batch, options = prepared(name, "cuda", few_classes=False)
        evaluate(batch, **options)
    assert named <= set(cuda_shim.launched())
    assert set(SANITIZED) <= set(CALLS)
