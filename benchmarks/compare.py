"""Two result files side by side: what got slower or larger beyond what the samples scatter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .providers import EAGER
from .results import Row, Spread, by_provider, ratio

__all__ = ["Change", "compare", "judge", "to_text"]

#: A change smaller than this is no news even where the samples are quiet.
SMALLEST = 0.05
#: A median that moved this far deserves a look even where the ranges overlap.
UNCLEAR = 0.25
MEMORY_NOISE_MIB = 4.0


class Change(NamedTuple):
    case: str
    provider: str
    what: str
    """ "ratio to eager", "time", "peak memory" or "measured at all" """
    before: float
    after: float
    verdict: str
    """ "same", "worse", "better", or "unclear": moved far, within samples that scatter further """


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Every case and provider that both files have.

    Ratios to eager are compared, because both sides of a ratio saw the same moods of the machine;
    a change counts where the two ranges do not overlap. Eager itself has no ratio; its absolute
    time is listed and never judged.
    """
    changes = []
    for case in dict.fromkeys(row.case for row in before):
        old_rows, new_rows = by_provider(before, case), by_provider(after, case)
        for name, old in old_rows.items():
            new = new_rows.get(name)
            if old.total is None or not new_rows:
                continue  # nothing to lose, or a case that the other run did not have
            if new is None or new.total is None:
                changes.append(Change(case.key, name, "measured at all", 1, 0, "worse"))
                continue
            if name == EAGER:
                times = old.total.median, new.total.median
                changes.append(Change(case.key, name, "time", *times, "same"))
                continue
            a, b = ratio(old_rows.get(EAGER), old), ratio(new_rows.get(EAGER), new)
            if a and b:
                found = judge(a, b)
                changes.append(Change(case.key, name, "ratio to eager", a.median, b.median, found))
            if old.peak_mib is not None and new.peak_mib is not None:
                peaks = old.peak_mib, new.peak_mib
                changes.append(Change(case.key, name, "peak memory", *peaks, judge_memory(*peaks)))
    return sorted(changes)


def judge(before: Spread, after: Spread) -> str:
    """Of ratios: larger is better."""
    if abs(after.median / before.median - 1.0) <= SMALLEST:
        return "same"
    if after.high < before.low:
        return "worse"
    if after.low > before.high:
        return "better"
    moved = max(after.median / before.median, before.median / after.median)
    return "unclear" if moved > 1.0 + UNCLEAR else "same"


def judge_memory(before: float, after: float) -> str:
    """Peaks hardly scatter; a few pages more are the allocator's."""
    if abs(after - before) <= max(MEMORY_NOISE_MIB, SMALLEST * before):
        return "same"
    return "worse" if after > before else "better"


def to_text(changes: Sequence[Change], everything: bool = False) -> str:
    """What changed, or everything, a line each, and the counts of the verdicts."""
    lines = [
        f"{change.verdict:7} {change.case:62} {change.provider:22} {change.what:15} "
        f"{change.before:12.4g} -> {change.after:.4g}"
        for change in changes
        if change.verdict != "same" or everything
    ]
    counts = Counter(change.verdict for change in changes if change.what != "time")
    lines.append(
        f"{counts.total()} figures compared: {counts['same']} the same within noise, "
        f"{counts['better']} better, {counts['worse']} worse, {counts['unclear']} unclear "
        f"(moved by more than {UNCLEAR:.0%} in samples that scatter further: measure again)"
    )
    return "\n".join(lines)
