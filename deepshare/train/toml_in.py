"""TOML files by path, or by the name under which they come with the package."""

import tomllib
from pathlib import Path
from typing import Any

from deepshare.train.errors import RecipeError


def toml_names(folder: Path) -> list[str]:
    """Names of the files in a folder of the package."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def find_toml(path_or_name: str | Path, folder: Path, what: str) -> Path:
    """The file `path_or_name`, or the one of that name in `folder`, which holds a `what` each.

    Raises RecipeError: neither is there; the message lists the names.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    packaged = folder / f"{path_or_name}.toml"
    if path.suffix != ".toml" and packaged.is_file():
        return packaged
    raise RecipeError(f"{path_or_name}: no such file and no such {what}; there are {', '.join(toml_names(folder))}")


def read_toml(path: Path) -> dict[str, Any]:
    """What the file holds. Raises OSError, or ValueError: not UTF-8, or not TOML."""
    return tomllib.loads(path.read_text(encoding="utf-8"))
