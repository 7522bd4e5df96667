"""The fused projection against the oracle on doubles: sums, every gradient, and the contract.

The kernels run on a GPU or in Triton's interpreter (`interpreter.py`); the reference always does.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from common import TERM_CASES, assert_accurate, loss_of, spec_of
from interpreter import INTERPRETED
from torch import Tensor

import heteroakd_fast as hf
from heteroakd_fast import Projection, backends, functional, reference
from heteroakd_fast.projector import PRECISIONS
from heteroakd_fast.terms import CWD, DKD, TERMS

NO_KERNELS = backends.available()["triton"]
DEVICE = "cpu" if INTERPRETED or NO_KERNELS is not None else "cuda"
kernels = pytest.mark.skipif(NO_KERNELS is not None, reason=f"triton: {NO_KERNELS}")
# By name `by`: of tests with a parameter `backend`, `conftest.py` runs a sample only.
BOTH = (pytest.param("triton", marks=kernels), "reference")

ALL: dict[str, Any] = TERM_CASES["all"]
NAMES = ("features", "weight", "bias", "teacher weight", "teacher bias")


def projected_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor,
    precision: str = "ieee",
    **options: Any,
) -> hf.DistillationOutput:
    other = (
        None if teacher is None else Projection(teacher, teacher_weight, teacher_bias, precision)
    )
    student = Projection(features, weight, bias, precision)
    return loss_of(student, target, other, **options)


class Case(NamedTuple):
    """What `projected_loss` takes, without options."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    target: Tensor

    def learners(self) -> list[Tensor | None]:
        return [self.features, self.weight, self.bias, self.teacher_weight, self.teacher_bias]


