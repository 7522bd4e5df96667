"""Large validation images, evaluated window by window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_helpers import CPU, write_config

from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.batches import Normalizer
from heteroakd_fast.train.errors import ConfigError
from heteroakd_fast.train.reading import load_config
from heteroakd_fast.train.scoring import evaluate, window_logits


class Quarter(nn.Module):
    """Logits at a quarter of the size, that depend on where a window begins."""

    def forward(self, images: Tensor) -> Tensor:
        pooled = F.avg_pool2d(images, 4)
        return torch.cat([pooled, pooled - pooled.mean((2, 3), keepdim=True)], 1)


@pytest.mark.parametrize(
    ("size", "sides", "strides"),
    [
        ((32, 48), (16, 16), (16, 16)),
        ((32, 48), (16, 24), (8, 16)),
        ((20, 36), (16, 16), (12, 12)),
        ((16, 16), (16, 16), (4, 4)),
        ((8, 40), (16, 16), (8, 8)),
    ],
)
def test_it_is_the_mean_over_windows(
    size: tuple[int, int], sides: tuple[int, int], strides: tuple[int, int]
) -> None:
    """As mmsegmentation spells it: grids from the number of windows, the last ones moved back."""
    images, model = torch.randn(2, 3, *size), Quarter()
    found = window_logits(model, images, sides, strides)
    sums, counts = torch.zeros(2, 6, *size), torch.zeros(1, 1, *size)
    grids = [
        max(n - side + step - 1, 0) // step + 1
        for n, side, step in zip(size, sides, strides, strict=True)
    ]
    for row in range(grids[0]):
        for column in range(grids[1]):
            bottom = min(row * strides[0] + sides[0], size[0])
            right = min(column * strides[1] + sides[1], size[1])
            top, left = max(bottom - sides[0], 0), max(right - sides[1], 0)
            window = images[:, :, top:bottom, left:right]
            logits = F.interpolate(model(window), size=window.shape[2:], mode="bilinear")
            sums[:, :, top:bottom, left:right] += logits
            counts[:, :, top:bottom, left:right] += 1
    assert counts.min() >= 1
    torch.testing.assert_close(found, sums / counts)


def test_a_whole_image_is_one_window() -> None:
    images, model = torch.randn(1, 3, 16, 24), Quarter()
    whole = F.interpolate(model(images), size=(16, 24), mode="bilinear")
    torch.testing.assert_close(window_logits(model, images, (16, 24), (16, 24)), whole)


def test_an_evaluation_by_windows(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("[data]\n", "[data]\nwindow = 16\n"))
    config = load_config(path)
    assert config.data.windows == ((16, 16), (10, 10))
    asked = []

    class Asked(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            asked.append(tuple(images.shape[2:]))
            return torch.zeros(len(images), 3, 4, 4)

    data = load_data(config.data)
    evaluate(Asked(), data, Normalizer(config.data, CPU), config=config, device=CPU)
    assert set(asked) == {(16, 16)}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("window = 4", r"data\.window: got 4"),
        ("window_stride = 8", "needs data.window"),
        ("window = 16\nwindow_stride = 17", "pixels between windows would have no logits"),
        ("window = [16, 32]\nwindow_stride = [8, 0]", r"data\.window_stride: got"),
    ],
)
def test_windows_that_cannot_be(tmp_path: Path, lines: str, message: str) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("[data]\n", f"[data]\n{lines}\n"))
    with pytest.raises(ConfigError, match=message):
        load_config(path)
