"""How a configuration is read: recipes, TOML files and the command line, put on top of each other.

Validation goes through JSON in pydantic's strict mode: a TOML string where a number
belongs is then an error and not silently converted, while lists still become tuples
and strings still become paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from contextlib import suppress
from functools import reduce
from importlib import resources
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, get_origin

import tyro
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .config import Config
from .errors import ConfigError
from .files import check_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Every command stands on this one where it names no data of its own.
DEFAULT_RECIPE = "landcover"
_ROLES = ("teacher", "student")
# What belongs to one architecture, and not to another that a command line puts in its place.
_OF_ARCH = ("kwargs", "tap", "weights", "init", "output", "mean", "std")


def embedded_recipes() -> dict[str, str]:
    """The recipes that come with the package: their texts by name."""
    files = (file for file in resources.files(__package__).joinpath("recipes").iterdir())
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".toml")
    }


def load_config(*sources: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read TOML files or embedded recipes, the later ones on top of the earlier, and `overrides`
    on top of all; validate them.

    Recipes alone that name no data stand on the embedded land-cover example; a file of the user's
    own does not, or a forgotten table would go unnoticed.
    """
    table, name, folder = _load_tables([str(source) for source in sources])
    table = {"run": folder, **table}
    _merge(table, overrides or {})
    return _validate(table, name)


def parse_config(text: str, name: str) -> Config:
    """Validate TOML text that is complete by itself; `name` is how messages call it."""
    return _validate(_parse_toml(text, name), name)


def _load_tables(sources: list[str]) -> tuple[dict[str, Any], str, str]:
    """The merged tables, how messages call them, and the folder of a run that names none."""
    recipes = embedded_recipes()
    tables = [(source, _load_table(source, recipes)) for source in sources]
    own_files = any(source not in recipes or Path(source).is_file() for source in sources)
    if not own_files and not any("data" in table for _, table in tables):
        tables.insert(0, (DEFAULT_RECIPE, _load_table(DEFAULT_RECIPE, recipes)))
    merged: dict[str, Any] = {}
    for _, table in tables:
        for role in _ROLES:
            # Another network: steps and rates of the one before are no better than its weights.
            if isinstance(table.get(role), dict) and "arch" in table[role]:
                merged.pop(role, None)
        _merge(merged, table)
    names = [Path(source).stem for source, _ in tables]
    return merged, " + ".join(source for source, _ in tables), "runs/" + "-".join(names)


def _load_table(source: str, recipes: dict[str, str]) -> dict[str, Any]:
    path = Path(source)
    if source in recipes and not path.is_file():
        return _parse_toml(recipes[source], source)
    try:
        check_regular(path, ConfigError)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(source, recipes, n=1)
        raise ConfigError(
            f"{path}: no such file; expected a TOML configuration or one of the recipes "
            f"{', '.join(recipes)}" + (f"; did you mean {near[0]}?" if near else "")
        ) from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or NUL in the name
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    return _parse_toml(text, source)


def _parse_toml(text: str, name: str) -> dict[str, Any]:
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise ConfigError(f"{name}: malformed TOML: {error}") from None
    return table


def _merge(table: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _validate(table: dict[str, Any], name: str, draft: bool = False) -> Config:
    """`draft`: keys that a data set needs may still be missing."""
    try:
        text = json.dumps(table, default=str)
        return Config.model_validate_json(text, strict=True, context={"draft": draft})
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{name}: {line}" for line in _problems(error, table))
        ) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting that JSON cannot have
        raise ConfigError(f"{name}: cannot be used: {error}") from None


