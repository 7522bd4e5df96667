"""Does distillation help? Every method, both directions, many seeds: tables, figure, numbers.

    heteroakd-experiment [--quick] [--run FOLDER] [--seeds 10] ...

One teacher for each direction, trained once on all labels. A seed decides which tiles are labelled,
the student's initial weights, the order of the images and their augmentation, and is the same for
all methods, so that methods are compared pairwise. Interrupted at any time, the same command goes
on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from .._pipes import quiet_broken_pipe
from .config import Config
from .errors import ConfigError
from .files import locked, write_file
from .logs import finite, say
from .reading import load_config

if TYPE_CHECKING:
    from .pipeline import Outcome

#: "task" is the student alone, which all others are compared with.
TITLES = {
    "task": "student alone",
    "kd": "KD, T = 1",
    "kd-t2": "KD, T = 2",
    "cwd": "CWD",
    "heteroakd": "HeteroAKD softmax-kl",
    "heteroakd-paper": "HeteroAKD paper",
    "kmm": "HeteroAKD, KMM only",
    "kem": "HeteroAKD, KEM only",
}
OURS, RIVALS = "heteroakd", ("kd", "kd-t2")
FEW = ("task", "kd-t2", OURS)
DIRECTIONS = {
    "pair-tiny-segformer-unet": "Transformer -> CNN",
    "pair-tiny-unet-segformer": "CNN -> Transformer",
}
_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Options:
    """Student alone, KD, CWD and HeteroAKD, over both directions and many seeds."""

    run: Path = Path("runs/experiment")
    """Folder of the experiment; the same command goes on."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Three methods, three seeds, the first number of labels only."""
    data: str = "landcover"
    """Recipe or file with the data."""
    pairs: tuple[str, ...] = tuple(DIRECTIONS)
    """Recipes or files with a teacher and a student each."""
    methods: tuple[str, ...] = tuple(TITLES)
    """Recipes or files of methods; the first is what the others are compared with."""
    labelled: int = 12
    """Labelled images, with every method."""
    seeds: int = 10
    """Students of each method there."""
    more_labelled: tuple[int, ...] = (24, 48, 192)
    """Further numbers of labelled images."""
    more_methods: tuple[str, ...] = FEW
    """Methods there."""
    more_seeds: int = 5
    """Students of each method there."""
    first_seed: int = 0
    """Seeds count from here; what is chosen by looking at scores is chosen on other seeds."""
    steps: int | None = None
    """Training steps of every student; none: the recipes' own."""
    teacher_steps: int | None = None
    """Training steps of every teacher; none: the recipes' own."""
    threads: Annotated[int | None, tyro.conf.arg(help="CPU threads; none: torch's choice.")] = None
    device: str = "auto"
    """auto, cpu, cuda ..."""
    workers: int = 0
    """Processes that read images."""

    @property
    def numbers(self) -> list[int]:
        """All numbers of labelled images."""
        return sorted({self.labelled, *self.more_labelled})


class Place(NamedTuple):
    """Of one student in the experiment."""

    pair: str
    labelled: int
    method: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """What became of one network."""

    miou: float
    pixel_accuracy: float
    class_iou: dict[str, float]
    seconds: float


Cells = dict[Place, Cell]
Teachers = dict[str, Cell]


def check(options: Options) -> None:
    """What the tables need, and limits that a recipe's keys have as well.

    Raises:
        ConfigError: an option, a recipe or a file cannot be used; found before anything is trained.
    """
    least = {"seeds": 1, "more_seeds": 1, "first_seed": 0, "labelled": 1, "workers": 0}
    for name, limit in {**least, "steps": 1, "teacher_steps": 1, "threads": 1}.items():
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
        for method in (None, *options.methods, *options.more_methods):
            configure(options, pair, method)


