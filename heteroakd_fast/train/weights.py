"""Weights files: read by their content and without running code, and put into a network."""

from __future__ import annotations

import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import non_finite
from .errors import ModelError, shortened
from .files import check_regular

log = logging.getLogger("heteroakd_fast.train")

#: Prefixes of torch.compile, of data parallelism, and of modules around a network.
_WRAPPERS = ("_orig_mod.", "module.", "model.", "net.")
#: What torch fills in itself, and what counters of operations leave behind: no weights.
_COUNTS, _TOTALS = ".num_batches_tracked", ("total_ops", "total_params")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
_INDEX = ".index.json"

#: What files of weights turn out to be, by their first bytes.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file: run `git lfs pull`"),
    (b"<", "an HTML or XML page, such as a server's error: download the file again"),
    (b"{", "JSON text, which holds no tensor"),
    (b"\x89HDF", "HDF5, as Keras writes it: convert it"),
    (b"GGUF", "GGUF, whose weights are quantised: take the original ones"),
    (b"\x1f\x8b", "gzip: unpack it"),
)


class _Unknown:
    """Stands for an object of a class that may run code: it keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Unknown:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file, or of the one weights file in a folder;
    those of all shards of an index.

    Raises:
        ModelError: there are none, or several files they could be in.
    """
    if path.is_dir():
        path = _file_in(path)
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    try:
        check_regular(path, ModelError)
        state, unknown = _read(path)
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such weights file; expected a file or folder of this machine (nothing is "
            "downloaded)"
        ) from None
    except ModelError:
        raise
    except Exception as error:  # each reader has its own kinds of error for a broken file
        raise ModelError(
            f"{path}: cannot be read as weights: it is damaged or cut short, or neither "
            "safetensors nor a state dict that torch.save wrote"
        ) from error
    state = _chosen(state, path, unknown)
    if not state:
        raise ModelError(f"{path}: holds no tensor, expected the weights of a network")
    return state


def _file_in(folder: Path) -> Path:
    """The weights file of a folder: its index, its only safetensors file, or its only file."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith((*_SUFFIXES, _INDEX)))
    for ending in (_INDEX, ".safetensors", _SUFFIXES):
        if len(found := [path for path in files if path.name.endswith(ending)]) == 1:
            return found[0]
    there = f"holds {shortened([path.name for path in files], 4)}" if files else "holds no weights"
    raise ModelError(f"{folder}: {there}; name one file ({', '.join(_SUFFIXES)})")


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        check_regular(index, ModelError)
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read as an index of weights: {error!r}") from None
    if lacking := [path.name for path in shards if not path.is_file()]:
        raise ModelError(f"{index}: names {shortened(lacking, 3)}, which {index.parent} lacks")
    return {key: value for path in shards for key, value in read_state_dict(path).items()}


def _read(path: Path) -> tuple[Any, list[str]]:
    """What a file holds, and the classes in it that were left out because they may run code."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return load_file(path), []
    other = next((text for begin, text in _OTHERS if head.lstrip().startswith(begin)), None)
    if not head:
        other = "an empty file"
    elif path.suffix == ".onnx":
        other = "ONNX, which has a graph of its own: take the weights it was exported from"
    elif head[257:262] == b"ustar":
        other = "a tar archive: unpack it"
    unknown: list[str] = []
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        other = "an archive that is cut short: copy or download it again"
    elif head.startswith(b"PK"):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            other = "a TorchScript program: save the state dict of what torch.jit.load gives"
        elif not any(name.endswith("/data.pkl") for name in names):
            other = f"a zip archive of {shortened(names, 2)}: unpack or convert it"
        else:
            unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if other:
        raise ModelError(
            f"{path}: cannot be read as weights: got {other}; expected safetensors, or a state "
            "dict that torch.save wrote"
        )
    # What trainers keep beside weights (settings, paths, logs) becomes an object without content.
    stands = [(type(name, (_Unknown,), {}), name) for name in unknown]
    with (
        warnings.catch_warnings(),
        torch.serialization.safe_globals(stands),  # type: ignore[arg-type]
        path.open("rb") as file,  # torch goes by the suffix of a path
    ):
        warnings.simplefilter("ignore")  # of old pickles
        try:
            return torch.load(file, map_location="cpu", weights_only=True), unknown
        except Exception as error:
            # torch advises to run whatever the file holds.
            named = re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
            if unknown or named:
                raise _runs_code(path, unknown or named) from None
            raise


def _runs_code(path: Path, unknown: list[str]) -> ModelError:
    own = [name for name in unknown if not name.startswith(("torch.", "builtins."))]
    return ModelError(
        f"{path}: cannot be read as weights: it holds a {(own or unknown)[0]}, which could run "
        "code; save its state dict alone"
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )


