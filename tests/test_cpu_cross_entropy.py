"""The compiled upsampling cross entropy, beyond what every backend is tested for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from common import Batch, assert_accurate, eager_cross_entropy, evaluate, truth
from hypothesis import example, given, settings
from hypothesis import strategies as st

from heteroakd_fast import _extension, functional

pytestmark = pytest.mark.skipif(
    not _extension.loaded(), reason=f"no compiled extension: {_extension.unavailable()}"
)


@settings(max_examples=150)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(2, 24),
    grid=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    align_corners=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    label_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    scale=st.sampled_from([0.0, 1.0, 5.0, 40.0]),
    ignored=st.sampled_from([0.0, 0.3, 0.95]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(  # the last label rows read the last logits row twice
    batch=1, classes=2, grid=(9, 1), size=(70, 1), align_corners=False, weighted=False,
    smoothing=0.0, dtype=torch.float64, label_dtype=torch.int64, scale=1.0, ignored=0.0,
    channels_last=False, seed=0,
)  # fmt: skip
@example(  # three bands of rows and two tiles of columns, with ragged ends
    batch=2, classes=3, grid=(17, 5), size=(69, 129), align_corners=True, weighted=True,
    smoothing=0.1, dtype=torch.float32, label_dtype=torch.uint8, scale=5.0, ignored=0.3,
    channels_last=True, seed=1,
)  # fmt: skip
def test_equals_interpolate_and_cross_entropy(
    batch: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
    weighted: bool,
    smoothing: float,
    dtype: torch.dtype,
    label_dtype: torch.dtype,
    scale: float,
    ignored: float,
    channels_last: bool,
    seed: int,
) -> None:
    """Against torch's own functions in float64, value and gradient, on the same input values."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, classes, *grid, generator=generator, dtype=torch.float64) * scale
    logits = z.to(dtype)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, classes, (batch, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    target[0, 0, 0] = 0  # at least one valid pixel
    weight = torch.rand(classes, generator=generator).double() + 0.1 if weighted else None

    x = logits.detach().requires_grad_()
    output = functional.cross_entropy(
        x,
        target.to(label_dtype),
        align_corners=align_corners,
        class_weight=None if weight is None else weight.float(),
        label_smoothing=smoothing,
        backend="cpu",
    )
    exact = logits.detach().double().requires_grad_()
    expected = eager_cross_entropy(
        exact,
        target,
        align_corners,
        weight=None if weight is None else weight.float().double(),
        label_smoothing=smoothing,
    )
    relative = 1e-12 if dtype == torch.float64 else 3e-6
    assert float(output.loss.detach()) == pytest.approx(
        float(expected.detach()), rel=relative, abs=relative
    )
    grad_output = torch.tensor(-1.7)
    (ours,) = torch.autograd.grad(output.loss, x, grad_output.to(output.loss))
    (theirs,) = torch.autograd.grad(expected, exact, grad_output.double())
    assert ours.stride() == x.stride()
    natural = 1.7 / int(output.valid)
    if theirs.abs().max() > 1e-3 * natural:
        assert_accurate(ours, theirs)
    else:  # everything cancels: uniform logits under full smoothing
        assert ours.abs().max() <= 2e-3 * natural


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 7, 8, 16, 32])
@pytest.mark.parametrize("align_corners", [False, True])
def test_integer_ratios(ratio: int, align_corners: bool) -> None:
    torch.manual_seed(ratio)
    batch = Batch(
        torch.randn(2, 19, 9, 11) * 4,
        torch.zeros(2, 19, 1, 1),
        torch.randint(0, 19, (2, 9 * ratio, 11 * ratio)),
    )
    got = evaluate(batch, backend="cpu", align_corners=align_corners)
    assert_accurate(got.student_grad, truth(batch, align_corners=align_corners).student_grad)


def test_odd_ratio_far_from_the_origin() -> None:
    """Column 4000 of a ratio that is no power of two: the taps must be placed in double."""
    batch = Batch(
        torch.randn(1, 3, 2, 1500) * 5,
        torch.zeros(1, 3, 1, 1),
        torch.randint(0, 3, (1, 5, 4001)),
    )
    got = evaluate(batch, backend="cpu")
    assert_accurate(got.student_grad, truth(batch).student_grad)


@pytest.mark.parametrize(("grid", "size"), [((1, 1), (1, 65536)), ((2, 2), (700, 700))])
def test_a_great_many_label_pixels_per_logit(grid: tuple[int, int], size: tuple[int, int]) -> None:
    batch = Batch(
        torch.randn(1, 3, *grid), torch.zeros(1, 3, 1, 1), torch.zeros(1, *size, dtype=torch.uint8)
    )
    got = evaluate(batch, backend="cpu")
    assert_accurate(got.student_grad, truth(batch).student_grad)


