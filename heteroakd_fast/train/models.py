"""The networks: those of transformers by short names, a small U-Net, or the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import integrations
from .._requirements import pip_command
from .checkpoint import non_finite
from .config import ModelConfig
from .errors import DependencyError, ModelError, UserError, shortened
from .files import check_regular
from .memory import ran_out, too_large
from .weights import load_part, load_weights

log = logging.getLogger("heteroakd_fast.train")


class UNet(nn.Module):
    """A small U-Net whose logits come out at `stride`, for a loss that upsamples them itself."""

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 8,
        levels: int = 4,
        stride: int = 2,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if stride < 1 or stride & (stride - 1):
            raise ValueError(f"stride is {stride}, expected a power of two")
        if levels < 2:
            raise ValueError(f"levels is {levels}, expected 2 or more")
        if width < 1:
            raise ValueError(f"width is {width}, expected 1 or more")
        stem: list[nn.Module] = []
        channels = in_channels
        for _ in range(stride.bit_length() - 1):
            stem.append(_conv(channels, width, stride=2))
            channels = width
        self.stem = nn.Sequential(*stem)
        widths = [width << level for level in range(levels)]
        self.encoder = nn.ModuleList(
            _double(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True)
        )
        # In the order they run, so that the last one is what a feature tap wants.
        self.decoder = nn.ModuleList(
            _double(deep + skip, skip)
            for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            skip = skips.pop()
            x = block(
                torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1)
            )
        logits: Tensor = self.classifier(x)
        return logits


def _conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


def _double(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(_conv(channels, out), _conv(out, out))


#: Short names of architectures of transformers: the class without its ending and what it is.
LIBRARY = {
    "segformer": "Segformer",  # Transformer, logits at stride 4
    "dpt": "DPT",  # ViT with a convolutional decoder, logits at the images' size
    "beit": "Beit",  # ViT with an UperNet head, stride 4
    "upernet": "UperNet",  # over a backbone: resnet, convnext, swin; stride 4
    "mobilenet-v2": "MobileNetV2",  # CNN with a DeepLabV3+ head; stride 8 or 16
    "mobilevit": "MobileViT",
    "mobilevit-v2": "MobileViTV2",
}


def _from_library(name: str, num_classes: int, weights: Path | None, kwargs: Any) -> nn.Module:
    """A segmentation network of transformers, built from its configuration."""
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            f'arch = "{name}" needs transformers, which cannot be imported ({error}); '
            + pip_command("train")
        ) from None
    model_class = getattr(transformers, f"{LIBRARY[name]}ForSemanticSegmentation")
    if weights is not None and weights.is_dir():
        model, loaded = _from_folder(model_class, weights)
        # The library starts what the folder lacks at random, and only warns.
        if missing := sorted(loaded["missing_keys"]):
            raise ModelError(
                f"{weights}: is not the whole of arch {name!r}, it lacks {shortened(missing, 3)}; "
                "a part goes into init"
            )
        found = int(model.config.num_labels)  # type: ignore[union-attr,arg-type]
        if found != num_classes:
            raise ModelError(f"{weights}: has {found} classes, the data has {num_classes}")
        return model
    config_class = getattr(transformers, f"{LIBRARY[name]}Config")
    if name == "upernet":
        kwargs = _with_backbone(kwargs, transformers)
    known = config_class().to_dict()
    unknown = [key for key in kwargs if key not in known]
    if unknown:  # the library would keep them and build the default model
        near = difflib.get_close_matches(unknown[0], known, n=3)
        raise ModelError(
            f"arch {name!r}: unknown kwargs {', '.join(unknown)}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    if "use_auxiliary_head" in known:  # whose logits no loss here looks at
        kwargs = {"use_auxiliary_head": False, **kwargs}
    built: nn.Module = model_class(config_class(**{**kwargs, "num_labels": num_classes}))
    return built


def _from_folder(model_class: Any, folder: Path, **options: Any) -> tuple[nn.Module, Any]:
    """What is in a folder of transformers, which translates the names of older versions, and what
    is not.

    Raises:
        ModelError: it cannot be read, or is that of another architecture.
    """
    from transformers.utils import logging as messages

    for path in folder.iterdir():
        if not path.is_dir():
            check_regular(path, ModelError)
            with path.open("rb") as file:
                if file.read(8) == b"version ":
                    raise ModelError(f"{path}: got a Git LFS pointer: run `git lfs pull`")
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, expected = described.get("model_type"), model_class.config_class.model_type
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder}: holds no config.json that can be read ({error}); expected a folder that "
            "save_pretrained wrote"
        ) from None
    if kind != expected or "quantization_config" in described:
        found = "quantised weights" if kind == expected else f"a {kind!r}"
        raise ModelError(
            f"{folder}: config.json describes {found}, expected {expected!r} in floats"
        )
    before = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.CRITICAL)  # what it would say is in our message
    messages.disable_progress_bar()
    try:
        model, loaded = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # of whatever file it is
        text = f"{folder}: cannot be read as a folder of transformers: {error}"
        raise ModelError(text) from error
    finally:
        messages.set_verbosity(before[0])
        if before[1]:
            messages.enable_progress_bar()
    not_finite = non_finite(dict(model.named_parameters()))
    if bad := sorted(not_finite - set(loaded["missing_keys"])):
        raise ModelError(f"{folder}: got values that are not finite in {shortened(bad, 4)}")
    return model, loaded


def _init(model: nn.Module, config: ModelConfig) -> None:
    """Take over what `init` has."""
    assert config.init is not None
    if config.arch not in LIBRARY or not config.init.is_dir():
        return load_part(model, config.init)
    options = {"config": model.config, "ignore_mismatched_sizes": True}
    read, loaded = _from_folder(type(model), config.init, **options)
    left = {key for key, *_ in loaded["mismatched_keys"]} | set(loaded["missing_keys"])
    state = {key: value for key, value in read.state_dict().items() if key not in left}
    return load_part(model, config.init, state)


def _with_backbone(kwargs: dict[str, Any], transformers: Any) -> dict[str, Any]:
    """UperNet's backbone as a configuration object; every stage feeds the head."""
    if "backbone_config" not in kwargs:
        raise ModelError(
            "arch 'upernet': kwargs need backbone_config, such as "
            '{ model_type = "resnet", depths = [3, 4, 6, 3] }'
        )
    options = {
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        **kwargs["backbone_config"],
    }
    kind = options.pop("model_type", "resnet")
    backbone = transformers.AutoConfig.for_model(kind, **options)
    return {**kwargs, "backbone_config": backbone}


