"""A run's folder: whole by itself, so that it can be moved, and safe to resume whenever its process was killed.

    recipe.toml                 every key resolved
    run.json                    the format of this folder, the plan the run began with, what it was given
    asked.json                  of `deepshare reproduce`: what the numbers in place of plan.counts_of are from
    plan.json                   of the hard network (of SNL: once its masks are learned)
    metrics.csv  log.txt
    checkpoints/                of the phase under way (deepshare.train.checkpoints)
    <phase>.safetensors         how a phase ended
    <phase>-last.safetensors    its last epoch, where another one was chosen
    <phase>.json                its record (deepshare.train.phase_record)
    final.safetensors  result.json
    .lock                       held by the process that trains here; stays, empty

Files are replaced whole, never written to: they may share their content with a store of artifacts. A phase has ended
when its record is there, which comes last.
"""

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deepshare.files import sha256_of, write_whole
from deepshare.plan import Plan, PlanError
from deepshare.train.checkpoints import Checkpoints
from deepshare.train.errors import RecipeError, TrainingError
from deepshare.train.fields import build
from deepshare.train.phase_record import LAST, WEIGHTS, PhaseRecord, load_record
from deepshare.train.recipe import Recipe, first_difference
from deepshare.train.recipe_file import load_recipe
from deepshare.train.rows import Row, check_rows, to_csv

FORMAT = 2  # of the folder; 1 had no run.json
LOCK = ".lock"


@dataclass(frozen=True)
class Beginning:
    """What run.json says. plan: the run's, before SNL learned its masks; given: SHA-256 by kind of the checkpoint that
    took the place of a phase"""

    plan: Plan
    given: Mapping[str, str]


@dataclass(frozen=True)
class Ending:
    """What of result.json is read again. sha256: of final.safetensors; in older folders unknown"""

    test_accuracy: float
    artifacts: dict[str, str]
    rows: tuple[dict[str, Any], ...]
    test_accuracy_last: float | None = None
    val_accuracy: float | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_rows(self.rows)


_ENDING = tuple(field.name for field in fields(Ending))


