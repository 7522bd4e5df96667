"""Which code computes a pass: the registry of backends and the choice between them.

A backend is chosen per call: the `backend=` argument, else the innermost `use_backend(...)` block,
else the environment variable `HETEROAKD_BACKEND`, else the first in the order for the tensors'
device and the kind of call that can run it. `reference` can always run. A backend asked for by name
never falls back silently: it runs or says why not.

Adding a backend: a module here with a class that has the methods of `Backend`, and one line in
`_LOADERS` and `CANDIDATES`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from .._environment import text
from ..spec import LossSpec, choices_of, constant_while_tracing, groups_of

__all__ = [
    "AUTO",
    "CANDIDATES",
    "Backend",
    "BackendUnavailableError",
    "Call",
    "ExtensionMissingWarning",
    "Sums",
    "available",
    "explain",
    "get",
    "names",
    "order",
    "projects",
    "select",
    "use_backend",
    "wanted",
]

AUTO: Final = "auto"

#: Compiled backends by type of device; `reference` stands behind each without being named.
CANDIDATES: Final[dict[str, tuple[str, ...]]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
    "xpu": ("triton",),
}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why and what to do."""


class ExtensionMissingWarning(UserWarning):
    """CPU tensors go to the backend `reference` because the compiled extension cannot be used."""


class Call(NamedTuple):
    """One call of an operator: its tensors in the operator's order, and its options.

    A side without weight is logits [B, C, h, w], any strides; with a weight it is the features
    [B, D, h, w] of a 1x1 projection (`Projection`).
    """

    student: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    target: Tensor | None
    """[B, H, W]; None in `gradient` where it reads no inputs"""
    class_weight: Tensor | None
    """[C]"""
    pixel_weight: Tensor | None
    """[B, H, W]"""
    spec: LossSpec
    wants: tuple[bool, ...]
    """which of the first six tensors get a gradient"""
    precision: str = "ieee"

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor | None],
        spec: LossSpec,
        wants: Sequence[bool] = (),
        precision: str = "ieee",
    ) -> Call:
        """With these nine tensors."""
        return cls(*tensors, spec, tuple(wants), precision)  # type: ignore[call-arg, arg-type]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Call:
        return Call.of(tensors, self.spec, self.wants, self.precision)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All nine."""
        return self[:9]  # type: ignore[return-value]

    @property
    def labels(self) -> Tensor:
        assert self.target is not None
        return self.target

    @property
    def projected(self) -> bool:
        return self.student_weight is not None

    @property
    def classes(self) -> int:
        return self.student.shape[1] if self.student_weight is None else len(self.student_weight)


class Sums(NamedTuple):
    """What the operator `heteroakd_fast::sums` returns (`ops.py`)."""

    numerators: Tensor
    totals: Tensor
    denominators: Tensor
    counts: Tensor
    maps: Tensor
    saved: list[Tensor]


class Backend(Protocol):
    """Sums of a pass and their gradients."""

    name: str

    def devices(self) -> tuple[str, ...]:
        """Types of the tensors it computes on; empty for all."""

    def unavailable(self) -> str | None:
        """Why nothing runs here and what to install; None when the backend works."""

    def projects(self, structure: tuple[int, ...], classes: int, float64: bool) -> bool:
        """Whether it computes projected calls of this structure (`LossSpec`), the logits never
        stored. float64: whether a tensor of the sides is."""

    def sums(self, call: Call) -> Sums:
        """Sums of one pass, and what `gradient` will need. The target is not empty."""

    def reads_inputs(self, call: Call) -> bool:
        """Whether `gradient` reads the tensors of the call again; may look at shapes and dtypes.
        If not, they are not kept: `gradient` then gets logits of the right form only, and None for
        the rest."""

    def gradient(self, call: Call, grad_totals: Tensor, saved: list[Tensor]) -> list[Tensor | None]:
        """Gradients of the first six tensors in their dtypes, rounded once; None where not asked
        for."""

    def saved_shapes(self, call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each saved tensor, for tracing without data."""

    def predict(
        self, logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
    ) -> Tensor:
        """Class of the largest upsampled logit, [B, *size], uint8 or int64; not empty."""

    def confusion_matrix(
        self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        """Counts of (label, prediction), int64 [C, C], and the labels' report (`labels.py`), of
        which the place may be missing. The target is not empty."""


# Modules are imported when first asked about: importing the package must not need any of them.
_LOADERS: Final[dict[str, tuple[str, str]]] = {
    "reference": ("reference", "BACKEND"),
    "cpu": ("compiled", "CPU"),
    "triton": ("triton", "BACKEND"),
    "cuda": ("compiled", "CUDA"),
}

_requested: ContextVar[str | None] = ContextVar("heteroakd_fast.backend", default=None)


def names() -> tuple[str, ...]:
    """Every known backend, `reference` first."""
    return tuple(_LOADERS)


@cache
def get(name: str) -> Backend:
    """The backend of that name, usable or not."""
    if name not in _LOADERS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(_LOADERS)}")
    module, attribute = _LOADERS[name]
    backend: Backend = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return backend


