"""The run's own records: metrics.jsonl, TensorBoard events, and what the console shows."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from .._requirements import pip_command
from .files import write_atomically

log = logging.getLogger("heteroakd_fast.train")

_PLAIN_SECONDS = 15.0
_MUCH_WAITING = 0.2

Record = dict[str, Any]


def say(console: Console, text: str) -> None:
    """A line as it is: paths and names of the user's hold no markup, and are not broken."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def finite(value: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def read_metrics(path: Path, last_step: float = math.inf) -> list[Record]:
    """The lines of metrics.jsonl up to a step; none where there is no such file. What a killed run
    left half-written is skipped."""
    records: list[Record] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            record = json.loads(line)
            if float(record["step"]) <= last_step:
                records.append(record)
    return records


@cache  # said once, not for every stage
def _say_without_tensorboard() -> None:
    command = pip_command("train")
    log.info("TensorBoard is not installed: only metrics.jsonl is written; %s", command)


class Records(AbstractContextManager["Records"]):
    """What a stage writes down: metrics.jsonl and, if it is installed, TensorBoard's events; on
    silent ranks nothing. What is after the resumed step is cut, so that no step comes twice."""

    def __init__(
        self, folder: Path, resumed_step: int, *, tensorboard: bool, enabled: bool = True
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._file: Any = None
        self.tensorboard: Any = None  # the writer of events
        if not enabled:
            return
        kept = read_metrics(self.path, resumed_step)
        write_atomically(self.path, [_encoded(record) for record in kept])
        self._file = self.path.open("ab", buffering=0)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                _say_without_tensorboard()
                return
            self.tensorboard = SummaryWriter(f"{folder}/tensorboard", purge_step=resumed_step + 1)

    def __exit__(self, *_: object) -> None:
        for file in filter(None, (self._file, self.tensorboard)):
            file.close()

    def line(self, record: Record) -> None:
        """Write down numbers of a "kind" at a "step", and show those that TensorBoard can."""
        if self._file is not None:
            try:
                self._file.write(_encoded(record))
            except OSError as error:
                # A full disk does not say where.
                raise OSError(error.errno, error.strerror, str(self.path)) from None
        if self.tensorboard is not None:
            kind, per_class = record["kind"], record.get("class_iou", {})
            shown = {f"{kind}/{name}": value for name, value in record.items() if name != "seconds"}
            for name, value in (
                shown | {f"{kind} iou/{n}": v for n, v in per_class.items()}
            ).items():
                if isinstance(value, float) and math.isfinite(value):
                    self.tensorboard.add_scalar(name, value, record["step"])


def _encoded(record: Record) -> bytes:
    # NaN (an absent class) is no JSON.
    return (json.dumps(finite(record), allow_nan=False) + "\n").encode()


class StageProgress(AbstractContextManager["StageProgress"]):
    """A bar on a terminal; elsewhere (nohup, batch systems) plain lines: at the first logged step,
    then every 15 seconds, and at the end."""

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        self.console, self.name, self.total = console, name, total
        self._first_step, self._first_time = done, time.monotonic()
        self._next_line = self._first_time + _PLAIN_SECONDS
        self._waited = 0.0
        self._terms = ""
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[text]}"))
        # Interactive: a terminal that can move its cursor.
        self._bar = Progress(*columns, console=console, disable=not console.is_interactive)
        self._task = self._bar.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
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
        now, first = time.monotonic(), terms is not None and not self._terms
        rate = (step - self._first_step) / max(now - self._first_time, 1e-9)
        if terms is not None:
            self._terms = " ".join(f"{key} {value:.3f}" for key, value in terms.items())
        shown = f"{step}/{self.total}  {self._terms}  {rate * images:.3g} img/s"
        if self.waiting > _MUCH_WAITING:
            shown += f", {100 * self.waiting:.0f} % waiting for images (data.workers)"
        self._bar.update(self._task, completed=step, text=shown)
        if self._bar.disable and (first or now >= self._next_line or step == self.total):
            self._next_line = now + _PLAIN_SECONDS
            left = timedelta(seconds=round((self.total - step) / max(rate, 1e-9)))
            self.say(f"{self.name} {shown}" + (f", {left} left" if left else ""))

    def say(self, text: str) -> None:
        say(self.console, text)
