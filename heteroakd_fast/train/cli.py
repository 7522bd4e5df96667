"""The command `heteroakd-train`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .. import _requirements
from .errors import TrainingError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from .config import Config
    from .distributed import World
    from .reading import Options


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code, 2 where an optional dependency is missing."""
    # torchrun mixes what all ranks print.
    rank = os.environ.get("RANK")
    name = "heteroakd-train" + (f" (rank {rank})" if rank is not None else "")
    if problem := _requirements.explain(_requirements.TRAINING, "train"):
        print(f"{name}: {problem}", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.logging import RichHandler

    from .reading import as_toml, embedded_recipes, parse_command_line

    console, errors = Console(), Console(stderr=True)
    try:
        options = parse_command_line(sys.argv[1:] if argv is None else argv)
        if options.front.print_config:
            sys.stdout.write(as_toml(options.config, with_run=options.run_named))
            return 0
        if options.front.list_recipes:
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
        errors.print(f"{name}: {error}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except OSError as error:
        # A folder that cannot be made, a disk that filled up under a log: the reason is enough.
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        errors.print(f"{name}: {where}{reason}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print(f"{name}: interrupted; the same command goes on from the last checkpoint")
        return 130
    return 0


def _run(options: Options, console: Console) -> None:
    # Late: torch and transformers take seconds to import, and a mistake in the configuration
    # or a request for help should be answered at once.
    from . import pipeline, report
    from .distributed import connect

    config = options.config
    with connect(config.device, config.scale.timeout) as world, _locked(config, world):
        console.quiet |= not world.main
        outcome = pipeline.run(config, console, options.front.resume_anyway, world)
        if world.main:
            report.write_report(outcome, config, console)


@contextmanager
def _locked(config: Config, world: World) -> Iterator[None]:
    """The run's folder, for this run alone."""
    from filelock import FileLock, Timeout

    lock = FileLock(config.run / ".lock")

    def acquire() -> None:
        config.run.mkdir(parents=True, exist_ok=True)
        try:
            # Held by the process, not by the file: a killed run leaves nothing to clean up.
            lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(
                f"{config.run}: another run is using this folder; wait for it or take another --run"
            ) from None

    world.on_main(acquire)
    try:
        yield
    finally:
        lock.release()
