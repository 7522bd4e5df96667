"""The configuration: what may be set, its limits, and how it is read from a TOML file.

Validation goes through JSON in pydantic's strict mode: a TOML string where a number
belongs is then an error and not silently converted, while lists still become tuples
and strings still become paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Every command stands on this one where it names no data of its own.
DEFAULT_RECIPE = "landcover"
Stage = Literal["teacher", "alone", "distilled"]
STAGES: tuple[Stage, ...] = get_args(Stage)


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
        names = self.class_names or ()
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # scores are listed by name
            raise ValueError(f"data.class_names has {twice!r} more than once")
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
        description="A short name (unet, segformer, mobilenet-v2, upernet, dpt, beit, mobilevit) "
        'or an import path "package.module:callable".'
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the architecture (in the TOML file only)."
    )
    weights: Path | None = Field(
        default=None, description="safetensors or torch state_dict file of the whole network."
    )
    init: Path | None = Field(
        default=None,
        description="The same kind of file of a part, such as a pretrained backbone: what fits by "
        "name and shape is taken, the rest starts from the seed.",
    )
    tap: str | None = Field(
        default=None, description="Dotted name of the module whose output is distilled."
    )
    steps: int = Field(ge=0, description="Training steps; 0 with weights: use them as they are.")
    lr: float | None = Field(
        default=None, gt=0.0, description="Learning rate of this network; none: optim.lr."
    )
    optimizer: Literal["adamw", "sgd"] | None = Field(
        default=None, description="Optimiser of this network; none: optim.name."
    )
    weight_decay: float | None = Field(
        default=None, ge=0.0, description="Weight decay of this network; none: optim.weight_decay."
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
    batch_size: int = Field(
        default=8, ge=1, description="Pictures per step, of all ranks and micro-batches together."
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Micro-batches per step. The loss stays exactly that of the whole batch.",
    )
    eval_batch_size: int = Field(
        default=16, ge=1, description="Validation pictures at once, on each rank."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    power: float = Field(default=0.9, ge=0.0, description="Exponent of the polynomial decay.")
    grad_clip: float | None = Field(
        default=None, gt=0.0, description="Largest gradient norm; none: no limit."
    )


class DistillConfig(_Table):
    """The distillation loss."""

    features: bool | None = Field(
        default=None,
        description="Distil projected features of both taps, not final logits; none: where taps "
        "are set.",
    )
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
    cwd_weight: float = Field(
        default=0.0, ge=0.0, description="Weight of channel-wise distillation on the logits."
    )
    cwd_temperature: float = Field(
        default=4.0, gt=0.0, description="Temperature of channel-wise distillation."
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
    mix: Literal["probs", "logits", "teacher"] | None = Field(
        default=None,
        description="What is mixed (teacher: nothing, an ablation); none: the preset's choice.",
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
    images: int = Field(
        default=2, ge=0, le=16, description="Validation pictures in TensorBoard at evaluations."
    )


class ReportConfig(_Table):
    """The comparison at the end."""

    samples: int = Field(
        default=5, ge=1, le=20, description="Validation pictures shown, one per row."
    )
    dpi: int = Field(default=110, ge=30, le=600, description="Resolution of the picture.")


class ScaleConfig(_Table):
    """Several processes (torchrun), and how the networks run on their devices."""

    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Of several ranks: replicas (DDP), or sharded parameters, gradients and "
        "optimiser states (FSDP2).",
    )
    sync_bn: bool = Field(
        default=False, description="Batch norms over all ranks (GPUs only, as torch has it)."
    )
    channels_last: bool = Field(
        default=False, description="Pictures and weights in channels-last memory."
    )
    compile: bool = Field(default=False, description="torch.compile the network that trains.")
    timeout: float = Field(
        default=600.0, ge=1.0, description="Seconds without an answer after which a rank is lost."
    )


class Config(_Table):
    """Everything one run needs."""

    run: Path = Field(
        default=Path("runs/default"),
        description="Folder of this run; the same command resumes it. In no file: runs/ and the "
        "names of the recipes.",
    )
    stages: tuple[Stage, ...] = Field(
        default=STAGES,
        description="What to train: the teacher, the student alone, the student distilled.",
    )
    # Networks start from 2 * seed and 2 * seed + 1, and torch's generators take 64 bits.
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of initial weights, batches and augmentation."
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
    def taps(self) -> tuple[str, str] | None:
        """Names of the student's and the teacher's tapped module, where features are distilled."""
        if self.student.tap is None or self.teacher.tap is None or self.distill.features is False:
            return None
        return self.student.tap, self.teacher.tap


def embedded_recipes() -> dict[str, str]:
    """The recipes that come with the package: their texts by name."""
    folder = resources.files(__package__) / "recipes"
    files = sorted((file for file in folder.iterdir()), key=lambda file: file.name)
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in files
        if file.name.endswith(".toml")
    }


def load_config(*sources: str | Path) -> Config:
    """Read TOML files or embedded recipes, the later ones on top of the earlier; validate them.

    Recipes alone that name no data stand on the embedded land-cover example; a file of the user's
    own does not, or a forgotten table would go unnoticed.
    """
    table, name = _load_tables([str(source) for source in sources])
    return _validate(table, name)


def _load_tables(sources: list[str]) -> tuple[dict[str, Any], str]:
    recipes = embedded_recipes()
    tables = [(source, _load_table(source, recipes)) for source in sources]
    own_files = any(source not in recipes or Path(source).is_file() for source in sources)
    if not own_files and not any("data" in table for _, table in tables):
        tables.insert(0, (DEFAULT_RECIPE, _load_table(DEFAULT_RECIPE, recipes)))
    merged: dict[str, Any] = {}
    for _, table in tables:
        for role in ("teacher", "student"):
            # Another architecture: the arguments, weights and tap of the one before do not fit it.
            if isinstance(table.get(role), dict) and "arch" in table[role]:
                merged.pop(role, None)
        _merge(merged, table)
    names = [Path(source).stem for source, _ in tables]
    merged.setdefault("run", "runs/" + "-".join(names))
    return merged, " + ".join(source for source, _ in tables)


def _load_table(source: str, recipes: dict[str, str]) -> dict[str, Any]:
    path = Path(source)
    if source in recipes and not path.is_file():
        return _parse_toml(recipes[source], source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(source, recipes, n=1)
        raise ConfigError(
            f"{path}: no such file; expected a TOML configuration or one of the recipes "
            f"{', '.join(recipes)}" + (f"; did you mean {near[0]}?" if near else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    return _parse_toml(text, source)


def parse_config(text: str, name: str) -> Config:
    """Validate TOML text that is complete by itself; `name` is how messages call it."""
    return _validate(_parse_toml(text, name), name)


def _parse_toml(text: str, name: str) -> dict[str, Any]:
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: malformed TOML: {error}") from None
    return table


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
    list_recipes: bool


def parse_command_line(argv: list[str]) -> Options:
    """Read the files and recipes named on the command line, then put the overrides on top."""
    table, name = _load_tables([])
    parsed, mirror = _parse(argv, table)
    if parsed.config:
        table, name = _load_tables(list(parsed.config))
        parsed, mirror = _parse(argv, table)
    given = dataclasses.asdict(parsed)
    # Only what the command line changed: what is missing or wrong in a file stays so, and the
    # message about it can say that.
    overrides = _changes(given, dataclasses.asdict(mirror()))
    for option in ("config", "resume_anyway", "print_config", "list_recipes"):
        overrides.pop(option, None)
    _merge(table, overrides)
    config = _validate(table, f"{name} with the command line" if overrides else name)
    return Options(config, parsed.resume_anyway, parsed.print_config, parsed.list_recipes)


def _changes(given: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict):
            if inner := _changes(value, default[key]):
                changed[key] = inner
        elif value != default[key]:
            changed[key] = value
    return changed


def _parse(argv: list[str], table: dict[str, Any]) -> tuple[Any, type[Any]]:
    """Let tyro read the command line into plain dataclasses; also returns their class.

    They mirror the tables with the values of `table` as defaults, and without their checks: those
    run once, on the merged configuration, and can then name the full key.
    """
    front: list[Any] = [
        (
            "config",
            Annotated[
                tuple[str, ...],
                tyro.conf.Positional,
                tyro.conf.arg(
                    metavar="[RECIPE|FILE.toml ...]",
                    help="Recipes (--list-recipes) and configuration files, the later ones on top; "
                    "recipes without data stand on the embedded land-cover example.",
                ),
            ],
            (),
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
                tyro.conf.arg(help="Print the files and recipes named here as one, and exit."),
            ],
            False,
        ),
        (
            "list_recipes",
            Annotated[
                tyro.conf.FlagCreatePairsOff[bool],
                tyro.conf.arg(help="List the embedded recipes and exit."),
            ],
            False,
        ),
    ]
    mirror = _mirror(Config, table, front)
    mirror.__doc__ = _ABOUT
    return tyro.cli(mirror, prog="heteroakd-train", args=argv), mirror


_ABOUT = """Train a teacher, a student alone, and the same student distilled; compare them.

