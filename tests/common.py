"""Inputs, the oracle, and the accuracy rules, for every test of a loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heteroakd_fast import backends, functional
from heteroakd_fast.spec import LossSpec, plan
from heteroakd_fast.terms import FLAT

DTYPES_16 = (torch.bfloat16, torch.float16)
# Those that run on this machine; `test_backends.py` says which ones must.
BACKENDS = tuple(name for name, reason in backends.available().items() if reason is None)

# Every preset and variant of the heterogeneous term, as arguments of `distillation_loss`.
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax-kl": {},
    "softmax-kl-T": {"temperature": 2.0, "tau": 0.7},
    "mix-logits": {"mix": "logits", "temperature": 1.7},
    "mix-teacher": {"mix": "teacher", "temperature": 2.0, "tau": 0.7},
    "no-evaluation": {"evaluation": "none"},
    "paper": {"preset": "paper", "temperature": 1.7},
    "paper-mix-teacher": {"preset": "paper", "mix": "teacher", "temperature": 1.7},
    "paper-no-evaluation": {"preset": "paper", "evaluation": "none"},
    "paper-space": {"preset": "paper", "weight_axis": "space", "temperature": 2.0},
    "paper-space-mix-teacher": {
        "preset": "paper",
        "mix": "teacher",
        "weight_axis": "space",
        "temperature": 2.0,
    },
    "paper-space-no-evaluation": {
        "preset": "paper",
        "weight_axis": "space",
        "evaluation": "none",
    },
}
# Every term alone, and some together.
TERM_CASES: dict[str, dict[str, Any]] = {
    "ce": {},
    "ce-smoothed": {"label_smoothing": 0.1},
    "teacher_ce": {"ce_weight": 0.0, "teacher_ce_weight": 0.7},
    "kd": {"ce_weight": 0.0, "kd_weight": 0.3, "temperature": 2.0},
    "kd-reverse": {"ce_weight": 0.0, "kd_weight": 0.3, "kd_divergence": "reverse"},
    "kd-js": {"ce_weight": 0.0, "kd_weight": 1.3, "kd_divergence": "js", "kd_beta": 0.3},
    "feature": {"ce_weight": 0.0, "feature_weight": 1.1},
    **{
        f"hetero-{name}": {"ce_weight": 0.0, "hetero_weight": 1.5, **options}
        for name, options in VARIANTS.items()
    },
    "all": {
        "ce_weight": 0.9,
        "teacher_ce_weight": 0.8,
        "kd_weight": 0.7,
        "hetero_weight": 0.6,
        "feature_weight": 0.5,
        "temperature": 1.5,
    },
}


class Batch(NamedTuple):
    student: Tensor
    teacher: Tensor
    target: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of every loss."""
        return self.student, self.target, self.teacher


