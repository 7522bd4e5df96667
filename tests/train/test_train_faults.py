"""What goes wrong in the middle of a run: one clear message, and nothing of the past is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import (
    QUIET,
    changed,
    environment,
    exported,
    same_weights,
    saved_step,
    small_disk,
    write_config,
)

from heteroakd_fast.train import memory, parallel, pipeline
from heteroakd_fast.train.checkpoint import NEWEST
from heteroakd_fast.train.cli import command, main
from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.batches import Order
from heteroakd_fast.train.errors import CheckpointError, DataError
from heteroakd_fast.train.reading import load_config


def one_stage(folder: Path, run: str, steps: int = 10, **changes: Any) -> Config:
    """The student alone; pictures are not read before training."""
    config = load_config(write_config(folder, steps=steps, run=run))
    return changed(config, stages=("alone",), data={"check": False, **changes.pop("data", {})})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_file_that_breaks_while_training(tmp_path: Path, kind: str, workers: int) -> None:
    """Named, with the checkpoints intact; mended, the run ends as if nothing had happened."""
    calm = one_stage(tmp_path, "calm")
    pipeline.run(calm, QUIET)
    config = one_stage(tmp_path, "broken", data={"workers": workers})
    # The one that is first read latest, so that checkpoints exist by then.
    first_read: dict[Path, int] = {}
    data = load_data(config.data)
    order = Order(config.seed, config.optim.batch_size, len(data.train))
    for step in range(10):
        for index in order.images(step):
            image, mask = data.train.pairs[index]  # type: ignore[attr-defined]
            first_read.setdefault(image if kind == "images" else mask, step)
    path, _ = max(first_read.items(), key=lambda item: item[1])
    good = path.read_bytes()
    if kind == "images":
        path.write_bytes(good[: len(good) // 2])
        expected = "cannot be read as an image"
    else:
        mask = np.asarray(Image.open(path)).copy()
        mask[5, 5:8] = 77
        Image.fromarray(mask).save(path)
        expected = r"has the value 77 \(3 pixels out of range\), expected 0 to 2 or 255"
    config = changed(config, log={"checkpoint_every": 1})
    with pytest.raises(DataError, match=f"{path.name}: {expected}"):
        pipeline.run(config, QUIET)
    assert 0 < saved_step(config.run / "alone") <= first_read[path]
    path.write_bytes(good)
    pipeline.run(config, QUIET)
    same_weights(exported(calm.run), exported(config.run))


def test_a_disk_that_fills_up_at_a_checkpoint(tmp_path: Path) -> None:
    calm = one_stage(tmp_path, "calm")
    pipeline.run(calm, QUIET)
    begun = one_stage(tmp_path, "full", steps=10)
    # The first checkpoint (step 4) finds room, the second does not.
    import heteroakd_fast.train.engine as engine

    original = engine.save_checkpoint
    count = 0

    def counting(folder: Path, state: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == 1:
            original(folder, state)
            return
        with small_disk(2000):
            original(folder, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", counting)
        with pytest.raises(CheckpointError, match=f"cannot be written.*intact: {NEWEST}"):
            pipeline.run(begun, QUIET)
    assert saved_step(begun.run / "alone") == 4
    assert not list((begun.run / "alone").glob(".*.tmp"))
    pipeline.run(begun, QUIET)
    same_weights(exported(calm.run), exported(begun.run))


@pytest.mark.parametrize(
    "scale",
    [{"channels_last": True}, {"compile": True}, {"compile": True, "tap": True}],
    ids=["channels_last", "compiled", "compiled around a tap"],
)
def test_ways_of_running_compute_the_same(
    tmp_path: Path, scale: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamo's own interpreter of graphs: what is compiled is looked at, not how fast."""
    compiled: list[str] = []

    def compile_eagerly(function: Any) -> Any:
        compiled.append(type(function.__self__).__name__)
        return real(function, backend="eager")

    real = torch.compile
    monkeypatch.setattr(parallel.torch, "compile", compile_eagerly)
    scale = dict(scale)
    tap = scale.pop("tap", False)
    first = load_config(write_config(tmp_path, steps=3, run="first"))
    pipeline.run(changed(first, stages=("teacher",)), QUIET)
    weights = first.run / "teacher" / "model.safetensors"
    plain = changed(
        first,
        run=tmp_path / "plain",
        stages=("distilled",),
        teacher={"weights": weights, "steps": 0},
        distill={"features": tap},
    )
    other = changed(plain, run=tmp_path / "other", scale=scale)
    pipeline.run(plain, QUIET)
    outcome = pipeline.run(other, QUIET)
    assert bool(compiled) == bool(scale.get("compile"))
    if tap:
        # The teacher as a whole when it was evaluated; a tap finds its modules all the same.
        assert compiled[0] == "UNet"
        assert set(compiled[1:]) == {"Sequential", "Conv2d"}
        assert len(compiled) > 5
    elif compiled:
        assert compiled == ["UNet", "UNet"]
    assert not any("forward" in vars(m) for m in outcome.models["distilled"].modules())
    weight = dict(outcome.models["distilled"].named_parameters())["encoder.1.0.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) == bool(
        scale.get("channels_last")
    )
    one, two = (exported(run, "distilled") for run in (plain.run, other.run))
    assert one.keys() == two.keys(), "names of weights stay as they are"
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_fifo_among_the_files(
    tmp_path: Path, kind: str, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether files are read before training or not: a message, and nobody waits for a writer."""
    path = write_config(tmp_path)
    name = tmp_path / "pictures" / kind / "p3.png"
    name.unlink()
    os.mkfifo(name)
    for check in ("True", "False"):
        options = ["--data.check", check, "--data.workers", workers, "--optim.batch-size", "8"]
        assert main([str(path), *options]) == 1
        assert f"{name}: got a FIFO, expected a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["unet", "segformer"])
@pytest.mark.parametrize("key", ["weights", "init"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "folder/config.json"])
def test_a_fifo_as_weights(
    tmp_path: Path, key: str, name: str, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    (tmp_path / "folder").mkdir()
    fifo = tmp_path / name
    os.mkfifo(fifo)
    given = fifo.parent if "folder" in name else fifo
    options = ["--student.arch", arch, "--teacher.tap", "None", f"--student.{key}", str(given)]
    if arch == "segformer":
        options += ["--student.kwargs", "{ depths = [1, 1, 1, 1], hidden_sizes = [8, 8, 8, 8] }"]
    assert main([str(path), "--student.tap", "None", *options]) == 1
    message = "holds no weights" if "folder" in name and arch == "unet" else "a regular file"
    assert message in capsys.readouterr().err


WIDTH = '{"width": 1000000}'
ABSURD = {
    "width": (["--student.kwargs", WIDTH], "its weights would take"),
    "levels": (["--student.kwargs", '{"levels": 40}'], "arch 'unet'"),
    "hidden": (
        [
            "--student.arch",
            "segformer",
            "--student.tap",
            "encoder",
            "--student.kwargs",
            "{ hidden_sizes = [1000000, 1000000, 1000000, 1000000] }",
        ],
        "its weights would take",
    ),
    "crop": (["--data.crop", "32768"], "would take"),
    "batch": (["--optim.batch-size", "1000000000"], "would take"),
    "resize": (["--data.resize", "32768", "32768"], "would take"),
    "device": (["--device", "meta"], "cannot be used here"),
    "number of a device": (["--device", "cuda:99999999999999"], "cannot be used here"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_sizes_that_no_machine_has(
    tmp_path: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before they take the memory."""
    monkeypatch.setattr(memory, "memory_size", lambda: 8e9)
    options, expected = ABSURD[case]
    path = write_config(tmp_path)
    assert main([str(path), *options]) in (1, 2)
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert 1e8 < memory.memory_size() < 1e15

    def take(_: Any) -> None:
        torch.empty(1 << 62, dtype=torch.uint8)

    def none(_: Any) -> None:
        raise MemoryError

    def other(_: Any) -> None:
        raise RuntimeError("something else")

    for job in (take, none):
        assert command("name", job) == 1
        assert "name: memory ran out" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="something else"):
        command("name", other)


