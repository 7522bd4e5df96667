"""Triton's interpreter, so that the real kernels run on the CPU; import before triton is.

Where there is a GPU, kernels run on it and nothing is interpreted. The interpreter prepares the
language anew at each call of a function inside a kernel, a millisecond each; once per kernel is
enough, and makes it several times faster.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import numpy as np
import torch

__all__ = ["INTERPRETED", "set_up"]

INTERPRETED = (
    importlib.util.find_spec("triton") is not None
    and not torch.cuda.is_available()
    and not torch.xpu.is_available()
)


def remember(tl: Any, interpreter: Any) -> None:
    """Most of the interpreter's time goes into types that it has made before, and into sums in 64
    bits that would tell an overflow in its mode `debug` only."""
    builder, semantic = interpreter.interpreter_builder, interpreter.TritonSemantic
    assert not builder.options.debug
    builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    blocks: dict[tuple[object, ...], dict[str, object]] = {}
    arrays: dict[str, object] = {}
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    array_type, broadcast = interpreter._get_np_dtype, semantic.broadcast_impl_value

    def block(self: Any, element: Any, shape: Any) -> None:
        sizes = [getattr(size, "value", size) for size in shape]
        key = (element.name, *sizes)
        if type(element) is not tl.dtype:  # the name of a pointer does not tell all
            make_block(self, element, sizes)
        elif key in blocks:
            self.__dict__ = blocks[key]
        else:
            make_block(self, element, sizes)
            blocks[key] = self.__dict__

    def tensor(self: Any, handle: object, of: Any) -> None:
        if "of_tensor" not in of.__dict__:
            make_tensor(self, handle, of)
            of.of_tensor = (self.shape, self.numel, self.dtype)
        self.handle, self.type = handle, of
        self.shape, self.numel, self.dtype = of.of_tensor

    def array_type_of(of: Any) -> object:
        name = of.scalar.name
        if name not in arrays:
            arrays[name] = array_type(of)
        return arrays[name]

    def broadcast_unlike(self: Any, lhs: Any, rhs: Any) -> Any:
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if all(blocks) and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    interpreter._get_np_dtype, semantic.broadcast_impl_value = array_type_of, broadcast_unlike


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
    remember(tl, interpreter)
    # what numpy says of an infinity that the kernel means
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime")
