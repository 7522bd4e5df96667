"""What is measured: an objective on a shape, and the named suites of such cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Final

__all__ = ["DATASETS", "OBJECTIVES", "SUITES", "Case", "Objective", "cases_of", "select"]


@dataclass(frozen=True)
class Objective:
    """A loss that people train with."""

    options: dict[str, Any]
    """Keyword arguments of `functional.distillation_loss`."""
    needs_teacher: bool = True
    from_features: bool = False
    """Starts from a feature map and the weight of a 1x1 projection instead of logits."""
    models: tuple[str, str] | None = None
    """Starts from images: student and teacher (`models.py`), whose forward and backward are part of
    it."""
    evaluates: str = ""
    """No loss, but this function of `functional`, with the labels' size or labels; no backward"""
    noise: float = 2.0
    """Standard deviation of the student's logits"""
    favour: float = 6.0
    """What is added to the logit of the label"""


_HETERO: Final = {"hetero_weight": 1.0, "temperature": 2.0}
OBJECTIVES: Final[dict[str, Objective]] = {
    "ce": Objective({}, needs_teacher=False),
    "ce+kd": Objective({"kd_weight": 1.0, "temperature": 2.0}),
    "ce+hetero": Objective(_HETERO),
    "ce+hetero-T1.7": Objective({**_HETERO, "temperature": 1.7}),
    "ce+hetero-logits": Objective({**_HETERO, "mix": "logits"}),
    "ce+paper": Objective({**_HETERO, "preset": "paper"}),
    # at the features' resolution
    "projection+ce": Objective({}, needs_teacher=False, from_features=True),
    "projection+ce+upsample": Objective({}, needs_teacher=False, from_features=True),
    # without the optimizer's update, which is the same for all
    "training step": Objective(_HETERO, models=("SegFormer-B0", "UperNet128-ConvNeXt-T")),
    "tiny training step": Objective(_HETERO, models=("SegFormer-tiny", "UperNet-ConvNeXt-tiny")),
    # of logits as a trained network has them, and of noise, where every class may win everywhere
    **{
        f"{name} of {kind}": Objective({}, False, evaluates=function, noise=noise, favour=favour)
        for name, function in (("argmax", "predict"), ("confusion", "confusion_matrix"))
        for kind, noise, favour in (("confident logits", 0.7, 8.0), ("noise", 2.0, 0.0))
    },
}

# name: classes, label height, label width; crops as the usual recipes take them
DATASETS: Final[dict[str, tuple[int, int, int]]] = {
    "Cityscapes": (19, 512, 1024),
    "Cityscapes 769": (19, 769, 769),
    "VOC": (21, 512, 512),
    "ADE20K": (150, 512, 512),
    "COCO-Stuff": (171, 512, 512),
}


