"""Whole small runs on the digits."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepshare import data, models
from deepshare.checkpoint import CheckpointError, load_checkpoint
from deepshare.plan import Plan
from deepshare.train import Recipe, RecipeError, TrainingError, load_recipe, networks, progress, train, trainer
from deepshare.train.loop import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["model.width=4", "data.limit=128", "phase.*.epochs=2", "phase.*.batch_size=32"]


def small(name: str = "demo-240", *more: str) -> Recipe:
    return load_recipe(name, [*SMALL, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of all four phases, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    return train(small("demo-240", "phase.switch.epochs=4", "phase.switch.hold=1"), folder), folder


def test_a_run_leaves_all_it_promises(finished):
    result, folder = finished
    names = {".lock", "recipe.toml", "run.json", "plan.json", "metrics.csv", "log.txt", "result.json"}
    names |= {"final.safetensors", "checkpoints"}
    names |= {f"{phase}.{kind}" for phase in result.artifacts for kind in ("safetensors", "json")}
    assert list(result.artifacts) == ["teacher", "gelu", "switch", "finetune"]
    assert {path.name for path in folder.iterdir()} == names
    assert list((folder / "checkpoints").iterdir()) == []
    assert Plan.load(folder / "plan.json") == result.plan
    assert 85 <= result.plan.drelus <= 240
    assert json.loads((folder / "result.json").read_text())["test_accuracy"] == result.test_accuracy
    log = (folder / "log.txt").read_text()
    assert log.count("\n") == 2 + 10
    assert f"width 4, {result.plan.drelus} DReLUs of 240 asked; digits, 128 training" in log
    assert all(word in log for word in ("loss", "val", "lr", "DReLUs", "soft channels", "images/s", "ETA"))


def test_metrics_have_one_row_an_epoch_and_the_switch_goes_down_to_none(finished):
    result, folder = finished
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["phase"], int(row["epoch"])) for row in rows] == [
        *(("teacher", epoch) for epoch in (1, 2)),
        *(("gelu", epoch) for epoch in (1, 2)),
        *(("switch", epoch) for epoch in (1, 2, 3, 4)),
        *(("finetune", epoch) for epoch in (1, 2)),
    ]
    channels = 4 * (4 + 8 + 16 + 32)
    soft = [int(row["soft_channels"]) for row in rows]
    assert soft[:4] == [0, 0, channels, channels]
    assert channels > soft[4] > soft[5] > soft[6] == soft[7] == soft[8] == 0  # the fourth epoch only holds
    drelus = [int(row["drelus"]) for row in rows]
    assert drelus[:4] == [0] * 4
    assert drelus[6:] == [result.plan.drelus] * 4
    assert [float(row["lr"]) for row in rows[4:8]] == [small().phase[2].lr] * 4
    assert all(math.isfinite(float(row["loss"])) for row in rows)


def test_the_final_checkpoint_is_the_hard_network_with_the_reported_accuracy(finished):
    result, folder = finished
    checkpoint = load_checkpoint(result.checkpoint)
    assert checkpoint.plan == result.plan
    assert networks.soft_channels(checkpoint.model) == 0
    digits = data.load("digits", limit=128)
    assert evaluate(checkpoint.model, digits.batches("test", 64)) == result.test_accuracy
    assert checkpoint.recipe == load_recipe(folder / "recipe.toml").to_dict()
    soft = load_checkpoint(result.phase_checkpoint("gelu")).model
    assert networks.soft_channels(soft) == 240
    teacher = load_checkpoint(result.phase_checkpoint("teacher"))
    assert {site.kind for site in teacher.plan} == {"gelu"}


def test_the_best_epoch_on_validation_goes_on(finished):
    result, _ = finished
    for phase in ("teacher", "gelu", "finetune"):
        kept = load_checkpoint(result.phase_checkpoint(phase)).metrics
        best = max(row["val_accuracy"] for row in result.rows if row["phase"] == phase)
        assert kept["val_accuracy"] == best
    assert load_checkpoint(result.phase_checkpoint("switch")).metrics["epoch"] == 4


def test_a_phase_moves_every_weight_and_alpha_and_beta_with_them(finished):
    result, _ = finished
    before = load_checkpoint(result.phase_checkpoint("gelu")).model.state_dict()
    after = load_checkpoint(result.checkpoint).model.state_dict()
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    fixed = ("pi", "gamma")
    assert [name for name in still if not name.endswith(fixed)] == []


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).model.state_dict()


def test_equal_recipes_end_in_equal_weights_and_other_seeds_do_not(tmp_path):
    short = small("demo-relu", "phase.*.epochs=1")
    first, second = train(short, tmp_path / "a"), train(short, tmp_path / "b")
    assert all(map(torch.equal, weights(first.checkpoint).values(), weights(second.checkpoint).values()))
    other = train(small("demo-relu", "phase.*.epochs=1", "seed=1"), tmp_path / "c")
    ours, theirs = weights(first.checkpoint), weights(other.checkpoint)
    assert not torch.equal(ours["conv1.weight"], theirs["conv1.weight"])


def test_a_given_teacher_takes_the_place_of_its_phase(finished, tmp_path):
    result, _ = finished
    teacher = result.phase_checkpoint("teacher")
    student = train(small("demo-relu"), tmp_path / "run", teacher=teacher)
    assert [row["phase"] for row in student.rows] == ["baseline", "baseline"]
    assert student.phase_checkpoint("teacher").read_bytes() == teacher.read_bytes()
    assert student.plan.drelus == 1920


def test_a_teacher_can_be_all_a_recipe_trains(tmp_path):
    file = tmp_path / "teacher.toml"
    file.write_text(small("demo-relu", "phase.*.epochs=1").to_toml().rpartition("[[phase]]")[0])
    result = train(file, tmp_path / "run")
    assert {site.kind for site in load_checkpoint(result.checkpoint).plan} == {"gelu"}
    assert [row["phase"] for row in result.rows] == ["teacher"]


def test_affine_off_leaves_alpha_and_beta_alone(finished, tmp_path):
    teacher = finished[0].phase_checkpoint("teacher")
    changes = ("plan.affine=false", "plan.gamma=4", "phase.*.epochs=1")
    final = load_checkpoint(train(small("demo-240", *changes), tmp_path / "run", teacher=teacher).checkpoint).model
    for gate in networks.shared_gates(final):
        assert torch.equal(gate.alpha, torch.ones_like(gate.alpha))
        assert torch.equal(gate.beta, torch.zeros_like(gate.beta))
        assert float(gate.gamma) == 4


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_there(finished, tmp_path):
    teacher = finished[0].phase_checkpoint("teacher")
    changes = ("phase.gelu.lr=1e30", "phase.gelu.lr_end=1e30")
    with pytest.raises(TrainingError, match=r"gelu, epoch 1: the loss is (nan|inf); lower phase.gelu.lr"):
        train(small("demo-240", *changes), tmp_path / "run", teacher=teacher)
    assert not (tmp_path / "run" / "gelu.safetensors").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_run_is_not_begun_over_another(finished, tmp_path):
    _, folder = finished
    recipe = load_recipe(folder / "recipe.toml")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(TrainingError, match="there is a run already; resume"):
        train(recipe, folder)
    with pytest.raises(TrainingError, match=r"another recipe; first difference: phase.gelu.lr \(0.05 against 0.5\)"):
        train(load_recipe(folder / "recipe.toml", ["phase.gelu.lr=0.5"]), folder, resume=True)
    with pytest.raises(TrainingError, match="another teacher"):
        train(recipe, folder, resume=True, teacher=folder / "gelu.safetensors")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("do not touch")
    for resume in (False, True):
        with pytest.raises(TrainingError, match="is no run"):
            train(recipe, foreign, resume=resume)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_train_in_one_folder(finished, tmp_path):
    _, folder = finished
    recipe = load_recipe(folder / "recipe.toml")
    lock = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", lock, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        saving = folder / "checkpoints" / ".saving-theirs"
        saving.mkdir()
        with pytest.raises(TrainingError, match=r"small: another process trains here"):
            train(recipe, folder, resume=True)
        assert saving.is_dir()
        other.kill()
    train(recipe, folder, resume=True)
    assert not saving.exists()


def test_a_run_that_another_process_began_meanwhile_is_not_taken_over(tmp_path, monkeypatch):
    make_plan = trainer.make_plan

    def begin_meanwhile(recipe, spec, known):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.toml").write_text(small("demo-relu", "seed=7").to_toml())
        return make_plan(recipe, spec, known)

    monkeypatch.setattr(trainer, "make_plan", begin_meanwhile)
    with pytest.raises(TrainingError, match="there is a run already"):
        train(small("demo-relu", "phase.*.epochs=1"), tmp_path / "run")


def test_a_finished_run_is_returned_as_it_is(finished):
    result, folder = finished
    before = result.checkpoint.stat().st_mtime_ns
    again = train(load_recipe(folder / "recipe.toml"), folder, resume=True)
    assert (again.test_accuracy, again.rows) == (result.test_accuracy, result.rows)
    assert result.checkpoint.stat().st_mtime_ns == before


def test_a_run_that_ended_without_its_network_is_refused(finished, tmp_path):
    ended, original = finished
    folder = shutil.copytree(original, tmp_path / "run")
    recipe, final, result = folder / "recipe.toml", folder / "final.safetensors", folder / "result.json"
    whole = final.read_bytes()
    final.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for said in ("damaged: wanted sha256", "no such file"):
        with pytest.raises(TrainingError, match=rf"{final}: {said}.*; delete {result}, and it is made again"):
            train(recipe, folder, resume=True)
        final.unlink(missing_ok=True)
    result.unlink()
    assert train(recipe, folder, resume=True).trained == 0
    assert final.read_bytes() == whole
    result.write_text(json.dumps(json.loads(result.read_text()) | {"sha256": None}))  # as before there was a hash
    assert train(recipe, folder, resume=True).rows == ended.rows


def test_what_cannot_work_is_refused_before_anything_is_written(finished, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RecipeError, match="budget"):
        train(small("demo-240", "plan.budget=84"), run)
    with pytest.raises(RecipeError, match="resnet19"):
        train(small("demo-240", "model.name=resnet19"), run)
    with pytest.raises(data.DataError, match="cifar-100-python"):
        train(load_recipe("deepshare-table1-6k"), run)
    with pytest.raises(CheckpointError):
        train(small(), run, teacher=tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="num_classes"):
        train(small(), run, teacher=_teacher_for(7, tmp_path))
    alone = tmp_path / "alone.toml"
    head, _, rest = small("demo-relu", "phase.baseline.distill=none").to_toml().partition("[[phase]]")
    alone.write_text(head + "[[phase]]" + rest.partition("[[phase]]")[2])
    with pytest.raises(TrainingError, match="distils from no teacher"):
        train(alone, run, teacher=finished[0].phase_checkpoint("teacher"))
    killed = tmp_path / "killed"  # while it began with a teacher
    killed.mkdir()
    shutil.copy(finished[0].phase_checkpoint("teacher"), killed)
    for folder in (run, killed):
        with pytest.raises(TrainingError, match="give a checkpoint"):
            train(load_recipe(alone, ["phase.baseline.distill=teacher"]), folder)
    assert [path.name for path in killed.iterdir()] == ["teacher.safetensors"]
    for device in ("abacus", "meta", "cpu:-2") if torch.cuda.is_available() else ("abacus", "meta", "cuda"):
        with pytest.raises(TrainingError, match=f"device '{device}'"):
            train(small(), run, device=device)
    for changes, words in (
        (["data.val_fraction=0.0001"], 'phase.teacher.keep "best" needs a validation image'),
        (["data.augment.brightness=0.1"], "colour jitter needs RGB"),
        (["data.augment.crop_padding=1000000000000"], "crop_padding=1000000000000.* cannot be applied"),
    ):
        with pytest.raises((RecipeError, data.DataError), match=words):
            train(small("demo-240", *changes), run)
    assert not run.exists()


def test_one_training_image_is_refused_before_anything_is_written(tmp_path):
    lone = small("demo-relu", "data.val_fraction=0.999")
    with pytest.raises(RecipeError, match=r"wanted at least 2 training images, data.val_fraction 0.999 leaves 1"):
        train(replace(lone, data=replace(lone.data, limit=None)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_a_run_without_validation_images_ends_with_null(tmp_path):
    changes = ("phase.*.epochs=1", "phase.*.keep=last", "data.val_fraction=0")
    result = train(small("demo-relu", *changes), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=refuse_constant)
    assert written["val_accuracy"] is result.val_accuracy is written["rows"][0]["val_accuracy"] is None
    assert "nan" not in (tmp_path / "run" / "metrics.csv").read_text()
    assert load_checkpoint(result.checkpoint).metrics["val_accuracy"] is None
    assert "val none" in (tmp_path / "run" / "log.txt").read_text()


def _teacher_for(num_classes: int, folder: Path) -> Path:
    from deepshare.checkpoint import save_checkpoint

    spec = {"name": "resnet18", "num_classes": num_classes, "width": 4, "stem_relu": False, "in_channels": 1}
    model = models.create(**spec)
    plan = Plan.of(model, (1, 8, 8))
    return save_checkpoint(folder / "other.safetensors", model, {**spec, "input_size": [1, 8, 8]}, plan)


@pytest.mark.parametrize("opened", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path, opened):
    reader, writer = opened()
    with os.fdopen(writer, "w") as stream:
        shown = progress.Progress(tmp_path / "log.txt", stream)
        shown.say("one")
        assert b"one" in os.read(reader, 100)
        os.close(reader)
        shown.say("two")
        shown.say("three")
        print("what the command says at its end", file=stream, flush=True)
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\nthree\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_budget_of_every_channel_is_every_channel_and_more_is_refused():
    recipe = small("demo-240", "plan.budget=1920", "plan.group=1")
    spec = networks.model_spec(recipe.model, 10, (1, 8, 8))
    plan = networks.make_plan(recipe, spec)
    assert [site.prototypes for site in plan] == [site.channels for site in plan]
    assert plan.drelus == 1920
    with pytest.raises(RecipeError, match="wanted at most the 1,920 ReLUs of the network, got 1,921"):
        networks.make_plan(small("demo-240", "plan.budget=1921", "plan.group=1"), spec)


def test_a_terminal_sees_the_running_loss_and_the_log_only_whole_epochs(tmp_path, monkeypatch):
    now = iter([0.0, 10.0, 10.2, 11.0, 12.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    terminal = Terminal()
    shown = progress.Progress(tmp_path / "log.txt", terminal)
    shown.left = 3
    shown.start_epoch("gelu", 1, 3, steps=4, images=400)
    shown.after_step(1, torch.tensor(2.0))  # 0.2 s after the start: too soon to wait for the device
    assert terminal.getvalue() == ""
    shown.after_step(2, torch.tensor(3.0))
    assert "gelu     1/3  step 2/4  loss 1.5000  200 images/s" in terminal.getvalue()
    row = {"loss": 1.25, "val_accuracy": 0.5, "lr": 0.1, "drelus": 1234, "soft_channels": 7, "images_per_second": 99.6}
    shown.end_epoch(row)
    line = "gelu     1/3  loss 1.2500  val 50.00 %  lr 0.1  DReLUs 1,234  soft channels 7  100 images/s  ETA 0:04"
    assert (tmp_path / "log.txt").read_text() == line + "\n"
    assert line in terminal.getvalue()
