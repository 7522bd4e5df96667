"""Does it teach? Every method, both directions, several seeds; a table, a figure, the numbers.

    heteroakd-experiment [--run FOLDER] [--seeds 3] [--steps N] ...

One teacher for each direction, trained once; a seed decides the student's initial weights, the
order of the images and their augmentation, and is the same for all methods, so that methods are
compared pairwise. Interrupted at any time, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from .._pipes import quiet_broken_pipe
from .cli import locked
from .config import Config
from .errors import ConfigError
from .files import write_atomically
from .logs import finite, say
from .reading import load_config

#: In the order of the table. "task" is the student alone, which all others are compared with.
METHODS = ("task", "kd", "cwd", "heteroakd", "heteroakd-paper")
TITLES = {
    "task": "student alone",
    "kd": "KD",
    "cwd": "CWD",
    "heteroakd": "HeteroAKD softmax-kl",
    "heteroakd-paper": "HeteroAKD paper",
    "kmm": "HeteroAKD, KMM only",
    "kem": "HeteroAKD, KEM only",
}
DIRECTIONS = {
    "Transformer -> CNN": "pair-tiny-segformer-unet",
    "CNN -> Transformer": "pair-tiny-unet-segformer",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Student alone, KD, CWD and HeteroAKD, over both directions and several seeds."""

    run: Path = Path("runs/experiment")
    """Folder of the experiment; the same command goes on."""
    data: str = "landcover"
    """Recipe or file with the data."""
    pairs: tuple[str, ...] = tuple(DIRECTIONS.values())
    """Recipes or files with a teacher and a student each."""
    methods: tuple[str, ...] = METHODS
    """Recipes or files of methods; the first is what the others are compared with."""
    seeds: int = 3
    """Students for each method."""
    steps: int | None = None
    """Training steps of every student; none: the recipes' own."""
    teacher_steps: int | None = None
    """Training steps of every teacher; none: the recipes' own."""
    threads: Annotated[int | None, tyro.conf.arg(help="CPU threads; none: torch's choice.")] = None
    device: str = "auto"
    """auto, cpu, cuda ..."""
    workers: int = 0
    """Processes that read images."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One student."""

    pair: str
    method: str
    seed: int
    miou: float
    pixel_accuracy: float
    class_iou: dict[str, float | None]
    seconds: float


def check(options: Options) -> None:
    """What the table needs, and limits that a recipe's keys have as well.

    Raises:
        ConfigError: an option, a recipe or a file cannot be used; found before anything is trained.
    """
    least = {"seeds": 1, "steps": 1, "teacher_steps": 1, "threads": 1, "workers": 0}
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {limit} or more")
    for name in ("pairs", "methods"):
        # Folders are called by the stem.
        stems = [Path(source).stem for source in getattr(options, name)]
        if not stems or len(set(stems)) != len(stems):
            raise ConfigError(
                f"--{name} is {', '.join(stems) or 'empty'}; expected one or more, each once and "
                "with a name of its own"
            )
    for pair in options.pairs:
        for method in (None, *options.methods):
            configure(options, pair, method, 0)


def configure(options: Options, pair: str, method: str | None, seed: int) -> Config:
    """The configuration of one run; without a method, the teacher's."""
    config = load_config(options.data, pair, *([method] if method else []))
    folder = options.run / Path(pair).stem
    teacher, student = config.teacher, config.student
    if options.steps is not None:
        student = student.model_copy(update={"steps": options.steps})
    if options.teacher_steps is not None:
        teacher = teacher.model_copy(update={"steps": options.teacher_steps})
    common = {
        "device": options.device,
        "threads": options.threads,
        "seed": seed,
        "data": config.data.model_copy(update={"workers": options.workers}),
        # A line a minute is enough of each of so many runs.
        "log": config.log.model_copy(update={"eval_every": 10**9, "tensorboard": False}),
    }
    if method is None:
        own = {"stages": ("teacher",), "run": folder / "teacher", "teacher": teacher}
    else:
        own = {"run": folder / f"{Path(method).stem}-seed{seed}", "student": student}
        if config.stages != ("alone",):
            weights = folder / "teacher" / "teacher" / "model.safetensors"
            used = teacher.model_copy(update={"weights": weights, "steps": 0})
            own |= {"stages": ("distilled",), "teacher": used}
    return config.model_copy(update={**common, **own})


def run(options: Options, console: Console) -> tuple[list[Cell], dict[str, Any]]:
    """Train what is not trained yet. Returns the students and each pair's teacher."""
    from . import pipeline

    quiet = Console(quiet=True)
    teachers: dict[str, Any] = {}
    for pair in options.pairs:
        config = configure(options, pair, None, 0)
        outcome = pipeline.run(config, quiet)
        teachers[pair] = _cell(pair, "teacher", 0, outcome, "teacher")
        say(console, f"{pair}: teacher {_percent(teachers[pair].miou)}")
    cells = []
    # Seeds outermost: stopped half-way, every method has as many seeds as the others.
    for seed in range(options.seeds):
        for pair in options.pairs:
            for method in options.methods:
                config = configure(options, pair, method, seed)
                outcome = pipeline.run(config, quiet)
                cell = _cell(pair, method, seed, outcome, config.stages[-1])
                cells.append(cell)
                text = f"{pair}, seed {seed}, {_title(method)}: {_percent(cell.miou)}"
                say(console, f"{text} ({cell.seconds:.0f} s)")
    return cells, teachers


