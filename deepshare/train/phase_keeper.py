"""What of a phase goes to disk, and when: checkpoints now and then, and how it ended."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from deepshare.files import link_whole, sha256_of
from deepshare.train.artifact_key import deciding, inputs_of, key_of
from deepshare.train.checkpoints import State, Writer
from deepshare.train.errors import TrainingPaused
from deepshare.train.fields import build, plain
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.phase_record import LAST, WEIGHTS, PhaseRecord
from deepshare.train.provenance import Session, this_session
from deepshare.train.rows import Row
from deepshare.train.run import Run


class PhaseKeeper:
    """The state of a phase as it goes on.

    A checkpoint costs as much as many epochs of a small network: there is at most one in `run.checkpoint_seconds`, and
    one before a pause. What is lost by a kill in between is trained again, to the same weights. The best epoch so far
    waits in memory for the next checkpoint.
    """

    def __init__(self, run: Run, phase: PhaseRecipe, state: State, optimizer: torch.optim.Optimizer) -> None:
        self.run, self.phase, self.optimizer = run, phase, optimizer
        session = plain(this_session(run.device, state.epoch + 1))
        before = tuple(past for past in state.sessions if past["first_epoch"] <= state.epoch)
        self.state = replace(state, sessions=(*before, session))
        self._saved, self._saved_at = state.epoch, time.monotonic()
        self._write: Writer | None = None
        self._write_best: Writer | None = None

    def pause_in_time(self) -> None:
        """Before an epoch. Raises TrainingPaused, with everything saved: another epoch does not fit into this call."""
        self.run.ranks.from_writer(self._pause_in_time)

    def _pause_in_time(self) -> None:
        state, allowance = self.state, self.run.allowance
        if not allowance.fits_another:
            self._save()
            raise TrainingPaused(self.phase.kind, state.epoch, self.phase.epochs, self.run.progress.left)
        allowance.begin_epoch()

    def after_epoch(
        self,
        row: Row,
        write: Writer,
        keep: Callable[[], Writer] | None = None,
        masks: dict[str, Any] | None = None,
    ) -> None:
        """Note an epoch, and save it if it is time.

        write: writes the network as it is now, at the latest before the next epoch; keep: makes a writer of a copy of
        it, if it may become the phase's best (None: the last epoch goes on); masks: as State's
        """
        self.state = replace(self.state.after_epoch(row, may_be_best=keep is not None), masks=masks)
        self._write = write
        if keep is not None and self.state.best_epoch == self.state.epoch:
            self._write_best = keep() if self.run.ranks.is_writer else None
        self.run.ranks.from_writer(self._show_epoch)
        self.run.allowance.end_epoch()

    def _show_epoch(self) -> None:
        if time.monotonic() - self._saved_at >= self.run.checkpoint_seconds:
            self._save()
        self.run.folder.write_metrics((*self.run.rows, *self.state.rows))
        self.run.progress.end_epoch(self.state.rows[-1])

    def save(self) -> None:
        """Write a checkpoint of the last epoch, unless it is there."""
        self.run.ranks.from_writer(self._save)

    def _save(self) -> None:
        if self._saved == self.state.epoch:
            return
        assert self._write is not None
        with_optimizer = replace(self.state, optimizer=self.optimizer.state_dict())
        self.run.folder.checkpoints.save(with_optimizer, self._write, self._write_best)
        self._saved, self._saved_at, self._write_best = self.state.epoch, time.monotonic(), None

    def end(self, write: Writer) -> None:
        """The phase has ended: keep its best epoch, or where none is chosen what `write` writes, and its record.

        The last epoch is kept beside a better one where a recipe may end with this phase; after gelu comes the switch.
        """
        self.run.ranks.from_writer(lambda: self._end(write))

    def _end(self, write: Writer) -> None:
        folder, state, kind = self.run.folder, self.state, self.phase.kind
        chosen = state.best_epoch if self.phase.keeps_best else state.epoch
        files = {WEIGHTS: folder.phase_end(kind)}
        if chosen != state.epoch and kind != "gelu":
            files[LAST] = folder.phase_last(kind)
            write(files[LAST])
        if chosen == state.epoch:
            write(files[WEIGHTS])
        elif self._write_best is not None:
            self._write_best(files[WEIGHTS])
        else:
            link_whole(folder.checkpoints.best(state), files[WEIGHTS])
        record = self._record(chosen, {name: sha256_of(path) for name, path in files.items()})
        record.save(folder.record_path(kind))
        folder.checkpoints.clear()

    def _record(self, chosen: int, sha256: dict[str, str]) -> PhaseRecord:
        run, state = self.run, self.state
        values = deciding(run.recipe, state.phase, run.plan, run.keys)
        inputs = {kind: sha256_of(run.folder.phase_end(kind)) for kind in inputs_of(run.recipe, state.phase)}
        name = f"{run.recipe.name}, seed {run.recipe.seed}, in {run.folder.path.name}"
        sessions = tuple(build(Session, session) for session in state.sessions)
        return PhaseRecord(key_of(values), values, name, chosen, sha256, inputs, state.rows, sessions)
