"""Which code computes a pass: the registry of backends and the choice between them.

A backend is chosen per call: the `backend=` argument, else the innermost `use_backend(...)`
block, else the environment variable `HETEROAKD_BACKEND` (read at import), else the first in the
order for the tensors' device and the kind of call (`order.py`) that can run it. `reference` can
always run. A backend asked for by name never falls back silently: it runs or says why not.

Adding a backend: a module here with a class that has the methods of `Backend`, and one line in
`_LOADERS` and `order.CANDIDATES`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from ..spec import LossSpec
from .order import CANDIDATES, kind_of
from .order import order as _order

__all__ = [
    "AUTO",
    "CANDIDATES",
    "Backend",
    "BackendUnavailableError",
    "EagerBackend",
    "ExtensionMissingWarning",
    "ForwardResult",
    "available",
    "explain",
    "get",
    "names",
    "select",
    "use_backend",
]

AUTO: Final = "auto"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why and what to do."""


class ExtensionMissingWarning(UserWarning):
    """CPU tensors go to the backend `reference` because the compiled extension cannot be used."""


class ForwardResult(NamedTuple):
    """What `distillation_sums` returns; see the operator in `ops.py` for shapes."""

    numerators: Tensor
    denominators: Tensor
    valid: Tensor
    maps: Tensor
    saved: list[Tensor]


class EagerBackend(Protocol):
    """Sums of a pass and their gradients: what a call outside of traced code needs."""

    name: str

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> ForwardResult:
        """Sums of one pass, and what `backward` will need."""

    def backward_reads_inputs(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> bool:
        """Whether `backward` reads the values of logits, target and class weights again; may look
        at shapes and dtypes. If not, they are not kept: `backward` then gets logits of the right
        form only, and None for the rest."""

    def backward(
        self,
        grad_numerators: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        class_weight: Tensor | None,
        saved: list[Tensor],
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients in the dtype of their logits, rounded once; None where not asked for."""


class Backend(EagerBackend, Protocol):
    """A compiled backend, which may be unavailable. `reference` is not one: traced code gets its
    formulas, and outside it is an `EagerBackend` (`backends/reference.py`)."""

    def devices(self) -> tuple[str, ...]:
        """Types of the tensors it computes on."""

    def unavailable(self) -> str | None:
        """Why nothing runs here and what to install; None when the backend works."""

    def unsupported(self, spec: LossSpec) -> str | None:
        """Why this call cannot run on this backend; None when it can. May depend on
        `spec.structure()` only: while a graph is traced, the numbers are not known."""

    def saved_shapes(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
        student_grad: bool,
        teacher_grad: bool,
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each saved tensor, for tracing without data."""


# Modules are imported when first asked about: importing the package must not need any of them.
_LOADERS: Final[dict[str, str]] = {
    "cpu": "heteroakd_fast.backends.cpu",
    "triton": "heteroakd_fast.backends.triton",
    "cuda": "heteroakd_fast.backends.cuda",
}


@dataclass(eq=False)  # each block's own, whatever the name
class _Request:
    name: str


_requests: list[_Request] = [_Request(os.environ.get("HETEROAKD_BACKEND", AUTO) or AUTO)]


def names() -> tuple[str, ...]:
    """Every known backend, `reference` first."""
    return ("reference", *_LOADERS)


@cache
def get(name: str) -> Backend:
    """The compiled backend of that name, usable or not."""
    if name not in _LOADERS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(_LOADERS)}")
    module = importlib.import_module(_LOADERS[name])
    backend: Backend = module.BACKEND
    return backend


@cache
def _unavailable(name: str) -> str | None:
    return None if name == "reference" else get(name).unavailable()


def available() -> dict[str, str | None]:
    """Every backend by name, with None where it works and else the reason why it does not."""
    return {name: _unavailable(name) for name in names()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the block on one backend: `with use_backend("reference"): ...`.

    The setting belongs to the process, not to the thread: the block entered last and not yet left
    counts. An explicit `backend=` still wins.

    Raises:
        ValueError: `name` is not a backend or "auto".
    """
    _check_name(name, "name")
    request = _Request(name)
    _requests.append(request)
    try:
        yield
    finally:
        _requests.remove(request)  # this one: another thread may have entered a block since


def _check_name(name: str, where: str) -> None:
    if name != AUTO and name not in names():
        raise ValueError(f"{where}: got {name!r}, expected one of {', '.join((AUTO, *names()))}")


def select(requested: str | None, spec: LossSpec, device_type: str) -> str:
    """The backend's name for this call.

    Warns:
        ExtensionMissingWarning: at the first call that gets `reference`, without naming it, because
            the compiled extension cannot be used on a CPU.

    Raises:
        ValueError: the name asked for does not exist.
        BackendUnavailableError: the one asked for cannot run this call; says why.
    """
    name = requested if requested is not None else _requests[-1].name
    _check_name(name, "backend" if requested is not None else "HETEROAKD_BACKEND or use_backend")
    if torch.compiler.is_compiling():
        chosen: str = _choose_while_tracing(name, spec.structure(), device_type)
        return chosen
    return _choose_or_warn(name, spec, device_type)


def _choose_or_warn(name: str, spec: LossSpec, device_type: str) -> str:
    chosen = _choose(name, spec, device_type)
    if name == AUTO and chosen == "reference" and device_type == "cpu":
        _warn_without_extension()
    return chosen


@cache
def _warn_without_extension() -> None:
    reason = _unavailable("cpu")
    if reason is not None:
        warnings.warn(
            "backend: 'auto' takes 'reference', plain PyTorch, for tensors on the CPU, because the "
            f"compiled kernels, which are many times faster, cannot be used: {reason} To go "
            "without them and without this warning, set HETEROAKD_BACKEND=reference or pass "
            "backend='reference'.",
            ExtensionMissingWarning,
            stacklevel=2,
        )


def explain(spec: LossSpec, device_type: str) -> str:
    """Which backend "auto" takes for such a call, and why, in a sentence."""
    wanted = _order(device_type, kind_of(spec))
    chosen = _choose(AUTO, spec, device_type)
    passed = wanted.names[: wanted.names.index(chosen)] if chosen in wanted.names else wanted.names
    cannot = [f"{name} cannot run: {_unavailable(name) or _refusal(name, spec, device_type)}"
              for name in passed]  # fmt: skip
    return "; ".join((f"{chosen} of {' -> '.join((*wanted.names, 'reference'))}", *cannot,
                      wanted.reason))  # fmt: skip


def _choose_while_tracing(name: str, structure: dict[str, Any], device_type: str) -> str:
    """The tracer can hand over plain constants, and must not look inside."""
    return _choose_or_warn(name, LossSpec.from_options(structure), device_type)


# What `torch.compiler.assume_constant_result` does, which would import the whole tracer, and Triton
# with it, in every process that imports this package.
_choose_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(name: str, spec: LossSpec, device_type: str) -> str:
    if name == "reference":
        return name
    if name != AUTO:
        reason = _unavailable(name) or _refusal(name, spec, device_type)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend: {name!r} was asked for and cannot run here: {reason} "
                f"`python -m heteroakd_fast.info` shows every backend; 'reference' always works."
            )
        return name
    for candidate in _order(device_type, kind_of(spec)).names:
        if _unavailable(candidate) is None and _refusal(candidate, spec, device_type) is None:
            return candidate
    return "reference"


def _refusal(name: str, spec: LossSpec, device_type: str) -> str | None:
    devices = get(name).devices()
    if device_type not in devices:
        return f"it computes on {' and '.join(devices)} tensors, these are on {device_type}."
    return get(name).unsupported(spec)
