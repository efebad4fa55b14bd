"""A whole run: recipe in, checkpoint out, resumable at every moment."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepshare.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from deepshare.data import Dataset
from deepshare.files import sha256_of
from deepshare.plan import Plan
from deepshare.train.artifact_key import phase_keys
from deepshare.train.artifacts import ArtifactStore
from deepshare.train.chain import run_chain
from deepshare.train.distributed import Ranks, joined
from deepshare.train.errors import RecipeError, TrainingError
from deepshare.train.networks import make_plan, model_spec, pretrain_plan
from deepshare.train.progress import Progress, Silence
from deepshare.train.recipe import Recipe
from deepshare.train.recipe_file import load_recipe
from deepshare.train.rows import Row
from deepshare.train.run import Run
from deepshare.train.run_folder import RunFolder
from deepshare.train.slices import Allowance


@dataclass(frozen=True, eq=False)
class TrainResult:
    """How a run ended.

    checkpoint: final.safetensors; plan: of its hard network; test_accuracy, val_accuracy: shares in [0, 1] of the epoch
    that validation chose, None without validation images; test_accuracy_last: of the last epoch of the last phase, the
    same figure where that is the chosen one, None where its weights were left out; rows: metrics of every epoch of
    every phase; run_dir: its folder; artifacts: the key of every phase; trained: epochs that this call trained
    """

    checkpoint: Path
    plan: Plan
    test_accuracy: float
    test_accuracy_last: float | None
    val_accuracy: float | None
    rows: tuple[Row, ...]
    run_dir: Path
    artifacts: Mapping[str, str]
    trained: int

    def phase_checkpoint(self, kind: str) -> Path:
        """The checkpoint `kind` ended with, such as "teacher": what `train(teacher=...)` takes."""
        return RunFolder(self.run_dir).phase_end(kind)


def train(
    recipe: Recipe | str | Path,
    run_dir: str | Path,
    *,
    data_root: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    teacher: str | Path | None = None,
    artifacts: ArtifactStore | None = None,
    max_minutes: float | None = None,
    checkpoint_seconds: float = 30.0,
) -> TrainResult:
    """Run every phase of `recipe` in the folder `run_dir`.

    recipe: a Recipe (load_recipe also takes changes), a TOML file, or the name of one that comes with the package
    data_root: folder of the official data files (CIFAR)
    device: default the first CUDA device, else the CPU
    resume: go on where a run in `run_dir` stopped (a finished one is returned as it is, none yet is begun). On one
        machine's CPU the final weights are, bit for bit, those of a run that was never stopped
    teacher: a checkpoint in place of the recipe's teacher or pretrain phase, to distil from and, for SNL's masks, to
        start from; it is copied into `run_dir`
    artifacts: phases that are there are taken in the place of training, those that are trained are kept there
    max_minutes: stop before the first epoch that would not end by then; one is trained at least
    checkpoint_seconds: the least time between two checkpoints within a phase; what a kill loses is trained again

    Raises RecipeError, DataError, CheckpointError (the teacher), TrainingError; nothing is written before all of
    them that can be known in advance. TrainingPaused: `max_minutes` are over; another call, with resume, goes on.
    """
    folder, teacher_path = RunFolder(run_dir), None if teacher is None else Path(teacher)
    with joined(device) as ranks, ExitStack() as held:
        allowance, ready = ranks.agree(
            lambda: (Allowance(max_minutes), _checked(recipe, folder, teacher_path, data_root, device, resume, ranks))
        )
        ranks.from_writer(lambda: _take_folder(folder, ready, teacher_path, resume, held))
        with _writing(folder):
            run = _run_of(ready, folder, allowance, checkpoint_seconds, ranks)
            if not ranks.from_writer(folder.ended):
                run.progress.say(_announcement(run))
                run_chain(run, artifacts)
                _finish(run)
            return _result(run)


class _Ready(NamedTuple):
    """A run that nothing speaks against."""

    recipe: Recipe
    dataset: Dataset
    spec: dict[str, Any]
    plan: Plan
    device: torch.device


def _checked(
    recipe: Recipe | str | Path,
    folder: RunFolder,
    teacher: Path | None,
    data_root: str | Path | None,
    device: str | torch.device | None,
    resume: bool,
    ranks: Ranks,
) -> _Ready:
    """All that can be known before anything is written."""
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder.check(recipe, teacher, resume=resume)
    dataset = recipe.data.load(data_root)
    spec = model_spec(recipe.model, dataset.num_classes, dataset.input_size)
    began = folder.beginning() if folder.begun else None
    plan = make_plan(recipe, spec, None if began is None else began.plan)
    # not by the file: a start that was killed leaves one that no run was given
    check_teacher(recipe, dataset, teacher, known=began is not None and recipe.needs in began.given)
    if teacher is not None and began is None:
        _check_start(recipe, spec, plan, teacher)
    place = check_run(recipe, dataset, ranks.device or device)
    recipe.compute.on(place, ranks.world)
    _check_shares(recipe, dataset, ranks)
    return _Ready(recipe, dataset, spec, plan, place)


def _take_folder(folder: RunFolder, ready: _Ready, teacher: Path | None, resume: bool, held: ExitStack) -> None:
    """Begin the run, or find it begun, and keep other processes out for as long as `held` is open."""
    held.enter_context(folder.locked())
    with _writing(folder):
        folder.check(ready.recipe, teacher, resume=resume)  # again: another process may have been here since
        folder.begin(ready.recipe, ready.plan, teacher)


def _run_of(ready: _Ready, folder: RunFolder, allowance: Allowance, checkpoint_seconds: float, ranks: Ranks) -> Run:
    recipe, dataset, spec, plan, place = ready
    keys = phase_keys(recipe, plan, folder.beginning().given)
    progress = Progress(folder.path / "log.txt") if ranks.is_writer else Silence()
    moved = dataset.to(place)
    return Run(recipe, folder, moved, spec, plan, place, progress, keys, allowance, checkpoint_seconds, ranks=ranks)


@contextmanager
def _writing(folder: RunFolder) -> Iterator[None]:
    """What the disk refuses in the middle of a run ends it; whatever was there before still is, whole."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{folder.path}: the run cannot go on: {error}; what was saved stays, resume goes on from it"
        ) from error


