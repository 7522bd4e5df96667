"""Ranks and micro-batches take the step of one rank on the whole batch; what a lost rank leaves."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch import Tensor, nn
from train_helpers import (
    CPU,
    changed,
    distilling,
    environment,
    exported,
    plain,
    same_weights,
    weights_of,
    write_config,
)
from train_helpers import trainer as make_trainer

from heteroakd_fast.train import pipeline
from heteroakd_fast.train.config import Config, ModelConfig
from heteroakd_fast.train.datasets.images import SegmentationData
from heteroakd_fast.train.distributed import ALONE, World, connect
from heteroakd_fast.train.errors import ConfigError, TrainingError
from heteroakd_fast.train.models import UNet, build_model
from heteroakd_fast.train.parallel import Parallel, sharded_blocks
from heteroakd_fast.train.reading import load_config

WORLD = 2
SIDE = (32, 32)


class Net(nn.Module):
    """In float64, so that only the order of sums can differ; without batch statistics."""

    spoilt = False
    """Whether gradients are infinite behind a loss that is not, on this rank."""

    def __init__(self, num_classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Conv2d(8, num_classes, 1)
        self.spare = nn.Linear(3, 3)  # which no loss reaches, as in many published models
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.stem(images.double())).relu())
        if self.spoilt and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * math.inf)
        return logits


def network(case: str) -> nn.Module:
    """The student of a case, with equal weights at each call."""
    return Net(3, 1) if "arch" not in CASES[case] else segformer()


def segformer() -> nn.Module:
    """As `Net`: in float64, without batch statistics or anything random."""
    kwargs = {
        **{"depths": [1] * 4, "num_attention_heads": [1] * 4, "drop_path_rate": 0.0},
        **{"hidden_sizes": [8] * 4, "decoder_hidden_size": 8, "classifier_dropout_prob": 0.0},
    }
    model: Any = build_model(ModelConfig(arch="segformer", kwargs=kwargs, steps=1), 3, seed=1)
    model.decode_head.batch_norm = nn.GroupNorm(2, 8)
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model.double()  # type: ignore[no-any-return]


class Noise:
    """Pictures of which very different shares are labelled: naive means would be wrong."""

    def __init__(self, unlabelled: int | None = None) -> None:
        self.unlabelled = unlabelled

    def __len__(self) -> int:
        return 8

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 255, (*SIDE, 3)).astype(np.uint8)
        mask = rng.integers(0, 3, SIDE)
        mask[rng.random(SIDE) < (index % 4) / 3] = 255
        if self.unlabelled is not None:
            mask[rng.random(SIDE) < (index % 3) / 3] = self.unlabelled
        return picture, mask

    def name(self, index: int) -> str:
        return f"noise {index}"


DATA = SegmentationData(Noise(), Noise(), ("a", "b", "c"), ((0, 0, 0),) * 3, 255)
PARTLY = dataclasses.replace(DATA, train=Noise(254), val=Noise(254))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-accumulated": {"accumulate": 2},
    "plain-weighted": {"accumulate": 2, "loss": {"class_weight": (1.0, 3.0, 0.5)}},
    "distilled": {"distil": True},
    "distilled-weighted": {"distil": True, "accumulate": 2}
    | {"loss": {"class_weight": (1.0, 3.0, 0.5), "resolution": "logits", "kd_divergence": "js"}},
    "distilled-accumulated": {"distil": True, "accumulate": 2, "loss": {"cwd_weight": 2.0}},
    "unlabelled": {"distil": True, "accumulate": 2, "data": PARTLY}
    | {"loss": {"unlabelled_index": 254, "hetero_weight": 0.0, "feature_weight": 0.5}},
    "unlabelled-plain": {"accumulate": 2, "data": PARTLY, "loss": {"unlabelled_index": 254}},
    "projected-accumulated": {"distil": True, "accumulate": 2, "taps": ("norm", "norm")},
    "paper": {"distil": True, "loss": {"preset": "paper"}},
    "sharded": {"distil": True, "parallel": "fsdp"},
    "sharded-accumulated": {"distil": True, "parallel": "fsdp", "accumulate": 2},
    "sharded-projected": {"distil": True, "parallel": "fsdp", "taps": ("norm", "norm")},
    "sharded-segformer": {"distil": True, "parallel": "fsdp", "accumulate": 2}
    | {"arch": "segformer", "taps": ("segformer.stages.1", "norm")}
    | {"head": "decode_head.classifier"},
}


def configure(run: Path, case: str, batch_size: int = 4) -> Config:
    options = CASES[case]
    base = load_config("landcover")
    optim = {"name": "sgd", "batch_size": batch_size, "warmup_steps": 0, "grad_clip": 3.0}
    return changed(
        base,
        run=run,
        data={"augment": "flip", "labelled": None, "labelled_per_batch": None},
        optim={**optim, "accumulate": options.get("accumulate", 1)},
        student={"lr": 0.5},
        distill={"kd_weight": 0.7, **options.get("loss", {})},
        scale={"parallel": options.get("parallel", "ddp")},
        log={"every": 2, "tensorboard": False},
    )


def train(
    run: Path, case: str, world: World, steps: int = 3, config: Config | None = None
) -> dict[str, Tensor]:
    """Weights after a few steps."""
    options = CASES[case]
    config = config or configure(run, case)
    objective: Any = plain(network(case), config)
    if options.get("distil"):
        teacher, taps = Net(3, 2).eval(), options.get("taps")
        objective = distilling(network(case), teacher, config.distill, taps=taps).double()
    objective.process_group = world.process_group
    folder = run / f"{case}-{world.size}"
    more: dict[str, Any] = {"folder": folder, "fingerprint": {}, "steps": steps, "world": world}
    result = make_trainer(config, options.get("data", DATA), objective, **more).run()
    return weights_of(objective) | {"miou": torch.tensor(result.scores.miou)}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": Path(folder, "port").read_text(),
    }
    results: dict[str, Any] = {}
    with connect("cpu", 60.0) as world:
        for case in CASES:
            results[case] = train(Path(folder), case, world)
        # What two ranks begin is finished by one (in the test), and the other way round.
        results["went on"] = train(Path(folder) / "handed", "sharded", world, steps=2)
        begun = Path(folder) / "begun"
        world.on_main(lambda: train(begun, "sharded", ALONE, steps=2))
        world.on_main(lambda: (begun / "sharded-1").rename(begun / "sharded-2"))
        results["taken up"] = train(begun, "sharded", world, steps=3)
        try:
            world.on_main(_fail)
        except TrainingError as error:
            results["error"] = str(error)
        Net.spoilt = rank == 1
        for case in ("plain", "sharded"):
            try:
                train(Path(folder) / "spoilt", case, world)
            except TrainingError as error:
                results[f"spoilt {case}"] = str(error)
        results["largest"] = world.largest(7 * (rank == 1))
    torch.save(results, f"{folder}/rank{rank}.pt")


def _fail() -> None:
    raise TrainingError("no room")


def free_port() -> int:
    import socket

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "port").write_text(str(free_port()))
    mp.start_processes(rank_main, args=(str(folder),), nprocs=WORLD, start_method="spawn")
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_take_the_step_of_one_rank(
    ranks: tuple[Path, list[dict[str, Any]]], case: str, tmp_path: Path
) -> None:
    whole = configure(tmp_path, case)
    whole = changed(whole, optim={"accumulate": 1})
    expected = train(tmp_path, case, ALONE, config=whole)
    weight = CASES[case].get("head", "head") + ".weight"
    moved = expected[f"model.{weight}"] - network(case).state_dict()[weight]
    assert moved.abs().max() > 0.03
    for results in ranks[1]:
        got = results[case]
        assert got.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-6, atol=1e-9, msg=key)
    logs = [logged(ranks[0] / f"{case}-{WORLD}"), logged(tmp_path / f"{case}-1")]
    assert len(logs[0]) == len(logs[1]) == 2
    for got, wanted in zip(*logs, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)  # in float32


def logged(folder: Path) -> list[dict[str, float]]:
    """The terms of every line about training."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    left_out = {"kind", "seconds", "wait"}
    return [
        {name: value for name, value in line.items() if name not in left_out}
        for line in lines
        if line["kind"] == "train"
    ]


