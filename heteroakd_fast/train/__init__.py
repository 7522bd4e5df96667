"""Training driver: teacher, student alone, student distilled, and a report that compares them.

`load_student` gives what a run trained. It is imported at its first use, so that
`import heteroakd_fast` never needs the `train` extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import _requirements

if TYPE_CHECKING:
    from .using import Student, load_student

__all__ = ["Student", "load_student"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if problem := _requirements.explain(_requirements.TRAINING, "train"):
        raise ImportError(f"{__name__}.{name}: {problem}")
    from . import using

    return getattr(using, name)