@dataclass(frozen=True)
class Case:
    """One row of the tables, before it is known who computes it."""

    objective: str
    dataset: str
    batch: int
    classes: int
    height: int
    width: int
    stride: int
    teacher_stride: int
    align_corners: bool = False
    dtype: str = "float32"
    channels: int = 0
    """D of the feature map, for objectives that start from one."""

    @property
    def key(self) -> str:
        """Unique and stable: what two result files are compared by."""
        parts = [
            self.objective,
            f"B{self.batch} C{self.classes} {self.height}x{self.width}",
            f"stride {self.stride}"
            + ("" if self.teacher_stride == self.stride else f", teacher {self.teacher_stride}"),
            self.dtype,
        ]
        if self.channels:
            parts.append(f"D{self.channels}")
        if self.align_corners:
            parts.append("align_corners")
        return " | ".join(parts)

    @property
    def label(self) -> str:
        """For tables and plots that say the objective and the dtype elsewhere."""
        text = f"B{self.batch} C{self.classes} {self.height}x{self.width} /{self.stride}"
        if self.teacher_stride != self.stride:
            text += f" (teacher /{self.teacher_stride})"
        if self.channels:
            text += f" D{self.channels}"
        return text + (" ac" if self.align_corners else "")

    @property
    def name(self) -> str:
        """For tables of several objectives."""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.objective}{dtype}, {self.label}"

    @property
    def target(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def label_size(self) -> tuple[int, int]:
        """Of the labels that the loss sees."""
        if self.objective == "projection+ce":
            return self.grid(self.stride)
        return self.height, self.width

    def grid(self, stride: int) -> tuple[int, int]:
        """Size of the logits at this stride; with align_corners the corner pixels coincide."""
        if self.align_corners:
            return (self.height - 1) // stride + 1, (self.width - 1) // stride + 1
        return -(-self.height // stride), -(-self.width // stride)

    @property
    def pixel_classes(self) -> int:
        """B x C x H x W of the label grid: the unit of work."""
        height, width = self.label_size
        return self.batch * self.classes * height * width

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def case(
    objective: str,
    dataset: str,
    batch: int,
    stride: int,
    *,
    teacher_stride: int | None = None,
    size: tuple[int, int] | None = None,
    classes: int | None = None,
    **more: Any,
) -> Case:
    """A case on a data set's shape, with what differs from it."""
    usual_classes, height, width = DATASETS[dataset]
    height, width = size or (height, width)
    return Case(
        objective=objective,
        dataset=dataset,
        batch=batch,
        classes=classes or usual_classes,
        height=height,
        width=width,
        stride=stride,
        teacher_stride=teacher_stride or stride,
        **more,
    )


def _headline() -> list[Case]:
    """The rows of the targets."""
    return [
        case("ce+hetero", "Cityscapes", 2, 4),
        case("ce+hetero", "Cityscapes", 2, 8),
        case("ce+hetero", "VOC", 4, 8),
        case("ce+hetero", "ADE20K", 2, 4),
        case("ce+hetero", "Cityscapes", 2, 1),
        case("ce+hetero", "Cityscapes 769", 2, 8, align_corners=True),
        case("ce+hetero", "Cityscapes", 2, 8, teacher_stride=4),
    ]


def _headline_of_gpu() -> list[Case]:
    """What tells most first: there may be time for some of them only."""
    return [
        case("ce+hetero", "Cityscapes", 8, 4),
        case("ce+hetero", "Cityscapes", 8, 1),
        case("ce+hetero", "ADE20K", 8, 4),
        case("ce+hetero", "Cityscapes", 8, 4, dtype="bfloat16"),
        case("ce+hetero", "Cityscapes", 8, 8),
        case("ce", "Cityscapes", 8, 4),
        case("ce+paper", "Cityscapes", 8, 4),
        case("ce+hetero-logits", "Cityscapes", 8, 4),
        case("ce+hetero", "Cityscapes", 8, 8, teacher_stride=4),
        case("ce+hetero", "Cityscapes 769", 8, 8, align_corners=True),
        case("ce+hetero", "COCO-Stuff", 8, 8),
        case("ce+hetero-T1.7", "Cityscapes", 8, 4),
        case("ce+hetero", "ADE20K", 8, 4, dtype="bfloat16"),
        case("ce+hetero", "Cityscapes", 8, 1, dtype="bfloat16"),
    ]


def _objectives(batch: int = 2) -> list[Case]:
    """Every objective on logits, on one shape."""
    names = [
        name
        for name, one in OBJECTIVES.items()
        if not (one.from_features or one.models or one.evaluates)
    ]
    return [case(name, "Cityscapes", batch, 4) for name in names]


def _dtypes(batch: int = 2) -> list[Case]:
    return [
        case(objective, "Cityscapes", batch, 4, dtype=dtype)
        for objective in ("ce", "ce+hetero")
        for dtype in ("float32", "bfloat16", "float16")
    ]


def _training(batch: int, size: tuple[int, int], dtype: str = "float32") -> list[Case]:
    """A training step at two batches, and the loss alone."""
    return [
        case(objective, "ADE20K", number, 4, size=size, dtype=dtype)
        for objective, number in (
            ("training step", batch),
            ("training step", 2 * batch),
            ("ce+hetero", batch),
        )
    ]


def _strides(objective: str, batch: int = 1) -> list[Case]:
    return [case(objective, "Cityscapes", batch, stride) for stride in (1, 4, 8, 16, 32)]


def _pixels(objective: str, batch: int = 1, largest: int = 1024) -> list[Case]:
    sides = [side for side in (128, 256, 512, 1024, 2048) if side <= largest]
    return [case(objective, "Cityscapes", batch, 4, size=(side, side)) for side in sides]


def _classes(objective: str, batch: int = 1, side: int = 256) -> list[Case]:
    return [
        case(objective, "Cityscapes", batch, 4, size=(side, side), classes=classes)
        for classes in (2, 5, 19, 21, 60, 150, 171, 256)
    ]


def _batches(objective: str, side: int = 256, largest: int = 16) -> list[Case]:
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= largest]
    return [case(objective, "Cityscapes", size, 4, size=(side, side)) for size in sizes]


def _projections(batch: int = 2) -> list[Case]:
    return [
        case(objective, "Cityscapes", batch, stride, channels=channels)
        for objective in ("projection+ce", "projection+ce+upsample")
        for stride, channels in ((4, 256), (8, 512))
    ]


def _evaluations() -> list[Case]:
    return [
        case(objective, dataset, batch, stride, size=size)
        for dataset, batch, stride, size in (
            ("ADE20K", 1, 4, (512, 512)),
            ("ADE20K", 1, 8, (1024, 1024)),
            ("Cityscapes", 2, 8, (1024, 2048)),
        )
        for objective, one in OBJECTIVES.items()
        if one.evaluates
    ]


Suite = dict[str, list[Case]]

#: suite -> group -> cases. A case may be in several groups; it is measured once.
SUITES: Final[dict[str, Suite]] = {
    # What the README's command runs on a CPU: everything that decides, in under ten minutes.
    "cpu": {
        "headline": _headline(),
        "objectives": _objectives(),
        "training": _training(1, (256, 256)),
        "dtypes": _dtypes(),
        "projections": _projections(1),
        "strides": _strides("ce"),
        "pixels": _pixels("ce") + _pixels("ce+hetero", largest=512),
        "classes": _classes("ce") + _classes("ce+hetero", side=128),
        "batches": _batches("ce"),
    },
    # The same on a GPU, at batches that fill it.
    "gpu": {
        "headline": _headline_of_gpu(),
        "large": [
            case("ce+hetero", "COCO-Stuff", 16, 4),
            case("ce+hetero", "ADE20K", 16, 8),
            case("ce+hetero", "ADE20K", 16, 16),
            case("ce+hetero", "Cityscapes", 16, 4),
            case("ce+hetero", "VOC", 16, 16),
        ],
        "objectives": _objectives(8),
        "training": _training(8, (512, 512), "bfloat16"),
        "dtypes": _dtypes(8),
        "projections": [
            replace(one, dtype=dtype)
            for one in _projections(8)
            for dtype in ("float32", "bfloat16")
        ],
        "strides": _strides("ce", 8) + _strides("ce+hetero", 8),
        "pixels": _pixels("ce", 4, 2048) + _pixels("ce+hetero", 4, 2048),
        "classes": _classes("ce", 8, 512) + _classes("ce+hetero", 8, 512),
        "batches": _batches("ce+hetero", 512, 32),
    },
    # Predictions and confusion matrices, on either device.
    "evaluation": {"evaluation": _evaluations()},
    # A minute or two: does everything still run.
    "smoke": {
        "headline": [
            case("ce", "Cityscapes", 1, 4, size=(64, 128)),
            case("ce+hetero", "VOC", 1, 8, size=(64, 64)),
        ],
        "objectives": [
            case(name, "Cityscapes", 1, 4, size=(32, 64), channels=8 * one.from_features)
            for name, one in OBJECTIVES.items()
            if not (one.models or one.evaluates)
        ],
        "evaluation": [
            case(name, "Cityscapes", 1, 4, size=(32, 64))
            for name, one in OBJECTIVES.items()
            if one.evaluates
        ],
        "training": [
            case("tiny training step", "VOC", 1, 4, size=(64, 64)),
            case("ce+hetero", "VOC", 1, 4, size=(64, 64)),
        ],
        "dtypes": [case("ce", "Cityscapes", 1, 4, size=(64, 64), dtype="bfloat16")],
    },
}  # fmt: skip


def cases_of(suite: Suite) -> Iterator[Case]:
    """Every case of a suite once, in the order of its groups."""
    seen: set[str] = set()
    for cases in suite.values():
        for one in cases:
            if one.key not in seen:
                seen.add(one.key)
                yield one


def select(name: str, only: Sequence[str]) -> Suite:
    """Return the cases of a suite that `only` names, all of them where it is empty.

    Args:
        name: of the suite.
        only: names as `python -m benchmarks list` prints them, of cases, groups, objectives or data
            sets; in all of them `*` and `?` stand for any text and any character.

    Raises:
        ValueError: an entry names nothing in the suite; close names are in the message.
    """
    suite = SUITES[name]
    if not only:
        return suite
    names = {text for group, cases in suite.items() for one in cases for text in _names(group, one)}
    for entry in only:
        if not any(fnmatchcase(text, entry) for text in names):
            close = get_close_matches(entry, sorted(names), n=3) or ["as `list` prints them"]
            expected = f"expected names of suite {name!r}: {'; '.join(close)}"
            raise ValueError(f"--only: got {entry!r}, {expected}")
    kept = {
        group: [
            one
            for one in cases
            if any(fnmatchcase(text, entry) for entry in only for text in _names(group, one))
        ]
        for group, cases in suite.items()
    }
    return {group: cases for group, cases in kept.items() if cases}


def _names(group: str, one: Case) -> tuple[str, ...]:
    return one.key, group, one.objective, one.dataset
