"""What commands need beyond torch and numpy, and how it is installed. Imports nothing of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Final

__all__ = ["TRAINING", "explain", "pip_command"]

#: Modules without which the driver's commands cannot end, and the distributions they are in. Of the
#: extra `train`, `transformers` is needed by some networks only, and `tensorboard` by its logs.
TRAINING: Final[Mapping[str, str]] = {
    "filelock": "filelock",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "rich": "rich",
    "safetensors": "safetensors",
    "tyro": "tyro",
} | ({} if sys.version_info >= (3, 11) else {"tomli": "tomli"})


def pip_command(extra: str) -> str:
    """What installs the extra into the environment that has the package already."""
    return f'pip install "heteroakd-fast[{extra}]"'


def explain(needed: Mapping[str, str], extra: str) -> str | None:
    """One line on what of `needed` is not installed and how it gets there; None if nothing is.

    Args:
        needed: modules, and the distributions they are in.
        extra: of this package, which brings them.
    """
    absent = [name for module, name in needed.items() if not _found(module)]
    if not absent:
        return None
    return f"{', '.join(absent)}: not installed; {pip_command(extra)}"


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
