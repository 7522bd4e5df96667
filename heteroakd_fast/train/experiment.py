"""The command `heteroakd-experiment`; what it does: `comparison.py`."""

from __future__ import annotations

import sys

from .. import _requirements


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code, 2 where an optional dependency is missing."""
    if problem := _requirements.explain(_requirements.TRAINING, "train"):
        print(f"heteroakd-experiment: {problem}", file=sys.stderr)
        return 2
    from . import comparison

    return comparison.main(argv)


if __name__ == "__main__":
    sys.exit(main())
