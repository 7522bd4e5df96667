"""What only a GPU can tell: small calls that together reach every kernel of both backends, with
their bits, graphs, streams and synchronisation; sizes; errors. `tests/contract` and `tests/kernels`
run on a GPU as well, where there is one.

`python3 dev.py gpu` runs the calls first, and some under compute-sanitizer. Without a GPU the CUDA
kernels run through the shim, and what needs a GPU (marker `gpu`) is skipped. Expected values come
from the float64 oracle on the CPU: nothing that a GPU computes is compared with another thing that
the same GPU computed, except where bits must be equal.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cuda_shim
import pytest
import torch
from common import (
    TERM_CASES,
    Batch,
    Result,
    assert_maps_match,
    assert_matches,
    assert_same_bits,
    evaluate,
    make_batch,
    moved,
    require,
    spec_of,
    truth,
)
from geometries import arranged, batch_of
from shim_backend import USED as SHIM
from torch import Tensor

from heteroakd_fast import BackendUnavailableError, backends, functional

# cuBLAS asks for it in deterministic mode, which conftest.py turns on, and reads it when its
# handle is made: before the first product of matrices is early enough.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# By name and not by what is usable here: one that cannot run is a skip with its reason.
COMPILED = backends.CANDIDATES["cuda"]

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device is visible to torch")
needs_kernels = pytest.mark.skipif(not (HAS_GPU or SHIM), reason="neither a GPU nor the shim")


def gpu(test: Any) -> Any:
    """Marks a test that needs a CUDA device."""
    return pytest.mark.gpu(needs_gpu(test))


DEVICES = ("cpu", pytest.param("cuda", marks=(pytest.mark.gpu, needs_gpu)))
every_backend = pytest.mark.parametrize("backend", ["reference", *COMPILED])
every_case = pytest.mark.parametrize("case", TERM_CASES)
# Not named "backend": of those that are, conftest.py runs a sample.
by = pytest.mark.parametrize("by", COMPILED if HAS_GPU else ("cuda",))


# --- the calls -----------------------------------------------------------------------------------

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
    "further terms": Call({**EVERY, "terms": TERM_CASES["all+objects"]["terms"]}, **GATHER),
    "float64": Call(EVERY, dtype=torch.float64),
    "float64, space": Call(SPACE, dtype=torch.float64),
}
#: For a sanitizer, under which kernels are slow.
SANITIZED = (
    *("ce+hetero", "bfloat16", "40 classes", "masked class", "label grid", "label grid, bfloat16"),
    *("two grids", "mix = logits", "paper, space", "js", "every term", "float64"),
)


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


def on_cpu(result: Result) -> Result:
    maps = result.maps and {name: values.cpu() for name, values in result.maps.items()}
    return Result(*(moved(value, "cpu") for value in result[:-1]), maps)


@needs_kernels
@by
@pytest.mark.parametrize("name", CALLS)
def test_value_gradients_and_bits(name: str, by: str) -> None:
    """And the same bits again, with other memory in between, not because of PyTorch's own
    deterministic mode."""
    batch, options = prepared(name, by)
    got = evaluate(batch, **options)
    on_host = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = truth(Batch(*(x.cpu() for x in batch)), **on_host)
    assert_matches(on_cpu(got), expected)
    if got.maps is not None:
        assert_maps_match(on_cpu(got), expected)
    torch.use_deterministic_algorithms(False)
    for elements in (1, 12345, 1 << 20):
        garbage = torch.full((elements,), float("nan"), device=DEVICE)
        assert_same_bits(got, evaluate(batch, **options))
        del garbage


@gpu
@by
@pytest.mark.parametrize("name", SANITIZED)
def test_under_a_sanitizer(name: str, by: str) -> None:
    """The tool finds what there is to find; without it this runs the kernels."""
    batch, options = prepared(name, by)
    evaluate(batch, **options)
    torch.cuda.synchronize()


@needs_kernels
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


# --- graphs, streams, synchronisation ------------------------------------------------------------


Step = Callable[[], list[Tensor]]


def step_of(batch: Batch, **options: Any) -> tuple[Batch, Step]:
    """Copies of the tensors whose addresses stay, and the loss and gradients of them with nothing
    else: reading a value would wait for the GPU."""
    student = batch.student.detach().clone().requires_grad_()
    teacher = batch.teacher.detach().clone().requires_grad_("teacher_ce_weight" in options)
    leaves = Batch(student, teacher, batch.target.clone())
    wanted = [tensor for tensor in leaves[:2] if tensor.requires_grad]

    def step() -> list[Tensor]:
        loss = functional.distillation_loss(*leaves.arguments, **options).loss
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    return leaves, step


def refill(leaves: Batch, values: Batch) -> None:
    with torch.no_grad():
        for buffer, value in zip(leaves, values, strict=True):
            buffer.copy_(value)


@contextmanager
def refuse_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(step: Step) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one step and the tensors that each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, loads modules, sizes workspaces: not while capturing
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@gpu
@by
@pytest.mark.parametrize("name", CALLS)
def test_graph_replays(name: str, by: str) -> None:
    """With new values copied in: bits as without a graph, and no step waits for the GPU."""
    batches = [prepared(name, by, seed)[0] for seed in (0, 1)]
    leaves, step = step_of(batches[0], **prepared(name, by)[1])
    expected = []
    for values in batches:
        refill(leaves, values)
        expected.append([tensor.clone() for tensor in step()])
    assert not torch.equal(expected[0][0], expected[1][0])
    with refuse_synchronisation():
        step()
    graph, outputs = capture(step)
    for number in (1, 0):
        refill(leaves, batches[number])
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, outputs, expected[number]))


@gpu
def test_synchronisation_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), refuse_synchronisation():
        torch.ones(1, device="cuda").item()


def placed(geometry: str, device: str) -> Batch:
    return arranged(batch_of(geometry), "contiguous", device)


@cache
def expected_of(case: str) -> Result:
    """The oracle is the same for every backend and device."""
    return truth(batch_of("other-teacher"), 2.5, **TERM_CASES[case])


@gpu
@every_case
@every_backend
def test_non_default_stream(backend: str, case: str) -> None:
    """The inputs arrive late on the side stream: a kernel on any other one reads old values."""
    options = TERM_CASES[case]
    require(backend, "cuda", **options)
    values = placed("other-teacher", "cuda")
    evaluate(values, 2.5, backend=backend, **options)  # what compiles, compiles here
    late = Batch(
        torch.zeros_like(values.student),
        torch.zeros_like(values.teacher),
        torch.full_like(values.target, 255),
    )
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        refill(late, values)
        got = evaluate(late, 2.5, backend=backend, **options)
    side.synchronize()
    assert_matches(on_cpu(got), expected_of(case))


# --- the choice of a backend ---------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("device", DEVICES)
def test_auto_takes_the_first_that_can(device: str, case: str) -> None:
    options = TERM_CASES[case]
    batch = placed("other-teacher", device)
    spec = spec_of(**options)
    chosen = backends.select("auto", spec.structure, device)
    able = [x for x in backends.order(device, spec.structure)[0] if backends.available()[x] is None]
    assert chosen == [*able, "reference"][0]
    got = evaluate(batch, 2.5, backend="auto", **options)
    assert_matches(on_cpu(got), expected_of(case))
    if chosen != "reference":
        assert_same_bits(got, evaluate(batch, 2.5, backend=chosen, **options))


# --- size --------------------------------------------------------------------------------------


def check_image_by_image(device: str, backend: str, batch: Batch, first_far_image: int) -> None:
    """A batch too large for the oracle against the oracle of its images.

    With one denominator for all, the loss is the sum over images, and an image's gradient is its
    own; of the gradients the first and one beyond the 32-bit range are compared.
    """
    options: dict[str, Any] = {"kd_weight": 0.7, "temperature": 2.0}
    require(backend, device, **options)
    torch.use_deterministic_algorithms(False)  # would fill, and sort for, gigabytes
    options["normalizer"] = float((batch.target != 255).sum())
    got = evaluate(batch, backend=backend, **options)
    assert got.student_grad is not None
    last = len(batch.student) - 1
    assert first_far_image <= last
    total = 0.0
    for image in range(len(batch.student)):
        one = Batch(*(tensor[image : image + 1] for tensor in batch))
        expected = truth(one, **options)
        total += float(expected.loss)
        if image in (0, last):
            part = got._replace(
                loss=expected.loss,
                terms=expected.terms,
                student_grad=got.student_grad[image : image + 1].cpu(),
            )
            assert_matches(part, on_cpu(expected))
    assert float(got.loss) == pytest.approx(total, rel=2e-6)


def large_batch(device: str, images: int, grid: tuple[int, int], size: tuple[int, int]) -> Batch:
    """Drawn where it is used; labels in one byte."""
    generator = torch.Generator(device).manual_seed(0)

    def logits() -> Tensor:
        return 3 * torch.randn(images, 19, *grid, generator=generator, device=device)

    target = torch.randint(0, 19, (images, *size), generator=generator, device=device)
    ignored = torch.rand(target.shape, generator=generator, device=device) < 0.1
    return Batch(logits(), logits(), target.masked_fill_(ignored, 255).to(torch.uint8))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_image_by_image_check_on_the_cpu(backend: str) -> None:
    check_image_by_image("cpu", backend, large_batch("cpu", 3, (4, 8), (16, 32)), 2)


@gpu
@pytest.mark.parametrize("backend", COMPILED)
def test_more_than_2_31_elements_of_work(backend: str) -> None:
    require(backend, "cuda", kd_weight=0.7)
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("the oracle of one image, in float64, needs 40 GiB of free GPU memory")
    images, size = 16, (2048, 4096)
    assert images * 19 * size[0] * size[1] > 2**31
    far = 2**31 // (19 * size[0] * size[1]) + 1
    check_image_by_image("cuda", backend, large_batch("cuda", images, (128, 256), size), far)
    torch.cuda.empty_cache()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher_logits", "target", "class_weight"])
@pytest.mark.parametrize("device", DEVICES)
def test_refuses_a_mix_of_devices(device: str, which: str) -> None:
    batch = placed("other-teacher", device)
    call: dict[str, Any] = {
        "student_logits": batch.student,
        "teacher_logits": batch.teacher,
        "target": batch.target,
        "class_weight": torch.ones(3, device=device),
    }
    elsewhere = "meta" if device == "cpu" else "cpu"
    call[which] = call[which].to(elsewhere)
    with pytest.raises(ValueError, match=rf"^{which}: is on {elsewhere}, .* on {device}"):
        functional.distillation_loss(**call, kd_weight=1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_refuses_a_backend_of_another_device(device: str) -> None:
    batch = placed("other-teacher", device)
    others = [name for name in COMPILED if device not in backends.get(name).devices()]
    for name in others if device == "cpu" else ["cpu"]:
        reason = backends.available()[name]
        with pytest.raises(BackendUnavailableError) as caught:
            functional.cross_entropy(batch.student, batch.target, backend=name)
        assert repr(name) in str(caught.value)
        wanted = f"tensors, these are on {device}" if reason is None else reason
        assert wanted in str(caught.value)


@every_backend
@pytest.mark.parametrize("device", DEVICES)
def test_refuses_bad_labels_when_told_to_wait_for_them(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(backend, device)
    monkeypatch.setenv("HETEROAKD_CHECK_LABELS", "1")
    batch = placed("other-teacher", device)
    target = batch.target.clone()
    target[1, 2, 3] = 5
    with pytest.raises(ValueError, match=r"target: label 5 at \(b=1, y=2, x=3\)"):
        functional.cross_entropy(batch.student, target, backend=backend)


@gpu
@every_backend
def test_bad_labels_are_a_device_side_assertion(backend: str) -> None:
    """In a process of its own, whose CUDA context does not survive it."""
    require(backend, "cuda")
    code = f"""
import torch
from heteroakd_fast import functional
logits = torch.randn(1, 5, 4, 4, device="cuda")
target = torch.full((1, 8, 8), 7, device="cuda")
functional.cross_entropy(logits, target, backend={backend!r})
torch.cuda.synchronize()
"""
    environment = {k: v for k, v in os.environ.items() if k != "HETEROAKD_CHECK_LABELS"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode != 0
    assert "device-side assert" in run.stderr, run.stderr[-2000:]