def _problems(error: ValidationError, table: dict[str, Any]) -> list[str]:
    """Key, what came and what was expected, a line for each key."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        # Beyond the key itself pydantic names the element, or one of the types it may have.
        path = item["loc"]
        depth = next((n for n in range(1, len(path)) if not _at(path[:n])[1]), len(path))
        found.setdefault(path[:depth], []).append(item)
    return [_describe(path, items, table) for path, items in found.items()]


def _describe(path: tuple[Any, ...], items: list[Any], table: dict[str, Any]) -> str:
    field, inner = _at(path)
    # Of the types that a key may have, one may say more than that it is another.
    item = next((item for item in items if item["type"] == "value_error"), items[0])
    key, kind, came = ".".join(map(str, item["loc"])), item["type"], item["input"]
    about = field.description.rstrip(".") if field and field.description else "a value"
    if len(items) > 1 and kind != "value_error":
        return f"{'.'.join(path)}: got {reduce(getitem, path, table)!r}; expected: {about}"
    if kind == "extra_forbidden":
        known = list(_at(path[:-1])[1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
        return f"{key}: unknown key (value {came!r}); {hint}"
    if kind == "missing":
        required = [name for name, field in inner.items() if field.is_required()]
        if inner:
            about = f"a table [{key}] with at least {', '.join(required)}"
        return f"{key}: missing; expected {about}"
    if kind == "json_invalid":
        return "holds text that is not Unicode (bytes of a file name that are not UTF-8)"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        key = ".".join(map(str, path)) if len(items) > 1 else key
        return message if message.startswith(key) else f"{key}: {message}"
    expected = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{key}: got {came!r} ({type(came).__name__}); expected: {expected}"


def _at(path: tuple[Any, ...]) -> tuple[FieldInfo | None, dict[str, FieldInfo]]:
    """What is known of a key, and the keys in it where it is a table."""
    field, inner = None, Config.model_fields
    for part in path:
        field = inner.get(str(part))
        inner = _inner(field.annotation) if field else {}
    return field, inner


def _inner(hint: Any) -> dict[str, FieldInfo]:
    is_table = isinstance(hint, type) and issubclass(hint, BaseModel)
    return hint.model_fields if is_table else {}


def as_toml(config: Config, with_run: bool = True) -> str:
    """The whole configuration as a TOML file, each key with its description; the folder of the
    run only if asked, so that the file can get one of its own."""
    text = "\n".join(_lines(config, "")) + "\n"
    return text if with_run else f"# {text}"


def _lines(table: BaseModel, prefix: str) -> list[str]:
    keys, tables = [], []
    for name, info in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, BaseModel):
            tables += ["", f"[{prefix}{name}]", *_lines(value, f"{prefix}{name}.")]
        elif value != {}:
            text = f"# {name} =" if value is None else f"{name} = {_toml(value)}"
            keys.append(f"{text:<28}  # {info.description}")
    return keys + tables


def _toml(value: Any) -> str:
    """A value in one line. Written here because tomli-w has no comments and breaks nested tables
    out of the line, and tomlkit, which has both, would be a dependency for these few lines."""
    if isinstance(value, dict):
        names = (key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml(key) for key in value)
        items = (
            f"{name} = {_toml(item)}" for name, item in zip(names, value.values(), strict=True)
        )
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Strings, booleans and numbers are written as in JSON, which escapes two things otherwise.
    plain = value if isinstance(value, bool | int | float) else str(value)
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_table(words: list[str]) -> dict[str, Any]:
    for read, form in ((json.loads, '{{"kwargs": {}}}'), (tomllib.loads, "kwargs = {}")):
        with suppress(ValueError, RecursionError):
            table = read(form.format(words[0]))
            if table.keys() == {"kwargs"} and isinstance(table["kwargs"], dict):
                return table["kwargs"]
    raise ValueError(f'got {words[0]!r}, expected JSON or TOML, such as {{"width": 16}}')


_TABLE = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="TABLE",
    instance_from_str=_read_table,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [_toml(value)],
)


def _keys(model: type[BaseModel]) -> Any:
    """The keys of a table, for tyro: a TypedDict, of which it fills in those that were given.

    tyro reads pydantic's models as well, but builds and checks them one by one, with every default
    filled in: what the command line changes on top of which file could not be told, a key that
    only the file lacks would be demanded of the command line, and errors would name neither file
    nor table.
    """
    hints: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        hint: Any = info.annotation
        if _inner(hint):
            hints[name] = _keys(hint)
            continue
        if get_origin(hint) is dict:
            hint = Annotated[hint, _TABLE]
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        shown = f"(default: {'none' if default is None else _toml(default)})"
        arg = tyro.conf.arg(help=info.description, help_behavior_hint=shown)
        hints[name] = Annotated[hint, arg]
    keys = TypedDict(model.__name__, hints, total=False)  # type: ignore[misc]
    keys.__doc__ = model.__doc__
    return keys


_KEYS = _keys(Config)
_Switch = tyro.conf.FlagCreatePairsOff[bool]
_Sources = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[RECIPE|FILE.toml ...]")]


@dataclasses.dataclass(frozen=True)
class _CommandLine:
    """Train a teacher, a student alone, and the same student distilled; compare them.

    Rerunning the same command resumes an interrupted run and skips what is finished.
    Keys of the TOML file are options with dashes for underscores.
    `heteroakd-train check ...` only reads the data; `heteroakd-train predict --help` uses a run."""

    keys: Annotated[_KEYS, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    config: tyro.conf.Positional[_Sources] = ()
    """Recipes (--list-recipes) and configuration files, the later ones on top; recipes without data
    stand on the embedded land-cover example."""
    resume_anyway: _Switch = False
    """Go on with a run although its configuration changed."""
    print_config: _Switch = False
    """Print the files and recipes named here as one, and exit."""
    list_recipes: _Switch = False
    """List the embedded recipes and exit."""


class Options(NamedTuple):
    """What the command line asks for."""

    config: Config
    front: _CommandLine
    run_named: bool
    """Whether somebody chose the run's folder; otherwise it has the recipes' names."""


def parse_command_line(argv: list[str]) -> Options:
    """Read the files and recipes named on the command line, then put the overrides on top."""
    given = tyro.cli(_CommandLine, prog="heteroakd-train", args=argv)
    keys: dict[str, Any] = given.keys
    overrides = {key: value for key, value in keys.items() if value != {}}
    table, name, folder = _load_tables(list(given.config))
    for role in _ROLES:
        if "arch" in overrides.get(role, {}) and isinstance(table.get(role), dict):
            table[role] = {k: v for k, v in table[role].items() if k not in _OF_ARCH}
    _merge(table, overrides)
    named = "run" in table
    table.setdefault("run", folder)
    name += " with the command line" if overrides else ""
    config = _validate(table, name, draft=given.print_config or given.list_recipes)
    return Options(config, given, named)