NET = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, num_classes):\n"
NET += "        super().__init__(nn.Conv2d(3, num_classes, 1))\n"
LINEAR = "from torch import nn\ndef Net(num_classes):\n    return nn.Linear(3, 3)\n"
MODULES = {
    NET: "",
    "1 / 0\n": "ZeroDivisionError: division by zero",
    "Net = (\n": "SyntaxError",
    "import nothing_of_this_name\n": "No module named 'nothing_of_this_name'",
    "def Net(num_classes):\n    return {}[num_classes]\n": "KeyError: 3",
    LINEAR: "Linear cannot take an image of 32 x 32 pixels",
}


def test_modules_in_the_working_directory(tmp_path: Path) -> None:
    """With the path of a console script, which has its own folder in the place of this one."""
    path = write_config(tmp_path, steps=1)
    for index, text in enumerate(MODULES):
        (tmp_path / f"mynet{index}.py").write_text(text, encoding="utf-8")
    options = [str(path), "--teacher.tap", "None", "--stages", "alone"]
    code = f"""if True:
        import sys
        sys.path.remove("")
        from heteroakd_fast.train.cli import main
        for index in range({len(MODULES)}):
            code = main([*sys.argv[1:], "--student.arch", f"mynet{{index}}:Net"])
            print(f"= {{code}}", file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    printed = done.stderr.split("= ")
    for index, expected in enumerate(MODULES.values()):
        assert expected in printed[index]
        assert printed[index + 1][0] == ("1" if expected else "0"), printed[index]
