"""Calls for a process with sanitizers: `test_sanitizers.py` starts it. It ends where one finds
something, or where a call leaves other bits than it did elsewhere in memory."""

from __future__ import annotations

import ctypes
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import cuda_shim
import numpy as np
import pytest
import torch
from common import TERM_CASES, Batch, evaluate, loss_of, make_batch
from torch import Tensor

from heteroakd_fast import _extension, functional
from heteroakd_fast.backends import compiled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["dense", "channels last", "padded rows", "every second"]
#: `Place` of sanitizers.cpp
HEAP, END, START = range(3)


class Case(NamedTuple):
    batch: Batch
    layouts: list[str]
    """Of the batch's tensors"""
    options: dict[str, Any]


def cases(dtypes: list[torch.dtype]) -> Iterator[Case]:
    """Every term on 18 grids, most of them a multiple of nothing: ends of rows, vectors, bands of
    eight rows, warps, blocks. Dtypes, layouts and options as they come."""
    for grids in range(18):
        for term, options in TERM_CASES.items():
            pick = random.Random(f"{grids} {term}")
            classes = pick.choice([1, 2, 3, 5, 19, 33])
            grid, other = ((pick.choice([1, 3, 9, 17]), pick.choice([1, 5, 16, 37])) for _ in "12")
            ratio = pick.choice([0, 1, 1, 2, 4])
            size = (ratio * grid[0], ratio * grid[1])
            batch = make_batch(
                *(pick.choice([1, 2]), classes, grid, pick.choice([grid, other])),
                size if ratio else pick.choice([(23, 31), (5, 7), (10, 70), (18, 1)]),
                pick.choice(dtypes),
                label_dtype=pick.choice([torch.uint8, torch.int32, torch.int64]),
            )
            batch = batch._replace(teacher=batch.teacher.to(pick.choice([*DTYPES, torch.float64])))
            batch.target[:, 5::8] = 255
            if pick.random() < 0.2:
                wild = torch.tensor([math.nan, math.inf, -math.inf, 6e4, -1000.0, 0.0])
                for logits in batch.student, batch.teacher:
                    logits[0, :, 0] = wild[torch.randint(0, len(wild), logits[0, :, 0].shape)]
            options = {**options, "align_corners": pick.random() < 0.2}
            if options.get("hetero_weight"):
                options["return_maps"] = pick.random() < 0.5
            elif pick.random() < 0.3:
                options["class_weight"] = torch.rand(classes)
            layout = pick.choice(LAYOUTS)
            yield Case(batch, [layout, layout, pick.choice(["dense", "every second"])], options)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A copy in memory that ends with its last element."""
    size = list(tensor.shape)
    step = 2 if layout == "every second" else 1
    strides = [step, step * size[-1] + (5 if layout == "padded rows" else 0)]
    for count in size[-2:0:-1]:
        strides.append(strides[-1] * count)
    strides.reverse()
    if layout == "channels last":
        strides = [math.prod(size[1:]), 1, size[3] * size[1], size[1]]
    return torch.empty_strided(size, strides, dtype=tensor.dtype).copy_(tensor)


def shortened(tensor: Tensor) -> Tensor:
    """The same shape without the memory of its last element."""
    memory = torch.zeros(tensor.numel() - 1, dtype=tensor.dtype)
    strides = [stride * tensor.element_size() for stride in tensor.stride()]
    return torch.from_numpy(np.lib.stride_tricks.as_strided(memory.numpy(), tensor.shape, strides))


def run(batch: Batch, **options: Any) -> list[Tensor]:
    """Everything that a call leaves, with gradients and without."""
    result = evaluate(batch, backend="cpu", **options)
    with torch.no_grad():
        loss = loss_of(*batch.arguments, backend="cpu", **options).loss
    gradients = [one for one in (result.student_grad, result.teacher_grad) if one is not None]
    terms = torch.tensor(list(result.terms.values()))
    maps = (result.maps or {}).values()
    return [result.loss, loss, terms, *gradients, *maps, *evaluations(batch, "cpu")]


def evaluations(batch: Batch, backend: str) -> list[Tensor]:
    size = (batch.target.shape[1], batch.target.shape[2])
    return [
        functional.predict(batch.student, size, backend=backend),
        functional.confusion_matrix(batch.student, batch.target, backend=backend),
        functional.predict(batch.teacher, size, align_corners=True, backend=backend),
    ]


def assert_reported(words: str, defect: Callable[..., object], *arguments: Any) -> None:
    """A process that does this ends with these words; otherwise silence would mean nothing."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 2)
            defect(*arguments)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        report = output.read().decode()
    assert status != 0, f"a planted defect was not found: {words}"
    assert words in report, report


