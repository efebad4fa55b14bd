"""The few kinds of TOML that a recipe needs, written out (the standard library only reads TOML)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def to_toml(values: Mapping[str, Any]) -> str:
    """`values` (scalars, lists of scalars, tables, lists of tables) as TOML text that tomllib reads back equal."""
    return "\n".join(_lines(values, "")).strip() + "\n"


def _lines(values: Mapping[str, Any], prefix: str) -> list[str]:
    lines, tables = [], []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables += ["", f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}.")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for item in value:
                tables += ["", f"[[{prefix}{key}]]", *_lines(item, f"{prefix}{key}.")]
        else:
            lines.append(f"{key} = {_scalar(value)}")
    return lines + tables


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        # JSON's short escapes are TOML's, its surrogate pairs are not; TOML has no bare DEL either
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
