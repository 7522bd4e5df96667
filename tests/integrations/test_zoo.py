"""The tests that need torchvision, timm, mmcv and what is built on them, in a process of their own.

An installed torchvision without its operators breaks other libraries that look for it. So these
packages lie in a folder (`dev.py test` fills `.venv/zoo`) that only this process has on its path.
With the libraries properly installed, `pytest tests/integrations/zoo_mmseg.py` runs as it is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import tiny

ZOO = tiny.ROOT / ".venv" / "zoo"
HERE = tiny.ROOT / "tests" / "integrations"
FILES = ("zoo_smp.py", "zoo_mmseg.py")


def test_in_the_zoo() -> None:
    folder = os.environ.get("HETEROAKD_ZOO", str(ZOO))
    if not os.path.isdir(os.path.join(folder, "mmseg")):
        pytest.skip(
            f"needs real models: pip install --no-deps --target {folder} "
            "-r tests/integrations/zoo.txt"
        )
    path = os.pathsep.join([str(HERE), str(tiny.ROOT), folder, os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "zoo_shims", "-p", "no:cacheprovider"),
            *("-W", "ignore", *(str(HERE / name) for name in FILES)),
        ],
        cwd=tiny.ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    report = run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0, report
    summary = re.search(r"(\d+) passed(.*)", run.stdout)
    assert summary is not None, report
    written = sum((HERE / name).read_text().count("\ndef test_") for name in FILES)
    assert int(summary[1]) >= written, report
    assert "skipped" not in summary[2], report
