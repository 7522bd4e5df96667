"""What most tests of the driver begin with: a tiny folder data set and its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_helpers import write_config

from heteroakd_fast.train.config import Config
from heteroakd_fast.train.datasets import load_data
from heteroakd_fast.train.datasets.images import SegmentationData
from heteroakd_fast.train.reading import load_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


@pytest.fixture
def data(config: Config) -> SegmentationData:
    return load_data(config.data)
