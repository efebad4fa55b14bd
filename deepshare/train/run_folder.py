"""A run's folder: what is written when, so that a kill at any moment leaves a run that can go on.

    recipe.toml  plan.json  metrics.csv  log.txt
    checkpoints/<phase>-<epoch>/ weights.safetensors, state.pt      after every epoch; only the newest stays
    checkpoints/<phase>-best-<epoch>.safetensors                    the best epoch of the phase under way
    <phase>.safetensors                                             how the phase ended
    final.safetensors  result.json
    .lock                                                           held by the process that trains here; stays, empty

Files come whole (written beside, renamed), checkpoint folders too. What state.pt says is the truth; what else lies
there may be one step older or newer, and is put right on resume.
"""

import csv
import fcntl
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepshare.files import write_whole
from deepshare.train.errors import TrainingError
from deepshare.train.recipe import Recipe, first_difference
from deepshare.train.recipe_file import load_recipe

Row = dict[str, str | int | float | None]  # None: no validation images
COLUMNS = (
    "phase", "epoch", "loss", "val_accuracy", "lr", "drelus", "soft_channels", "images_per_second", "seconds",
    "lasso", "site_drelus",  # of the phase masks: lambda of the epoch; DReLUs by site in call order
)  # fmt: skip


LOCK = ".lock"


@dataclass(frozen=True)
class State:
    """How far a run is: everything beside the weights that the next epoch depends on.

    phase: its kind; epoch: epochs of it that are done; best_epoch: 0 while there is none; rows: metrics so far;
    masks: what the phase "masks" knows beside the weights
    """

    phase: str
    epoch: int = 0
    optimizer: dict[str, Any] | None = None
    best_epoch: int = 0
    best_accuracy: float = -1.0
    rows: tuple[Row, ...] = ()
    masks: dict[str, Any] | None = None

    def next_phase(self, phase: str) -> "State":
        return State(phase, rows=self.rows)

    def after_epoch(self, optimizer: dict[str, Any], row: Row, *, may_be_best: bool) -> "State":
        """One epoch later. Of epochs with equal accuracy the last one is the best: it has trained longest."""
        accuracy = row["val_accuracy"]
        state = replace(self, epoch=self.epoch + 1, optimizer=optimizer, rows=(*self.rows, row))
        if may_be_best and isinstance(accuracy, float) and accuracy >= self.best_accuracy:
            return replace(state, best_epoch=state.epoch, best_accuracy=accuracy)
        return state


