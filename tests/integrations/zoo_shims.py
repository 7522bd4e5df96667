"""Lets libraries that want compiled operators be imported where those cannot be loaded.

A plugin of pytest (`-p zoo_shims`) for the folder `zoo`, which holds pure-Python mmcv and
torchvision's CUDA build beside whatever torch is there. What is missing is declared, so that
imports succeed; calling it still fails.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch

_KEPT: list[Any] = []


class Stub(types.ModuleType):
    """A module that has every function, and none that works."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name}: is not installed here")

        return missing


def torchvision() -> None:
    """Importing it registers fake kernels for two operators of its library, which may not load."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        importlib.import_module("torchvision")


def mmcv() -> None:
    """`mmcv.ops` asks a compiled module for each of its functions."""
    if importlib.util.find_spec("mmcv._ext") is not None:
        return

    sys.modules["mmcv._ext"] = Stub("mmcv._ext")


def scipy() -> None:
    """100 MB, of which mmseg imports a function each for a loss, an assigner and a transform."""
    if importlib.util.find_spec("scipy") is None:
        for name in ("scipy", "scipy.optimize", "scipy.ndimage", "scipy.interpolate"):
            sys.modules[name] = Stub(name)


if importlib.util.find_spec("torchvision"):
    torchvision()
if importlib.util.find_spec("mmcv"):
    mmcv()
    scipy()
