"""The command `heteroakd-train`."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

from .config import Options, as_toml, embedded_recipes, parse_command_line
from .errors import TrainingError, UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    console, errors = Console(), Console(stderr=True)
    try:
        options = parse_command_line(sys.argv[1:] if argv is None else argv)
        if options.print_config:
            sys.stdout.write(as_toml(options.config))
            return 0
        if options.list_recipes:
            for name, text in embedded_recipes().items():
                about = text.splitlines()[0].removeprefix("#").strip()
                console.print(f"{name:<32} {about}", highlight=False, soft_wrap=True)
            return 0
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            handlers=[RichHandler(console=errors, show_time=False, show_path=False)],
        )
        _run(options, console)
    except UserError as error:
        errors.print(f"heteroakd-train: {error}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except OSError as error:
        # A folder that cannot be made, a disk that filled up under a log: the reason is enough.
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        errors.print(
            f"heteroakd-train: {where}{reason}", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        errors.print(
            "heteroakd-train: interrupted; the same command goes on from the last checkpoint"
        )
        return 130
    return 0


def _run(options: Options, console: Console) -> None:
    # Late: torch and transformers take seconds to import, and a mistake in the configuration
    # or a request for help should be answered at once.
    from filelock import FileLock, Timeout

    from . import pipeline, report

    config = options.config
    config.run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(config.run / ".lock")
    try:
        # Held by the process, not by the file: a killed run leaves nothing to clean up.
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(
            f"{config.run}: another run is using this folder; wait for it or take another --run"
        ) from None
    try:
        outcome = pipeline.run(config, console, options.resume_anyway)
        report.write_report(outcome, config, console)
    finally:
        lock.release()
