"""Checkpoints that survive a kill, a full disk and a damaged file.

The newest file and the one before it are kept; a checksum in front of the content tells a
damaged file from a good one. Weights that are not finite are neither written nor read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError, shortened
from .files import check_regular, remove_leftovers, write_atomically

log = logging.getLogger("heteroakd_fast.train")

_MAGIC = b"HAKDCKP1"
_DIGEST_BYTES = 32

NEWEST = "last.ckpt"
PREVIOUS = "previous.ckpt"
NOT_WRITTEN = "; it is not written, and what was written before is as it was"


def non_finite(state: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the tensors in nested mappings that have a NaN or an infinity."""
    found: set[str] = set()
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= non_finite(value, f"{name}.")
        elif isinstance(value, Tensor):
            if value.layout == torch.strided:  # an axis that was expanded is looked at once
                value = value[tuple(slice(None if n else 1) for n in value.stride())]
            if not value.isfinite().all():
                found.add(name)
    return found


def check_finite(path: Path, state: Mapping[str, Any], then: str = "") -> None:
    """Refuse what `path` holds, or is to hold, where it is not finite.

    Args:
        state: its key "never_finite" names the tensors, see `non_finite`, that may be anything.
        then: what follows from it, for the message.

    Raises:
        CheckpointError: another tensor has a NaN or an infinity.
    """
    if bad := sorted(non_finite(state) - set(state.get("never_finite", ()))):
        raise CheckpointError(
            f"{path}: got values that are not finite in {shortened(bad, 4)}, expected finite ones"
            + then
        )


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the newest checkpoint; the newest so far becomes the previous one.

    Raises:
        CheckpointError: it cannot be written, or see `check_finite`; the earlier ones are intact.
    """
    check_finite(folder / NEWEST, state, NOT_WRITTEN)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    digest = hashlib.sha256(content).digest()
    try:
        write_atomically(folder / NEWEST, (_MAGIC, digest, content), keep_as=folder / PREVIOUS)
    except OSError as error:
        kept = [name for name in (NEWEST, PREVIOUS) if (folder / name).exists()]
        raise CheckpointError(
            f"{folder / NEWEST}: the checkpoint of step {state.get('step')} cannot be written: "
            f"{error.strerror}; "
            + (
                f"intact: {', '.join(kept)}. Make room and run the same command again"
                if kept
                else "none before it"
            )
        ) from error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be used, or None where there was never one.

    One that cannot is set aside as `*.unusable`: it must not become the previous one in place of
    the one that can.

    Raises:
        CheckpointError: there are some, and none can be used.
    """
    remove_leftovers(folder)
    problems = []
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _read(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("%s; going on from %s, step %s", problems[0], name, state.get("step"))
            with contextlib.suppress(OSError):  # which the next checkpoint will report
                (folder / NEWEST).replace(folder / f"{NEWEST}.unusable")
        return state
    if problems:
        raise CheckpointError(
            "\n".join(problems)
            + f"\nno checkpoint in {folder} can be used; remove the folder to start again"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        check_regular(path, CheckpointError)
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    head = len(_MAGIC) + _DIGEST_BYTES
    if len(data) < head or not data.startswith(_MAGIC):
        raise CheckpointError(f"{path}: not a checkpoint, or cut short ({len(data)} bytes)")
    content = memoryview(data)[head:]
    if hashlib.sha256(content).digest() != data[len(_MAGIC) : head]:
        raise CheckpointError(f"{path}: damaged (its checksum does not fit)")
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise TypeError(f"holds a {type(state).__name__}, expected a dict with names for keys")
        check_finite(path, state)
    except CheckpointError:
        raise
    except Exception as error:  # torch has many kinds of error here; all mean the same to the user
        raise CheckpointError(f"{path}: cannot be decoded: {error}") from error
    return state


def random_states() -> dict[str, Any]:
    """Every global random state that a model or a loss may draw from."""
    # The legacy generator: a user's model may draw from it.
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        # As a tensor: a numpy array is not allowed by weights_only.
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any], name: str = "random states") -> None:
    """Go on drawing where `states` were taken.

    Raises:
        CheckpointError: a generator does not take its state; `name` says whose it is.
    """
    try:
        kind, keys, position, *rest = states["numpy"]
        if not 0 <= position <= 624:  # numpy takes what it is given
            raise ValueError(f"numpy's position is {position}, expected 0 to 624")
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))  # noqa: NPY002
        torch.set_rng_state(states["torch"])
        random.setstate(states["python"])
        cuda = states.get("cuda", [])
        if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
    except Exception as error:  # each generator has its own
        raise CheckpointError(f"{name}: {error}; take a new --run folder") from None
