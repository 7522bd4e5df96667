"""What networks are trained on: images with masks, in batches."""

from __future__ import annotations

from ..config import DataConfig
from .images import SegmentationData


def load_data(config: DataConfig, unlabelled_index: int | None = None) -> SegmentationData:
    """The data set the configuration names, prepared and checked; `unlabelled_index` is a value
    that the masks of a folder may have, too."""
    if config.kind == "landcover":
        from .landcover import load_landcover

        return load_landcover(config.ignore_index)
    from .folders import load_layout

    return load_layout(config, unlabelled_index)
