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
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_origin

import tyro
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .config import Config
from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Every command stands on this one where it names no data of its own.
DEFAULT_RECIPE = "landcover"


def embedded_recipes() -> dict[str, str]:
    """The recipes that come with the package: their texts by name."""
    folder = resources.files(__package__) / "recipes"
    files = sorted((file for file in folder.iterdir()), key=lambda file: file.name)
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in files
        if file.name.endswith(".toml")
    }


def load_config(*sources: str | Path) -> Config:
    """Read TOML files or embedded recipes, the later ones on top of the earlier; validate them.

    Recipes alone that name no data stand on the embedded land-cover example; a file of the user's
    own does not, or a forgotten table would go unnoticed.
    """
    table, name, folder = _load_tables([str(source) for source in sources])
    table.setdefault("run", folder)
    return _validate(table, name)


def _load_tables(sources: list[str]) -> tuple[dict[str, Any], str, str]:
    """The merged tables, how messages call them, and the folder of a run that names none."""
    recipes = embedded_recipes()
    tables = [(source, _load_table(source, recipes)) for source in sources]
    own_files = any(source not in recipes or Path(source).is_file() for source in sources)
    if not own_files and not any("data" in table for _, table in tables):
        tables.insert(0, (DEFAULT_RECIPE, _load_table(DEFAULT_RECIPE, recipes)))
    merged: dict[str, Any] = {}
    for _, table in tables:
        for role in ("teacher", "student"):
            # Another architecture: the arguments, weights and tap of the one before do not fit it.
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
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(source, recipes, n=1)
        raise ConfigError(
            f"{path}: no such file; expected a TOML configuration or one of the recipes "
            f"{', '.join(recipes)}" + (f"; did you mean {near[0]}?" if near else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    return _parse_toml(text, source)


def parse_config(text: str, name: str) -> Config:
    """Validate TOML text that is complete by itself; `name` is how messages call it."""
    return _validate(_parse_toml(text, name), name)


def _parse_toml(text: str, name: str) -> dict[str, Any]:
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: malformed TOML: {error}") from None
    return table


def _validate(table: dict[str, Any], name: str) -> Config:
    try:
        return Config.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(describe(error, name)) from None


def describe(error: ValidationError, name: str) -> str:
    """One line per problem: file, key, what came, what is expected."""
    return "\n".join(f"{name}: {_describe_one(e)}" for e in error.errors(include_url=False))


def _describe_one(item: Any) -> str:
    loc = tuple(item["loc"])
    key = ".".join(str(part) for part in loc)
    kind = item["type"]
    if kind == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
        return f"{key}: unknown key (value {item['input']!r}); {hint}"
    if kind == "missing":
        return f"{key}: missing; expected {_expectation(loc)}"
    if kind == "finite_number":
        return f"{key}: got {item['input']!r}; expected: a finite number"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return f"{key}: {message}" if not message.startswith(key) else message
    came = f"{item['input']!r} ({type(item['input']).__name__})"
    return f"{key}: got {came}; expected: {item['msg'][0].lower()}{item['msg'][1:]}"


def _table_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    table: type[BaseModel] = Config
    for part in loc:
        field = table.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return None
        table = field.annotation
    return table


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    table = _table_at(loc)
    return list(table.model_fields) if table else []


def _expectation(loc: tuple[Any, ...]) -> str:
    if table := _table_at(loc):
        required = [name for name, field in table.model_fields.items() if field.is_required()]
        return f"a table [{'.'.join(map(str, loc))}] with at least {', '.join(required)}"
    table = _table_at(loc[:-1])
    field = table.model_fields.get(str(loc[-1])) if table else None
    return (field.description if field and field.description else "a value").rstrip(".")


_Switch = tyro.conf.FlagCreatePairsOff[bool]


@dataclasses.dataclass(frozen=True)
class _Front:
    """Train a teacher, a student alone, and the same student distilled; compare them.

    Rerunning the same command resumes an interrupted run and skips what is finished.
    Keys of the TOML file are options with dashes for underscores, but for `kwargs` of networks."""

    config: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[RECIPE|FILE.toml ...]"),
    ] = ()
    """Recipes (--list-recipes) and configuration files, the later ones on top; recipes without data
    stand on the embedded land-cover example."""
    resume_anyway: _Switch = False
    """Go on with a run although its configuration changed."""
    print_config: _Switch = False
    """Print the files and recipes named here as one, and exit."""
    list_recipes: _Switch = False
    """List the embedded recipes and exit."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: Config
    front: _Front
    run_named: bool
    """Whether somebody chose the run's folder; otherwise it has the recipes' names."""


def parse_command_line(argv: list[str]) -> Options:
    """Read the files and recipes named on the command line, then put the overrides on top."""
    table, name, folder = _load_tables([])
    parsed, mirror = _parse(argv, table)
    if parsed.config:
        table, name, folder = _load_tables(list(parsed.config))
        parsed, mirror = _parse(argv, table)
    # Only what the command line changed: what is missing or wrong in a file stays so, and the
    # message about it can say that.
    overrides = _changes(dataclasses.asdict(parsed), dataclasses.asdict(mirror()))
    for option in dataclasses.fields(_Front):
        overrides.pop(option.name, None)
    _merge(table, overrides)
    named = "run" in table
    table.setdefault("run", folder)
    config = _validate(table, f"{name} with the command line" if overrides else name)
    return Options(config, parsed, named)


def _changes(given: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict):
            if inner := _changes(value, default[key]):
                changed[key] = inner
        elif value != default[key]:
            changed[key] = value
    return changed


def _parse(argv: list[str], table: dict[str, Any]) -> tuple[Any, type[Any]]:
    """Let tyro read the command line into plain dataclasses; also returns their class.

    They mirror the tables with the values of `table` as defaults, and without their checks: those
    run once, on the merged configuration, and can then name the full key.
    """
    mirror = _mirror(Config, table, _Front)
    return tyro.cli(mirror, prog="heteroakd-train", args=argv), mirror


def _mirror(model: type[BaseModel], table: Any, base: type[Any] | None = None) -> type[Any]:
    fields: list[Any] = []
    for name, info in model.model_fields.items():
        value = table.get(name) if isinstance(table, dict) else None
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            inner = _mirror(info.annotation, value)
            fields.append((name, inner, dataclasses.field(default_factory=inner)))
        elif get_origin(info.annotation) is not dict:  # free-form tables are for the file only
            # `| None`: what has no default may be in no file either, until all is put together.
            annotation: Any = info.annotation
            if info.is_required():
                annotation = annotation | None
            described = Annotated[annotation, tyro.conf.arg(help=info.description)]
            fields.append((name, described, _default(info, value)))
    bases = (base,) if base else ()
    mirror = dataclasses.make_dataclass(model.__name__, fields, bases=bases, frozen=True)
    mirror.__doc__ = (base or model).__doc__
    return mirror


def _default(info: FieldInfo, value: Any) -> Any:
    """What the file says, where it can be used; its complaint comes with the whole table."""
    if value is not None:
        annotation: Any = info.annotation
        try:
            return TypeAdapter(annotation).validate_json(
                json.dumps(value, default=str), strict=True
            )
        except ValidationError:
            pass
    return None if info.is_required() else info.get_default(call_default_factory=True)


def _merge(table: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def as_toml(config: Config, with_run: bool = True) -> str:
    """The whole configuration as a TOML file, each key with its description; the folder of the
    run only if asked, so that the file can get one of its own."""
    lines: list[str] = []
    _write_table(config, "", lines)
    if not with_run:
        lines[0] = "# " + lines[0]
    return "\n".join(lines) + "\n"


def _write_table(table: BaseModel, prefix: str, lines: list[str]) -> None:
    inner: list[tuple[str, BaseModel]] = []
    for name, info in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, BaseModel):
            inner.append((name, value))
        elif isinstance(value, dict):
            if value:
                lines.append(f"{name} = {_toml(value)}")
        else:
            text = f"# {name} =" if value is None else f"{name} = {_toml(value)}"
            lines.append(f"{text:<28}  # {info.description}")
    for name, value in inner:
        lines.extend(["", f"[{prefix}{name}]"])
        _write_table(value, f"{prefix}{name}.", lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        items = (f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Strings, booleans and numbers are written as in JSON, which escapes two things otherwise.
    text = json.dumps(
        value if isinstance(value, (bool, int, float)) else str(value), ensure_ascii=False
    )
    return text.replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml(key)
