"""Work in processes of its own, within time limits: what crashes or hangs costs itself alone.

A worker is a program that goes through a list of items (`go_through`) and tells what it finds, a
JSON object a line; `follow` runs one and goes on behind an item that ends its process. Stages run
workers and other commands one after another into one JSON file. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

__all__ = [
    "END",
    "Ran",
    "Report",
    "Stage",
    "StageRun",
    "event_of",
    "execute",
    "follow",
    "go_through",
    "last_line",
    "run_stages",
    "say",
]

END: Final = "end"
_TAIL: Final = 4000  # characters of output kept of a command that went wrong
_LEAST: Final = 5.0  # seconds: with less, a stage is not begun
_STATUSES: Final = ("running", "skipped", "passed", "timeout", "failed")  # the last one counts
Details = dict[str, Any]
Item = tuple[str, Callable[[], Details]]


# --- in the worker -----------------------------------------------------------------------------


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def go_through(items: Sequence[Item], start: int) -> None:
    """Do the items from `start` on and tell {"name": ..., "begin": index} before each, {"name":
    ..., "found": {...}} after it; "failed" or "skipped" in what was found says why."""
    for index, (name, work) in list(enumerate(items))[start:]:
        say(name=name, begin=index)
        broken = False
        try:
            found = work()
            if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_available():
                cuda.synchronize()  # an error of a kernel belongs to the item that launched it
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}".strip()[:600]}
            broken = "CUDA" in found["failed"]
        say(name=name, found=found)
        if broken:  # so may be the context: another process goes on
            raise SystemExit(1)
    say(name=END)


# --- outside of it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """How one command ended."""

    code: int | None
    """Exit status; None when it was stopped at a limit"""
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        return self.output[-_TAIL:]

    @property
    def status(self) -> str:
        return "timeout" if self.code is None else "failed" if self.code else "passed"


def execute(
    command: Sequence[str],
    limit: float = float("inf"),
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda _: None,
    silent: float = float("inf"),
    cwd: Path | None = None,
) -> Ran:
    """Run a command; after `limit` seconds, or `silent` seconds without a line, it and its
    children are ended. `environment` is the whole of it; None: that of this process."""
    began = heard = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # its children (compilers, the sanitizer's target) end with it
    )

    def read() -> None:
        nonlocal heard
        assert process.stdout is not None
        for line in process.stdout:
            heard = time.monotonic()
            lines.append(line)
            on_line(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code: int | None = None
    try:
        while code is None and (left := min(began + limit, heard + silent) - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(min(left, 1.0))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process stuck in the driver does not die at once, and must not hold the rest.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        reader.join(5)
    return Ran(code, "".join(lines), time.monotonic() - began)


def event_of(line: str) -> Details:
    """What a worker tells, empty for anything else that it prints."""
    if not line.startswith('{"name":'):
        return {}
    try:
        event: Details = json.loads(line)
    except ValueError:  # a line that another process broke
        return {}
    return event


def last_line(output: str) -> str:
    """What a program said last, apart from events."""
    lines = [line.strip() for line in output.splitlines() if line.strip()[:1] not in ("", "{")]
    return lines[-1][:300] if lines else "it printed nothing"


def follow(
    command: Sequence[str],
    tell: Callable[[Details], None],
    run: Callable[..., Ran] = execute,
    left: Callable[[], float] = lambda: float("inf"),
) -> Ran:
    """Run a worker until its items are done and pass on its events. An item that ends the process,
    or hangs, has failed, and another process (`--start`) goes on behind it.

    Args:
        run: `execute`, or what calls it with limits; is given the command and `on_line`.
        left: seconds that are left; without any no other process goes on.

    Returns:
        How the last process ended, with the output of all.
    """
    start, begun, name, told, outputs = 0, -1, "", True, []

    def on_line(line: str) -> None:
        nonlocal begun, name, told
        if event := event_of(line):
            name, begun = event["name"], event.get("begin", begun)
            told = "begin" not in event
            tell(event)

    while True:
        more = ["--start", str(start)] if start else []
        ran = run([*command, *more], on_line=on_line)
        outputs.append(ran.output)
        if ran.code == 0 or left() <= 0:
            break
        if name == END or begun < start:  # no item is to blame
            break
        if not told:
            how = "hangs" if ran.code is None else f"ends its process with {ran.code}"
            if ran.code == -signal.SIGKILL:
                how += " (killed, perhaps for want of memory)"
            tell({"name": name, "found": {"failed": f"{how}: {last_line(ran.output)}"}})
        start, told = begun + 1, True
    return Ran(ran.code, "".join(outputs), ran.seconds)


@dataclass
class Report:
    """The contents of the file."""

    path: Path
    minutes: float
    commit: str
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    complete: bool = False
    """False in a file that a killed run left"""
    stages: dict[str, Details] = field(default_factory=dict)
    """Of each its status, seconds, limit, commands and details"""

    def write(self) -> None:
        """Whole or not at all: a run may be killed while it writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        fields = {name: value for name, value in vars(self).items() if name != "path"}
        partial.write_text(json.dumps({"schema": 3, **fields}, indent=1) + "\n")
        os.replace(partial, self.path)

    @property
    def ok(self) -> bool:
        return all(stage["status"] in ("passed", "skipped") for stage in self.stages.values())

    def items(self, stage: str) -> Details:
        """What the items of a stage found."""
        found: Details = self.stages.get(stage, {}).get("details", {}).get("items", {})
        return found


