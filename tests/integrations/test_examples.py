"""Every example runs as it stands, and its loss falls. (Those of smp and mmseg: `zoo_*.py`.)"""

from __future__ import annotations

import sys
import time

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


def test_unlabelled_images_improve_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["unlabelled"])
    began = time.process_time()
    accuracies = tiny.run_main("unlabelled")
    assert accuracies["distilled"] > accuracies["alone"] + 0.05
    assert accuracies["teacher"] > accuracies["distilled"]
    assert time.process_time() - began < 20.0, "an example runs in seconds"
