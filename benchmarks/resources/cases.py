"""The cases of the Triton kernels: a name, and launches of the package itself.

To add one, write a function that performs launches (of any module of `kernels/`) and give it a name
in `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from heteroakd_fast.spec import LossSpec


def distill(
    shape: tuple[int, int, int, int],
    labels: tuple[int, int],
    terms: tuple[str, ...] = ("ce", "hetero"),
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
    teacher: tuple[int, int] | None = None,
    channels_last: bool = False,
    **options: Any,
) -> None:
    """The launches of one training step (or one evaluation) of the loss."""
    from heteroakd_fast.kernels import launch

    from heteroakd_fast.backends import triton as backend
    from heteroakd_fast.backends._parts import split

    spec = LossSpec(terms=terms, **options)
    batch, classes = shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student = torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout)
    other = (batch, classes, *(teacher or shape[2:]))
    target = torch.empty(batch, *labels, dtype=torch.int64, device="cuda")
    part, _ = split(student, torch.empty(other, dtype=dtype, device="cuda"), spec)
    assert part is not None
    run = backend._run(part)
    sums = torch.empty(len(terms), dtype=torch.float64, device="cuda")
    report = torch.empty(2, dtype=torch.int64, device="cuda")
    maps = torch.empty(2, batch, *labels, device="cuda") if spec.maps else None
    saved = launch.forward(run, target, None, sums, torch.empty_like(sums), report, maps, grad)
    if grad:
        launch.backward(run, target, None, sums, saved)


_S4 = partial(distill, (8, 19, 128, 256), (512, 1024))
_S8 = partial(distill, (8, 19, 64, 128), (512, 1024))
_ALL = ("ce", "kd", "hetero", "feature")

#: name -> (what it is, the launches)
CASES: Final[dict[str, tuple[str, Callable[[], None]]]] = {
    "s4": ("ce + hetero, T 2, B8 C19 512x1024, stride 4", partial(_S4, temperature=2.0)),
    "s8": ("ce + hetero, T 2, B8 C19 512x1024, stride 8", partial(_S8, temperature=2.0)),
    "c150": (
        "ce + hetero, T 2, B8 C150 512x512, stride 4",
        partial(distill, (8, 150, 128, 128), (512, 512), temperature=2.0),
    ),
    "c21": (
        "ce + hetero, T 2, B8 C21 512x512, stride 8",
        partial(distill, (8, 21, 64, 64), (512, 512), temperature=2.0),
    ),
    "c171": (
        "ce + hetero, T 2, B8 C171 512x512, stride 8",
        partial(distill, (8, 171, 64, 64), (512, 512), temperature=2.0),
    ),
    "bf16": ("as s4, bf16 logits", partial(_S4, temperature=2.0, dtype=torch.bfloat16)),
    "t1.7": ("as s4, T 1.7", partial(_S4, temperature=1.7)),
    "mix-logits": ("as s4, mix logits", partial(_S4, temperature=2.0, mix="logits")),
    "paper": ("as s4, preset paper", partial(_S4, temperature=2.0, preset="paper", mix="logits")),
    "paper-space": (
        "as s4, preset paper, weight_axis space",
        partial(_S4, temperature=2.0, preset="paper", mix="logits", weight_axis="space"),
    ),
    "kd-js": (
        "kd js, T 2, shape of s4",
        partial(_S4, ("kd",), temperature=2.0, kd_divergence="js"),
    ),
    "kd-reverse": (
        "kd reverse, T 2, shape of s4",
        partial(_S4, ("kd",), temperature=2.0, kd_divergence="reverse"),
    ),
    "ce": ("ce, shape of s4", partial(_S4, ("ce",))),
    "default": (
        "ce + kd + hetero, T 2, shape of s4",
        partial(_S4, ("ce", "kd", "hetero"), temperature=2.0),
    ),
    "all": ("ce + kd + hetero + feature, T 2, shape of s4", partial(_S4, _ALL, temperature=2.0)),
    "teacher-s4": (
        "ce + hetero, T 2, B8 C19 512x1024, student stride 8, teacher stride 4",
        partial(_S8, temperature=2.0, teacher=(128, 256)),
    ),
    "stride1": (
        "ce + hetero, T 2, B8 C19 512x1024, logits on the label grid",
        partial(distill, (8, 19, 512, 1024), (512, 1024), temperature=2.0),
    ),
    "align": (
        "ce + hetero, T 2, B8 C19 769x769 from 97x97, align_corners",
        partial(distill, (8, 19, 97, 97), (769, 769), temperature=2.0, align_corners=True),
    ),
    "no-grad": ("as s4, forward without gradients", partial(_S4, temperature=2.0, grad=False)),
    "float64": ("as s4, float64", partial(_S4, temperature=2.0, dtype=torch.float64)),
    "channels-last": (
        "as s4, channels_last logits",
        partial(_S4, temperature=2.0, channels_last=True),
    ),
}

#: The method's own exponentials and logarithms per pixel and class, whatever the code: one
#: exponential per model (another at a temperature other than 1, 2, 4, where both are needed), and
#: what a term adds (the counts of floor.py): a logarithm for the mixture of hetero or js; an
#: exponential for that of logits; for the paper's preset three softplus and two weights.
PAPER_FLOOR: Final[dict[str, float]] = {
    "ce": 1,
    "t1.7": 5,
    "mix-logits": 3,
    "paper": 9,
    "paper-space": 10,
    "kd-js": 3,
    "kd-reverse": 2,
}
USUAL_FLOOR: Final = 3.0

#: Other architectures, and careful twins, of a quick run.
QUICK_CASES: Final = ("s4", "stride1")
QUICK_CAREFUL: Final = ("s4",)
