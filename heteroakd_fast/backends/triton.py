"""Backend `triton`: the kernels of `kernels/`, installed as `heteroakd_fast.kernels`."""

from __future__ import annotations

import importlib.util

import torch

from ._planned import PlannedBackend

__all__ = ["BACKEND"]


def _reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed (`pip install triton`), and this version has no kernels yet."
        )
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        return "no GPU is visible to torch, and this version has no Triton kernels yet."
    return "this version has no Triton kernels yet; 'reference' runs on the GPU."


BACKEND = PlannedBackend("triton", _reason())
