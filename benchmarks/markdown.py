"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; rows that are shorter than the header are filled with empty cells."""
    full = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    lines = [[_cell(text) for text in row] for row in (header, *full)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(text: str) -> str:
    """Names of cases have bars in them, messages of errors line breaks."""
    return text.replace("\n", " ").replace("|", "\\|")
