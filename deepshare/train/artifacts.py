"""A store of artifacts: how phases ended, under the hash of all that decides it (docs/training.md, Artifacts).

<folder>/<first two digits>/<key>/ weights.safetensors, last.safetensors, artifact.json
<folder>/.locks/<key>                       held by the process that trains it
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepshare.files import link_whole
from deepshare.train.artifact_key import deciding, difference, key_of, phase_keys
from deepshare.train.errors import ArtifactError
from deepshare.train.phase_record import WEIGHTS, PhaseRecord, load_record
from deepshare.train.run_folder import RunFolder

RECORD = "artifact.json"
SECONDS_BETWEEN = 0.5  # between two looks at a lock that another process holds


class ArtifactStore:
    """The store in `folder`, which is made when the first artifact comes.

    Several processes may use one store. An artifact appears whole, is never changed, and is checked whenever it is
    taken. It shares its content with the run folder that it came from or went to, where the file system has hard links.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The folder of an artifact, whether it is there or not."""
        return self.folder / key[:2] / key

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_dir()

    def weights(self, key: str) -> Path:
        """The checkpoint of an artifact: what `load_checkpoint` takes, of SNL's masks with their plan."""
        return self.path(key) / _file(WEIGHTS)

    def fetch(self, key: str, run: RunFolder, kind: str) -> PhaseRecord | None:
        """Put the artifact `key` into a run's folder, as how its phase `kind` ended; None if there is none.

        The record comes last: a run that is killed here has not ended its phase. A last epoch that was left out (its
        file deleted) is no error, it is then missing there too.

        Raises ArtifactError: it is damaged, or another one.
        """
        if key not in self:
            return None
        record, files = self._checked(key)
        for name, path in files.items():
            link_whole(path, run.phase_files(kind, record)[name])
        link_whole(self.path(key) / RECORD, run.record_path(kind))
        return record

    def keep(self, key: str, files: Mapping[str, Path], record: Path) -> bool:
        """Take an artifact in: its `files`, by WEIGHTS and LAST, and its record. False if it was here before."""
        target = self.path(key)
        if key in self:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{key[:8]}-"))
        try:
            beside.chmod(0o755)
            for name, path in files.items():
                link_whole(path, beside / _file(name))
            link_whole(record, beside / RECORD)
            os.rename(beside, target)
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            if isinstance(error, OSError) and key in self:  # another process was first
                return False
            raise
        return True

    def keep_phase(self, run: RunFolder, kind: str) -> bool:
        """Take in how the phase `kind` ended in a run's folder. False: it was given to the run, or is here already."""
        record = run.record(kind)
        if record is None:
            return False
        files = {name: path for name, path in run.phase_files(kind, record).items() if _wanted(name, path)}
        return self.keep(record.key, files, run.record_path(kind))

    def adopt(self, run_dir: str | Path) -> list[str]:
        """Take in the phases that ended in a run's folder, such as one that comes from another machine.

        Their keys are made again from its recipe, plan and inputs, and every file is compared with its hash, before the
        first one is taken. The folder stays as it is. Returns the kinds that were taken; what is here already is not.

        Raises ArtifactError: there is no run, or a phase in it is damaged or of another run. TrainingError,
        RecipeError: the folder is of another format, its recipe cannot be read.
        """
        run = RunFolder(run_dir)
        if not run.begun:
            raise ArtifactError(f"{run.path}: no run (it has no recipe.toml)")
        beginning, recipe = run.beginning(), run.recipe()
        keys = phase_keys(recipe, beginning.plan, beginning.given)
        ended = [phase.kind for phase in recipe.phase if run.record(phase.kind) is not None]
        for kind in ended:
            check_phase(run, kind, deciding(recipe, kind, beginning.plan, keys))
        return [kind for kind in ended if self.keep_phase(run, kind)]

    @contextmanager
    def locked(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Keep other processes from training `key`; the kernel lets go when this one ends, however it does.

        While another one holds it, `waiting` is called twice a second; what it raises ends the waiting.
        """
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        with (self.folder / ".locks" / key).open("a") as file:
            while not _lock(file.fileno()):
                waiting()
                time.sleep(SECONDS_BETWEEN)
            yield

    def _checked(self, key: str) -> tuple[PhaseRecord, dict[str, Path]]:
        place = self.path(key)
        try:
            record = load_record(place / RECORD)
            if record.key != key:
                raise ArtifactError(f"{place / RECORD}: of another artifact: wanted {key} (got {record.key})")
            files = {name: place / _file(name) for name in record.sha256 if _wanted(name, place / _file(name))}
            record.check_files(files)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; delete {place}, and it is trained again") from error
        return record, files


def check_phase(run: RunFolder, kind: str, wanted: Mapping[str, Any]) -> None:
    """Whether how `kind` ended in a run's folder is what `wanted` (of `deciding`) leads to, undamaged.

    Raises ArtifactError.
    """
    record = run.record(kind)
    assert record is not None
    if record.key != key_of(wanted):
        first = difference(wanted, record.deciding)
        raise ArtifactError(
            f"{run.record_path(kind)}: of another run: wanted key {key_of(wanted)} (got {record.key}); "
            f"first difference: {first}"
        )
    files = run.phase_files(kind, record)
    record.check_files({name: path for name, path in files.items() if _wanted(name, path)})


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _wanted(name: str, path: Path) -> bool:
    """A last epoch may be left out; weights may not."""
    return name == WEIGHTS or path.is_file()


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
