"""Triton's interpreter, so that the real kernels run on the CPU; import before triton is.

Where there is a GPU, kernels run on it and nothing is interpreted. The interpreter prepares the
language anew at each call of a function inside a kernel, a millisecond each; once per kernel is
enough, and makes it several times faster.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch

__all__ = ["INTERPRETED", "set_up"]

INTERPRETED = (
    importlib.util.find_spec("triton") is not None
    and not torch.cuda.is_available()
    and not torch.xpu.is_available()
)


def set_up() -> None:
    if not INTERPRETED:
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import triton.language as tl
    from triton.runtime import interpreter

    prepared: set[int] = set()

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        module = self.fn.__globals__
        if id(module) not in prepared:
            prepared.add(id(module))
            # what sees `tl` itself has been prepared by the kernel that calls it
            if not any(value is tl for value in module.values()):
                interpreter._patch_lang(self.fn)
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    # what numpy says of an infinity that the kernel means
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime")
