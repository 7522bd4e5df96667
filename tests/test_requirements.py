"""Without an optional dependency every command says in one line what installs it, and returns 2."""

from __future__ import annotations

import importlib
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from heteroakd_fast import _requirements
from heteroakd_fast.train.cli import main as train
from heteroakd_fast.train.experiment import main as experiment

ROOT = Path(__file__).resolve().parent.parent
Main = Callable[[Sequence[str]], int]


def extra(name: str) -> set[str]:
    """The distributions of one of the package's extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r'"([A-Za-z0-9_.-]+)[^"]*"', block))


def test_the_driver_knows_its_extra() -> None:
    """What is added to the extra is either needed by the commands or named here with its reason."""
    some_networks_only, logs_only, older_pythons = "transformers", "tensorboard", "tomli"
    optional = {some_networks_only, logs_only, older_pythons}
    assert set(_requirements.TRAINING.values()) | optional == extra("train")
    assert {"matplotlib", "transformers"} <= extra("bench")
    distributions = metadata.packages_distributions()
    for module, distribution in _requirements.TRAINING.items():
        assert distribution in [name.lower() for name in distributions[module]]


class Refusing:
    """A finder that knows nothing of a package, as an import hook of somebody else's may."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def predict(arguments: Sequence[str]) -> int:
    return train(["predict", "run", "image.png", "--output", "masks", *arguments])


def benchmarks(arguments: Sequence[str]) -> int:
    from benchmarks.__main__ import main

    return main(["run", "--suite", "smoke", "--seconds", "0.001", *arguments])


@pytest.mark.parametrize(
    ("main", "command", "module", "names"),
    [
        *((train, "heteroakd-train", *item) for item in _requirements.TRAINING.items()),
        (predict, "heteroakd-train", "pydantic", "pydantic"),
        *((experiment, "heteroakd-experiment", *item) for item in _requirements.TRAINING.items()),
        (benchmarks, "benchmarks", "matplotlib", "matplotlib"),
        (benchmarks, "benchmarks", "transformers", "transformers"),
    ],
)
@pytest.mark.parametrize("how", ["absent", "refused"])
def test_each_is_looked_for_first(
    main: Main,
    command: str,
    module: str,
    names: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    if how == "absent":
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Refusing(module), *sys.meta_path])
    assert main([]) == 2
    printed = capsys.readouterr()
    extra_name = "bench" if command == "benchmarks" else "train"
    expected = f'{command}: {names}: not installed; pip install "heteroakd-fast[{extra_name}]"\n'
    assert (printed.out, printed.err) == ("", expected)
    assert list(tmp_path.iterdir()) == []


#: Runs in a process where nothing optional can be imported, and nothing is imported yet.
BARE = """
import contextlib, importlib, io, json, runpy, sys
absent, modules, scripts, libraries = json.loads(sys.argv[1])
for name in absent:
    sys.modules[name] = None
results = {}

def note(name, action):
    sys.argv = [name]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = action()
        except SystemExit as end:
            code = end.code
        except ImportError as error:
            code = f"ImportError: {error}"
    results[name] = code, out.getvalue()

for name in modules:
    note(name, lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))
for name, target in scripts.items():
    module, function = target.split(":")
    note(name, lambda: getattr(importlib.import_module(module), function)())
for name in libraries:
    note(name, lambda: importlib.import_module("heteroakd_fast.integrations." + name))
print(json.dumps(results))
"""


def test_nothing_optional_at_all() -> None:
    """Every command and drop-in in a bare environment: one line each, and no traceback."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^\[project\.scripts\]\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    scripts = dict(re.findall(r'^(\S+) = "(\S+)"$', block, re.MULTILINE))
    assert set(scripts) == {"heteroakd-train", "heteroakd-experiment"}
    modules = ["heteroakd_fast.train", "heteroakd_fast.train.experiment", "benchmarks"]
    modules.append("benchmarks.kernels")
    absent = [*_requirements.TRAINING, "transformers", "tensorboard", "accelerate", "scipy"]
    absent += ["triton", "lightning", "pytorch_lightning", "mmengine", "mmseg", "pytest"]
    libraries = {
        "lightning": "pip install lightning",
        "transformers": "pip install transformers accelerate",
        "mmseg": "pip install mmengine",
    }
    run = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps([absent, modules, scripts, list(libraries)])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    results: dict[str, tuple[Any, str]] = json.loads(run.stdout)
    for name in (*modules, *scripts):
        code, printed = results[name]
        assert code == 2, (name, code, printed)
        assert printed.count("\n") == 1, printed
        assert re.search(r"not installed.*pip install ['\"]\S+['\"]", printed), printed
    assert "filelock, matplotlib, pillow, pydantic, rich, " in results["heteroakd-train"][1]
    for name, command in libraries.items():
        code, _ = results[name]
        assert code.startswith(f"ImportError: heteroakd_fast.integrations.{name} needs "), code
        assert code.endswith(f": {command}"), code
        assert "\n" not in code


# --- what only some runs need --------------------------------------------------------------------


def test_networks_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from heteroakd_fast.train.config import ModelConfig
    from heteroakd_fast.train.errors import DependencyError
    from heteroakd_fast.train.models import build_model

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        DependencyError, match=r'segformer.*; pip install "heteroakd-fast\[train\]"$'
    ) as caught:
        build_model(ModelConfig(arch="segformer", steps=1), 3, 0)
    assert caught.value.exit_code == 2


def test_trained_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'load_student: pillow: .*"heteroakd-fast\[train\]"$'):
        from heteroakd_fast.train import load_student  # noqa: F401


def test_logs_of_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for by default, and no reason to refuse a run."""
    from heteroakd_fast.train import logs

    logs._say_without_tensorboard.cache_clear()
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.INFO):
        for stage in ("teacher", "alone"):
            with logs.Records(tmp_path / stage, 0, tensorboard=True) as records:
                assert records.tensorboard is None
    # Once, not for every stage.
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard is not installed: only metrics.jsonl is written; "
        'pip install "heteroakd-fast[train]"'
    ]


def test_transformers_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Trainer can be imported then, and fails later."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    name = "heteroakd_fast.integrations.transformers"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match="needs .*: pip install transformers accelerate$"):
        importlib.import_module(name)
