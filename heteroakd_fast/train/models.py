"""The networks: SegFormer (Transformer), a small U-Net (CNN), or the user's own by import path."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .errors import ModelError


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


def _segformer(num_classes: int, weights: Path | None, **kwargs: Any) -> nn.Module:
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ImportError as error:
        raise ModelError(
            f'arch = "segformer" needs transformers, which cannot be imported ({error}); '
            'pip install "heteroakd-fast[train]"'
        ) from None
    if weights is not None and weights.is_dir():
        # A folder in the library's own layout: it translates the key names of older versions.
        model: nn.Module = SegformerForSemanticSegmentation.from_pretrained(
            weights, local_files_only=True
        )
        found = int(model.config.num_labels)  # type: ignore[union-attr,arg-type]
        if found != num_classes:
            raise ModelError(f"{weights}: has {found} classes, the data has {num_classes}")
        return model
    known = SegformerConfig().to_dict()
    unknown = [key for key in kwargs if key not in known]
    if unknown:  # the library would keep them and build the default model
        near = difflib.get_close_matches(unknown[0], known, n=3)
        raise ModelError(
            f"arch 'segformer': unknown kwargs {', '.join(unknown)}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    return SegformerForSemanticSegmentation(
        SegformerConfig(**{**kwargs, "num_labels": num_classes})
    )


def build_model(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    """Build a network, initialised from `seed` alone, and load its weights file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if config.arch == "unet":
                model: nn.Module = UNet(num_classes, **config.kwargs)
            elif config.arch == "segformer":
                model = _segformer(num_classes, config.weights, **config.kwargs)
            else:
                model = _imported(config.arch)(num_classes=num_classes, **config.kwargs)
        except (TypeError, ValueError) as error:
            raise ModelError(f"arch {config.arch!r} with {config.kwargs}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"arch {config.arch!r} gave a {type(model).__name__}, expected a torch.nn.Module"
        )
    if config.weights is not None and not config.weights.is_dir():
        load_weights(model, config.weights)
    return model


def _imported(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise ModelError(
            f'arch {path!r}: expected "segformer", "unet" or "package.module:callable"'
        )
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"arch {path!r}: {error}") from error
    return found


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file (read without unpickling code)."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such weights file") from None
    except Exception as error:  # each reader has its own kinds of error for a broken file
        raise ModelError(f"{path}: cannot be read as weights: {error}") from error
    for nest in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(nest), Mapping):
            state = state[nest]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ModelError(
            f"{path}: holds a {type(state).__name__}, expected a mapping from names to tensors"
        )
    # DistributedDataParallel puts this prefix before every name.
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into `model`; every name and shape must fit."""
    state = read_state_dict(path)
    own = model.state_dict()
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
    model.load_state_dict(state)


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a segmentation model returns: a tensor, a mapping or an object."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits  # type: ignore[no-any-return]
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if isinstance(output.get(key), Tensor):
                return output[key]  # type: ignore[no-any-return]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(
        f"the model returned a {type(output).__name__}; "
        "expected a tensor, or a mapping or object with `logits` or `out`"
    )


def check_logits(
    model: nn.Module, num_classes: int, side: tuple[int, int], device: torch.device
) -> None:
    """One dry run, so that a model that does not fit fails early and not inside the loss."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = logits_of(model(torch.zeros(1, 3, *side, device=device)))
    finally:
        model.train(was_training)
    if logits.dim() != 4 or logits.shape[1] != num_classes:
        raise ModelError(
            f"logits have shape {tuple(logits.shape)}, expected (1, {num_classes}, h, w)"
        )


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
