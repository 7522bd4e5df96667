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
import io
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
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
BASE, OURS, RIVALS = "task", "heteroakd", ("kd", "kd-t2")
DIRECTIONS = {
    "Transformer -> CNN": "pair-tiny-segformer-unet",
    "CNN -> Transformer": "pair-tiny-unet-segformer",
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
    pairs: tuple[str, ...] = tuple(DIRECTIONS.values())
    """Recipes or files with a teacher and a student each."""
    methods: tuple[str, ...] = tuple(TITLES)
    """Recipes or files of methods; the first is what the others are compared with."""
    labelled: int = 12
    """Labelled images, with every method."""
    seeds: int = 10
    """Students of each method there."""
    more_labelled: tuple[int, ...] = (24, 48, 192)
    """Further numbers of labelled images."""
    more_methods: tuple[str, ...] = (BASE, "kd-t2", OURS)
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
    config = load_config(options.data, pair, *([method] if method else []))
    folder = options.run / Path(pair).stem
    teacher, student = config.teacher, config.student
    if options.steps is not None:
        student = student.model_copy(update={"steps": options.steps})
    if options.teacher_steps is not None:
        teacher = teacher.model_copy(update={"steps": options.teacher_steps})
    data = {"workers": options.workers, "labelled": labelled or options.labelled}
    common = {
        "device": options.device,
        "threads": options.threads,
        "seed": seed,
        "data": config.data.model_copy(update=data),
        # A line a minute is enough of each of so many runs.
        "log": config.log.model_copy(update={"eval_every": 10**9, "tensorboard": False}),
    }
    if method is None:
        own = {"stages": ("teacher",), "run": folder / "teacher", "teacher": teacher}
    else:
        name = f"{Path(method).stem}-{data['labelled']}-seed{seed}"
        own = {"run": folder / name, "student": student}
        if config.stages != ("alone",):
            weights = folder / "teacher" / "teacher" / "model.safetensors"
            used = teacher.model_copy(update={"weights": weights, "steps": 0})
            own |= {"stages": ("distilled",), "teacher": used}
    return config.model_copy(update={**common, **own})


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
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **dataclasses.asdict(cell)}) + "\n")
            shutil.rmtree(config.run, ignore_errors=True)
        return self.cells[key]


def _cell(outcome: Outcome, stage: str) -> Cell:
    result = outcome.results[stage]
    named = zip(outcome.data.class_names, result.scores.class_iou, strict=True)
    scores = result.scores.miou, result.scores.pixel_accuracy
    return Cell(*scores, dict(named), round(result.seconds, 1))


Cells = dict[Place, Cell]


def run(options: Options, console: Console) -> tuple[Cells, dict[str, Cell]]:
    """Train what is not trained yet. Returns the students and each pair's teacher."""
    from . import pipeline
    from .objectives import TeacherMemory

    quiet = Console(quiet=True)
    notebook = Notebook(options.run / "cells.jsonl")
    memories = {pair: TeacherMemory() for pair in options.pairs}
    teachers: dict[str, Cell] = {}
    for pair in options.pairs:
        config = configure(options, pair, None)  # its folder is kept: students need the weights
        teachers[pair] = _cell(pipeline.run(config, quiet), "teacher")
        say(console, f"{pair}: teacher {_percent(teachers[pair].miou)}")
    cells: Cells = {}
    for place in places(options):
        memory = memories[place.pair]
        cell = notebook.cell(
            configure(options, place.pair, place.method, place.labelled, place.seed),
            partial(pipeline.run, console=quiet, memory=memory),
        )
        cells[place] = cell
        text = f"{place.pair}, {place.labelled} labels, seed {place.seed}, {_title(place.method)}"
        say(console, f"{text}: {_percent(cell.miou)} ({cell.seconds:.0f} s)")
    return cells, teachers


# -- what it says ----------------------------------------------------------------------------------