Rerunning the same command resumes an interrupted run and skips what is finished.
Every key of the TOML file can be overridden by an option of the same name."""


def _mirror(model: type[BaseModel], table: Any, front: list[Any]) -> type[Any]:
    fields = list(front)
    for name, info in model.model_fields.items():
        value = table.get(name) if isinstance(table, dict) else None
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            inner = _mirror(info.annotation, value, [])
            fields.append((name, inner, dataclasses.field(default_factory=inner)))
        elif get_origin(info.annotation) is not dict:  # free-form tables are for the file only
            # `| None`: what has no default may be in no file either, until all is put together.
            annotation: Any = info.annotation
            if info.is_required():
                annotation = annotation | None
            described = Annotated[annotation, tyro.conf.arg(help=info.description)]
            fields.append((name, described, _default(info, value)))
    mirror = dataclasses.make_dataclass(model.__name__, fields)
    mirror.__doc__ = model.__doc__
    return mirror


def _default(info: FieldInfo, value: Any) -> Any:
    """What the file says, where it can be used; its complaint comes with the whole table."""
    if value is not None:
        annotation: Any = info.annotation
        try:
            return TypeAdapter(annotation).validate_json(
                json.dumps(value, default=str), strict=True
            )
        except ValidationError:
            pass
    return None if info.is_required() else info.get_default(call_default_factory=True)


def _merge(table: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def as_toml(config: Config) -> str:
    """The whole configuration as a TOML file, each key with its description."""
    lines: list[str] = []
    _write_table(config, "", lines)
    return "\n".join(lines) + "\n"


def _write_table(table: BaseModel, prefix: str, lines: list[str]) -> None:
    inner: list[tuple[str, BaseModel]] = []
    for name, info in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, BaseModel):
            inner.append((name, value))
        elif isinstance(value, dict):
            if value:
                lines.append(f"{name} = {_toml(value)}")
        else:
            text = f"# {name} =" if value is None else f"{name} = {_toml(value)}"
            lines.append(f"{text:<28}  # {info.description}" if info.description else text)
    for name, value in inner:
        lines.extend(["", f"[{prefix}{name}]"])
        _write_table(value, f"{prefix}{name}.", lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        items = (f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Strings, booleans and numbers are written as in JSON, which escapes two things otherwise.
    text = json.dumps(
        value if isinstance(value, (bool, int, float)) else str(value), ensure_ascii=False
    )
    return text.replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml(key)
