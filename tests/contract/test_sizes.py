"""Sizes that no image has: refused by name, or no pixel and so no work."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import TERM_CASES, every_cpu_backend
from torch import Tensor

from heteroakd_fast import Projection, functional
from heteroakd_fast.channelwise import channel_wise_distillation

FAR = 2**26  # sizes whose tables would take a gigabyte


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def without_work(loss: Callable[[], Tensor], *wanted: Tensor) -> None:
    """The loss is 0 and so are its gradients; it takes neither time nor memory."""
    before, start = peak(), time.process_time()
    value = loss()
    grads = torch.autograd.grad(value, wanted) if wanted else ()
    assert time.process_time() - start < 2.0
    assert peak() - before < 256 << 20
    assert float(value.detach()) == 0.0
    for grad, x in zip(grads, wanted, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def empty(*shape: int, of: torch.dtype = torch.uint8) -> Tensor:
    """Without memory, though torch has no strides for it if it were dense."""
    return torch.zeros(1, dtype=of).expand(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.parametrize("resolution", ["label", "logits"])
@pytest.mark.parametrize("case", ["ce", "all"])
@pytest.mark.parametrize("size", [(1, FAR, 0), (1, 0, FAR), (0, FAR, FAR), (0, 2**28, 2**28)])
@every_cpu_backend
def test_no_pixel_is_no_work(
    backend: str, size: tuple[int, int, int], case: str, resolution: str
) -> None:
    options = {**TERM_CASES[case], "resolution": resolution}
    student, teacher = (torch.randn(size[0], 3, 4, 5, requires_grad=True) for _ in range(2))
    learn = [student, teacher] if case == "all" else [student]
    without_work(
        lambda: (
            functional.distillation_loss(
                student, empty(*size), teacher if case == "all" else None, **options
            ).loss
        ),
        *learn,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_no_pixel_is_no_work_in_the_other_losses() -> None:
    student = torch.randn(1, 3, 4, 5, requires_grad=True)
    without_work(
        lambda: channel_wise_distillation(student, empty(1, FAR, 0), torch.randn(1, 3, 2, 2)).loss,
        student,
    )
    # logits without a pixel, too
    for logits in (empty(0, 3, FAR, 4, of=torch.float32), empty(0, 3, 4, FAR, of=torch.float32)):
        target = empty(0, FAR, FAR)
        without_work(lambda x=logits, y=target: functional.cross_entropy(x, y).loss)
        without_work(lambda x=logits, y=target: channel_wise_distillation(x, y, x).loss)


_BEYOND = 2**28 + 1


def _target(size: tuple[int, ...]) -> dict[str, Any]:
    return {"student_logits": torch.randn(size[0], 3, 2, 2), "target": empty(*size)}


TOO_LARGE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "target (1, 2**28 + 1, 1)": (functional.distillation_loss, _target((1, _BEYOND, 1))),
    "target (1, 1, 2**28 + 1)": (functional.distillation_loss, _target((1, 1, _BEYOND))),
    "target (1, 2**40, 0)": (functional.distillation_loss, _target((1, 2**40, 0))),
    "target (0, 2**40, 2**40)": (functional.distillation_loss, _target((0, 2**40, 2**40))),
    "target of cwd": (channel_wise_distillation, _target((0, 2**40, 2**40))),
    "student_logits": (
        functional.distillation_loss,
        {"student_logits": empty(0, 3, 2**40, 2**40, of=torch.float32), "target": empty(0, 4, 4)},
    ),
    "teacher_logits": (
        functional.distillation_loss,
        {**_target((1, 4, 4)), "teacher_logits": empty(1, 3, 1, _BEYOND, of=torch.float32)},
    ),
    "student_logits.features": (
        functional.distillation_loss,
        {
            "student_logits": Projection(
                empty(1, 7, 1, _BEYOND, of=torch.float32), torch.randn(3, 7)
            ),
            "target": empty(1, 1, _BEYOND),
        },
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_refuses_sizes_that_no_image_has(case: str) -> None:
    loss, arguments = TOO_LARGE[case]
    arguments = {"teacher_logits": None, **arguments}
    if loss is channel_wise_distillation:
        arguments["teacher_logits"] = arguments["student_logits"]
    name = re.escape(case.split()[0])
    with pytest.raises(ValueError, match=rf"^{name}: got shape .*expected sizes up to 268435456"):
        loss(**arguments)


def test_the_shape_is_in_the_message() -> None:
    loss, arguments = TOO_LARGE["target (1, 2**40, 0)"]
    with pytest.raises(ValueError, match=re.escape("(1, 1099511627776, 0)")):
        loss(teacher_logits=None, **arguments)