def _cell(pair: str, method: str, seed: int, outcome: Any, stage: str) -> Cell:
    result = outcome.results[stage]
    named = zip(outcome.data.class_names, result.scores.class_iou, strict=True)
    return Cell(
        pair,
        method,
        seed,
        result.scores.miou,
        result.scores.pixel_accuracy,
        {name: None if math.isnan(value) else value for name, value in named},
        round(result.seconds, 1),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One method in one direction, in percent."""

    pair: str
    method: str
    mious: tuple[float, ...]
    gains: tuple[float, ...]
    """Seed by seed, against the first method."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.mious)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.mious) if len(self.mious) > 1 else math.nan

    @property
    def gain(self) -> float:
        return statistics.mean(self.gains)

    @property
    def gain_spread(self) -> float:
        return statistics.stdev(self.gains) if len(self.gains) > 1 else math.nan


def rows(options: Options, cells: list[Cell]) -> list[Row]:
    """Means and spreads; a gain is taken seed by seed."""
    table = {(cell.pair, cell.method, cell.seed): 100 * cell.miou for cell in cells}
    return [
        Row(
            pair,
            method,
            tuple(table[pair, method, seed] for seed in range(options.seeds)),
            tuple(
                table[pair, method, seed] - table[pair, options.methods[0], seed]
                for seed in range(options.seeds)
            ),
        )
        for pair in options.pairs
        for method in options.methods
    ]


def markdown(options: Options, cells: list[Cell], teachers: dict[str, Cell]) -> str:
    """The table for a document."""
    base = _title(options.methods[0])
    lines = [
        f"| direction | method | mIoU, % (mean ± sd, seeds: {options.seeds}) | each seed "
        f"| gain over {base} (paired) |",
        "|---|---|---|---|---|",
    ]
    direction = ""
    for row in rows(options, cells):
        if row.pair != direction:
            direction = row.pair
            teacher = teachers[row.pair]
            lines.append(f"| {_direction(row.pair)} | teacher | {100 * teacher.miou:.1f} | | |")
        seeds = ", ".join(f"{value:.1f}" for value in row.mious)
        gain = "" if row.method == options.methods[0] else _spread(row.gain, row.gain_spread, "+")
        lines.append(
            f"| | {_title(row.method)} | {_spread(row.mean, row.spread)} | {seeds} | {gain} |"
        )
    return "\n".join(lines) + "\n"


def draw(options: Options, cells: list[Cell], teachers: dict[str, Cell], path: Path) -> None:
    """A panel for each direction: every seed a point, the mean a bar, the teacher a line."""
    # Late and without a display: it takes long to import, and servers have no screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(options.pairs), 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(options.pairs), squeeze=False)[0]
    everything = rows(options, cells)
    for panel, pair in zip(panels, options.pairs, strict=True):
        own = [row for row in everything if row.pair == pair]
        for place, row in enumerate(own):
            colour = "0.45" if row.method == options.methods[0] else "C0"
            panel.scatter([place] * len(row.mious), row.mious, color=colour, s=26, zorder=3)
            panel.hlines(row.mean, place - 0.28, place + 0.28, color=colour, linewidth=2)
        teacher = 100 * teachers[pair].miou
        panel.axhline(teacher, color="C3", linestyle="--", linewidth=1)
        panel.annotate(
            "teacher", (len(own) - 0.55, teacher), color="C3", fontsize=8, va="bottom", ha="right"
        )
        panel.set_xticks(
            range(len(own)), [_title(row.method).replace(" ", "\n", 1) for row in own], fontsize=8
        )
        panel.set_xlim(-0.5, len(own) - 0.5)
        panel.set_title(_direction(pair), fontsize=10)
        panel.set_ylabel("validation mIoU, %")
        panel.grid(axis="y", color="0.9", zorder=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, (buffer.getbuffer(),))


def _spread(mean: float, spread: float, sign: str = "") -> str:
    """A mean, never minus zero, with its standard deviation, which one seed does not have."""
    return f"{round(mean, 1) + 0.0:{sign}.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def _direction(pair: str) -> str:
    return next((name for name, recipe in DIRECTIONS.items() if recipe == pair), Path(pair).stem)


def _title(method: str) -> str:
    return TITLES.get(method, Path(method).stem)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def report(
    options: Options, cells: list[Cell], teachers: dict[str, Cell], console: Console
) -> None:
    """Write results.json, table.md and experiment.png into the folder; print the table."""
    content = {
        "options": {name: str(value) for name, value in dataclasses.asdict(options).items()},
        "version": __version__,
        # NaN (labels that are all ignored) is no JSON.
        "teachers": {pair: finite(dataclasses.asdict(cell)) for pair, cell in teachers.items()},
        "students": [finite(dataclasses.asdict(cell)) for cell in cells],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(options.run / "results.json", (text.encode(),))
    write_atomically(
        options.run / "table.md", (markdown(options, cells, teachers).encode("utf-8"),)
    )
    draw(options, cells, teachers, options.run / "experiment.png")
    view = Table(title=f"Validation mIoU, %, seeds: {options.seeds}")
    for column in ("direction", "method", "mean", "sd", "gain"):
        view.add_column(column, justify="left" if column in ("direction", "method") else "right")
    for row in rows(options, cells):
        gain = "" if row.method == options.methods[0] else _spread(row.gain, row.gain_spread, "+")
        names = Text(_direction(row.pair)), Text(_title(row.method))
        view.add_row(
            *names, f"{row.mean:.1f}", "" if math.isnan(row.spread) else f"{row.spread:.1f}", gain
        )
    console.print(view)
    say(console, f"Written: {options.run}/results.json, table.md, experiment.png")


def main(argv: list[str] | None, console: Console) -> None:
    """The command, without what becomes of errors."""
    with quiet_broken_pipe():
        options = tyro.cli(Options, prog="heteroakd-experiment", args=argv, description=__doc__)
    check(options)
    with locked(options.run, "experiment"):
        cells, teachers = run(options, console)
        report(options, cells, teachers, console)
