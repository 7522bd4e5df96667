"""The run's own records: metrics.jsonl, TensorBoard events, and what the console shows."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .._requirements import pip_command
from .files import write_atomically

log = logging.getLogger("heteroakd_fast.train")

_PLAIN_SECONDS = 15.0
_MUCH_WAITING = 0.2


def say(console: Console, text: str) -> None:
    """A line as it is: paths and names of the user's hold no markup, and are not broken."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


class MetricsFile:
    """One JSON object per line; lines after the resumed step are cut, so that none comes twice."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [
                line
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if _step_of(line) <= resumed_step
            ]
            write_atomically(path, [(line + "\n").encode() for line in kept])
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        # NaN (an absent class) is no JSON.
        clean = {key: finite(value) for key, value in record.items()}
        try:
            self._file.write(json.dumps(clean, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            # A full disk does not say where.
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        # What could not be written has been reported, and would fail here once more.
        with contextlib.suppress(OSError):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What can be read of metrics.jsonl, in the order of the steps; nothing where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    known = [line for line in lines if math.isfinite(_step_of(line))]
    return sorted((json.loads(line) for line in known), key=lambda record: float(record["step"]))


def duration(seconds: float) -> str:
    """Readable at a glance: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def throughput(images: float) -> str:
    """Of images a second; a large network on a CPU may need minutes for one."""
    if images >= 10:
        return f"{images:.0f} img/s"
    if images >= 1:
        return f"{images:.1f} img/s"
    return f"{60 * images:.1f} img/min"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # the half-written line of a killed run


def finite(value: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


class TensorBoard:
    """Scalars for TensorBoard; does nothing where it is switched off or not installed."""

    _said = False

    def __init__(self, folder: Path, resumed_step: int, enabled: bool) -> None:
        self._writer: Any = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not TensorBoard._said:
                TensorBoard._said = True
                log.info(
                    "TensorBoard is not installed: only metrics.jsonl is written; %s",
                    pip_command("train"),
                )
            return
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """A image, H x W x 3."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    @property
    def active(self) -> bool:
        return self._writer is not None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Records:
    """What a stage writes down: metrics.jsonl and TensorBoard; nothing on ranks that are silent."""

    def __init__(
        self, folder: Path, resumed_step: int, *, tensorboard: bool, enabled: bool = True
    ) -> None:
        self._file: MetricsFile | None = None
        if enabled:
            self._file = MetricsFile(folder / "metrics.jsonl", resumed_step)
        self.board = TensorBoard(folder / "tensorboard", resumed_step, enabled and tensorboard)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        self.board.close()

    def line(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(record)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.board.write(values, step)


class StageProgress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        self.console, self.name, self.total = console, name, total
        self._first_step, self._first_time = done, time.monotonic()
        self._last_line = self._first_time
        self._waited = 0.0
        self._text = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def waited(self, seconds: float) -> None:
        """That long the training stood still for its images."""
        self._waited += seconds

    @property
    def waiting(self) -> float:
        """Share of the time that was spent waiting for images."""
        return self._waited / max(time.monotonic() - self._first_time, 1e-9)

    def advance(self, step: int, terms: dict[str, float] | None, images: int) -> None:
        """Show that `step` steps are done; `terms` are new averages, where there are any."""
        now = time.monotonic()
        steps, seconds = step - self._first_step, now - self._first_time
        rate = steps / seconds if seconds > 0 else 0.0
        if terms is not None:
            self._text = " ".join(f"{key} {value:.3f}" for key, value in terms.items())
        shown = f"{self._text}  {throughput(rate * images)}"
        if self.waiting > _MUCH_WAITING:
            shown += f", {100 * self.waiting:.0f} % waiting for images (data.workers)"
        if self._bar:
            self._bar.update(self._task, completed=step, text=shown)
        elif now - self._last_line >= _PLAIN_SECONDS or step == self.total:
            self._last_line = now
            if rate and step < self.total:
                shown += f"  {duration((self.total - step) / rate)} left"
            say(self.console, f"{self.name} {step}/{self.total}  {shown}")

    def say(self, text: str) -> None:
        say(self._bar.console if self._bar else self.console, text)
