"""What a checkpoint holds, compared with the run that is to go on from it.

A checksum says that a file is as it was written, not that what was written fits: everything that a
run takes over is compared before any of it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from .checkpoint import random_states
from .errors import CheckpointError, shortened

#: Of 0 to 1; NaN is the score of a class that is nowhere.
Score = Annotated[float, Field(ge=0.0, le=1.0)]
_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


@with_config(_STRICT)
class SavedScores(TypedDict):
    """`Scores` as a mapping."""

    miou: Score
    pixel_accuracy: Score
    class_iou: tuple[Score, ...]


@with_config(_STRICT)
class State(TypedDict):
    """The content of a checkpoint."""

    stage: str
    step: Annotated[int, Field(ge=0)]
    model: dict[str, Any]
    loss: dict[str, Any]
    never_finite: list[str]
    optimizer: dict[str, Any]
    optimized: list[str]
    """Parameters that no loss reached have no state; of all others it must be there."""
    scaler: dict[str, Any]
    random: Annotated[list[dict[str, Any]], Field(min_length=1)]
    best_miou: Annotated[float, Field(ge=-1.0, le=1.0, allow_inf_nan=False)]
    scores: SavedScores | None
    seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    names: list[str]
    rows: Tensor | None
    fingerprint: dict[str, str]


_STATE = TypeAdapter(State)


def check_types(folder: Path, state: Mapping[str, Any], stage: str) -> None:
    """Refuse what is no `State` of the stage.

    Raises:
        CheckpointError: names every key, what it has and what was expected.
    """
    if lacking := sorted(State.__annotations__.keys() - state.keys()):
        raise CheckpointError(
            f"{folder}: the checkpoint lacks {', '.join(lacking)}: written by another version; "
            "use a new --run folder, or go on with that version"
        )
    try:
        _STATE.validate_python(state)
    except ValidationError as error:
        _refuse(folder, [_described(**problem) for problem in error.errors(include_url=False)])
    if state["stage"] != stage:
        _refuse(folder, [f"stage: got {state['stage']!r}, expected {stage!r}"])


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
    trained = {name: p.data for name, p in objective.named_parameters() if p.requires_grad}
    kept = {
        name: {k: trained[name] if v.shape == (3, 2) else v for k, v in entry.items()}
        for name in state["optimized"]
        if name in trained
    }
    of_rank = _without_cuda(random_states())
    of_rank["python"] = (*of_rank["python"][:2], None)
    like = {**like, "optimizer": kept, "random": [of_rank] * len(state["random"])}
    state = {**state, "random": list(map(_without_cuda, state["random"]))}
    problems = [text for key in like for text in _differences(state[key], like[key], key)]
    if steps is not None and state["step"] > steps:
        problems.append(f"step: got {state['step']}, expected 0 to {steps}")
    if wrong := sorted(trained.keys() & set(state["never_finite"])):
        problems.append(f"never_finite: has {shortened(wrong, 3)}, which are trained")
    if state["scores"] is not None and len(found := state["scores"]["class_iou"]) != classes:
        problems.append(f"scores.class_iou: got {_kind(found)}, expected tuple of {classes}")
    rows, columns = state["rows"], len(state["names"])
    if rows is not None and not (rows.is_floating_point() and rows.shape[1:] == (columns,)):
        problems.append(f"rows: got {_kind(rows)}, expected floating point (n, {columns})")
    for name, values in () if problems or "step" not in entry else state["optimizer"].items():
        if not 1 <= values["step"] <= state["step"]:
            came = f"{float(values['step']):g}, expected 1 to {state['step']}"
            problems.append(f"optimizer.{name}.step: got {came}")
    _refuse(folder, problems)


def _described(loc: tuple[Any, ...], input: Any, msg: str, **_: Any) -> str:
    value = f" {input!r}" if isinstance(input, int | float | str) else ""
    return f"{'.'.join(map(str, loc))}: got {_kind(input)}{value}; {msg}"


def _without_cuda(states: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in states.items() if key != "cuda"}


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{folder}: the checkpoint does not fit the run:\n  "
            + "\n  ".join(problems[:8])
            + f"{more}\nUse a new --run folder, or remove this one to start again"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{layout}"
    sized = isinstance(value, tuple | list)
    return f"{type(value).__name__} of {len(value)}" if sized else type(value).__name__


def _differences(found: Any, like: Any, name: str) -> Iterator[str]:
    """Other types, keys, lengths, shapes and dtypes. None stands for a float or none."""
    if isinstance(like, Mapping) and isinstance(found, Mapping):
        yield from (f"{name}.{key}: missing" for key in like if key not in found)
        yield from (f"{name}.{key}: unknown" for key in found if key not in like)
        for key in (key for key in like if key in found):
            yield from _differences(found[key], like[key], f"{name}.{key}")
    elif _kind(found) != _kind(like):
        if like is not None or not isinstance(found, float):
            yield f"{name}: got {_kind(found)}, expected {_kind(like)}"
    elif isinstance(like, tuple | list):
        for index, (one, other) in enumerate(zip(found, like, strict=True)):
            yield from _differences(one, other, f"{name}.{index}")
