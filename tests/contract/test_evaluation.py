"""docs/contract.md, "Evaluation": `predict` and `confusion_matrix`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    CPU_BACKENDS,
    F32,
    complete,
    device_of,
    every_backend,
    every_kernel,
    instruction_set,
    make_batch,
    moved,
)
from geometries import GEOMETRIES, LAYOUTS, arrange, arrange_labels, batch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heteroakd_fast as hf
from benchmarks.cases import case
from benchmarks.memory import peak_bytes, supported
from heteroakd_fast import backends, functional
from heteroakd_fast.projector import Projection

Size = tuple[int, int]
every_align_corners = pytest.mark.parametrize("align_corners", [False, True])


def upsampled(logits: Tensor, size: Size, align_corners: bool) -> Tensor:
    """In float64, of the values that the call reads."""
    return F.interpolate(
        logits.double().contiguous(), size, mode="bilinear", align_corners=align_corners
    )


def rounding(logits: Tensor) -> float:
    """docs/evaluation.md: what the chosen logit may lie below the largest."""
    finite = logits.double()[logits.isfinite()]
    digits = 48 if logits.dtype == torch.float64 else 19
    return 2.0**-digits * (float(finite.abs().max()) if finite.numel() else 0.0)


def predict(logits: Tensor, size: Size, backend: str, **options: Any) -> Tensor:
    """On the device of the backend; the name may say which instruction set."""
    backend, _, isa = backend.partition("-")
    there = device_of(backend, make_batch())
    with instruction_set(isa):
        found = functional.predict(moved(logits, there), size, backend=backend, **options)
    return found.cpu()


def count(logits: Tensor, target: Tensor, backend: str, **options: Any) -> Tensor:
    backend, _, isa = backend.partition("-")
    there = device_of(backend, make_batch())
    with instruction_set(isa):
        found = functional.confusion_matrix(
            moved(logits, there), moved(target, there), backend=backend, **options
        )
    return found.cpu()


def matrix_of(prediction: Tensor, target: Tensor, classes: int, ignore_index: int = 255) -> Tensor:
    """By bincount."""
    valid = target.long() != ignore_index
    entry = target.long()[valid] * classes + prediction.long()[valid]
    return torch.bincount(entry, minlength=classes * classes).view(classes, classes)


def assert_is_argmax(found: Tensor, logits: Tensor, size: Size, align_corners: bool) -> None:
    """That the class at every pixel has the largest upsampled logit, up to the stated rounding, and
    is the argmax wherever that is larger than the others by more."""
    z = upsampled(logits, size, align_corners)
    assert found.shape == (logits.shape[0], *size)
    assert found.is_contiguous()
    if not found.numel():
        return
    assert int(found.min()) >= 0
    assert int(found.max()) < logits.shape[1]
    gap = z.amax(1) - z.gather(1, found.long()[:, None])[:, 0]
    assert float(gap.max()) <= rounding(logits)


def check(logits: Tensor, target: Tensor, backend: str, **options: Any) -> Tensor:
    """Both functions against the oracle; returns the predictions."""
    size = (target.shape[1], target.shape[2])
    found = predict(logits, size, backend, **options)
    assert_is_argmax(found, logits, size, options.get("align_corners", False))
    expected = matrix_of(found, target, logits.shape[1])
    assert torch.equal(count(logits, target, backend, **options), expected)
    return found


# --- values --------------------------------------------------------------------------------------


@every_kernel
@every_align_corners
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry_is_evaluated(geometry: str, align_corners: bool, backend: str) -> None:
    batch = batch_of(geometry, classes=5)
    check(batch.student, batch.target, backend, align_corners=align_corners)


@every_kernel
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_layout_is_evaluated(dtype: torch.dtype, layout: str, backend: str) -> None:
    """Equal to the argmax of torch's own interpolation where that is not nearly a tie."""
    batch = make_batch(dtype=dtype, grid=(5, 7), size=(20, 28), label_dtype=torch.uint8)
    logits, target = batch.student, batch.target
    if layout == "expanded":
        logits = logits[:1].expand(2, -1, -1, -1)
    else:
        logits, target = arrange(logits, layout), arrange_labels(target, layout)
    found = check(logits, target, backend)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    z = F.interpolate(wide.contiguous(), (20, 28), mode="bilinear")
    first, second = z.topk(2, dim=1).values.unbind(1)
    clear = first - second > rounding(logits)
    assert clear.double().mean() > 0.9
    assert torch.equal(found.long()[clear], z.argmax(1)[clear])


