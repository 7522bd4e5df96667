"""Environment variables that switch something on or off."""

from __future__ import annotations

import os

__all__ = ["flag"]

_ON = {"1", "on", "true", "yes"}
_OFF = {"", "0", "off", "false", "no"}


def flag(name: str) -> bool:
    """Whether the variable is set to "on".

    Raises:
        ValueError: it is set to something that is neither on nor off.
    """
    value = os.environ.get(name, "").strip().lower()
    if value not in _ON | _OFF:
        raise ValueError(f"{name}: got {value!r}, expected 1 or 0")
    return value in _ON
