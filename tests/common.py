"""Inputs, the oracle, and the accuracy rules, for every test of a loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heteroakd_fast import backends, functional
from heteroakd_fast.spec import LossSpec, plan
from heteroakd_fast.terms import (
    CWD,
    DKD,
    FLAT,
    FLAT_DEFAULTS,
    OFA,
    WITHOUT_TEACHER,
    Dice,
    Focal,
    Term,
    Tversky,
    check_flat,
    from_flat,
)

DTYPES_16 = (torch.bfloat16, torch.float16)
# Those that run on this machine; `test_backends.py` says which ones must.
BACKENDS = tuple(name for name, reason in backends.available().items() if reason is None)

#: Instruction sets of the CPU kernels; `test_cpu_kernels.py` says which ones a processor has.
ISAS = ("avx512", "avx2", "portable")
F32 = torch.float32

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
# Every term alone, and some together. Terms that have no keywords are objects. A line here is
# enough for the whole contract: tests that are not for every term name those that they leave out.
TERM_CASES: dict[str, dict[str, Any]] = {
    "ce": {},
    "ce-smoothed": {"label_smoothing": 0.1},
    "teacher_ce": {"ce_weight": 0.0, "teacher_ce_weight": 0.7},
    "kd": {"ce_weight": 0.0, "kd_weight": 0.3, "temperature": 2.0},
    "kd-reverse": {"ce_weight": 0.0, "kd_weight": 0.3, "kd_divergence": "reverse"},
    "kd-js": {"ce_weight": 0.0, "kd_weight": 1.3, "kd_divergence": "js", "kd_beta": 0.3},
    "kd-skew": {"ce_weight": 0.0, "kd_weight": 0.8, "kd_divergence": "skew", "kd_alpha": 0.2},
    "kd-standardized": {
        "ce_weight": 0.0,
        "kd_weight": 0.9,
        "kd_standardize": True,
        "temperature": 2.0,
    },
    "feature": {"ce_weight": 0.0, "feature_weight": 1.1},
    **{
        f"hetero-{name}": {"ce_weight": 0.0, "hetero_weight": 1.5, **options}
        for name, options in VARIANTS.items()
    },
    "cwd": {"ce_weight": 0.0, "terms": (CWD(1.3, temperature=2.5),)},
    "dkd": {"ce_weight": 0.0, "terms": (DKD(0.6, alpha=0.7, beta=2.0, temperature=1.5),)},
    "dice": {"ce_weight": 0.0, "terms": (Dice(0.8, smooth=0.5, log=True),)},
    "tversky": {"ce_weight": 0.0, "terms": (Tversky(0.7, alpha=0.3, beta=0.8, gamma=0.75),)},
    "focal": {"ce_weight": 0.0, "terms": (Focal(1.2, gamma=1.5, alpha=0.4),)},
    "ofa": {"ce_weight": 0.0, "terms": (OFA(0.7, eps=1.3, temperature=1.5),)},
    "all": {
        "ce_weight": 0.9,
        "teacher_ce_weight": 0.8,
        "kd_weight": 0.7,
        "hetero_weight": 0.6,
        "feature_weight": 0.5,
        "temperature": 1.5,
    },
}


OBJECTS = [term for options in TERM_CASES.values() for term in options.get("terms", ())]
TERM_CASES["all+objects"] = {
    **TERM_CASES["all"],
    "terms": tuple(
        replace(term, temperature=TERM_CASES["all"]["temperature"])
        if term.shares_temperature and hasattr(term, "temperature")
        else term
        for term in OBJECTS
    ),
}

#: What the CUDA kernels by cells and on the label grid compute; everything else goes by segments.
FAST_CASES: dict[str, dict[str, Any]] = {
    "ce": {},
    "hetero": {"ce_weight": 0.0, "hetero_weight": 1.5},
    "ce+kd": {"kd_weight": 0.7, "temperature": 4.0},
    "kd": {"ce_weight": 0.0, "kd_weight": 0.7, "temperature": 0.7},
    "ce+hetero-T2": {"hetero_weight": 0.7, "temperature": 2.0, "tau": 0.6},
    "ce+hetero-T1.7": {"hetero_weight": 0.7, "temperature": 1.7},
    "ce+hetero-no-evaluation": {"hetero_weight": 0.7, "evaluation": "none"},
    "ce+kd+hetero": {"kd_weight": 0.4, "hetero_weight": 0.7, "temperature": 2.0},
    "maps": {"hetero_weight": 0.7, "return_maps": True},
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
    student_grad: Any
    """A tensor, or None where none was asked for"""
    teacher_grad: Any
    maps: dict[str, Tensor] | None


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Runs a block of calls of the CPU kernels with one instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        if isa:
            patch.setenv("HETEROAKD_CPU_ISA", isa)
        yield


def moved(value: Any, device: str | torch.device) -> Any:
    """A tensor with its whole memory, so that strides and gaps stay; anything else as it is."""
    if not isinstance(value, Tensor) or value.device.type == torch.device(device).type:
        return value
    memory = value.untyped_storage().nbytes() // max(value.element_size(), 1)
    whole = value.detach().as_strided((memory,), (1,), 0).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def device_of(backend: str | None, batch: Batch) -> str:
    """Where a call with this batch is computed: kernels of a GPU on one, if there is one."""
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return "cuda" if on_gpu else batch.student.device.type


def terms_of(options: dict[str, Any]) -> list[Term]:
    """Of keywords, and those given as objects."""
    flat = {name: value for name, value in options.items() if name in FLAT}
    terms = from_flat(check_flat({**FLAT_DEFAULTS, **flat}))
    return [*(term for term in terms if term.weight), *options.get("terms", ())]


def loss_of(student: Tensor, target: Tensor, teacher: Tensor, **options: Any) -> Any:
    """`distillation_loss`, or `segmentation_loss` where there are `terms`."""
    if "terms" not in options:
        return functional.distillation_loss(student, target, teacher, **options)
    others = {k: v for k, v in options.items() if k not in FLAT and k != "terms"}
    return functional.segmentation_loss(student, target, teacher, terms=terms_of(options), **others)


def evaluate(
    batch: Batch,
    grad_output: float = 1.0,
    student_requires_grad: bool = True,
    backend: str | None = None,
    **options: Any,
) -> Result:
    """Loss, terms and gradients of one call, on the batch's device. The name of a backend may say
    which instruction set, as in `cpu-avx2`."""
    backend, _, isa = (backend or "").partition("-")
    home, there = batch.student.device, device_of(backend, batch)
    student, teacher, target = (moved(tensor.detach(), there) for tensor in batch)
    options = {name: moved(value, there) for name, value in options.items()}
    student = student.requires_grad_(student_requires_grad)
    teacher = teacher.requires_grad_(bool(options.get("teacher_ce_weight")))
    with instruction_set(isa):
        output = loss_of(student, target, teacher, backend=backend or None, **options)
        wanted = [t for t in (student, teacher) if t.requires_grad]
        scale = torch.as_tensor(grad_output).to(output.loss)
        grads = iter(torch.autograd.grad(output.loss, wanted, scale, allow_unused=True))
    maps = output.maps
    return Result(
        output.loss.detach().to(home),
        {name: float(value) for name, value in output.terms.items()},
        moved(next(grads), home) if student.requires_grad else None,
        moved(next(grads), home) if teacher.requires_grad else None,
        None if maps is None else {name: values.to(home) for name, values in maps.items()},
    )


def truth(batch: Batch, grad_output: float = 1.0, **options: Any) -> Result:
    """The oracle in float64, on exactly the values that the call under test reads."""
    double = Batch(batch.student.double(), batch.teacher.double(), batch.target)
    if options.get("class_weight") is not None:
        options["class_weight"] = options["class_weight"].double()
    if options.get("pixel_weight") is not None:
        options["pixel_weight"] = options["pixel_weight"].double()
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
    maps = bool(options.get("return_maps"))
    terms = tuple(terms_of(options))
    shape, numbers = functional.encode(functional.with_maps(terms) if maps else terms)
    unlabelled = options.get("unlabelled_index")
    weighted = options.get("class_weight") is not None
    (one,) = plan(shape, weighted, maps, (), unlabelled is not None)
    ignored = options.get("ignore_index", 255)
    head = (ignored, int(options.get("align_corners", False)), int(maps))
    return LossSpec((*head, ignored if unlabelled is None else unlabelled, *one.structure), numbers)


def require(backend: str, device: str = "cpu", **options: Any) -> None:
    """Skips where a backend does not (yet) compute this call; `reference` is never skipped."""
    spec = spec_of(**{k: value for k, value in options.items() if k in FLAT or k == "terms"})
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


def assert_maps_match(got: Result, expected: Result, relative: float = 1e-5) -> None:
    """Maps on request equal the oracle's."""
    for name, values in expected.maps.items():
        double = got.maps[name].dtype == torch.float64
        torch.testing.assert_close(
            got.maps[name].double(),
            values.double(),
            rtol=1e-10 if double else relative,
            atol=1e-12 if double else 1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def maps_relative(backend: str) -> float:
    """The relative error that float32 maps may have."""
    return 1e-4 if backend == "reference" else 1e-5


def assert_like_logits(batch: Batch, got: Result) -> None:
    """A gradient has its logits' dtype, and their strides where those leave no gaps."""
    for logits, grad in ((batch.student, got.student_grad), (batch.teacher, got.teacher_grad)):
        if grad is not None:
            assert grad.dtype == logits.dtype
            assert grad.stride() == torch.empty_like(logits).stride()


def check(batch: Batch, grad_output: float = 2.5, **options: Any) -> Result:
    """The call against the oracle, with maps if there are any."""
    got = evaluate(batch, grad_output, **options)
    expected = truth(batch, grad_output, **options)
    assert_matches(got, expected)
    assert_like_logits(batch, got)
    if got.maps is not None:
        assert_maps_match(got, expected, maps_relative(options["backend"]))
    return got


def assert_same_bits(one: Result, other: Result) -> None:
    """Loss, terms, gradients and maps."""
    assert torch.equal(one.loss, other.loss)
    assert one.terms == other.terms
    for name in ("student_grad", "teacher_grad"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name
    assert (one.maps is None) == (other.maps is None)
    for name, values in (one.maps or {}).items():
        assert torch.equal(values, other.maps[name]), name


def reads(side: str, **options: Any) -> set[str]:
    """Names of the terms of a call that depend on the logits of one side."""
    names = ("teacher_ce", "kd", "hetero", "feature")
    asked = {name for name in names if options.get(f"{name}_weight")}
    asked |= {"ce"} if options.get("ce_weight", 1.0) else set()
    asked |= {term.name for term in options.get("terms", ())}
    return asked - ({"teacher_ce"} if side == "student" else WITHOUT_TEACHER)
    given = options.get("terms", ())
    asked |= {term.name for term in given if side == "student" or term.needs_teacher}
    return asked - {"teacher_ce" if side == "student" else "ce"}


def has_isa(isa: str) -> bool:
    """Whether the compiled CPU kernels run with this instruction set here."""
    if "cpu" not in BACKENDS:
        return False
    try:
        evaluate(make_batch(batch=1, dtype=F32), backend=f"cpu-{isa}")
    except RuntimeError:
        return False
    return True


CPU_KERNELS = tuple(f"cpu-{isa}" for isa in ISAS if has_isa(isa))
#: What arithmetic is tested on: backends, and of the CPU's each instruction set.
KERNELS = (*CPU_KERNELS, *(name for name in BACKENDS if name != "cpu"))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
#: Of tests that call a loss with CPU tensors themselves, which is not for kernels on a GPU.
CPU_BACKENDS = tuple(name for name in BACKENDS if device_of(name, make_batch()) == "cpu")
every_cpu_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
#: Kernels that are interpreted run every combination of such a test, and not a sample.
complete = pytest.mark.share(1)
