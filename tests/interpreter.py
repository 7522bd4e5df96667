"""Triton's interpreter, so that the real kernels run on the CPU; import before triton is.

Where there is a GPU, kernels run on it and nothing is interpreted. The interpreter prepares the
language anew at each call of a function inside a kernel, a millisecond each; once per kernel is
enough, and makes it several times faster.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import numpy as np
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

    as_it_was = interpreter.InterpreterBuilder.cast_impl

    def cast(self: object, source: interpreter.TensorHandle, to: tl.dtype) -> object:
        """GPUs round to the nearest bfloat16; the interpreter cuts off."""
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return as_it_was(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast
    # what numpy says of an infinity that the kernel means
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime")
