"""Chains of tiny runs on the digits: reuse, pauses, moves between machines, failures, runs side by side."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from reproduce_cases import comparable, counted_steps, write_recipes

from deepshare import cli
from deepshare.budget import weights_of
from deepshare.checkpoint import load_checkpoint
from deepshare.data import DataError
from deepshare.reproduce import Outcome, ReproduceError, jobs, read_results, reproduce
from deepshare.reproduce.chain import Settings
from deepshare.reproduce.runs import runs_of
from deepshare.train import RecipeError
from deepshare.train.distributed import Ranks
from deepshare.train.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, str]:
    return write_recipes(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    """The chain of `share` with two seeds, its folder, and how it ended."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, reproduce([recipes["share"]], seeds=(0, 2), runs=folder / "runs", results=folder / "results")


def test_the_chain_counts_with_its_own_seed_and_leaves_a_result_for_each(whole):
    folder, ended = whole
    assert ended.status == 0
    places = [outcome.run.place for outcome in ended.outcomes]
    assert places == ["snl-masks/seed-0", "share/seed-0", "snl-masks/seed-2", "share/seed-2"]
    results = read_results(folder / "results")
    assert [(result.name, result.seed) for result in results] == [("share", 0), ("share", 2)]
    for result in results:
        masks = load_checkpoint(folder / "runs" / "snl-masks" / f"seed-{result.seed}" / "masks.safetensors")
        assert result.recipe["plan"]["weights"] == [float(count) for count in weights_of(masks.plan).values()]
        assert result.recipe["seed"] == result.counts["seed"] == result.seed
        assert masks.plan.drelus == 150
        assert 0 < result.drelus <= 120
    assert results[0].recipe["plan"]["weights"] != results[1].recipe["plan"]["weights"]
    assert results[0].content == results[1].content
    assert not (folder / "results" / "snl-masks").exists()


def test_a_result_has_what_was_trained_where_and_what_came_of_it(whole):
    folder, _ = whole
    result = read_results(folder / "results", "share")[0]
    kinds = ["gelu", "switch"]
    assert list(result.artifacts) == list(result.seconds) == list(result.sessions) == kinds
    assert all((folder / "runs" / "artifacts" / key[:2] / key).is_dir() for key in result.artifacts.values())
    assert [(row["phase"], row["epoch"]) for row in result.rows] == [
        (kind, epoch) for kind in kinds for epoch in (1, 2)
    ]
    assert result.session is not None
    assert result.session.versions.python == sys.version.split()[0]
    assert result.session.machine.threads == 1
    final = load_checkpoint(folder / "runs" / "share" / "seed-0" / "final.safetensors")
    assert result.drelus_by_site == {site.name: site.drelus for site in final.plan}
    assert result.test_accuracy == final.metrics["test_accuracy"]
    assert result.test_looks == 1
    assert result.gate_dimensions is None
    assert set(result.affine) == {site.name for site in final.plan}
    for site in final.plan:
        affine = result.affine[site.name]
        assert affine.alpha == pytest.approx(final.model.get_submodule(site.name).alpha.tolist(), rel=1e-5)
        assert (affine.prototypes, affine.leader) == (site.prototypes or 0, site.leader)