def _chosen(state: Any, path: Path, unknown: list[str]) -> dict[str, Tensor]:
    """The weights in what a training loop saved: averages before the last ones."""
    if _is_state(state):
        return dict(state)
    if isinstance(state, _Unknown):
        raise _runs_code(path, unknown)
    if not isinstance(state, Mapping):
        raise ModelError(
            f"{path}: holds a {type(state).__name__}, expected a mapping from names to tensors"
        )
    nests = [key for key, value in state.items() if _is_state(value) and value]
    averaged = [key for key in nests if "ema" in str(key).lower()]
    usual = [key for key in nests if key in ("state_dict", "model", "model_state_dict")]
    for keys in (averaged, usual, nests):
        if len(keys) == 1:
            if len(nests) > 1:
                shown = ", ".join(sorted(map(str, nests), key=lambda key: key != keys[0]))
                log.info("%s: has %s; the first is taken", path, shown)
            if unknown:
                text = "%s: its %s are left out; they could run code"
                log.info(text, path, shortened(unknown, 3))
            return dict(state[keys[0]])
    found = f"weights in {', '.join(map(str, nests))}" if nests else "no weights"
    raise ModelError(
        f"{path}: has {found} (of {shortened(list(map(str, state)), 6)}), expected a mapping from "
        "names to tensors, alone or as state_dict"
    )


def _unwrapped(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state as it is, and what has each prefix that wrappers put before names, without it."""
    yield state
    for prefix in _WRAPPERS:
        if inner := {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}:
            yield from _unwrapped(inner)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into `model`; every name and shape must fit."""
    own, whole = model.state_dict(), read_state_dict(path)
    state = max(_unwrapped(whole), key=lambda state: len(state.keys() & own.keys()))
    if not state.keys() & own.keys():
        raise ModelError(_nothing_fits(path, whole, own))
    if beside := len(whole) - len(state):
        log.info("%s: %d of its %d tensors belong to no network", path, beside, len(whole))
    state = {k: v for k, v in state.items() if k in own or not k.endswith(_TOTALS)}
    state |= {k: v for k, v in own.items() if k not in state and k.endswith(_COUNTS)}
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
        raise ModelError(
            f"{path}: does not fit the model ({len(problems)} keys{_folder_of(path)}):\n  "
            f"{shown}{more}"
        )
    _load(model, state, path)


def load_part(model: nn.Module, path: Path, state: dict[str, Tensor] | None = None) -> None:
    """Take over what fits by name and shape, such as the backbone of a pretrained network, of
    `path` or of the `state` that was read from it.

    Names are tried as they are, and below each child of the model: the file of a backbone does not
    know that it is called `backbone` here.
    """
    whole = read_state_dict(path) if state is None else state
    own = model.state_dict()

    def fitting(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            prefix + key: value
            for key, value in state.items()
            if prefix + key in own and own[prefix + key].shape == value.shape
        }

    prefixes = ["", *(f"{name}." for name, _ in model.named_children())]
    states = list(_unwrapped(whole))
    found = max((fitting(prefix, state) for prefix in prefixes for state in states), key=len)
    if not found:
        raise ModelError(_nothing_fits(path, whole, own))
    _load(model, found, path)
    log.log(
        logging.INFO if 2 * len(found) >= len(whole) else logging.WARNING,
        "%s: %d of its %d tensors taken over, %d of the model's start from the seed%s",
        path,
        len(found),
        len(whole),
        len(own) - len(found),
        "" if 2 * len(found) >= len(whole) else _folder_of(path),
    )


def _nothing_fits(path: Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    return (
        f"{path}: none of its {len(state)} tensors fits the model by name and shape; the file has "
        f"{shortened(list(state), 3)}, the model {shortened(list(own), 3)}{_folder_of(path)}"
    )


def _folder_of(path: Path) -> str:
    beside = path.is_file() and (path.parent / "config.json").is_file()
    text = "; where transformers wrote it, give its folder, whose names are translated"
    return text if beside else ""


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load tensors whose names and shapes fit; the model keeps what `state` lacks."""
    own = model.state_dict()
    odd = [
        f"{key} ({value.dtype}{', ' * bool(kind)}{kind})"
        for key, value in state.items()
        if (kind := "no content" if value.is_meta else "sparse" * (value.layout != torch.strided))
        or (own[key].is_floating_point() and not value.is_floating_point())
    ]
    if odd:
        raise ModelError(
            f"{path}: cannot be loaded into the model: got {shortened(odd, 3)}, expected dense "
            "floats; quantised weights mean nothing without their scales: take the original ones"
        )
    with finite_weights(model, path):
        try:
            model.load_state_dict(own | state)
        except Exception as error:  # of tensors that names and shapes do not tell from others
            raise ModelError(f"{path}: cannot be loaded into the model: {error}") from None


@contextmanager
def finite_weights(model: nn.Module, path: Path) -> Iterator[None]:
    """Refuse what is loaded inside where the model was finite before."""
    before = non_finite(model.state_dict())
    yield
    if bad := sorted(non_finite(model.state_dict()) - before):
        raise ModelError(
            f"{path}: got values that are not finite in {shortened(bad, 4)}, expected finite ones; "
            "take an earlier file"
        )
