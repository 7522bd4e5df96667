"""The configuration: what may be set, and its limits. How it is read: `reading.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    model_validator,
)
from typing_extensions import Self

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

    def _rules(self, draft: bool) -> Iterator[tuple[bool, str]]:
        """What keys have to do with each other: whether it holds, and the message if not. Of a
        draft, which is only printed, keys may be missing."""
        yield from ()

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        for holds, message in self._rules((info.context or {}).get("draft", False)):
            if not holds:
                raise ValueError(message)
        return self


def _without_nul(path: Path) -> Path:
    if "\0" in str(path):  # no system has it in a name, and Python raises far away from here
        raise ValueError(f"got {str(path)!r}, expected a path without NUL")
    return path


# Upper limits are far above what anybody trains with: beyond them a slip of the keyboard would take
# all memory or all processes of a machine.
Count = Annotated[int, Field(ge=1, le=10**9)]
Steps = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Byte = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=16, le=32768)]
Factor = Annotated[float, Field(gt=0.0, le=64.0)]
FilePath = Annotated[Path, AfterValidator(_without_nul)]


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


# Classes of the data sets that have their own.
_CLASSES = {"landcover": 8, "cityscapes": 19, "voc": 21, "ade20k": 150}


class DataConfig(_Table):
    """Images and masks."""

    kind: Literal["landcover", "folder", "cityscapes", "voc", "ade20k"]
    """landcover: satellite images, fetched once; folder: your own images/, masks/; cityscapes,
    voc, ade20k: as they are published, unpacked."""
    root: FilePath | None = None
    """folder: holds images/ and masks/, or train/ and val/ with both, or both with train/ and val/;
    cityscapes: holds leftImg8bit/ and gtFine/; voc: VOCdevkit/VOC2012; ade20k:
    ADEChallengeData2016."""
    num_classes: Annotated[int, Field(ge=1, le=4096)] | None = None
    """folder: number of classes."""
    class_names: tuple[str, ...] | None = None
    """folder: one name per class."""
    ignore_index: Annotated[int, Field(ge=0, le=65535)] = 255
    """Mask value that counts nowhere."""
    reduce_zero_label: bool = False
    """folder: mask value 0 counts nowhere, and value k is class k-1 (as in ade20k)."""
    mask_suffix: str | None = None
    """folder: what a mask's name has after that of its image, such as "_mask"; none: nothing, or
    what is customary."""
    palette: tuple[tuple[Byte, Byte, Byte], ...] | FilePath | None = None
    """folder: the colour of each class in the masks, [r, g, b] each, or a file with lines
    `name r g b`; colours after the first num_classes count nowhere."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """folder without train and val, as folders or lists: share held out, about: each file by a hash
    of its name."""
    split_seed: int = 0
    """folder without train and val: another number holds out other images."""
    voc_split: Literal["train", "trainaug"] = "train"
    """voc: train (1464 images), or trainaug (10582): SegmentationClassAug/ or SBD's cls/*.mat."""
    sbd_root: FilePath | None = None
    """voc with trainaug: SBD's folder of cls/, train.txt, val.txt; none: sought beside VOC2012."""
    resize: tuple[Side, Side] | None = None
    """[long, short] that images are fitted into, before the random resize; masks for scores not."""
    crop: Side | tuple[Side, Side] | None = None
    """Side or [height, width] of the crop, at least 16 and at most 32768 pixels; none: no crop."""
    window: Side | tuple[Side, Side] | None = None
    """Side or [height, width] of the windows that large validation images are evaluated by, with
    logits averaged where they overlap; none: whole images."""
    window_stride: Annotated[int, Field(ge=1)] | tuple[Count, Count] | None = None
    """Distance of the windows, or [down, across]; none: two thirds of their sides."""
    crop_max_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Largest share of a crop's labelled pixels in one class: up to 10 crops are tried; 1: any."""
    scale: tuple[Factor, Factor] = (1.0, 1.0)
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
    """Read files once before training; none: all of a folder, a sample of a published data set."""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that read images; 0: the training process itself."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean, images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation."""

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of the crop."""
        return None if self.crop is None else _both(self.crop)

    @property
    def windows(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Sides and distances of the windows of an evaluation."""
        if self.window is None:
            return None
        height, width = _both(self.window)
        stride = self.window_stride or (2 * height // 3, 2 * width // 3)
        return (height, width), _both(stride)

    @property
    def count(self) -> int:
        """The number of classes; 0 where that is not known yet."""
        return _CLASSES.get(self.kind, self.num_classes) or 0

    def _rules(self, draft: bool) -> Iterator[tuple[bool, str]]:
        kind, ignored = self.kind, self.ignore_index
        needed = {"landcover": (), "folder": ("root", "num_classes")}.get(kind, ("root",))
        for key in () if draft else needed:
            text = f'data.{key} is required with data.kind = "{kind}"'
            yield getattr(self, key) is not None, text
        own = ("num_classes", "class_names", "reduce_zero_label", "mask_suffix", "palette")
        only = dict.fromkeys((*own, "split_seed"), "folder")
        for key, other in {**only, "voc_split": "voc", "sbd_root": "voc"}.items():
            unset = getattr(self, key) == type(self).model_fields[key].default
            yield unset or kind == other, f'data.{key} is only for data.kind = "{other}"'
        unset = self.root is None or kind != "landcover"
        yield unset, 'data.root is not for data.kind = "landcover"'
        unset = self.sbd_root is None or self.voc_split == "trainaug"
        yield unset, 'data.sbd_root is only for data.voc_split = "trainaug"'

        names, count = self.class_names, self.count
        size = len(names or ())
        same = names is None or size == self.num_classes
        yield same, f"data.class_names has {size} names, data.num_classes is {self.num_classes}"
        twice = next((n for n in names or () if (names or ()).count(n) > 1), None)
        yield twice is None, f"data.class_names has {twice!r} more than once"  # scores go by name
        text = f"data.ignore_index is {ignored}, which is also a class (data.num_classes is "
        yield ignored >= count, f"{text}{count}); take a value that is no class"
        text = f"data.ignore_index is {ignored}, which is the last class in masks read with "
        text += "data.reduce_zero_label; take a larger value"
        yield not self.reduce_zero_label or ignored != count, text

        colours = self.palette if isinstance(self.palette, tuple) else ((0, 0, 0),) * count
        text = f"data.palette has {len(colours)} colours, data.num_classes is {count}"
        yield len(colours) >= count, text
        text = "data.palette does not go with data.reduce_zero_label; put the colour that counts "
        text += "nowhere last"
        yield self.palette is None or not self.reduce_zero_label, text
        unique = len(set(colours)) == len(colours) or not isinstance(self.palette, tuple)
        yield unique, "data.palette has a colour more than once"

        yield (
            self.window_stride is None or self.window is not None,
            ("data.window_stride needs data.window"),
        )
        gap = any(step > side for side, step in zip(*(self.windows or ((), ())), strict=True))
        text = f"data.window_stride is {self.window_stride}, more than data.window, {self.window}: "
        yield not gap, f"{text}pixels between windows would have no logits"
        low, high = self.scale
        yield low <= high, f"data.scale is {[low, high]}, expected [low, high] with low <= high"
        long, short = self.resize or (16, 16)
        text = "expected [long, short] with long >= short >= 16"
        yield long >= short, f"data.resize is {[long, short]}, {text}"
        yield self.crop_max_ratio == 1.0 or bool(self.crop), "data.crop_max_ratio needs data.crop"
        share = self.labelled if isinstance(self.labelled, float) else 1.0
        text = "expected a share above 0 and up to 1, or a number of images"
        yield 0.0 < share <= 1.0, f"data.labelled is {share}, {text}"
        unset = self.labelled_per_batch is None
        yield unset or self.labelled is not None, "data.labelled_per_batch needs data.labelled"
        yield min(self.std) > 0.0, f"data.std is {list(self.std)}, expected positive numbers"


class ModelConfig(_Table):
    """One network and how long it trains."""

    arch: str
    """A short name (unet, segformer, mobilenet-v2, upernet, dpt, beit, mobilevit,
    mobilevit-v2) or an import path "package.module:callable"."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture."""
    weights: FilePath | None = None
    """safetensors or torch state_dict file of the whole network."""
    init: FilePath | None = None
    """The same kind of file of a part, such as a pretrained backbone: what fits by name and shape
    is taken, the rest starts from the seed."""
    tap: str | None = None
    """Dotted name of the module whose output is distilled; "name:NHWC" for one of [B, h, w, D]."""
    output: int | str | None = None
    """Name or index of the logits, where the network returns several; none: `logits`, `out`, or the
    first."""
    mean: tuple[float, float, float] | None = None
    """Mean of the images that this network takes; none: that of its weights or init (in a file of
    this driver, or in preprocessor_config.json beside them), else data.mean."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation, likewise."""
    steps: Steps
    """Training steps; 0 with weights: use them as they are."""
    lr: Positive | None = None
    """Learning rate of this network; none: optim.lr."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """Optimiser of this network; none: optim.name."""
    weight_decay: NonNegative | None = None
    """Weight decay of this network; none: optim.weight_decay."""

    def _rules(self, draft: bool) -> Iterator[tuple[bool, str]]:
        text = "steps = 0 needs weights: a network that was never trained cannot be used"
        yield self.steps > 0 or self.weights is not None, text
        yield (self.mean is None) == (self.std is None), "mean and std: set both or none"


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
    warmup_steps: Steps = 0
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
            about = (
                'A weight for each class, or "balanced": N / (K n_c) of N labelled pixels, n_c of '
            )
            about += "the class c, and K classes that have any, in the labels that a network sees."
            hint = tuple[NonNegative, ...] | Literal["balanced"] | None
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

    def _rules(self, draft: bool) -> Iterator[tuple[bool, str]]:
        names = [f"{name}_weight" for name in ("ce", "kd", "hetero", "feature")]
        text = "there would be nothing to train on"
        if self.cwd_weight:
            text = "channel-wise distillation goes beside one of them"
        text = f"every one of the weights {', '.join(names)} is 0: {text}"
        yield any(getattr(self, name) for name in names), text
        self.terms()  # some options go together only

    def terms(self) -> list[Term]:
        """The terms of the loss whose weight is not 0."""
        own = self.model_dump(include=set(FLAT))
        return [term for term in from_flat({**FLAT_DEFAULTS, **own}) if term.weight]

    def of_loss(self) -> dict[str, Any]:
        """The keywords of `HeteroAKDLoss`."""
        excluded = {"features", "cwd_weight", "cwd_temperature"}
        return dict(self.model_dump(exclude=excluded))

    def of_cross_entropy(self) -> dict[str, Any]:
        """The keywords of `functional.cross_entropy`: what a network without a teacher trains
        with, so that only the terms that need a teacher make a difference."""
        names = {"label_smoothing", *LossOptions.__annotations__} - _NOT_CONFIGURED
        return dict(self.model_dump(include=names))


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
    """Several ranks: replicas (DDP), or parameters, gradients and optimiser sharded (FSDP2)."""
    sync_bn: bool = False
    """Batch norms over all ranks (GPUs only, as torch has it)."""
    channels_last: bool = False
    """Images and weights in channels-last memory."""
    compile: bool = False
    """torch.compile the network that trains."""
    timeout: Annotated[float, Field(ge=1.0, le=1e6)] = 600.0
    """Seconds without an answer after which a rank is lost."""


class Config(_Table):
    """Everything one run needs."""

    run: FilePath = Path("runs/default")
    """Folder of this run; the same command resumes it. Not set: runs/ and the recipes' names."""
    stages: tuple[Stage, ...] = STAGES
    """What to train: the teacher, the student alone, the student distilled."""
    # Networks start from 2 * seed and 2 * seed + 1, and torch's generators take 64 bits.
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, batches and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps ..."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; none: torch's choice."""
    data: DataConfig
    teacher: ModelConfig
    student: ModelConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    scale: ScaleConfig = Field(default_factory=ScaleConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    def _rules(self, draft: bool) -> Iterator[tuple[bool, str]]:
        teacher, student, stages = self.teacher, self.student, self.stages
        missing = "teacher.tap" if teacher.tap is None else "student.tap"
        text = f"{missing} is missing: set both taps (projected features) or none (logits only)"
        yield (teacher.tap is None) == (student.tap is None), text
        text = "distill.features is true: set teacher.tap and student.tap"
        yield not self.distill.features or teacher.tap is not None, text
        index = self.distill.unlabelled_index or 0
        text = f"distill.unlabelled_index is {index}, expected a mask value: 0 to 65535"
        yield 0 <= index <= 65535, text
        wanted, size = self.data.labelled_per_batch or 0, self.optim.batch_size
        text = f"data.labelled_per_batch is {wanted}, but optim.batch_size is {size}"
        yield wanted <= size, text
        yield student.steps > 0, "student.steps is 0: there would be nothing to distil"
        text = f"stages is {list(stages)}, expected one or more of {', '.join(STAGES)}, each once"
        yield 0 < len(stages) == len(set(stages)), text
        alone = "distilled" not in stages or "teacher" in stages
        text = "stages: has distilled without teacher; set teacher.weights, or add that stage"
        yield alone or teacher.weights is not None, text

    def network(self, stage: str) -> ModelConfig:
        """The network that a stage trains."""
        return self.teacher if stage == "teacher" else self.student

    def optim_of(self, stage: str) -> OptimConfig:
        """`optim` with what the stage's network says of itself."""
        network = self.network(stage)
        own = {"name": network.optimizer, "lr": network.lr, "weight_decay": network.weight_decay}
        return self.optim.model_copy(update={k: v for k, v in own.items() if v is not None})

    def data_of(self, stage: str) -> DataConfig:
        """`data` with the mean and std of the stage's network."""
        own = self.network(stage).model_dump(include={"mean", "std"}, exclude_none=True)
        return self.data.model_copy(update=own)

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
        # Values of masks above every class: two of a byte, one of which may be ignored.
        count = self.data.count + self.data.reduce_zero_label
        values = range(255 if count <= 254 else 65535, -1, -1)
        free = next(value for value in values if value != self.data.ignore_index)
        distill = self.distill.model_copy(update={"unlabelled_index": free})
        return self.model_copy(update={"distill": distill})

    @property
    def taps(self) -> tuple[str, str] | None:
        """Names of the student's and the teacher's tapped module, where features are distilled."""
        if self.student.tap is None or self.teacher.tap is None or self.distill.features is False:
            return None
        return self.student.tap, self.teacher.tap