def test_a_second_call_trains_nothing_and_writes_nothing(whole, recipes, monkeypatch):
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")}
    with counted_steps() as steps:
        again = reproduce([recipes["share"]], seeds=(0, 2), runs=folder / "runs", results=folder / "results")
    assert (again.status, steps) == (0, [0])
    assert {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")} == before
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unheard:
        monkeypatch.setattr(sys, "stdout", unheard)
        places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
        assert cli.main(["reproduce", recipes["share"], *places]) == 0


def test_the_whole_snl_run_reuses_the_masks_that_were_counted(whole, recipes, tmp_path):
    folder, _ = whole
    with counted_steps() as steps:
        ended = reproduce([recipes["snl"]], runs=folder / "runs", results=tmp_path)
    assert (ended.status, steps) == (0, [2 * 2])  # of finetune alone: two epochs of two batches
    counted, snl = (folder / "runs" / name / "seed-0" / "masks.safetensors" for name in ("snl-masks", "snl"))
    assert counted.read_bytes() == snl.read_bytes()
    assert read_results(tmp_path)[0].gate_dimensions is None  # masks are not every ReLU


def slices(recipe: str, folder: Path, until: str) -> list[int]:
    """Calls for no time at all until the file is there; their exit statuses."""
    statuses: list[int] = []
    while not (folder / until).is_file():
        ended = reproduce([recipe], runs=folder / "runs", results=folder / "results", max_minutes=1e-4)
        statuses.append(ended.status)
        assert len(statuses) < 10
    return statuses


def test_a_chain_in_slices_goes_on_elsewhere_and_counts_when_it_comes_back(whole, recipes, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    first = slices(recipes["share"], here, "runs/share/seed-0/gelu.safetensors")
    shutil.copytree(here / "runs" / "share", there / "runs" / "share")  # without what counted for it
    second = slices(recipes["share"], there, "results/share/seed-0.json")
    assert (first, second) == ([75] * 4, [75, 0])  # an epoch a call: two of masks, two of gelu; two of switch
    shutil.rmtree(here / "runs" / "share")
    shutil.copytree(there / "runs" / "share", here / "runs" / "share")
    with counted_steps() as steps:
        back = reproduce([recipes["share"]], runs=here / "runs", results=here / "results")
    assert (back.status, steps) == (0, [0])
    ours, elsewhere, alone = (read_results(folder / "results", "share")[0] for folder in (here, there, whole[0]))
    assert ours == elsewhere
    assert comparable(ours) == comparable(alone)
    assert all((here / "runs" / "artifacts" / key[:2] / key).is_dir() for key in ours.artifacts.values())


def test_side_by_side_a_failing_run_stops_no_other(recipes, tmp_path, capsys):
    command = ["reproduce", recipes["diverging"], recipes["relu"], "--jobs", "2"]
    assert cli.main([*command, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]) == 2
    printed = capsys.readouterr().out
    assert "relu/seed-0  baseline 2/2  loss" in printed
    assert "\ndiverging/seed-0 failed: baseline, epoch 1: the loss is " in printed
    (result,) = read_results(tmp_path / "results")
    assert (result.name, result.session.machine.threads) == ("relu", 1)
    assert result.gate_dimensions.images == 360  # all the digits' test images, fewer than 4,096
    assert set(result.gate_dimensions.sites) == set(result.drelus_by_site)
    assert result.affine is None


def test_a_failing_run_in_one_process_stops_no_other_either(recipes, tmp_path):
    ended = reproduce([recipes["diverging"], recipes["relu"]], runs=tmp_path / "runs", results=tmp_path / "results")
    assert [outcome.state for outcome in ended.outcomes] == ["failed", "done"]
    assert ended.status == 2


def test_after_a_pause_no_run_begins(tmp_path, monkeypatch):
    first, ended, second = runs_of(["demo-relu", "demo-240", "demo-960"], (0,))
    settings = Settings(tmp_path, tmp_path)
    (settings.folder(ended)).mkdir(parents=True)
    (settings.folder(ended) / "result.json").touch()
    monkeypatch.setattr(jobs, "attempt", lambda run, *_: Outcome(run, "paused" if run is first else "done"))
    limit = {"jobs": 1, "deadline": jobs.Deadline(60), "say": print}
    outcomes = jobs.run_all([first, ended, second], settings, Ranks(), **limit)
    assert [outcome.state for outcome in outcomes] == ["paused", "done", "paused"]


def test_runs_side_by_side_go_on_when_nobody_listens(tmp_path, monkeypatch):
    """A worker that says more than a pipe holds ends all the same, and what it failed of is known."""
    worker = "import sys; print('line\\n' * 50_000); sys.exit('why')"
    (tmp_path / "worker").write_text(f"#!{sys.executable}\n{worker}\n")
    (tmp_path / "worker").chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(tmp_path / "worker"))
    said = []

    def closed(line: str) -> None:
        said.append(line)
        raise BrokenPipeError

    (run,) = runs_of(["demo-relu"], (0,))
    with jobs.Workers(1, closed) as workers:
        outcome = workers.attempt(run, Settings(tmp_path, tmp_path), None)
    assert (outcome.state, outcome.message, len(said)) == ("failed", "its process ended with 1: why", 1)


def test_sigterm_ends_the_processes_of_runs(recipes, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    cli._end_on_sigterm()
    asked = []

    def say(line: str) -> None:
        if "baseline" in line and not asked:
            asked.append(line)
            os.kill(os.getpid(), signal.SIGTERM)

    endless = ["phase.*.epochs=1000000"]
    with pytest.raises(SystemExit):
        reproduce([recipes["relu"]], runs=tmp_path, jobs=2, overrides=endless, say=say)
    signal.signal(signal.SIGTERM, handler)
    with RunFolder(tmp_path / "relu" / "seed-0").locked():
        pass  # nobody trains there


def test_what_cannot_be_made_is_refused_before_anything_is_written(recipes, tmp_path):
    places = {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    shutil.copy(recipes["relu"], tmp_path / "other.toml")
    damaged = tmp_path / "damaged" / "relu" / "seed-7.json"  # of no seed that is asked for
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    for names, settings, error, words in (
        ([recipes["relu"]], {"results": damaged.parents[1]}, ReproduceError, r"relu.seed-7\.json: "),
        ([recipes["relu"]], {"results": damaged}, ReproduceError, r"seed-7\.json: wanted a folder, or nothing yet"),
        ([recipes["relu"]], {"runs": damaged}, ReproduceError, r"seed-7\.json: wanted a folder, or nothing yet"),
        (["demo-24"], {}, ReproduceError, r"demo-24: no such recipe and no such file; near to it are .*demo-240"),
        ([], {}, ReproduceError, "at least one recipe"),
        ([recipes["relu"], tmp_path / "other.toml"], {}, ReproduceError, "different names, got relu twice"),
        ([recipes["relu"], recipes["share"]], {"overrides": ["plan.budget=10"]}, RecipeError, "budget"),
        ([recipes["share"]], {"overrides": ["plan.budget=2"]}, RecipeError, "below the floor|budget"),
        (
            [recipes["share"]],
            {"overrides": ["plan.counts_of=relu"]},
            ReproduceError,
            "with the phase masks, relu has baseline",
        ),
        ([recipes["share"]], {"overrides": ["plan.counts_of=demo-snl-240"]}, ReproduceError, "of the same network"),
        ([recipes["relu"]], {"overrides": ["data.name=cifar100", "data.limit=100"]}, DataError, "cifar-100"),
        ([recipes["relu"]], {"seeds": (0, 0)}, ReproduceError, "seeds: wanted different ones"),
        ([recipes["relu"]], {"jobs": 0}, ReproduceError, "jobs: wanted 1 to"),
        ([recipes["relu"]], {"max_minutes": 0}, ReproduceError, "max_minutes: wanted above 0"),
    ):
        with pytest.raises(error, match=words):
            reproduce(names, **(places | settings))
    assert not places["runs"].exists()
    assert not places["results"].exists()


def test_torchruns_processes_train_one_run_at_a_time(recipes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ReproduceError, match="wanted 1 under torchrun, whose 2 processes"):
        reproduce([recipes["relu"]], jobs=2)


def test_another_recipe_in_the_place_of_a_run_or_a_result_is_refused(whole, recipes, tmp_path):
    folder, _ = whole
    with pytest.raises(
        ReproduceError, match=r"share.seed-0: holds a run of another recipe: phase.gelu.lr \(0.05 against 0.1\)"
    ):
        reproduce([recipes["share"]], runs=folder / "runs", results=tmp_path, overrides=["phase.gelu.lr=0.1"])
    changed = write_recipes(tmp_path / "changed")
    snl = Path(changed["snl"])
    snl.write_text(snl.read_text().replace("lasso = 0.1", "lasso = 0.2"))
    with pytest.raises(ReproduceError, match="the numbers are not those of snl-masks as it is now"):
        reproduce([changed["share"]], runs=folder / "runs", results=tmp_path / "results")
    with pytest.raises(ReproduceError, match=r"seed-0.json: holds the result of another recipe"):
        reproduce(
            [recipes["share"]], runs=tmp_path / "runs", results=folder / "results", overrides=["phase.gelu.lr=0.1"]
        )
    assert not (tmp_path / "runs").exists()
