"""Backend `triton`: the kernels of `kernels/`, installed as `heteroakd_fast.kernels`."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from ._gpu import GpuBackend
from ._parts import Part

if TYPE_CHECKING:
    from heteroakd_fast.kernels import launch

__all__ = ["BACKEND"]

_OLDEST: Final = (3, 6)


class TritonBackend(GpuBackend):
    """See `GpuBackend`; docs/triton.md."""

    name = "triton"

    def devices(self) -> tuple[str, ...]:
        return ("cuda", "xpu", "cpu") if _interprets() else ("cuda", "xpu")

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (`pip install 'triton>=3.6'`)."
        if not (_interprets() or torch.cuda.is_available() or torch.xpu.is_available()):
            return "no GPU is visible to torch; its kernels run on the GPUs that Triton reaches."
        import triton

        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < _OLDEST:
            return f"Triton {triton.__version__} is too old (`pip install 'triton>=3.6'`)."
        return None

    def _forward(
        self,
        part: Part,
        target: Tensor,
        class_weight: Tensor | None,
        numerators: Tensor,
        denominators: Tensor,
        report: Tensor | None,
        maps: Tensor | None,
        compute_grad: bool,
    ) -> Tensor | None:
        from heteroakd_fast.kernels import launch

        saved: Tensor | None = launch.forward(
            _run(part), target, class_weight, numerators, denominators, report, maps, compute_grad
        )
        return saved

    def _saved_shape(self, part: Part, target: Tensor) -> tuple[int, ...]:
        from heteroakd_fast.kernels import launch

        shape: tuple[int, ...] = launch.patch_shape(_run(part), target)
        return shape

    def _backward(
        self, part: Part, target: Tensor, class_weight: Tensor | None, grad_numerators: Tensor
    ) -> Tensor:
        from heteroakd_fast.kernels import launch

        gradient: Tensor = launch.backward(_run(part), target, class_weight, grad_numerators, None)
        return gradient

    def _combine(self, part: Part, saved: Tensor, grad_numerators: Tensor) -> Tensor:
        from heteroakd_fast.kernels import launch

        gradient: Tensor = launch.backward(_run(part), None, None, grad_numerators, saved)
        return gradient


def _interprets() -> bool:
    """Whether Triton is told to run kernels in Python: how the tests run them without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _run(part: Part) -> launch.Run:
    from heteroakd_fast.kernels import launch

    terms = tuple(part.terms)
    return launch.Run(part.logits, part.teacher, terms, part.slots(), part.places(), part.spec)


BACKEND = TritonBackend()