def configure(
    options: Options, pair: str, method: str | None, labelled: int | None = None, seed: int = 0
) -> Config:
    """The configuration of one run; without a method, the teacher's."""
    labelled = labelled or options.labelled
    role, steps = ("student", options.steps) if method else ("teacher", options.teacher_steps)
    name = f"{Path(method).stem}-{labelled}-seed{seed}" if method else "teacher"
    folder = options.run / Path(pair).stem
    overrides: dict[str, Any] = {
        "run": folder / name,
        "device": options.device,
        "threads": options.threads,
        "seed": seed,
        "data": {"workers": options.workers, "labelled": labelled},
        # Scores are those of the last step.
        "log": {"eval_every": 10**9, "tensorboard": False},
        role: {} if steps is None else {"steps": steps},
    }
    if method is None:
        return load_config(options.data, pair, overrides={**overrides, "stages": ["teacher"]})
    config = load_config(options.data, pair, method, overrides=overrides)
    if config.stages == ("alone",):
        return config
    weights = folder / "teacher" / "teacher" / "model.safetensors"
    used = config.teacher.model_copy(update={"weights": weights, "steps": 0})
    return config.model_copy(update={"stages": ("distilled",), "teacher": used})


def places(options: Options) -> Iterator[Place]:
    """Seeds outermost: stopped half-way, every method has as many of them as the others."""
    first: tuple[int, ...] = (options.labelled,)
    parts = [(first, options.methods, options.seeds)]
    parts.append((options.more_labelled, options.more_methods, options.more_seeds))
    for numbers, methods, seeds in parts:
        for seed in range(options.first_seed, options.first_seed + seeds):
            for labelled in numbers:
                for pair in options.pairs:
                    yield from (Place(pair, labelled, method, seed) for method in methods)


class Notebook:
    """Networks that are done, a line each, by the configuration they were trained with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, Cell] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                known = json.loads(line)
                key = known.pop("key")
                self.cells[key] = Cell(**known)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # the half-written line of a killed run

    def cell(self, config: Config, train: Callable[[Config], Outcome]) -> Cell:
        """From the notebook, or by training; the run's folder is only needed in between."""
        from .pipeline import fingerprint

        told = json.dumps(fingerprint(config.with_unlabelled_index(), config.stages[-1]))
        key = hashlib.sha256(told.encode()).hexdigest()[:24]
        if key not in self.cells:
            self.cells[key] = cell = _cell(train(config), config.stages[-1])
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **dataclasses.asdict(cell)}) + "\n")
            shutil.rmtree(config.run, ignore_errors=True)
        return self.cells[key]


def _cell(outcome: Outcome, stage: str) -> Cell:
    result = outcome.results[stage]
    named = zip(outcome.data.class_names, result.scores.class_iou, strict=True)
    scores = result.scores.miou, result.scores.pixel_accuracy
    return Cell(*scores, dict(named), round(result.seconds, 1))


def run(options: Options, console: Console) -> tuple[Cells, Teachers]:
    """Train what is not trained yet. Returns the students and each pair's teacher."""
    from . import pipeline
    from .objectives import TeacherMemory

    quiet = Console(quiet=True)
    notebook = Notebook(options.run / "cells.jsonl")
    memories = {pair: TeacherMemory() for pair in options.pairs}
    teachers: Teachers = {}
    for pair in options.pairs:
        config = configure(options, pair, None)  # its folder is kept: students need the weights
        teachers[pair] = _cell(pipeline.run(config, quiet), "teacher")
        say(console, f"{pair}: teacher {100 * teachers[pair].miou:.1f} %")
    cells: Cells = {}
    for place in places(options):
        cells[place] = cell = notebook.cell(
            configure(options, place.pair, place.method, place.labelled, place.seed),
            partial(pipeline.run, console=quiet, memory=memories[place.pair]),
        )
        text = f"{place.pair}, {place.labelled} labels, seed {place.seed}, {_title(place.method)}"
        say(console, f"{text}: {100 * cell.miou:.1f} % ({cell.seconds:.0f} s)")
    return cells, teachers


# -- what it says ----------------------------------------------------------------------------------