@pytest.mark.parametrize(
    "case", ["plain-accumulated", "distilled-accumulated", "unlabelled", "unlabelled-plain"]
)
def test_accumulation_alone_is_exact_and_its_naive_kin_is_not(case: str, tmp_path: Path) -> None:
    config = configure(tmp_path, case)
    whole = changed(config, optim={"accumulate": 1})
    expected = train(tmp_path / "whole", case, ALONE, config=whole)
    got = train(tmp_path / "parts", case, ALONE, config=config)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-6, atol=1e-9)
    from heteroakd_fast.train import engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Trainer, "_rehearse", lambda _, parts: (None, [None] * len(parts)))
        patch.setattr(engine.Trainer, "_valid_pixels", lambda *_: None)
        naive = train(tmp_path / "naive", case, ALONE, config=config)
    difference = (naive["model.head.weight"] - expected["model.head.weight"]).abs().max()
    assert difference > 1e-3, "the pictures should differ, or the test proves nothing"


def test_ranks_agree(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = ranks
    assert first["error"] == "no room"
    assert second["error"] == "rank 0 could not go on: no room"
    assert first["largest"] == second["largest"] == 7


@pytest.mark.parametrize("case", ["plain", "sharded"])
def test_ranks_stop_together_where_the_gradient_of_one_is_not_finite(
    ranks: tuple[Path, list[dict[str, Any]]], case: str
) -> None:
    folder, (first, second) = ranks
    assert first[f"spoilt {case}"] == second[f"spoilt {case}"]
    message = first[f"spoilt {case}"]
    assert message.startswith("alone: the gradient of step 1 is not finite: norm ")
    assert "model.stem.weight" in message
    assert len(re.findall(r"noise \d", message)) == 4
    assert not list((folder / "spoilt").rglob("*.ckpt"))


def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Two steps on two ranks (sharded), the third on one; and two on one, the third on two."""
    folder = ranks[0] / "handed"
    (folder / "sharded-2").rename(folder / "sharded-1")
    finished = train(folder, "sharded", ALONE, steps=3)
    # The schedule knows its end, so the whole run takes the same two steps of two first.
    begun = train(tmp_path, "sharded", ALONE, steps=2)
    for key, value in ranks[1][0]["went on"].items():
        torch.testing.assert_close(begun[key], value, rtol=1e-6, atol=1e-9)
    expected = train(tmp_path, "sharded", ALONE, steps=3)
    moved = expected["model.head.weight"] - begun["model.head.weight"]
    assert moved.abs().max() > 0.01
    for results in (finished, ranks[1][0]["taken up"], ranks[1][1]["taken up"]):
        for key in expected:
            torch.testing.assert_close(results[key], expected[key], rtol=1e-6, atol=1e-9)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    config = configure(Path("nowhere"), "plain-accumulated", batch_size=6)
    with pytest.raises(ConfigError, match=r"batch_size is 6, which 2 ranks times.*multiple of 4"):
        pipeline.check_shares(config, World(size=2))
    pipeline.check_shares(config, ALONE)


def test_synchronised_batch_norm_needs_gpus() -> None:
    from heteroakd_fast.train.parallel import synchronise_batch_norms

    scale = load_config().scale.model_copy(update={"sync_bn": True})
    with pytest.raises(ConfigError, match="scale.sync_bn.*GPUs only"):
        synchronise_batch_norms(nn.BatchNorm2d(3), scale, World(size=2), CPU)
    module = nn.Sequential(nn.BatchNorm2d(3))
    converted = synchronise_batch_norms(module, scale, World(size=2), torch.device("cuda"))
    assert isinstance(converted[0], nn.SyncBatchNorm)  # type: ignore[index]
    module = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronise_batch_norms(module, scale, ALONE, CPU) is module


def test_blocks_of_a_wrapped_network_are_sharded_one_by_one() -> None:
    wrapped = nn.Sequential(nn.Identity(), segformer())
    assert [type(block).__name__ for block in sharded_blocks(wrapped)] == ["SegformerStage"] * 4
    assert sharded_blocks(Net(3, 1)) == []


def test_without_torchrun_several_ranks_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK.*torchrun"), connect("cpu", 1.0):
        pass
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(ConfigError, match="WORLD_SIZE is ''"), connect("cpu", 1.0):
        pass


def test_compiled_tap_after_a_compiled_network_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two students are of one class, and the first one has no tap."""
    # The code generator would take its time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config = configure(tmp_path, "plain")
    scale = config.scale.model_copy(update={"compile": True})
    student, teacher = UNet(3, width=4, levels=2), UNet(3, width=6, levels=2).eval()
    objectives = [
        plain(UNet(3, width=4, levels=2), config),
        distilling(student, teacher, config.distill, taps=("decoder.0", "decoder.0")),
    ]
    images, target = torch.randn(2, 3, *SIDE), torch.zeros(2, *SIDE, dtype=torch.int64)
    for objective in objectives:
        parallel = Parallel(objective, scale, world=ALONE, side=SIDE, device=CPU)
        parallel.module.train()
        assert parallel.module(images, target).loss.isfinite()


# --- the command under torchrun ----------------------------------------------------------------


def torchrun(config: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)),
            # "--": torchrun takes the driver's options for abbreviations of its own.
            *("--master-port", str(free_port()), "-m", "--", "heteroakd_fast.train"),
            *(str(config), "--run", str(config.with_suffix("")), "--scale.timeout", "30"),
        ],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def rank_of(pid: int) -> str:
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"RANK="):
            return entry[5:].decode()
    return ""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at /proc")
