"""The environment variables of the package: all of them, read at each call.

    HETEROAKD_BACKEND             a backend's name or "auto" (backends/__init__.py)
    HETEROAKD_CHECK_LABELS        1: label ranges are checked at once on GPUs too (labels.py)
    HETEROAKD_DISABLE_EXTENSION   1: as if there were no compiled library (_extension.py)
    HETEROAKD_CPU_ISA             avx512, avx2 or portable: the CPU kernels (csrc/cpu/dispatch.h)

Those of the build are in setup.py.
"""

from __future__ import annotations

import os

__all__ = ["flag", "text"]

_ON = {"1", "on", "true", "yes"}
_OFF = {"", "0", "off", "false", "no"}


def flag(name: str) -> bool:
    """Whether the variable is set to "on".

    Raises:
        ValueError: it is set to something that is neither on nor off.
    """
    value = text(name).lower()
    if value not in _ON | _OFF:
        raise ValueError(f"{name}: got {value!r}, expected 1 or 0")
    return value in _ON


def text(name: str) -> str:
    """Its value; empty if it is not set."""
    return os.environ.get(name, "").strip()
