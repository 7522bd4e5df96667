"""What setup.py and dev.py decide to build, with stand-ins for nvcc and the C++ compiler."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution, Extension

from heteroakd_fast import _extension, info

ROOT = Path(__file__).resolve().parent.parent
#: nvcc as far as a build sees it. Names and messages are those of CUDA 12 and 13.
NVCC = r"""#!/bin/sh
case " $* " in
  *" --version "*) echo "Cuda compilation tools, release RELEASE, VRELEASE.1"; exit 0;;
  *" --list-gpu-arch "*) for a in KNOWN; do echo "compute_$a"; done; exit 0;;
  *" --dryrun "*) exit 0;;
esac
for flag in "$@"; do
  case "$flag" in -gencode=arch=compute_*)
    arch=${flag#-gencode=arch=compute_}; arch=${arch%%,*}
    case " KNOWN SUFFIXED " in *" $arch "*) ;;
      *) echo "nvcc fatal   : Unsupported gpu architecture 'compute_$arch'" >&2; exit 1;;
    esac;;
  esac
done
if [ -n "$NVCC_SAYS" ]; then printf 'In file included\n%s\n' "$NVCC_SAYS" >&2; exit 1; fi
last=
for a in "$@"; do case "$last" in -o|-MF) : > "$a";; esac; last="$a"; done
"""
CUDA_12_4 = {"release": "12.4", "known": "50 60 70 75 80 86 87 89 90", "suffixed": "90a"}
CUDA_13_0 = {
    "release": "13.0",
    "known": "75 80 86 87 88 89 90 100 103 110 120 121",
    "suffixed": "90a 100a 100f 120a 120f",
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"heteroakd_fast_{name}", ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load("setup")
dev = load("dev")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an nvcc on the PATH, and a torch for this CUDA version into the process."""
    for name in ("HETEROAKD_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "NVCC_FLAGS", "CUDA_HOME",
                 "CUDA_PATH", "MAX_JOBS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)

    def install(
        release: str, known: str, suffixed: str = "", torch_cuda: str | None = None
    ) -> None:
        text = NVCC.replace("RELEASE", release).replace("SUFFIXED", suffixed)
        (tmp_path / "nvcc").write_text(text.replace("KNOWN", known))
        (tmp_path / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)

    return install


def names(plan: object) -> list[str]:
    assert isinstance(plan, setup.CudaPlan), plan
    return [str(one) for one in plan.architectures]


# --- whether the CUDA part is built ------------------------------------------------------------


def test_nvcc_and_an_architecture_list_do_not_ask_for_cuda(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(**CUDA_13_0, torch_cuda=None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(torch.version, "hip", None)
    plan = setup.plan_cuda()
    assert plan.startswith(f"torch {torch.__version__} has no CUDA (HETEROAKD_BUILD_CUDA=1 builds")
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    assert "is for ROCm" in setup.plan_cuda()
    monkeypatch.setenv("HETEROAKD_BUILD_CUDA", "1")
    assert names(setup.plan_cuda()) == ["9.0"]


def test_torch_for_cuda_gets_the_cuda_part_where_there_is_nvcc(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(**CUDA_13_0, torch_cuda="13.0")
    plan = setup.plan_cuda()
    assert names(plan) == ["8.0", "9.0", "10.0", "12.0+PTX"]
    assert plan.notes == []
    assert plan.targets[-1] == "-gencode=arch=compute_120,code=compute_120"
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert "nvcc was not found in /nowhere/bin" in setup.plan_cuda()
    monkeypatch.setenv("HETEROAKD_BUILD_CUDA", "0")
    assert setup.plan_cuda() == "HETEROAKD_BUILD_CUDA=0"


@pytest.mark.parametrize(
    ("release", "says", "message"),
    [
        ("11.5", "", "nvcc is of CUDA 11.5, expected 12.0 or newer"),
        ("?", "", "nvcc --version` names no release"),
        (
            "12.4",
            "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later "
            "than 13 are not supported!",
            "gcc versions later than 13 are not supported! (NVCC_FLAGS='-ccbin",
        ),
        ("12.4", "nvcc fatal   : Failed to preprocess", "nvcc fatal   : Failed to preprocess"),
    ],
)
def test_an_nvcc_that_does_not_serve_is_left_out_or_an_error_where_it_is_asked_for(
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    says: str,
    message: str,
) -> None:
    install(**{**CUDA_12_4, "release": release}, torch_cuda="12.6")
    monkeypatch.setenv("NVCC_SAYS", says)
    assert message in setup.plan_cuda()
    monkeypatch.setenv("HETEROAKD_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="^HETEROAKD_BUILD_CUDA=1, but ") as caught:
        setup.plan_cuda()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "HETEROAKD_BUILD_EXTENSION=1, but no C++ compiler"),
        ({"HETEROAKD_BUILD_EXTENSION": "maybe"}, "got 'maybe', expected 1, 0 or nothing"),
        ({"CUDA_HOME": "/nonexistent"}, "HETEROAKD_BUILD_CUDA=1, but nvcc was not found"),
    ],
)
def test_a_forced_build_that_cannot_be_done_is_an_error(
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    install(**CUDA_13_0)
    forced = {"HETEROAKD_BUILD_EXTENSION": "1", "HETEROAKD_BUILD_CUDA": "1"}
    for name, value in (forced | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup.announce()


# --- for which architectures -------------------------------------------------------------------


def test_default_architectures_that_nvcc_does_not_know_are_left_out_and_named(
    install: Callable[..., None],
) -> None:
    install(**CUDA_12_4, torch_cuda="12.6")
    plan = setup.plan_cuda()
    assert names(plan) == ["8.0", "9.0+PTX"]
    (note,) = plan.notes
    assert "left out 10.0, 12.0: nvcc 12.4" in note
    assert "8.9, 9.0" in note


@pytest.mark.parametrize("entry", ["10.0", "9.0 12.0+PTX", "10.0f", "8.0a"])
def test_a_named_architecture_that_nvcc_does_not_know_is_an_error(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    install(**CUDA_12_4, torch_cuda="12.6")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", entry)
    with pytest.raises(SystemExit) as caught:
        setup.plan_cuda()
    wrong = entry.split()[-1].removesuffix("+PTX")
    assert str(caught.value).startswith(f"TORCH_CUDA_ARCH_LIST: got {wrong}, which nvcc 12.4 (")
    assert "expected some of 5.0, 6.0, 7.0, 7.5, 8.0" in str(caught.value)


def test_named_architectures_that_the_kernels_do_not_support_are_left_out(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists of container images begin with 5.2 or 7.5."""
    install(**CUDA_13_0, torch_cuda="13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 7.5 8.0 8.6 9.0a 12.0+PTX")
    plan = setup.plan_cuda()
    assert names(plan) == ["8.0", "8.6", "9.0a", "12.0+PTX"]
    assert plan.notes == ["left out 5.2, 7.5: the kernels need 8.0 or newer"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert "no architecture is left" in setup.plan_cuda()


def test_an_architecture_list_that_cannot_be_read_is_an_error(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(**CUDA_13_0, torch_cuda="13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="got 'Hopper', expected entries such as 9.0"):
        setup.plan_cuda()


# --- what is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(("torch_cuda", "differs"), [("12.6", True), ("13.2", False)])
def test_nvcc_of_another_cuda_than_torch_is_named(
    install: Callable[..., None], torch_cuda: str, differs: bool
) -> None:
    install(**CUDA_13_0, torch_cuda=torch_cuda)
    text = setup.describe(setup.plan_cuda())
    assert ("warning: nvcc is of CUDA 13.0, torch" in text) == differs
    assert (f"of CUDA {torch_cuda}: the kernels will need a driver for CUDA 13" in text) == differs


def test_a_build_says_what_it_builds_before_it_compiles(
    install: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    install(**CUDA_12_4, torch_cuda="12.6")
    compiler = tmp_path / "compiler"
    compiler.write_text((tmp_path / "nvcc").read_text().replace("--version", "--none"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MAX_JOBS", "2")

    def build() -> tuple[str, str]:
        command = setup.NinjaBuild(Distribution())
        command.ensure_finalized()
        command.build_temp = str(tmp_path / "temp")
        command.build_lib = str(tmp_path / "lib")
        command.build_extension(Extension("heteroakd_fast._C", [], py_limited_api=True))
        return capfd.readouterr().out, (tmp_path / "temp" / "build.ninja").read_text()

    said, ninja = build()
    lines = said.splitlines()
    assert all(line.startswith("heteroakd_fast: ") for line in lines)
    assert f"C++: {compiler}, " in lines[1]
    assert "portable" in lines[1]
    assert "CUDA: yes: torch is for CUDA 12.6" in lines[2]
    assert f"{tmp_path / 'nvcc'} 12.4, for 8.0, 9.0+PTX" in lines[2]
    assert "left out 10.0, 12.0" in lines[3]
    assert lines[4].endswith("min on 2 cores")
    assert "-DHAKD_CUDA_ARCHITECTURES=8.0,9.0+PTX" in ninja
    assert "compute_100" not in ninja

    monkeypatch.setattr(torch.version, "cuda", None)
    said, ninja = build()
    assert f"CUDA: no: torch {torch.__version__} has no CUDA" in said
    assert f'-DHAKD_CUDA_ABSENT="torch {torch.__version__} has no CUDA' in ninja
    assert ".cu.o" not in ninja


# --- dev.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "gpus", "given", "expected"),
    [
        # The tests compile the CUDA part whatever torch is for.
        ("test", "", {}, {"HETEROAKD_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}),
        ("test", "", {"TORCH_CUDA_ARCH_LIST": "8.0"},
         {"HETEROAKD_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}),
        ("test", "8.6", {}, {"HETEROAKD_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.6"}),
        ("test", "", {"HETEROAKD_BUILD_CUDA": "0"}, {"HETEROAKD_BUILD_CUDA": "0"}),
        ("bench", "9.0\\n8.0", {}, {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a"}),
        # A GPU that this nvcc does not know runs PTX of the default list.
        ("bench", "12.0", {}, {}),
        # Nothing of it could run.
        ("bench", "", {}, {"HETEROAKD_BUILD_CUDA": "0"}),
        ("bench", "7.5", {}, {"HETEROAKD_BUILD_CUDA": "0"}),
    ],
)  # fmt: skip
def test_what_of_cuda_the_jobs_build(
    install: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    gpus: str,
    given: dict[str, str],
    expected: dict[str, str],
) -> None:
    install(**CUDA_12_4)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(os, "environ", {**os.environ, **given})
    dev.settle_cuda(job)
    names = ("HETEROAKD_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST")
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


@pytest.mark.parametrize("failing", [None, "mypy", "pytest"])
def test_job_test_fails_with_each_of_its_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str | None
) -> None:
    """mypy runs beside the tests; what it says follows them, also where they fail."""
    ran = []

    def run(self: object, *command: str) -> None:
        ran.append(command[1])
        if command[1] == failing:
            raise SystemExit(7)

    def output(self: object, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, command[1] == failing, "types\n")

    monkeypatch.setattr(dev, "settle_cuda", lambda *_: None)
    monkeypatch.setattr(dev.Environment, "prepare", lambda *_: None)
    monkeypatch.setattr(dev.Environment, "prepare_zoo", lambda *_: None)
    monkeypatch.setattr(dev.Environment, "run", run)
    monkeypatch.setattr(dev.Environment, "output", output)
    with pytest.raises(SystemExit) if failing else contextlib.nullcontext():
        dev.main(["test"])
    assert "types" in capsys.readouterr().out
    assert ("benchmarks" in ran) == (failing is None)


# --- what was built ----------------------------------------------------------------------------


@pytest.mark.parametrize(("torch_cuda", "differs"), [("12.6", True), ("13.2", False)])
def test_info_names_both_cuda_versions_where_they_differ(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    torch_cuda: str,
    differs: bool,
) -> None:
    monkeypatch.setattr(_extension, "description", lambda: {"cuda": "13.0"})
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert info.main([]) == 0
    expected = f"the compiled kernels are of CUDA 13.0, torch is of CUDA {torch_cuda}"
    assert (expected in capsys.readouterr().out) == differs


@pytest.mark.parametrize(
    ("built", "hip", "driver", "reason"),
    [
        (
            {"cuda_absent": "torch 2 has no CUDA"},
            None,
            13000,
            "CUDA (torch 2 has no CUDA); rebuild",
        ),
        ({}, None, 13000, "built without CUDA; rebuild"),
        ({"cuda": "13.0"}, "6.4", 13000, "is for ROCm"),
        ({"cuda": "13.0"}, None, 12080, "of CUDA 13.0, the driver supports CUDA up to 12.8"),
        ({"cuda": "12.9"}, None, 12040, None),  # of one major version, all of them run
    ],
)
def test_why_compiled_cuda_kernels_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    built: dict[str, str],
    hip: str | None,
    driver: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr(_extension, "unavailable", lambda: None)
    monkeypatch.setattr(_extension, "description", lambda: built)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    found = _extension.cuda_unavailable()
    assert found is None if reason is None else reason in str(found)