class Gain(NamedTuple):
    """Of one method over another, in points of mIoU: the mean, and where 95 % of the means lie if
    the seeds are drawn again (bootstrap); NaN of one seed."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        middle, low, high = (f"{round(value, 1) + 0.0:+.1f}" for value in self)
        return middle if math.isnan(self.low) else f"{middle} ({low} to {high})"


def of_method(cells: Cells, pair: str, labelled: int, method: str) -> dict[int, Cell]:
    """The students of a method, by seed."""
    return {
        place.seed: cell for place, cell in cells.items() if place[:3] == (pair, labelled, method)
    }


def scores(cells: Cells, pair: str, labelled: int, method: str) -> dict[int, float]:
    """mIoU in percent, by seed."""
    found = of_method(cells, pair, labelled, method)
    return {seed: 100 * cell.miou for seed, cell in found.items()}


def class_means(cells: Cells, pair: str, labelled: int, method: str) -> list[float]:
    """IoU of each class in percent, over the seeds that have one; NaN where none has."""
    found = of_method(cells, pair, labelled, method).values()
    values = np.array([list(cell.class_iou.values()) for cell in found])
    means: list[float] = np.ma.masked_invalid(100 * values).mean(0).filled(math.nan).tolist()
    return means


def gain(one: dict[int, float], other: dict[int, float]) -> Gain:
    """Of one over the other, seed by seed."""
    gains = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
    if len(gains) < 2:
        return Gain(float(gains.mean()) if len(gains) else math.nan)
    drawn = np.random.default_rng(0).choice(gains, (_RESAMPLES, len(gains))).mean(1)
    return Gain(float(gains.mean()), *np.quantile(drawn, (0.025, 0.975)).tolist())


def verdict(options: Options, cells: Cells) -> str:
    """Whether HeteroAKD beats the better of the KDs, in a sentence; nothing without both."""
    said, clear = [], True
    for pair in options.pairs:
        ours, *rivals = (scores(cells, pair, options.labelled, m) for m in (OURS, *RIVALS))
        rivals = [rival for rival in rivals if rival]
        if not ours or not rivals:
            return ""
        found = gain(ours, max(rivals, key=lambda rival: mean(rival.values())))
        clear &= found.low > 0
        said.append(f"{_direction(pair)} {found}")
    head = "HeteroAKD beats KD" if clear else "HeteroAKD does not beat KD beyond the interval"
    return (
        f"{head}: {'; '.join(said)} points of mIoU over the better of the KDs, mean and 95 % "
        f"interval over {options.seeds} seeds, {options.labelled} labelled images."
    )


Rows = list[list[str]]  # the first: of titles


def by_method(options: Options, cells: Cells, teachers: Teachers) -> Rows:
    """Scores with the first number of labels, and gains over the first method and over KD."""
    base = options.methods[0]
    rival = next((name for name in reversed(RIVALS) if name in options.methods), None)
    others = [base, rival] if rival else [base]
    head = ["direction", f"method, {options.labelled} labels", "mIoU, % (mean ± sd)"]
    rows = [[*head, *(f"gain over {_title(other)}" for other in others)]]
    for pair in options.pairs:
        teacher = f"{100 * teachers[pair].miou:.1f}"
        rows.append([_direction(pair), "teacher, all labels", teacher, *[""] * len(others)])
        own = {m: scores(cells, pair, options.labelled, m) for m in options.methods}
        for method, values in own.items():
            spread = f"{mean(values.values()):.1f}"
            spread += f" ± {stdev(values.values()):.1f}" if len(values) > 1 else ""
            over = ("" if method in (base, m) else str(gain(values, own[m])) for m in others)
            rows.append(["", _title(method), spread, *over])
    return rows


def by_labels(options: Options, cells: Cells) -> Rows:
    """Scores and gains of the methods that were trained with every number of labels."""
    base = options.more_methods[0]
    rows = [["direction", "method", *(f"{number} labels" for number in options.numbers)]]
    for pair in options.pairs:
        for method in options.more_methods:
            row = [_direction(pair), _title(method)]
            for number in options.numbers:
                own, alone = (scores(cells, pair, number, m) for m in (method, base))
                more = "" if method == base else f", {gain(own, alone)}"
                row.append(f"{mean(own.values()):.1f}{more}" if own else "")
            rows.append(row)
    return rows


def by_class(options: Options, cells: Cells) -> Rows:
    """IoU of each class with the first number of labels."""
    rows = [["direction", "IoU by class, %", *next(iter(cells.values())).class_iou]]
    for pair in options.pairs:
        for method in options.methods:
            means = class_means(cells, pair, options.labelled, method)
            shown = ("-" if math.isnan(value) else f"{value:.1f}" for value in means)
            rows.append([_direction(pair), _title(method), *shown])
    return rows


def markdown(rows: Rows) -> str:
    """A table for a document."""
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


def draw(options: Options, cells: Cells, teachers: Teachers) -> bytes:
    """A PNG with a row for each direction: mIoU over the number of labels; what classes gain."""
    from matplotlib.figure import Figure  # late: it takes long to import

    from .visualization import encoded

    base, names = options.methods[0], list(next(iter(cells.values())).class_iou)
    shown = [m for m in options.methods if m in (OURS, *RIVALS)] or list(options.methods[1:])
    size = (10.5, 3.4 * len(options.pairs))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(len(options.pairs), 2, squeeze=False)
    for (left, right), pair in zip(panels, options.pairs, strict=True):
        for index, method in enumerate(dict.fromkeys((*options.more_methods, *options.methods))):
            known = {n: list(scores(cells, pair, n, method).values()) for n in options.numbers}
            points = [(n, values) for n, values in known.items() if values]
            if not points:
                continue
            style = {"color": "0.45" if method == base else f"C{index}"}
            means = [(n, mean(values)) for n, values in points]
            left.plot(*np.transpose(means), "o-", label=_title(method), markersize=4, **style)
            for n, values in points:
                left.scatter([n] * len(values), values, s=6, alpha=0.5, **style)
        line = {"color": "C3", "linestyle": "--", "linewidth": 1, "label": "teacher, all labels"}
        left.axhline(100 * teachers[pair].miou, **line)
        left.set(xlabel="labelled images", ylabel="validation mIoU, %", title=_direction(pair))
        left.set_xscale("log")
        left.set_xticks(options.numbers, [str(n) for n in options.numbers])
        left.minorticks_off()
        alone, width = class_means(cells, pair, options.labelled, base), 0.8 / max(1, len(shown))
        for index, method in enumerate(shown):
            gains = np.subtract(class_means(cells, pair, options.labelled, method), alone)
            centres = np.arange(len(names)) + (index - (len(shown) - 1) / 2) * width
            right.bar(centres, gains, width, label=_title(method))
        right.axhline(0.0, color="0.3", linewidth=0.8)
        right.set_xticks(range(len(names)), [n.replace("$", r"\$") for n in names], rotation=30)
        right.set_title(f"{options.labelled} labels: IoU over {_title(base)}, points", fontsize=10)
        for panel in (left, right):
            panel.legend(fontsize=7, frameon=False)
    return encoded(figure, "png")


def _direction(pair: str) -> str:
    return DIRECTIONS.get(pair, Path(pair).stem)


def _title(method: str) -> str:
    return TITLES.get(method, Path(method).stem)


def report(options: Options, cells: Cells, teachers: Teachers, console: Console) -> None:
    """Write results.json, table.md and experiment.png into the folder; print the table."""
    content = {
        "options": {name: str(value) for name, value in dataclasses.asdict(options).items()},
        "version": __version__,
        "teachers": {pair: dataclasses.asdict(cell) for pair, cell in teachers.items()},
        "students": [{**place._asdict(), **dataclasses.asdict(c)} for place, c in cells.items()],
    }
    main_table, said = by_method(options, cells, teachers), verdict(options, cells)
    tables = [main_table, by_labels(options, cells), by_class(options, cells)]
    if not options.more_labelled:
        del tables[1]
    text = "\n\n".join([said, *map(markdown, tables)]) + "\n"
    # `finite`: NaN (labels that are all ignored) is no JSON.
    write_file(options.run / "results.json", json.dumps(finite(content), indent=1).encode())
    write_file(options.run / "table.md", text.encode())
    write_file(options.run / "experiment.png", draw(options, cells, teachers))
    head, *rows = main_table
    view = Table(*head, title=f"Validation, seeds: {options.seeds}; gains with 95 % intervals")
    for row in rows:
        view.add_row(*map(Text, row))  # a name of the user's holds no markup
    console.print(view)
    for line in filter(
        None, (said, f"Written: {options.run}/results.json, table.md, experiment.png")
    ):
        say(console, line)


def main(argv: list[str] | None, console: Console) -> None:
    """The command, without what becomes of errors."""
    with quiet_broken_pipe():
        options = tyro.cli(Options, prog="heteroakd-experiment", args=argv, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, methods=FEW, seeds=3, more_labelled=())
    check(options)
    with locked(options.run, "experiment"):
        report(options, *run(options, console), console)
