"""Loops of machine code, from its branches alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .sass import Instruction


def _successors(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[list[int]]:
    """The instructions that may follow each one. Calls return to the next one."""
    following = []
    for at, instruction in enumerate(instructions):
        after = [at + 1] if at + 1 < len(instructions) else []
        if instruction.kind in ("EXIT", "RET") and not instruction.conditional:
            after = []
        elif instruction.kind == "BRA" and (label := instruction.label) and label in labels:
            target = labels[label]
            after = [target, *after] if instruction.conditional else [target]
        following.append([x for x in after if x < len(instructions)])
    return following


@dataclass(eq=False)
class Loop:
    """A natural loop of the control flow."""

    body: frozenset[int]
    """instructions, those of inner loops included"""
    closing: frozenset[int]
    """branches back to the first instruction"""
    parent: Loop | None = None
    inner: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> frozenset[int]:
        return self.body.difference(*(loop.body for loop in self.inner))


def loops_of(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Loop]:
    """All loops, in the order of their first instruction, with their nesting."""
    starts, successors = _blocks(instructions, labels)
    dominators = _dominators(successors)
    predecessors = defaultdict(list)
    for block, after in successors.items():
        for x in after:
            predecessors[x].append(block)
    bodies: dict[int, set[int]] = {}
    closing: dict[int, list[int]] = defaultdict(list)
    for block, after in successors.items():
        for head in after:
            if head in dominators.get(block, ()):
                body = bodies.setdefault(head, {head})
                closing[head].append(block)
                waiting = [block]
                while waiting:
                    x = waiting.pop()
                    if x not in body:
                        body.add(x)
                        waiting.extend(predecessors[x])
    ends = dict(zip(starts, [*starts[1:], len(instructions)], strict=True))
    loops = [
        Loop(
            frozenset(i for block in body for i in range(block, ends[block])),
            frozenset(ends[block] - 1 for block in closing[head]),
        )
        for head, body in bodies.items()
    ]
    # the trap behind a kernel's last instruction jumps to itself
    loops = sorted((x for x in loops if len(x.body) > 1), key=lambda x: min(x.body))
    for loop in loops:
        around = [x for x in loops if x is not loop and loop.body < x.body]
        if around:
            loop.parent = min(around, key=lambda x: len(x.body))
            loop.parent.inner.append(loop)
    return loops


def _blocks(
    instructions: Sequence[Instruction], labels: Mapping[str, int]
) -> tuple[list[int], dict[int, list[int]]]:
    """First instructions of basic blocks, and which block may follow which."""
    following = _successors(instructions, labels)
    begins = {0, *(x for x in labels.values() if x < len(instructions))}
    for at, after in enumerate(following):
        if after != [at + 1] and at + 1 < len(instructions):
            begins.add(at + 1)
    starts = sorted(begins)
    last = dict(zip(starts, [x - 1 for x in starts[1:]] + [len(instructions) - 1], strict=True))
    return starts, {block: following[last[block]] for block in starts}


def _dominators(successors: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """Blocks that every way from the entry to a block goes through; of reachable blocks."""
    order: list[int] = []
    seen: set[int] = set()
    waiting = [(0, iter(successors[0]))]
    seen.add(0)
    while waiting:
        block, after = waiting[-1]
        step = next((x for x in after if x not in seen), None)
        if step is None:
            order.append(block)
            waiting.pop()
        else:
            seen.add(step)
            waiting.append((step, iter(successors[step])))
    order.reverse()
    before = defaultdict(list)
    for block in order:
        for x in successors[block]:
            before[x].append(block)
    result: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [result[x] for x in before[block] if x in result]
            new = set.intersection(*known) | {block}
            if result.get(block) != new:
                result[block] = new
                changed = True
    return result