def make_batch(
    batch: int = 2,
    classes: int = 5,
    grid: tuple[int, int] = (4, 6),
    teacher_grid: tuple[int, int] | None = (8, 3),
    size: tuple[int, int] = (13, 17),
    dtype: torch.dtype = torch.float64,
    scale: float = 3.0,
    ignored: float = 0.2,
    ignore_index: int = 255,
    label_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> Batch:
    """Logits of a plausible spread, and labels of which a part is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def logits(height: int, width: int) -> Tensor:
        z = torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
        return (scale * z).to(dtype)

    target = torch.randint(0, classes, (batch, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = ignore_index
    return Batch(logits(*grid), logits(*(teacher_grid or grid)), target.to(label_dtype))


class Result(NamedTuple):
    loss: Tensor
    terms: dict[str, float]
    student_grad: Tensor | None
    teacher_grad: Tensor | None
    maps: dict[str, Tensor] | None


def evaluate(
    batch: Batch,
    grad_output: float = 1.0,
    student_requires_grad: bool = True,
    **options: Any,
) -> Result:
    """Loss, terms and gradients of one call."""
    student = batch.student.detach().requires_grad_(student_requires_grad)
    teacher = batch.teacher.detach()
    if options.get("teacher_ce_weight"):
        teacher = teacher.requires_grad_()
    output = functional.distillation_loss(student, batch.target, teacher, **options)
    wanted = [t for t in (student, teacher) if t.requires_grad]
    grads = iter(
        torch.autograd.grad(
            output.loss, wanted, torch.as_tensor(grad_output).to(output.loss), allow_unused=True
        )
    )
    return Result(
        output.loss.detach(),
        {name: float(value) for name, value in output.terms.items()},
        next(grads) if student.requires_grad else None,
        next(grads) if teacher.requires_grad else None,
        output.maps,
    )


def truth(batch: Batch, grad_output: float = 1.0, **options: Any) -> Result:
    """The oracle in float64, on exactly the values that the call under test reads."""
    double = Batch(batch.student.double(), batch.teacher.double(), batch.target)
    if options.get("class_weight") is not None:
        options["class_weight"] = options["class_weight"].double()
    return evaluate(double, grad_output, **{**options, "backend": "reference"})


def eager_cross_entropy(
    logits: Tensor, target: Tensor, align_corners: bool = False, **options: Any
) -> Tensor:
    """Cross entropy as a researcher writes it."""
    size = (target.shape[1], target.shape[2])
    z = F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(z, target.long(), **{"ignore_index": 255, **options})


def spec_of(**options: Any) -> LossSpec:
    """What `distillation_loss` asks of a backend with these options, in its one pass."""
    flat = {name: value for name, value in options.items() if name in FLAT}
    maps = bool(options.get("return_maps"))
    shape, numbers = functional.encode_flat(flat, maps)
    (one,) = plan(shape, options.get("class_weight") is not None, maps, ())
    head = (options.get("ignore_index", 255), int(options.get("align_corners", False)), int(maps))
    return LossSpec((*head, *one.structure), numbers)


def require(backend: str, device: str = "cpu", **options: Any) -> None:
    """Skips where a backend does not (yet) compute this call; `reference` is never skipped."""
    spec = spec_of(**{name: value for name, value in options.items() if name in FLAT})
    try:
        backends.select(backend, spec.structure, device)
    except backends.BackendUnavailableError as error:
        if backend == "reference":
            raise
        pytest.skip(str(error))


def assert_accurate(got: Tensor, expected: Tensor, name: str = "gradient") -> None:
    """The contract's accuracy: 1e-5 of the largest gradient for float32 (1e-12 for float64),
    and for 16 bits one rounding of the output on top. A zero gradient never passes."""
    expected = expected.double()
    signal = expected.abs().max().item()
    assert signal > 0, f"{name}: the expected {name} is zero, the test would prove nothing"
    error = (got.double() - expected).abs()
    dtype = got.dtype
    if dtype in DTYPES_16:
        info = torch.finfo(dtype)
        allowed = info.eps / 2 * expected.abs() * 1.001 + 1e-5 * signal + info.smallest_normal
    else:
        allowed = torch.full_like(expected, (1e-12 if dtype == torch.float64 else 1e-5) * signal)
    excess = (error - allowed).max().item()
    # `not >` would let NaN through, `<=` does not
    assert excess <= 0, (
        f"{name} ({dtype}): error {error.max().item():.3e} of a signal of {signal:.3e}"
    )


def assert_matches(got: Result, expected: Result) -> None:
    """Loss, every term and every gradient within the contract."""
    relative = 1e-12 if got.loss.dtype == torch.float64 else 2e-6
    assert got.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        assert got.terms[name] == pytest.approx(value, rel=relative, abs=relative), name
    assert float(got.loss) == pytest.approx(float(expected.loss), rel=relative, abs=relative)
    for name in ("student_grad", "teacher_grad"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if theirs is not None and theirs.abs().max() > 0:
            assert_accurate(ours, theirs, name)
