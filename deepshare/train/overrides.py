"""Changes to a recipe from the command line: `--set model.width=16 --set phase.*.epochs=2`."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable
from typing import Any

from deepshare.train.errors import RecipeError


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` (a recipe as TOML read it) with every `key=value` of `overrides` put in.

    The value is read as TOML (2, 0.1, true, [1, 2]), else taken as a string. In a list of tables (phase) the part
    of the key after its name is the kind of the phase (`phase.gelu.lr`), its position (`phase.0.lr`), or `*`.
    Whether the key exists and the type is right is checked afterwards, as for the file itself.

    Raises RecipeError: no `=`, or a part of the key that leads nowhere.
    """
    changed = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(f"override {override!r}: wanted key=value, such as model.width=16")
        _put(changed, parts, _value(text.strip()), override)
    return changed


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(node: Any, parts: list[str], value: Any, override: str) -> None:
    head, *rest = parts
    if isinstance(node, list):
        for item in _chosen(node, head, override):
            if not rest:
                raise RecipeError(f"override {override!r}: names a whole table; wanted a key inside it")
            _put(item, rest, value, override)
    elif not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: nothing below {head!r} in the recipe")
    elif rest:
        _put(node.setdefault(head, {}), rest, value, override)
    else:
        node[head] = value


def _chosen(tables: list[Any], which: str, override: str) -> list[Any]:
    if which == "*":
        return tables
    if which.isdecimal() and int(which) < len(tables):
        return [tables[int(which)]]
    named = [table for table in tables if isinstance(table, dict) and table.get("kind") == which]
    if not named:
        kinds = ", ".join(str(table.get("kind")) for table in tables if isinstance(table, dict))
        raise RecipeError(f"override {override!r}: no phase {which!r}; wanted *, a position, or one of {kinds}")
    return named
