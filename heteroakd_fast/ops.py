"""The operators: schema, fake kernels and autograd, over whichever backend a call names.

`heteroakd_fast::distillation_sums` returns each term's numerator and denominator, not a loss:
what is done between the sums and the gradients (global denominators, weights, a caller's
normalizer) stays visible to PyTorch and costs nothing, and the gradient of the numerators is all
that a backend has to know. Its backward is `heteroakd_fast::distillation_sums_backward`.

The backend `reference` does not pass through the operator: in traced code, and in float64, it is
`reference.distillation_sums`, ordinary differentiable PyTorch; elsewhere the same formulas over
bands (`backends/reference.py`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import backends, reference
from .backends.reference import BACKEND as BANDS
from .labels import count_valid
from .spec import LossSpec

__all__ = ["OPTIONS_SCHEMA", "SumsResult", "distillation_sums", "valid_count"]

#: The fields of `LossSpec`, as the operators take them.
OPTIONS_SCHEMA = (
    "str[] terms, str preset, str mix, str evaluation, str weight_axis, str kd_divergence, "
    "float kd_beta, float temperature, float tau, int ignore_index, bool align_corners, "
    "float label_smoothing, bool maps"
)

_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("heteroakd_fast", "DEF")

# numerators [K] f64, denominators [K] f64, valid: i64 scalar, maps [2, B, H, W] or [0], saved: the
# backend's own. The kernels count and check the labels on the way, so valid comes from there.
_library.define(
    "distillation_sums(Tensor student_logits, Tensor? teacher_logits, Tensor target, "
    f"Tensor? class_weight, *, {OPTIONS_SCHEMA}, bool student_grad, bool teacher_grad, "
    "str backend) -> (Tensor numerators, Tensor denominators, Tensor valid, Tensor maps, "
    "Tensor[] saved)",
    tags=_TAGS,
)
# A gradient that was not asked for is an empty tensor: operators cannot return None. Where the
# backend does not read its inputs again, the logits are mere models of shape, dtype and layout.
_library.define(
    "distillation_sums_backward(Tensor grad_numerators, Tensor student_logits, "
    "Tensor? teacher_logits, Tensor? target, Tensor? class_weight, Tensor[] saved, *, "
    f"{OPTIONS_SCHEMA}, bool student_grad, bool teacher_grad, str backend) "
    "-> (Tensor student_grad, Tensor teacher_grad)",
    tags=_TAGS,
)
# Number of valid labels, int64 scalar; checks the range of the others.
_library.define(
    "valid_count(Tensor target, int num_classes, int ignore_index) -> Tensor", tags=_TAGS
)


class SumsResult(NamedTuple):
    """One pass: terms before their means, valid pixels, and maps (or an empty tensor)."""

    numerators: Tensor
    denominators: Tensor
    valid: Tensor
    maps: Tensor


def distillation_sums(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    spec: LossSpec,
    backend: str,
) -> SumsResult:
    """Runs one pass on `backend` (a name `backends.select` returned).

    Shapes as in `reference.distillation_sums`. Differentiable once, with respect to
    `student_logits` and, through the term `teacher_ce`, to `teacher_logits`.
    """
    grad_mode = torch.is_grad_enabled()
    student_grad = (
        grad_mode
        and student_logits.requires_grad
        and any(term != "teacher_ce" for term in spec.terms)
    )
    teacher_grad = (
        grad_mode
        and teacher_logits is not None
        and teacher_logits.requires_grad
        and "teacher_ce" in spec.terms
    )
    if target.numel() == 0:  # no backend has to think of it, nor of sizes beside a 0
        numerators, denominators, maps = reference.empty_pass(
            student_logits, teacher_logits, target, spec
        )
        valid = denominators.new_zeros((), dtype=torch.int64)
        return SumsResult(_once_differentiable(numerators), denominators, valid, maps)
    plain = _is_plain_eager(student_logits, teacher_logits, target, class_weight)
    double = student_logits.dtype == torch.float64  # the ground truth of the tests
    if backend == "reference" and (double or not plain):
        valid = valid_count(target, student_logits.shape[1], spec.ignore_index)
        # Autocast finds nothing to cast here: the formulas have no product of matrices.
        numerators, denominators, maps = reference.distillation_sums(
            student_logits, teacher_logits, target, class_weight, spec
        )
        # A compiler drops an operator whose result nobody reads, and the check of the labels with
        # it; so the loss reads the count.
        numerators = torch.where(valid >= 0, numerators, math.nan)
        numerators = _once_differentiable(numerators)
    elif plain:
        # Detached where no gradient is made: autograd would record a call that has none to give.
        numerators, denominators, valid, maps = _EagerSums.apply(
            student_logits if student_grad else student_logits.detach(),
            teacher_logits if teacher_grad or teacher_logits is None else teacher_logits.detach(),
            target,
            _not_inference(class_weight),
            spec,
            student_grad,
            teacher_grad,
            BANDS if backend == "reference" else backends.get(backend),
        )
    else:
        numerators, denominators, valid, maps, _ = torch.ops.heteroakd_fast.distillation_sums(
            student_logits,
            _not_inference(teacher_logits),
            _not_inference(target),
            _not_inference(class_weight),
            **spec.options(),
            student_grad=student_grad,
            teacher_grad=teacher_grad,
            backend=backend,
        )
    return SumsResult(numerators, denominators.detach(), valid, maps.detach())


def valid_count(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Number of pixels that are not `ignore_index`, int64 scalar.

    A label outside [0, num_classes) raises ValueError on the CPU. On a GPU it is a device-side
    assertion, which waits for nothing; `HETEROAKD_CHECK_LABELS=1` makes it the ValueError.
    """
    count: Tensor = torch.ops.heteroakd_fast.valid_count(target, num_classes, ignore_index)
    return count


