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


def test_test_files_that_are_named_exist() -> None:
    for folder in ("csrc", "kernels", "heteroakd_fast", "docs"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu", ".md"):
                for name in re.findall(r"\btests/[\w/]+\.\w+", path.read_text()):
                    assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_table_of_environment_variables_is_that_of_the_code() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| variable |") :].split("\n\n")[0].splitlines()[2:]
    listed = [name for row in table for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])]
    readers = r"(?:environ\.get|getenv|flag|text|setting|_number)\("
    read: set[str] = set()
    for folder in ("heteroakd_fast", "kernels", "csrc"):
        for path in (ROOT / "setup.py", *(ROOT / folder).rglob("*.*")):
            if path.suffix not in (".py", ".h", ".cuh", ".cpp", ".cu"):
                continue
            source = path.read_text()
            read |= set(re.findall(rf'(?:{readers}|environ\[)"([A-Z_]+)"', source))
            for names in re.findall(r"needed = \((.*)\)\n.*in os\.environ", source):
                read |= set(re.findall(r'"([A-Z_]+)"', names))
            # In whatever way it is read.
            read |= set(re.findall(r'"(HETEROAKD_[A-Z_]+)"', source))
    assert sorted(listed) == sorted(read)
