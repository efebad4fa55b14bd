"""Runs in slices, checkpoints now and then, and the last epoch beside the chosen one."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from deepshare import data
from deepshare.checkpoint import load_checkpoint, save_checkpoint
from deepshare.cli import main
from deepshare.nn import LearnedMask
from deepshare.train import (
    ArtifactStore,
    Recipe,
    TrainingError,
    TrainingPaused,
    artifacts,
    load_recipe,
    phases,
    run,
    slices,
    train,
)
from deepshare.train.checkpoints import Checkpoints, State
from deepshare.train.loop import evaluate, make_optimizer
from deepshare.train.networks import fresh, make_plan, model_spec
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.progress import Progress
from deepshare.train.recipe import with_weights
from deepshare.train.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["model.width=2", "data.limit=64", "phase.*.epochs=2", "phase.*.batch_size=32"]
SLICE = 1e-9  # minutes in which nothing fits


def small() -> Recipe:
    recipe = load_recipe("demo-relu", SMALL)
    return replace(recipe, phase=(*recipe.phase, PhaseRecipe("finetune", 2, 32, 0.01, "teacher")))


def masked() -> Recipe:
    recipe = load_recipe("demo-snl-960", [*SMALL, "plan.budget=100", "phase.masks.lr=0.1", "phase.pretrain.epochs=1"])
    return replace(recipe, phase=recipe.phase[:2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    return train(small(), tmp_path_factory.mktemp("whole") / "run")


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended in the same files, whatever the time they took."""
    names = [path.name for path in one.glob("*.safetensors")]
    assert sorted(names) == sorted(path.name for path in other.glob("*.safetensors"))
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def sliced(recipe: Recipe, run: Path) -> list[tuple[str, int, int]]:
    """Train in calls of one epoch, each in a folder of another name; where the pauses were, and what was left."""
    pauses = []
    for number in range(20):
        try:
            train(recipe, run / str(number), resume=True, max_minutes=SLICE)
            (run / str(number)).rename(run / "end")
            return pauses
        except TrainingPaused as pause:
            pauses.append((pause.phase, pause.epoch, pause.left))
            (run / str(number)).rename(run / str(number + 1))
            recipe = load_recipe(run / str(number + 1) / "recipe.toml")
    raise AssertionError(pauses)


def test_a_run_in_slices_of_one_epoch_that_moves_ends_in_the_same_bits(whole, tmp_path):
    pauses = sliced(small(), tmp_path)
    assert pauses == [
        ("teacher", 1, 5), ("baseline", 0, 4), ("baseline", 1, 3), ("finetune", 0, 2), ("finetune", 1, 1),
    ]  # fmt: skip
    assert same(tmp_path / "end", whole.run_dir)
    record = json.loads((tmp_path / "end" / "teacher.json").read_text())
    assert [session["first_epoch"] for session in record["sessions"]] == [1, 2]
    assert ArtifactStore(tmp_path / "artifacts").adopt(tmp_path / "end") == ["teacher", "baseline", "finetune"]
    again = train(small(), tmp_path / "again", artifacts=ArtifactStore(tmp_path / "artifacts"))
    assert again.trained == 0
    untimed = [{key: value for key, value in row.items() if "second" not in key} for row in again.rows]
    assert untimed == [{key: value for key, value in row.items() if "second" not in key} for row in whole.rows]


