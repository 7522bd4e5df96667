"""The configuration: what may be set, and its limits. How it is read: `reading.py`."""

from __future__ import annotations

import inspect
import re
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from .._checks import RESOLUTIONS
from .._evaluate import LossOptions
from ..functional import segmentation_loss
from ..losses import HeteroAKDLoss, HeteroAKDOptions
from ..terms import FLAT, FLAT_DEFAULTS, Term, from_flat

Stage = Literal["teacher", "alone", "distilled"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class _Table(BaseModel):
    # allow_inf_nan: TOML knows `nan` and `inf`, and neither makes sense for any key here.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


# Classes of the data sets that have their own.
_CLASSES = {"landcover": 8, "cityscapes": 19, "voc": 21, "ade20k": 150}


class DataConfig(_Table):
    """Images and masks."""

    kind: Literal["landcover", "folder", "cityscapes", "voc", "ade20k"]
    """landcover: satellite images, fetched once; folder: your own images/, masks/; cityscapes,
    voc, ade20k: as they are published, unpacked."""
    root: Path | None = None
    """folder: holds images/ and masks/, or train/ and val/ with both; cityscapes: holds
    leftImg8bit/ and gtFine/; voc: VOCdevkit/VOC2012; ade20k: ADEChallengeData2016."""
    num_classes: Annotated[int, Field(ge=1, le=4096)] | None = None
    """folder: number of classes."""
    class_names: tuple[str, ...] | None = None
    """folder: one name per class."""
    ignore_index: Annotated[int, Field(ge=0, le=65535)] = 255
    """Mask value that counts nowhere."""
    reduce_zero_label: bool = False
    """folder: mask value 0 counts nowhere, and value k is class k-1 (ade20k has it so by
    itself)."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """folder without train/ and val/: share held out."""
    voc_split: Literal["train", "trainaug"] = "train"
    """voc: train (1464 images), or trainaug (10582) with the masks of SBD from
    SegmentationClassAug/ or from cls/*.mat."""
    sbd_root: Path | None = None
    """voc with trainaug: SBD's folder with cls/, train.txt, val.txt; none: looked for beside
    VOC2012."""
    resize: tuple[int, int] | None = None
    """[long, short]: images are fitted into it, their shape kept, before the random resize.
    Validation masks keep their size."""
    crop: int | tuple[int, int] | None = None
    """Side or [height, width] of the random training crop; none: the whole image."""
    window: int | tuple[int, int] | None = None
    """Side or [height, width] of the windows that large validation images are evaluated by, each as
    far from the next as `window_stride`, with logits averaged where they overlap; none: whole
    images."""
    window_stride: int | tuple[int, int] | None = None
    """Distance of the windows down and across; none: two thirds of their sides."""
    crop_max_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Largest share of a crop's labelled pixels in one class: up to 10 crops are tried; 1: any."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random resize before the crop."""
    augment: Literal["none", "flip", "dihedral"] = "flip"
    """flip: left-right; dihedral: flips and quarter turns (for views from above)."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue."""
    labelled: Annotated[int, Field(ge=1)] | float | Literal["masks"] | tuple[str, ...] | None = None
    """Training images whose labels the students see: a number or a share of them, drawn by the
    seed, names of image files, or "masks": those that have a mask; none: all. The others keep their
    pixels and are labelled by the teacher alone, which itself learns from every mask there is."""
    labelled_per_batch: Annotated[int, Field(ge=0)] | None = None
    """Images of a batch that are drawn from the labelled ones, the rest from all; none: half."""
    check: bool | None = None
    """Read files once before training; none: all of a folder, the first few of each split of a
    published data set."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read images; 0: the training process itself."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean, images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation."""

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of the crop."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    @property
    def windows(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Sides and distances of the windows of an evaluation."""
        if self.window is None:
            return None
        sides = (self.window, self.window) if isinstance(self.window, int) else self.window
        step = self.window_stride
        if step is None:
            return sides, (max(1, 2 * sides[0] // 3), max(1, 2 * sides[1] // 3))
        return sides, (step, step) if isinstance(step, int) else step

    @field_validator("crop", "window", mode="before")
    @classmethod
    def _one_side_or_two(cls, value: Any) -> Any:
        # One message instead of one for each of the types it may have.
        if value is None:
            return None
        pair = isinstance(value, list | tuple) and len(value) == 2
        sides = value if pair else [value]
        if any(not isinstance(s, Integral) or isinstance(s, bool) or s < 16 for s in sides):
            raise ValueError(
                f"got {value!r}; expected: a side of at least 16 pixels, or [height, width]"
            )
        # A list out of JSON is none any more for what checks the type next.
        return tuple(map(int, sides)) if pair else int(value)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        self._check_kind()
        if not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(
                f"data.scale is {list(self.scale)}, expected [low, high] with 0 < low <= high"
            )
        if self.resize is not None and not 16 <= self.resize[1] <= self.resize[0]:
            raise ValueError(
                f"data.resize is {list(self.resize)}, expected [long, short] with "
                "long >= short >= 16"
            )
        if self.window_stride is not None and self.window is None:
            raise ValueError("data.window_stride needs data.window")
        if self.windows is not None:
            for side, step in zip(*self.windows, strict=True):
                if not 1 <= step <= side:
                    raise ValueError(
                        f"data.window_stride is {self.window_stride}, expected 1 to the sides of "
                        f"data.window, {self.window}: pixels between windows would have no logits"
                    )
        if self.crop_max_ratio < 1.0 and self.crop is None:
            raise ValueError("data.crop_max_ratio needs data.crop")
        if isinstance(self.labelled, float) and not 0.0 < self.labelled <= 1.0:
            raise ValueError(
                f"data.labelled is {self.labelled}, expected a share above 0 and up to 1, or a "
                "number of images"
            )
        if self.labelled_per_batch is not None and self.labelled is None:
            raise ValueError("data.labelled_per_batch needs data.labelled")
        if min(self.std) <= 0.0:
            raise ValueError(f"data.std is {list(self.std)}, expected positive numbers")
        return self

    def _check_kind(self) -> None:
        """Keys that this kind of data needs, and keys that mean nothing to it."""
        folder = self.kind == "folder"
        needed = ("root", "num_classes") if folder else ("root",)
        if self.kind != "landcover":
            for key in needed:
                if getattr(self, key) is None:
                    raise ValueError(f'data.{key} is required with data.kind = "{self.kind}"')
        elif self.root is not None:
            raise ValueError('data.root is not for data.kind = "landcover"')
        only = {
            "folder": ("num_classes", "class_names", "reduce_zero_label"),
            "voc": ("voc_split", "sbd_root"),
        }
        for kind, keys in only.items():
            for key in keys:
                default = type(self).model_fields[key].default
                if kind != self.kind and getattr(self, key) != default:
                    raise ValueError(f'data.{key} is only for data.kind = "{kind}"')
        if self.sbd_root is not None and self.voc_split != "trainaug":
            raise ValueError('data.sbd_root is only for data.voc_split = "trainaug"')
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"data.class_names has {len(self.class_names)} names, "
                f"data.num_classes is {self.num_classes}"
            )
        names = self.class_names or ()
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # scores are listed by name
            raise ValueError(f"data.class_names has {twice!r} more than once")
        count = _CLASSES.get(self.kind, self.num_classes)
        if count is not None and self.ignore_index < count:
            raise ValueError(
                f"data.ignore_index is {self.ignore_index}, which is also a class "
                f"(data.num_classes is {count}); take a value that is no class"
            )
        if self.reduce_zero_label and self.ignore_index == count:
            raise ValueError(
                f"data.ignore_index is {count}, which is the last class in masks read with "
                "data.reduce_zero_label; take a larger value"
            )


class ModelConfig(_Table):
    """One network and how long it trains."""

    arch: str
    """A short name (unet, segformer, mobilenet-v2, upernet, dpt, beit, mobilevit,
    mobilevit-v2) or an import path "package.module:callable"."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture (in the TOML file only)."""
    weights: Path | None = None
    """safetensors or torch state_dict file of the whole network."""
    init: Path | None = None
    """The same kind of file of a part, such as a pretrained backbone: what fits by name and shape
    is taken, the rest starts from the seed."""
    tap: str | None = None
    """Dotted name of the module whose output is distilled; with :NHWC behind it where that is [B,
    h, w, D]."""
    steps: Annotated[int, Field(ge=0)]
    """Training steps; 0 with weights: use them as they are."""
    lr: Positive | None = None
    """Learning rate of this network; none: optim.lr."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """Optimiser of this network; none: optim.name."""
    weight_decay: NonNegative | None = None
    """Weight decay of this network; none: optim.weight_decay."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.steps == 0 and self.weights is None:
            raise ValueError(
                "steps = 0 needs weights: a network that was never trained cannot be used"
            )
        return self


class OptimConfig(_Table):
    """Optimiser and schedule (linear warm-up, then polynomial decay)."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimiser."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Weight decay (not on biases and norms)."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of sgd."""
    batch_size: Count = 8
    """Images per step, of all ranks and micro-batches together."""
    accumulate: Count = 1
    """Micro-batches per step. The loss stays exactly that of the whole batch."""
    eval_batch_size: Count = 16
    """Validation images at once, on each rank."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    power: NonNegative = 0.9
    """Exponent of the polynomial decay."""
    grad_clip: Positive | None = None
    """Largest gradient norm; none: no limit."""


def _documented(owner: Any) -> dict[str, str]:
    """What a docstring says of each argument, in one line."""
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(owner) or "", re.M)
    return {name: " ".join(text.split()) for name, text in entries}


# Of the loss's options, those that the data or the ranks decide.
_NOT_CONFIGURED = {"teacher_ce_weight", "ignore_index", "allow_ignored_class", "process_group"}


def _loss_options() -> dict[str, Any]:
    """Every option of `HeteroAKDLoss` as a field: its type, range, default and description are the
    loss's own, so that none can be missing here."""
    loss = HeteroAKDLoss(num_classes=2)
    fields: dict[str, Any] = {}
    for name, hint in get_type_hints(HeteroAKDOptions).items():
        if name in _NOT_CONFIGURED:
            continue
        about = _documented(segmentation_loss).get(name, "")
        least = None
        if name in FLAT:
            term, option = FLAT[name][0]
            about = f"{term.__name__}: {_documented(term)[option.name]}"
            if "choices" in option.metadata:
                choices: Any = Literal[tuple(option.metadata["choices"])]
                hint = choices if option.default is not None else choices | None
            check = partial(option.metadata["check"], name=f"distill.{name}")
            hint = Annotated[hint, AfterValidator(check)]
        elif name == "class_weight":
            hint = tuple[float, ...] | None
        elif name == "resolution":
            hint = Literal[RESOLUTIONS]  # type: ignore[valid-type]
        elif name == "projector_weight":
            about = "Weight of the cross entropy of both projected features."
        if name.endswith("_weight") and name != "class_weight":
            least = 0.0
        fields[name] = (hint, Field(default=getattr(loss, name), ge=least, description=about))
    return fields


_LossOptions = create_model("_LossOptions", __base__=_Table, **_loss_options())


class DistillConfig(_LossOptions):  # type: ignore[misc, valid-type]
    """The distillation loss: every option of HeteroAKDLoss, and channel-wise distillation."""

    features: bool | None = None
    """Distil projected features of both taps, not final logits; none: where taps are set."""
    projector: Literal["linear", "conv-bn-relu"] | None = None
    """Kind of the projectors of features; none: the preset's choice."""
    cwd_weight: NonNegative = 0.0
    """Weight of channel-wise distillation on the logits."""
    cwd_temperature: Positive = 4.0
    """Temperature of channel-wise distillation."""

    @model_validator(mode="after")
    def _consistent(self) -> DistillConfig:
        weights = ("ce", "kd", "hetero", "feature")
        if not any(getattr(self, f"{name}_weight") for name in weights):
            raise ValueError(
                "every one of the weights "
                + ", ".join(f"{name}_weight" for name in weights)
                + " is 0: "
                + (
                    "channel-wise distillation goes beside one of them"
                    if self.cwd_weight
                    else "there would be nothing to train on"
                )
            )
        self.terms()  # some options go together only
        return self

    def terms(self) -> list[Term]:
        """The terms of the loss whose weight is not 0."""
        own = self.model_dump(include=set(FLAT))
        return [term for term in from_flat({**FLAT_DEFAULTS, **own}) if term.weight]

    def of_loss(self) -> dict[str, Any]:
        """The keywords of `HeteroAKDLoss`."""
        options: dict[str, Any] = self.model_dump(
            exclude={"features", "cwd_weight", "cwd_temperature"}
        )
        return options

    def of_cross_entropy(self) -> dict[str, Any]:
        """The keywords of `functional.cross_entropy`: what a network without a teacher trains
        with, so that only the terms that need a teacher make a difference."""
        names = {"label_smoothing", *LossOptions.__annotations__} - _NOT_CONFIGURED
        options: dict[str, Any] = self.model_dump(include=names)
        return options


class LogConfig(_Table):
    """How often something is written."""

    every: Count = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: Count = 500
    """Steps between evaluations (the last step always has one)."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    diagnostics: bool = False
    """Also pixel accuracy, agreement with the teacher, mean reliability and discrepancy, and the
    loss per class, of the last batch before a line."""
    tensorboard: bool = True
    """Also write TensorBoard events, if it is installed."""
    images: Annotated[int, Field(ge=0, le=16)] = 2
    """Validation images in TensorBoard at evaluations."""


class ReportConfig(_Table):
    """The comparison at the end."""

    samples: Annotated[int, Field(ge=1, le=20)] = 5
    """Validation images shown, one per row."""
    dpi: Annotated[int, Field(ge=30, le=600)] = 110
    """Resolution of the figure."""


class ScaleConfig(_Table):
    """Several processes (torchrun), and how the networks run on their devices."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several ranks: replicas (DDP), or sharded parameters, gradients and optimiser states
    (FSDP2)."""
    sync_bn: bool = False
    """Batch norms over all ranks (GPUs only, as torch has it)."""
    channels_last: bool = False
    """Images and weights in channels-last memory."""
    compile: bool = False
    """torch.compile the network that trains."""
    timeout: Annotated[float, Field(ge=1.0)] = 600.0
    """Seconds without an answer after which a rank is lost."""


class Config(_Table):
    """Everything one run needs."""

    run: Path = Path("runs/default")
    """Folder of this run; the same command resumes it. In no file: runs/ and the names of the
    recipes."""
    stages: tuple[Stage, ...] = STAGES
    """What to train: the teacher, the student alone, the student distilled."""
    # Networks start from 2 * seed and 2 * seed + 1, and torch's generators take 64 bits.
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, batches and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps ..."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision."""
    threads: Count | None = None
    """CPU threads; none: torch's choice."""
    data: DataConfig
    teacher: ModelConfig
    student: ModelConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    scale: ScaleConfig = Field(default_factory=ScaleConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if (self.teacher.tap is None) != (self.student.tap is None):
            missing = "teacher.tap" if self.teacher.tap is None else "student.tap"
            raise ValueError(
                f"{missing} is missing: set both taps (projected features) or none (logits only)"
            )
        if self.distill.features and self.teacher.tap is None:
            raise ValueError("distill.features is true: set teacher.tap and student.tap")
        unlabelled = self.distill.unlabelled_index
        if unlabelled is not None and not 0 <= unlabelled <= 65535:
            raise ValueError(
                f"distill.unlabelled_index is {unlabelled}, expected a mask value: 0 to 65535"
            )
        per_batch = self.data.labelled_per_batch
        if per_batch is not None and per_batch > self.optim.batch_size:
            raise ValueError(
                f"data.labelled_per_batch is {per_batch}, but optim.batch_size is "
                f"{self.optim.batch_size}"
            )
        if self.student.steps == 0:
            raise ValueError("student.steps is 0: there would be nothing to distil")
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise ValueError(
                f"stages is {list(self.stages)}, expected one or more of {', '.join(STAGES)}, "
                "each once"
            )
        if (
            "distilled" in self.stages
            and "teacher" not in self.stages
            and self.teacher.weights is None
        ):
            raise ValueError(
                "stages: has distilled without teacher; put the trained teacher's file into "
                "teacher.weights, or add the stage teacher"
            )
        return self

    @property
    def labelled_slots(self) -> int:
        """Images of a distilled student's batch that are drawn from the labelled ones."""
        if self.data.labelled is None:
            return 0
        per_batch, size = self.data.labelled_per_batch, self.optim.batch_size
        return (size + 1) // 2 if per_batch is None else per_batch

    def with_unlabelled_index(self) -> Config:
        """The same with a label for pixels that only the teacher labels, if `data.labelled` asks
        for one and none is set: the largest value of a byte (of two, for more classes) that is
        free."""
        if self.data.labelled is None or self.distill.unlabelled_index is not None:
            return self
        count = _CLASSES.get(self.data.kind, self.data.num_classes) or 0
        values = [*range(255, count - 1, -1), 65535, 65534]
        free = next(value for value in values if value != self.data.ignore_index)
        distill = self.distill.model_copy(update={"unlabelled_index": free})
        return self.model_copy(update={"distill": distill})

    @property
    def taps(self) -> tuple[str, str] | None:
        """Names of the student's and the teacher's tapped module, where features are distilled."""
        if self.student.tap is None or self.teacher.tap is None or self.distill.features is False:
            return None
        return self.student.tap, self.teacher.tap
