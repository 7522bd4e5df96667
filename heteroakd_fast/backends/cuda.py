"""Backend `cuda`: the compiled kernels of `csrc/cuda`."""

from __future__ import annotations

import torch

from .. import _extension
from ._planned import PlannedBackend

__all__ = ["BACKEND"]


def _reason() -> str:
    extension = _extension.unavailable()
    if extension is not None:
        return extension
    if not _extension.has_cuda():
        return (
            "the compiled extension was built without CUDA; rebuild with nvcc on the PATH and "
            "HETEROAKD_BUILD_CUDA=1."
        )
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch."
    return (
        "the CUDA side of the extension is loaded, but this version has no CUDA loss kernels yet; "
        "'reference' runs on the GPU."
    )


BACKEND = PlannedBackend("cuda", _reason())
