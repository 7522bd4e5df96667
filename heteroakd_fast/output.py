"""What a loss call returns."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from .terms import TERMS

__all__ = ["DistillationOutput"]


class DistillationOutput(NamedTuple):
    """The loss, its parts, and what to look at; new fields come at the end.

    Only `loss` has a graph: `(out.ce + out.kd).backward()` is torch's "element 0 of tensors does
    not require grad"; to weigh terms otherwise, set the weights of the loss. A term is an attribute
    too: `out.kd` is `out.terms.get("kd")`. A NamedTuple, so that data-parallel wrappers,
    `torch.compile` and pytree code look inside; but no tensor and no sum of tuples, so arithmetic
    raises.
    """

    loss: Tensor
    """Sum of weight * term; float32 (float64 for float64 logits), differentiable once."""
    terms: dict[str, Tensor]
    """Each term that was computed, a detached scalar, a mean before its weight, by name: "ce",
    "teacher_ce", "kd", "hetero", "feature", "cwd", "dkd", "focal", "ofa", "dice", "tversky", a
    second one of a kind as "kd_2"; of `HeteroAKDLoss` with projectors "projector", the cross
    entropies of both projected logits."""
    valid: Tensor
    """Number of labelled pixels, int64 scalar, of this process: those that are neither
    `ignore_index` nor `unlabelled_index`, nor of weight 0."""
    denominators: dict[str, Tensor] | None = None
    """Each term's own denominator, float64 scalar, the mean over the ranks with `process_group=`.
    For exact gradient accumulation: the mean of them over the micro-batches, given back as
    `normalizer=`, makes the mean of the micro-batches' losses that of the whole batch. None where
    final logits and projected features have grids of their own (`resolution="logits"`)."""
    maps: dict[str, Tensor] | None = None
    """With `return_maps=True`: "reliability" (of the teacher, r_t) and "discrepancy", each
    [B, H, W] on the label grid of the pass, 0 at ignored pixels. In the preset `paper`, where
    both are per class, those of the labelled class."""
    distilled: Tensor | None = None
    """Number of pixels that terms of distillation count, int64 scalar: `valid`, and those of
    `unlabelled_index`."""
    diagnostics: dict[str, Tensor] | None = None
    """With `diagnostics=True`, on the grid of the loss, float32, detached: "pixel_accuracy" (share
    of the labelled pixels whose label has the student's largest logit), "class_loss" ([C], mean
    -log softmax(z_s)_y over the pixels of each label, NaN where there is none); where a pass reads
    the teacher's logits "agreement" (share of the distilled pixels where both models' largest
    logit is of one class); and of the first `HeteroAKD` the means "reliability" and "discrepancy"
    over the distilled pixels. Of this process; NaN where nothing was counted."""

    def _refuse(self, *other: Any) -> NoReturn:
        raise TypeError(
            "DistillationOutput: is a result and not a tensor; take its loss, as in 2 * out.loss. "
            "The terms are detached, for logs: their weights are arguments of the loss"
        )

    def __radd__(self, other: Any) -> tuple[Any, ...]:
        # What collects results may put tuples together; sum() begins with 0.
        return (*other, *self) if isinstance(other, tuple) else self._refuse()

    def __getattr__(self, name: str) -> Any:
        hint = (
            f"; it is a result and not a tensor: out.loss.{name}" if hasattr(Tensor, name) else ""
        )
        raise AttributeError(f"DistillationOutput has no attribute {name!r}{hint}")


def _term(name: str) -> property:
    return property(lambda output: output.terms.get(name), doc=f'`terms.get("{name}")`')


for _name in (*(term.name for term in TERMS), "projector"):
    setattr(DistillationOutput, _name, _term(_name))
for _name in ("add", "mul", "rmul", "sub", "rsub", "truediv", "rtruediv", "pow", "neg"):
    setattr(DistillationOutput, f"__{_name}__", DistillationOutput._refuse)
