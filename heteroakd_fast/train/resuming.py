"""What a checkpoint holds, compared with the run that is to go on from it.

A checksum says that a file is as it was written, not that what was written fits: everything that a
run takes over is compared before any of it is used, so that it is refused in one message or taken
over as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import random_states, restore_random_states
from .errors import CheckpointError, shortened

#: What a checkpoint holds, see `Trainer._state`, by the types of it.
CONTENT: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "step": int,
    "model": Mapping,
    "loss": Mapping,
    "never_finite": list,
    "optimizer": dict,
    "optimized": list,
    "scaler": dict,
    "random": list,
    "best_miou": float,
    "scores": (dict, type(None)),
    "seconds": float,
    "names": list,
    "rows": (Tensor, type(None)),
    "fingerprint": dict,
}


def check_types(folder: Path, state: Mapping[str, Any], stage: str) -> None:
    """Refuse a state with other keys, with values of other types, or of another stage.

    Raises:
        CheckpointError: it is one.
    """
    if lacking := sorted(CONTENT.keys() - state.keys()):
        raise CheckpointError(
            f"{folder}: the checkpoint lacks {', '.join(lacking)}: written by another version; "
            "use a new --run folder, or go on with that version"
        )
    problems = [f"unknown key {key!r}" for key in state if key not in CONTENT]
    problems += [
        f"{key}: got {_shown(state[key])}"
        for key, kind in CONTENT.items()
        if not isinstance(state[key], kind) or isinstance(state[key], bool)
    ]
    if not problems and state["stage"] != stage:
        problems = [f"stage: got {state['stage']!r}, expected {stage!r}"]
    _refuse(folder, problems)


def check_content(
    folder: Path,
    state: Mapping[str, Any],
    *,
    objective: nn.Module,
    like: Mapping[str, Any],
    entry: Mapping[str, Tensor],
    steps: int | None,
    classes: int,
) -> None:
    """Refuse what does not fit the run.

    Args:
        like: what the run has at its start for the keys "model", "loss" and "scaler".
        entry: what the optimiser keeps of a parameter of the shape [3, 2].
        steps: of the run; None: anything goes, because the configuration changed.

    Raises:
        CheckpointError: something does not.
    """
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    problems = [
        *(text for key in like for text in _differences(state[key], like[key], key)),
        *_strings("never_finite", state["never_finite"]),
        *_strings("names", state["names"]),
        *_progress(state, steps),
        *_scores(state["scores"], classes),
    ]
    if not problems and (wrong := sorted(trained.keys() & set(state["never_finite"]))):
        problems.append(f"never_finite: has {shortened(wrong, 3)}, which are trained")
    problems += _optimizer(state, trained, entry)
    rows = state["rows"]
    columns = len(state["names"])
    fits = rows is None or (
        rows.dim() == 2 and rows.shape[1] == columns and rows.is_floating_point()
    )
    if not fits:
        problems.append(f"rows: got {_shown(rows)}, expected floating point (n, {columns})")
    if not state["random"]:
        problems.append("random: got no state, expected one for each rank")
    for rank, states in enumerate(state["random"]):
        problems += _random(states, f"random.{rank}")
    _refuse(folder, problems)


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{folder}: the checkpoint does not fit the run:\n  "
            + "\n  ".join(problems[:8])
            + f"{more}\nUse a new --run folder, or remove this one to start again"
        )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{layout}"
    return f"{type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")


def _differences(found: Any, like: Any, name: str) -> Iterator[str]:
    """Other types, keys, lengths, shapes and dtypes."""
    if isinstance(like, Mapping) and isinstance(found, Mapping):
        yield from (f"{name}.{key}: missing" for key in like if key not in found)
        yield from (f"{name}.{key}: unknown" for key in found if key not in like)
        for key in (key for key in like if key in found):
            yield from _differences(found[key], like[key], f"{name}.{key}")
    elif isinstance(like, tuple) and isinstance(found, tuple) and len(found) == len(like):
        for index, (one, other) in enumerate(zip(found, like, strict=True)):
            yield from _differences(one, other, f"{name}.{index}")
    elif _shown(found) != _shown(like):
        yield f"{name}: got {_shown(found)}, expected {_shown(like)}"


def _strings(name: str, values: list[Any]) -> Iterator[str]:
    if not all(isinstance(value, str) for value in values):
        yield f"{name}: got {shortened(list(map(_shown, values)), 3)}, expected names"


def _progress(state: Mapping[str, Any], steps: int | None) -> Iterator[str]:
    step, best, seconds = state["step"], state["best_miou"], state["seconds"]
    if not 0 <= step <= (step if steps is None else steps):
        yield f"step: got {step}, expected 0 to {steps}"
    if not -1.0 <= best <= 1.0:
        yield f"best_miou: got {best}, expected -1 to 1"
    if not 0.0 <= seconds < math.inf:
        yield f"seconds: got {seconds}, expected 0 or more"


def _scores(scores: dict[str, Any] | None, classes: int) -> Iterator[str]:
    if scores is None:
        return
    like = {"miou": 0.0, "pixel_accuracy": 0.0, "class_iou": (0.0,) * classes}
    problems = list(_differences(scores, like, "scores"))
    yield from problems
    values = () if problems else (scores["miou"], scores["pixel_accuracy"], *scores["class_iou"])
    # NaN is the score of a class that is nowhere.
    if bad := [value for value in values if value < 0.0 or value > 1.0]:
        yield f"scores: got {bad[0]}, expected 0 to 1"


def _optimizer(
    state: Mapping[str, Any], trained: Mapping[str, nn.Parameter], entry: Mapping[str, Tensor]
) -> Iterator[str]:
    own, optimized = state["optimizer"], state["optimized"]
    for name in sorted(map(str, own.keys() ^ set(map(str, optimized)))):
        yield f"optimizer.{name}: " + ("missing" if name in optimized else "unknown")
    for name, found in own.items():
        if name not in trained:
            yield f"optimizer.{name}: unknown to the model"
            continue
        like = {k: trained[name].data if v.shape == (3, 2) else v for k, v in entry.items()}
        problems = list(_differences(found, like, f"optimizer.{name}"))
        yield from problems
        count = None if problems or "step" not in like else float(found["step"])
        if count is not None and not 1 <= count <= state["step"]:
            yield f"optimizer.{name}.step: got {count:g}, expected 1 to {state['step']}"


def _random(states: Any, name: str) -> Iterator[str]:
    like = {key: value for key, value in random_states().items() if key != "cuda"}
    found = states
    if isinstance(states, dict):
        found = {key: value for key, value in states.items() if key != "cuda"}
        # Of the last Gaussian number that was drawn, or None: of either type.
        python = states.get("python")
        if isinstance(python, tuple) and len(python) == 3 and isinstance(python[2], float | None):
            like["python"] = (*like["python"][:2], python[2])
    problems = list(_differences(found, like, name))
    yield from problems
    if problems:
        return
    before = random_states()
    try:
        if not 0 <= found["numpy"][2] <= 624:  # numpy takes what it is given
            raise ValueError(f"numpy's position is {found['numpy'][2]}, expected 0 to 624")
        restore_random_states(found)
    except Exception as error:  # each generator has its own
        yield f"{name}: {error}"
    finally:
        restore_random_states(before)