def make(
    dtype: torch.dtype = torch.float32,
    classes: int = 5,
    depth: tuple[int, int] = (20, 40),
    grid: tuple[int, int] = (3, 7),
    weight_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    ignored: float = 0.2,
    bias: bool = True,
) -> Case:
    def normal(*shape: int, dtype: torch.dtype = weight_dtype or dtype) -> Tensor:
        return torch.randn(shape).to(dtype).to(DEVICE)

    def side(depth: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return (
            normal(2, depth, *grid, dtype=dtype),
            normal(classes, depth) * (3.0 * scale * depth**-0.5),
            normal(classes) if bias else None,
        )

    target = torch.randint(0, classes, (2, *grid))
    target[torch.rand(target.shape) < ignored] = 255
    return Case(*side(depth[0]), *side(depth[1]), target.to(DEVICE))


def evaluate(case: Case, grad_output: float = -0.37, **options: Any) -> tuple[Any, list[Any]]:
    """The output, and the gradients of features, weight, bias, teacher weight and bias."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in case.learners()]
    features, weight, bias, teacher_weight, teacher_bias = leaves
    output = projected_loss(
        features, weight, bias, case.teacher, teacher_weight, teacher_bias, case.target, **options
    )
    wanted = [x for x in leaves if x is not None]
    grads = iter(
        torch.autograd.grad(
            output.loss, wanted, torch.as_tensor(grad_output).to(output.loss), allow_unused=True
        )
    )
    return output, [None if x is None else next(grads) for x in leaves]


def truth(case: Case, grad_output: float = -0.37, **options: Any) -> tuple[Any, list[Any]]:
    """The oracle on exactly the same numbers, by its own two functions, without the operator layer;
    features of ignored pixels are 0."""
    double = [None if x is None or not x.is_floating_point() else x.detach().double() for x in case]
    features, weight, bias, teacher, teacher_weight, teacher_bias, _ = double
    valid = (case.target != 255)[:, None]
    leaves = [features, weight, bias, teacher_weight, teacher_bias]
    for x in leaves:
        if x is not None:
            x.requires_grad_()
    if options.get("class_weight") is not None:
        options["class_weight"] = options["class_weight"].double()
    z_s = reference.project(torch.where(valid, features, 0), weight, bias)
    z_t = reference.project(torch.where(valid, teacher, 0), teacher_weight, teacher_bias)
    output = loss_of(
        z_s,
        case.target,
        z_t if options.get("teacher_ce_weight") else z_t.detach(),
        backend="reference",
        **options,
    )
    wanted = [x for x in leaves if x is not None]
    grads = iter(
        torch.autograd.grad(
            output.loss, wanted, torch.as_tensor(grad_output).to(output.loss), allow_unused=True
        )
    )
    return output, [None if x is None else next(grads) for x in leaves]


def assert_same(got: tuple[Any, list[Any]], expected: tuple[Any, list[Any]]) -> None:
    """Terms to 2e-6, gradients to the contract's accuracy; None where the oracle has none or 0."""
    for name in ("loss", *(term.name for term in TERMS)):
        ours, theirs = getattr(got[0], name), getattr(expected[0], name)
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            value = float(theirs.detach())
            assert float(ours.detach()) == pytest.approx(value, rel=2e-6, abs=2e-6), name
    assert int(got[0].valid) == int(expected[0].valid)
    for name, ours, theirs in zip(NAMES, got[1], expected[1], strict=True):
        if theirs is None:
            assert ours is None, name
        elif theirs.abs().max() == 0:
            assert ours is None or ours.abs().max() == 0, name
        else:
            assert_accurate(ours, theirs, name)


SUPPORTED = [
    name
    for name, options in TERM_CASES.items()
    if "paper" not in name and name not in ("kd-reverse", "kd-js") and "terms" not in options
]


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("by", BOTH)
@pytest.mark.parametrize("terms", SUPPORTED)
def test_every_term(terms: str, by: str) -> None:
    case, options = make(grid=(9, 11) if terms == "all" else (3, 7)), TERM_CASES[terms]
    assert_same(evaluate(case, backend=by, **options), truth(case, **options))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("classes", "depth", "grid"),
    [
        (3, (20, 40), (9, 13)),
        (19, (40, 20), (3, 23)),
        (21, (64, 130), (8, 16)),
        (1, (1, 3), (1, 1)),
    ],
)
def test_shapes_and_dtypes(
    classes: int, depth: tuple[int, int], grid: tuple[int, int], dtype: torch.dtype
) -> None:
    case = make(dtype, classes, depth, grid)
    assert_same(evaluate(case, backend="triton", **ALL), truth(case, **ALL))


@kernels
@pytest.mark.parametrize("classes", [65, 150, 256])
def test_many_classes(classes: int) -> None:
    case = make(torch.bfloat16, classes, (40, 24), (5, 7))
    options = {**ALL, "allow_ignored_class": classes > 255}
    assert_same(evaluate(case, backend="triton", **options), truth(case, **options))


@kernels
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    case = make(dtype, weight_dtype=weight_dtype)
    got = evaluate(case, backend="triton", **ALL)
    assert [g.dtype for g in got[1]] == [x.dtype for x in case.learners() if x is not None]
    assert_same(got, truth(case, **ALL))


@kernels
def test_sides_of_different_dtypes() -> None:
    narrow, wide = make(torch.bfloat16), make(torch.float32)
    case = wide._replace(features=narrow.features, weight=narrow.weight, bias=narrow.bias)
    assert_same(evaluate(case, backend="triton", **ALL), truth(case, **ALL))


@pytest.mark.parametrize("by", BOTH)
@pytest.mark.parametrize("options", [ALL, {**ALL, "mix": "logits"}], ids=["probs", "logits"])
def test_class_weights_and_smoothing(options: dict[str, Any], by: str) -> None:
    case = make(classes=19)
    options = options | {
        "class_weight": torch.rand(19, device=DEVICE) + 0.2,
        "label_smoothing": 0.15,
    }
    assert_same(evaluate(case, backend=by, **options), truth(case, **options))


