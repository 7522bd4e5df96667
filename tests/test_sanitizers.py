"""The CPU kernels under AddressSanitizer and UBSan. ThreadSanitizer and the whole extension are
runs of their own: docs/sanitizers.md."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CANNOT_TELL = 77


@cache
def address_run() -> str:
    """What `run.py address` prints; skips where this machine has no sanitizer."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "sanitize" / "run.py"), "address"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == CANNOT_TELL:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_kernels_touch_no_memory_but_their_own() -> None:
    lines = address_run().splitlines()
    for isa in ("portable", "portable in double"):
        assert [line for line in lines if line.startswith(f"{isa}: ") and "equal bits" in line]


@pytest.mark.parametrize("defect", ["overrun", "overflow", "page"])
@pytest.mark.parametrize("isa", ["portable", "double"])
def test_a_planted_defect_is_caught(defect: str, isa: str) -> None:
    assert f"planted {defect}, {isa}: caught" in address_run()
