"""What most tests of the driver begin with: a tiny folder data set and its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from train_helpers import write_config

from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.images import SegmentationData
from heteroakd_fast.train.reading import load_config


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Runs of `main` set the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


@pytest.fixture
def data(config: Config) -> SegmentationData:
    return load_data(config.data)
