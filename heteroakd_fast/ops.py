"""The operators: schema, fake kernels and autograd, over whichever backend a call names.

`heteroakd_fast::sums` returns numerators and denominators, not a loss: what is done between the
sums and the gradients (global denominators, a caller's normalizer) stays visible to PyTorch and
costs nothing. Terms that share a denominator are one group: differentiable is, per group, the sum
of weight times numerator. Its backward is `heteroakd_fast::gradient`.

There is one road: `_Sums`, an autograd function that the operator has under its Autograd key. Eager
calls take it without the dispatcher, whose own road costs as much as the kernel on a small image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import backends, reference_pass
from ._checks import check_call
from .backends import Call
from .labels import checked_counts, counted_pixels
from .projector import Projection, project
from .spec import LossSpec, Options, groups_of, vector, who_learns

__all__ = ["SumsResult", "count", "sums"]

_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("heteroakd_fast", "DEF")

# A side without weight is logits [B, C, h, w]; with one it is the features of a projection.
_SIDES = (
    "Tensor student, Tensor? student_weight, Tensor? student_bias, Tensor? teacher, "
    "Tensor? teacher_weight, Tensor? teacher_bias"
)
# numbers, structure: a LossSpec. wants: which of the six tensors of the sides get a gradient.
_OPTIONS = "Tensor numbers, *, int[] structure, bool[] wants, str precision, str backend"
# numerators [terms] f64; totals [groups] f64, the differentiable ones; denominators [groups] f64;
# counts i64 [2], the labelled pixels and those that terms of distillation count; maps
# [planes, B, H, W] (`LossSpec.planes`) or [0]; saved: of the backend. The kernels count and check
# the labels on the way, so counts come from there.
_library.define(
    f"sums({_SIDES}, Tensor target, Tensor? class_weight, Tensor? pixel_weight, {_OPTIONS}) -> "
    "(Tensor numerators, Tensor totals, Tensor denominators, Tensor counts, Tensor maps, "
    "Tensor[] saved)",
    tags=_TAGS,
)
# Gradients of what is wanted, in order. Where the backend does not read its inputs again, the sides
# are mere models of shape, dtype and layout.
_library.define(
    f"gradient(Tensor grad_totals, {_SIDES}, Tensor? target, Tensor? class_weight, "
    f"Tensor? pixel_weight, Tensor[] saved, {_OPTIONS}) -> Tensor[]",
    tags=_TAGS,
)
# The counts, and the checks, without a pass.
_library.define(
    "count(Tensor target, Tensor? pixel_weight, int num_classes, int ignore_index, "
    "int unlabelled_index) -> Tensor",
    tags=_TAGS,
)

_TENSORS = 9  # of a Call: the two sides, target, class_weight, pixel_weight


class SumsResult(NamedTuple):
    """One pass: terms before their means, valid pixels, and maps (or an empty tensor)."""

    numerators: Tensor
    """[terms], float64, without gradient"""
    totals: Tensor
    """[groups], float64, the sum of weight * numerator, differentiable once"""
    denominators: Tensor
    """[groups], float64"""
    counts: Tensor
    """int64[2], labelled pixels and pixels that terms of distillation count"""
    maps: Tensor


def _empty_sums(
    student_logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    pixel_weight: Tensor | None,
) -> reference_pass.PassSums:
    """No pixel at all: zeros that are still connected to both logits, whatever their size."""
    nothing = student_logits[:0].sum(dtype=torch.float64)
    if teacher_logits is not None:
        nothing = nothing + teacher_logits[:0].sum(dtype=torch.float64)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    terms, device = len(options.asked), student_logits.device
    planes = 2 * options.maps + 3 * options.diagnostics
    return reference_pass.PassSums(
        numerators=nothing.expand(terms),
        denominators=torch.zeros(terms, dtype=torch.float64, device=device),
        maps=torch.zeros((planes, *target.shape) if planes else 0, dtype=dtype, device=device),
    )


def sums(
    student: Tensor | Projection,
    target: Tensor,
    teacher: Tensor | Projection | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    spec: LossSpec,
    backend: str,
) -> SumsResult:
    """Runs one pass on `backend` (a name `backends.select` returned).

    Differentiable once: with respect to the student's tensors and, through the term `teacher_ce`,
    to the teacher's logits or its projection's weight and bias.
    """
    precision = student.precision if isinstance(student, Projection) else "ieee"
    sides = (*_tensors_of(student), *_tensors_of(teacher))
    weights = (_not_inference(class_weight), _not_inference(pixel_weight))
    call = Call.of((*sides, target, *weights), spec, (), precision)
    empty = target.numel() == 0  # no backend has to think of it, nor of sizes beside a 0
    plain = _is_plain_eager(*call.tensors)
    oracle = backend == "reference" and call.student.dtype == torch.float64 and plain
    if (call.projected or call.teacher_weight is not None) and (
        empty or oracle or not _can_project(call, backend)
    ):
        call = _projected(call)
    call = call._replace(wants=_wants(call))
    if empty or oracle:
        options = spec.options()
        formulas = _empty_sums if empty else reference_pass.sums
        numerators, denominators, maps = formulas(
            call.student, target, call.teacher, class_weight, options, pixel_weight
        )
        totals, per_group = reference_pass.group(numerators, denominators, options)
        counts = denominators.new_zeros(2, dtype=torch.int64)
        if not empty:
            head = (options.ignore_index, options.unlabelled_index)
            counts = count(target, pixel_weight, call.classes, *head)
        return SumsResult(
            numerators.detach(), _once_differentiable(totals), per_group, counts, maps.detach()
        )
    # Detached where no gradient is made: autograd would record a call that has none to give.
    tensors = [
        x if wanted or x is None or not x.requires_grad else x.detach()
        for x, wanted in zip(call.tensors, (*call.wants, False, False, False), strict=True)
    ]
    if plain and not any(call.wants):
        return SumsResult(*backends.get(backend).sums(call.with_tensors(tensors))[:5])
    if plain:
        return SumsResult(*_Sums.apply(*tensors, None, call, backend, None)[:5])
    numerators, totals, denominators, counts, maps, _ = torch.ops.heteroakd_fast.sums(
        *(_not_inference(x) for x in tensors),
        vector(spec.numbers) if isinstance(spec.numbers, tuple) else spec.numbers,
        structure=spec.structure,
        wants=call.wants,
        precision=call.precision,
        backend=backend,
    )
    return SumsResult(numerators, totals, denominators, counts, maps)


def count(
    target: Tensor,
    pixel_weight: Tensor | None,
    num_classes: int,
    ignore_index: int,
    unlabelled_index: int,
) -> Tensor:
    """Labelled pixels and pixels that terms of distillation count, int64[2].

    A label outside [0, num_classes) or a wrong weight raises ValueError on the CPU. On a GPU it is
    a device-side assertion, which waits for nothing; `HETEROAKD_CHECK_LABELS=1` makes it the
    ValueError.
    """
    counts: Tensor = torch.ops.heteroakd_fast.count(
        target, pixel_weight, num_classes, ignore_index, unlabelled_index
    )
    return counts


# --- projections ---------------------------------------------------------------------------------


def _tensors_of(side: Tensor | Projection | None) -> tuple[Tensor | None, ...]:
    return (side, None, None) if side is None or isinstance(side, Tensor) else side[:3]


def _can_project(call: Call, backend: str) -> bool:
    """Whether the backend projects on the way: both sides are projections, on the label grid."""
    both = call.projected and (call.teacher is None or call.teacher_weight is not None)
    sides = [side for side in (call.student, call.teacher) if side is not None]
    on_grid = all(side.shape[2:] == call.labels.shape[1:] for side in sides)
    float64 = any(x is not None and x.dtype == torch.float64 for x in call.tensors[:6])
    return (
        both
        and on_grid
        and call.pixel_weight is None
        and backends.projects(backend, call.spec.structure, call.classes, float64)
    )


def _projected(call: Call) -> Call:
    """The call, with logits in the place of projections."""
    tensors = list(call.tensors)
    for at, features, weight, bias in ((0, *call[:3]), (3, *call[3:6])):
        if features is None or weight is None:
            continue
        if at == 3:
            features = features.detach()
            if not who_learns(call.spec.structure)[1]:
                weight, bias = weight.detach(), None if bias is None else bias.detach()
        if features.shape[2:] == call.labels.shape[1:]:
            # What ignored pixels hold would reach the weight's gradient, times 0: perhaps as NaN.
            counted = counted_pixels(call.labels, call.pixel_weight, call.spec.ignore_index)
            features = torch.where(counted[:, None], features, 0)
        tensors[at : at + 3] = [project(features, weight, bias), None, None]
    return call.with_tensors(tensors)


def _wants(call: Call) -> tuple[bool, ...]:
    if not torch.is_grad_enabled():
        return (False,) * 6
    learns = who_learns(call.spec.structure)
    return tuple(
        x is not None and x.requires_grad and learns[k // 3] and (k != 3 or not call.projected)
        for k, x in enumerate(call.tensors[:6])
    )


# --- the road ------------------------------------------------------------------------------------


def _is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether only autograd watches this call: no tracer, dispatch mode, transform, subclass.

    Where this version of torch cannot tell, the operator is taken.
    """
    if torch.compiler.is_compiling():
        return False
    if any(tensor is not None and type(tensor) not in _PLAIN for tensor in tensors):
        return False
    try:
        return (
            torch._C._get_tracing_state() is None
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._len_torch_function_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
        )
    except AttributeError:
        return False


