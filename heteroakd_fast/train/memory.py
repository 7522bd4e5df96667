"""Whether what a configuration asks for can be in this machine's memory at all."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path


def memory_size() -> float:
    """Bytes of memory that this process may use at most; infinite where that is not known."""
    sizes = []
    with suppress(AttributeError, OSError, ValueError):  # not on every system
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # of a container; "max" is no limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min((size for size in sizes if size > 0), default=float("inf"))


def too_large(size: float) -> str | None:
    """What to say about something of `size` bytes that cannot be in memory; None if it can.

    A system may hand out more memory than it has, and ends a process that uses it, without a word.
    """
    if size <= memory_size():
        return None
    return f"take {size / 1e9:.3g} GB, and this machine has {memory_size() / 1e9:.3g} GB of memory"


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on another device."""
    signs = "out of memory|not enough memory|(can't|cannot) allocate memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and re.search(signs, str(error), re.I) is not None
    )
