"""Finds functions and loops in C++ by their lines: what line information has to be read with.

No parser: comments, strings and the preprocessor are blanked out, braces are matched, and at
namespace or class scope a brace behind something like `name(...)` opens a function. Templates,
lambdas and `if constexpr` need no more. What it cannot see is a loop that a macro writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Final, NamedTuple

from .loops import Function, SourceLoop


class Text(NamedTuple):
    """The functions and loops of one file; inner ones last."""

    functions: list[Function]
    loops: list[SourceLoop]


class _Span(NamedTuple):
    name: str
    """of a function; of a loop, what it runs over"""
    start: int
    end: int


def read(source: str, file: str) -> Text:
    """`file`: what it is called in line information."""
    text, ends = _blanked(source)
    functions = list(_functions(text, ends, 0, len(text), ""))
    found: list[SourceLoop] = []
    around: list[tuple[int, str]] = []  # ends and functions of the rolled loops that are open
    for loop in _loops(text, ends):
        function = next((x.name for x in functions if x.start <= loop.start < x.end), file)
        around = [x for x in around if loop.start < x[0]]
        # pragmas are of the statement behind them: nothing ends in between
        before = max(text.rfind(mark, 0, loop.start) for mark in ";{})")
        unrolled = _UNROLL.search(source, before + 1, loop.start) is not None
        factor = _FACTOR.search(source, before + 1, loop.start)
        nested = any(name == function for _, name in around)
        lines = _line(text, loop.start), _line(text, loop.end)
        found.append(
            SourceLoop(
                file, function, *lines, loop.name, nested, unrolled, int(factor[1]) if factor else 1
            )
        )
        if not unrolled:
            around.append((loop.end, function))
    named = [Function(x.name, _line(text, x.start), _line(text, x.end)) for x in functions]
    return Text(named, found)


#: A loop behind `#pragma unroll` is not expected in machine code; with a factor it is.
_UNROLL: Final = re.compile(r'#\s*pragma\s+unroll\s*$|_Pragma\("unroll"\)|\w+_UNROLL\b', re.M)
_FACTOR: Final = re.compile(r"#\s*pragma\s+unroll\s+(\d+)\s*$", re.M)
_PREPROCESSOR: Final = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)
_COMMENT: Final = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|(?<!\w)'(?:[^'\\\n]|\\.)+'""", re.DOTALL
)


def _blank(found: re.Match[str]) -> str:
    """Spaces, and the line ends that were there."""
    return re.sub(r"[^\n]", " ", found[0])


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _matching(text: str) -> dict[int, int]:
    """Where each bracket is closed."""
    ends: dict[int, int] = {}
    waiting: list[int] = []
    for found in re.finditer(r"[(){}\[\]]", text):
        if found[0] in "({[":
            waiting.append(found.start())
        elif waiting:
            ends[waiting.pop()] = found.start()
    return ends


def extent(source: str, function: Function, begin: str, end: str = "") -> tuple[int, int] | None:
    """The lines of a statement or block of a function, whose first line has the text `begin`; up to
    that of the first line from there on that has the text `end`. Of `if {} else {}` one block."""
    lines = source.splitlines()
    text, ends = _blanked(source)
    first = _line_with(lines, begin, function.first, function.last)
    last = _line_with(lines, end or begin, first, function.last) if first else None
    if not first or not last:
        return None
    offset = sum(len(x) + 1 for x in lines[: last - 1])
    line = text[offset : offset + len(lines[last - 1])]
    if line.rstrip().endswith("{"):
        return first, _line(text, ends[offset + line.rindex("{")])
    offset += len(line) - len(line.lstrip())
    return first, _line(text, _statement_end(text, ends, offset))


@cache
def _blanked(source: str) -> tuple[str, dict[int, int]]:
    text = _PREPROCESSOR.sub(_blank, _COMMENT.sub(_blank, source))
    return text, _matching(text)


def _line_with(lines: list[str], text: str, first: int, last: int) -> int | None:
    return next((n for n in range(first, last + 1) if text in lines[n - 1]), None)


# --- functions ----------------------------------------------------------------------------------

