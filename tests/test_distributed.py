"""Global denominators: R ranks give exactly the gradient of one rank on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import TERM_CASES, Batch, evaluate, make_batch

from heteroakd_fast import HeteroAKDLoss

CASES = ["ce", "ce-smoothed", "hetero-softmax-kl", "hetero-paper", "hetero-paper-space", "all"]
WEIGHT = torch.tensor([0.2, 1.0, 2.0, 0.7, 1.3], dtype=torch.float64)
WORLD = 2


def whole_batch() -> Batch:
    batch = make_batch(batch=4)
    batch.target[0, :9] = 255  # rank 0 sees fewer valid pixels
    batch.target[1] = 255  # and an image without any
    return batch


def features() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "student_features": torch.randn(4, 7, 4, 4, generator=generator),
        "teacher_features": torch.randn(4, 9, 3, 3, generator=generator),
    }


def make_loss(process_group: Any = None) -> HeteroAKDLoss:
    torch.manual_seed(3)
    return HeteroAKDLoss(
        5, 7, 9, class_weight=WEIGHT.tolist(), process_group=process_group, projector="linear"
    ).double()


def rank_main(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD
    )
    rows = slice(2 * rank, 2 * rank + 2)
    part = Batch(*(tensor[rows] for tensor in whole_batch()))
    results: dict[str, Any] = {}
    for case in CASES:
        result = evaluate(
            part, class_weight=WEIGHT, process_group=dist.group.WORLD, **TERM_CASES[case]
        )
        results[case] = (result.loss, result.student_grad)

    loss = torch.nn.parallel.DistributedDataParallel(make_loss(dist.group.WORLD))
    collectives = 0
    original = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal collectives
        collectives += 1
        return original(*args, **kwargs)

    dist.all_reduce = counting
    output = loss(
        part.student,
        part.target,
        teacher_logits=part.teacher,
        **{name: tensor[rows] for name, tensor in features().items()},
    )
    dist.all_reduce = original
    output.loss.backward()
    results["module"] = (
        output.loss.detach(),
        [parameter.grad for parameter in loss.module.parameters()],
    )
    results["collectives"] = collectives
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    mp.start_processes(rank_main, args=(str(directory),), nprocs=WORLD, start_method="spawn")
    return [torch.load(Path(directory) / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_whole_batchs_gradient(ranks: list[dict[str, Any]], case: str) -> None:
    expected = evaluate(whole_batch(), class_weight=WEIGHT, **TERM_CASES[case])
    losses = torch.stack([rank[case][0] for rank in ranks])
    torch.testing.assert_close(losses.mean(), expected.loss)
    # data-parallel training averages over the ranks; a rank's logits get no other rank's share
    grads = torch.cat([rank[case][1] for rank in ranks]) / WORLD
    assert expected.student_grad is not None
    torch.testing.assert_close(grads, expected.student_grad, rtol=1e-10, atol=1e-14)
    naive = evaluate(
        Batch(*(t[:2] for t in whole_batch())), class_weight=WEIGHT, **TERM_CASES[case]
    )
    assert naive.student_grad is not None
    assert not torch.allclose(naive.student_grad / WORLD, expected.student_grad[:2], rtol=1e-3), (
        "the ranks should differ, or the test proves nothing"
    )


def test_module_under_ddp_gives_the_whole_batchs_gradient(ranks: list[dict[str, Any]]) -> None:
    batch = whole_batch()
    loss = make_loss()
    output = loss(batch.student, batch.target, teacher_logits=batch.teacher, **features())
    output.loss.backward()
    for rank in ranks:
        for got, parameter in zip(rank["module"][1], loss.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-14)
    assert ranks[0]["collectives"] == 1, "all denominators travel in one all-reduce"