@kernels
def test_smoothing_without_class_weights() -> None:
    case = make(classes=5)
    options = {"teacher_ce_weight": 0.5, "label_smoothing": 0.3}
    assert_same(evaluate(case, backend="triton", **options), truth(case, **options))


@kernels
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str) -> None:
    """The interpreter multiplies exactly; a GPU may be as wrong as its mode says."""
    case = make()
    got, expected = evaluate(case, backend="triton", precision=precision), truth(case)
    allowed = 1e-2 if precision == "tf32" else 1e-4
    assert got[0].loss.item() == pytest.approx(expected[0].loss.item(), rel=allowed)


@kernels
def test_confident_pixels_keep_their_gradient() -> None:
    """p - 1 where p rounds to 1: all of the gradient is of the order of 1e-9, and right."""
    case = make(classes=5, ignored=0.0, grid=(9, 11))
    case = case._replace(weight=case.weight * 30, bias=case.bias * 30)
    z = reference.project(case.features, case.weight, case.bias)
    first, second = z.topk(2, dim=1).values.unbind(1)
    sure = first - second > 20.0
    assert sure.sum() > 10
    case = case._replace(target=torch.where(sure, z.argmax(1), 255))
    got, expected = evaluate(case, backend="triton"), truth(case)
    assert 0 < expected[1][2].abs().max() < 1e-8
    # a product's rounding is 2^-24 of |z| of some 200, and p's that in absolute terms
    for ours, theirs in zip(got[1][:3], expected[1][:3], strict=True):
        assert (ours.double() - theirs).abs().max() <= 5e-5 * theirs.abs().max()


@kernels
def test_large_logits_stay_finite() -> None:
    case = make(scale=3000.0)
    output, grads = evaluate(case, backend="triton", **ALL)
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in grads)


# --- layouts -------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_strides(layout: str) -> None:
    case = make(grid=(6, 10))

    def lay_out(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if layout == "sliced":
            return F.pad(x, (1, 2, 3, 0), value=torch.nan)[:, :, 3:, 1:-2]
        if layout == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return x[:1].expand_as(x)

    case = case._replace(
        features=lay_out(case.features),
        teacher=lay_out(case.teacher),
        target=case.target.transpose(1, 2).contiguous().transpose(1, 2),
    )
    got = evaluate(case, backend="triton", **ALL)
    if layout == "channels_last":
        assert got[1][0].is_contiguous(memory_format=torch.channels_last)
    assert_same(got, truth(case, **ALL))


@pytest.mark.parametrize("by", BOTH)
def test_weights_as_a_convolution_keeps_them(by: str) -> None:
    case = make()
    as_conv = case._replace(
        weight=case.weight[:, :, None, None], teacher_weight=case.teacher_weight[:, :, None, None]
    )
    output, grads = evaluate(as_conv, backend=by, **ALL)
    assert grads[1].shape == as_conv.weight.shape
    flat = [g.flatten(1) if g.dim() == 4 and g.shape[2:] == (1, 1) else g for g in grads]
    assert_same((output, flat), truth(case, **ALL))


@kernels
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.uint8])
def test_no_bias_and_label_dtypes(label_dtype: torch.dtype) -> None:
    case = make(bias=False)
    case = case._replace(target=case.target.to(label_dtype))
    assert_same(evaluate(case, backend="triton", **ALL), truth(case, **ALL))


# --- ignored pixels, NaN, nothing at all ---------------------------------------------------------


