"""The networks: those of transformers by short names, a small U-Net, or the user's own."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import logging
import os
import re
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
from .config import ModelConfig
from .errors import DependencyError, ModelError, UserError
from .files import check_regular
from .memory import ran_out, too_large

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


#: Where training loops keep the weights in a torch file: averages (timm, ConvNeXt) before the last
#: ones (Lightning, mmengine).
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
#: Prefixes of torch.compile, of data parallelism, and of modules around a network.
_WRAPPERS = ("_orig_mod.", "module.", "model.", "net.")

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
    model: nn.Module
    if weights is not None and weights.is_dir():
        for path in weights.iterdir():
            if not path.is_dir():
                check_regular(path, ModelError)
        # A folder in the library's own layout: it translates the key names of older versions.
        model, loaded = model_class.from_pretrained(
            weights, local_files_only=True, output_loading_info=True
        )
        found = int(model.config.num_labels)  # type: ignore[union-attr,arg-type]
        if found != num_classes:
            raise ModelError(f"{weights}: has {found} classes, the data has {num_classes}")
        # The library starts what the folder lacks at random, and only warns.
        if missing := sorted(loaded["missing_keys"]):
            more = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
            raise ModelError(
                f"{weights}: is not the whole of arch {name!r}, it lacks "
                f"{', '.join(missing[:3])}{more}; a part goes into init"
            )
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
    model = model_class(config_class(**{**kwargs, "num_labels": num_classes}))
    return model


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
        load_part(model, config.init)
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


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file (read without unpickling code)."""
    try:
        check_regular(path, ModelError)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # timm keeps its command line beside the weights; a namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such weights file") from None
    except ModelError:
        raise
    except Exception as error:  # each reader has its own kinds of error for a broken file
        # torch advises to run whatever the file holds.
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason: object = error
        if found:
            reason = f"it holds a {found[1]}, which could run code; save its state dict alone"
        raise ModelError(f"{path}: cannot be read as weights: {reason}") from error
    nests = [n for n in _NESTS if isinstance(state, Mapping) and isinstance(state.get(n), Mapping)]
    if nests:
        state = state[nests[0]]
    if len(nests) > 1:
        log.info("%s: has %s; the first is taken", path, ", ".join(nests))
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ModelError(
            f"{path}: holds a {type(state).__name__}, expected a mapping from names to tensors"
        )
    return dict(state)


def _unwrapped(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state as it is, and without each prefix that wrappers put before every name."""
    yield state
    for prefix in _WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            yield from _unwrapped({key.removeprefix(prefix): state[key] for key in state})


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


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into `model`; every name and shape must fit."""
    own = model.state_dict()
    states = _unwrapped(read_state_dict(path))
    state = max(states, key=lambda state: len(state.keys() & own.keys()))
    problems = [f"missing in the file: {key}" for key in own if key not in state]
    problems += [f"unknown to the model: {key}" for key in state if key not in own]
    problems += [
        f"{key}: shape {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:12])
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ModelError(f"{path}: does not fit the model ({len(problems)} keys):\n  {shown}{more}")
    _load(model, state, path)


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except Exception as error:  # of tensors that names and shapes do not tell from others
        raise ModelError(f"{path}: cannot be loaded into the model: {error}") from None


def load_part(model: nn.Module, path: Path) -> None:
    """Take over what fits by name and shape, such as the backbone of a pretrained network.

    Names are tried as they are, and below each child of the model: the file of a backbone does not
    know that it is called `backbone` here.
    """
    states = list(_unwrapped(read_state_dict(path)))
    state, own = states[0], model.state_dict()

    def fitting(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            prefix + key: value
            for key, value in state.items()
            if prefix + key in own and own[prefix + key].shape == value.shape
        }

    prefixes = ["", *(f"{name}." for name, _ in model.named_children())]
    found = max((fitting(prefix, state) for prefix in prefixes for state in states), key=len)
    if not found:
        raise ModelError(
            f"{path}: none of its {len(state)} tensors fits the model by name and shape; "
            f"the file has {', '.join(list(state)[:3])}, the model {', '.join(list(own)[:3])}"
        )
    _load(model, {**own, **found}, path)
    log.info(
        "%s: %d of its %d tensors taken over, %d of the model's start from the seed",
        path,
        len(found),
        len(state),
        len(own) - len(found),
    )


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
