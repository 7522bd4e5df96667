"""Errors that are the user's to fix: shown as one message, without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right; `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration (file or command line) cannot be used."""

    exit_code = 2


class DataError(UserError):
    """A image or a mask is missing or cannot be used."""


class ModelError(UserError):
    """A model cannot be built, or weights do not fit it."""


class DependencyError(UserError):
    """An optional dependency is not installed; the message has the command that installs it."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint cannot be written or read."""


class TrainingError(UserError):
    """Training cannot go on."""


class StoppedError(UserError):
    """A signal asked to stop; the state was saved first."""

    exit_code = 130


def shortened(names: Sequence[str], limit: int = 16) -> str:
    """Names in one line, the first of them if there are many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
