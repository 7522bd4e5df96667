"""The environment variables of the package, read at each call; README.md lists them all."""

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
