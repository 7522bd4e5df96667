"""The source of the Triton kernels: functions, and loops with their names."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Final

from .loops import Function, Place, SourceLoop, Sources


@cache
def _modules() -> dict[str, ast.Module]:
    """The kernels' source files, as they are now."""
    import heteroakd_fast.kernels as package

    paths = sorted(Path(next(iter(package.__path__))).glob("*.py"))
    return {path.name: ast.parse(path.read_text()) for path in paths}


@cache
def sources() -> Sources:
    """As the files are at the first call."""
    return Sources(_functions(), source_loops(), label_of)


def _functions() -> dict[str, list[Function]]:
    return {
        file: [
            Function(x.name, x.lineno, x.end_lineno or x.lineno)
            for x in module.body
            if isinstance(x, ast.FunctionDef)
        ]
        for file, module in _modules().items()
    }


def source_loops() -> dict[str, list[SourceLoop]]:
    """By file; inner loops last."""
    result = {}
    for file, module in _modules().items():
        found: list[SourceLoop] = []
        for function in module.body:
            if isinstance(function, ast.FunctionDef):
                _collect(function, file, function.name, False, found)
        result[file] = found
    return result


def _collect(
    node: ast.AST, file: str, function: str, nested: bool, found: list[SourceLoop]
) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.For) and "static_range" not in ast.unparse(child.iter):
            last = child.end_lineno or child.lineno
            iterable = ast.unparse(child.iter)
            found.append(SourceLoop(file, function, child.lineno, last, iterable, nested))
            _collect(child, file, function, True, found)
        else:
            _collect(child, file, function, nested, found)


#: What the loops of functions are called; others go by the function's name.
_LABELS: Final = {
    "corner_bounds": "bounds",
    "pixel_bounds": "bounds",
    "one_model": "statistics",
    "two_models": "statistics",
    "paper_sums": "statistics",
    "mixed_logits": "mixture",
    "js_sums": "js",
    "squared_difference": "feature",
    "paper_at_label": "at-label",
}


def label_of(place: Place) -> str:
    source = place.loop
    if source.function == "distillation_pass":
        return "gradients" if source.nested else "step"
    if source.function == "collect":
        return "step" if source.nested else "classes"
    return _LABELS.get(source.function, source.function)
