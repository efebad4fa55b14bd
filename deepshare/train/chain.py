"""Phase after phase: each is taken from the store of artifacts, or trained and kept there."""

from contextlib import ExitStack
from functools import partial

from deepshare.checkpoint import load_checkpoint
from deepshare.files import sha256_of
from deepshare.train.artifact_key import GIVEN, deciding
from deepshare.train.artifacts import ArtifactStore, check_phase
from deepshare.train.checkpoints import State
from deepshare.train.errors import ArtifactError, TrainingPaused
from deepshare.train.mask_phase import run_masks
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.phases import run_phase
from deepshare.train.run import Run


def run_chain(run: Run, store: ArtifactStore | None) -> None:
    """Bring every phase of the run to its end; run.rows has all their rows then.

    Raises ArtifactError: one that ended here, or is in the store, is damaged or of another run. And as the phases do.
    """
    ranks = run.ranks
    ended = ranks.from_writer(partial(_ended, run))
    run.progress.left = sum(phase.epochs for phase in run.recipe.phase if phase.kind not in ended)
    for phase in run.recipe.phase:
        if phase.kind not in ended:
            _bring_to_end(run, phase, store)
        elif store is not None:
            ranks.from_writer(partial(store.keep_phase, run.folder, phase.kind))
        if phase.kind == "masks":
            ranks.from_writer(partial(_save_plan, run))
        if (record := run.folder.record(phase.kind)) is not None:
            run.rows.extend(record.rows)
    ranks.from_writer(lambda: run.folder.write_metrics(run.rows))
    ranks.from_writer(run.folder.checkpoints.clear)


def _ended(run: Run) -> list[str]:
    """The phases that were given or ended here before, undamaged."""
    _check_given(run)
    return [phase.kind for phase in run.recipe.phase if _has_ended(run, phase.kind)]


def _check_given(run: Run) -> None:
    for kind, key in run.keys.items():
        path = run.folder.phase_end(kind)
        if key.startswith(GIVEN) and (not path.is_file() or GIVEN + sha256_of(path) != key):
            raise ArtifactError(f"{path}: damaged: not the checkpoint that was given, of {key}")


def _has_ended(run: Run, kind: str) -> bool:
    """Whether the phase was given, or ended here before; files that were damaged since are refused."""
    if run.folder.record(kind) is None:
        return run.keys[kind].startswith(GIVEN)
    check_phase(run.folder, kind, deciding(run.recipe, kind, run.plan, run.keys))
    return True


def _bring_to_end(run: Run, phase: PhaseRecipe, store: ArtifactStore | None) -> None:
    with ExitStack() as held:  # by the first rank, for all
        if not run.ranks.from_writer(lambda: _take(run, phase, store, held)):
            _train(run, phase)
            if store is not None:
                run.ranks.from_writer(partial(store.keep_phase, run.folder, phase.kind))


def _save_plan(run: Run) -> None:
    load_checkpoint(run.folder.phase_end("masks")).plan.save(run.folder.plan)


def _alone(run: Run, phase: PhaseRecipe, store: ArtifactStore, held: ExitStack) -> bool:
    """Nobody else trains this phase while `held` is open. Whether somebody did before, for whom this run waited."""
    waited = False

    def waiting() -> None:
        nonlocal waited
        if not waited:
            run.progress.say(f"{phase.kind}: another run trains it; waiting")
            waited = True
        run.ranks.not_yet()
        if run.allowance.over:
            raise _pause(run, phase, "another run still trains this phase")

    held.enter_context(store.locked(run.keys[phase.kind], waiting))
    return waited


def _pause(run: Run, phase: PhaseRecipe, reason: str) -> TrainingPaused:
    return TrainingPaused(phase.kind, 0, phase.epochs, run.progress.left, reason)


def _take(run: Run, phase: PhaseRecipe, store: ArtifactStore | None, held: ExitStack) -> bool:
    """Whether the phase was taken from the store; if not, it is ours to train, for as long as `held` is open.

    Who comes second waits and takes what the first one made. If that one stopped before the end, in a call whose time
    is limited, it most likely had none left, and neither has this run.
    """
    if store is None:
        return False
    waited = _alone(run, phase, store, held)
    record = store.fetch(run.keys[phase.kind], run.folder, phase.kind)
    if record is None:
        if waited and run.allowance.ends:
            raise _pause(run, phase, "the other run that trained this phase stopped before its end")
        return False
    run.progress.left -= phase.epochs
    trained = record.sessions[-1]
    run.progress.say(
        f"{phase.kind}: taken from artifact {record.key[:12]}: epoch {record.epoch} of {len(record.rows)}, trained for "
        f"{record.run}, {trained.began}, {trained.machine}"
    )
    return True


def _train(run: Run, phase: PhaseRecipe) -> None:
    state = run.ranks.from_writer(partial(_resumed, run, phase.kind))
    run_this = run_masks if phase.kind == "masks" else run_phase
    run_this(run, phase, state or State(phase.kind))


def _resumed(run: Run, kind: str) -> State | None:
    state = run.folder.checkpoints.newest(kind)
    if state is not None:
        run.progress.say(f"resumed after {kind}, epoch {state.epoch}")
        run.progress.left -= state.epoch
        run.folder.write_metrics((*run.rows, *state.rows))
    return state