class Gain(NamedTuple):
    """Of one method over another, in points of mIoU: the mean, and where 95 % of the means lie if
    the seeds are drawn again (bootstrap)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):  # one seed
            return f"{round(self.mean, 1) + 0.0:+.1f}"
        low, high = (round(value, 1) + 0.0 for value in (self.low, self.high))
        return f"{round(self.mean, 1) + 0.0:+.1f} ({low:+.1f} to {high:+.1f})"


def scores(cells: Cells, pair: str, labelled: int, method: str) -> dict[int, float]:
    """mIoU in percent, by seed."""
    return {
        place.seed: 100 * cell.miou
        for place, cell in cells.items()
        if (place.pair, place.labelled, place.method) == (pair, labelled, method)
    }


def gain(one: dict[int, float], other: dict[int, float]) -> Gain:
    """Of one over the other, seed by seed."""
    gains = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
    if len(gains) < 2:
        return Gain(float(gains.mean()) if len(gains) else math.nan, math.nan, math.nan)
    drawn = np.random.default_rng(0).choice(gains, (_RESAMPLES, len(gains))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Gain(float(gains.mean()), float(low), float(high))


def verdict(options: Options, cells: Cells) -> str:
    """Whether HeteroAKD beats the better of the KDs, in a sentence; nothing without both."""
    said, clear = [], True
    for pair in options.pairs:
        ours = scores(cells, pair, options.labelled, OURS)
        rivals = [scores(cells, pair, options.labelled, rival) for rival in RIVALS]
        rivals = [rival for rival in rivals if rival]
        if not ours or not rivals:
            return ""
        found = gain(ours, max(rivals, key=lambda rival: statistics.mean(rival.values())))
        clear &= found.low > 0
        said.append(f"{_direction(pair)} {found}")
    head = "HeteroAKD beats KD" if clear else "HeteroAKD does not beat KD beyond the interval"
    return (
        f"{head}: {'; '.join(said)} points of mIoU over the better of the KDs, mean and 95 % "
        f"interval over {options.seeds} seeds, {options.labelled} labelled images."
    )


def markdown(options: Options, cells: Cells, teachers: dict[str, Cell]) -> str:
    """The tables for a document."""
    rival = next((name for name in reversed(RIVALS) if name in options.methods), None)
    over = f" | gain over {_title(rival)}" if rival else ""
    base = _title(options.methods[0])
    lines = [
        verdict(options, cells),
        "",
        f"| direction | method, {options.labelled} labels | mIoU, % (mean ± sd) "
        f"| gain over {base}{over} |",
        "|---" * (5 if rival else 4) + "|",
    ]
    for pair in options.pairs:
        teacher = f"| {_direction(pair)} | teacher, all labels | {100 * teachers[pair].miou:.1f} |"
        lines.append(teacher + " |" * (2 if rival else 1))
        alone = scores(cells, pair, options.labelled, options.methods[0])
        for method in options.methods:
            own = scores(cells, pair, options.labelled, method)
            gains = [gain(own, alone) if method != options.methods[0] else ""]
            if rival:
                compared = method not in (options.methods[0], rival)
                other = scores(cells, pair, options.labelled, rival)
                gains.append(gain(own, other) if compared else "")
            lines.append(f"| | {_title(method)} | {_spread(own)} | {' | '.join(map(str, gains))} |")
    lines += ["", *_by_labels(options, cells), "", *_by_class(options, cells)]
    return "\n".join(lines) + "\n"


def _by_labels(options: Options, cells: Cells) -> list[str]:
    numbers = sorted({options.labelled, *options.more_labelled})
    if len(numbers) < 2:
        return []
    head = [f"{number} labels" for number in numbers]
    lines = [f"| direction | method | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    for pair in options.pairs:
        for method in options.more_methods:
            row = []
            for number in numbers:
                own = scores(cells, pair, number, method)
                alone = scores(cells, pair, number, options.more_methods[0])
                more = "" if method == options.more_methods[0] else f", {gain(own, alone)}"
                row.append(f"{statistics.mean(own.values()):.1f}{more}" if own else "")
            lines.append(f"| {_direction(pair)} | {_title(method)} | {' | '.join(row)} |")
    return lines


def _by_class(options: Options, cells: Cells) -> list[str]:
    names = list(next(iter(cells.values())).class_iou)
    lines = [f"| direction | IoU by class, % | {' | '.join(names)} |"]
    lines.append("|---" * (2 + len(names)) + "|")
    for pair in options.pairs:
        for method in options.methods:
            means = class_means(options, cells, pair, method)
            row = " | ".join("-" if math.isnan(value) else f"{value:.1f}" for value in means)
            lines.append(f"| {_direction(pair)} | {_title(method)} | {row} |")
    return lines


def class_means(options: Options, cells: Cells, pair: str, method: str) -> list[float]:
    """IoU of each class in percent, over the seeds that have one."""
    rows = [
        list(cell.class_iou.values())
        for place, cell in cells.items()
        if (place.pair, place.labelled, place.method) == (pair, options.labelled, method)
    ]
    columns = (
        [value for value in column if not math.isnan(value)] for column in zip(*rows, strict=True)
    )
    return [100 * statistics.mean(column) if column else math.nan for column in columns]


def draw(options: Options, cells: Cells, teachers: dict[str, Cell], path: Path) -> None:
    """A row for each direction: mIoU over the number of labels, and what classes gain."""
    # Late and without a display: it takes long to import, and servers have no screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(options.pairs)
    figure = Figure(figsize=(10.5, 3.4 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    numbers = sorted({options.labelled, *options.more_labelled})
    base = options.methods[0]
    names = list(next(iter(cells.values())).class_iou)
    panels = figure.subplots(rows, 2, squeeze=False)
    for (left, right), pair in zip(panels, options.pairs, strict=True):
        for index, method in enumerate(dict.fromkeys((*options.more_methods, *options.methods))):
            by_number = {n: scores(cells, pair, n, method) for n in numbers}
            known = [n for n in numbers if by_number[n]]
            if not known:
                continue
            means = [statistics.mean(by_number[n].values()) for n in known]
            colour = "0.45" if method == base else f"C{index}"
            left.plot(known, means, marker="o", color=colour, label=_title(method), markersize=4)
            for n in known:
                values = list(by_number[n].values())
                left.scatter([n] * len(values), values, color=colour, s=6, alpha=0.5)
        teacher = 100 * teachers[pair].miou
        left.axhline(teacher, color="C3", linestyle="--", linewidth=1, label="teacher, all labels")
        left.set_xscale("log")
        left.set_xticks(numbers, [str(n) for n in numbers])
        left.minorticks_off()
        left.set(xlabel="labelled images", ylabel="validation mIoU, %", title=_direction(pair))
        left.legend(fontsize=7, frameon=False)
        alone = class_means(options, cells, pair, base)
        shown = [m for m in options.methods if m in (OURS, *RIVALS)] or list(options.methods[1:])
        for index, method in enumerate(shown):
            gains = np.subtract(class_means(options, cells, pair, method), alone)
            places = np.arange(len(names)) + (index - (len(shown) - 1) / 2) * 0.8 / len(shown)
            right.bar(places, gains, 0.8 / len(shown), label=_title(method))
        right.axhline(0.0, color="0.3", linewidth=0.8)
        right.set_xticks(range(len(names)), [n.replace("$", r"\$") for n in names], rotation=30)
        right.set_title(f"{options.labelled} labels: IoU over {_title(base)}, points", fontsize=10)
        right.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, (buffer.getbuffer(),))


def _spread(values: dict[int, float]) -> str:
    mean = f"{statistics.mean(values.values()):.1f}"
    return mean + (f" ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else "")


def _direction(pair: str) -> str:
    return next((name for name, recipe in DIRECTIONS.items() if recipe == pair), Path(pair).stem)


def _title(method: str) -> str:
    return TITLES.get(method, Path(method).stem)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def report(options: Options, cells: Cells, teachers: dict[str, Cell], console: Console) -> None:
    """Write results.json, table.md and experiment.png into the folder; print the table."""
    content = {
        "options": {name: str(value) for name, value in dataclasses.asdict(options).items()},
        "version": __version__,
        # NaN (labels that are all ignored) is no JSON.
        "teachers": {pair: finite(dataclasses.asdict(cell)) for pair, cell in teachers.items()},
        "students": [
            {**place._asdict(), **finite(dataclasses.asdict(cell))} for place, cell in cells.items()
        ],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(options.run / "results.json", (text.encode(),))
    tables = markdown(options, cells, teachers).encode("utf-8")
    write_atomically(options.run / "table.md", (tables,))
    draw(options, cells, teachers, options.run / "experiment.png")
    view = Table(title=f"Validation mIoU, %, {options.labelled} labels, seeds: {options.seeds}")
    for column in ("direction", "method", "mean and sd", "gain, 95 % interval"):
        view.add_column(column)
    for pair in options.pairs:
        alone = scores(cells, pair, options.labelled, options.methods[0])
        for method in options.methods:
            own = scores(cells, pair, options.labelled, method)
            over = "" if method == options.methods[0] else str(gain(own, alone))
            view.add_row(Text(_direction(pair)), Text(_title(method)), _spread(own), over)
    console.print(view)
    if said := verdict(options, cells):
        say(console, said)
    say(console, f"Written: {options.run}/results.json, table.md, experiment.png")


def main(argv: list[str] | None, console: Console) -> None:
    """The command, without what becomes of errors."""
    with quiet_broken_pipe():
        options = tyro.cli(Options, prog="heteroakd-experiment", args=argv, description=__doc__)
    if options.quick:
        few = (BASE, "kd-t2", OURS)
        options = dataclasses.replace(options, methods=few, seeds=3, more_labelled=())
    check(options)
    with locked(options.run, "experiment"):
        report(options, *run(options, console), console)
