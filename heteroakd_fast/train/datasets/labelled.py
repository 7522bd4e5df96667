"""Which images a network learns from, and which of their labels it sees."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..errors import DataError
from .images import Mask, Pixels, SegmentationData, Source

_CHOICE = 5  # its own random stream, see batches.py


@dataclass(frozen=True)
class Chosen:
    """Some images of a source."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Pixels, Mask]:
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


@dataclass(frozen=True)
class PartlyLabelled:
    """All images of a source; pixels of those that are not `labelled` have `unlabelled_index`."""

    source: Source
    labelled: frozenset[int]
    unlabelled_index: int

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Pixels, Mask]:
        image, mask = self.source.read(index)
        if index not in self.labelled:
            mask = np.full(mask.shape, self.unlabelled_index, np.int64)
        return image, mask

    def name(self, index: int) -> str:
        return self.source.name(index)


def with_masks(data: SegmentationData) -> Source:
    """The training images that have a mask: what a network without a teacher can learn from."""
    return data.train if data.with_mask is None else Chosen(data.train, data.with_mask)


def labelled_images(
    data: SegmentationData, config: DataConfig, seed: int
) -> tuple[int, ...] | None:
    """The training images whose labels students see, as `data.labelled` has it; None: all.

    Raises:
        DataError: more are asked for than have a mask, or names that no image has.
    """
    there = tuple(range(len(data.train))) if data.with_mask is None else data.with_mask
    asked = config.labelled
    if asked is None:
        return None
    if asked == "masks":
        return there
    if isinstance(asked, tuple):
        return _named(data.train, there, asked)
    count = max(1, round(asked * len(there))) if isinstance(asked, float) else asked
    if count > len(there):
        raise DataError(
            f"data.labelled is {asked}, but {len(there)} training images have a mask; take fewer, "
            "or leave it out"
        )
    order = np.random.default_rng((seed, _CHOICE)).permutation(len(there))
    return tuple(sorted(there[index] for index in order[:count]))


def balanced_weights(source: Source, num_classes: int) -> tuple[float, ...]:
    """Class weights by inverse frequency: w_c = N / (K n_c), of n_c pixels of class c, N pixels of
    all classes, and K classes that have any.

    The mean weight of a labelled pixel is then 1, and every class has the same share of the loss.
    A class without a pixel has the weight 0: no label asks for it, and any other weight would be
    made up. Masks are counted as they are in the files, before crops; pixels that are ignored or
    unlabelled are not.
    """
    counts = np.zeros(num_classes, np.int64)
    for index in range(len(source)):
        values = source.read(index)[1]
        counts += np.bincount(values[values < num_classes].ravel(), minlength=num_classes)
    there = counts > 0
    weights = counts.sum() / (max(1, there.sum()) * np.maximum(counts, 1))
    return tuple(np.where(there, weights, 0.0).tolist())


def _named(source: Source, there: tuple[int, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """The images of these names or ends of paths, with or without suffix."""
    known: dict[str, list[tuple[int, Path]]] = {}
    for index in there:
        path = Path(unicodedata.normalize("NFC", source.name(index)))
        for form in (path, path.with_suffix("")):
            known.setdefault(form.name, []).append((index, form))
    found: set[int] = set()
    for name in names:
        wanted = Path(unicodedata.normalize("NFC", name))
        parts = wanted.parts
        alike = {i for i, p in known.get(wanted.name, ()) if p.parts[-len(parts) :] == parts}
        if not alike:
            shown = ", ".join(sorted(Path(source.name(index)).name for index in there[:3]))
            raise DataError(
                f"data.labelled names {name!r}, and no training image with a mask is called so "
                f"(there are {shown} ...)"
            )
        found |= alike
    return tuple(sorted(found))
