"""Which image is in which set, kept with a run."""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import shortened
from ..files import write_file
from .images import SegmentationData

log = logging.getLogger("heteroakd_fast.train")


def keep_split(data: SegmentationData, root: Path, path: Path) -> None:
    """Write the split that a run begins with to `path`, a line `train NAME` or `val NAME` for each
    image; where there is one already, say how this one differs."""
    split = {
        Path(source.name(index)).relative_to(root).as_posix().replace("\n", "\\n"): part
        for part, source in (("train", data.train), ("val", data.val))
        for index in range(len(source))
    }
    if not path.exists():
        lines = "".join(f"{part} {name}\n" for name, part in split.items())
        return write_file(path, lines.encode(errors="surrogateescape"))
    lines = path.read_bytes().decode(errors="surrogateescape")
    before = {name: part for part, _, name in (line.partition(" ") for line in lines.split("\n"))}
    before.pop("", None)
    found: dict[str, list[str]] = {}
    for name in {**before, **split}:
        old, new = before.get(name), split.get(name)
        if old != new:
            text = "new" if old is None else "gone" if new is None else f"from {old} to {new}"
            found.setdefault(text, []).append(name)
    if found:
        said = "; ".join(f"{len(n)} {text} ({shortened(n, 3)})" for text, n in found.items())
        log.warning(
            "%s: the run began with other images: %s; take a new --run folder where scores are to "
            "be compared",
            *(path, said),
        )
    return None
