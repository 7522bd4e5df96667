"""What docs/integrations.md shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from test_resolution import CLASSES, build
from torch import Tensor

from heteroakd_fast import HeteroAKDLoss

PAGE = (tiny.ROOT / "docs" / "integrations.md").read_text()
SECTION = PAGE.partition("## Distilling features")[2].partition("\n## ")[0]
SNIPPETS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
TABLE = re.findall(r"^\| (\w+) \| `([\w.]+)` \| `config\.(\w+)` \|$", SECTION, re.MULTILINE)


def dataset(count: int) -> list[dict[str, Tensor]]:
    images, target = tiny.data(count, 64)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, target, strict=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_snippet(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library, reason=f"needs {library}: pip install {library}")
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    (snippet,) = (text for text in SNIPPETS if f"integrations.{library} import" in text)
    monkeypatch.chdir(tmp_path)
    student, teacher = build("Segformer"), build("UperNet")
    names = {
        "student": student,
        "teacher": teacher,
        "train_data": dataset(4),
        "val_data": dataset(2),
    }
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch.manual_seed(0)
    start = HeteroAKDLoss(CLASSES, 8, 16).student_projector
    torch.manual_seed(0)  # the loss is the first of the snippet that draws
    exec(snippet, names)
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())
    trained = names["loss"].student_projector
    assert trained.conv.weight.shape == start.conv.weight.shape
    assert 0 < (trained.conv.weight - start.conv.weight).abs().max() < 1e-3, "at 6e-5 a step"
    again = type(student).from_pretrained(tmp_path / "student").eval()
    images = torch.stack([item["pixel_values"] for item in names["val_data"]])
    with torch.no_grad():
        assert torch.equal(again(images).logits, student.eval()(images).logits)


@pytest.mark.parametrize(("name", "module", "channels"), TABLE)
def test_table_of_modules(name: str, module: str, channels: str) -> None:
    model = build(name)
    tapped = dict(model.named_modules())[module]
    shapes = []
    tapped.register_forward_hook(lambda *args: shapes.append(args[-1].shape))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert len(shapes[0]) == 4
    assert shapes[0][1] == getattr(model.config, channels)


def test_everything_of_the_section_is_found() -> None:
    assert len(SNIPPETS) == 2
    assert len(TABLE) == 4
