"""What one training step minimises: plain cross entropy, or distillation from a frozen teacher.

Logits stay at the networks' own resolution; the losses upsample them on the fly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ChannelWiseLoss, DistillationOutput, HeteroAKDLoss
from .._evaluate import Normalizer
from ..functional import cross_entropy
from ..modules import SharesGroup
from .config import DistillConfig
from .errors import ConfigError, ModelError
from .models import forward_logits
from .taps import FeatureTap, probe_channels

#: What terms are divided by: the count of valid pixels, or each term's denominator by name.
LossNormalizer = Normalizer


class Teaching(NamedTuple):
    """What the teacher says about a batch."""

    logits: Tensor
    features: Tensor | None


class TeacherMemory:
    """Logits of one frozen teacher by the content of the images, for experiments that show few
    images many times. Each image goes through the teacher alone: what comes of it does not depend
    on what was asked for before."""

    def __init__(self, most_bytes: int = 1 << 30) -> None:
        self.room = most_bytes
        self._known: dict[bytes, Tensor] = {}

    def logits(self, teacher: nn.Module, images: Tensor) -> Tensor:
        found = []
        for image in images.split(1):
            key = hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest()
            logits = self._known.get(key)
            if logits is None:
                logits = self._known[key] = forward_logits(teacher, image)
                self.room -= logits.nbytes
            if self.room < 0:
                self.room += self._known.pop(next(iter(self._known))).nbytes
            found.append(logits)
        return torch.cat(found)


class Objective(SharesGroup, nn.Module):
    """A model with its loss; `model` and `loss` are what is trained and saved.

    Called with images and their labels it gives a `DistillationOutput`. Keywords: `teaching`, asked
    for where it is not given; `normalizer`, which replaces denominators as `DistillationOutput`
    names them; `return_maps`; `diagnostics`.
    """

    model: nn.Module
    loss: nn.Module
    process_group: Any = None
    """The ranks that share a batch; None: this one alone."""
    knows_denominators: bool
    """Whether what the terms divide by follows from the labels alone."""

    def teach(self, images: Tensor) -> Teaching | None:
        """The teacher's part, which needs no gradient; None without a teacher."""
        return None

    def normalizer_of(self, counts: Tensor) -> LossNormalizer:
        """The `normalizer` that makes these numbers of labelled and of distilled pixels the
        denominators; where the objective `knows_denominators`."""
        labelled: Tensor = counts[0]
        return labelled


class PlainObjective(Objective):
    """Cross entropy against the labels."""

    def __init__(
        self, model: nn.Module, config: DistillConfig, ignore_index: int, process_group: Any = None
    ) -> None:
        super().__init__()
        self.model, self.loss = model, nn.Module()
        self.options: dict[str, Any] = {**config.of_cross_entropy(), "ignore_index": ignore_index}
        self.class_weight = self.options.pop("class_weight")
        self.process_group = process_group
        self.knows_denominators = config.class_weight is None and config.resolution == "label"

    def forward(
        self, images: Tensor, target: Tensor, *, teaching: None = None, **asked: Any
    ) -> DistillationOutput:
        logits = forward_logits(self.model, images)
        weight = self.class_weight and torch.tensor(self.class_weight, device=logits.device)
        options = {**self.options, "class_weight": weight, "process_group": self.process_group}
        return cross_entropy(logits, target, **options, **asked)