@pytest.mark.slow
def test_learned_masks_in_slices_end_in_the_same_bits(tmp_path):
    train(masked(), tmp_path / "whole")
    assert sliced(masked(), tmp_path) == [("masks", 0, 2), ("masks", 1, 1)]
    assert same(tmp_path / "end", tmp_path / "whole")
    assert (tmp_path / "end" / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


def test_a_command_exits_with_75_and_goes_on_elsewhere_with_nothing_but_its_folder(whole, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(small().to_toml())
    words = ["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    assert main([*words, "--artifacts", str(tmp_path / "artifacts"), "--max-minutes", "1e-9"]) == 75
    assert capsys.readouterr().err == (
        "deepshare: paused in teacher after epoch 1 of 2, 5 epochs are left: the next epoch would not fit\n"
    )
    assert main(words) == 2  # as ever: only with --resume
    assert main([*words, "--max-minutes", "0", "--resume"]) == 2
    assert "max_minutes: wanted above 0 and finite, got 0.0" in capsys.readouterr().err
    run = Path(shutil.copytree(tmp_path / "run", tmp_path / "there" / "run"))
    for name in ("run", "artifacts"):
        shutil.rmtree(tmp_path / name)
    assert main(["train", str(run / "recipe.toml"), "--out", str(run), "--resume"]) == 0
    assert same(run, whole.run_dir)


def test_an_epoch_fits_if_one_like_the_last_would_end_in_time(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(slices.time, "monotonic", lambda: now)
    allowance = slices.Allowance(1.0)
    fitted = []
    for seconds in (20, 15, 15):
        fitted.append(allowance.fits_another)
        allowance.begin_epoch()
        now += seconds
        allowance.end_epoch()
    assert fitted == [True, True, True]
    assert not allowance.fits_another  # 50 of 60 s are gone, the last one took 15
    assert not allowance.over
    now += 11
    assert allowance.over
    assert slices.Allowance(None).fits_another
    late = slices.Allowance(1e-6)
    now += 60
    assert late.fits_another  # every call trains one


def test_who_waited_in_vain_trains_only_if_time_is_not_limited(tmp_path, monkeypatch):
    """Another run lets go of the phase before its end, as in a pause."""
    one, store, free = replace(small(), phase=small().phase[:1]), ArtifactStore(tmp_path / "artifacts"), []
    monkeypatch.setattr(artifacts, "_lock", lambda _: free.pop(0))
    free[:] = [False, True]
    with pytest.raises(TrainingPaused, match="paused in teacher after epoch 0 of 2, 2 epochs are left: the other run"):
        train(one, tmp_path / "run", artifacts=store, max_minutes=60)
    free[:] = [False, True]
    assert train(one, tmp_path / "run", artifacts=store, resume=True).trained == 2


def test_checkpoints_are_seldom_and_what_a_kill_loses_is_trained_again(whole, tmp_path, monkeypatch):
    saved, save, step = [], Checkpoints.save, Progress.after_step

    def note(self: Checkpoints, state: State, *writers: object) -> None:
        saved.append((state.phase, state.epoch))
        save(self, state, *writers)

    def die(self: Progress, *arguments: object) -> None:
        if self.at == "finetune 2/2":
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", note)
    monkeypatch.setattr(Progress, "after_step", die)
    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path / "run")
    assert saved == []
    monkeypatch.setattr(Progress, "after_step", step)
    assert train(small(), tmp_path / "run", resume=True, checkpoint_seconds=0).trained == 2
    assert saved == [("finetune", 1), ("finetune", 2)]
    assert same(tmp_path / "run", whole.run_dir)


def with_falling_accuracy(monkeypatch) -> None:
    """The first epoch of a phase is its best on validation."""
    accuracies = iter([0.9, 0.5] * 9)
    monkeypatch.setattr(phases, "validate", lambda *_: next(accuracies))


def test_the_last_epoch_is_measured_beside_the_one_that_validation_chose(whole, tmp_path, monkeypatch):
    assert json.loads((whole.run_dir / "result.json").read_text())["last_epoch"] == 2
    with_falling_accuracy(monkeypatch)
    result = train(small(), tmp_path / "run")
    digits, finetune = data.load("digits", limit=64), tmp_path / "run" / "finetune.safetensors"
    chosen, last = (load_checkpoint(path) for path in (finetune, finetune.with_name("finetune-last.safetensors")))
    assert (chosen.metrics["epoch"], last.metrics["epoch"]) == (1, 2)
    assert not torch.equal(chosen.model.fc.weight, last.model.fc.weight)
    assert result.test_accuracy == evaluate(chosen.model, digits.batches("test", 64))
    assert result.test_accuracy_last == evaluate(last.model, digits.batches("test", 64))
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (written["epoch"], written["last_epoch"]) == (1, 2)
    assert written["test_accuracy_last"] == result.test_accuracy_last
    assert "(epoch 1, chosen on validation; last epoch, 2: " in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "teacher-last.safetensors").is_file()  # a recipe may end with its teacher


def checkpoints_are_whole_or_refused(folder: Path) -> None:
    """Those of a teacher's only epoch, which is its best: on a missing or altered file nothing is loaded or dropped."""
    state, files = folder / "teacher-0001" / "state.pt", sorted(folder.rglob("*"))
    for path in (folder / "teacher-0001" / "weights.safetensors", folder / "teacher-best-0001.safetensors"):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(TrainingError, match=rf"{path}: no such file; .* from {state.parent}; bring the file back"):
            Checkpoints(folder).newest("teacher")
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            TrainingError, match=rf"{path}: damaged: wanted sha256 \w+ \(got \w+\); the run cannot go on"
        ):
            Checkpoints(folder).newest("teacher")
        path.write_bytes(whole)
        assert sorted(folder.rglob("*")) == files
    known = torch.load(state)
    assert Checkpoints(folder).newest("teacher").sha256 == known.pop("sha256")
    torch.save(known, state)  # as it was before there were hashes
    assert Checkpoints(folder).newest("teacher").epoch == 1
    state.unlink()
    assert Checkpoints(folder).newest("teacher") is None


def test_a_best_epoch_in_memory_or_on_disk_goes_on_and_the_last_one_may_be_left_out(tmp_path, monkeypatch):
    one = replace(small(), phase=small().phase[:1])
    store = ArtifactStore(tmp_path / "artifacts")
    with_falling_accuracy(monkeypatch)
    train(one, tmp_path / "memory", artifacts=store)
    with_falling_accuracy(monkeypatch)
    train(one, tmp_path / "disk", checkpoint_seconds=0)
    with_falling_accuracy(monkeypatch)
    with pytest.raises(TrainingPaused):
        train(one, tmp_path / "paused", max_minutes=SLICE)
    assert len(list((tmp_path / "paused" / "checkpoints").iterdir())) == 2
    checkpoints_are_whole_or_refused(Path(shutil.copytree(tmp_path / "paused" / "checkpoints", tmp_path / "moved")))
    paused = train(one, tmp_path / "paused", resume=True)
    assert same(tmp_path / "memory", tmp_path / "disk")
    assert same(tmp_path / "memory", tmp_path / "paused")
    record = RunFolder(tmp_path / "disk").record("teacher")
    assert (record.epoch, sorted(record.sha256)) == (1, ["last", "weights"])
    (store.path(record.key) / "last.safetensors").unlink()
    light = train(one, tmp_path / "light", artifacts=store)
    assert (light.trained, light.test_accuracy_last) == (0, None)
    assert light.test_accuracy == paused.test_accuracy
    assert "last epoch, 2: not kept" in (tmp_path / "light" / "log.txt").read_text()


def test_where_the_last_epoch_is_the_chosen_one_it_is_measured_once(tmp_path, monkeypatch):
    accuracies, measured = iter([0.5, 0.9]), []
    monkeypatch.setattr(phases, "validate", lambda *_: next(accuracies))
    monkeypatch.setattr(run, "evaluate", lambda *arguments: measured.append(0.25 * len(measured)) or measured[-1])
    result = train(replace(small(), phase=small().phase[:1]), tmp_path / "run")
    assert measured == [0, 0.25]  # test and validation
    assert (result.test_accuracy, result.test_accuracy_last, result.val_accuracy) == (0, 0, 0.25)
    assert "the last epoch is the chosen one" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "teacher-last.safetensors").exists()


