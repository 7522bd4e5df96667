"""The command `heteroakd-experiment`; what it does: `comparison.py`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .cli import command

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code, 2 where an optional dependency is missing."""

    def job(console: Console) -> None:
        from . import comparison

        comparison.main(argv, console)

    return command("heteroakd-experiment", job)


if __name__ == "__main__":
    sys.exit(main())
