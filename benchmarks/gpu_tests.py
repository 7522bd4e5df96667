"""Tests as items of a worker: `python -m benchmarks.gpu_tests I/N [arguments of pytest]`.

It runs the I-th of N shares of the tests that the arguments choose. A test that breaks its CUDA
context, or hangs, costs itself alone: another process goes on with the next one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import pytest

from .stages import END, say

__all__ = ["main"]


class Tell:
    """A plugin that chooses the tests and tells of each as `stages.go_through` does."""

    def __init__(self, share: str, start: int) -> None:
        self.share = [int(part) for part in share.split("/")]
        self.start = self.begun = start

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        i, n = self.share
        items[:] = items[i::n][self.start :]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(name=nodeid, begin=self.begun)
        self.begun += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        found = {}
        if report.skipped and isinstance(report.longrepr, tuple):
            found["skipped"] = report.longrepr[-1].removeprefix("Skipped: ")
        elif not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            found["failed"] = str(crash.message if crash else report.longrepr)[:600]
        self.say(name=report.nodeid, found=found)
        if "CUDA error" in found.get("failed", ""):  # so may be the context
            os._exit(1)

    def say(self, **event: object) -> None:
        print()  # what the terminal says may stand before it
        say(**event)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", allow_abbrev=False)
    parser.add_argument("share")
    parser.add_argument("--start", type=int, default=0)
    options, rest = parser.parse_known_args(arguments)
    code = pytest.main([*rest, "-q"], [Tell(options.share, options.start)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, 5):  # 5: none was chosen
        return int(code)
    say(name=END)  # what failed was told
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
