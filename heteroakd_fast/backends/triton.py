"""Backend `triton`: the kernels of `kernels/`, installed as `heteroakd_fast.kernels`.

As in the compiled backends, the gradient of each group of terms is kept at the logits' (low)
resolution, and where the logits that learn have the label grid, nothing is kept and backward runs
the pass again. Nothing waits for the GPU: labels out of range are a device-side assertion.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Final

import torch
from torch import Tensor

from ..labels import REPORT, check_label_report
from ..spec import choices_of
from . import Call, Sums
from .compiled import compute_dtype, slots_of_passes

__all__ = ["BACKEND"]

_OLDEST: Final = (3, 6)
_MOST_PROJECTED_CLASSES: Final = 256
_PROJECTED_TERMS: Final = {"ce", "teacher_ce", "kd", "hetero", "feature"}


class TritonBackend:
    name = "triton"

    def devices(self) -> tuple[str, ...]:
        return ("cuda", "xpu", "cpu") if _interprets() else ("cuda", "xpu")

    def unavailable(self) -> str | None:
        return _unavailable(_interprets())

    def projects(self, structure: tuple[int, ...], classes: int, float64: bool) -> bool:
        choices = choices_of(structure)
        return (
            classes <= _MOST_PROJECTED_CLASSES
            and not float64
            and choices.keys() <= _PROJECTED_TERMS
            and choices.get("hetero", {}).get("preset") != "paper"
            and choices.get("kd", {}).get("divergence") in (None, "forward")
            and not choices.get("kd", {}).get("standardize")
            and not structure[2]  # maps
            and structure[0] == structure[3]  # no unlabelled pixels
        )

    def sums(self, call: Call) -> Sums:
        from heteroakd_fast.kernels import launch, projection_launch

        options, target = call.spec.options(), call.labels
        numerators = call.student.new_zeros(len(options.asked), dtype=torch.float64)
        denominators = numerators.new_zeros(options.group_count)
        report = call.student.new_empty(REPORT, dtype=torch.int64)
        maps = call.student.new_empty(
            (call.spec.planes, *target.shape) if call.spec.planes else 0,
            dtype=compute_dtype(call.student),
        )
        saved = []
        if call.projected:
            projection_launch.forward(call, numerators, denominators, report)
        else:
            reports = iter((report, None))  # whichever pass is first counts the labels
            for one, wanted in zip(launch.passes_of(call), call.wants[::3], strict=True):
                if one is not None:
                    gradients = launch.forward(
                        one,
                        target,
                        call.class_weight,
                        numerators,
                        denominators,
                        next(reports),
                        maps if one.written else None,
                        wanted,
                    )
                    saved += [] if gradients is None else [gradients]
        check_label_report(
            report,
            target,
            call.pixel_weight,
            call.classes,
            options.ignore_index,
            options.unlabelled_index,
        )
        totals = launch.totals_of(numerators, options)
        return Sums(numerators, totals, denominators, report[:2], maps, saved)

    def reads_inputs(self, call: Call) -> bool:
        return call.projected or any(
            wanted and slots and not keeps
            for wanted, slots, keeps in zip(
                call.wants[::3], slots_of_passes(call.spec.structure), _keeps(call), strict=True
            )
        )

    def gradient(self, call: Call, grad_totals: Tensor, saved: list[Tensor]) -> list[Tensor | None]:
        from heteroakd_fast.kernels import launch, projection_launch

        grad_totals = grad_totals.contiguous()
        if call.projected:
            projected: list[Tensor | None] = projection_launch.backward(call, grad_totals)
            return projected
        remaining = iter(saved)
        grads: list[Tensor | None] = [None] * 6
        for at, one, logits, keeps in zip(
            (0, 3), launch.passes_of(call), (call.student, call.teacher), _keeps(call), strict=True
        ):
            if not call.wants[at] or logits is None:
                continue
            if one is None or not one.slots():  # no term of this call reads them
                grads[at] = torch.zeros_like(logits)
                continue
            kept = next(remaining) if keeps else None
            grads[at] = launch.backward(one, call.target, call.class_weight, grad_totals, kept)
        return grads

    def saved_shapes(self, call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
        from heteroakd_fast.kernels import launch

        if call.projected:
            return []
        align_corners = call.spec.align_corners
        return [
            (
                launch.patch_shape(logits, slots, call.labels, align_corners),
                compute_dtype(logits),
            )
            for logits, slots, keeps in zip(
                (call.student, call.teacher),
                slots_of_passes(call.spec.structure),
                _keeps(call),
                strict=True,
            )
            if keeps and logits is not None
        ]

    def predict(
        self, logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
    ) -> Tensor:
        from heteroakd_fast.kernels import predict

        prediction: Tensor = predict.predict(logits, size, align_corners, dtype)
        return prediction

    def confusion_matrix(
        self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        from heteroakd_fast.kernels import predict

        matrix, report = predict.confusion_matrix(logits, target, ignore_index, align_corners)
        return matrix, report


def _keeps(call: Call) -> tuple[bool, ...]:
    """Whether the student's pass and the teacher's keep gradients."""
    size = None if call.target is None else call.target.shape[1:]
    return tuple(
        bool(wanted and slots and logits is not None and logits.shape[2:] != size)
        for logits, slots, wanted in zip(
            (call.student, call.teacher),
            slots_of_passes(call.spec.structure),
            call.wants[::3],
            strict=True,
        )
    )


@cache
def _unavailable(interprets: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install 'triton>=3.6'`)."
    if not (interprets or torch.cuda.is_available() or torch.xpu.is_available()):
        return "no GPU is visible to torch; its kernels run on the GPUs that Triton reaches."
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"Triton {triton.__version__} is too old (`pip install 'triton>=3.6'`)."
    return None


def _interprets() -> bool:
    """Whether Triton is told to run kernels in Python: how the tests run them without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


BACKEND = TritonBackend()
