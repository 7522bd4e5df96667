"""Export a trained student: what comes out needs torch (or an ONNX runtime), and not this package.

    python examples/export_student.py runs/landcover student.pt2 --size 128 128

The program takes any number of uint8 RGB images of one size, [B, 3, H, W], and returns the logits
of the network, [B, C, h, w], which are compared with those before the export. Where onnx and
onnxscript are installed, student.onnx is written, too. Trains nothing; seconds on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from heteroakd_fast.integrations import logits_of
from heteroakd_fast.train import Student, load_student


class Exported(nn.Module):
    """The network with the normalization in front, and a plain tensor behind."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        for name in ("mean", "std"):
            values = torch.tensor(getattr(student.config.data, name))
            self.register_buffer(name, values.view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model((images / 255.0 - self.mean) / self.std))


def main(arguments: list[str] | None = None) -> torch.export.ExportedProgram:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="folder of a run, or a weights file that one wrote")
    parser.add_argument("output", type=Path, help="such as student.pt2")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    options = parser.parse_args(arguments)

    student = load_student(options.run)
    network = Exported(student).eval()
    generator = torch.Generator().manual_seed(0)
    # Three: export takes a batch of one for a constant.
    images = torch.randint(0, 256, (3, 3, *options.size), dtype=torch.uint8, generator=generator)
    batch = {"images": {0: torch.export.Dim.AUTO}}
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=batch)
        torch.export.save(program, options.output)
        loaded = torch.export.load(options.output).module()
        for count in (1, 3):
            torch.testing.assert_close(loaded(images[:count]), network(images[:count]))
    print(f"{options.output}: gives the logits of {student.path}")

    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        file = options.output.with_suffix(".onnx")
        torch.onnx.export(program, f=file)
        print(file)
    return program


if __name__ == "__main__":
    main()
