"""Times of forward and backward, all providers of a case interleaved: A B C A B C ...

    python -m benchmarks.timing JOB.json     reads a job, prints one JSON object a line

It runs as a process of its own: malloc is configured by the environment, and a case that dies of
memory must not take the results of the others along.

Every case is visited more than once, at different moments of the run, so that the spread of the
samples holds what a second run would see of a machine's moods.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .inputs import Inputs, make_inputs
from .memory import gpu_high_water
from .oracle import errors_of, truth_of
from .providers import Forward, Provider, find

__all__ = ["Job", "run_job", "time_cases"]

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
    threads: int = 0
    """0: as many as there are cores"""
    visits: int = 2
    rounds: int = 5
    """At most, in each visit"""
    seconds: float = 4.0
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
    """One provider on one case."""

    provider: Provider
    cannot: str | None = None
    loss_error: float = 0.0
    grad_error: float = 0.0
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    graph_ms: list[float] = field(default_factory=list)
    graph_cannot: str | None = None
    peak_bytes: int | None = None
    """Above the inputs; on a GPU"""

    def row(self, case: Case) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "provider"}
        return {"case": case.key, "provider": self.provider.name, **values}


def time_cases(job: Job, announce: Callable[[dict[str, Any]], None]) -> None:
    """Announces `{"row": ...}` for each provider of each case, after the last visit."""
    if job.threads:
        torch.set_num_threads(job.threads)
    providers = find()
    timed: dict[str, list[Timed]] = {}
    for visit in range(job.visits):
        for case in job.cases:
            if job.deadline and time.time() > job.deadline and case.key not in timed:
                continue
            announce({"begin": case.key, "visit": visit})
            if visit == 0:
                timed[case.key] = [Timed(providers[name]) for name in job.providers[case.key]]
            if job.deadline and time.time() > job.deadline and visit > 0:
                continue
            _visit(case, timed[case.key], job, check=visit == 0)
            announce({"done": case.key, "rows": [one.row(case) for one in timed[case.key]]})
            gc.collect()


def _visit(
    case: Case,
    timed: list[Timed],
    job: Job,
    check: bool,
) -> None:
    sets = _input_sets(case, job.device)
    truth = truth_of(case, sets[0]) if check else None
    running: list[tuple[Timed, list[Forward]]] = []
    for one in timed:
        if one.cannot is None:
            one.cannot = one.provider.cannot(case, job.device)
        if one.cannot is not None:
            continue
        try:
            forwards = [one.provider.build(case, inputs) for inputs in sets]
            for inputs, forward in zip(sets, forwards, strict=True):
                loss = _step(forward, inputs)
            if truth is not None:
                loss = _step(forwards[0], sets[0])
                one.loss_error, one.grad_error = errors_of(truth, loss, sets[0])
                allowed = TOLERANCES[case.dtype]
                if not (one.loss_error <= allowed[0] and one.grad_error <= allowed[1]):
                    one.cannot = (
                        f"differs from the oracle: loss {one.loss_error:.1e}, "
                        f"gradient {one.grad_error:.1e}"
                    )
                    continue
                if job.device != "cpu":
                    one.peak_bytes = _peak_on_gpu(forwards[0], sets[0])
        except Exception as error:  # a peer may raise anything; the others go on
            one.cannot = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        running.append((one, forwards))
    del truth
    measure = _measure_on_gpu if job.device != "cpu" else _measure_on_cpu
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(job.rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() - started > job.seconds:
                break
            for one, forwards in running:
                which = turn % len(sets)
                forward_ms, backward_ms = measure(forwards[which], sets[which])
                one.forward_ms.append(forward_ms)
                one.backward_ms.append(backward_ms)
    finally:
        gc.enable()
    if job.device != "cpu":
        for one, forwards in running:
            _time_graphs(one, forwards, sets, job.rounds)


def _input_sets(case: Case, device: str) -> list[Inputs]:
    """On a GPU as many sets as it takes to run out of the second-level cache before one comes
    round again. On a CPU the baselines between two calls have swept the caches already."""
    first = make_inputs(case, device)
    if device == "cpu":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(6, 2 * cache // max(first.bytes(), 1) + 2)
    return [first, *(make_inputs(case, device, seed) for seed in range(1, count))]


def _step(forward: Forward, inputs: Inputs) -> Tensor:
    for leaf in inputs.leaves:
        leaf.grad = None
    loss = forward()
    loss.backward(torch.full_like(loss, inputs.loss_scale))
    return loss


def _peak_on_gpu(forward: Forward, inputs: Inputs) -> int:
    for leaf in inputs.leaves:
        leaf.grad = None
    return gpu_high_water(partial(_step, forward, inputs))


def _measure_on_cpu(forward: Forward, inputs: Inputs) -> tuple[float, float]:
    for leaf in inputs.leaves:
        leaf.grad = None
    start = time.perf_counter_ns()
    loss = forward()
    middle = time.perf_counter_ns()
    loss.backward(torch.full_like(loss, inputs.loss_scale))
    end = time.perf_counter_ns()
    return (middle - start) / 1e6, (end - middle) / 1e6


def _measure_on_gpu(forward: Forward, inputs: Inputs) -> tuple[float, float]:
    for leaf in inputs.leaves:
        leaf.grad = None
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    start.record()
    loss = forward()
    middle.record()
    loss.backward(torch.full_like(loss, inputs.loss_scale))
    end.record()
    end.synchronize()
    return start.elapsed_time(middle), middle.elapsed_time(end)


def _time_graphs(one: Timed, forwards: list[Forward], sets: list[Inputs], rounds: int) -> None:
    """Forward and backward replayed from CUDA graphs: the device's time without the host's."""
    if one.graph_cannot is not None:
        return
    graphs = []
    try:
        for forward, inputs in zip(forwards, sets, strict=True):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    _step(forward, inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            for leaf in inputs.leaves:
                leaf.grad = None
            with torch.cuda.graph(graph):
                loss = forward()
                loss.backward(torch.full_like(loss, inputs.loss_scale))
            graphs.append(graph)
    except Exception as error:
        one.graph_cannot = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        return
    for turn in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs[turn % len(graphs)].replay()
        end.record()
        end.synchronize()
        if turn:  # the first replay uploads the graph
            one.graph_ms.append(start.elapsed_time(end))


def run_job(job: Job, directory: Path, environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Runs the job in fresh processes; a case that kills its process is reported and left out."""
    import subprocess

    cases = list(job.cases)
    while cases:
        part = Job(**{**vars(job), "cases": cases})
        path = directory / "job.json"
        path.write_text(part.to_json())
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.timing", str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        current = None
        finished: set[str] = set()
        try:
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                event = json.loads(line)
                current = event.get("begin", current)
                if event.get("visit", 0) == 0 and "done" in event:
                    finished.add(event["done"])
                yield event
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
            code = process.wait()
            path.unlink(missing_ok=True)
        if code == 0:
            return
        if current is None:
            raise RuntimeError(f"the timing process ended with {code} before its first case")
        yield {"died": current, "code": code}
        # What has been measured once is not measured again for the sake of another case.
        cases = [case for case in cases if case.key not in finished | {current}]


def main(path: str) -> None:
    job = Job.from_json(Path(path).read_text())
    time_cases(job, lambda event: print(json.dumps(event), flush=True))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
