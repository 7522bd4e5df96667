"""Two processes, under each library's own data parallelism, give one process's gradient."""

from __future__ import annotations

import copy
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset

for library in ("lightning", "accelerate", "transformers"):
    pytest.importorskip(library, reason=f"needs {library}: pip install {library}")

WORLD = 2
LR = 0.1


def with_lightning(rank: int, folder: str) -> Any:
    import lightning.pytorch as lightning
    from test_lightning import QUIET

    from heteroakd_fast.integrations.lightning import DistillationModule

    student, teacher = tiny.models()
    module = DistillationModule(
        student,
        teacher,
        tiny.make_loss(True),
        partial(torch.optim.SGD, lr=LR),
        features=tiny.FEATURES,
    )
    # The sampler deals out images in turn.
    data = DataLoader(TensorDataset(*tiny.data()), batch_size=4)
    trainer = lightning.Trainer(max_epochs=1, strategy="ddp", devices=WORLD, **QUIET)
    trainer.fit(module, data)
    (metrics,) = trainer.validate(module, data, verbose=False)
    metrics = {name.removeprefix("val/"): value for name, value in metrics.items()}
    return module.student.state_dict(), module.loss.state_dict(), metrics


def with_transformers(rank: int, folder: str) -> Any:
    from test_transformers import InOrder, arguments, dataset

    (student, teacher), loss = tiny.models(), tiny.make_loss(True, hetero_weight=0.0)
    trainer = InOrder(
        student,
        arguments(
            Path(folder), gradient_accumulation_steps=2, max_steps=1, per_device_eval_batch_size=2
        ),
        train_dataset=dataset(),
        eval_dataset=dataset()[:7],  # the last batch is filled up with a copy
        teacher=teacher,
        loss=loss,
        features=tiny.FEATURES,
    )
    trainer.train()
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return student.state_dict(), loss.state_dict(), metrics


def with_accelerate(rank: int, folder: str) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    (student, teacher), loss = tiny.models(), tiny.make_loss(True)
    loss.process_group = torch.distributed.group.WORLD
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=LR)
    data = DataLoader(TensorDataset(*tiny.data()), batch_size=4)
    wrapped, wrapped_loss, optimizer, data = accelerator.prepare(student, loss, optimizer, data)
    for images, target in data:
        seen: dict[str, torch.Tensor] = {}
        hook = student.body.register_forward_hook(
            lambda *a, seen=seen: seen.update(student_features=a[-1])
        )
        logits = wrapped(images)["logits"]
        hook.remove()
        with torch.no_grad():
            taught = {
                "teacher_logits": teacher(images)["logits"],
                "teacher_features": teacher.body(images),
            }
        accelerator.backward(wrapped_loss(logits, target, **seen, **taught).loss)
        optimizer.step()
    return student.state_dict(), loss.state_dict(), {}


#: Lightning last: it leaves its process group to nobody.
LIBRARIES = {
    "accelerate": with_accelerate,
    "transformers": with_transformers,
    "lightning": with_lightning,
}


def rank_main(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    results = {name: train(rank, f"{folder}/{name}") for name, train in LIBRARIES.items()}
    torch.save(results, f"{folder}/rank{rank}.pt")


def test_two_processes_are_one(tmp_path: Path) -> None:
    """One test, because starting the processes takes most of its time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, args=(str(tmp_path), port), nprocs=WORLD, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    images, target = tiny.data()
    for library in LIBRARIES:
        options = {"hetero_weight": 0.0} if library == "transformers" else {}
        (student, teacher), loss = tiny.models(), tiny.make_loss(True, **options)
        start = copy.deepcopy((student, loss))

        def whole(one: Any = student, two: Any = teacher, of: Any = loss) -> torch.Tensor:
            return tiny.plain_loss(one, two, of, images, target).loss

        tiny.plain_steps([*student.parameters(), *loss.parameters()], [whole], LR)
        for rank in ranks:
            *states, metrics = rank[library]
            for state, wanted, before in zip(states, (student, loss), start, strict=True):
                got = copy.deepcopy(before)
                got.load_state_dict(state)
                tiny.same_parameters(got, wanted, before, library)
            if not metrics:
                continue
            count = 7 if library == "transformers" else 8
            evaluated = tiny.mean_iou(student, images[:count], target[:count])
            assert metrics["miou"] == pytest.approx(evaluated, rel=1e-5), library
            # The mean over images of the batches' means. In the Trainer's last batch is a copy of
            # image 0, which is part of the batch's mean and no image that counts.
            batches = {(0, 2, 4, 6): 4, (1, 3, 5, 7): 4}
            if library == "transformers":
                batches = {(0, 1): 2, (2, 3): 2, (4, 5): 2, (6, 0): 1}
            expected = 0.0
            for rows, images_of_it in batches.items():
                with torch.no_grad():
                    picked = images[list(rows)], target[list(rows)]
                    plain = tiny.plain_loss(student, teacher, loss, *picked)
                expected += images_of_it * float(plain.ce) / count
            assert metrics["ce"] == pytest.approx(expected, rel=1e-5), library
