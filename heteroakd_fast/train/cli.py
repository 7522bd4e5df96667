"""The command `heteroakd-train`, and what every command of the driver does with errors."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .. import _requirements
from .._pipes import quiet_broken_pipe
from .errors import UserError
from .files import locked

if TYPE_CHECKING:
    from rich.console import Console

    from .reading import Options


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code, 2 where an optional dependency is missing."""
    # torchrun mixes what all ranks print.
    rank = os.environ.get("RANK")
    name = "heteroakd-train" + (f" (rank {rank})" if rank is not None else "")
    return command(name, partial(_main, argv))


def command(name: str, job: Callable[[Console], None]) -> int:
    """The exit code of a job; what the user can put right is one message on stderr."""
    if problem := _requirements.explain(_requirements.TRAINING, "train"):
        print(f"{name}: {problem}", file=sys.stderr)
        return 2
    from rich.console import Console

    from .logs import say
    from .memory import ran_out

    try:
        job(Console())
    except UserError as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        # A folder that cannot be made, a disk that filled up under a log: the reason is enough.
        where = f"{error.filename}: " if error.filename else ""
        code, message = 1, where + (error.strerror or str(error))
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command goes on from the last checkpoint"
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        said = (str(error).strip() or "no more is known").splitlines()[0]
        code, message = (
            1,
            (
                f"memory ran out ({said}); lower optim.batch_size, "
                "optim.eval_batch_size or data.crop, or take a smaller network"
            ),
        )
    else:
        return 0
    say(Console(stderr=True), f"{name}: {message}")
    return code


def _main(argv: list[str] | None, console: Console) -> None:
    from .reading import as_toml, embedded_recipes, parse_command_line

    argv = sys.argv[1:] if argv is None else argv
    only_check = argv[:1] == ["check"]
    if argv[:1] == ["predict"]:
        from .using import main

        return main(argv[1:], console)
    with quiet_broken_pipe():
        options = parse_command_line(argv[only_check:])
        if options.front.print_config:
            print(as_toml(options.config, with_run=options.run_named), end="")
            return
        if options.front.list_recipes:
            # Not by rich, which ends the program with a code of its own when a pipe is closed.
            for name, text in embedded_recipes().items():
                print(f"{name:<32} {text.splitlines()[0].removeprefix('#').strip()}")
            return
    # Plain lines on stderr: a handler of rich's would break paths in two.
    level = logging.WARNING if only_check else logging.INFO  # what it prints itself
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    (_check if only_check else _run)(options, console)


def _check(options: Options, console: Console) -> None:
    """`heteroakd-train check`: the data as training would load them, all files of them."""
    from .datasets import load_data
    from .datasets.survey import describe
    from .logs import say
    from .pipeline import training_sets

    config = options.config.with_unlabelled_index()
    checked = config.data.model_copy(update={"check": True})
    data = load_data(checked, config.distill.unlabelled_index)
    training_sets(config, data)
    say(console, describe(data))


def _run(options: Options, console: Console) -> None:
    # Late: torch and transformers take seconds to import, and a mistake in the configuration
    # or a request for help should be answered at once.
    from . import pipeline, report
    from .distributed import connect

    config = options.config
    with connect(config.device, config.scale.timeout) as world, locked(config.run, "run", world):
        console.quiet |= not world.main
        outcome = pipeline.run(config, console, options.front.resume_anyway, world)
        if world.main:
            report.write_report(outcome, outcome.config, console)