def build_model(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    """Build a network, initialised from `seed` alone, and load its weights file."""
    with torch.random.fork_rng(devices=[]):
        try:
            _check_size(config, num_classes)
            torch.manual_seed(seed)
            model = _built(config, num_classes)
        except UserError:
            raise
        except (TypeError, ValueError, OSError) as error:
            raise ModelError(f"arch {config.arch!r} with {config.kwargs}: {error}") from error
        except Exception as error:  # whatever arguments that do not go together lead to
            raise ModelError(
                f"arch {config.arch!r} with {config.kwargs}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"arch {config.arch!r} gave a {type(model).__name__}, expected a torch.nn.Module"
        )
    if config.output is not None:
        model.register_forward_hook(partial(_chosen, config.output))
    if config.init is not None:
        _init(model, config)
    if config.weights is not None and not (config.arch in LIBRARY and config.weights.is_dir()):
        load_weights(model, config.weights)
    return model.float()  # images are; a folder in half precision is loaded as it is


def _built(config: ModelConfig, num_classes: int) -> nn.Module:
    if config.arch == "unet":
        return UNet(num_classes, **config.kwargs)
    if config.arch in LIBRARY:
        return _from_library(config.arch, num_classes, config.weights, config.kwargs)
    return _imported_model(config, num_classes)  # type: ignore[no-any-return]


def _check_size(config: ModelConfig, num_classes: int) -> None:
    """Refuse a network whose weights cannot be in memory, before they take all of it.

    The user's own is not built twice: its constructor may do more than build.
    """
    if config.weights is not None or (config.arch != "unet" and config.arch not in LIBRARY):
        return
    with torch.device("meta"):
        model = _built(config, num_classes)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if problem := too_large(size):
        raise ModelError(f"arch {config.arch!r} with {config.kwargs}: its weights would {problem}")


def _imported_model(config: ModelConfig, num_classes: int) -> Any:
    """The user's own: called with `num_classes`, or `classes` where it knows only that."""
    build = _imported(config.arch)
    name = "num_classes"
    try:
        parameters = set(inspect.signature(build).parameters)
    except (TypeError, ValueError):  # a callable without a signature
        parameters = set()
    if "classes" in parameters and "num_classes" not in parameters:
        name = "classes"  # as segmentation_models_pytorch calls them
    return build(**{name: num_classes}, **config.kwargs)


def _imported(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise ModelError(
            f'arch {path!r}: expected unet, {", ".join(LIBRARY)}, or "package.module:callable"'
        )
    # Last, so that no file that happens to lie here hides an installed module. `python -m` has it,
    # a console script does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing a module runs it
        raise ModelError(f"arch {path!r}: {type(error).__name__}: {error}") from error
    return found


Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def stored_statistics(weights: Path) -> tuple[Path, Statistics] | None:
    """Mean and std of the images in [0, 1] that weights were trained with, and the file that has
    them: this driver's own, or transformers' preprocessor_config.json beside them."""
    stored: dict[str, Any] = {}
    if weights.suffix == ".safetensors" and weights.is_file():
        with suppress(OSError, SafetensorError), safe_open(weights, "pt") as file:
            stored = file.metadata() or {}  # loading it reports what is wrong with it
    beside = (weights if weights.is_dir() else weights.parent) / "preprocessor_config.json"
    path = weights if {"mean", "std"} <= stored.keys() else beside
    if not path.is_file():
        return None
    try:
        if path == weights:
            pair, scale = (json.loads(stored["mean"]), json.loads(stored["std"])), 1.0
        else:
            stored = json.loads(path.read_text(encoding="utf-8"))
            used, rescaled = stored.get("do_normalize", True), stored.get("do_rescale", True)
            pair = (stored["image_mean"], stored["image_std"]) if used else (0.0, 1.0)
            scale = 255.0 * (stored.get("rescale_factor", 1 / 255) if rescaled else 1.0)
        mean, std = (
            tuple(round(float(v) / scale, 9) for v in np.broadcast_to(value, 3)) for value in pair
        )
        if min(std) <= 0.0:
            raise ValueError(f"got the std {pair[1]}, expected positive numbers")
    except Exception as error:  # of each reader, and of whatever JSON holds
        problem = f"{type(error).__name__}: {error}"
        raise ModelError(f"{path}: no mean and std can be read ({problem}); correct it") from error
    if stored.get("do_flip_channel_order"):
        text = "%s: asks for BGR, and images are RGB here; reverse the first layer's input channels"
        log.warning(text, path)
    return path, (mean, std)


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a segmentation model returns: a tensor, a mapping or an object."""
    try:
        return integrations.logits_of(output)
    except TypeError:
        raise ModelError(
            f"the network returned {_described(output)}; expected a tensor, or logits or out in a "
            "mapping or object; name the logits, or give their index, by student.output or "
            "teacher.output"
        ) from None


def _chosen(key: int | str, module: nn.Module, inputs: Any, output: Any) -> Any:
    """The part of a network's output that has the logits; a tensor is the logits alone (networks
    with auxiliary heads often return that in evaluation mode)."""
    if isinstance(output, Tensor):
        return output
    try:
        if isinstance(key, int):
            return (list(output.values()) if isinstance(output, Mapping) else output)[key]
        return output[key] if isinstance(output, Mapping) else getattr(output, key)
    except (LookupError, TypeError, AttributeError):
        raise ModelError(
            f"output: got {key!r}, but the network returned {_described(output)}"
        ) from None


def _described(output: Any) -> str:
    """The type and the parts of what a network returned."""
    parts: Any = getattr(output, "__dict__", {}).items()
    if isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, tuple | list):
        parts = enumerate(output)
    shapes = (
        f"{key}: {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}"
        for key, part in parts
    )
    return f"a {type(output).__name__} ({', '.join(shapes)})"


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """In the block evaluation mode; behind it, every part is in its own mode again."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


def forward_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, C, h, w] of a forward pass, before an upsampling that the loss does itself."""
    with integrations.low_resolution(model):
        output = model(images)
    return logits_of(output)


def check_logits(
    model: nn.Module,
    num_classes: int,
    side: tuple[int, int],
    device: torch.device,
    hint: str = "",
) -> None:
    """One dry run, so that a model that does not fit fails early and not inside the loss. `hint`:
    what to do if it cannot take images of that size."""
    try:
        with torch.no_grad(), evaluating(model), integrations.low_resolution(model):
            output = model(torch.zeros(1, 3, *side, device=device))
        logits = logits_of(output)
    except UserError:
        raise
    except Exception as error:  # of whatever layer it is
        if ran_out(error):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot take an image of {side[1]} x {side[0]} pixels: {error}"
            + hint
        ) from error
    if logits.dim() != 4 or logits.shape[1] != num_classes:
        text = f"logits have shape {tuple(logits.shape)}, expected (1, {num_classes}, h, w)"
        if not isinstance(output, Tensor):
            text += f"; of {_described(output)}, choose by student.output or teacher.output"
        raise ModelError(text)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
