"""Every backend on a CUDA device: accuracy, determinism, streams, graphs, synchronisation, size.

What needs a GPU has the marker `gpu` and is skipped without one. The helpers take the device as
an argument, and a small part of them runs on the CPU as well, so that they are tested everywhere.
Expected values always come from the float64 oracle on the CPU: nothing that a GPU computes is
compared with another thing that the same GPU computed, except where bits must be equal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from common import (
    F32,
    TERM_CASES,
    Batch,
    Result,
    assert_matches,
    assert_same_bits,
    evaluate,
    moved,
    require,
    spec_of,
    truth,
)
from geometries import arranged, batch_of
from torch import Tensor

from heteroakd_fast import BackendUnavailableError, backends, functional

# cuBLAS asks for it in deterministic mode, which conftest.py turns on, and reads it when its
# handle is made: before the first product of matrices is early enough.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_GPU = torch.cuda.is_available()
# By name and not by what is usable here: one that cannot run is a skip with its reason.
COMPILED = backends.CANDIDATES["cuda"]
EVERY = ("reference", *COMPILED)
LAYOUTS = ("contiguous", "channels_last", "sliced")
GEOMETRIES = (
    "label-grid", "stride-4", "other-teacher", "teacher-stride", "downsampled", "bands-corners",
    "blocks",
)  # fmt: skip


needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device is visible to torch")


def gpu(test: Any) -> Any:
    """Marks a test that needs a CUDA device."""
    return pytest.mark.gpu(needs_gpu(test))


DEVICES = ("cpu", pytest.param("cuda", marks=(pytest.mark.gpu, needs_gpu)))
every_backend = pytest.mark.parametrize("backend", EVERY)
every_compiled = pytest.mark.parametrize("backend", COMPILED)
every_case = pytest.mark.parametrize("case", TERM_CASES)
some_cases = pytest.mark.parametrize("case", ["ce-smoothed", "hetero-softmax-kl", "all"])


# --- helpers -----------------------------------------------------------------------------------


def placed(geometry: str, device: str, dtype: torch.dtype = F32, seed: int = 0) -> Batch:
    return arranged(batch_of(geometry, dtype=dtype, seed=seed), "contiguous", device)


def on_cpu(result: Result) -> Result:
    maps = result.maps and {name: values.cpu() for name, values in result.maps.items()}
    return Result(*(moved(value, "cpu") for value in result[:-1]), maps)


def options_of(case: str, geometry: str = "other-teacher") -> dict[str, Any]:
    return {**TERM_CASES[case], "align_corners": geometry == "bands-corners"}


@cache
def expected_of(case: str, geometry: str = "other-teacher", dtype: torch.dtype = F32) -> Result:
    """The oracle is the same for every backend, layout and device."""
    return truth(batch_of(geometry, dtype=dtype), 2.5, **options_of(case, geometry))


Step = Callable[[], list[Tensor]]


def leaves_of(batch: Batch, options: dict[str, Any]) -> Batch:
    """Copies that receive gradients, in memory whose address stays."""
    student = batch.student.detach().clone().requires_grad_()
    teacher = batch.teacher.detach().clone().requires_grad_("teacher_ce_weight" in options)
    return Batch(student, teacher, batch.target.clone())


def step_of(leaves: Batch, **options: Any) -> Step:
    """Loss and gradients with nothing else: reading a value would wait for the GPU."""
    wanted = [tensor for tensor in leaves[:2] if tensor.requires_grad]

    def step() -> list[Tensor]:
        loss = functional.distillation_loss(*leaves.arguments, **options).loss
        # the student of a pass that only trains the teacher gets none, and gets zeros here
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [loss.detach(), *(g for g in grads if g is not None)]

    return step


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


def check_graph(
    step: Step, leaves: Batch, batches: list[Batch], expected: list[list[Tensor]]
) -> None:
    """Replays with each batch's values copied in; bits as without a graph."""
    graph, outputs = capture(step)
    for values, wanted in zip(batches, expected, strict=True):
        refill(leaves, values)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(outputs, wanted, strict=True):
            assert torch.equal(got, want)


def need_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.1f}")


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    if HAS_GPU and torch.cuda.memory_reserved() > 4 << 30:
        torch.cuda.empty_cache()


# --- accuracy ----------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
@every_backend
def test_value_and_gradients(
    backend: str, case: str, dtype: torch.dtype, layout: str, geometry: str
) -> None:
    options = options_of(case, geometry)
    require(backend, "cuda", **options)
    batch = arranged(batch_of(geometry, dtype=dtype), layout, "cuda")
    got = evaluate(batch, 2.5, backend=backend, **options)
    for gradient, logits in ((got.student_grad, batch.student), (got.teacher_grad, batch.teacher)):
        if gradient is not None:
            assert gradient.device == logits.device
            assert gradient.dtype == dtype
    assert_matches(on_cpu(got), expected_of(case, geometry, dtype))


