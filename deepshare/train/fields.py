"""Plain data (what TOML holds) to frozen dataclasses, by their annotations: every surprise is an error with its key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from deepshare.train.errors import RecipeError

T = TypeVar("T")


def build(cls: type[T], values: object, key: str = "") -> T:
    """An instance of the dataclass `cls` from the mapping `values`; `key` is where in the file it stands.

    Raises RecipeError: not a table, unknown key, missing key, wrong type, or a value that `cls` refuses.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{key}: wanted a table, got {_shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise RecipeError(f"{_join(key, name)}: unknown key; wanted one of {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], _join(key, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{_join(key, name)}: missing; wanted {_wanted(hints[name])}")
    try:
        return cls(**arguments)
    except RecipeError:
        raise
    except Exception as error:  # a value refused by __post_init__: its message names the field
        raise RecipeError(f"{key or 'recipe'}: {error}") from error


def plain(value: Any) -> Any:
    """The inverse of `build`: dataclasses to dicts, tuples to lists, None left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: plain(item) for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def _convert(hint: Any, value: object, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, key)
    if origin is typing.Literal:
        if value in arguments and isinstance(value, str):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    elif origin is dict:
        if isinstance(value, dict):
            return {name: _convert(arguments[1], item, _join(key, name)) for name, item in value.items()}
    elif dataclasses.is_dataclass(hint):
        return build(hint, value, key)  # type: ignore[arg-type]
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(number := _float(value)):
            return number
    elif type(value) is hint:  # not isinstance: true is no integer here
        return value
    raise RecipeError(f"{key}: wanted {_wanted(hint)}, got {_shown(value)}")


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer above 1.8e308
        return math.inf


def _convert_union(choices: tuple[Any, ...], value: object, key: str) -> Any:
    open_choices = [choice for choice in choices if choice is not type(None)]
    if len(open_choices) == 1:
        return _convert(open_choices[0], value, key)
    for choice in open_choices:
        try:
            return _convert(choice, value, key)
        except RecipeError:
            continue
    raise RecipeError(f"{key}: wanted {' or '.join(map(_wanted, open_choices))}, got {_shown(value)}")


def _wanted(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_wanted(choice) for choice in arguments if choice is not type(None))
    if origin is typing.Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if origin is tuple:
        return f"a list of {_wanted(arguments[0]).removeprefix('a ')}s"
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    return names.get(hint, "a table")


def _shown(value: object) -> str:
    kinds = {str: "the string", bool: "the boolean", int: "the integer", float: "the number", list: "the list"}
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return f"{kinds.get(type(value), 'the table')} {text if len(text) <= 60 else text[:57] + '...'}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
