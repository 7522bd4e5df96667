"""What the loss modules share: arguments as attributes, and copies with a process group."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ._checks import check_constant, plain_tensor, suggest

__all__ = ["AdjustableLoss", "SharesGroup", "forwarded"]


class SharesGroup:
    """A base for modules whose copies have their `process_group`, which by itself cannot be copied.

    `copy.deepcopy`, and with it `AveragedModel`, shares the group. A pickle has its name: loaded
    where no group of this name is initialised, the module warns and has none.
    """

    process_group: Any = None

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)  # of object since Python 3.11
        state: dict[str, Any] = dict(self.__dict__ if inherited is None else inherited())
        if "process_group" in state:
            state["process_group"] = _Shared(state["process_group"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state.get("process_group"), _Shared):
            state = {**state, "process_group": state["process_group"].group}
        super().__setstate__(state)  # type: ignore[misc]


class AdjustableLoss(SharesGroup, nn.Module):
    """A loss whose arguments are attributes: what is set later is checked, and counts from then on.

    A name that is none, but looks like one, raises; any other attribute is the caller's own.
    """

    _adjustable: ClassVar[tuple[str, ...]] = ()
    """Names that may be set."""
    _fixed: ClassVar[tuple[str, ...]] = ()
    """Names that decide which modules there are."""
    _renamed: ClassVar[Mapping[str, str]] = {}
    """Names that other losses have for ours."""

    @classmethod
    def _arguments(cls) -> tuple[str, ...]:
        return (*cls._fixed, *cls._adjustable, "process_group")

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names or self._adjustable}

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All of `_adjustable` as they are kept: checked, one by one and together."""
        raise NotImplementedError

    def _encode(self) -> None:
        """What a subclass derives from its arguments whenever one is set."""

    def _own_class_weight(self, value: Any, num_classes: int | None) -> Tensor | None:
        """Class weights as the buffer keeps them: a copy, floating point, on the module's device
        where a sequence comes."""
        current = self._buffers.get("class_weight")
        if value is None or value is current:
            return current if value is current else None
        device = None if current is None or isinstance(value, Tensor) else current.device
        try:
            given = plain_tensor(torch.as_tensor(value, device=device))
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise TypeError(f"class_weight: got {kind}, expected C numbers or a tensor") from None
        if given.is_complex():
            raise TypeError(f"class_weight: got {given.dtype}, expected real numbers")
        check_constant(given, "class_weight")
        weight = given.detach().clone()
        weight = weight if weight.is_floating_point() else weight.float()
        if weight.dim() != 1 or (num_classes is not None and len(weight) != num_classes):
            expected = "[C]" if num_classes is None else f"({num_classes},)"
            raise ValueError(f"class_weight: got shape {tuple(weight.shape)}, expected {expected}")
        return weight

    if TYPE_CHECKING:  # the arguments, which no class lists a second time

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an argument, checked, or anything else that a module may have.

        Raises:
            TypeError, ValueError: the argument cannot have this value.
            AttributeError: it is fixed, or there is none of this name but of one like it.
        """
        if name in self._adjustable:
            settings = self._check_settings({**self._settings(), name: value})
            super().__setattr__(name, settings[name])
            self._encode()
            return
        if name in self._fixed:
            raise AttributeError(f"{name}: is fixed when the loss is built; build another loss")
        elif not name.startswith("_") and not hasattr(self, name):
            hint = suggest(name, self._arguments(), self._renamed)
            if hint is not None:
                raise AttributeError(
                    f"{name}: {type(self).__name__} has no such attribute; {hint} (For one of its "
                    "own, a subclass declares a value in its class body.)"
                )
        super().__setattr__(name, value)


def forwarded(name: str) -> Any:
    """An attribute of a module that is the argument `name` of the loss inside it, `loss`."""

    def get(module: Any) -> Any:
        return getattr(module.loss, name)

    def set_(module: Any, value: Any) -> None:
        setattr(module.loss, name, value)

    return property(get, set_)


class _Shared:
    """What stands for a group while its module is copied."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        name = getattr(self.group, "group_name", None)
        return (_Shared, (self.group,)) if name is None else (_named, (name,))


def _named(name: str) -> _Shared:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        from torch._C._distributed_c10d import _resolve_process_group

        with contextlib.suppress(RuntimeError):
            return _Shared(_resolve_process_group(name))  # type: ignore[arg-type]
    warnings.warn(
        f"process_group: the pickle names the group {name!r}, which is not initialised here; the "
        "module has none, set its process_group",
        stacklevel=2,
    )
    return _Shared(None)
