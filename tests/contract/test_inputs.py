"""docs/contract.md, "Inputs": what is accepted, and what is refused with which words."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from common import (
    F32,
    TERM_CASES,
    Batch,
    assert_matches,
    assert_same_bits,
    complete,
    device_of,
    evaluate,
    every_backend,
    every_cpu_backend,
    make_batch,
    truth,
)

import heteroakd_fast as hf
from heteroakd_fast import functional

# --- what is accepted --------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, -1, 10**12, -(10**12)])
@every_backend
def test_ignore_index_is_any_integer(backend: str, ignore_index: int) -> None:
    batch = make_batch(dtype=F32, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index, "backend": backend}
    assert_matches(evaluate(batch, **options), truth(make_batch(dtype=F32)))
    # uint8 labels cannot hold these: nothing is ignored, and 255 is not -1
    labels = batch._replace(target=batch.target.clamp(0, 4).to(torch.uint8))
    assert_matches(evaluate(labels, **options), truth(labels, ignore_index=None))


@pytest.mark.share(8)
@pytest.mark.parametrize("resolution", ["label", "logits"])
@pytest.mark.parametrize("case", ["ce", "all", "hetero-paper-space", "kd-js"])
@pytest.mark.parametrize("shape", [(0, 13, 17), (0, 0, 0), (2, 0, 17), (2, 13, 0), (2, 0, 0)])
@every_backend
def test_empty_batches(
    backend: str, shape: tuple[int, int, int], case: str, resolution: str
) -> None:
    """No image or no pixel, and then grids of logits may be empty too."""
    grids = [(4, 6)] if resolution == "logits" else [(4, 6), (4, 0), (0, 4)]
    for grid in grids:
        for teacher_grid in (grid, (0, 3), (3, 3)) if resolution == "label" else [(3, 3)]:
            batch = make_batch(shape[0], 5, grid, teacher_grid, shape[1:], dtype=F32)
            options = {**TERM_CASES[case], "resolution": resolution, "return_maps": case != "ce"}
            got = evaluate(batch, backend=backend, **options)
            assert got.loss == 0
            assert got.student_grad.shape == batch.student.shape
            assert not got.student_grad.any()


@complete
@every_backend
def test_strides_beyond_2_31_elements(backend: str) -> None:
    """Image 1 lies more than 2^31 elements behind image 0, in logits and in labels.

    On the CPU the memory between them is never touched, so it is never allocated.
    """
    if device_of(backend, make_batch()) == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # would fill the gap
    far = 2**31 + 12345
    logits = torch.empty(far + 200, dtype=torch.bfloat16).as_strided((2, 3, 4, 5), (far, 20, 5, 1))
    target = torch.empty(far + 200, dtype=torch.uint8).as_strided((2, 8, 10), (far, 10, 1))
    dense = make_batch(2, 3, (4, 5), None, (8, 10), torch.bfloat16, label_dtype=torch.uint8)
    logits.copy_(dense.student)
    target.copy_(dense.target)
    got = evaluate(dense._replace(student=logits, target=target), backend=backend)
    assert_same_bits(got, evaluate(dense, backend=backend))


@pytest.mark.parametrize("case", ["ce", "all"])
@every_backend
def test_resolution_logits(backend: str, case: str) -> None:
    """Labels are taken by nearest neighbour, and the teacher is interpolated."""
    options = {**TERM_CASES[case], "backend": backend}
    batch = make_batch(dtype=F32, size=(16, 24))
    got = evaluate(batch, resolution="logits", **options)
    assert_same_bits(got, evaluate(batch._replace(target=batch.target[:, ::4, ::4]), **options))


@every_backend
@pytest.mark.parametrize("case", ["ce", "all"])
def test_inputs_are_never_written(backend: str, case: str) -> None:
    options = {**TERM_CASES[case], "class_weight": torch.rand(5)}
    batch = make_batch(dtype=F32)
    tensors = [*batch, options["class_weight"]]
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    evaluate(batch, backend=backend, **options)
    assert all(map(torch.equal, before, tensors))
    assert versions == [t._version for t in tensors]


@every_backend
@pytest.mark.parametrize("inner", [torch.bfloat16, F32])
@pytest.mark.parametrize("case", ["ce", "all"])
def test_autocast_changes_nothing(backend: str, case: str, inner: torch.dtype) -> None:
    options = TERM_CASES[case]
    batch = make_batch(dtype=inner)
    expected = evaluate(batch, backend=backend, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(batch, backend=backend, **options)
    assert got.loss.dtype == F32
    assert_same_bits(got, expected)


def test_autocast_does_not_round_the_projection() -> None:
    loss = hf.HeteroAKDLoss(5, 7, 9, kd_weight=0.0)
    batch = make_batch(dtype=F32)
    features = {
        "student_features": torch.randn(2, 7, 4, 4),
        "teacher_features": torch.randn(2, 9, 3, 3),
    }
    expected = loss(batch.student, batch.target, **features).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(batch.student, batch.target, **features).loss
    assert got == expected


def test_numpys_numbers_are_numbers() -> None:
    batch = make_batch(dtype=F32)
    for weight in (np.float32(0.0), np.float32(0.5), np.float64(0.5), np.int64(1)):
        got = evaluate(batch, kd_weight=weight, temperature=np.float32(2.0))
        expected = evaluate(batch, kd_weight=float(weight), temperature=2.0)
        assert got.loss == expected.loss
        assert got.terms == expected.terms


@every_backend
def test_an_absent_class_may_have_any_weight(backend: str) -> None:
    """1 / frequency is infinite for a class that never occurs; torch reads no such weight."""
    batch = make_batch(dtype=F32)
    batch.target[batch.target == 3] = 255
    weight = torch.tensor([1.0, 2.0, 0.5, float("inf"), 1.5])
    finite = weight.clone()
    finite[3] = 1.0
    got = evaluate(batch, backend=backend, class_weight=weight)
    expected = evaluate(batch, backend=backend, class_weight=finite)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("kind", ["linear", "conv-bn-relu"])
@pytest.mark.parametrize("features", [F32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("module", [F32, torch.float64, torch.bfloat16, torch.float16])
def test_projector_in_every_mix_of_dtypes(
    kind: str, features: torch.dtype, module: torch.dtype
) -> None:
    batch = make_batch(dtype=F32)
    loss = hf.HeteroAKDLoss(5, 7, 9, kd_weight=0.0, projector=kind).to(module)
    exact = copy.deepcopy(loss).double()
    given = {
        "student_features": torch.randn(2, 7, 4, 4).to(features),
        "teacher_features": torch.randn(2, 9, 3, 3).to(features),
    }
    got = loss(batch.student, batch.target, **given)
    got.loss.backward()
    expected = exact(
        batch.student.double(), batch.target, **{k: v.double() for k, v in given.items()}
    )
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=1e-5, atol=0)
    if kind == "conv-bn-relu":  # the running statistics moved, in the module's dtype
        mean, moved = exact.student_projector.bn.running_mean, loss.student_projector.bn
        assert moved.running_mean.dtype == module
        torch.testing.assert_close(
            moved.running_mean.double(), mean, rtol=0, atol=torch.finfo(module).eps
        )
        assert int(moved.num_batches_tracked) == 1


def test_what_inference_mode_made_can_be_used() -> None:
    batch = make_batch(dtype=F32)
    loss = hf.HeteroAKDLoss(5, 7, 9)
    with torch.inference_mode():
        teacher = {
            "teacher_logits": batch.teacher.clone(),
            "teacher_features": torch.randn(2, 9, 3, 3),
        }
        target = batch.target.clone()
    student = batch.student.requires_grad_()
    output = loss(student, target, student_features=torch.randn(2, 7, 4, 4), **teacher)
    output.loss.backward()
    assert student.grad.abs().sum() > 0


@every_backend
@pytest.mark.parametrize("size", [(8, 12), (4, 6)])
def test_logits_and_labels_of_inference_mode_can_be_used(
    backend: str, size: tuple[int, int]
) -> None:
    """Also where the backend reads them again in backward, which autograd would refuse to save."""
    options = {"kd_weight": 1.0, "hetero_weight": 1.0, "label_smoothing": 0.1, "backend": backend}
    batch = make_batch(dtype=F32, grid=(4, 6), teacher_grid=(4, 6), size=size)
    weight = torch.rand(5) + 0.5
    expected = evaluate(batch, class_weight=weight, **options)
    with torch.inference_mode():
        frozen = Batch(batch.student, batch.teacher.clone(), batch.target.clone())
        weight = weight.clone()
    assert_same_bits(evaluate(frozen, class_weight=weight, **options), expected)


# --- refusals ----------------------------------------------------------------------------------

S = torch.zeros(2, 5, 4, 6)
T = torch.zeros(2, 5, 8, 3)
Y = torch.zeros(2, 13, 17, dtype=torch.int64)


def refuse(error: type[Exception], *words: str, **change: Any) -> None:
    """The call with one thing wrong must name the argument, what came and what was expected."""
    call: dict[str, Any] = {"student_logits": S, "teacher_logits": T, "target": Y, "kd_weight": 1.0}
    call |= change
    with pytest.raises(error) as caught:
        functional.distillation_loss(**call)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


def test_refuses_wrong_ranks_and_shapes() -> None:
    refuse(ValueError, "student_logits", "(2, 5, 4)", "[B, C, h, w]", student_logits=S[..., 0])
    refuse(ValueError, "teacher_logits", "(5, 8, 3)", "[B, C, h', w']", teacher_logits=T[0])
    refuse(ValueError, "target", "(2, 1, 13, 17)", "[B, H, W]", target=Y[:, None])
    refuse(ValueError, "target", "batch 1", "batch 2", target=Y[:1])
    refuse(ValueError, "teacher_logits", "batch 1", "batch 2", teacher_logits=T[:1])
    refuse(ValueError, "teacher_logits", "C=4", "5", "project", teacher_logits=T[:, :4])
    refuse(ValueError, "student_logits", "C=0", student_logits=S[:, :0])
    refuse(
        ValueError, "student_logits", "C=5000", "4096", student_logits=torch.zeros(2, 5000, 1, 1)
    )
    refuse(ValueError, "student_logits", "empty grid", student_logits=S[..., :0])
    refuse(ValueError, "class_weight", "4", "C=5", class_weight=torch.ones(4))
    refuse(ValueError, "class_weight", "(5, 1)", "[C]", class_weight=torch.ones(5, 1))


def test_refuses_wrong_types_and_dtypes() -> None:
    refuse(TypeError, "student_logits", "list", "tensor", student_logits=[1.0])
    refuse(TypeError, "student_logits", "torch.int64", "torch.float32", student_logits=S.long())
    refuse(TypeError, "teacher_logits", "torch.complex64", teacher_logits=T.to(torch.complex64))
    refuse(TypeError, "target", "torch.float32", "torch.int64", target=Y.float())
    refuse(TypeError, "target", "torch.bool", target=Y.bool())
    refuse(TypeError, "class_weight", "torch.int64", class_weight=torch.ones(5, dtype=torch.int64))
    refuse(TypeError, "kd_weight", "'1.0'", "number", kd_weight="1.0")
    for nothing in (None, "", [], False):  # not a way to say 0
        refuse(TypeError, "hetero_weight", "number", hetero_weight=nothing)
    refuse(TypeError, "temperature", "Parameter", temperature=torch.nn.Parameter(torch.ones(1)))
    refuse(TypeError, "temperature", "None", temperature=None)
    refuse(TypeError, "tau", "bool", tau=True)
    refuse(TypeError, "label_smoothing", "'0.1'", label_smoothing="0.1")
    refuse(TypeError, "ignore_index", "float", "integer", ignore_index=255.9)
    refuse(TypeError, "ignore_index", "'none'", ignore_index="none")
    refuse(ValueError, "ignore_index", "64-bit", ignore_index=2**63)
    refuse(TypeError, "align_corners", "'False'", "True or False", align_corners="False")
    refuse(TypeError, "return_maps", "int", return_maps=1)
    refuse(TypeError, "student_logits", "sparse", "dense", student_logits=S.to_sparse())
    refuse(TypeError, "ce_weight", "Tensor", ce_weight=torch.ones(1))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-5, 1e5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["temperature", "tau"])
def test_refuses_temperatures_that_are_not_positive(name: str, value: float) -> None:
    refuse(ValueError, name, str(value), "expected a", **{name: value})


def test_refuses_other_options_out_of_range() -> None:
    refuse(ValueError, "label_smoothing", "1.5", "[0, 1]", label_smoothing=1.5)
    refuse(ValueError, "kd_beta", "0.0", "(0, 1)", kd_divergence="js", kd_beta=0.0)
    refuse(ValueError, "kd_weight", "nan", "finite", kd_weight=float("nan"))
    refuse(ValueError, "preset", "'softmax'", "'paper'", preset="softmax")
    refuse(ValueError, "mix", "'prob'", "'probs'", "'logits'", "'teacher'", mix="prob")
    refuse(ValueError, "mix", "paper", "'teacher'", preset="paper", mix="probs")
    refuse(ValueError, "evaluation", "'kl'", "'none'", evaluation="kl")
    refuse(ValueError, "weight_axis", "'time'", "'space'", weight_axis="time")
    refuse(ValueError, "weight_axis", "paper", weight_axis="space")
    refuse(ValueError, "kd_divergence", "'kl'", "'forward'", kd_divergence="kl")
    refuse(ValueError, "resolution", "'full'", "'label'", resolution="full")
    refuse(ValueError, "backend", "'gpu'", "cuda", backend="gpu")
    refuse(ValueError, "weight 0", "ce_weight", ce_weight=0.0, kd_weight=0.0)


def test_refuses_a_teacher_that_would_silently_get_no_gradient() -> None:
    teacher = T.clone().requires_grad_()
    refuse(ValueError, "teacher_logits", "detach", "teacher_ce", teacher_logits=teacher)
    refuse(ValueError, "teacher_logits", "None", "kd_weight", teacher_logits=None)
    refuse(ValueError, "return_maps", teacher_logits=None, kd_weight=0.0, return_maps=True)


def test_refuses_wrong_normalizers() -> None:
    refuse(ValueError, "normalizer", "(2,)", "one element", normalizer=torch.ones(2))
    refuse(TypeError, "normalizer", "'3'", normalizer="3")
    refuse(ValueError, "normalizer", "nan", normalizer=float("nan"))
    refuse(ValueError, "normalizer", "-1", ">= 0", normalizer=-1)
    refuse(TypeError, "normalizer", "bool", normalizer=torch.ones(1, dtype=torch.bool))
    refuse(ValueError, "normalizer", "hetero", "ce, kd", normalizer={"hetero": 1.0})
    grad = torch.ones((), requires_grad=True)
    refuse(ValueError, "normalizer", "requires grad", normalizer=grad)


@every_cpu_backend
@pytest.mark.parametrize(
    ("label_dtype", "label"),
    [
        (torch.uint8, 5),
        (torch.uint8, 254),
        (torch.int32, -1),
        (torch.int32, -(2**31)),
        (torch.int64, 256),
        (torch.int64, 2**32),  # 0 if it were cut to 32 bits
        (torch.int64, -(2**63)),
    ],
)
def test_refuses_labels_out_of_range(backend: str, label_dtype: torch.dtype, label: int) -> None:
    target = Y.to(label_dtype, copy=True)
    target[1, 2, 3] = label
    target[1, 12, 16] = label
    pattern = rf"target: label {label} at \(b=1, y=2, x=3\).*\[0, 5\).*ignore_index=255; 2 such"
    with pytest.raises(ValueError, match=pattern):
        functional.cross_entropy(S, target, backend=backend)


@every_cpu_backend
def test_refuses_bad_labels_that_resampling_would_skip(backend: str) -> None:
    target = Y.clone()
    target[0, 1, 1] = 77
    with pytest.raises(ValueError, match=r"label 77 at \(b=0, y=1, x=1\)"):
        functional.cross_entropy(S, target, resolution="logits", backend=backend)


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("which", ["logits", "target", "class_weight"])
@every_cpu_backend
def test_refuses_tensors_without_memory(backend: str, which: str, left: int) -> None:
    """What a sharded trainer frees, or `resize_`, must be an error and not a crash."""
    tensors = {"logits": S.clone(), "target": Y.clone(), "class_weight": torch.ones(5)}
    tensors[which].untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=rf"{which}: the tensor has no memory.* {left} bytes"):
        functional.cross_entropy(**tensors, backend=backend)


def test_refuses_dtensors(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(S, mesh)
        refuse(TypeError, "student_logits", "DTensor", "to_local", student_logits=sharded)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "student_channels, teacher_channels: got 7 and None", (5, 7), {}),
        (ValueError, "num_classes: got 0", (0,), {}),
        (ValueError, "num_classes: got 5000, expected at most 4096", (5000,), {}),
        (ValueError, "temperature: got 0", (5,), {"temperature": 0.0}),
        (ValueError, r"class_weight: got shape \(4,\), expected \(5,\)", (5,),
         {"class_weight": [1.0] * 4}),
        (ValueError, "backend: got 'gpu'", (5,), {"backend": "gpu"}),
        (TypeError, "tau: got '1'", (5,), {"tau": "1"}),
        (ValueError, "weights: all of ce, .* are 0", (5,),
         {f"{name}_weight": 0.0 for name in ("ce", "kd", "hetero", "projector")}),
        (ValueError, "projector: got ''", (5,), {"projector": ""}),
        (ValueError, "projector: got 'mlp'", (5, 7, 9), {"projector": "mlp"}),
    ],
)  # fmt: skip
def test_module_refuses_what_it_cannot_be(
    error: type[Exception], message: str, arguments: tuple[int, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        hf.HeteroAKDLoss(*arguments, **options)


FEATURES = torch.zeros(2, 7, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "channels", "change"),
    [
        (ValueError, "student_features: given, but the loss has no proj", (),
         {"student_features": S}),
        (ValueError, "student_logits: got C=4 classes.*num_classes=5", (),
         {"student_logits": S[:, :4]}),
        (ValueError, "teacher_logits: got None, but kd_weight", (), {"teacher_logits": None}),
        (ValueError, "student_features: got None", (7, 9), {}),
        (ValueError, "teacher_features: got D=7 channels.*teacher_channels=9", (7, 9),
         {"student_features": FEATURES, "teacher_features": FEATURES}),
        (TypeError, "student_features: got list", (7, 9),
         {"student_features": [1], "teacher_features": FEATURES}),
    ],
)  # fmt: skip
def test_module_refuses_what_it_cannot_use(
    error: type[Exception], message: str, channels: tuple[int, ...], change: dict[str, Any]
) -> None:
    call = {"student_logits": S, "target": Y, "teacher_logits": T, **change}
    with pytest.raises(error, match=message):
        hf.HeteroAKDLoss(5, *channels)(**call)