@every_kernel
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("ignore_index", [255, 7, 0, None])
def test_ignored_labels_are_not_counted(
    ignore_index: int | None, label_dtype: torch.dtype, backend: str
) -> None:
    batch = make_batch(dtype=F32, label_dtype=label_dtype, ignore_index=ignore_index or 0)
    found = predict(batch.student, (13, 17), backend)
    expected = matrix_of(found, batch.target, 5, -1 if ignore_index is None else ignore_index)
    got = count(
        batch.student, batch.target, backend, ignore_index=ignore_index, allow_ignored_class=True
    )
    assert torch.equal(got, expected)
    assert expected.sum() > 0


@complete
@every_kernel
@every_align_corners
@pytest.mark.parametrize("scale", [1e4, 1e37, 2e38])
def test_confident_logits(scale: float, align_corners: bool, backend: str) -> None:
    """Patches of one class: few classes can win in a cell."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 40, (2, 1, 2, 3), generator=generator)
    label = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    logits = torch.randn(2, 40, 8, 12, generator=generator)
    logits.scatter_(1, label, 10.0)
    logits *= scale / 10
    size = (32, 48)
    found = predict(logits, size, backend, align_corners=align_corners)
    if scale < 2**126:
        assert_is_argmax(found, logits, size, align_corners)
    else:  # what is larger counts as 2^126
        low = logits.clamp(-(2.0**126), 2.0**126)
        assert_is_argmax(found, low, size, align_corners)
    assert len(found.unique()) > 3


@complete
@every_kernel
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 150, 256, 257, 4096])
def test_numbers_of_predicted_classes(classes: int, backend: str) -> None:
    if backend == "triton" and classes > 300:
        pytest.skip("an interpreted loop over so many classes takes minutes")
    batch = make_batch(1, classes, (3, 4), None, (12, 17), F32, ignore_index=5000)
    found = predict(batch.student, (12, 17), backend)
    assert found.dtype == (torch.uint8 if classes <= 256 else torch.int64)
    assert_is_argmax(found, batch.student, (12, 17), False)
    assert torch.equal(predict(batch.student, (12, 17), backend, dtype=torch.int64), found.long())
    got = count(batch.student, batch.target, backend, ignore_index=5000)
    assert torch.equal(got, matrix_of(found, batch.target, classes, 5000))


@complete
@every_kernel
@pytest.mark.parametrize("size", [(4, 6), (16, 24), (7, 5)])
def test_the_first_of_equal_classes_wins(size: Size, backend: str) -> None:
    """Of two that are equal everywhere, and of two that cross at a pixel."""
    logits = make_batch(1, 6, (4, 6), dtype=F32).student
    logits[:, 4] = logits[:, 1]
    logits[:, 5] = logits[:, 1]
    found = predict(logits, size, backend)
    assert not ((found == 4) | (found == 5)).any()
    assert (found == 1).any()
    same = torch.zeros(1, 70, 4, 6)
    assert not predict(same, size, backend).any()
    crossing = torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])[None, :, None, :]
    middle = predict(crossing, (1, 3), backend, align_corners=True)
    assert middle.tolist() == [[[2, 0, 0]]]


@complete
@every_kernel
@every_align_corners
@pytest.mark.parametrize("size", [(4, 6), (16, 24), (7, 5)])
def test_masked_classes_never_win(size: Size, align_corners: bool, backend: str) -> None:
    """-inf everywhere, and in a part of the grid: as a large negative number."""
    logits = make_batch(2, 6, (4, 6), dtype=F32).student
    logits[:, 0] = -torch.inf
    logits[:, 3] += 2.0
    logits[0, 3, :2, :3] = -torch.inf
    logits[1, 5] = torch.inf
    found = predict(logits, size, backend, align_corners=align_corners)
    assert (found[1] == 5).all()
    finite = logits.clamp(-1e30, 1e30)
    expected = upsampled(finite, size, align_corners).argmax(1)
    assert torch.equal(found.long(), expected)
    assert (found == 3).any()


@complete
@every_kernel
@pytest.mark.parametrize("size", [(5, 6), (20, 24)])
def test_nan_wins_around_its_logit(size: Size, backend: str) -> None:
    logits = make_batch(1, 6, (5, 6), dtype=F32).student
    logits[0, 2, 2, 3] = torch.nan
    logits[0, 4, 2, 3] = torch.nan
    logits[0, 1, 2, 3] = torch.inf
    found = predict(logits, size, backend)
    z = upsampled(logits, size, False)
    touched = logits[:, 2].isnan() if size == (5, 6) else z[:, 2].isnan()
    assert touched.any()
    assert (found[touched] == 2).all()
    clean = predict(logits.nan_to_num(0.0, 0.0), size, backend)
    assert torch.equal(found[~touched], clean[~touched])


@settings(max_examples=80)
@given(
    st.tuples(*[st.integers(1, 40)] * 4),
    st.booleans(),
    st.sampled_from([1, 2, 3, 19, 70]),
    st.sampled_from(CPU_BACKENDS),
    st.sampled_from(["noise", "smooth", "steps", "patches"]),
)
def test_any_size_is_predicted(
    sizes: tuple[int, int, int, int], align_corners: bool, classes: int, backend: str, kind: str
) -> None:
    """Larger and smaller grids, and logits of which all, some or few classes can win in a cell."""
    if backend == "triton":
        sizes, classes = tuple(1 + n // 4 for n in sizes), min(classes, 3)  # type: ignore[assignment]
    h, w, *size = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    logits = torch.randn(1, classes, h, w, generator=generator)
    if kind == "smooth":
        logits = F.avg_pool2d(logits, 3, 1, 1) + 4 * logits.mean((2, 3), keepdim=True)
    elif kind == "steps":
        logits = (3 * logits).round()
    elif kind == "patches":  # cells with one, two, three and four classes at their corners
        label = torch.randint(classes, (1, 1, h // 3 + 1, w // 3 + 1), generator=generator)
        label = label.repeat_interleave(3, 2).repeat_interleave(3, 3)[:, :, :h, :w]
        logits.scatter_add_(1, label, torch.full(label.shape, 6.0))
    found = predict(logits, (size[0], size[1]), backend, align_corners=align_corners)
    assert_is_argmax(found, logits, (size[0], size[1]), align_corners)


# --- results -------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("shape", [(0, 13, 17), (2, 0, 17), (2, 13, 0)])
def test_empty_evaluation(shape: tuple[int, int, int], backend: str) -> None:
    for grid in ((4, 6), (4, 0)):
        batch = make_batch(shape[0], 5, grid, None, shape[1:], F32)
        assert predict(batch.student, shape[1:], backend).shape == shape
        assert not count(batch.student, batch.target, backend).any()


@every_backend
def test_the_matrix_is_accumulated(backend: str) -> None:
    one, other = make_batch(dtype=F32), make_batch(dtype=F32, seed=1)
    there = device_of(backend, one)
    out = torch.zeros(5, 5, dtype=torch.int64, device=there)
    for batch in (one, other):
        logits, target = batch.student.to(there), batch.target.to(there)
        same = functional.confusion_matrix(logits, target, out=out, backend=backend)
        assert same is out
    parts = [count(batch.student, batch.target, backend) for batch in (one, other)]
    assert torch.equal(out.cpu(), parts[0] + parts[1])
    assert int(out.sum()) == sum(int((b.target != 255).sum()) for b in (one, other))


@every_backend
def test_evaluation_does_not_depend_on_threads(backend: str) -> None:
    batch = make_batch(2, 19, (33, 40), None, (132, 160), F32)
    if backend == "triton":
        batch = make_batch(1, 3, (9, 10), None, (36, 40), F32)
    size = (batch.target.shape[1], batch.target.shape[2])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(
                (predict(batch.student, size, backend), count(batch.student, batch.target, backend))
            )
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(one, found[0], strict=True))


@every_backend
def test_evaluation_makes_no_graph(backend: str) -> None:
    batch = make_batch(dtype=F32)
    logits = batch.student.requires_grad_()
    there = device_of(backend, batch)
    found = functional.predict(logits.to(there), (13, 17), backend=backend)
    assert not found.requires_grad
    assert logits.grad is None


def test_a_projection_is_evaluated() -> None:
    features, weight, bias = torch.randn(2, 8, 4, 6), torch.randn(5, 8), torch.randn(5)
    logits = F.conv2d(features, weight[:, :, None, None], bias)
    side = Projection(features, weight, bias)
    target = make_batch().target
    assert torch.equal(functional.predict(side, (13, 17)), functional.predict(logits, (13, 17)))
    assert torch.equal(
        functional.confusion_matrix(side, target), functional.confusion_matrix(logits, target)
    )


@complete
@every_backend
def test_evaluation_of_strides_beyond_2_31_elements(backend: str) -> None:
    """Image 1 lies more than 2^31 elements behind image 0, in logits and in labels."""
    if device_of(backend, make_batch()) == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # would fill the gap
    far = 2**31 + 12345
    logits = torch.empty(far + 200, dtype=torch.bfloat16).as_strided((2, 3, 4, 5), (far, 20, 5, 1))
    target = torch.empty(far + 200, dtype=torch.uint8).as_strided((2, 8, 10), (far, 10, 1))
    dense = make_batch(2, 3, (4, 5), None, (8, 10), torch.bfloat16, label_dtype=torch.uint8)
    logits.copy_(dense.student)
    target.copy_(dense.target)
    found = predict(dense.student, (8, 10), backend)
    assert torch.equal(predict(logits, (8, 10), backend), found)
    assert torch.equal(count(logits, target, backend), matrix_of(found, dense.target, 3))


@pytest.mark.skipif(
    supported() is not None or "cpu" not in CPU_BACKENDS, reason="no kernels, or no clear_refs"
)
@pytest.mark.parametrize("objective", ["argmax of noise", "confusion of confident logits"])
def test_memory_of_evaluation_does_not_grow_with_the_classes(objective: str) -> None:
    one = case(objective, "ADE20K", 1, 4)
    allowed = (4 << 20) + one.height * one.width
    assert peak_bytes(one, "heteroakd[cpu]") <= allowed
    small = replace(one, height=256, width=256)
    assert peak_bytes(small, "eager") > 3 * allowed, "the measurement should see a stored grid"


# --- errors --------------------------------------------------------------------------------------


@every_backend
def test_bad_labels_are_an_error_of_evaluation(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETEROAKD_CHECK_LABELS", "1")
    batch = make_batch(dtype=F32)
    batch.target[1, 2, 3] = 5
    batch.target[1, 2, 4] = -1
    there = device_of(backend, batch)
    out = torch.zeros(5, 5, dtype=torch.int64, device=there)
    message = r"target: label 5 at \(b=1, y=2, x=3\) is neither in \[0, 5\) nor ignore_index=255; 2"
    with pytest.raises(ValueError, match=message):
        functional.confusion_matrix(
            batch.student.to(there), batch.target.to(there), out=out, backend=backend
        )
    assert not out.any()


def _call(function: str, **changes: Any) -> Tensor:
    batch = make_batch(dtype=F32)
    options: dict[str, Any] = {"logits": batch.student}
    options |= {"size": (13, 17)} if function == "predict" else {"target": batch.target}
    result: Tensor = getattr(functional, function)(**{**options, **changes})
    return result


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        ("predict", {"logits": torch.zeros(5, 4, 6)}, ValueError, "logits: got shape"),
        ("predict", {"logits": torch.zeros(2, 5, 4, 6).long()}, TypeError, "logits: got"),
        ("predict", {"logits": None}, TypeError, "logits: got NoneType"),
        ("predict", {"logits": torch.zeros(1, 4097, 1, 1)}, ValueError, "logits: got C=4097"),
        ("predict", {"logits": torch.zeros(2, 5, 0, 6)}, ValueError, "logits: got an empty grid"),
        ("predict", {"size": 13}, TypeError, "size: got int, expected two integers"),
        ("predict", {"size": (13, 17, 2)}, TypeError, r"size: got \(13, 17, 2\), expected two"),
        ("predict", {"size": (13, 1.5)}, TypeError, "size: got float, expected an integer"),
        ("predict", {"size": (13, -1)}, ValueError, r"size: got \(13, -1\), expected from 0"),
        ("predict", {"dtype": torch.int16}, TypeError, "dtype: got torch.int16, expected"),
        ("predict", {"align_corners": 1}, TypeError, "align_corners: got int, expected True"),
        ("predict", {"backend": "fast"}, ValueError, "backend: got 'fast', expected one of"),
        ("confusion_matrix", {"target": torch.zeros(2, 13, 17)}, TypeError, "target: got"),
        ("confusion_matrix", {"target": torch.zeros(1, 9, 9).long()}, ValueError, "target: got ba"),
        ("confusion_matrix", {"ignore_index": 3}, ValueError, "ignore_index: got 3, which is"),
        ("confusion_matrix", {"ignore_index": 1.0}, TypeError, "ignore_index: got float"),
        ("confusion_matrix", {"out": [1]}, TypeError, "out: got list"),
        ("confusion_matrix", {"out": torch.zeros(5, 5)}, TypeError, "out: got torch.float32"),
        (
            "confusion_matrix",
            {"out": torch.zeros(5, 4).long()},
            ValueError,
            r"out: got shape \(5, 4\), expected \[C, C\] = \(5, 5\)",
        ),
        (
            "confusion_matrix",
            {"out": torch.zeros(5, 10).long()[:, ::2]},
            ValueError,
            "out: got strides",
        ),
    ],
)
def test_evaluation_refuses(
    function: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _call(function, **changes)


def test_evaluation_takes_the_backend_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    get = backends.get
    monkeypatch.setattr(backends, "get", lambda name: asked.append(name) or get(name))
    with hf.use_backend("reference"):
        _call("predict")
    asked, last = [], asked[-1]
    assert last == "reference"
    _call("confusion_matrix", backend="reference")
    assert asked[-1] == "reference"
    for name, reason in backends.available().items():
        if reason is not None:
            with pytest.raises(hf.BackendUnavailableError, match=f"backend='{name}' is not"):
                _call("predict", backend=name)


# --- systems -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@every_backend
def test_opcheck_of_evaluation(backend: str, layout: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype=dtype)
    there = device_of(backend, batch)
    logits, target = arrange(batch.student.to(there), layout), batch.target.to(there)
    operators = torch.ops.heteroakd_fast
    torch.library.opcheck(operators.predict, (logits, (13, 17), False, True, backend))
    torch.library.opcheck(operators.predict, (logits, (9, 20), True, False, backend))
    torch.library.opcheck(operators.confusion_matrix, (logits, target, 255, False, backend))


@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile_of_evaluation(dynamic: bool, backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    there = device_of(backend, make_batch())

    # the graph is the same for every backend: Inductor compiles it once
    compiler = "inductor" if backend == "cpu" else "aot_eager"

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=compiler)
    def evaluate(logits: Tensor, target: Tensor, out: Tensor) -> Tensor:
        functional.confusion_matrix(logits, target, out=out, backend=backend)
        size = (target.shape[1], target.shape[2])
        return functional.predict(2 * logits, size, backend=backend)

    for size in ((13, 17), (21, 9)):
        batch = make_batch(dtype=F32, size=size)
        logits, target = batch.student.to(there), batch.target.to(there)
        out = torch.zeros(5, 5, dtype=torch.int64, device=there)
        found = evaluate(logits, target, out)
        assert torch.equal(found, functional.predict(logits, size, backend=backend))
        assert torch.equal(out, functional.confusion_matrix(logits, target, backend=backend))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_evaluation_in_a_cuda_graph(backend: str) -> None:
    """With new values copied in; nothing waits for the GPU."""
    batches = [make_batch(dtype=F32, seed=seed) for seed in (0, 1)]
    logits, target = batches[0].student.cuda(), batches[0].target.cuda()
    out = torch.zeros(5, 5, dtype=torch.int64, device="cuda")

    def step() -> Tensor:
        functional.confusion_matrix(logits, target, out=out, backend=backend)
        return functional.predict(logits, (13, 17), backend=backend)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for batch in batches[::-1]:
        logits.copy_(batch.student)
        target.copy_(batch.target)
        out.zero_()
        graph.replay()
        assert torch.equal(found.cpu(), predict(batch.student, (13, 17), backend))
        assert torch.equal(out.cpu(), count(batch.student, batch.target, backend))


def test_operators_of_evaluation_refuse_what_they_would_read_out_of_bounds() -> None:
    operators = torch.ops.heteroakd_fast
    logits, target = torch.zeros(2, 300, 4, 6), torch.zeros(1, 9, 9, dtype=torch.int64)
    for call in (
        lambda: operators.predict(logits[0], (3, 3), False, False, "cpu"),
        lambda: operators.predict(logits, (3, 3), False, True, "cpu"),
        lambda: operators.predict(logits, (3, -3), False, False, "cpu"),
        lambda: operators.predict(logits[:, :, :0], (3, 3), False, False, "cpu"),
        lambda: operators.confusion_matrix(logits, target, 255, False, "cpu"),
    ):
        with pytest.raises(ValueError, match=r"got"):
            call()