@pytest.mark.parametrize("kind", ["gelu", "masks"])
def test_a_checkpoint_of_resnet18_can_travel(tmp_path, kind):
    """Weights, optimizer state and the best epoch at full size: under 150 MB, images not among them."""
    name = "deepshare-table1-12.9k" if kind == "gelu" else "snl-table2-12.9k"
    recipe = load_recipe(name)
    recipe = with_weights(recipe, [1.0] * 16) if kind == "gelu" else recipe
    spec = model_spec(recipe.model, 100, (3, 32, 32))
    plan = make_plan(recipe, spec)
    model, phase, masks = fresh(recipe, spec, plan, kind), recipe.phase_of(kind), nn.ModuleDict()
    if kind == "masks":
        masks = nn.ModuleDict({str(number): LearnedMask(site.shape) for number, site in enumerate(plan)})
    learned = nn.ModuleList([model, masks])
    optimizer = make_optimizer(learned, phase)
    for value in learned.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    values = {name: mask.mask.detach() for name, mask in masks.items()}
    state = State(kind, 2, optimizer.state_dict(), best_epoch=int(kind == "gelu"), masks={"values": values})
    checkpoints = Checkpoints(tmp_path)
    write = partial(save_checkpoint, model=model, spec=spec, plan=plan, recipe=recipe.to_dict())
    checkpoints.save(state, write, write if kind == "gelu" else None)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    parameters = sum(value.numel() for value in learned.parameters())
    assert 3 * 4 * parameters < size < 150e6
    assert len(checkpoints.newest(kind).optimizer["state"]) == len(list(learned.parameters()))