@pytest.mark.parametrize("by", BOTH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_ignored_pixels_hold_reaches_nothing(bad: float, by: str) -> None:
    case = make(classes=19)
    ignored = (case.target == 255)[:, None]
    dirty = case._replace(
        features=case.features.masked_fill(ignored, bad),
        teacher=case.teacher.masked_fill(ignored, -bad),
    )
    got = evaluate(dirty, backend=by, **ALL)
    assert not got[1][0].masked_select(ignored).any()
    assert_same(got, truth(case, **ALL))


@pytest.mark.parametrize("by", BOTH)
def test_nan_at_a_valid_pixel_shows(by: str) -> None:
    case = make(ignored=0.0)
    features = case.features.clone()
    features[0, 3, 2, 2] = torch.nan
    output, grads = evaluate(case._replace(features=features), backend=by, **ALL)
    assert output.loss.isnan()
    assert grads[1].isnan().any()


@pytest.mark.parametrize("by", BOTH)
def test_all_ignored_and_empty(by: str) -> None:
    case = make()
    nothing = case._replace(target=torch.full_like(case.target, 255))
    empty = Case(*(x[:0] if x is not None and x.dim() >= 3 else x for x in case))
    for some in (nothing, empty):
        output, grads = evaluate(some, backend=by, **ALL)
        assert float(output.loss.detach()) == 0.0
        assert int(output.valid) == 0
        assert all(g is None or not g.any() for g in grads)


# --- autograd and systems ------------------------------------------------------------------------


@kernels
def test_gradients_that_nobody_asked_for() -> None:
    case = make()
    full = evaluate(case, backend="triton", **ALL)[1]
    for k, name in enumerate(NAMES):
        leaves = [x.detach().requires_grad_(i == k) for i, x in enumerate(case.learners())]
        output = projected_loss(
            *leaves[:3], case.teacher, *leaves[3:], case.target, backend="triton", **ALL
        )
        (grad,) = torch.autograd.grad(output.loss, leaves[k], torch.tensor(-0.37, device=DEVICE))
        assert torch.equal(grad, full[k]), name
    with torch.no_grad():
        output = projected_loss(*leaves[:3], *[None] * 3, case.target)
    assert not output.loss.requires_grad


@pytest.mark.parametrize("by", BOTH)
def test_the_teachers_features_never_learn(by: str) -> None:
    case = make()
    teacher, weight = case.teacher.requires_grad_(), case.teacher_weight.requires_grad_()
    output = projected_loss(*case, backend=by, **ALL)
    grads = torch.autograd.grad(output.loss, (teacher, weight), allow_unused=True)
    assert grads[0] is None
    assert grads[1].any()


@kernels
def test_same_bits_twice_and_after_other_memory() -> None:
    case = make(torch.bfloat16, 19)
    first = evaluate(case, backend="triton", **ALL)
    torch.randn(1000)
    second = evaluate(case, backend="triton", **ALL)
    assert torch.equal(first[0].loss, second[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("by", BOTH)
def test_backward_twice_and_second_order(by: str) -> None:
    case = make()
    weight = case.weight.requires_grad_()
    output = projected_loss(*case[:6], case.target, backend=by, hetero_weight=1.0)
    (first,) = torch.autograd.grad(output.loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(output.loss, weight, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(output.loss, weight, create_graph=True)


def operator_arguments(case: Case, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    spec = spec_of(**options)
    wants = [True, True, True, False, True, True]
    keywords = {"structure": spec.structure, "wants": wants, "precision": "ieee"}
    return (*case, None, None, spec.vector()), {**keywords, "backend": "triton"}


@kernels
def test_opcheck() -> None:
    case = make(grid=(3, 5), depth=(4, 6))
    leaves = iter([x.detach().requires_grad_() for x in case.learners()])
    case = Case(
        *(next(leaves) for _ in range(3)), case.teacher, *(next(leaves) for _ in range(2)), case[6]
    )
    arguments, options = operator_arguments(case, **ALL)
    torch.library.opcheck(torch.ops.heteroakd_fast.sums, arguments, options)
    plain = [None if x is None else x.detach() for x in arguments]
    totals = torch.ops.heteroakd_fast.sums(*plain, **options)[1]
    plain.insert(9, [])
    torch.library.opcheck(torch.ops.heteroakd_fast.gradient, (totals, *plain), options)


@pytest.mark.parametrize("by", BOTH)
def test_compiles_without_a_break(by: str) -> None:
    case = make(grid=(4, 5), depth=(6, 7))
    options = {"hetero_weight": 1.0, "teacher_ce_weight": 1.0}
    call = functools.partial(projected_loss, backend=by, **options)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (call, compiled):
        features = case.features.detach().requires_grad_()
        weight = case.weight.detach().requires_grad_()
        output = function(features, weight, *case[2:])
        output.loss.backward()
        grads.append((features.grad, weight.grad, output.loss.detach()))
    for eager, traced in zip(*grads, strict=True):
        assert torch.allclose(eager, traced, rtol=1e-5, atol=1e-7)
    torch.compiler.reset()


@kernels
def test_autocast_changes_nothing() -> None:
    case = make(torch.bfloat16, weight_dtype=torch.float32)
    expected = truth(case, 1.0, **ALL)
    weight = case.weight.requires_grad_()
    for by in ("triton", "reference"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output = projected_loss(*case, backend=by, **ALL)
        (grad,) = torch.autograd.grad(output.loss, weight)
        assert_accurate(grad, expected[1][1])


@kernels
def test_normalizer() -> None:
    case, options = make(), {**ALL, "normalizer": {"ce": 7.0, "hetero": 2.0}}
    assert_same(evaluate(case, backend="triton", **options), truth(case, **options))


# --- choice of backend and errors ----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "auto", "cpu"])
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"dtype": torch.float64}, {}),
        ({"classes": 257}, {"allow_ignored_class": True}),
        ({}, {"hetero_weight": 1.0, "preset": "paper"}),
        ({}, {"kd_weight": 1.0, "kd_divergence": "js"}),
        ({}, {"hetero_weight": 1.0, "return_maps": True}),
        ({}, {"terms": (CWD(), DKD())}),
    ],
)
def test_what_no_kernel_projects_is_projected_first(
    changes: dict[str, Any], options: dict[str, Any], backend: str
) -> None:
    here = backend == "auto" or DEVICE in backends.get(backend).devices()
    if not here or backends.available().get(backend) is not None:
        pytest.skip("not here")
    case = make(**changes, grid=(2, 3))
    got, expected = evaluate(case, backend=backend, **options), truth(case, **options)
    assert (got[0].maps is not None) == options.get("return_maps", False)
    assert_same(got, expected)


@kernels
def test_projection_off_the_label_grid() -> None:
    case = make(grid=(3, 4))
    size = (6, 9)
    target = torch.randint(0, 5, (2, *size), device=DEVICE)
    student = Projection(case.features.requires_grad_(), case.weight, case.bias)
    teacher = Projection(case.teacher, case.teacher_weight)
    grads = []
    for sides in (
        (student, teacher),
        (reference.project(*student[:3]), reference.project(*teacher[:3])),
    ):
        loss = functional.distillation_loss(
            sides[0], target, sides[1], hetero_weight=1.0, backend="triton"
        ).loss
        grads.append(torch.autograd.grad(loss, case.features)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"features": None}, {}, TypeError, "student_logits.features: got NoneType"),
        ({"features": torch.zeros(2, 20, 3)}, {}, ValueError, "student_logits.features: got shape"),
        ({"weight": torch.zeros(5, 21)}, {}, ValueError, "student_logits.weight: got D=21"),
        ({"weight": torch.zeros(5, 20, 3, 3)}, {}, ValueError, "student_logits.weight: got shape"),
        ({"weight": torch.zeros(0, 20)}, {"bias": None}, ValueError, "student_logits: got C=0"),
        ({"bias": torch.zeros(4)}, {}, ValueError, "student_logits.bias: got 4 entries"),
        ({"teacher": torch.zeros(3, 40, 3, 8)}, {}, ValueError, "teacher_logits: got batch 3"),
        (
            {"teacher_weight": torch.zeros(4, 40)},
            {},
            ValueError,
            "teacher_logits.bias: got 5 entries",
        ),
        (
            {"target": torch.zeros(3, 3, 8, dtype=torch.int64)},
            {},
            ValueError,
            "target: got batch 3",
        ),
        ({"target": torch.zeros(2, 3, 7)}, {}, TypeError, "target: got torch.float32"),
        ({}, {"precision": "bf16"}, ValueError, "student_logits.precision: got 'bf16'"),
        ({}, {"backend": "fast"}, ValueError, "backend: got 'fast'"),
        ({}, {"ce_weight": 0.0}, ValueError, "weights: every term has weight 0"),
        ({}, {"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({}, {"class_weight": torch.ones(4)}, ValueError, "class_weight: got 4 entries"),
    ],
)
def test_errors_name_the_argument(
    changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = make()._asdict() | {
        name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in changes.items()
    }
    options = dict(options)
    if "bias" in options:
        case["bias"] = options.pop("bias")
    if isinstance(options.get("class_weight"), Tensor):
        options["class_weight"] = options["class_weight"].to(DEVICE)
    with pytest.raises(error, match=message):
        projected_loss(*case.values(), **options)


def test_a_term_without_its_teacher() -> None:
    case = make()
    with pytest.raises(ValueError, match="teacher_logits: got None, but kd_weight"):
        projected_loss(*case[:3], None, None, None, case.target, kd_weight=1.0)


@pytest.mark.parametrize("by", BOTH)
def test_labels_out_of_range(by: str) -> None:
    if DEVICE != "cpu":
        pytest.skip("a device-side assertion ends the process")
    case = make()
    target = case.target.clone()
    target[1, 2, 3] = 5
    with pytest.raises(ValueError, match=r"target: label 5 at \(b=1, y=2, x=3\)"):
        projected_loss(*case._replace(target=target), backend=by)


# --- HeteroAKDLoss -------------------------------------------------------------------------------


def _loss_of_features(backend: str, **options: Any) -> tuple[dict[str, float], list[Tensor]]:
    torch.manual_seed(0)
    loss = hf.HeteroAKDLoss(
        5, student_channels=6, teacher_channels=9, backend=backend, temperature=2.0, **options
    ).to(DEVICE)
    features = torch.randn(2, 6, 4, 5).to(DEVICE).requires_grad_()
    target = torch.randint(0, 5, (2, 16, 20))
    target[0, :4] = 255
    output = loss(
        torch.randn(2, 5, 8, 10).to(DEVICE),
        target.to(DEVICE),
        teacher_logits=torch.randn(2, 5, 8, 10).to(DEVICE),
        student_features=features,
        teacher_features=torch.randn(2, 9, 4, 5).to(DEVICE),
    )
    output.loss.backward()
    named = {"loss": float(output.loss), **{k: float(v) for k, v in output.terms.items()}}
    learnt = [features, *loss.parameters()]
    return named, [x.grad for x in learnt if x.grad is not None]


@kernels
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"resolution": "logits", "feature_weight": 0.3}, True),
        ({"resolution": "logits", "projector_weight": 0.0}, True),
        ({"resolution": "logits", "projector": "conv-bn-relu"}, False),
        ({"resolution": "logits", "preset": "paper", "projector": "linear"}, False),
        ({"resolution": "label"}, False),
    ],
)
def test_loss_module_fuses_where_it_can(
    options: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kernel = backends.get("triton")
    original = kernel.sums

    def spy(call: backends.Call) -> Any:
        calls.append(call.projected)
        return original(call)

    monkeypatch.setattr(kernel, "sums", spy)
    terms, grads = _loss_of_features("triton", **options)
    assert any(calls) == fused
    expected_terms, expected_grads = _loss_of_features("reference", **options)
    assert terms == pytest.approx(expected_terms, rel=1e-5)
    assert len(grads) == len(expected_grads)
    for got, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