@dataclass
class StageRun:
    """A stage while it runs: its work runs commands by these methods and fills `details`."""

    name: str
    limit: float
    report: Report
    dry: bool = False
    """Print commands, run nothing"""
    environment: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    status: str = "running"
    details: Details = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began, self._written = time.monotonic(), 0.0
        self._lock = threading.RLock()  # several commands of a stage may run at once

    @property
    def left(self) -> float:
        return self._began + self.limit - time.monotonic()

    def run(
        self, command: Sequence[str], environment: dict[str, str] | None = None, **options: Any
    ) -> Ran:
        """`execute` within the stage's limit."""
        settings = [f"{name}={value}" for name, value in (environment or {}).items()]
        self.commands.append(shlex.join([*settings, *command]))
        if self.dry:
            print(f"    {self.commands[-1]}")
            return Ran(0, "", 0.0)
        everything = {**os.environ, **self.environment, **(environment or {})}
        return execute(command, self.left, everything, **{"cwd": self.cwd, **options})

    def python(self, *arguments: str, **options: Any) -> Ran:
        return self.run([sys.executable, *arguments], **options)

    def items(
        self,
        *worker: str,
        group: str = "items",
        prefix: Sequence[str] = (),
        silent: float,
        **options: Any,
    ) -> Ran:
        """`follow` a worker; what its items find goes into `details`. One that prints nothing for
        `silent` seconds hangs."""
        with self._lock:
            found: Details = self.details.setdefault(group, {})

        def tell(event: Details) -> None:
            if "found" in event:
                self.record(found, event["name"], event["found"])

        run = partial(self.run, silent=silent, **options)
        ran = follow([*prefix, sys.executable, *worker], tell, run, lambda: self.left)
        with self._lock:
            for one in found.values():
                self.conclude(next((x for x in ("failed", "skipped") if x in one), "passed"))
        if ran.code is None and self.left <= 0:
            self.conclude("timeout")
        elif ran.code != 0:
            reason = f"exit code {ran.code}: {last_line(ran.output)}"
            self.conclude(ran.status, reason, ran.tail)
        return ran

    def record(self, group: Details, name: str, value: Any) -> None:
        """Set a value in `details` or in a part of it, and soon in the file."""
        with self._lock:
            group[name] = value
            if time.monotonic() - self._written > 1.0:
                self.publish()

    def conclude(self, status: str, reason: str = "", output: str = "") -> None:
        """Set the status, unless a worse one is set already."""
        with self._lock:
            self.status = max(self.status, status, key=_STATUSES.index)
            if reason:
                self.details.setdefault("reasons", []).append(reason)
            if output:
                self.details["output"] = output

    def publish(self) -> None:
        """Put what is known into the file."""
        if self.dry:
            return
        with self._lock:
            self._written = time.monotonic()
            self.report.stages[self.name] = {
                "status": self.status,
                "seconds": round(self._written - self._began, 1),
                "limit": round(max(self.limit, 0.0), 1),
                "commands": self.commands,
                "details": self.details,
            }
            self.report.write()


@dataclass(frozen=True)
class Stage:
    name: str
    limit: float
    """Most seconds it may take, of those that are left; infinite: all of them"""
    work: Callable[[StageRun], None]


def run_stages(
    stages: Sequence[Stage],
    report: Report,
    seconds: float,
    summary: Callable[[Details], str] = lambda details: "; ".join(details.get("reasons", [])),
    **options: Any,
) -> None:
    """Run stages one after another within `seconds`, with a line for each; `options` are those of
    `StageRun`."""
    deadline = time.monotonic() + seconds
    for stage in stages:
        limit = min(stage.limit, deadline - time.monotonic())
        run = StageRun(stage.name, limit, report, **options)
        if run.dry:
            print(f"{stage.name} (at most {limit:.0f} s)")
        if limit < min(_LEAST, stage.limit):
            run.conclude("timeout", "no time was left to begin it")
        else:
            try:
                stage.work(run)
            except Exception as error:  # a stage's defect must not cost the stages after it
                run.conclude("failed", f"{type(error).__name__}: {error}")
        if run.status == "running":
            run.conclude("skipped")
        report.complete = stage is stages[-1]
        run.publish()
        if not run.dry:
            took = report.stages[stage.name]["seconds"]
            line = f"{stage.name:12} {run.status:8} {took:6.1f} s  {summary(run.details)}"
            print(line.rstrip(), flush=True)