_SCOPE: Final = re.compile(r"\b(namespace|struct|class|union|enum|extern)\b")
_CLASS: Final = re.compile(r"\b(?:struct|class|union)\s+(?:[A-Z_]+\s+)?(\w+)")
_NAME: Final = re.compile(r"((?:\w+(?:<[^<>]*>)?::)*~?\w+|operator\s*\(\s*\))\s*\(")
_NO_NAMES: Final = frozenset(
    [
        "if",
        "for",
        "while",
        "switch",
        "catch",
        "sizeof",
        "alignof",
        "alignas",
        "decltype",
        "noexcept",
        "explicit",
        "requires",
        "operator",
        "__launch_bounds__",
        "__attribute__",
        "__align__",
        "__declspec",
        "__cluster_dims__",
    ]
)


def _functions(
    text: str, ends: Mapping[int, int], start: int, stop: int, within: str
) -> Iterator[_Span]:
    """Of one namespace or class; a function's inside is not looked at."""
    begin = at = start  # the statement that is being read
    while at < stop:
        mark = text[at]
        if mark == ";":
            begin = at + 1
        elif mark in "([":
            at = ends.get(at, at)
        elif mark == "{":
            end = ends.get(at, stop)
            head = text[begin:at]
            name = _function_name(head)
            if name is not None:
                yield _Span(within + name, begin + len(head) - len(head.lstrip()), end)
            elif _SCOPE.search(head):
                owner = _CLASS.search(_without_angles(head))
                inside = f"{within}{owner[1]}::" if owner else within
                yield from _functions(text, ends, at + 1, end, inside)
            at = end
            begin = end + 1
        at += 1


def _function_name(head: str) -> str | None:
    """Of what stands before a brace; None where it opens something else. A macro in capitals may
    have arguments of its own."""
    head = _behind_template(head)
    at = 0
    macro = None
    while found := _NAME.search(head, at):
        name = re.sub(r"\s+|<[^<>]*>", "", found[1])
        if "=" in _without_angles(head[: found.start()]):
            return macro  # an initializer
        if name not in _NO_NAMES and not name.isupper():
            return name
        macro = name if name.isupper() else macro
        at = _behind(head, found.end() - 1)
    return macro


def _behind_template(head: str) -> str:
    """What follows `template <...>`, whose defaults look like calls."""
    while opening := re.match(r"\s*template\s*<", head):
        depth, at = 1, opening.end()
        while depth > 0 and at < len(head):
            depth += {"<": 1, ">": -1}.get(head[at], 0)
            at = _behind(head, at) if head[at] == "(" else at + 1
        head = head[at:]
    return head


def _without_angles(text: str) -> str:
    """Without template parameters, and the words in them."""
    while (less := re.sub(r"<[^<>]*>", "", text)) != text:
        text = less
    return text


def _behind(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return len(text)


# --- loops --------------------------------------------------------------------------------------

_LOOP: Final = re.compile(r"\b(for|while|do)\b")
_WORD: Final = re.compile(r"(?:if(?:\s+constexpr)?|for|while|switch|else|do)\b")


def _loops(text: str, ends: Mapping[int, int]) -> Iterator[_Span]:
    """In the order of their heads."""
    tails = set[int]()  # the `while` that closes a `do`
    for found in _LOOP.finditer(text):
        at = found.start()
        if at in tails:
            continue
        if found[1] == "do":
            tail = _statement_end(text, ends, found.end()) + 1
            tail += len(text[tail:]) - len(text[tail:].lstrip())
            tails.add(tail)
            yield _Span("do", at, _statement_end(text, ends, tail))
        elif opening := re.compile(r"\s*\(").match(text, found.end()):
            closing = ends.get(opening.end() - 1, len(text))
            head = " ".join(text[opening.end() : closing].split())
            yield _Span(head, at, _statement_end(text, ends, closing + 1))


def _statement_end(text: str, ends: Mapping[int, int], at: int) -> int:
    """The last character of the statement that begins here: `;` or `}`."""
    while at < len(text) and text[at].isspace():
        at += 1
    if at < len(text) and text[at] == "{":
        return ends.get(at, len(text) - 1)
    if word := _WORD.match(text, at):
        at = word.end()
        if opening := re.compile(r"\s*\(").match(text, at):
            at = ends.get(opening.end() - 1, at) + 1
        if text[at:].lstrip()[:1] == ";":  # `while (...);` behind `do`
            return text.index(";", at)
        end = _statement_end(text, ends, at)
        other = re.compile(r"\s*else\b").match(text, end + 1)
        return _statement_end(text, ends, other.end()) if other else end
    while at < len(text) and text[at] != ";":
        at = ends.get(at, at) + 1
    return min(at, len(text) - 1)
