"""Artifacts: phases that are trained once, checked whenever they are taken, and moved as files."""

import csv
import errno
import json
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepshare import files
from deepshare.checkpoint import load_checkpoint
from deepshare.cli import main
from deepshare.plan import Plan
from deepshare.train import ArtifactError, ArtifactStore, Recipe, TrainingError, TrainingPaused, load_recipe, train
from deepshare.train.artifact_key import difference, phase_keys
from deepshare.train.networks import make_plan, model_spec
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.phase_record import load_record
from deepshare.train.recipe import with_weights
from deepshare.train.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["model.width=2", "data.limit=64", "phase.*.epochs=1", "phase.*.batch_size=32"]
SHARED = ["teacher", "gelu", "switch", "finetune"]
PHASES = ["teacher", "baseline", "finetune"]


def small(*more: str) -> Recipe:
    """Every ReLU, in three phases: nothing tested with it depends on the plan, and making one takes longest."""
    recipe = load_recipe("demo-relu", [*SMALL, *more])
    return replace(recipe, phase=(*recipe.phase, PhaseRecipe("finetune", 1, 32, 0.01, "teacher")))


plans: dict[object, Plan] = {}


def keys(recipe: Recipe, given: dict[str, str] | None = None) -> dict[str, str]:
    if (recipe.plan, recipe.model) not in plans:
        classes, size = (10, (1, 8, 8)) if recipe.data.name == "digits" else (100, (3, 32, 32))
        plans[recipe.plan, recipe.model] = make_plan(recipe, model_spec(recipe.model, classes, size))
    return phase_keys(recipe, plans[recipe.plan, recipe.model], given or {})


def changed(one: Recipe, other: Recipe) -> list[str]:
    """The phases whose keys differ."""
    ours, theirs = keys(one), keys(other)
    assert ours.keys() == theirs.keys()
    return [kind for kind in ours if ours[kind] != theirs[kind]]


@pytest.mark.parametrize(
    ("change", "phases"),
    [
        ("name=another", []),
        ("plan.budget=200", SHARED[1:]),
        ("plan.gamma=2.0", SHARED[1:]),
        ("plan.gamma=1", []),  # 1 and 1.0 are one number
        ("plan.affine=false", SHARED[1:]),
        ("plan.affine_start=uniform", SHARED[1:]),
        ("distill.temperature=2.0", SHARED[1:]),
        ("phase.gelu.lr=0.01", SHARED[1:]),
        ("phase.switch.weight_decay=0.1", ["switch", "finetune"]),
        ("phase.finetune.epochs=2", ["finetune"]),
        ("phase.finetune.distill=teacher", ["finetune"]),
        ("seed=1", SHARED),
        ("data.split_seed=1", SHARED),
        ("data.limit=63", SHARED),
        ("data.augment.crop_padding=2", SHARED),
        ("model.width=4", SHARED),
        ("compute.precision=bf16", SHARED),
        ("phase.teacher.keep=last", SHARED),
    ],
)
def test_a_key_changes_with_what_decides_a_phase_and_with_nothing_else(change, phases):
    assert changed(load_recipe("demo-240", SMALL), load_recipe("demo-240", [*SMALL, change])) == phases


@pytest.mark.parametrize(
    ("change", "phases"),
    [
        ("snl.kappa=1.2", ["masks", "finetune"]),
        ("plan.budget=120", ["masks", "finetune"]),
        ("phase.finetune.lr=0.01", ["finetune"]),
        ("phase.pretrain.lr=0.01", ["pretrain", "masks", "finetune"]),
    ],
)
def test_keys_of_learned_masks(change, phases):
    of = [*SMALL, "plan.budget=100"]
    assert changed(load_recipe("demo-snl-960", of), load_recipe("demo-snl-960", [*of, change])) == phases


def test_published_recipes_share_their_teacher_and_a_given_one_is_its_file():
    weights = [1.0] * 16
    least, most = (with_weights(load_recipe(f"deepshare-table1-{budget}"), weights) for budget in ("6k", "12.9k"))
    assert changed(least, most) == SHARED[1:]
    assert keys(least)["teacher"] == keys(load_recipe("deepshare-table1-baseline"))["teacher"]
    one, other = (keys(least, {"teacher": digest}) for digest in ("aa", "bb"))
    assert one["teacher"] == "sha256:aa"
    assert len({*one.values(), *other.values(), *keys(least).values()}) == 3 * 4


def test_a_difference_is_named():
    assert difference({"a": {"b": 1.0}, "c": [2]}, {"a": {"b": 1}, "c": [2]}) == ""
    assert difference({"a": {"b": 1, "d": 5}}, {"a": {"b": 2, "d": 5}}) == "a.b (1 against 2)"
    assert difference({"a": 1}, {}) == "a (1 against None)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store, the folder of the run that filled it, and its result."""
    folder = tmp_path_factory.mktemp("trained")
    store = ArtifactStore(folder / "artifacts")
    return store, folder / "run", train(small(), folder / "run", artifacts=store)


