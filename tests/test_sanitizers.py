"""The kernels under AddressSanitizer and UBSan, and ThreadSanitizer: docs/cpu.md."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_shim
import pytest
import sanitizers

asked_for = pytest.mark.skipif(
    os.environ.get("HETEROAKD_TEST_SANITIZED") != "1",
    reason="HETEROAKD_TEST_SANITIZED=1 compiles the kernels with sanitizers, for a minute",
)
# tests/common.py loads the extension: its path is said before
CPU = """
import sys
from pathlib import Path
from heteroakd_fast import _extension
_extension.library_path = lambda: Path(sys.argv[1])
import sanitized_calls
sanitized_calls.check_cpu(sys.argv[2])
"""


@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=asked_for)])
def test_the_cpu_kernels_touch_no_memory_but_their_own(sanitizer: str, tmp_path: Path) -> None:
    try:
        library = sanitizers.build_extension(sanitizer, tmp_path)
        done = sanitizers.run_python(sanitizer, "-c", CPU, str(library), sanitizer)
    except sanitizers.CannotTellError as reason:
        pytest.skip(str(reason))
    assert done.returncode == 0, done.stdout
    for isa in ("portable", "double"):
        assert f"{isa}: nothing was found" in done.stdout


@asked_for
def test_the_cuda_kernels_touch_no_memory_but_their_own() -> None:
    try:
        cuda_shim.library_path(sanitize=True)
        code = "import sanitized_calls; sanitized_calls.check_cuda()"
        done = sanitizers.run_python("address", "-c", code)
    except sanitizers.CannotTellError as reason:
        pytest.skip(str(reason))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "cuda: nothing was found" in done.stdout