def test_a_killed_rank_is_reported_and_the_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    calm = write_config(tmp_path, steps=12, run="calm")
    process = torchrun(calm)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert printed.count("Written: ") == 1, "one rank talks"

    killed = write_config(tmp_path, steps=12, run="killed")
    process = torchrun(killed)
    log = tmp_path / "killed" / "teacher" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if log.exists() and '"step": 6,' in log.read_text():
            victim = next(pid for pid in children(process) if rank_of(pid) == "1")
            os.kill(victim, signal.SIGKILL)
            break
        time.sleep(0.002)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    # Beyond, torchrun itself reports what ended how.
    assert "Traceback" not in printed.split("failed (exitcode")[0], printed
    assert "Signal 9 (SIGKILL)" in printed
    process = torchrun(killed)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert "going on at step" in printed
    for stage in ("teacher", "alone", "distilled"):
        same_weights(*(exported(tmp_path / run, stage) for run in ("calm", "killed")))


def test_a_rehearsal_leaves_no_trace() -> None:
    """Running statistics and random states come back, and the real pass draws the same masks."""
    from heteroakd_fast.train.parallel import rehearsal

    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    images = torch.randn(2, 3, 8, 8)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with rehearsal(module, CPU):
        seen = module(images)
        assert not seen.requires_grad
        assert not torch.equal(module[1].running_mean, before["1.running_mean"])  # type: ignore[arg-type, union-attr]
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(module(images), seen)
