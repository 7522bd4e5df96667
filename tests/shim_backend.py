"""Backend `cuda` on the CPU, its kernels run by the shim, where there is no GPU to run them.

HETEROAKD_TEST_SHIM=0 leaves it out: the backend is then skipped with its own reason.
"""

from __future__ import annotations

import os
import platform
import shutil

import cuda_shim
import torch

from heteroakd_fast.backends import compiled

__all__ = ["USED", "set_up"]

USED = (
    not torch.cuda.is_available()
    and os.environ.get("HETEROAKD_TEST_SHIM") != "0"
    and platform.system() == "Linux"
    and any(map(shutil.which, ("g++", "clang++", "c++")))
)


def set_up() -> None:
    """Before the backends are first asked about. Built once, for all workers; loaded when used."""
    if not USED:
        return
    compiled.CUDA.__init__("cuda", lambda: None, cuda_shim.load, "cpu")  # type: ignore[misc]
