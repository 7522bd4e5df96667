"""A plugin of pytest (`-p benchmarks.gpu_pytest`): tells of each test as workers tell of items."""

from __future__ import annotations

import pytest

from .stages import say


class _Tell:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        found = {}
        if report.skipped:
            found["skipped"] = str(
                report.longrepr[-1] if isinstance(report.longrepr, tuple) else ""
            )
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            found["failed"] = str(crash.message if crash else report.longrepr)[:300]
        print()  # what the terminal says may stand before it
        say(name=report.nodeid, found=found)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in the processes of xdist, whose reports come here
        config.pluginmanager.register(_Tell())
