"""Every test runs with poisoned memory: what a kernel does not write is NaN, not luck."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator

import hypothesis
import interpreter
import pytest
import shim_backend
import torch

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # A run that was killed leaves half a library in the cache of this user, which later runs load.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="heteroakd-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
interpreter.set_up()
shim_backend.set_up()

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci")


#: Too large for an interpreter.
NOT_INTERPRETED = {"test_4096_classes", "test_bits_do_not_depend_on_threads_or_runs"}
#: Of each test of the contract, every how manieth combination runs on kernels that are interpreted,
#: or run by the shim.
SHARES = {"triton": 32, "cuda": 3}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An interpreted kernel takes a second where a compiled one takes a millisecond: of each test
    that runs on every backend, a sample of the combinations runs on it. All of them do where there
    is a GPU, and with HETEROAKD_TEST_INTERPRETED=all. (test_triton_kernels.py and
    test_cuda_kernels.py are complete.)"""
    if os.environ.get("HETEROAKD_TEST_INTERPRETED") == "all":
        return
    if not interpreter.INTERPRETED and not shim_backend.USED:
        leave_out(config, items, [item for item in items if compiles_much(item)])
        return
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        backend = item.callspec.params.get("backend")
        if backend not in SHARES:
            continue
        function = f"{backend} {item.module.__name__}.{item.originalname}"
        large = backend == "triton" and (
            item.originalname in NOT_INTERPRETED or item.callspec.params.get("size") == (129, 131)
        )
        if large or seen[function] % SHARES[backend]:
            left_out.append(item)
        seen[function] += 1
    leave_out(config, items, left_out)


def compiles_much(item: pytest.Item) -> bool:
    """On a GPU every combination of options, dtype, layout and ratio is a kernel to compile, for
    seconds each: all ratios in one dtype and layout, all dtypes and layouts at one ratio."""
    if not isinstance(item, pytest.Function) or item.originalname != "test_value_and_gradients":
        return False
    chosen = item.callspec.params
    plain = chosen["dtype"] == torch.float32 and chosen["layout"] == "contiguous"
    return chosen["backend"] == "triton" and not plain and chosen["resolution"] != "odd"


def leave_out(config: pytest.Config, items: list[pytest.Item], which: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=which)
    gone = set(which)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def poisoned_and_seeded() -> Iterator[None]:
    """Deterministic mode fills the memory of every `empty` with NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