class RunFolder:
    """The folder at `path`; see the module's head for what is in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    @property
    def begun(self) -> bool:
        return (self.path / "recipe.toml").is_file()

    def check(self, recipe: Recipe, teacher: Path | None, *, resume: bool) -> None:
        """Refuse, before anything is written, to mix this run with another one.

        Raises TrainingError: there is a run and `resume` is False, or it had another recipe or teacher, or is of
        another format; there are files and no run.
        """
        if self.begun:
            if not resume:
                raise TrainingError(f"{self.path}: there is a run already; resume it, or choose another folder")
            given = self.beginning().given  # comes first: keys of a newer deepshare's recipe are unknown here
            difference = first_difference(self.recipe(), recipe)
            if difference is not None:
                raise TrainingError(f"{self.path}: cannot resume with another recipe; first difference: {difference}")
            if teacher is not None and sha256_of(teacher) != given.get(recipe.needs or "teacher"):
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

    def begin(self, recipe: Recipe, plan: Plan, teacher: Path | None) -> None:
        """Make the folder; recipe.toml comes last and says that it is whole. Does nothing if it is there."""
        self.checkpoints.path.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if self.begun:
            return
        given = {}
        if teacher is not None:
            kind = recipe.needs or "teacher"
            copy_whole(teacher, self.phase_end(kind))
            given[kind] = sha256_of(self.phase_end(kind))
        plan.save(self.plan)
        values = {"format": FORMAT, "given": given, "plan": json.loads(plan.to_json())}
        write_whole(self.path / "run.json", json.dumps(values, indent=1) + "\n")
        write_whole(self.path / "recipe.toml", recipe.to_toml())

    def recipe(self) -> Recipe:
        """The run's recipe. Raises RecipeError: it cannot be read."""
        return load_recipe(self.path / "recipe.toml")

    def beginning(self) -> Beginning:
        """What the run began with.

        Raises TrainingError: run.json is damaged, or the folder is of another format.
        """
        path = self.path / "run.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["format"]
            if found == FORMAT:
                return Beginning(Plan.from_json(json.dumps(values["plan"])), _digests(values["given"]))
        except FileNotFoundError:
            found = 1
        except (ValueError, TypeError, KeyError, RecursionError, PlanError) as error:
            raise TrainingError(f"{path}: damaged, the run cannot go on: {error!r:.200}") from error
        which = "a newer" if isinstance(found, int) and found > FORMAT else "another"
        raise TrainingError(
            f"{self.path}: a run folder of {which} deepshare (format {found!r:.20}, this one's is {FORMAT}); "
            "go on with the one that began it"
        )

    @property
    def final(self) -> Path:
        """The network with which the run ended."""
        return self.path / "final.safetensors"

    @property
    def plan(self) -> Path:
        """The plan of the hard network; until SNL's masks are learned, the one they start from."""
        return self.path / "plan.json"

    def phase_end(self, phase: str) -> Path:
        """Where the checkpoint is (or will be) with which `phase` ended."""
        return self.path / f"{phase}.safetensors"

    def phase_last(self, phase: str) -> Path:
        """Where the last epoch of `phase` is, if another one goes on."""
        return self.path / f"{phase}-last.safetensors"

    def phase_files(self, phase: str, record: PhaseRecord) -> dict[str, Path]:
        """The files of a phase that ended, by WEIGHTS and LAST."""
        return {name: {WEIGHTS: self.phase_end, LAST: self.phase_last}[name](phase) for name in record.sha256}

    def record(self, phase: str) -> PhaseRecord | None:
        """The record of a phase that ended here; None if it has not, or was given. Raises ArtifactError: damaged."""
        path = self.record_path(phase)
        return load_record(path) if path.is_file() else None

    def record_path(self, phase: str) -> Path:
        """Where the record of a phase is, from its end on."""
        return self.path / f"{phase}.json"

    def write_metrics(self, rows: Iterable[Row]) -> None:
        """metrics.csv, whole: one row an epoch over all phases, none twice, whatever was there before."""
        write_whole(self.path / "metrics.csv", to_csv(rows))

    def write_result(self, values: dict[str, Any]) -> None:
        write_whole(self.path / "result.json", json.dumps(values, indent=2, allow_nan=False) + "\n")

    def result(self) -> Ending | None:
        """What write_result wrote, or None if the run is not at its end. Raises TrainingError: it is damaged."""
        path = self.path / "result.json"
        if not path.is_file():
            return None
        try:
            values = dict(json.loads(path.read_text(encoding="utf-8")))
            return build(Ending, {name: values[name] for name in _ENDING if values.get(name) is not None})
        except (ValueError, TypeError, RecursionError, RecipeError) as error:
            raise TrainingError(f"{path}: damaged; delete it, and the network is measured again ({error})") from error

    def ended(self) -> bool:
        """Whether the run is at its end. Raises TrainingError: its result or its network is damaged or missing."""
        result = self.result()
        if result is None:
            return False
        got = sha256_of(self.final) if self.final.is_file() else None
        if got is None or result.sha256 not in (None, got):
            what = "no such file" if got is None else f"damaged: wanted sha256 {result.sha256} (got {got})"
            raise TrainingError(f"{self.final}: {what}; delete {self.path / 'result.json'}, and it is made again")
        return True

    def _remove_leftovers(self) -> None:
        """What a killed run was writing: hidden files beside their names, of ours alone."""
        inside = self.checkpoints.path.glob(".*")
        for path in (*inside, *(path for path in self.path.iterdir() if _is_unfinished(path))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _only_our_beginning(self) -> bool:
        """Whether all that is here is what `begin` writes before recipe.toml."""
        ours = {
            LOCK,
            "checkpoints",
            "plan.json",
            "run.json",
            "asked.json",
            "teacher.safetensors",
            "pretrain.safetensors",
        }
        known = all(path.name in ours or _is_unfinished(path) for path in self.path.iterdir())
        inside = self.checkpoints.path
        return known and not (inside.is_dir() and any(inside.iterdir()))


def _digests(given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(digest, str) for digest in given.values()):
        raise TypeError(f"given: wanted the SHA-256 of a file by phase, got {given!r:.80}")
    return given


def _is_unfinished(path: Path) -> bool:
    """Whether `path` is what write_whole left of one of a run's files when it was killed: .<name>.<random>"""
    return path.name.startswith(".") and path.name[1:].rpartition(".")[0].endswith(
        (".toml", ".json", ".csv", ".safetensors")
    )


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that `target` appears whole, sharing nothing: `source` belongs to somebody else."""
    write_whole(target, source.read_bytes())
