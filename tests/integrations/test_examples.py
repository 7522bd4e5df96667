"""Every example runs as it stands, and its loss falls. (Those of smp and mmseg: `zoo_*.py`.)"""

from __future__ import annotations

import sys

import pytest
import tiny


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("plain_pytorch", "torch"),
        ("lightning_module", "lightning"),
        ("huggingface_trainer", "accelerate"),
        ("accelerate_loop", "accelerate"),
    ],
)
def test_example(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library, reason=f"needs {library}: pip install {library}")
    if library == "accelerate":  # one process has one precision, or starts anew
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [name])
    tiny.run_example(name)
