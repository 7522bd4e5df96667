"""Wheels as users get them: with the extension, without a compiler, and what each one contains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.packaging

_USE = """
import torch, heteroakd_fast as hf, heteroakd_fast.kernels
from heteroakd_fast import _extension, backends
assert "site-packages" not in {root!r} and not hf.__file__.startswith({root!r}), hf.__file__
x = torch.randn(2, 19, 8, 8, requires_grad=True)
y = torch.randint(0, 19, (2, 64, 64))
hf.HeteroAKDLoss(19)(x, y, teacher_logits=torch.randn(2, 19, 4, 4)).loss.backward()
hf.functional.cross_entropy(x, y).loss.backward()
assert x.grad.abs().sum() > 0
print(backends.select(None, (255, 0, 0, 0, 0), "cpu"), backends.available()["cpu"])
print(_extension.description().get("cuda_absent"))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what is needed to build: no build products of this checkout."""
    copy = tmp_path_factory.mktemp("source") / "heteroakd_fast"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("heteroakd_fast", "kernels", "csrc", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def use(wheel: Path, directory: Path) -> str:
    """Installs the wheel beside this interpreter's packages and trains one step with it."""
    target = directory / "installed"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"),
            *("--target", str(target), str(wheel)),
        ],
        check=True,
        capture_output=True,
    )
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n" + _USE.format(root=str(ROOT))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_wheel_with_the_extension(source: Path, tmp_path: Path) -> None:
    # The environment of these tests has compiled and linked all of it already, from the same
    # sources by the same rules: here the CUDA part is left out and nothing is optimised, because
    # what a wheel contains, and that it loads, does not depend on it and the rest takes minutes.
    settings = {"HETEROAKD_BUILD_EXTENSION": "1", "HETEROAKD_BUILD_CUDA": "0", "CXXFLAGS": "-O0"}
    if os.environ.get("HETEROAKD_TEST_CUDA_WHEEL") == "1":
        settings = {"HETEROAKD_BUILD_EXTENSION": "1", "HETEROAKD_BUILD_CUDA": "1"}
    run = build(source, tmp_path, **settings, TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    # one file for every Python from 3.10 on, bound to the platform only
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "heteroakd_fast/_C.abi3.so" in names
    recipe = "train/recipes/landcover.toml"
    for needed in ("py.typed", "kernels/terms/__init__.py", recipe, "train/page.html"):
        assert f"heteroakd_fast/{needed}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "kernels"))]
    chosen, absent = use(wheel, tmp_path).splitlines()
    assert chosen.split() == ["cpu", "None"]
    left_out = settings["HETEROAKD_BUILD_CUDA"] == "0"
    assert absent == ("HETEROAKD_BUILD_CUDA=0" if left_out else "None")
    assert "heteroakd_fast: CUDA: " in run.stdout


def test_wheel_without_a_compiler(source: Path, tmp_path: Path) -> None:
    """An empty PATH has no compiler: the build says so and yields a pure-Python wheel."""
    run = build(source, tmp_path, PATH="", HETEROAKD_BUILD_EXTENSION="", CXX="")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no C++ compiler was found" in run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    chosen = use(wheel, tmp_path)
    assert chosen.startswith("reference the package was installed without its compiled extension")


def test_a_build_that_does_not_compile_fails_with_what_to_do(source: Path, tmp_path: Path) -> None:
    run = build(source, tmp_path, HETEROAKD_BUILD_CUDA="0", CXX="false")
    assert run.returncode != 0
    assert "HETEROAKD_BUILD_EXTENSION=0" in run.stdout + run.stderr