class RunFolder:
    """The folder at `path`; see the module's head for what is in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    @property
    def begun(self) -> bool:
        return (self.path / "recipe.toml").is_file()

    def check(self, recipe: Recipe, teacher: Path | None, *, resume: bool) -> None:
        """Refuse, before anything is written, to mix this run with another one.

        Raises TrainingError: there is a run and `resume` is False, or it had another recipe or teacher; there are
        files and no run.
        """
        if self.begun:
            if not resume:
                raise TrainingError(f"{self.path}: there is a run already; resume it, or choose another folder")
            difference = first_difference(load_recipe(self.path / "recipe.toml"), recipe)
            if difference is not None:
                raise TrainingError(f"{self.path}: cannot resume with another recipe; first difference: {difference}")
            if teacher is not None and teacher.read_bytes() != self._bytes_of(recipe.needs or "teacher"):
                raise TrainingError(f"{self.path}: cannot resume with another teacher than before ({teacher})")
        elif self.path.exists() and (not self.path.is_dir() or not self._only_our_beginning()):
            raise TrainingError(f"{self.path}: exists, and is no run (it has no recipe.toml); choose another folder")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it; the kernel lets go when this one ends, however it does.

        Raises TrainingError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainingError(f"{self.path}: another process trains here") from error
            yield

    def begin(self, recipe: Recipe, plan_json: str, teacher: Path | None) -> None:
        """Make the folder; recipe.toml comes last and says that it is whole. Does nothing if it is there."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if self.begun:
            return
        if teacher is not None:
            copy_whole(teacher, self.phase_end(recipe.needs or "teacher"))
        write_whole(self.plan, plan_json)
        write_whole(self.path / "recipe.toml", recipe.to_toml())

    @property
    def plan(self) -> Path:
        """The plan of the hard network; until SNL's masks are learned, the one they start from."""
        return self.path / "plan.json"

    def phase_end(self, phase: str) -> Path:
        """Where the checkpoint is (or will be) with which `phase` ended."""
        return self.path / f"{phase}.safetensors"

    def best(self, state: State) -> Path:
        return self.checkpoints / f"{state.phase}-best-{state.best_epoch:04d}.safetensors"

    def weights(self, state: State) -> Path:
        return self._folder(state) / "weights.safetensors"

    def recover(self) -> State | None:
        """The state of the last epoch that was saved whole, None before the first; what else lies there is put right.

        Raises TrainingError: its state.pt is damaged.
        """
        states = [_load_state(path) for path in self.checkpoints.glob("*-*/state.pt")]
        newest = max(states, key=lambda state: len(state.rows), default=None)
        if newest is not None:
            self._prune(newest)
            self.write_metrics(newest.rows)
        return newest

    def save(self, state: State, save_weights: Callable[[Path], object]) -> None:
        """Save the epoch `state` ends with, then drop what is older. `save_weights(path)` writes the weights."""
        beside = Path(tempfile.mkdtemp(dir=self.checkpoints, prefix=".saving-"))
        beside.chmod(0o755)
        save_weights(beside / "weights.safetensors")
        if state.best_epoch == state.epoch:
            copy_whole(beside / "weights.safetensors", self.best(state))
        torch.save({field.name: getattr(state, field.name) for field in fields(State)}, beside / "state.pt")
        os.replace(beside, self._folder(state))
        self._prune(state)
        self.write_metrics(state.rows)

    def end_phase(self, state: State, *, best: bool) -> None:
        """Keep the best or the last weights of the phase as how it ended."""
        self.end_phase_with(state, partial(copy_whole, self.best(state) if best else self.weights(state)))

    def end_phase_with(self, state: State, save_weights: Callable[[Path], object]) -> None:
        """`save_weights(path)` writes how the phase ended, whole."""
        save_weights(self.phase_end(state.phase))
        self._prune(state)

    def write_metrics(self, rows: tuple[Row, ...]) -> None:
        """metrics.csv, whole: one row an epoch over all phases, none twice, whatever was there before."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path / "metrics.csv", text.getvalue())

    def write_result(self, values: dict[str, Any]) -> None:
        write_whole(self.path / "result.json", json.dumps(values, indent=2, allow_nan=False) + "\n")

    def result(self) -> dict[str, Any] | None:
        """What write_result wrote, or None if the run is not at its end."""
        path = self.path / "result.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def _folder(self, state: State) -> Path:
        return self.checkpoints / f"{state.phase}-{state.epoch:04d}"

    def _prune(self, newest: State) -> None:
        under_way = not self.phase_end(newest.phase).is_file()
        keep = {self._folder(newest), self.best(newest)} if under_way else {self._folder(newest)}
        for path in self.checkpoints.iterdir():
            if path not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _remove_leftovers(self) -> None:
        """What a killed run was writing: hidden files beside their names, of ours alone."""
        for path in (*self.checkpoints.glob(".*"), *(path for path in self.path.iterdir() if _is_unfinished(path))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _bytes_of(self, phase: str) -> bytes | None:
        path = self.phase_end(phase)
        return path.read_bytes() if path.is_file() else None

    def _only_our_beginning(self) -> bool:
        """Whether all that is here is what `begin` writes before recipe.toml."""
        ours = {LOCK, "checkpoints", "plan.json", "teacher.safetensors", "pretrain.safetensors"}
        known = all(path.name in ours or _is_unfinished(path) for path in self.path.iterdir())
        return known and not (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))


def _is_unfinished(path: Path) -> bool:
    """Whether `path` is what write_whole left of one of a run's files when it was killed: .<name>.<random>"""
    return path.name.startswith(".") and path.name[1:].rpartition(".")[0].endswith(
        (".toml", ".json", ".csv", ".safetensors")
    )


def _load_state(path: Path) -> State:
    try:
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever torch.load makes of a damaged file
        raise TrainingError(f"{path}: damaged, the run cannot go on from it: {error}") from error


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that `target` appears whole."""
    write_whole(target, source.read_bytes())