def check_run(recipe: Recipe, dataset: Dataset, device: str | torch.device | None) -> torch.device:
    """The device to train on. Raises what `train` says of a recipe with this data and device, whatever the folder.

    Raises RecipeError: too few images, augmentation or computation that cannot be done. TrainingError: no such device.
    """
    _check_splits(recipe, dataset)
    place = _usable_device(device)
    recipe.compute.on(place)
    _check_first_batch(recipe, dataset)
    return place


def _usable_device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type not in ("cpu", "cuda"):
            raise RuntimeError("wanted cpu or cuda")
        torch.zeros((), device=place)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise TrainingError(f"device {str(device)!r} cannot be used here: {error}") from error
    return place


def _check_splits(recipe: Recipe, dataset: Dataset) -> None:
    """Whether every phase can choose its epoch and fill a batch; batches are as long as there are images at most."""
    best = [phase.kind for phase in recipe.phase if phase.keeps_best]
    if best and not len(dataset.val):
        raise RecipeError(
            f'recipe {recipe.name}: phase.{best[0]}.keep "best" needs a validation image; data.val_fraction '
            f"{recipe.data.val_fraction} of {len(dataset.train):,} images is none"
        )
    if len(dataset.train) < 2:  # batch normalisation over one 1x1 image has no variance
        raise RecipeError(
            f"recipe {recipe.name}: wanted at least 2 training images, data.val_fraction {recipe.data.val_fraction} "
            f"leaves {len(dataset.train)}"
        )


def _check_shares(recipe: Recipe, dataset: Dataset, ranks: Ranks) -> None:
    """Whether every rank can have an equal part of each batch, which is as long as there are images at most."""
    for phase in recipe.phase:
        length = min(phase.batch_size, len(dataset.train))
        try:
            ranks.check_share(length, f"phase.{phase.kind}.batch_size", sync_batch_norm=recipe.compute.sync_batch_norm)
        except ValueError as error:
            all_of_it = "" if length == phase.batch_size else ", all training images there are"
            raise RecipeError(f"recipe {recipe.name}: {error}{all_of_it}") from error


def _check_first_batch(recipe: Recipe, dataset: Dataset) -> None:
    """Augment two images: what cannot work with this data ends the run before it has a folder."""
    try:
        next(iter(dataset.batches("train", 2, augment=recipe.data.augment, seed=0)))
    except RuntimeError as error:  # such as padding that needs more memory than there is
        raise RecipeError(f"recipe {recipe.name}: {recipe.data.augment} cannot be applied: {error}") from error


