"""Every test runs with poisoned memory: what a kernel does not write is NaN, not luck."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import interpreter
import pytest
import torch

interpreter.set_up()

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def poisoned_and_seeded() -> Iterator[None]:
    """Deterministic mode fills the memory of every `empty` with NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
