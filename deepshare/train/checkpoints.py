"""The checkpoints of the phase under way: what is written when, so that a kill at any moment leaves a run to go on.

    checkpoints/<phase>-<epoch>/ weights.safetensors, state.pt      the newest checkpoint
    checkpoints/<phase>-best-<epoch>.safetensors                    the best epoch of the phase until then

Files come whole (written beside, renamed), folders too. What state.pt says is the truth; what else lies there may be
older or newer, and is put right on resume.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from deepshare.files import link_whole, sha256_of, write_whole
from deepshare.train.errors import TrainingError
from deepshare.train.rows import Row

Writer = Callable[[Path], object]  # writes a network to a path, whole


@dataclass(frozen=True)
class State:
    """How far a phase is: everything beside the weights that its next epoch depends on.

    phase: its kind; epoch: epochs of it that are done; best_epoch: 0 while there is none; rows: its metrics so far;
    masks: what the phase "masks" knows beside the weights; sessions: who trained the epochs (plain values)
    sha256: of the checkpoint's networks, by "weights" and "best"; of older checkpoints unknown
    """

    phase: str
    epoch: int = 0
    optimizer: dict[str, Any] | None = None
    best_epoch: int = 0
    best_accuracy: float = -1.0
    rows: tuple[Row, ...] = ()
    masks: dict[str, Any] | None = None
    sessions: tuple[dict[str, Any], ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)

    def after_epoch(self, row: Row, *, may_be_best: bool) -> "State":
        """One epoch later. Of epochs with equal accuracy the last one is the best: it has trained longest."""
        accuracy = row["val_accuracy"]
        state = replace(self, epoch=self.epoch + 1, rows=(*self.rows, row))
        if may_be_best and isinstance(accuracy, float) and accuracy >= self.best_accuracy:
            return replace(state, best_epoch=state.epoch, best_accuracy=accuracy)
        return state


class Checkpoints:
    """The folder at `path`; see the module's head for what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def best(self, state: State) -> Path:
        return self.path / f"{state.phase}-best-{state.best_epoch:04d}.safetensors"

    def weights(self, state: State) -> Path:
        return self._folder(state) / "weights.safetensors"

    def newest(self, phase: str) -> State | None:
        """The state of the phase's last checkpoint, None before the first; what else lies there is dropped.

        Raises TrainingError, with everything left as it is: a file of it is damaged or missing.
        """
        states = [_load_state(path) for path in self.path.glob(f"{phase}-*/state.pt")]
        found = max(states, key=lambda state: state.epoch, default=None)
        if found is not None:
            self._check(found)
        self._drop_all_but(set() if found is None else {self._folder(found), self.best(found)})
        return found

    def save(self, state: State, write: Writer, write_best: Writer | None) -> None:
        """Save what the phase is at the end of `state.epoch`, then drop what is older.

        write, write_best: write the network of that epoch, and of the best one (None: there is none, or its file is
        here already).
        """
        beside = Path(tempfile.mkdtemp(dir=self.path, prefix=".saving-"))
        try:
            beside.chmod(0o755)
            write(beside / "weights.safetensors")
            if state.best_epoch == state.epoch:
                link_whole(beside / "weights.safetensors", self.best(state))
            elif write_best is not None:
                write_best(self.best(state))
            networks = {**self._networks(state), "weights": beside / "weights.safetensors"}
            sha256 = {name: sha256_of(path) for name, path in networks.items()}
            write_whole(beside / "state.pt", _bytes_of(replace(state, sha256=sha256)))
            os.replace(beside, self._folder(state))
        except BaseException:  # a full disk must not be filled by what could not be finished
            shutil.rmtree(beside, ignore_errors=True)
            raise
        self._drop_all_but({self._folder(state), self.best(state)})

    def clear(self) -> None:
        """Drop all: how the phase ended is kept elsewhere."""
        self._drop_all_but(set())

    def _folder(self, state: State) -> Path:
        return self.path / f"{state.phase}-{state.epoch:04d}"

    def _networks(self, state: State) -> dict[str, Path]:
        """The files of a checkpoint beside state.pt; "best" where an epoch is chosen."""
        best = {"best": self.best(state)} if state.best_epoch else {}
        return {"weights": self.weights(state), **best}

    def _check(self, state: State) -> None:
        for name, path in self._networks(state).items():
            wanted = state.sha256.get(name)
            got = sha256_of(path) if path.is_file() else None
            if got is None or wanted not in (None, got):
                what = "no such file" if got is None else f"damaged: wanted sha256 {wanted} (got {got})"
                raise TrainingError(
                    f"{path}: {what}; the run cannot go on from {self._folder(state)}; bring the file back, or delete "
                    "that folder, and the phase is trained from its start"
                )

    def _drop_all_but(self, keep: set[Path]) -> None:
        for path in set(self.path.iterdir()) - keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _bytes_of(state: State) -> bytes:
    """Made in memory: torch.save into a full disk says nothing of the disk."""
    content = io.BytesIO()
    torch.save({field.name: getattr(state, field.name) for field in fields(State)}, content)
    return content.getvalue()


def _load_state(path: Path) -> State:
    try:
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever torch.load makes of a damaged file
        raise TrainingError(f"{path}: damaged, the run cannot go on from it: {error}") from error
