"""The other processes of a run: who they are, what they agree on, and what happens when one dies.

Started by torchrun, which sets the environment; without it a run is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, TrainingError, UserError

T = TypeVar("T")

# What a collective says when its other end is gone, in the words of gloo and NCCL.
_SIGNS = ("gloo", "NCCL", "Connection ", "Broken pipe", "Timed out waiting", "Socket")


@dataclass(frozen=True)
class World:
    """The ranks of a run. In a world of one, everything here costs nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None
    """A group of its own on the CPU: what is agreed here waits for no device."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0

    @property
    def process_group(self) -> Any:
        """What the losses normalise over."""
        return dist.group.WORLD if self.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: T | None) -> T:
        """The value of rank 0."""
        if self.size == 1:
            assert value is not None
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]  # type: ignore[no-any-return]

    def largest(self, value: int) -> int:
        """The largest value of any rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on the CPU."""
        tensor = tensor.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(tensor, group=self.control)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, on the tensor's device."""
        return (self.total(tensor) / self.size).to(tensor.device) if self.size > 1 else tensor

    def on_main(self, action: Callable[[], T]) -> T:
        """Let rank 0 do something and have its result everywhere; its error, too."""
        result: T | None = None
        error: Exception | None = None
        if self.main:
            try:
                result = action()
            except (UserError, OSError) as caught:
                error = caught
        if self.size > 1:
            said, result = self.from_main((str(error) if error else None, result))
            if said and not self.main:
                raise TrainingError(f"rank 0 could not go on: {said}")
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def on_main_first(self, action: Callable[[], T]) -> T:
        """Every rank does it, the others when rank 0 is done; its error is everybody's."""
        results: list[T] = []
        self.on_main(lambda: results.append(action()))
        return results[0] if results else action()


#: A run without torchrun.
ALONE = World()


@contextmanager
def connect(device: str, timeout: float) -> Iterator[World]:
    """Meet the other ranks, if torchrun started any.

    Raises:
        ConfigError: the environment names several ranks, but not how to reach them.
        TrainingError: another rank was lost on the way.
    """
    size = _number("WORLD_SIZE", "1")
    if size == 1:
        yield ALONE
        return
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; "
            "start several ranks with torchrun"
        )
    rank, local_rank, _ = _number("RANK"), _number("LOCAL_RANK"), _number("MASTER_PORT")
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    with _answering(rank, timeout):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout)
        )
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        yield World(rank, size, local_rank, control)
    # Not after an error: with a dead rank the farewell itself would wait.
    dist.destroy_process_group()


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name} is {text!r} in the environment, expected a number; start several ranks with "
            "torchrun, or unset WORLD_SIZE"
        ) from None


@contextmanager
def _answering(rank: int, timeout: float) -> Iterator[None]:
    """Say in plain words that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in text for sign in _SIGNS):
            raise
        raise TrainingError(
            f"rank {rank} lost another rank, which ended or did not answer for {timeout:g} s "
            f"({text.strip().splitlines()[0][:160]}). What that rank printed says why. "
            "Checkpoints are intact: the same command goes on from the last one"
        ) from None
