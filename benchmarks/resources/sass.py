"""Reads machine code: what `nvdisasm -c -gi` prints, as instructions with their source lines."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

#: (file, line), the innermost call first
Frames = tuple[tuple[str, int], ...]


class Instruction(NamedTuple):
    opcode: str
    """with its modifiers: LDG.E.64"""
    conditional: bool
    """under a predicate, or a branch that takes one"""
    label: str | None
    """where a branch goes"""
    frames: Frames

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]


_LINE = re.compile(r'//## File "([^"]*)", line (\d+)( inlined at)?')
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_CODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\(([^)]*)\)")


def parse_sass(
    text: str, name: Callable[[str], str] = os.path.basename
) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the labels between them; of `nvdisasm -c -gi`. `name` is given the
    path of a source file and says what the file is called from here on."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    frames: list[tuple[str, int]] = []
    complete = True  # the chain of calls that stands above the next instruction
    for line in text.splitlines():
        if found := _LINE.search(line):
            if complete:
                frames = []
            frames.append((name(found[1]), int(found[2])))
            complete = found[3] is None
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _CODE.match(line):
            predicate, opcode, operands = found.groups()
            target = _TARGET.search(operands)
            instructions.append(
                Instruction(
                    opcode,
                    predicate is not None or bool(re.match(r"!?U?P\d", operands)),
                    target[1] if target else None,
                    tuple(frames),
                )
            )
    return instructions, labels
