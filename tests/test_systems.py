"""docs/contract.md, "Systems": operators, compilation, backends, what an import may do."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from common import BACKENDS, TERM_CASES, make_batch, require

import heteroakd_fast as hf
from heteroakd_fast import _extension, backends, functional, info, ops
from heteroakd_fast.backends import compiled
from heteroakd_fast.spec import LossSpec
from heteroakd_fast.terms import KD, TERMS, CrossEntropy, HeteroAKD, TeacherCrossEntropy

CE = LossSpec.of(CrossEntropy()).structure
# A build that was told to go without the extension may lack it; any other must have it.
PURE = os.environ.get("HETEROAKD_BUILD_EXTENSION") == "0"


# --- operators ---------------------------------------------------------------------------------


def test_a_spec_decodes_to_its_terms() -> None:
    terms = (KD(0.3, temperature=3.0, divergence="js", beta=0.2), CrossEntropy(2.0, 0.1))
    spec = LossSpec.of(*terms, groups=(0, 0), ignore_index=-1, align_corners=True)
    assert spec.options() == (terms, (0, 0), -1, True, False, False, -1)
    spec = LossSpec.of(*terms, groups=(0, 0), unlabelled_index=7, maps=False, diagnostics=True)
    assert spec.options() == (terms, (0, 0), 255, False, False, True, 7)
    assert spec.planes == 3
    paper = HeteroAKD(0.0, preset="paper", weight_axis="space", temperature=2.0, tau=0.7)
    both = LossSpec.of(TeacherCrossEntropy(), paper, groups=(0, -1), maps=True).options()
    assert both.asked == (TeacherCrossEntropy(),)
    assert both.find("hetero") == paper


def test_the_compiled_terms_have_the_options_of_pythons() -> None:
    """csrc/terms against the fields of `terms`: names, order, how many choices; and the choices
    that the kernels know by name."""
    folder = Path(__file__).parent.parent / "csrc" / "terms"
    text = "".join(file.read_text() for file in sorted(folder.glob("*.h")))
    listed = (folder / "list.h").read_text()
    (types,) = re.findall(r"AllTerms = TermTypes<(.*?)>;", listed, re.S)
    (indices,) = re.findall(r"kPublicIndex\[kTerms\] = {(.*?)};", listed)
    (teacher_ce, count) = re.findall(r"kTeacherCe = (\d+), kPublicTerms = (\d+);", listed)[0]
    assert TERMS[int(teacher_ce)].name == "teacher_ce"
    assert len(TERMS) == int(count)
    numbers = [int(index) for index in indices.split(",")]
    assert set(numbers) == set(range(len(TERMS))) - {int(teacher_ce)}

    def options_of(struct: str) -> tuple[list[str], list[tuple[str, int]]]:
        base, body = re.findall(rf"struct {struct} : (\w+) {{(.*?)\n}};", text, re.S)[0]
        if base != "TermDefaults" and "kNumbers" not in body:
            return options_of(base)
        own = "".join(re.findall(r"kNumbers\[\] = {(.*?)};", body, re.S))
        own = own.replace("kTemperatureRange", '"temperature"')
        others = "".join(re.findall(r"kChoices\[\] = {(.*?)};", body, re.S))
        pairs = re.findall(r'{"(\w+)", (\d+)}', others)
        return re.findall(r'"(\w+)"', own), [(name, int(n)) for name, n in pairs]

    for struct, index in zip(re.split(r",\s+", types), numbers, strict=True):
        fields = dataclasses.fields(TERMS[index])
        assert options_of(struct) == (
            [f.name for f in fields if "choices" not in f.metadata and f.name != "weight"],
            [(f.name, len(f.metadata["choices"])) for f in fields if "choices" in f.metadata],
        )

    def choices(term: type, option: str) -> list[str]:
        (field,) = (f for f in dataclasses.fields(term) if f.name == option)
        return list(field.metadata["choices"])

    def enum(struct: str, name: str) -> list[str]:
        body = re.findall(rf"struct {struct} : \w+ {{(.*?)\n}};", text, re.S)[0]
        (names,) = re.findall(rf"enum {name} : \w+ {{(.*?)}}", body, re.S)
        return re.findall(r"k(\w+)", names.lower().replace("kteacheronly", "kteacher"))

    assert enum("KdTerm", "Variant") == choices(KD, "divergence")
    assert enum("HeteroOptions", "Mix") == choices(HeteroAKD, "mix")
    assert choices(HeteroAKD, "preset") == ["softmax-kl", "paper"]
    assert choices(HeteroAKD, "evaluation") == ["discrepancy", "none"]
    assert choices(HeteroAKD, "weight_axis") == ["class", "space"]


def test_a_term_is_one_file_per_language() -> None:
    """csrc/terms and kernels/terms: the same files, list and functions in the same order."""
    root = Path(__file__).parent.parent
    compiled, triton = (
        {file.stem: file.read_text() for file in sorted((root / folder).glob(f"*{suffix}"))}
        for folder, suffix in (("csrc/terms", ".h"), ("kernels/terms", ".py"))
    )
    (types,) = re.findall(r"AllTerms = TermTypes<(.*?)>;", compiled.pop("list"), re.S)
    names = re.split(r",\s+", types.lower().replace("term", "").replace("crossentropy", "ce"))
    (files,) = re.findall(r"^FILES = \((.*?),?\)$", triton.pop("__init__"), re.M | re.S)
    assert re.findall(r"\w+", files) == names
    assert compiled.keys() == triton.keys() == {*names, "term"}
    for name in names:
        functions = re.findall(r"HAKD_FN static [^(;{]*?(\w+)\(", compiled[name])
        others = re.findall(r"^def (\w+)", triton[name], re.M)
        assert {"pixel", "variant"} & {*functions} <= {*others}
        shared = [x for x in functions if x in others and x != "student"]
        assert shared == [x for x in others if x in shared]


def operands(batch: Any, spec: LossSpec, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the operator `sums`."""
    tensors = (batch.student, None, None, None, None, None, batch.target, None, None)
    keywords = {"structure": spec.structure, "wants": [False] * 6, "precision": "ieee"}
    return (*tensors, spec.vector()), {**keywords, **options}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, grad: bool, layout: str, weighted: bool, dtype: torch.dtype) -> None:
    require(backend)
    batch = make_batch(dtype=dtype)
    student = batch.student
    if layout == "channels_last":
        student = student.contiguous(memory_format=torch.channels_last)
    elif layout == "expanded":
        student = student[:1].expand(2, -1, -1, -1)
    batch = batch._replace(student=student.detach().requires_grad_(grad))
    spec = LossSpec.of(CrossEntropy(2.0, label_smoothing=0.1))
    arguments, options = operands(batch, spec, backend=backend, wants=[grad, *[False] * 5])
    weights = (torch.rand(5), torch.rand(batch.target.shape)) if weighted else (None, None)
    arguments = (*arguments[:7], *weights, spec.vector())
    torch.library.opcheck(torch.ops.heteroakd_fast.sums, arguments, options)
    plain = [None if x is None else x.detach() for x in arguments]
    _, totals, *_, saved = torch.ops.heteroakd_fast.sums(*plain, **options)
    plain.insert(9, saved)
    torch.library.opcheck(torch.ops.heteroakd_fast.gradient, (totals, *plain), options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_every_term(backend: str) -> None:
    """Logits on two grids, gradients to both sides, terms in two groups."""
    require(backend, **TERM_CASES["all"])
    batch = make_batch(dtype=torch.float32)
    terms = (CrossEntropy(), TeacherCrossEntropy(0.5), KD(0.3), HeteroAKD(2.0))
    spec = LossSpec.of(*terms, groups=(0, 0, 0, 1))
    wants = [True, False, False, True, False, False]
    arguments, options = operands(batch, spec, backend=backend, wants=wants)
    sides = (batch.student.requires_grad_(), None, None, batch.teacher.requires_grad_())
    torch.library.opcheck(torch.ops.heteroakd_fast.sums, (*sides, *arguments[4:]), options)


def test_opcheck_count() -> None:
    target = make_batch().target
    torch.library.opcheck(torch.ops.heteroakd_fast.count, (target, None, 5, 255, 255))
    assert ops.count(target, None, 5, 255, 255).tolist() == [int((target != 255).sum())] * 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ["ce", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend: str, case: str, dynamic: bool) -> None:
    options = {**TERM_CASES[case], "backend": backend}
    require(backend, **TERM_CASES[case])
    # dynamic shapes and the tracer's own work do not go through the poisoned allocator
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

    def step(student: Any, teacher: Any, target: Any) -> Any:
        output = functional.distillation_loss(student, target, teacher, **options)
        return output.loss, output.ce, output.valid

    # the graph is the same for every backend: Inductor compiles it once
    compiler = "inductor" if backend == "cpu" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for seed, size in ((0, (13, 17)), (1, (11, 20)) if dynamic else (1, (13, 17))):
        batch = make_batch(dtype=torch.float32, size=size, seed=seed)
        results = []
        for function in (step, compiled):
            student = batch.student.clone().requires_grad_()
            teacher = batch.teacher.clone().requires_grad_("teacher_ce_weight" in options)
            loss, ce, valid = function(student, teacher, batch.target)
            (2.5 * loss).backward()
            results.append((loss.detach(), ce, valid, student.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert results[1][3].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_annealed_options_do_not_break_the_graph(backend: str) -> None:
    """Weights and temperatures that change from step to step reach the tracer as symbols."""
    require(backend)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    batch = make_batch(dtype=torch.float32)

    def loss(logits: Any, target: Any, weight: float, smoothing: float) -> Any:
        return functional.distillation_loss(
            logits, target, None, ce_weight=weight, label_smoothing=smoothing, backend=backend
        ).loss

    # the graph is the same for every backend: Inductor compiles it once
    compiler = "inductor" if backend == "reference" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for weight, smoothing in ((1.0, 0.1), (0.5, 0.2), (0.25, 0.3)):
        arguments = (batch.student, batch.target, weight, smoothing)
        torch.testing.assert_close(compiled(*arguments), loss(*arguments))


def test_a_module_is_annealed_without_recompiling() -> None:
    torch.use_deterministic_algorithms(False)
    batch = make_batch(dtype=torch.float32)
    flat = hf.HeteroAKDLoss(5)
    terms = hf.SegmentationLoss(CrossEntropy(), KD(0.1), HeteroAKD(temperature=2.0))
    for loss in (flat, terms):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True)
        seen = set()
        for step in range(12):
            if loss is flat:
                flat.kd_weight, flat.temperature, flat.tau = 0.1 + step, 1.0 + step, 2.0 + step
            else:
                terms.set_weights(kd=0.1 + step, hetero=1.0 + step)
            with torch._dynamo.config.patch(error_on_recompile=True):
                got = compiled(*batch.arguments).loss
            torch.testing.assert_close(got, loss(*batch.arguments).loss)
            seen.add(float(got))
        assert len(seen) == 12


def test_fullgraph_compile_of_the_module() -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    loss = hf.HeteroAKDLoss(5, 7, 9)
    batch = make_batch(dtype=torch.float32)
    arguments = {
        "teacher_logits": batch.teacher,
        "student_features": torch.randn(2, 7, 4, 4),
        "teacher_features": torch.randn(2, 9, 3, 3),
        "return_maps": True,
    }
    expected = loss(batch.student, batch.target, **arguments)
    got = torch.compile(loss, fullgraph=True)(batch.student, batch.target, **arguments)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.maps["reliability"], expected.maps["reliability"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_labels_are_found_in_compiled_code(backend: str) -> None:
    require(backend)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    batch = make_batch(dtype=torch.float32)

    @torch.compile(fullgraph=True)
    def loss(logits: Any, target: Any) -> Any:
        return functional.cross_entropy(logits, target, backend=backend).loss

    loss(batch.student, batch.target)
    batch.target[0, 0, 0] = 5
    with pytest.raises(ValueError, match="label 5 at"):
        loss(batch.student, batch.target)


# --- backends ----------------------------------------------------------------------------------


def test_the_compiled_backend_is_there_and_chosen() -> None:
    """On the CPU the kernel must be used wherever it can: a silent fallback is a defect."""
    if PURE:
        pytest.skip("built without the extension on purpose")
    assert backends.available()["cpu"] is None, backends.available()["cpu"]
    assert backends.select(None, CE, "cpu") == "cpu"
    both = LossSpec.of(CrossEntropy(), KD()).structure
    assert backends.select(None, both, "cpu") == "cpu"
    assert backends.select("reference", CE, "cpu") == "reference"
    assert backends.select(None, CE, "mps") == "reference"


def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that calls end up on."""
    seen: list[str] = []
    original = ops.sums

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(ops, "sums", spy)
    return seen


def test_argument_beats_context_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record(monkeypatch)
    batch = make_batch(dtype=torch.float32)

    def call(backend: str | None = None) -> None:
        functional.cross_entropy(batch.student, batch.target, backend=backend)

    call()
    with hf.use_backend("reference"):
        call()
        call("auto")
        with hf.use_backend("auto"):
            call()
        call()
    call()
    best = "reference" if PURE else "cpu"
    assert seen == [best, "reference", best, best, "reference", best]
    with pytest.raises(ValueError, match="name: got 'fast', expected one of auto, reference"):
        hf.use_backend("fast").__enter__()


def test_a_block_is_of_its_thread() -> None:
    chosen = []
    with hf.use_backend("reference"):
        thread = threading.Thread(target=lambda: chosen.append(backends.select(None, CE, "cpu")))
        thread.start()
        thread.join()
        chosen.append(backends.select(None, CE, "cpu"))
    assert chosen == ["reference" if PURE else "cpu", "reference"]


# structure: ignore_index, align_corners, maps, then of each term its index, its group, its choices
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("structure", "numbers"),
    [
        ((255, 0, 0), ()),
        ((255, 0, 0, 255, 0, 0, 0, 0), (1, 0, 1, 0)),  # ce twice
        ((255, 0, 0, 255, len(TERMS), 0), (1, 0)),  # no such term
        ((255, 0, 0, 255, 0, len(TERMS)), (1, 0)),  # no such group
        ((255, 0, 0, 255, 2, 0, 3), (1, 1, 0.5)),  # no such divergence
        ((255, 0, 0, 255, 2, 0), (1, 1, 0.5)),  # no divergence
        ((255, 0, 1, 255, 0, 0), (1, 0)),  # maps of no term
        ((255, 0, 0, 255, 0, 0), (1, 2.0)),  # smoothing
        ((255, 0, 0, 255, 0, 0), (1,)),
        ((255, 0, 0, 255, 0, 0), (1, 0, 0)),
        ((255, 0, 0, 255, 0, 0), (0, 0)),  # weight
        ((255, 0, 0, 255, 2, 0, 0), (1, 0, 0.5)),  # temperature
        ((255, 0, 0, 255, 2, 0, 0), (1, 1, 0.5)),  # without a teacher
    ],
)
def test_operators_refuse_what_they_do_not_compute(
    backend: str, structure: tuple[int, ...], numbers: tuple[float, ...]
) -> None:
    require(backend)
    batch = make_batch(dtype=torch.float32)
    spec = LossSpec(structure, numbers)
    arguments, options = operands(batch, spec, backend=backend)
    with pytest.raises((ValueError, TypeError)):
        torch.ops.heteroakd_fast.sums(*arguments, **options)
    if backend in ("cpu", "cuda"):  # whose own operators look for themselves
        operators = compiled.CPU.operators() if backend == "cpu" else compiled.CUDA.operators()
        with pytest.raises(RuntimeError):
            operators.sums(
                batch.student,
                None,
                batch.target,
                None,
                None,
                spec.vector(),
                structure,
                False,
                False,
            )


def test_operators_refuse_a_class_for_unlabelled_pixels() -> None:
    batch = make_batch(dtype=torch.float32)
    spec = LossSpec.of(CrossEntropy(), unlabelled_index=3)
    arguments, options = operands(batch, spec, backend="reference")
    with pytest.raises(ValueError, match="unlabelled_index: got 3"):
        torch.ops.heteroakd_fast.sums(*arguments, **options)


def test_operators_refuse_other_backends() -> None:
    batch = make_batch(dtype=torch.float32)
    arguments, options = operands(batch, LossSpec.of(CrossEntropy()), backend="fast")
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        torch.ops.heteroakd_fast.sums(*arguments, **options)


def test_environment_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(switch: str) -> str | None:
        monkeypatch.setenv("HETEROAKD_DISABLE_EXTENSION", switch)
        return _extension.unavailable()

    for off in ("", "0", "false", "off", "No"):
        assert "is set" not in (unavailable(off) or "")
    for on in ("1", "true", "ON"):
        assert "is set" in (unavailable(on) or "")
    message = "HETEROAKD_DISABLE_EXTENSION: got 'maybe', expected 1 or 0"
    with pytest.raises(ValueError, match=message):
        unavailable("maybe")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_environment_variable() -> None:
    code = (
        "from heteroakd_fast import backends;print(backends.select(None, (255, 0, 0, 0, 0), 'cpu'))"
    )
    assert python(code, HETEROAKD_BACKEND="reference").stdout.strip() == "reference"
    assert "HETEROAKD_BACKEND" in python(code, HETEROAKD_BACKEND="fast").stderr
    assert "backend='cuda' is not available: " in python(code, HETEROAKD_BACKEND="cuda").stderr


def test_a_backend_that_cannot_run_says_why() -> None:
    batch = make_batch(dtype=torch.float32)
    for name, reason in backends.available().items():
        if reason is None:
            continue
        with pytest.raises(hf.BackendUnavailableError) as caught:
            functional.cross_entropy(batch.student, batch.target, backend=name)
        assert repr(name) in str(caught.value)
        assert reason in str(caught.value)
        assert "heteroakd_fast.info" in str(caught.value)


def test_without_the_extension_everything_still_works() -> None:
    """HETEROAKD_DISABLE_EXTENSION stands in for a wheel that was built without a compiler."""
    code = """
import torch, heteroakd_fast as hf
x = torch.randn(1, 3, 2, 2, requires_grad=True)
y = torch.zeros(1, 4, 4, dtype=torch.uint8)
hf.functional.cross_entropy(x, y).loss.backward()
assert x.grad.abs().sum() > 0
try:
    hf.functional.cross_entropy(x, y + 3)
except ValueError as error:
    print(error)
try:
    hf.functional.cross_entropy(x, y, backend="cpu")
except hf.BackendUnavailableError as error:
    print(error)
"""
    run = python(code, HETEROAKD_DISABLE_EXTENSION="1")
    assert run.returncode == 0, run.stderr
    assert "label 3 at (b=0, y=0, x=0)" in run.stdout
    assert "16 such pixels" in run.stdout
    assert "HETEROAKD_DISABLE_EXTENSION is set" in run.stdout


def test_import_loads_neither_triton_nor_the_extension_nor_the_driver() -> None:
    code = """
import sys, heteroakd_fast, torch
heavy = {"triton", "transformers", "pydantic", "tyro", "matplotlib", "rich"} & set(sys.modules)
assert not heavy, heavy
try:
    torch.ops.heteroakd_fast_c.build_info
except AttributeError:
    print("not loaded")
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "not loaded"


def test_library_uses_the_stable_abi_only() -> None:
    """No symbol of CPython, and of libtorch only the C interface that is stable."""
    path = _extension.library_path()
    if path is None:
        pytest.skip("no compiled extension")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    foreign = re.findall(r"(?:\bPy[A-Z_]\w*|\b_Py\w*|\bc10::\w+|\bat::\w+|\btorch::\S+)", symbols)
    assert foreign == []
    assert "torch_library_impl" in symbols


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert re.search(r"reference +works", text)
    assert re.search(r"triton +(works|cannot: \w+)", text)
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert set(report["backends"]) == set(backends.names())
    module = subprocess.run(
        [sys.executable, "-m", "heteroakd_fast.info"], capture_output=True, text=True
    )
    assert module.returncode == 0, module.stderr


def test_info_names_the_values_of_the_environment_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not PURE:
        with monkeypatch.context() as patch:
            patch.setenv("HETEROAKD_CPU_ISA", "sse9")
            assert info.main([]) == 0
        line = r"cpu +cannot: HETEROAKD_CPU_ISA: got 'sse9', .* expected avx512, avx2 or portable"
        text = capsys.readouterr().out
        assert re.search(line, text)
        assert re.search("cpu_kernels +None", text)
    for name, expected in (
        ("HETEROAKD_BACKEND", "one of auto, reference, cpu"),
        ("HETEROAKD_CHECK_LABELS", "1 or 0"),
        ("HETEROAKD_DISABLE_EXTENSION", "1 or 0"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, "maybe")
            with pytest.raises(SystemExit):
                info.main([])
        assert f"{name}: got 'maybe', expected {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "heteroakd_fast.info",
        "heteroakd_fast.train --help",
        "heteroakd_fast.train --print-config",
        "heteroakd_fast.train.experiment --help",
        "benchmarks list",
    ],
)
def test_a_command_whose_reader_is_gone_ends_quietly(command: str) -> None:
    """As in `... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=Path(__file__).parent.parent,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


def test_kernels_package_is_installed_under_its_name() -> None:
    import heteroakd_fast.kernels

    assert "Triton" in (heteroakd_fast.kernels.__doc__ or "")


def test_package_is_typed_and_its_names_are_public() -> None:
    assert (Path(hf.__file__).parent / "py.typed").exists()
    for name in hf.__all__:
        assert hasattr(hf, name)
    for name in ("cross_entropy", "distillation_loss"):
        doc = getattr(functional, name).__doc__
        for word in ("Args:", "Returns:", "Raises:", "[B, C, h, w]"):
            assert word in doc, (name, word)


def test_every_promise_names_a_test_that_exists() -> None:
    """docs/contract.md: a renamed or deleted test must not leave its promise behind.

    The contract names files without their folder: file names are unique in `tests`.
    """
    root = Path(__file__).parent
    contract = (root.parent / "docs" / "contract.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)", contract)
    assert len(named) > 40
    assert len(named) == len(re.findall(r"test_\w+\.py::", contract))  # none in another form
    for file, test in named:
        (path,) = root.rglob(file)
        assert re.search(rf"^ *def {test}\(", path.read_text(), re.MULTILINE), (file, test)