def test_infinite_logits_spread_no_further_than_their_weights() -> None:
    """-inf masks a class; the pixels that do not read it stay finite, on the grid points too."""
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0, 2] = float("-inf")
    x = logits.requires_grad_()
    target = torch.zeros(1, 1, 5, dtype=torch.int64)
    output = functional.cross_entropy(x, target, align_corners=True, backend="cpu")
    output.loss.backward()
    # columns 0, 0.5, 1 see two equal classes; 1.5 and 2 see the second one masked
    assert float(output.loss.detach()) == pytest.approx(3 * 0.6931471805599453 / 5, rel=1e-6)
    assert x.grad is not None
    assert x.grad.isfinite().all()


_PEAK = """
import json, sys, torch
from heteroakd_fast import functional
torch.set_num_threads(2)
classes, low, size, backend = json.loads(sys.argv[1])
x = torch.randn(1, classes, low, low, requires_grad=True)
y = torch.randint(0, classes, (1, size, size), dtype=torch.uint8)
def step(x, y):
    functional.cross_entropy(x, y, backend=backend).loss.backward()
small = torch.randn(1, classes, 4, 4, requires_grad=True)
step(small, y[:, :8, :8])                       # load and allocate what every call needs once
def status(name):
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) for l in f if l.startswith(name)) * 1024
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
step(x, y)
print(json.dumps(status("VmHWM") - before))
"""


def peak_bytes(classes: int, low: int, size: int, backend: str) -> int:
    argument = json.dumps([classes, low, size, backend])
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, argument], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_peak_memory_does_not_grow_with_the_label_grid() -> None:
    classes, low = 150, 64
    logits = classes * low * low * 4
    small, large = (peak_bytes(classes, low, size, "cpu") for size in (256, 1024))
    full = classes * 1024 * 1024 * 4
    # gradient, its unscaled accumulation, edges, and per-thread rows and tiles
    assert large < 6 * logits + (8 << 20), f"{large / 2**20:.1f} MiB"
    assert large - small < 4 << 20, f"{small / 2**20:.1f} -> {large / 2**20:.1f} MiB"
    reference = peak_bytes(classes, low, 256, "reference")
    assert reference > 10 * small, "the measurement should see a materialised grid"
    assert large < full / 20


def test_strides_beyond_2_31_elements() -> None:
    """Image 1 lies more than 2^31 elements behind image 0, in logits and in labels.

    The memory between them is never touched, so it is never allocated.
    """
    torch.use_deterministic_algorithms(False)  # would fill the gap
    far = 2**31 + 12345
    logits = torch.empty(far + 200, dtype=torch.bfloat16).as_strided((2, 3, 4, 5), (far, 20, 5, 1))
    target = torch.empty(far + 200, dtype=torch.uint8).as_strided((2, 8, 10), (far, 10, 1))
    dense = Batch(
        torch.randn(2, 3, 4, 5).bfloat16(), logits, torch.randint(0, 3, (2, 8, 10)).to(torch.uint8)
    )
    logits.copy_(dense.student)
    target.copy_(dense.target)
    got = evaluate(Batch(logits, logits, target), backend="cpu")
    expected = evaluate(dense, backend="cpu")
    assert got.loss == expected.loss
    assert got.student_grad is not None
    assert expected.student_grad is not None
    assert torch.equal(got.student_grad, expected.student_grad)


@pytest.mark.skipif(
    not os.environ.get("HETEROAKD_TEST_LARGE"),
    reason="needs 32 GiB of free memory and a minute; HETEROAKD_TEST_LARGE=1 runs it",
)
def test_gradient_of_more_than_2_31_elements() -> None:
    """2 x 4096 x 513 x 513: the last image's gradient is where 64-bit offsets put it."""
    torch.use_deterministic_algorithms(False)
    one = torch.randn(1, 1, 513, 513).bfloat16() * 3
    logits = one.expand(2, 4096, 513, 513).detach().requires_grad_()
    target = torch.tensor([[[7, 4095], [255, 0]], [[4000, 1], [2, 4095]]])
    loss = functional.cross_entropy(logits, target, backend="cpu").loss
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.numel() > 2**31
    for label, y, x in ((4095, 1, 1), (4000, 0, 0)):
        # the pixel's centre falls between grid points: a corner of it gets a share of p - 1
        row, column = (128, 384)[y], (128, 384)[x]
        assert grad[1, label, row, column] == pytest.approx((1 / 4096 - 1) / 7, rel=0.01)
        assert grad[1, 17, row, column] == pytest.approx(1 / 4096 / 7, rel=0.01)
