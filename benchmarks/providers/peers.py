"""Public packages that compute a part of this."""

from __future__ import annotations

from . import Provider

__all__ = ["providers"]


def providers() -> list[Provider]:
    return []
