"""What a loss call returns."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import Tensor

__all__ = ["DistillationOutput"]


class DistillationOutput(NamedTuple):
    """The loss, its parts, and what to look at.

    The terms are detached scalars, each a mean before its weight; a term that was not asked for
    was not computed and is None. Only `loss` has a graph: `(out.ce + out.kd).backward()` is torch's
    "element 0 of tensors does not require grad"; to weigh terms otherwise, set the weights of the
    loss. A NamedTuple, so that data-parallel wrappers, `torch.compile` and pytree code look inside
    without being taught; but no tensor and no sum of tuples, so arithmetic raises.
    """

    loss: Tensor
    """Sum of weight * term; float32 (float64 for float64 logits), differentiable once."""
    ce: Tensor | None = None
    """Cross entropy of the student's final logits."""
    teacher_ce: Tensor | None = None
    """Cross entropy of the teacher's logits (`functional.distillation_loss` only)."""
    kd: Tensor | None = None
    """T^2 times the divergence of the softened distributions."""
    hetero: Tensor | None = None
    """The HeteroAKD term."""
    feature: Tensor | None = None
    """Mean squared difference in the aligned logits space."""
    projector: Tensor | None = None
    """Cross entropies of the projected pair, student's plus teacher's (`HeteroAKDLoss` only)."""
    valid: Tensor | None = None
    """Number of pixels that are not `ignore_index`, int64 scalar, of this process."""
    maps: dict[str, Tensor] | None = None
    """With `return_maps=True`: "reliability" (of the teacher, r_t) and "discrepancy", each
    [B, H, W] on the label grid of the pass, 0 at ignored pixels. In the preset `paper`, where
    both are per class, those of the labelled class."""
    denominators: dict[str, Tensor] | None = None
    """Each term's own denominator, float64 scalar, the mean over the ranks with `process_group=`.
    For exact gradient accumulation: the mean of them over the micro-batches, given back as
    `normalizer=`, makes the mean of the micro-batches' losses that of the whole batch. None where
    final logits and projected features have grids of their own (`resolution="logits"`)."""
    cwd: Tensor | None = None
    """Channel-wise distillation (`ChannelWiseLoss` only)."""

    def terms(self) -> dict[str, Tensor]:
        """The terms that were computed, by name, for a log."""
        names = ("ce", "teacher_ce", "kd", "hetero", "feature", "projector", "cwd")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _refuse(self, *other: Any) -> NoReturn:
        raise TypeError(
            "DistillationOutput: is a result and not a tensor; take its loss, as in 2 * out.loss. "
            "The terms are detached, for logs: their weights are arguments of the loss"
        )

    def __radd__(self, other: Any) -> tuple[Any, ...]:
        # What collects results may put tuples together; sum() begins with 0.
        return (*other, *self) if isinstance(other, tuple) else self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        hint = (
            f"; it is a result and not a tensor: out.loss.{name}" if hasattr(Tensor, name) else ""
        )
        raise AttributeError(f"DistillationOutput has no attribute {name!r}{hint}")


for _name in ("add", "mul", "rmul", "sub", "rsub", "truediv", "rtruediv", "pow", "neg"):
    setattr(DistillationOutput, f"__{_name}__", DistillationOutput._refuse)
