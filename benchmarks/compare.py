"""Two result files side by side: what got slower or larger beyond what the samples scatter."""

from __future__ import annotations

from typing import NamedTuple

from .results import Results, Spread, ratio, spread, total_ms

__all__ = ["Change", "compare", "to_text"]

#: A change smaller than this is no news even where the samples are quiet.
SMALLEST = 0.05
SMALLEST_MEMORY = 0.05
#: A median that moved this far deserves a look even where the ranges overlap.
UNCLEAR = 0.25
MEMORY_NOISE = 4 * 2**20


class Change(NamedTuple):
    case: str
    provider: str
    what: str
    """ "ratio to eager", "time", "peak memory" or "measured at all" """
    before: float
    after: float
    verdict: str
    """ "same", "worse", "better", or "unclear": moved far, within samples that scatter further """


def compare(before: Results, after: Results) -> list[Change]:
    """Every case and provider that both files have.

    Ratios to eager are compared, because both sides of a ratio saw the same moods of the machine;
    a change counts where the two ranges do not overlap. Eager itself has no ratio; its absolute
    time is listed and never judged.
    """
    changes = []
    for key in before.cases:
        old_rows, new_rows = before.rows(key), after.rows(key)
        for name, old in old_rows.items():
            new = new_rows.get(name)
            if not old["forward_ms"] or new_rows == {}:
                continue  # nothing to lose, or a case that the other run did not have
            if new is None or not new["forward_ms"]:
                changes.append(Change(key, name, "measured at all", 1, 0, "worse"))
                continue
            if name == "eager":
                a, b = spread(total_ms(old)), spread(total_ms(new))
                if a and b:
                    changes.append(Change(key, name, "time", a.median, b.median, "same"))
                continue
            if "eager" in old_rows and "eager" in new_rows:
                a, b = ratio(old_rows["eager"], old), ratio(new_rows["eager"], new)
                if a and b:
                    changes.append(
                        Change(key, name, "ratio to eager", a.median, b.median, judge(a, b))
                    )
            x = before.data["peak_bytes"].get(key, {}).get(name)
            y = after.data["peak_bytes"].get(key, {}).get(name)
            if isinstance(x, int) and isinstance(y, int):
                changes.append(Change(key, name, "peak memory", x, y, judge_memory(x, y)))
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


def judge_memory(before: int, after: int) -> str:
    """Peaks hardly scatter; a few pages more are the allocator's."""
    allowed = max(MEMORY_NOISE, SMALLEST_MEMORY * before)
    if abs(after - before) <= allowed:
        return "same"
    return "worse" if after > before else "better"


def to_text(changes: list[Change], everything: bool = False) -> str:
    lines = []
    for change in changes:
        if change.verdict == "same" and not everything:
            continue
        lines.append(
            f"{change.verdict:7} {change.case:62} {change.provider:22} {change.what:15} "
            f"{change.before:12.4g} -> {change.after:.4g}"
        )
    judged = [change for change in changes if change.what != "time"]
    counts = {verdict: sum(change.verdict == verdict for change in judged)
              for verdict in ("same", "better", "worse", "unclear")}  # fmt: skip
    lines.append(
        f"{len(judged)} figures compared: {counts['same']} the same within noise, "
        f"{counts['better']} better, {counts['worse']} worse, {counts['unclear']} unclear "
        f"(moved by more than {UNCLEAR:.0%} in samples that scatter further: measure again)"
    )
    return "\n".join(lines)