def available() -> dict[str, str | None]:
    """Every backend by name, with None where it works and else the reason why it does not."""
    return {name: get(name).unavailable() for name in names()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the block on one backend: `with use_backend("reference"): ...`.

    The setting belongs to the context (`contextvars`), hence to the thread or task that entered the
    block. An explicit `backend=` still wins.

    Raises:
        ValueError: `name` is not a backend or "auto".
    """
    _check_name(name, "name")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def _check_name(name: str, where: str) -> None:
    if name != AUTO and name not in _LOADERS:
        raise ValueError(f"{where}: got {name!r}, expected one of {', '.join((AUTO, *_LOADERS))}")


@constant_while_tracing
def select(requested: str | None, structure: tuple[int, ...], device_type: str) -> str:
    """The backend's name for this call.

    structure: of the `LossSpec`; nothing else of it is known while a graph is traced.

    Warns:
        ExtensionMissingWarning: at the first call that gets `reference`, without naming it, because
            the compiled extension cannot be used on a CPU.

    Raises:
        ValueError: the name asked for does not exist.
        BackendUnavailableError: the one asked for cannot run this call; says why.
    """
    chosen = _choose(requested, structure, device_type)
    if chosen == "reference" and device_type == "cpu" and wanted(requested) == AUTO:
        _warn_without_extension()
    return chosen


def wanted(requested: str | None = None) -> str:
    """Return the backend that is asked for: by the argument, by `use_backend` or by
    HETEROAKD_BACKEND, else "auto".

    Raises:
        ValueError: there is none of that name.
    """
    name, where = requested, "backend"
    if name is None:
        name, where = _requested.get(), "use_backend"
    if name is None:
        name, where = text("HETEROAKD_BACKEND") or AUTO, "HETEROAKD_BACKEND"
    _check_name(name, where)
    return name


def _choose(requested: str | None, structure: tuple[int, ...], device_type: str) -> str:
    name = wanted(requested)
    if name != AUTO:
        reason = _refusal(name, device_type)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend={name!r} is not available: {reason} `python -m heteroakd_fast.info` "
                "shows every backend; 'reference' always works."
            )
        return name
    for candidate in order(device_type, structure)[0]:
        if _refusal(candidate, device_type) is None:
            return candidate
    return "reference"


@constant_while_tracing
def projects(name: str, structure: tuple[int, ...], classes: int, float64: bool) -> bool:
    """`Backend.projects` of that backend."""
    return get(name).projects(structure, classes, float64)


def _refusal(name: str, device_type: str) -> str | None:
    devices = get(name).devices()
    reason = get(name).unavailable()
    if reason is None and devices and device_type not in devices:
        return f"it computes on {' and '.join(devices)} tensors, these are on {device_type}."
    return reason


@cache
def _warn_without_extension() -> None:
    reason = get("cpu").unavailable()
    warnings.warn(
        "backend: 'auto' takes 'reference', plain PyTorch, for tensors on the CPU, because the "
        f"compiled kernels, which are many times faster, cannot be used: {reason} To go without "
        "them and without this warning, set HETEROAKD_BACKEND=reference or pass "
        "backend='reference'.",
        ExtensionMissingWarning,
        stacklevel=2,
    )


def order(device_type: str, structure: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """In which order `auto` tries the compiled backends for such a call, and why.

    Never a measurement made while training: every rank and every run gets the same backend, hence
    the same bits. No GPU has run both; the order is what their machine code suggests.
    """
    candidates = CANDIDATES.get(device_type, ())
    if len(candidates) < 2:
        return candidates, "" if candidates else "none is compiled for it"
    if _is_usual(structure):
        return candidates, (
            "not measured; on paper the kernels of cuda need fewer instructions for these terms, "
            "and nothing is compiled at the first call"
        )
    return candidates[::-1], (
        "not measured; on paper Triton's kernels, compiled for exactly this call, need fewer "
        "instructions than the one kernel of cuda that serves all calls but the usual"
    )


def _is_usual(structure: tuple[int, ...]) -> bool:
    """Whether the terms are ce, forward kd and hetero of softmax-kl with mix="probs" only, and ce
    and kd, where there are both, have one denominator."""
    options, groups = choices_of(structure), groups_of(structure)
    hetero = options.get("hetero", {"preset": "softmax-kl", "mix": "probs"})
    kd = options.get("kd", {"divergence": "forward", "standardize": False})
    return (
        kd["divergence"] == "forward"
        and not kd["standardize"]
        and hetero["preset"] == "softmax-kl"
        and hetero["mix"] == "probs"
        and "feature" not in options
        and ("kd" not in groups or groups.get("ce", groups["kd"]) == groups["kd"])
    )


def explain(requested: str | None, structure: tuple[int, ...], device_type: str) -> str:
    """Which backend such a call gets, and why, in a sentence."""
    chosen = _choose(requested, structure, device_type)
    if wanted(requested) != AUTO:
        return f"{chosen}: asked for by name"
    tried, reason = order(device_type, structure)
    passed = tried[: tried.index(chosen)] if chosen in tried else tried
    cannot = [f"{name} cannot run: {_refusal(name, device_type)}" for name in passed]
    tries = f"{chosen} (tried in order: {', '.join((*tried, 'reference'))})"
    return "; ".join(part for part in (tries, *cannot, reason) if part)