@pytest.fixture
def store(trained, tmp_path) -> ArtifactStore:
    """A copy to do harm to."""
    return ArtifactStore(shutil.copytree(trained[0].folder, tmp_path / "artifacts"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in load_checkpoint(path).model.state_dict().items()}


def test_what_is_there_is_taken_and_the_run_is_whole_by_itself(trained, store, tmp_path):
    _, folder, result = trained
    again = train(small("name=again"), tmp_path / "again", artifacts=store)
    assert (result.trained, again.trained) == (3, 0)
    assert again.rows == result.rows
    assert rows(tmp_path / "again") == rows(folder)
    assert again.artifacts == result.artifacts == json.loads((folder / "result.json").read_text())["artifacts"]
    assert again.test_accuracy == result.test_accuracy
    log = (tmp_path / "again" / "log.txt").read_text()
    assert log.count("taken from artifact") == 3
    assert f"teacher: taken from artifact {result.artifacts['teacher'][:12]}: epoch 1 of 1, trained for demo-r" in log
    assert "seed 0, in run, 20" in log
    key = result.artifacts["baseline"]
    assert again.phase_checkpoint("baseline").stat().st_ino == store.weights(key).stat().st_ino
    shutil.rmtree(store.folder)
    assert all(weights(again.phase_checkpoint(kind)) == weights(folder / f"{kind}.safetensors") for kind in PHASES)


def test_another_recipe_takes_what_it_shares(trained, store, tmp_path):
    other = train(small("phase.baseline.lr=0.01"), tmp_path / "other", artifacts=store)
    assert other.trained == 2
    assert other.artifacts["teacher"] == trained[2].artifacts["teacher"]
    record = load_record(store.path(other.artifacts["baseline"]) / "artifact.json")
    assert record.inputs == {"teacher": load_record(tmp_path / "other" / "teacher.json").sha256["weights"]}
    assert record.sessions[0].versions.torch == str(torch.__version__)
    assert all(key in store for key in other.artifacts.values())
    moved = shutil.copytree(trained[1], tmp_path / "moved")  # into another run's folder
    for name in ("baseline.safetensors", "baseline.json"):
        shutil.copy(other.run_dir / name, moved)
    fresh = ArtifactStore(tmp_path / "fresh")
    with pytest.raises(ArtifactError, match=r"baseline.json: of another run: .* first difference: phase.lr \(0.05 ag"):
        fresh.adopt(moved)
    assert not fresh.folder.exists()
    (moved / "result.json").unlink()
    with pytest.raises(ArtifactError, match=r"baseline.json: of another run"):
        train(small(), moved, resume=True)


def test_a_phase_that_ended_before_there_was_a_store_is_kept_too(trained, tmp_path):
    folder = shutil.copytree(trained[1], tmp_path / "run")
    (folder / "result.json").unlink()
    fresh = ArtifactStore(tmp_path / "fresh")
    assert train(small(), folder, resume=True, artifacts=fresh).trained == 0
    assert all(key in fresh for key in trained[2].artifacts.values())


def harm(path: Path) -> None:
    """Change one byte, in the place of the file and not in files that share its content."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_artifact_is_refused_and_trained_again_when_it_is_deleted(trained, store, tmp_path):
    key = trained[2].artifacts["baseline"]
    harm(store.weights(key))
    wanted = trained[1].joinpath("baseline.safetensors")
    message = rf"weights.safetensors: damaged.*wanted sha256 {files.sha256_of(wanted)} \(got .*delete .*{key}, and it"
    for resume in (False, True):  # also when it is met again
        with pytest.raises(ArtifactError, match=message):
            train(small(), tmp_path / "run", artifacts=store, resume=resume)
    shutil.rmtree(store.path(key))
    result = train(small(), tmp_path / "run", artifacts=store, resume=True)
    assert result.trained == 1  # the baseline; what comes after it is there, under the same key
    assert store.weights(key).read_bytes() == wanted.read_bytes()


def rewrite(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda own, other: shutil.copy(other / "weights.safetensors", own), "of another run: wanted sha256"),
        (lambda own, other: (shutil.rmtree(own), shutil.copytree(other, own)), "of another artifact: wanted"),
        (lambda own, other: (own / "weights.safetensors").unlink(), "weights.safetensors: no such file"),
        (lambda own, other: (own / "artifact.json").unlink(), "artifact.json: no such file"),
        (lambda own, other: rewrite(own / "artifact.json", version=2), "version must be 1 \\(got 2\\)"),
        (lambda own, other: rewrite(own / "artifact.json", rows={}), "rows must be list"),
        (lambda own, other: rewrite(own / "artifact.json", deciding={"seed": 3}), "what decided it has key"),
        (
            lambda own, other: rewrite(own / "artifact.json", deciding={"seed": float("nan")}),
            "damaged: Out of range float",
        ),
        (lambda own, other: rewrite(own / "artifact.json", epoch=-5), "epoch: wanted one of the 1 in rows, got -5"),
        (lambda own, other: rewrite(own / "artifact.json", epoch=2), "epoch: wanted one of the 1 in rows, got 2"),
        (lambda own, other: rewrite(own / "artifact.json", rows=[]), "rows: wanted at least one"),
        (lambda own, other: rewrite(own / "artifact.json", rows=[1, 2]), "rows\\[0\\]: wanted phase, epoch"),
        (lambda own, other: rewrite(own / "artifact.json", rows=[{"phase": "teacher"}]), "rows\\[0\\]: wanted"),
        (lambda own, other: rewrite(own / "artifact.json", sessions=[]), "sessions: wanted at least one"),
        (lambda own, other: rewrite(own / "artifact.json", sha256={"weights": 1}), "sha256, inputs: wanted text"),
        (lambda own, other: rewrite(own / "artifact.json", sha256={"weights": "", "../x": ""}), "got weights, ../x"),
        (lambda own, other: rewrite(own / "artifact.json", sessions=[{}]), "sessions\\[0\\].began: missing"),
        (lambda own, other: rewrite(own / "artifact.json", sha256={}), "sha256 has no 'weights'"),
        (lambda own, other: rewrite(own / "artifact.json", more=1), "wanted version, key"),
        (lambda own, other: os.truncate(own / "artifact.json", 99), "not JSON"),
    ],
)
def test_a_foreign_or_broken_artifact_is_refused(trained, store, tmp_path, do, message):
    own, other = (store.path(trained[2].artifacts[kind]) for kind in ("teacher", "baseline"))
    do(own, other)
    with pytest.raises(ArtifactError, match=rf"{message}.*delete .*, and it is trained again"):
        store.fetch(own.name, RunFolder(tmp_path), "teacher")
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]


def test_a_run_of_another_machine_is_adopted_and_trains_nothing_here(trained, tmp_path):
    _, folder, result = trained
    moved = shutil.copytree(folder, tmp_path / "moved")
    fresh = ArtifactStore(tmp_path / "fresh")
    assert fresh.adopt(moved) == PHASES
    assert fresh.adopt(moved) == []
    assert train(small(), tmp_path / "here", artifacts=fresh).trained == 0
    assert train(small(), moved, resume=True).rows == result.rows
    with pytest.raises(ArtifactError, match="no run"):
        fresh.adopt(tmp_path)
    harm(moved / "finetune.safetensors")
    another = ArtifactStore(tmp_path / "another")
    with pytest.raises(ArtifactError, match=r"finetune.safetensors: damaged"):
        another.adopt(moved)
    assert not another.folder.exists()


def test_a_given_teacher_is_known_by_its_content(trained, tmp_path):
    _, folder, result = trained
    recipe = replace(small(), phase=small().phase[1:])
    store = ArtifactStore(tmp_path / "artifacts")
    first = train(recipe, tmp_path / "first", teacher=folder / "teacher.safetensors", artifacts=store)
    digest = files.sha256_of(folder / "teacher.safetensors")
    assert first.artifacts["teacher"] == f"sha256:{digest}"
    assert first.artifacts["baseline"] != result.artifacts["baseline"]
    assert weights(first.checkpoint) == weights(result.checkpoint)
    shutil.copy(folder / "teacher.safetensors", tmp_path / "moved.safetensors")
    again = train(recipe, tmp_path / "again", teacher=tmp_path / "moved.safetensors", artifacts=store)
    assert again.trained == 0
    (tmp_path / "again" / "result.json").unlink()
    harm(tmp_path / "again" / "teacher.safetensors")
    with pytest.raises(ArtifactError, match=r"teacher.safetensors: damaged: not the checkpoint that was given"):
        train(recipe, tmp_path / "again", resume=True)


def test_learned_masks_are_taken_with_their_plan(tmp_path):
    recipe = load_recipe("demo-snl-960", [*SMALL, "plan.budget=100", "phase.masks.lr=0.1"])
    recipe = replace(recipe, phase=recipe.phase[:2])
    store = ArtifactStore(tmp_path / "artifacts")
    first = train(recipe, tmp_path / "first", artifacts=store)
    assert load_checkpoint(store.weights(first.artifacts["masks"])).plan == first.plan
    again = train(recipe, tmp_path / "again", artifacts=store)
    assert again.trained == 0
    assert again.plan == first.plan
    assert (tmp_path / "again" / "plan.json").read_bytes() == (tmp_path / "first" / "plan.json").read_bytes()
    (tmp_path / "again" / "result.json").unlink()  # the plan it began with is known still: the keys are the same
    assert train(recipe, tmp_path / "again", resume=True).artifacts == first.artifacts


def test_who_comes_second_waits_and_takes_what_the_first_one_trained(trained, tmp_path):
    full, key = trained[0], trained[2].artifacts["teacher"]
    store, run = ArtifactStore(tmp_path / "artifacts"), tmp_path / "run"
    with store.locked(key, lambda: pytest.fail("nobody holds it")):
        with pytest.raises(TrainingPaused, match="another run still trains this phase"):
            train(small(), run, artifacts=store, max_minutes=1e-9)
        second = ThreadPoolExecutor(1).submit(train, small(), run, artifacts=store, resume=True)
        while (run / "log.txt").read_text().count("teacher: another run trains it; waiting") < 2:
            wait([second], 0.05)
        shutil.copytree(full.path(key), store.path(key))
    assert second.result().trained == 2


def test_the_first_one_to_come_stays_and_a_file_system_without_links_has_copies(trained, tmp_path, monkeypatch):
    _, folder, result = trained

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    fresh = ArtifactStore(tmp_path / "fresh")
    assert fresh.adopt(folder) == PHASES
    path = fresh.weights(result.artifacts["baseline"])
    assert path.read_bytes() == (folder / "baseline.safetensors").read_bytes()
    assert path.stat().st_nlink == 1
    assert fresh.keep_phase(RunFolder(folder), "baseline") is False


def test_a_full_disk_is_one_clear_line_and_what_was_there_stays(tmp_path, capsys):
    """No file above a size can be written, as when a disk is full."""
    run, artifacts = tmp_path / "run", tmp_path / "artifacts"
    (tmp_path / "recipe.toml").write_text(small().to_toml())
    words = ["train", str(tmp_path / "recipe.toml"), "--out", str(run), "--artifacts", str(artifacts)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, hard))
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"deepshare: {run}: the run cannot go on: [Errno 27] cannot be written: File too large" in said
    assert f"{run}/teacher.safetensors'; what was saved stays, resume goes on from it" in said
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    assert main([*words, "--resume"]) == 0


@pytest.mark.parametrize("name", ["replace", pytest.param("rename", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_rename_loses_nothing(trained, store, tmp_path, monkeypatch, name):
    """Whatever comes next fails once; each call goes further than the one before, until all is there."""
    count, at, real = 0, 0, getattr(os, name)

    def fill(source: object, target: object) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    shutil.rmtree(store.path(trained[2].artifacts["finetune"]))
    monkeypatch.setattr(os, name, fill)
    for at in range(1, 60, 4):  # noqa: B007 - read by fill
        count = 0
        try:
            result = train(small(), tmp_path / "run", artifacts=store, resume=True, checkpoint_seconds=0)
        except TrainingError as error:
            assert "No space left on device" in str(error)  # noqa: PT017 - the last call does not come to it
        else:
            break
    assert at > 4
    assert weights(result.checkpoint) == weights(trained[2].checkpoint)
    assert all(key in store for key in result.artifacts.values())
    assert [path for path in store.folder.glob("*/.*") if path.parent.name != ".locks"] == []


def test_a_run_folder_of_another_format_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained[1], tmp_path / "run")
    rewrite(folder / "run.json", format=3)
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(f"unheard_of = 1\n{recipe}")
    for use in (lambda: train(small(), folder, resume=True), lambda: ArtifactStore(tmp_path / "new").adopt(folder)):
        with pytest.raises(TrainingError, match=r"of a newer deepshare \(format 3, this one's is 2\); go on with"):
            use()
    (folder / "recipe.toml").write_text(recipe)
    (folder / "run.json").unlink()
    with pytest.raises(TrainingError, match=r"of another deepshare \(format 1, this one's is 2\)"):
        train(small(), folder, resume=True)
    plan = json.dumps(json.loads((trained[1] / "run.json").read_text())["plan"])
    begun = f'{{"format": 2, "plan": {plan}'
    for text in ("[]", "{", '{"format": 2, "plan": {}}', f"{begun}}}", f'{begun}, "given": {{"teacher": 1}}}}'):
        (folder / "run.json").write_text(text)
        with pytest.raises(TrainingError, match=r"run.json: damaged"):
            train(small(), folder, resume=True)
    shutil.copy(trained[1] / "run.json", folder)
    for text in ("{", "[]", "{}", '{"test_accuracy": 1.0, "artifacts": {}, "rows": [1]}'):
        (folder / "result.json").write_text(text)
        with pytest.raises(TrainingError, match=r"result.json: damaged; delete it"):
            train(small(), folder, resume=True)
    (folder / "result.json").unlink()
    assert train(small(), folder, resume=True).test_accuracy == trained[2].test_accuracy