class DistillObjective(Objective):
    """The student against the labels and a frozen teacher."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        *,
        num_classes: int,
        ignore_index: int,
        taps: tuple[str, str] | None,
        side: tuple[int, int],
        device: torch.device,
        seed: int,
        process_group: Any = None,
        memory: TeacherMemory | None = None,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`normalize`: the student's images to the teacher's, if they are not the same."""
        super().__init__()
        self.model, self.memory, self.normalize = student, memory, normalize
        # In a list, so that it is no submodule: not trained, not saved, not put in training mode.
        self._teacher = [teacher]
        self.taps = (FeatureTap(student, taps[0]), FeatureTap(teacher, taps[1])) if taps else None
        pairs = zip((student, teacher), self.taps or (), strict=False)
        channels = [probe_channels(model, tap, side, device) for model, tap in pairs]
        self.cwd_weight = config.cwd_weight
        weighted = config.class_weight is not None
        counted = {"valid"} if config.resolution == "label" and not config.cwd_weight else set()
        self.knows_denominators = {t.denominator(weighted) for t in config.terms()} <= counted
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                options = {**config.of_loss(), "ignore_index": ignore_index}
                self.loss = HeteroAKDLoss(num_classes, *channels, **options).to(device)
                self.cwd = ChannelWiseLoss(
                    temperature=config.cwd_temperature,
                    resolution="logits",
                    ignore_index=ignore_index,
                    unlabelled_index=config.unlabelled_index,
                )
            except (TypeError, ValueError) as error:
                raise ConfigError(f"distill: {error}") from error
        self.process_group = process_group

    @property
    def process_group(self) -> Any:  # type: ignore[override]
        return self.loss.process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self.loss.process_group = self.cwd.process_group = group

    def train(self, mode: bool = True) -> DistillObjective:
        super().train(mode)
        self._teacher[0].eval()
        return self

    def normalizer_of(self, counts: Tensor) -> LossNormalizer:
        normalizer: LossNormalizer = self.loss.normalizer_of(counts)  # type: ignore[operator]
        return normalizer

    @torch.no_grad()
    def teach(self, images: Tensor) -> Teaching:
        teacher = self._teacher[0]
        if self.normalize is not None:
            images = self.normalize(images)
        if self.taps is not None:
            with self.taps[1].listening() as tap:
                return Teaching(forward_logits(teacher, images), tap.take())
        ask = forward_logits if self.memory is None else self.memory.logits
        return Teaching(ask(teacher, images), None)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        *,
        teaching: Teaching | None = None,
        normalizer: LossNormalizer | None = None,
        **looks: bool,
    ) -> DistillationOutput:
        teaching = self.teach(images) if teaching is None else teaching
        given: dict[str, Any] = {"teacher_logits": teaching.logits}
        if self.taps is None:
            student_logits = forward_logits(self.model, images)
        else:
            with self.taps[0].listening() as tap:
                student_logits = forward_logits(self.model, images)
                feature = tap.take()
            if self.training and torch.is_grad_enabled() and not feature.requires_grad:
                raise ModelError(
                    f"student.tap {tap.name!r}: the feature has no gradient, so distilling it "
                    "would train nothing: what comes before it is frozen, or checkpointed with "
                    "use_reentrant=True; unfreeze it, use use_reentrant=False, or tap a later "
                    "module"
                )
            given |= {"student_features": feature, "teacher_features": teaching.features}
        own, of_cwd = normalizer, None
        if isinstance(normalizer, Mapping):
            own = {name: value for name, value in normalizer.items() if name != "cwd"}
            of_cwd = normalizer.get("cwd")
        output: DistillationOutput = self.loss(
            student_logits, target, normalizer=own, **given, **looks
        )
        if not self.cwd_weight:
            return output
        cwd = self.cwd(student_logits, target, teaching.logits, normalizer=of_cwd)
        return output._replace(
            loss=output.loss + self.cwd_weight * cwd.loss,
            terms={**output.terms, **cwd.terms},
            denominators={**(output.denominators or {}), **cwd.denominators},
        )

    @torch.no_grad()
    def maps(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Per-pixel reliability of the teacher and discrepancy of both, as the loss sees them."""
        self.eval()
        with without_group(self):
            return self(images, target, return_maps=True).maps or {}


@contextmanager
def without_group(objective: Objective) -> Iterator[None]:
    """A pass that this rank takes on its own must not wait for the others."""
    group, objective.process_group = objective.process_group, None
    try:
        yield
    finally:
        objective.process_group = group
