"""The configuration: what may be set, its limits, and how it is read from a TOML file.

Validation goes through JSON in pydantic's strict mode: a TOML string where a number
belongs is then an error and not silently converted, while lists still become tuples
and strings still become paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_CONFIG = "landcover.toml"


class _Table(BaseModel):
    # allow_inf_nan: TOML knows `nan` and `inf`, and neither makes sense for any key here.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Classes of the data sets that are read as they are published.
_PUBLISHED = {"cityscapes": 19, "voc": 21, "ade20k": 150}


class DataConfig(_Table):
    """Pictures and masks."""

    kind: Literal["landcover", "folder", "cityscapes", "voc", "ade20k"] = Field(
        description="landcover: satellite pictures, fetched once; folder: your own images/, "
        "masks/; cityscapes, voc, ade20k: as they are published, unpacked."
    )
    root: Path | None = Field(
        default=None,
        description="folder: holds images/ and masks/, or train/ and val/ with both; cityscapes: "
        "holds leftImg8bit/ and gtFine/; voc: VOCdevkit/VOC2012; ade20k: ADEChallengeData2016.",
    )
    num_classes: int | None = Field(
        default=None, ge=1, le=4096, description="folder: number of classes."
    )
    class_names: tuple[str, ...] | None = Field(
        default=None, description="folder: one name per class."
    )
    ignore_index: int = Field(
        default=255, ge=0, le=65535, description="Mask value that counts nowhere."
    )
    reduce_zero_label: bool = Field(
        default=False,
        description="folder: mask value 0 counts nowhere, and value k is class k-1 "
        "(ade20k has it so by itself).",
    )
    val_fraction: float = Field(
        default=0.2, gt=0.0, lt=1.0, description="folder without train/ and val/: share held out."
    )
    voc_split: Literal["train", "trainaug"] = Field(
        default="train",
        description="voc: train (1464 pictures), or trainaug (10582) with the masks of SBD from "
        "SegmentationClassAug/ or from cls/*.mat.",
    )
    sbd_root: Path | None = Field(
        default=None,
        description="voc with trainaug: SBD's folder with cls/, train.txt, val.txt; none: looked "
        "for beside VOC2012.",
    )
    resize: tuple[int, int] | None = Field(
        default=None,
        description="[long, short]: pictures are fitted into it, their shape kept, before the "
        "random resize. Validation masks keep their size.",
    )
    crop: int | tuple[int, int] | None = Field(
        default=None,
        description="Side or [height, width] of the random training crop; none: the whole picture.",
    )
    crop_max_ratio: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Largest share of a crop's labelled pixels in one class: up to 10 crops are "
        "tried; 1: any.",
    )
    scale: tuple[float, float] = Field(
        default=(1.0, 1.0), description="Range of the random resize before the crop."
    )
    augment: Literal["none", "flip", "dihedral"] = Field(
        default="flip",
        description="flip: left-right; dihedral: flips and quarter turns (for views from above).",
    )
    photometric: bool = Field(
        default=False, description="Random brightness, contrast, saturation and hue."
    )
    check: bool | None = Field(
        default=None,
        description="Read files once before training; none: all of a folder, the first few of "
        "each split of a published data set.",
    )
    workers: int = Field(
        default=0, ge=0, description="Processes that read pictures; 0: the training process itself."
    )
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="Per-channel mean, pictures in [0, 1]."
    )
    std: tuple[float, float, float] = Field(
        default=(0.229, 0.224, 0.225), description="Per-channel standard deviation."
    )

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of the crop."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    @field_validator("crop", mode="before")
    @classmethod
    def _one_side_or_two(cls, value: Any) -> Any:
        # One message instead of one for each of the types it may have.
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        if value is not None and any(type(side) is not int or side < 16 for side in sides):
            raise ValueError(
                f"got {value!r}; expected: a side of at least 16 pixels, or [height, width]"
            )
        # A list out of JSON is none any more for what checks the type next.
        return tuple(value) if isinstance(value, list) else value

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
        if self.crop_max_ratio < 1.0 and self.crop is None:
            raise ValueError("data.crop_max_ratio needs data.crop")
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
        count = _PUBLISHED.get(self.kind, self.num_classes)
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

    arch: str = Field(
        description='"segformer", "unet", or an import path "package.module:callable".'
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the architecture (in the TOML file only)."
    )
    weights: Path | None = Field(
        default=None, description="safetensors or torch state_dict file to start from."
    )
    tap: str | None = Field(
        default=None, description="Dotted name of the module whose output is distilled."
    )
    steps: int = Field(ge=0, description="Training steps; 0 with weights: use them as they are.")
    lr: float | None = Field(
        default=None, gt=0.0, description="Learning rate of this network; none: optim.lr."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.steps == 0 and self.weights is None:
            raise ValueError(
                "steps = 0 needs weights: a network that was never trained cannot be used"
            )
        return self


class OptimConfig(_Table):
    """Optimiser and schedule (linear warm-up, then polynomial decay)."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="Optimiser.")
    lr: float = Field(default=1e-3, gt=0.0, description="Peak learning rate.")
    weight_decay: float = Field(
        default=0.01, ge=0.0, description="Weight decay (not on biases and norms)."
    )
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="Momentum of sgd.")
    batch_size: int = Field(default=8, ge=1, description="Pictures per step.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    power: float = Field(default=0.9, ge=0.0, description="Exponent of the polynomial decay.")
    grad_clip: float | None = Field(
        default=None, gt=0.0, description="Largest gradient norm; none: no limit."
    )


class DistillConfig(_Table):
    """The distillation loss. With both taps set, projected features are distilled."""

    preset: Literal["softmax-kl", "paper"] = Field(
        default="softmax-kl", description="Formulation of the loss."
    )
    ce_weight: float = Field(default=1.0, ge=0.0, description="Weight of the cross entropy.")
    kd_weight: float = Field(
        default=0.1, ge=0.0, description="Weight of plain distillation on the logits."
    )
    hetero_weight: float = Field(
        default=1.0, ge=0.0, description="Weight of the mixed-target term."
    )
    feature_weight: float = Field(
        default=0.0, ge=0.0, description="Weight of the squared distance in logits space."
    )
    projector_weight: float = Field(
        default=1.0, ge=0.0, description="Weight of the projectors' cross entropy."
    )
    temperature: float = Field(
        default=1.0, gt=0.0, description="Softens both sides' distributions."
    )
    tau: float = Field(
        default=1.0, gt=0.0, description="Softens the choice of the more reliable side."
    )
    mix: Literal["probs", "logits"] | None = Field(
        default=None, description="What is mixed; none: the preset's choice."
    )
    evaluation: Literal["discrepancy", "none"] | None = Field(
        default=None, description="Weighting of pixels; None: the preset's choice."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Label smoothing of the cross entropy."
    )
    backend: str | None = Field(
        default=None, description="Backend of the loss; none: chosen from the device."
    )

    @model_validator(mode="after")
    def _consistent(self) -> DistillConfig:
        weights = ("ce", "kd", "hetero", "feature")
        if not any(getattr(self, f"{name}_weight") for name in weights):
            raise ValueError("every weight is 0: there would be nothing to train on")
        return self


class LogConfig(_Table):
    """How often something is written."""

    every: int = Field(default=20, ge=1, description="Steps between lines of metrics.jsonl.")
    eval_every: int = Field(
        default=500, ge=1, description="Steps between evaluations (the last step always has one)."
    )
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between checkpoints.")
    tensorboard: bool = Field(
        default=True, description="Also write TensorBoard events, if it is installed."
    )


class ReportConfig(_Table):
    """The comparison at the end."""

    samples: int = Field(
        default=5, ge=1, le=20, description="Validation pictures shown, one per row."
    )
    dpi: int = Field(default=110, ge=30, le=600, description="Resolution of the picture.")


class Config(_Table):
    """Everything one run needs."""

    run: Path = Field(
        default=Path("runs/default"), description="Folder of this run; the same command resumes it."
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of initial weights, batches and augmentation."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps ...")
    amp: Literal["off", "bf16", "fp16"] = Field(default="off", description="Mixed precision.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; none: torch's choice."
    )
    data: DataConfig
    teacher: ModelConfig
    student: ModelConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if (self.teacher.tap is None) != (self.student.tap is None):
            missing = "teacher.tap" if self.teacher.tap is None else "student.tap"
            raise ValueError(
                f"{missing} is missing: set both taps (projected features) or none (logits only)"
            )
        if self.student.steps == 0:
            raise ValueError("student.steps is 0: there would be nothing to distil")
        return self


def default_config_text() -> str:
    """The embedded default, comments included."""
    return (resources.files(__package__) / "configs" / DEFAULT_CONFIG).read_text(encoding="utf-8")


def load_config(path: Path | None) -> Config:
    """Read and validate a TOML file; without a path, the embedded default."""
    if path is None:
        return parse_config(default_config_text(), f"{DEFAULT_CONFIG} (embedded)")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a TOML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    return parse_config(text, str(path))


def parse_config(text: str, name: str) -> Config:
    """Validate TOML text; `name` is how messages call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: malformed TOML: {error}") from None
    return _validate(table, name)


def _validate(table: dict[str, Any], name: str) -> Config:
    try:
        return Config.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(describe(error, name)) from None


def describe(error: ValidationError, name: str) -> str:
    """One line per problem: file, key, what came, what is expected."""
    return "\n".join(f"{name}: {_describe_one(e)}" for e in error.errors(include_url=False))


def _describe_one(item: Any) -> str:
    loc = tuple(item["loc"])
    key = ".".join(str(part) for part in loc)
    kind = item["type"]
    if kind == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
        return f"{key}: unknown key (value {item['input']!r}); {hint}"
    if kind == "missing":
        return f"{key}: missing; expected {_expectation(loc)}"
    if kind == "finite_number":
        return f"{key}: got {item['input']!r}; expected: a finite number"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return f"{key}: {message}" if key and not message.startswith(f"{key}.") else message
    came = f"{item['input']!r} ({type(item['input']).__name__})"
    return f"{key}: got {came}; expected: {item['msg'][0].lower()}{item['msg'][1:]}"


def _table_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    table: type[BaseModel] = Config
    for part in loc:
        field = table.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return None
        table = field.annotation
    return table


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    table = _table_at(loc)
    return list(table.model_fields) if table else []


def _expectation(loc: tuple[Any, ...]) -> str:
    if table := _table_at(loc):
        required = [name for name, field in table.model_fields.items() if field.is_required()]
        return f"a table [{'.'.join(map(str, loc))}] with at least {', '.join(required)}"
    table = _table_at(loc[:-1])
    field = table.model_fields.get(str(loc[-1])) if table else None
    return (field.description if field and field.description else "a value").rstrip(".")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: Config
    resume_anyway: bool
    print_config: bool


def parse_command_line(argv: list[str]) -> Options:
    """Read the TOML file named on the command line, then put the overrides on top of it."""
    base, name = load_config(None), f"{DEFAULT_CONFIG} (embedded)"
    parsed = _parse(argv, base)
    if parsed.config is not None:
        base, name = load_config(parsed.config), str(parsed.config)
        parsed = _parse(argv, base)
    table = base.model_dump(mode="json")
    overrides = {
        key: value
        for key, value in dataclasses.asdict(parsed).items()
        if key in Config.model_fields
    }
    _merge(table, overrides)
    config = _validate(table, f"{name} with the command line")
    return Options(config, parsed.resume_anyway, parsed.print_config)


def _parse(argv: list[str], base: Config) -> Any:
    """Let tyro read the command line into plain dataclasses.

    They mirror the tables with the values of `base` as defaults, and without their checks: those
    run once, on the merged configuration, and can then name the full key.
    """
    front: list[Any] = [
        (
            "config",
            Annotated[
                Path | None,
                tyro.conf.Positional,
                tyro.conf.arg(
                    metavar="[CONFIG.toml]",
                    help="Configuration file; without one: the embedded land-cover example.",
                ),
            ],
            None,
        ),
        (
            "resume_anyway",
            Annotated[
                tyro.conf.FlagCreatePairsOff[bool],
                tyro.conf.arg(help="Go on with a run although its configuration changed."),
            ],
            False,
        ),
        (
            "print_config",
            Annotated[
                tyro.conf.FlagCreatePairsOff[bool],
                tyro.conf.arg(help="Print the embedded default configuration and exit."),
            ],
            False,
        ),
    ]
    mirror = _mirror(base, front)
    mirror.__doc__ = _ABOUT
    return tyro.cli(mirror, prog="heteroakd-train", args=argv)


_ABOUT = """Train a teacher, a student alone, and the same student distilled; compare them.

Rerunning the same command resumes an interrupted run and skips what is finished.
Every key of the TOML file can be overridden by an option of the same name."""


def _mirror(table: BaseModel, front: list[Any]) -> type[Any]:
    fields = list(front)
    for name, info in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, BaseModel):
            inner = _mirror(value, [])
            fields.append((name, inner, dataclasses.field(default_factory=inner)))
        elif not isinstance(value, dict):  # free-form tables are for the file only
            described = Annotated[info.annotation, tyro.conf.arg(help=info.description)]  # type: ignore[name-defined]
            fields.append((name, described, value))
    mirror = dataclasses.make_dataclass(type(table).__name__, fields)
    mirror.__doc__ = type(table).__doc__
    return mirror


def _merge(table: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, dict):
            _merge(table[key], value)
        else:
            table[key] = value
