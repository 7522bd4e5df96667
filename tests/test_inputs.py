"""docs/contract.md, "Inputs": what is accepted, and what is refused with which words."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from common import (
    BACKENDS,
    TERM_CASES,
    Batch,
    assert_accurate,
    assert_matches,
    evaluate,
    make_batch,
    require,
    truth,
)
from torch import Tensor

import heteroakd_fast as hf
from heteroakd_fast import functional

F32 = torch.float32


# --- dtypes, layouts, labels, sizes ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", TERM_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_term_in_every_dtype(backend: str, case: str, dtype: torch.dtype) -> None:
    options = TERM_CASES[case]
    require(backend, **options)
    batch = make_batch(dtype=dtype)
    got = evaluate(batch, 2.5, backend=backend, **options)
    expected = truth(batch, 2.5, **options)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else F32)
    for grad in (got.student_grad, got.teacher_grad):
        assert grad is None or grad.dtype == dtype
    assert_matches(got, expected)


def layouts(dense: Tensor) -> dict[str, Tensor]:
    """The same values in every arrangement the contract names (expanded apart)."""
    b, c, h, w = dense.shape
    wide = torch.full((b, c + 2, h + 1, 2 * w), 77.0, dtype=dense.dtype)
    wide[:, 1:-1, 1:, ::2] = dense
    return {
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "sliced": wide[:, 1:-1, 1:, ::2],
        "permuted": dense.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        "offset": torch.cat((dense.flatten(), dense.flatten()))[dense.numel() :].view_as(dense),
    }


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "offset"])
@pytest.mark.parametrize("case", ["ce-smoothed", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str, case: str, layout: str) -> None:
    options = TERM_CASES[case]
    require(backend, **options)
    dense = make_batch(dtype=F32)
    target = layouts(dense.target[:, None].double())[layout][:, 0].long()
    strided_target = torch.empty_strided(
        target.shape, (1, target.shape[0], target.shape[0] * target.shape[1]), dtype=torch.int64
    ).copy_(target)
    strided = Batch(layouts(dense.student)[layout], layouts(dense.teacher)[layout], strided_target)
    got = evaluate(strided, backend=backend, **options)
    expected = evaluate(dense, backend=backend, **options)
    assert got.loss == expected.loss
    assert torch.equal(got.student_grad, expected.student_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_input(backend: str) -> None:
    require(backend)
    batch = make_batch(dtype=F32)
    expanded = batch.student[:1, :, :1].expand(2, -1, 4, -1)
    assert 0 in expanded.stride()
    got = evaluate(batch._replace(student=expanded), backend=backend)
    expected = evaluate(batch._replace(student=expanded.contiguous()), backend=backend)
    assert got.loss == expected.loss
    assert torch.equal(got.student_grad, expected.student_grad)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("ignore_index", [255, 0, 2, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_dtypes_and_ignore_index(
    backend: str, ignore_index: int, label_dtype: torch.dtype
) -> None:
    options = {"ignore_index": ignore_index, "allow_ignored_class": ignore_index < 5}
    require(backend, **options)
    batch = make_batch(dtype=F32, ignore_index=ignore_index)
    got = evaluate(batch._replace(target=batch.target.to(label_dtype)), backend=backend, **options)
    assert_matches(got, truth(batch, **options))


@pytest.mark.parametrize("ignore_index", [-100, -1, 10**12, -(10**12)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_is_any_integer(backend: str, ignore_index: int) -> None:
    require(backend, ignore_index=ignore_index)
    batch = make_batch(dtype=F32, ignore_index=ignore_index)
    got = evaluate(batch, backend=backend, ignore_index=ignore_index)
    expected = truth(make_batch(dtype=F32))
    assert_matches(got, expected)
    # uint8 labels cannot hold these: nothing is ignored, and 255 is not -1
    labels = batch.target.clamp(0, 4).to(torch.uint8)
    count = functional.cross_entropy(
        batch.student, labels, ignore_index=ignore_index, backend=backend
    ).valid
    assert int(count) == labels.numel()


@pytest.mark.parametrize("classes", [2, 19, 21, 150, 171, 257])
@pytest.mark.parametrize("case", ["ce", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_classes(backend: str, case: str, classes: int) -> None:
    options = {**TERM_CASES[case], "ignore_index": -1}
    require(backend, **options)
    batch = make_batch(batch=1, classes=classes, dtype=F32, ignore_index=-1)
    assert_matches(evaluate(batch, backend=backend, **options), truth(batch, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class_is_certain(backend: str) -> None:
    require(backend)
    got = evaluate(make_batch(classes=1, dtype=F32), backend=backend)
    assert got.loss == 0
    assert (got.student_grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_4096_classes(backend: str) -> None:
    require(backend)
    shape = {"batch": 1, "classes": 4096, "grid": (2, 3), "size": (5, 7)}
    batch = make_batch(**shape, dtype=F32, ignore_index=-1)
    assert_matches(evaluate(batch, backend=backend, ignore_index=-1), truth(batch, ignore_index=-1))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 2), (4, 6), (2, 3), (12, 18), (129, 131)])
@pytest.mark.parametrize("grid", [(4, 6), (1, 1), (1, 9)])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("case", ["ce", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_ratio_of_grids(
    backend: str, case: str, align_corners: bool, grid: tuple[int, int], size: tuple[int, int]
) -> None:
    options = {**TERM_CASES[case], "align_corners": align_corners}
    require(backend, **options)
    batch = make_batch(grid=grid, size=size, dtype=torch.float64, ignored=0.0)
    got = evaluate(batch, backend=backend, **options)
    expected = truth(batch, **options)
    assert_matches(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["ce", "all"])
@pytest.mark.parametrize(
    ("batch_size", "size"), [(0, (13, 17)), (2, (0, 17)), (2, (13, 0)), (0, (0, 0))]
)
def test_empty_batches(backend: str, case: str, batch_size: int, size: tuple[int, int]) -> None:
    options = TERM_CASES[case]
    require(backend, **options)
    batch = make_batch(batch=batch_size, size=size, dtype=F32)
    got = evaluate(batch, backend=backend, **options)
    assert got.loss == 0
    assert got.student_grad.shape == batch.student.shape
    assert (got.student_grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_resolution_logits_takes_labels_by_nearest_neighbour(backend: str) -> None:
    options = {**TERM_CASES["ce"], "resolution": "logits"}
    require(backend)
    batch = make_batch(dtype=F32, size=(16, 24))
    got = evaluate(batch, backend=backend, **options)
    expected = evaluate(batch._replace(target=batch.target[:, ::4, ::4]), backend=backend)
    assert got.loss == expected.loss
    assert torch.equal(got.student_grad, expected.student_grad)


def test_resolution_logits_resamples_the_teacher() -> None:
    batch = make_batch(size=(16, 24))
    options = {**TERM_CASES["all"], "backend": "reference"}
    got = evaluate(batch, resolution="logits", **options)
    expected = evaluate(batch._replace(target=batch.target[:, ::4, ::4]), **options)
    assert_matches(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["ce", "all"])
def test_inputs_are_never_written(backend: str, case: str) -> None:
    options = {**TERM_CASES[case], "class_weight": torch.rand(5)}
    require(backend, **TERM_CASES[case])
    batch = make_batch(dtype=F32)
    tensors = [*batch, options["class_weight"]]
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    evaluate(batch, backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert versions == [t._version for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", [torch.bfloat16, F32])
@pytest.mark.parametrize("case", ["ce", "all"])
def test_autocast_changes_nothing(backend: str, case: str, inner: torch.dtype) -> None:
    options = TERM_CASES[case]
    require(backend, **options)
    batch = make_batch(dtype=inner)
    expected = evaluate(batch, backend=backend, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(batch, backend=backend, **options)
    assert got.loss.dtype == F32
    assert got.loss == expected.loss
    assert torch.equal(got.student_grad, expected.student_grad)


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


@pytest.mark.parametrize("dtypes", [(F32, torch.bfloat16), (torch.float16, F32)])
def test_teacher_may_have_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    batch = make_batch(dtype=F32)
    mixed = batch._replace(student=batch.student.to(dtypes[0]), teacher=batch.teacher.to(dtypes[1]))
    options = {**TERM_CASES["all"], "backend": "reference"}
    got = evaluate(mixed, **options)
    assert got.student_grad.dtype == dtypes[0]
    assert got.teacher_grad.dtype == dtypes[1]
    assert_accurate(got.student_grad, truth(mixed, **options).student_grad)


def test_numpys_numbers_are_numbers() -> None:
    batch = make_batch(dtype=F32)
    for weight in (np.float32(0.0), np.float32(0.5), np.float64(0.5), np.int64(1)):
        got = evaluate(batch, kd_weight=weight, temperature=np.float32(2.0))
        expected = evaluate(batch, kd_weight=float(weight), temperature=2.0)
        assert got.loss == expected.loss
        assert got.terms == expected.terms


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_absent_class_may_have_any_weight(backend: str) -> None:
    """1 / frequency is infinite for a class that never occurs; torch reads no such weight."""
    require(backend)
    batch = make_batch(dtype=F32)
    batch.target[batch.target == 3] = 255
    weight = torch.tensor([1.0, 2.0, 0.5, float("inf"), 1.5])
    finite = weight.clone()
    finite[3] = 1.0
    got = evaluate(batch, backend=backend, class_weight=weight)
    expected = evaluate(batch, backend=backend, class_weight=finite)
    assert got.loss == expected.loss
    assert torch.equal(got.student_grad, expected.student_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resolution", ["label", "logits"])
def test_empty_label_grids_at_either_resolution(backend: str, resolution: str) -> None:
    require(backend)
    for size in ((0, 8), (8, 0), (0, 0)):
        batch = make_batch(size=size, dtype=F32)
        got = evaluate(batch, backend=backend, resolution=resolution)
        assert got.loss == 0
        assert (got.student_grad == 0).all()


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(8, 12), (4, 6)])
def test_logits_and_labels_of_inference_mode_can_be_used(
    backend: str, size: tuple[int, int]
) -> None:
    """Also where the backend reads them again in backward, which autograd would refuse to save."""
    options = {"kd_weight": 1.0, "hetero_weight": 1.0}
    require(backend, **options)
    batch = make_batch(dtype=F32, grid=(4, 6), teacher_grid=(4, 6), size=size)
    expected = evaluate(batch, backend=backend, **options)
    with torch.inference_mode():
        frozen = Batch(batch.student, batch.teacher.clone(), batch.target.clone())
    got = evaluate(frozen, backend=backend, **options)
    assert torch.equal(got.student_grad, expected.student_grad)


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


def test_refuses_a_mix_of_devices() -> None:
    refuse(ValueError, "target", "meta", "cpu", target=Y.to("meta"))
    refuse(ValueError, "teacher_logits", "meta", "cpu", teacher_logits=T.to("meta"))
    refuse(ValueError, "class_weight", "meta", "cpu", class_weight=torch.ones(5, device="meta"))


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


@pytest.mark.parametrize("backend", BACKENDS)
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
    require(backend)
    target = Y.to(label_dtype, copy=True)
    target[1, 2, 3] = label
    target[1, 12, 16] = label
    pattern = rf"target: label {label} at \(b=1, y=2, x=3\).*\[0, 5\).*ignore_index=255; 2 such"
    with pytest.raises(ValueError, match=pattern):
        functional.cross_entropy(S, target, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_bad_labels_that_resampling_would_skip(backend: str) -> None:
    require(backend)
    target = Y.clone()
    target[0, 1, 1] = 77
    with pytest.raises(ValueError, match=r"label 77 at \(b=0, y=1, x=1\)"):
        functional.cross_entropy(S, target, resolution="logits", backend=backend)


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("which", ["logits", "target", "class_weight"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_tensors_without_memory(backend: str, which: str, left: int) -> None:
    """What a sharded trainer frees, or `resize_`, must be an error and not a crash."""
    require(backend)
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


def test_module_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="student_channels, teacher_channels: got 7 and None"):
        hf.HeteroAKDLoss(5, 7)
    with pytest.raises(ValueError, match="num_classes: got 0"):
        hf.HeteroAKDLoss(0)
    with pytest.raises(ValueError, match="temperature: got 0"):
        hf.HeteroAKDLoss(5, temperature=0.0)
    with pytest.raises(ValueError, match=r"class_weight: got shape \(4,\), expected \(5,\)"):
        hf.HeteroAKDLoss(5, class_weight=[1.0] * 4)
    with pytest.raises(ValueError, match="num_classes: got 5000, expected at most 4096"):
        hf.HeteroAKDLoss(5000)
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        hf.HeteroAKDLoss(5, backend="gpu")
    with pytest.raises(TypeError, match="tau: got '1'"):
        hf.HeteroAKDLoss(5, tau="1")
    with pytest.raises(ValueError, match="weights: all of ce, .* are 0"):
        hf.HeteroAKDLoss(5, **{f"{w}_weight": 0.0 for w in ("ce", "kd", "hetero", "projector")})
    with pytest.raises(ValueError, match="projector: got ''"):
        hf.HeteroAKDLoss(5, projector="")
    with pytest.raises(ValueError, match="projector: got 'mlp'"):
        hf.HeteroAKDLoss(5, 7, 9, projector="mlp")
    plain, projecting = hf.HeteroAKDLoss(5), hf.HeteroAKDLoss(5, 7, 9)
    with pytest.raises(ValueError, match="student_features: given, but the loss has no proj"):
        plain(S, Y, teacher_logits=T, student_features=S)
    with pytest.raises(ValueError, match="student_logits: got C=4 classes.*num_classes=5"):
        plain(S[:, :4], Y, teacher_logits=T)
    with pytest.raises(ValueError, match="teacher_logits: got None, but kd_weight"):
        plain(S, Y)
    with pytest.raises(ValueError, match="student_features: got None"):
        projecting(S, Y, teacher_logits=T)
    features = torch.zeros(2, 7, 3, 3)
    with pytest.raises(ValueError, match="teacher_features: got D=7 channels.*teacher_channels=9"):
        projecting(S, Y, teacher_logits=T, student_features=features, teacher_features=features)
    with pytest.raises(TypeError, match=re.escape("student_features: got list")):
        projecting(S, Y, teacher_logits=T, student_features=[1], teacher_features=features)


def test_class_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        weight = torch.rand(5) + 0.5
    batch = make_batch(dtype=torch.float32)
    for backend in BACKENDS:
        if backend in ("reference", "cpu"):
            options = {"label_smoothing": 0.1, "backend": backend}
            got = evaluate(batch, class_weight=weight, **options)
            assert_matches(got, evaluate(batch, class_weight=weight.clone(), **options))