@every_case
@pytest.mark.parametrize("device", DEVICES)
def test_auto_takes_the_first_that_can(device: str, case: str) -> None:
    options = TERM_CASES[case]
    batch = placed("other-teacher", device)
    spec = spec_of(**options)
    chosen = backends.select("auto", spec.structure, device)
    first = next(
        (
            name
            for name in backends.order(device, spec.structure)[0]
            if backends.available()[name] is None
        ),
        "reference",
    )
    assert chosen == first
    got = evaluate(batch, 2.5, backend="auto", **options)
    assert_matches(on_cpu(got), expected_of(case))
    if chosen != "reference":
        assert_same_bits(got, evaluate(batch, 2.5, backend=chosen, **options))


# --- determinism -------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
@every_compiled
def test_determinism(backend: str, case: str, dtype: torch.dtype) -> None:
    """Two runs give the same bits, also with other work and other memory in between."""
    options = options_of(case)
    require(backend, "cuda", **options)
    # a fault that hides behind PyTorch's own deterministic mode is a fault
    torch.use_deterministic_algorithms(False)
    batch = placed("blocks", "cuda", dtype)
    first = evaluate(batch, 2.5, backend=backend, **options)
    assert first.student_grad is None or first.student_grad.isfinite().all()
    for elements in (1, 12345, 1 << 20):
        garbage = torch.full((elements,), float("nan"), device="cuda")
        assert_same_bits(first, evaluate(batch, 2.5, backend=backend, **options))
        del garbage


# --- streams, graphs, synchronisation ----------------------------------------------------------


@gpu
@some_cases
@every_backend
def test_non_default_stream(backend: str, case: str) -> None:
    """The inputs arrive late on the side stream: a kernel on any other one reads old values."""
    options = options_of(case)
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


def eager_steps(leaves: Batch, step: Step, batches: list[Batch]) -> list[list[Tensor]]:
    """What each batch gives without a graph."""
    results = []
    for values in batches:
        refill(leaves, values)
        results.append([tensor.clone() for tensor in step()])
    return results


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
@every_compiled
def test_graph_replay_with_new_values(backend: str, case: str, dtype: torch.dtype) -> None:
    options = options_of(case)
    require(backend, "cuda", **options)
    batches = [placed("other-teacher", "cuda", dtype, seed) for seed in (0, 1, 2)]
    leaves = leaves_of(batches[0], options)
    step = step_of(leaves, backend=backend, **options)
    expected = eager_steps(leaves, step, batches)
    assert not torch.equal(expected[0][0], expected[1][0])
    check_graph(step, leaves, [*batches[1:], batches[0]], [*expected[1:], expected[0]])


def plain_step(leaves: Batch) -> Step:
    """A loss of few operators that any GPU can capture: shows that the harness works."""

    def step() -> list[Tensor]:
        valid = (leaves.target != 255).float().mean()
        loss = (leaves.student.square().mean() + leaves.teacher.mean()) * valid
        return [loss.detach(), *torch.autograd.grad(loss, [leaves.student])]

    return step


@pytest.mark.parametrize("device", DEVICES)
def test_eager_steps_follow_their_inputs(device: str) -> None:
    batches = [placed("other-teacher", device, seed=seed) for seed in (0, 1)]
    for make in (plain_step, lambda leaves: step_of(leaves, **TERM_CASES["all"])):
        leaves = leaves_of(batches[0], TERM_CASES["all"])
        results = eager_steps(leaves, make(leaves), batches)
        assert not torch.equal(results[0][0], results[1][0])
        refill(leaves, batches[0])
        assert torch.equal(make(leaves)()[0], results[0][0])


@gpu
def test_graph_and_synchronisation_harness_on_plain_torch() -> None:
    batches = [placed("other-teacher", "cuda", seed=seed) for seed in (0, 1)]
    leaves = leaves_of(batches[0], {})
    step = plain_step(leaves)
    expected = eager_steps(leaves, step, batches)
    check_graph(step, leaves, batches[::-1], expected[::-1])
    with refuse_synchronisation():
        step()
    with pytest.raises(RuntimeError, match="synchroniz"), refuse_synchronisation():
        step()[0].item()


@gpu
@every_case
@every_compiled
def test_no_synchronisation(backend: str, case: str) -> None:
    options = options_of(case)
    require(backend, "cuda", **options)
    leaves = leaves_of(placed("other-teacher", "cuda"), options)
    step = step_of(leaves, backend=backend, **options)
    for _ in range(2):  # compiling and loading may wait
        step()
    torch.cuda.synchronize()
    with refuse_synchronisation():
        step()


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
@every_compiled
def test_more_than_2_31_elements_of_work(backend: str) -> None:
    require(backend, "cuda", kd_weight=0.7)
    need_memory(40)  # the oracle of one image, in float64
    images, size = 16, (2048, 4096)
    assert images * 19 * size[0] * size[1] > 2**31
    far = 2**31 // (19 * size[0] * size[1]) + 1
    check_image_by_image("cuda", backend, large_batch("cuda", images, (128, 256), size), far)


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
