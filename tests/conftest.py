"""Every test runs with poisoned memory: what a kernel does not write is NaN, not luck."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator

# Before torch is loaded. Workers of pytest share the cores: a thread that spins at a barrier keeps
# the one it waits for from running, and a call of a millisecond takes a second.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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

import geometries  # noqa: E402  (which asks what runs here)

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci")


#: Of each test of the contract, every how manieth combination runs on Triton kernels, unless its
#: marker `share` has another number.
SHARE = 31  # a prime: every value of a parameter has its turn


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A Triton kernel takes a second to interpret, or to compile for a GPU, where others take a
    millisecond: of each test that runs on every backend, a sample of the combinations runs on it,
    and none of the large geometries where it is interpreted. HETEROAKD_TEST_INTERPRETED=all runs
    them all."""
    if os.environ.get("HETEROAKD_TEST_INTERPRETED") == "all":
        return
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        chosen = item.callspec.params
        on_gpu = "gpu" in item.keywords and not interpreter.INTERPRETED
        if chosen.get("backend") != "triton" or on_gpu:
            continue
        if interpreter.INTERPRETED and chosen.get("geometry") in geometries.LARGE:
            left_out.append(item)
            continue
        function = f"{item.module.__name__}.{item.originalname}"
        marker = item.get_closest_marker("share")
        if seen[function] % (marker.args[0] if marker else SHARE):
            left_out.append(item)
        seen[function] += 1
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
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
