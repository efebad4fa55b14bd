"""What is written beside the weights with which a phase ended: what they are of, their hashes, how they came to be."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepshare.files import sha256_of, write_whole
from deepshare.train.artifact_key import key_of
from deepshare.train.errors import ArtifactError, RecipeError, require
from deepshare.train.fields import build, plain
from deepshare.train.provenance import Session
from deepshare.train.rows import Row, check_rows

VERSION = 1
WEIGHTS, LAST = "weights", "last"  # the files of a phase: the epoch that goes on; the last one, where that is another
_FIELDS = {
    "version": int, "key": str, "deciding": dict, "run": str, "epoch": int, "sha256": dict, "inputs": dict,
    "rows": list, "sessions": list,
}  # fmt: skip


@dataclass(frozen=True)
class PhaseRecord:
    """How a phase ended.

    key, deciding: its artifact's (deepshare.train.artifact_key); run: name of the recipe, seed and folder it was
    trained for; epoch: the one whose weights go on, from 1; sha256: of its files, by WEIGHTS and LAST; inputs: by kind,
    the SHA-256 of the weights it started or learned from; rows: its epochs' metrics; sessions: who trained them
    """

    key: str
    deciding: Mapping[str, Any]
    run: str
    epoch: int
    sha256: Mapping[str, str]
    inputs: Mapping[str, str]
    rows: tuple[Row, ...]
    sessions: tuple[Session, ...]

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        values = {name: getattr(self, name) for name in _FIELDS if name not in ("version", "rows", "sessions")}
        lists = {"rows": list(self.rows), "sessions": plain(self.sessions)}
        write_whole(path, json.dumps({"version": VERSION, **values, **lists}, indent=1, allow_nan=False) + "\n")

    def check_files(self, files: Mapping[str, Path]) -> None:
        """Compare the content of `files`, by WEIGHTS and LAST, with what was written.

        Raises ArtifactError: one is missing or has another content.
        """
        for name, path in files.items():
            if not path.is_file():
                raise ArtifactError(f"{path}: no such file, wanted one with sha256 {self.sha256[name]}")
            if (got := sha256_of(path)) != self.sha256[name]:
                raise ArtifactError(
                    f"{path}: damaged, or of another run: wanted sha256 {self.sha256[name]} (got {got})"
                )


def load_record(path: Path) -> PhaseRecord:
    """What `PhaseRecord.save` wrote.

    Raises ArtifactError: there is none, it is damaged or of another version, or its key is not that of what it says
    decided the phase.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged: not JSON ({error})") from error
    _check_fields(path, values)
    try:
        key = key_of(values["deciding"])
        require(key == values["key"], f"what decided it has key {key}, it says {values['key']}")
        sessions = tuple(build(Session, value, f"sessions[{at}]") for at, value in enumerate(values["sessions"]))
        _check_values(values)
    except (ValueError, RecursionError, RecipeError) as error:  # ValueError: NaN among what decided it
        raise ArtifactError(f"{path}: damaged: {error}") from error
    rest = {name: values[name] for name in _FIELDS if name not in ("version", "rows", "sessions")}
    return PhaseRecord(**rest, rows=tuple(values["rows"]), sessions=sessions)


def _check_fields(path: Path, values: Any) -> None:
    if not isinstance(values, dict) or "version" not in values:
        raise ArtifactError(f"{path}: damaged: wanted an object with {', '.join(_FIELDS)}")
    if values["version"] != VERSION:
        raise ArtifactError(f"{path}: version must be {VERSION} (got {values['version']!r:.80})")
    if values.keys() != _FIELDS.keys():
        raise ArtifactError(f"{path}: damaged: wanted {', '.join(_FIELDS)} (got {', '.join(values)})")
    for name, kind in _FIELDS.items():
        if type(values[name]) is not kind:
            raise ArtifactError(f"{path}: damaged: {name} must be {kind.__name__} (got {values[name]!r:.80})")


def _check_values(values: Mapping[str, Any]) -> None:
    """Whether the fields fit each other. Raises RecipeError."""
    files, inputs, epochs = values["sha256"], values["inputs"], len(values["rows"])
    require(WEIGHTS in files, f"sha256 has no {WEIGHTS!r}")
    require(files.keys() <= {WEIGHTS, LAST}, f"sha256: wanted {WEIGHTS} and {LAST}, got {', '.join(files)}")
    texts = all(isinstance(digest, str) for digest in (*files.values(), *inputs.values()))
    require(texts, f"sha256, inputs: wanted text, got {files!r:.80}, {inputs!r:.80}")
    check_rows(values["rows"])
    require(0 < values["epoch"] <= epochs, f"epoch: wanted one of the {epochs} in rows, got {values['epoch']}")
    require(len(values["sessions"]) > 0, "sessions: wanted at least one")