def check_plants(library: ctypes.CDLL, batch: Batch) -> None:
    """Arrays that are one element short are reported, in the kernels of this instruction set."""
    short_logits = batch._replace(student=shortened(batch.student))
    assert_reported("heap-buffer-overflow", run, short_logits)
    library.heteroakd_place_memory(END)
    short_labels = batch._replace(target=shortened(batch.target))
    library.heteroakd_place_memory(HEAP)
    assert_reported("SEGV", run, short_labels)


def check_cases(library: ctypes.CDLL, places: Iterable[int], chosen: Iterable[Case]) -> None:
    """Every case leaves the same in every place."""
    for case in chosen:
        results = []
        for place in places:
            library.heteroakd_place_memory(place)
            batch = Batch(*map(laid_out, case.batch, case.layouts))
            options = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in case.options.items()
            }
            results.append(run(batch, **options))
        library.heteroakd_place_memory(HEAP)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


def check_cpu(sanitizer: str) -> None:
    """The kernels of every instruction set that this processor has."""
    library = ctypes.CDLL(str(_extension.library_path()))
    address = sanitizer == "address"
    if address:
        assert_reported("signed integer overflow", library.heteroakd_overflow, 2**31 - 1)
    else:
        assert_reported("data race", library.heteroakd_race)
    places = (HEAP, END, START) if address else (HEAP,)
    for isa in ("avx512", "avx2", "portable", "double"):
        os.environ["HETEROAKD_CPU_ISA"] = isa.replace("double", "portable")
        if _extension.cpu_isa() != os.environ["HETEROAKD_CPU_ISA"]:
            continue
        dtypes = [torch.float64] if isa == "double" else DTYPES
        batch = make_batch(1, 5, (17, 9), None, (34, 18), dtypes[0], label_dtype=torch.uint8)
        if address:
            check_plants(library, batch)
        # Loops over lanes are slow without optimisation.
        step = 7
        if isa.startswith("avx"):
            step = 5
            # a gradient that is written past the caches, to the end of its last row: that begins at
            # a multiple of 64 bytes, and ends at none
            large = make_batch(1, 3, (283, 2473), None, (283, 2473), torch.float32)
            check_cases(library, places[::2], [Case(large, ["dense"] * 3, {})])
        while math.gcd(step, len(TERM_CASES)) > 1:  # or else not every term would have its turn
            step += 1
        check_cases(library, places, islice(cases(dtypes), 0, None, step))
        batch.target[0, 20, 3] = 77
        with pytest.raises(ValueError, match="label 77 at"):
            run(batch)
        print(f"{isa}: nothing was found", flush=True)


def check_cuda() -> None:
    """The CUDA kernels through the shim."""
    load = partial(cuda_shim.load, sanitize=True)
    compiled.CUDA.__init__("cuda", lambda: None, load, "cpu")  # type: ignore[misc]
    batch = make_batch(dtype=torch.float32)
    short_logits = batch._replace(student=shortened(batch.student))
    assert_reported("heap-buffer-overflow", lambda: evaluate(short_logits, backend="cuda"))
    for case in cases(DTYPES):
        evaluate(case.batch, backend="cuda", **case.options)
        evaluations(case.batch, "cuda")
    print("cuda: nothing was found")
