"""Times of forward and backward, all providers of a case interleaved: A B C A B C ...

    python -m benchmarks.timing JOB [--start N]     JOB as `Job.to_json` writes it

It runs as a worker (`stages.go_through`) in a process of its own: malloc is configured by the
environment, and a case that dies of memory must not take the results of the others along.

Every case is visited more than once, at different moments of the run, so that the spread of the
samples holds what a second run would see of a machine's moods.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .inputs import Inputs, make_inputs
from .memory import high_water
from .oracle import errors_of, truth_of
from .providers import Forward, Provider, find
from .stages import Details, Item, go_through

__all__ = ["TOLERANCES", "Job", "Timed", "elapsed_ms", "items", "step"]

#: Largest relative error (loss, gradient) that still counts as the same result, by dtype. Far
#: above what arithmetic explains, far below what a different formula gives.
TOLERANCES = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-4),
    "bfloat16": (2e-2, 2e-2),
    "float16": (1e-2, 1e-2),
}
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Job:
    """What one timing process does."""

    cases: list[Case]
    providers: dict[str, list[str]]
    """case key -> names of the providers to time"""
    device: str = "cpu"
    visits: int = 2
    rounds: int = 5
    """At most, in each visit"""
    seconds: float = 3.0
    """For the rounds of one case in one visit; at least three rounds are run"""
    deadline: float = 0.0
    """`time.time()` after which no further case is begun; 0: none"""

    def to_json(self) -> str:
        return json.dumps({**vars(self), "cases": [case.fields() for case in self.cases]})

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        values["cases"] = [Case(**fields) for fields in values["cases"]]
        return cls(**values)


@dataclass
class Timed:
    """One provider on one case: the samples of one visit, or of all."""

    provider: str
    cannot: str = ""
    loss_error: float | None = None
    """None, like the other error, in a visit that did not look"""
    grad_error: float | None = None
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    graph_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    """Above the inputs; on a GPU"""


def items(job: Job) -> list[Item]:
    """Every case, and all of them again; each finds {"rows": [fields of `Timed`, ...]}."""
    refused: dict[tuple[str, str], str] = {}

    def visit(case: Case, first: bool) -> Details:
        if job.deadline and time.time() > job.deadline:
            return {"skipped": "the run's time was over"}
        timed = {name: Timed(name, refused.get((case.key, name), ""))
                 for name in job.providers[case.key]}  # fmt: skip
        _visit(case, timed, job, check=first)
        refused.update({(case.key, name): one.cannot for name, one in timed.items()})
        gc.collect()
        return {"rows": [vars(one) for one in timed.values()]}

    return [(case.key, partial(visit, case, number == 0))
            for number in range(job.visits) for case in job.cases]  # fmt: skip


def _visit(case: Case, timed: dict[str, Timed], job: Job, check: bool) -> None:
    known = find()
    sets = _input_sets(case, job.device)
    truth = truth_of(case, sets[0]) if check else None
    running: list[tuple[Timed, list[Forward]]] = []
    for name, one in timed.items():
        one.cannot = one.cannot or known[name].cannot(case, job.device) or ""
        if one.cannot:
            continue
        try:
            forwards = _built(known[name], case, sets)
            if truth is not None:
                one.loss_error, one.grad_error = errors_of(
                    truth, step(forwards[0], sets[0]), sets[0]
                )
                allowed = TOLERANCES[case.dtype]
                if not (one.loss_error <= allowed[0] and one.grad_error <= allowed[1]):
                    one.cannot = (
                        f"differs from the oracle: loss {one.loss_error:.1e}, "
                        f"gradient {one.grad_error:.1e}"
                    )
                    continue
                if job.device != "cpu":
                    _clear(sets[0])
                    one.peak_bytes = high_water(partial(step, forwards[0], sets[0]), job.device)
        except Exception as error:  # a peer may raise anything; the others go on
            one.cannot = first_line(error)
            continue
        running.append((one, forwards))
    del truth
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(job.rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() - started > job.seconds:
                break
            for one, forwards in running:
                which = turn % len(sets)
                forward_ms, backward_ms = elapsed_ms(forwards[which], sets[which], job.device)
                one.forward_ms.append(forward_ms)
                one.backward_ms.append(backward_ms)
    finally:
        gc.enable()
    if job.device != "cpu" and case.target.models is None:
        for one, forwards in running:
            one.graph_ms = _graph_ms(forwards, sets, job.rounds)


def _built(provider: Provider, case: Case, sets: list[Inputs]) -> list[Forward]:
    """Its functions of all inputs, each warmed up."""
    forwards = [provider.build(case, inputs) for inputs in sets]
    for inputs, forward in zip(sets, forwards, strict=True):
        step(forward, inputs)
    return forwards


def _input_sets(case: Case, device: str) -> list[Inputs]:
    """On a GPU as many sets as it takes to run out of the second-level cache before one comes
    round again. On a CPU the baselines between two calls have swept the caches already."""
    first = make_inputs(case, device)
    if device == "cpu" or case.target.models:
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(6, 2 * cache // max(first.bytes(), 1) + 2)
    return [first, *(make_inputs(case, device, seed) for seed in range(1, count))]


def first_line(error: BaseException) -> str:
    """What to tell of an error in a table."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def _clear(inputs: Inputs) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None


def _backward(loss: Tensor, inputs: Inputs) -> None:
    """Nothing of an evaluation, whose result is integers."""
    if not loss.is_floating_point():
        return
    loss.backward(torch.full_like(loss, inputs.loss_scale))  # type: ignore[no-untyped-call]


def step(forward: Forward, inputs: Inputs) -> Tensor:
    """Forward and backward; the loss."""
    _clear(inputs)
    loss = forward()
    _backward(loss, inputs)
    return loss


class _Moment:
    """An event of a CPU, with the methods of `torch.cuda.Event`."""

    def record(self) -> None:
        self.at = time.perf_counter_ns()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: _Moment) -> float:
        return (other.at - self.at) / 1e6


def _moments(device: str, number: int) -> list[Any]:
    if device == "cpu":
        return [_Moment() for _ in range(number)]
    torch.cuda.synchronize()
    return [torch.cuda.Event(enable_timing=True) for _ in range(number)]


def elapsed_ms(forward: Forward, inputs: Inputs, device: str) -> tuple[float, float]:
    """Milliseconds of one forward and of its backward."""
    _clear(inputs)
    start, middle, end = _moments(device, 3)
    start.record()
    loss = forward()
    middle.record()
    _backward(loss, inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(middle), middle.elapsed_time(end)


def _capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, loads modules, sizes workspaces: not while capturing
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _graph_ms(forwards: list[Forward], sets: list[Inputs], rounds: int) -> list[float]:
    """Forward and backward replayed from CUDA graphs: the device's time without the host's; nothing
    where a provider cannot be captured."""
    try:
        graphs = [_capture(partial(step, forward, inputs))
                  for forward, inputs in zip(forwards, sets, strict=True)]  # fmt: skip
    except Exception:
        return []
    found = []
    for turn in range(rounds + 1):
        start, end = _moments("cuda", 2)
        start.record()
        graphs[turn % len(graphs)].replay()
        end.record()
        end.synchronize()
        if turn:  # the first replay uploads the graph
            found.append(start.elapsed_time(end))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timing")
    parser.add_argument("job")
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args(arguments)
    go_through(items(Job.from_json(options.job)), options.start)


if __name__ == "__main__":
    main()
