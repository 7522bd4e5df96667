"""`python -m heteroakd_fast.info`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from typing import Any, Final

import torch

from . import _extension, backends
from ._pipes import quiet_broken_pipe
from .labels import check_synchronously
from .spec import LossSpec
from .terms import CrossEntropy, Feature
from .version import __version__

__all__ = ["collect", "main"]


def collect() -> dict[str, Any]:
    """Versions, the compiled library, and each backend with None or the reason it cannot run.

    Raises:
        ValueError: the value of an environment variable is refused, and every call would fail.
    """
    path = _extension.library_path()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "heteroakd_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": _extension.cpu_isa(),
        "gpus": gpus,
        "extension": None if path is None else path.name,
        "extension_build": _extension.description(),
        "cuda_note": _extension.cuda_note(),
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith("HETEROAKD_")
        },
        "backend": backends.wanted(),
        "check_labels": check_synchronously(),
        "backends": {**backends.available(), "cpu": _extension.cpu_unavailable()},
        "preference": {
            device: {
                kind: _order(device, LossSpec.of(term).structure) for kind, term in _KINDS.items()
            }
            for device in backends.CANDIDATES
        },
    }


#: Calls that are alike for the choice of a backend, by a term that stands for them.
_KINDS: Final = {
    "ce, forward kd, hetero of softmax-kl with mix = probs": CrossEntropy(),
    "any other term or option": Feature(),
}


def _order(device: str, structure: tuple[int, ...]) -> dict[str, str]:
    names, reason = backends.order(device, structure)
    return {"order": " -> ".join((*names, "reference")), "reason": reason}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; `--json` for machines."""
    parser = argparse.ArgumentParser(prog="python -m heteroakd_fast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    with quiet_broken_pipe():
        options = parser.parse_args(arguments)
        try:
            report = collect()
        except ValueError as error:
            parser.error(str(error))
        if options.json:
            print(json.dumps(report, indent=2))
        else:
            _print(report)
    return 0


def _print(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name in ("backends", "preference") or (name == "cuda_note" and not value):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items()) or "-"
        print(f"{name:16} {', '.join(value) if isinstance(value, list) else value}")
    print("\nbackends")
    for name, reason in report["backends"].items():
        print(f"  {name:10} {'works' if reason is None else 'cannot: ' + reason}")
    print("\nchosen by device and call, first that can run it")
    for device, kinds in report["preference"].items():
        for kind, found in kinds.items():
            print(f"  {device:6} {found['order']} for {kind}: {found['reason']}")


if __name__ == "__main__":
    raise SystemExit(main())
