"""Measuring criticality: what is trained, what is kept, and that nothing is trained twice."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from deepshare import cli, models
from deepshare.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from deepshare.compare.criticality import Criticality, StageAccuracy, measure
from deepshare.methods.deepreduce import pipeline, stage_relus
from deepshare.plan import Plan
from deepshare.train import Recipe, RecipeError, TrainingError, load_recipe

SMALL = ["model.width=2", "model.name=resnet6", "data.limit=40", "phase.*.epochs=1", "phase.*.batch_size=20"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("demo-criticality", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, Criticality]:
    folder = tmp_path_factory.mktemp("criticality")
    return folder, measure(recipe(), folder, seeds=(0, 1), device="cpu")


def test_one_network_per_stage_twice_and_seed(measured):
    folder, found = measured
    runs = {path.parent.name for path in folder.glob("*/result.json")}
    wanted = {
        f"S{stage}-{labels}-{seed}" for stage in range(1, 5) for labels in ("plain", "distilled") for seed in (0, 1)
    }
    assert runs == {"teacher", *wanted}
    assert [one.stage for one in found.stages] == ["S1", "S2", "S3", "S4"]
    for one in found.stages:
        results = [
            json.loads((folder / f"{one.stage}-distilled-{seed}" / "result.json").read_text()) for seed in (0, 1)
        ]
        assert one.distilled == tuple(result["val_accuracy"] for result in results)
        assert len(one.plain) == 2
    assert found.values == Criticality.load(folder / "criticality.json").values
    assert found.split == "val"
    assert 0 <= found.teacher <= 1


def test_each_network_has_the_relus_of_its_stage_alone(measured):
    folder, found = measured
    for one in found.stages:
        checkpoint = load_checkpoint(folder / f"{one.stage}-distilled-0" / "final.safetensors")
        plan = Plan.of(checkpoint.model, (1, 8, 8))
        counts = stage_relus(checkpoint.spec, plan)
        assert {stage: count for stage, count in counts.items() if count} == {one.stage: one.relus}
    teacher = load_checkpoint(folder / "teacher" / "pretrain.safetensors")
    assert {site.kind for site in teacher.plan} == {"relu"}
    assert teacher.plan.sites[0].name == "stem_relu"


def test_only_the_distilled_networks_see_the_teacher(measured):
    folder, _ = measured
    teacher = (folder / "teacher" / "pretrain.safetensors").read_bytes()
    assert (folder / "S2-distilled-1" / "pretrain.safetensors").read_bytes() == teacher
    assert not (folder / "S2-plain-1" / "pretrain.safetensors").exists()


def test_resuming_trains_nothing_twice_and_ends_alike(measured):
    """Also where a kill left one of the runs undone."""
    folder, found = measured
    (folder / "criticality.json").unlink()
    shutil.rmtree(folder / "S4-distilled-1")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/final.safetensors")}
    assert len(times) == 16
    assert measure(recipe(), folder, seeds=(0, 1), device="cpu", resume=True) == found
    assert (folder / "criticality.json").is_file()
    assert times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(TrainingError, match="there is a run already"):
        measure(recipe(), folder, seeds=(0, 1), device="cpu")
    with pytest.raises(TrainingError, match="another recipe"):
        measure(recipe("phase.baseline.lr=0.01"), folder, seeds=(0, 1), device="cpu", resume=True)


def test_a_given_teacher_is_not_trained_and_serves_as_well(measured, tmp_path):
    folder, found = measured
    teacher = folder / "teacher" / "pretrain.safetensors"
    again = measure(recipe(), tmp_path / "again", teacher=teacher, split="test", device="cpu")
    assert not (tmp_path / "again" / "teacher").exists()
    assert again.teacher is None
    results = [json.loads((folder / f"{one.stage}-distilled-0" / "result.json").read_text()) for one in found.stages]
    assert [one.distilled[0] for one in again.stages] == [result["test_accuracy"] for result in results]


def test_the_order_drives_the_pipeline(measured):
    _, found = measured
    spec = {"name": "resnet18", "num_classes": 10, "width": 16, "in_channels": 1}
    variants = pipeline(spec, found.order, (1, 8, 8))
    assert len(variants) == 15
    assert found.order[0] not in variants[0].name.split("+")


def test_the_command_line_measures_and_prints_the_table(measured, tmp_path, capsys):
    folder, _ = measured
    changes = [part for change in SMALL for part in ("--set", change)]
    teacher = ["--teacher", str(folder / "teacher" / "pretrain.safetensors")]
    arguments = ["criticality", "demo-criticality", "--out", str(tmp_path / "run"), "--seeds", "3", *teacher, *changes]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    found = Criticality.load(tmp_path / "run" / "criticality.json")
    assert capsys.readouterr().out.endswith(found.table() + "\n")  # after what train says
    assert (tmp_path / "run" / "S4-distilled-3").is_dir()


def paper() -> Criticality:
    """Table 3, ResNet34."""
    rows = (("S1", 1573, 42.1, 39.4), ("S2", 1049, 53.49, 51.74), ("S3", 786, 57.28, 60.83), ("S4", 197, 48.1, 54.41))
    stages = tuple(StageAccuracy(name, 1000 * k, (plain / 100,), (kd / 100,)) for name, k, plain, kd in rows)
    return Criticality("table-3", "test", 0.07, stages, 0.6306)


def test_the_table_of_the_paper():
    lines = paper().table().splitlines()
    assert [line.split() for line in lines[1:6]] == [
        ["all", "63.06"],
        ["S1", "1,573,000", "42.10", "39.40", "0.00"],
        ["S2", "1,049,000", "53.49", "51.74", "7.58"],
        ["S3", "786,000", "57.28", "60.83", "13.44"],
        ["S4", "197,000", "48.10", "54.41", "10.37"],
    ]
    assert lines[6].startswith("S1 < S2 < S4 < S3 ")
    several = dataclasses.replace(paper().stages[0], distilled=(0.25, 0.75))
    assert "50.00 (25.00-75.00)" in dataclasses.replace(paper(), stages=(several,)).table()


def test_a_measurement_is_kept_as_it_was(tmp_path):
    assert Criticality.load(paper().save(tmp_path / "c.json")) == paper()
    without = dataclasses.replace(paper(), teacher=None)
    assert Criticality.load(without.save(tmp_path / "c.json")) == without
    assert "all" not in without.table()


@pytest.mark.parametrize(("text", "message"), [("{", "Expecting"), ('{"recipe": 1}', "recipe: wanted a string, got")])
def test_a_damaged_file_is_named(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(TrainingError, match=rf"c\.json: {message}"):
        Criticality.load(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (["plan.method=uniform", "plan.budget=100"], {}, r'plan\.method: wanted "relu"'),
        (["phase.baseline.distill=none"], {}, "phase: wanted pretrain and a baseline that distils from it"),
        ([], {"seeds": ()}, "seeds: wanted different ones"),
        ([], {"seeds": (1, 1)}, "seeds: wanted different ones"),
        ([], {"split": "train"}, "split: wanted"),
        (["data.val_fraction=0", "phase.*.keep=last"], {}, r"data\.val_fraction: wanted above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(tmp_path, overrides, settings, message):
    with pytest.raises(RecipeError, match=message):
        measure(recipe(*overrides), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_device_or_a_teacher_that_cannot_serve_is_said_before_anything_is_written(tmp_path, measured):
    with pytest.raises(TrainingError, match="device 'nowhere' cannot be used here"):
        measure(recipe(), tmp_path / "run", device="nowhere")
    foreign = tmp_path / "foreign.safetensors"
    spec = {"name": "resnet18", "num_classes": 3, "width": 2, "stem_relu": False, "in_channels": 1}
    model = models.create(**spec)
    save_checkpoint(foreign, model, {**spec, "input_size": [1, 8, 8]}, Plan.of(model, (1, 8, 8)))
    with pytest.raises(CheckpointError, match="needs num_classes 10"):
        measure(recipe(), tmp_path / "run", teacher=foreign)
    assert not (tmp_path / "run").exists()


def test_plans_of_another_network_stay(tmp_path):
    plans = tmp_path / "run/plans"
    plans.mkdir(parents=True)
    other = Plan.of(models.create("resnet18", num_classes=10, width=3, in_channels=1), (1, 8, 8))
    other.save(plans / "S2.json")
    with pytest.raises(TrainingError, match=r"S2\.json: a plan of another network is there"):
        measure(recipe(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*.json")] == ["S2.json"]
    assert Plan.load(plans / "S2.json") == other