_PLAIN = (Tensor, torch.nn.Parameter)


def _not_inference(tensor: Tensor | None) -> Tensor | None:
    """A copy of what inference mode made: autograd does not save that, nor see it change."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor if torch.is_inference_mode_enabled() else tensor.clone()


class _Sums(torch.autograd.Function):
    """`heteroakd_fast::sums` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Any, ...]:
        """Nine tensors, the numbers where the call is traced, the call, the backend, and the
        dispatcher's keys where the call has come through it and is to go on."""
        *tensors, numbers, call, backend, keys = arguments
        call = call.with_tensors(tensors)
        implementation = backends.get(backend)
        if keys is None:
            *results, saved = implementation.sums(call)
        else:
            *results, saved = _below_autograd(keys, tensors, numbers, call, backend)
        ctx.mark_non_differentiable(results[0], *results[2:])  # all but the totals
        ctx.set_materialize_grads(False)
        ctx.call = call.with_tensors((None,) * _TENSORS)
        ctx.backend, ctx.traced = backend, keys is not None
        ctx.reads_inputs = implementation.reads_inputs(call)
        kept: tuple[Tensor | None, ...] = ()
        if ctx.reads_inputs:
            kept = tuple(_not_inference(x) for x in tensors)
        elif any(call.wants):
            # What is not saved may be freed, or overwritten, before backward.
            ctx.of_sides = [None if x is None else _metadata(x) for x in tensors[:6]]
        ctx.save_for_backward(numbers, *kept, *saved)
        return (*results, saved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_second_order()
        grad_totals = grads[1]
        unused = (None,) * (_TENSORS - 6 + 4)
        if grad_totals is None:
            return (None,) * 6 + unused
        numbers, *saved = ctx.saved_tensors
        if ctx.reads_inputs:
            tensors, saved = saved[:_TENSORS], saved[_TENSORS:]
        else:
            tensors = [*(_empty_like(x) for x in ctx.of_sides), None, None, None]
        call = ctx.call
        if not ctx.traced:
            call = call.with_tensors(tensors)
            found = backends.get(ctx.backend).gradient(call, grad_totals, list(saved))
            return (*found, *unused)
        wanted = iter(
            torch.ops.heteroakd_fast.gradient(
                grad_totals,
                *tensors,
                list(saved),
                numbers,
                structure=call.spec.structure,
                wants=call.wants,
                precision=call.precision,
                backend=ctx.backend,
            )
        )
        return (*(next(wanted) if asked else None for asked in call.wants), *unused)


def _below_autograd(
    keys: Any, tensors: Sequence[Tensor | None], numbers: Tensor, call: Call, backend: str
) -> tuple[Any, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        results: tuple[Any, ...] = torch.ops.heteroakd_fast.sums.default.redispatch(
            keys & torch._C._after_autograd_keyset,
            *tensors,
            numbers,
            structure=call.spec.structure,
            wants=call.wants,
            precision=call.precision,
            backend=backend,
        )
    return results


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _empty_like(metadata: tuple[Any, ...] | None) -> Tensor | None:
    """A tensor of that shape, layout, dtype and device whose memory is never touched."""
    if metadata is None:
        return None
    shape, stride, dtype, device = metadata
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "heteroakd_fast losses are differentiable once: backward was called with "
            "create_graph=True. Drop create_graph, or compute second-order terms (gradient "
            "penalties, Hessian products) on a loss written in plain PyTorch operators."
        )


class _OnceDifferentiable(torch.autograd.Function):
    """The identity; keeps the backends alike in refusing the second order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        _refuse_second_order()
        return grad


def _once_differentiable(x: Tensor) -> Tensor:
    """`x`, whose second derivative is refused."""
    if x.requires_grad and not torch.compiler.is_compiling():
        return cast(Tensor, _OnceDifferentiable.apply(x))
    return x


# --- implementations -----------------------------------------------------------------------------


def _call(tensors: Sequence[Tensor | None], numbers: Tensor, **options: Any) -> tuple[Call, str]:
    spec = LossSpec(tuple(options["structure"]), numbers)
    return Call.of(tensors, spec, options["wants"], options["precision"]), options["backend"]


def _sums_autograd(keys: Any, *arguments: Any, **options: Any) -> tuple[Any, ...]:
    *tensors, numbers = arguments
    call, backend = _call(tensors, numbers, **options)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return _below_autograd(keys, tensors, numbers, call, backend)
    if _is_plain_eager(*tensors):
        check_call(call)
        return cast(tuple[Any, ...], _Sums.apply(*tensors, None, call, backend, None))
    return cast(tuple[Any, ...], _Sums.apply(*tensors, numbers, call, backend, keys))


def _sums_impl(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    *tensors, numbers = arguments
    call, backend = _call(tensors, numbers, **options)
    check_call(call)
    return tuple(backends.get(backend).sums(call))


def _sums_fake(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    *tensors, numbers = arguments
    call, backend = _call(tensors, numbers, **options)
    asked = groups_of(call.spec.structure)
    groups = len(set(asked.values()))
    shapes = backends.get(backend).saved_shapes(call)
    maps = (call.spec.planes, *call.labels.shape) if call.spec.planes else 0
    dtype = torch.promote_types(call.student.dtype, torch.float32)
    new = call.student.new_empty
    return (
        new(len(asked), dtype=torch.float64),
        new(groups, dtype=torch.float64),
        new(groups, dtype=torch.float64),
        new(2, dtype=torch.int64),
        new(maps, dtype=dtype),
        [new(shape, dtype=saved_dtype) for shape, saved_dtype in shapes],
    )


def _gradient_impl(grad_totals: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    *tensors, saved, numbers = arguments
    call, backend = _call(tensors, numbers, **options)
    grads = backends.get(backend).gradient(call, grad_totals, saved)
    return [grad for grad in grads if grad is not None]


def _gradient_fake(grad_totals: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    *tensors, _, numbers = arguments
    call, _ = _call(tensors, numbers, **options)
    # a projection's weight and bias get dense gradients
    dense = (1, 2, 4, 5)
    return [
        torch.empty_like(
            x, memory_format=torch.contiguous_format if k in dense else torch.preserve_format
        )
        for k, (x, wanted) in enumerate(zip(call.tensors[:6], call.wants, strict=True))
        if wanted and x is not None
    ]


def _count_fake(target: Tensor, *arguments: Any) -> Tensor:
    return target.new_empty(2, dtype=torch.int64)


_KEY = "CompositeExplicitAutograd"  # one implementation for every device; the backend chooses
_library.impl("sums", _sums_impl, _KEY)
_library.impl("sums", _sums_autograd, "Autograd", with_keyset=True)
_library.impl("gradient", _gradient_impl, _KEY)
_library.impl("count", checked_counts, _KEY)
for _name, _fake in (
    ("sums", _sums_fake),
    ("gradient", _gradient_fake),
    ("count", _count_fake),
):
    torch.library.register_fake(f"heteroakd_fast::{_name}", _fake, lib=_library)