def _is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether only autograd watches this call: no tracer, dispatch mode, transform, subclass.

    The operator's own road through the dispatcher costs as much as the kernel on a small image.
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


class _EagerSums(torch.autograd.Function):
    """`heteroakd_fast::distillation_sums` without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
        implementation: backends.EagerBackend,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        numerators, denominators, valid, maps, saved = implementation.forward(
            student_logits, teacher_logits, target, class_weight, spec, student_grad, teacher_grad
        )
        ctx.mark_non_differentiable(denominators, valid, maps)
        ctx.set_materialize_grads(False)
        ctx.implementation, ctx.spec = implementation, spec
        ctx.wanted = student_grad, teacher_grad
        inputs: tuple[Tensor | None, ...] = student_logits, teacher_logits, target, class_weight
        ctx.reads_inputs = implementation.backward_reads_inputs(
            student_logits, teacher_logits, target, spec, student_grad, teacher_grad
        )
        if ctx.reads_inputs:
            inputs = tuple(_not_inference(x) for x in inputs)
            ctx.save_for_backward(*inputs, *saved)
        else:
            # What is not saved may be freed, or overwritten, before backward.
            ctx.forms = [None if logits is None else _form(logits) for logits in inputs[:2]]
            ctx.save_for_backward(*saved)
        return numerators, denominators, valid, maps

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_numerators: Tensor | None, *unused: object
    ) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        nothing = (None,) * 6
        tensors = list(ctx.saved_tensors)
        if grad_numerators is None:
            return None, None, *nothing
        target, class_weight = None, None
        if ctx.reads_inputs:
            student_logits, teacher_logits, target, class_weight, *tensors = tensors
        else:
            student_logits, teacher_logits = (_of_form(form) for form in ctx.forms)
        assert student_logits is not None
        student, teacher = ctx.implementation.backward(
            grad_numerators,
            student_logits,
            teacher_logits,
            target,
            class_weight,
            tensors,
            ctx.spec,
            *ctx.wanted,
        )
        return student, teacher, *nothing


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


# --- implementations ---------------------------------------------------------------------------


def _distillation_sums_impl(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    student_grad: bool,
    teacher_grad: bool,
    backend: str,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    implementation, spec = backends.get(backend), LossSpec.from_options(options)
    refusal = implementation.unsupported(spec)
    if refusal is not None:
        raise backends.BackendUnavailableError(f"backend {backend!r}: {refusal}")
    return implementation.forward(
        student_logits, teacher_logits, target, class_weight, spec, student_grad, teacher_grad
    )


def _distillation_sums_fake(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    student_grad: bool,
    teacher_grad: bool,
    backend: str,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    spec = LossSpec.from_options(options)
    terms = len(spec.terms)
    compute_dtype = torch.promote_types(student_logits.dtype, torch.float32)
    shapes = backends.get(backend).saved_shapes(
        student_logits, teacher_logits, target, spec, student_grad, teacher_grad
    )
    return (
        student_logits.new_empty(terms, dtype=torch.float64),
        student_logits.new_empty(terms, dtype=torch.float64),
        student_logits.new_empty((), dtype=torch.int64),
        student_logits.new_empty((2, *target.shape) if spec.maps else 0, dtype=compute_dtype),
        [student_logits.new_empty(shape, dtype=dtype) for shape, dtype in shapes],
    )


def _distillation_sums_backward_impl(
    grad_numerators: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    saved: list[Tensor],
    *,
    student_grad: bool,
    teacher_grad: bool,
    backend: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    grads = backends.get(backend).backward(
        grad_numerators,
        student_logits,
        teacher_logits,
        target,
        class_weight,
        saved,
        LossSpec.from_options(options),
        student_grad,
        teacher_grad,
    )
    nothing = grad_numerators.new_empty(0)
    student, teacher = (nothing.clone() if grad is None else grad for grad in grads)
    return student, teacher


def _distillation_sums_backward_fake(
    grad_numerators: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    saved: list[Tensor],
    *,
    student_grad: bool,
    teacher_grad: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    nothing = grad_numerators.new_empty(0)
    student = torch.empty_like(student_logits) if student_grad else nothing.clone()
    if teacher_grad and teacher_logits is not None:
        return student, torch.empty_like(teacher_logits)
    return student, nothing.clone()


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]],
) -> None:
    ctx.options = keyword_only_inputs
    options = dict(keyword_only_inputs)
    student_grad, teacher_grad = options.pop("student_grad"), options.pop("teacher_grad")
    backend = backends.get(options.pop("backend"))
    ctx.reads_inputs = backend.backward_reads_inputs(
        *inputs[:3], LossSpec.from_options(options), student_grad, teacher_grad
    )
    if ctx.reads_inputs:
        ctx.save_for_backward(*inputs, *output[4])
        return
    # What is not saved may be freed, or overwritten, before backward.
    ctx.forms = [None if logits is None else _form(logits) for logits in inputs[:2]]
    ctx.save_for_backward(*output[4])


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _of_form(form: tuple[Any, ...] | None) -> Tensor | None:
    """A tensor of that shape, layout, dtype and device whose memory is never touched."""
    if form is None:
        return None
    shape, stride, dtype, device = form
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _backward(ctx: Any, grad_numerators: Tensor, *unused: object) -> tuple[Tensor | None, ...]:
    _refuse_second_order()
    target, class_weight = None, None
    if ctx.reads_inputs:
        student_logits, teacher_logits, target, class_weight, *saved = ctx.saved_tensors
    else:
        saved = list(ctx.saved_tensors)
        student_logits, teacher_logits = (_of_form(form) for form in ctx.forms)
    student, teacher = torch.ops.heteroakd_fast.distillation_sums_backward(
        grad_numerators,
        student_logits,
        teacher_logits,
        target,
        class_weight,
        saved,
        **ctx.options,
    )
    return (
        student if ctx.options["student_grad"] else None,
        teacher if ctx.options["teacher_grad"] else None,
        None,
        None,
    )


def _valid_count_impl(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return count_valid(target, num_classes, ignore_index)


def _valid_count_fake(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return target.new_empty((), dtype=torch.int64)


_KEY = "CompositeExplicitAutograd"  # one implementation for every device; the backend chooses
_library.impl("distillation_sums", _distillation_sums_impl, _KEY)
_library.impl("distillation_sums_backward", _distillation_sums_backward_impl, _KEY)
_library.impl("valid_count", _valid_count_impl, _KEY)
torch.library.register_fake(
    "heteroakd_fast::distillation_sums", _distillation_sums_fake, lib=_library
)
torch.library.register_fake(
    "heteroakd_fast::distillation_sums_backward", _distillation_sums_backward_fake, lib=_library
)
torch.library.register_fake("heteroakd_fast::valid_count", _valid_count_fake, lib=_library)
torch.library.register_autograd(
    "heteroakd_fast::distillation_sums", _backward, setup_context=_setup_context, lib=_library
)