def check_teacher(recipe: Recipe, dataset: Dataset, teacher: Path | None, *, known: bool) -> None:
    """Whether `teacher` can teach in this run; known: whether the run has one already.

    Raises TrainingError: none where one is needed, or one where none is. CheckpointError: it cannot be read, or is for
    other images or classes.
    """
    if teacher is None:
        if recipe.needs is not None and not known and recipe.phase[0].kind != recipe.needs:
            what = "distils from a teacher" if recipe.needs == "teacher" else "needs a pretrained network"
            raise TrainingError(f"recipe {recipe.name} {what} and trains none: give a checkpoint")
        return
    if recipe.needs is None:
        raise TrainingError(f"recipe {recipe.name} distils from no teacher, but one was given ({teacher})")
    spec = load_checkpoint(teacher).spec
    for key, wanted in (("num_classes", dataset.num_classes), ("input_size", list(dataset.input_size))):
        got = spec[key] if key == "num_classes" else list(spec[key])
        if got != wanted:
            raise CheckpointError(f"{teacher}: a teacher for {dataset.name} needs {key} {wanted} (got {got})")


def _check_start(recipe: Recipe, spec: dict[str, Any], plan: Plan, teacher: Path) -> None:
    """Whether SNL's masks can start from the checkpoint that was given."""
    masks = recipe.phase_of("masks")
    if masks is None or masks.start != "pretrain":
        return
    given = load_checkpoint(teacher)
    if given.spec != spec or given.plan != pretrain_plan(recipe, plan):
        what = "model" if given.spec != spec else "plan"
        raise CheckpointError(f"{teacher}: recipe {recipe.name} starts from another {what} than this network's")


def _announcement(run: Run) -> str:
    recipe, parts = run.recipe, run.dataset
    epochs = " + ".join(f"{phase.kind} {phase.epochs}" for phase in recipe.phase)
    asked = "" if recipe.plan.budget is None else f" of {recipe.plan.budget:,} asked"
    if recipe.snl is not None:
        asked = f" to begin with, {recipe.plan.budget:,} asked"
    several = f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
    return (
        f"{recipe.name}: {recipe.model.name} width {recipe.model.width}, {run.plan.drelus:,} DReLUs{asked}; "
        f"{parts.name}, {len(parts.train):,} training, {len(parts.val):,} validation, {len(parts.test):,} test images; "
        f"epochs {epochs}; {run.device}{several}"
    )


def _finish(run: Run) -> None:
    """Measure how the last phase ended on the test split, once, and write how the run ended."""
    folder, kind = run.folder, run.recipe.phase[-1].kind
    end, record = load_checkpoint(folder.phase_end(kind)), folder.record(kind)
    assert record is not None  # a checkpoint that is given takes the place of an earlier phase alone
    chosen, last = record.epoch, len(record.rows)
    test, val = (run.accuracy(end.model.to(run.device), split) for split in ("test", "val"))
    test_last = test
    if chosen != last:
        path = folder.phase_last(kind)
        test_last = run.accuracy(load_checkpoint(path).model.to(run.device), "test") if path.is_file() else None
    accuracies = {"test_accuracy": test, "test_accuracy_last": test_last, "val_accuracy": val}
    run.ranks.from_writer(lambda: _write_end(run, end, accuracies, chosen, last))


def _write_end(run: Run, end: Checkpoint, accuracies: dict[str, float | None], chosen: int, last: int) -> None:
    folder, test, test_last = run.folder, accuracies["test_accuracy"], accuracies["test_accuracy_last"]
    save_checkpoint(folder.final, end.model, end.spec, end.plan, recipe=run.recipe.to_dict(), metrics=accuracies)
    plan = run.plan if run.recipe.snl is None else end.plan
    plan.save(folder.plan)
    run.progress.say(
        f"{run.recipe.name}: {plan.drelus:,} DReLUs, test {_shown(test)} {_beside(chosen, last, test_last)}"
    )
    ended = {"recipe": run.recipe.name, "drelus": plan.drelus, **accuracies, "epoch": chosen, "last_epoch": last}
    ended |= {"sha256": sha256_of(folder.final)}
    folder.write_result({**ended, "artifacts": dict(run.keys), "rows": run.rows})


def _shown(accuracy: float | None) -> str:
    return "not kept" if accuracy is None else f"{100 * accuracy:.2f} %"


def _beside(chosen: int, last: int, accuracy: float | None) -> str:
    """What is said of the last epoch."""
    if chosen == last:
        return "(the last epoch is the chosen one)"
    return f"(epoch {chosen}, chosen on validation; last epoch, {last}: {_shown(accuracy)})"


def _result(run: Run) -> TrainResult:
    ended = run.folder.result()
    assert ended is not None
    return TrainResult(
        run.folder.final,
        Plan.load(run.folder.plan),
        ended.test_accuracy,
        ended.test_accuracy_last,
        ended.val_accuracy,
        ended.rows,
        run.folder.path,
        ended.artifacts,
        run.allowance.trained,
    )
