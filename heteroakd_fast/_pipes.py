"""What a command does when nobody reads its output any more, as in `... | head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_broken_pipe"]


@contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """End the program without a message where the block writes to a closed pipe, with the exit code
    of a program that SIGPIPE ends."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
