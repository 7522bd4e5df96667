"""What the README shows must run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def test_python_examples_run(capsys: object) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names = {
        "student": torch.nn.Conv2d(3, 19, 1),
        "student_features": torch.randn(2, 160, 16, 32),
        "teacher_features": torch.randn(2, 512, 8, 16),
    }
    for block in blocks:  # the later ones go on with the names of the first
        exec(block, names)
    assert names["out"].projector is not None


def test_documents_that_are_linked_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} -> {link}"
