"""Backend `cuda`: the compiled kernels of `csrc/cuda`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from .. import _extension
from ..spec import LossSpec
from ._gpu import GpuBackend
from ._parts import Part, rows_of_chunk, split

__all__ = ["BACKEND", "CudaBackend"]

# The numbers of csrc/cuda/pass.h.
_KD_DIVERGENCES: Final = {"forward": 1, "reverse": 2, "js": 3}
_MIXES: Final = {"probs": 0, "logits": 1, "teacher": 2}


class CudaBackend(GpuBackend):
    """See `GpuBackend`; docs/cuda.md."""

    name = "cuda"

    def __init__(
        self,
        operators: Callable[[], Any] = _extension.operators,
        device_types: tuple[str, ...] = ("cuda",),
    ) -> None:
        """Tests bring operators that run the same kernels elsewhere."""
        self.operators = operators
        self._device_types = device_types

    def devices(self) -> tuple[str, ...]:
        return self._device_types

    def unavailable(self) -> str | None:
        if "cuda" not in self._device_types:
            return None
        return _extension.cuda_unavailable()

    def kernel(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        spec: LossSpec,
    ) -> dict[str, str]:
        """Name of the kernel that computes each term (and `maps`) of such a call."""
        chosen: dict[str, str] = {}
        for part in split(student_logits, teacher_logits, spec):
            if part is None:
                continue
            name: str = self.operators().cuda_kernel(
                part.logits,
                part.teacher,
                target,
                *part.places(),
                *_formulas(part),
                spec.align_corners,
                spec.label_smoothing,
                part.maps,
            )
            chosen |= dict.fromkeys(part.terms.values() or ("maps",), name)
        return chosen

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
        saved: Tensor = self.operators().cuda_forward(
            part.logits,
            part.teacher,
            target,
            class_weight,
            numerators,
            denominators,
            report,
            maps,
            *part.places(),
            *_options(part),
            compute_grad,
        )
        return saved if compute_grad and not part.on_label_grid(target) else None

    def _saved_shape(self, part: Part, target: Tensor) -> tuple[int, ...]:
        """Of each term, image and class one row more than cells in every chunk of rows, because the
        last cell's bottom belongs to the next chunk's first logits."""
        batch, classes, height, width = part.logits.shape
        rows = rows_of_chunk(
            (height, width), (target.shape[1], target.shape[2]), part.spec.align_corners
        )
        return len(part.terms), batch, classes, -(-(height + 1) // rows), rows + 1, width

    def _backward(
        self, part: Part, target: Tensor, class_weight: Tensor | None, grad_numerators: Tensor
    ) -> Tensor:
        gradient: Tensor = self.operators().cuda_backward(
            part.logits,
            part.teacher,
            target,
            class_weight,
            grad_numerators,
            *part.places(),
            *_options(part),
        )
        return gradient

    def _combine(self, part: Part, saved: Tensor, grad_numerators: Tensor) -> Tensor:
        places = [part.spec.terms.index(name) for name in part.terms.values()]
        places += [-1] * (4 - len(places))
        gradient: Tensor = self.operators().cuda_combine(
            saved, grad_numerators, *places, part.logits
        )
        return gradient


def _formulas(part: Part) -> tuple[int, int, int]:
    """kd_divergence, hetero, mix."""
    spec = part.spec
    hetero = 1
    if spec.preset == "paper":
        hetero = 2 if spec.weight_axis == "class" else 3
    return _KD_DIVERGENCES[spec.kd_divergence], hetero, _MIXES[spec.mix]


def _options(part: Part) -> tuple[Any, ...]:
    """As the operators take them, from kd_divergence to label_smoothing."""
    spec = part.spec
    return (
        *_formulas(part),
        spec.evaluation == "discrepancy",
        spec.kd_beta,
        spec.temperature,
        spec.tau,
        spec.ignore_index,
        spec.align_corners,
        spec.label_smoothing,
    )


BACKEND = CudaBackend()
