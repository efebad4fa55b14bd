"""The phases pretrain and masks on the digits: SNL from end to end, small."""

import csv
from pathlib import Path

import pytest
import torch

from deepshare.checkpoint import CheckpointError, load_checkpoint
from deepshare.nn import LearnedMask, MaskedReLU2d
from deepshare.plan import Plan, count_drelus
from deepshare.train import RecipeError, TrainingError, load_recipe, mask_phase, train

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "model.width=2",
    "data.limit=64",
    "phase.*.batch_size=32",
    "phase.pretrain.epochs=2",
    "phase.finetune.epochs=2",
    "phase.masks.epochs=60",
    "phase.masks.batch_size=16",
    "phase.masks.lr=0.03",
    "snl.epsilon=0.05",  # above the rate: Adam carries masks to and fro over 0
    "snl.lasso=0.01",
    "plan.budget=100",
]


def small(*more: str):
    return load_recipe("demo-snl-960", [*SMALL, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "snl"
    return train(small(), folder), folder


def mask_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["phase"] == "masks"]


def test_a_run_ends_exactly_at_the_budget(finished):
    result, folder = finished
    assert result.plan.drelus == 100
    assert result.plan == Plan.load(folder / "plan.json") == load_checkpoint(result.checkpoint).plan
    assert count_drelus(load_checkpoint(result.checkpoint).model, (1, 8, 8)).total == 100
    assert {site.kind for site in result.plan} == {"mask"}
    assert {row["drelus"] for row in result.rows if row["phase"] == "finetune"} == {100}
    assert {row["drelus"] for row in result.rows if row["phase"] == "pretrain"} == {960}
    log = (folder / "log.txt").read_text()
    assert "resnet18 width 2, 960 DReLUs to begin with, 100 asked" in log
    assert "; 100 stay, 100 asked" in log


def test_count_lambda_and_masks_per_site_are_logged_and_follow_algorithm_1(finished):
    _, folder = finished
    rows = mask_rows(folder)
    counts = [int(row["drelus"]) for row in rows]
    assert all(count > 100 for count in counts[:-1])
    assert counts[-1] <= 100
    for row in rows:
        assert len(row["site_drelus"].split()) == 16
        assert sum(map(int, row["site_drelus"].split())) == int(row["drelus"])
    lasso, lowest = 0.01, 960
    for row, count in zip(rows, counts, strict=True):
        assert float(row["lasso"]) == pytest.approx(lasso)
        lasso, lowest = lasso if count < lowest else lasso * 1.1, min(lowest, count)
    assert float(rows[-1]["lasso"]) > 0.01  # both ways were taken
    assert len({row["lasso"] for row in rows}) < len(rows)


def test_finetuning_leaves_the_masks_and_moves_the_weights(finished):
    result, _ = finished
    fixed = load_checkpoint(result.phase_checkpoint("masks"))
    final = load_checkpoint(result.checkpoint)
    assert fixed.plan == final.plan
    before, after = fixed.model.state_dict(), final.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".mask"))
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_a_checkpoint_of_the_phase_has_the_masks_above_epsilon_and_the_state_their_values(tmp_path):
    recipe = small("phase.masks.epochs=3", "snl.exact=false")
    with pytest.raises(TrainingError, match=r"masks: \d+ ReLUs are left after 3 epochs, 100 are wanted; raise"):
        train(recipe, tmp_path / "run")
    [folder] = (tmp_path / "run" / "checkpoints").glob("masks-*")
    values = torch.load(folder / "state.pt")["masks"]["values"]
    saved = load_checkpoint(folder / "weights.safetensors")
    assert all(torch.equal(saved.plan[name].mask.tensor(), value > 0.05) for name, value in values.items())
    assert saved.plan.drelus == int(mask_rows(tmp_path / "run")[-1]["drelus"])


@pytest.mark.parametrize(
    ("changes", "zero_out", "shapes"),
    [
        (["snl.granularity=channel", "plan.budget=103"], False, 1),
        (["snl.zero_out=true", "phase.masks.start=fresh", "phase.masks.distill=none"], True, 3),
        (["snl.exact=false"], False, 3),
    ],
    ids=["channel", "zero_out_from_scratch", "stop_below"],
)
def test_the_variants_end_at_their_budgets(changes, zero_out, shapes, tmp_path):
    result = train(small(*changes), tmp_path / "run")
    drelus = result.plan.drelus
    if "snl.exact=false" in changes:
        assert 0 < drelus == int(mask_rows(tmp_path / "run")[-1]["drelus"]) <= 100
    else:
        assert drelus == (103 if shapes == 1 else 100)
    assert {(site.zero_out, len(site.mask.shape)) for site in result.plan} == {(zero_out, shapes)}


def test_at_the_bound_of_epochs_the_largest_masks_stay(tmp_path):
    result = train(small("phase.masks.epochs=1", "phase.finetune.epochs=1"), tmp_path / "run")
    assert result.plan.drelus == 100
    assert "of 960 above 0.05 after 1 epochs; 100 stay" in (tmp_path / "run" / "log.txt").read_text()


def test_a_pretrained_network_is_given_and_must_fit(finished, tmp_path):
    result, _ = finished
    alone = tmp_path / "alone.toml"
    head, _, rest = small("phase.masks.epochs=1", "phase.finetune.epochs=1").to_toml().partition("[[phase]]")
    alone.write_text(head + "[[phase]]" + rest.partition("[[phase]]")[2])
    with pytest.raises(TrainingError, match="needs a pretrained network and trains none: give a checkpoint"):
        train(alone, tmp_path / "run")
    with pytest.raises(CheckpointError, match="starts from another plan"):
        train(alone, tmp_path / "run", teacher=result.phase_checkpoint("masks"))
    with pytest.raises(CheckpointError, match="starts from another model"):
        train(load_recipe(alone, ["model.width=4"]), tmp_path / "run", teacher=result.phase_checkpoint("pretrain"))
    assert not (tmp_path / "run").exists()
    given = train(alone, tmp_path / "run", teacher=result.phase_checkpoint("pretrain"))
    assert given.plan.drelus == 100
    assert train(alone, tmp_path / "run", teacher=result.phase_checkpoint("pretrain"), resume=True).plan == given.plan
    assert [row["phase"] for row in given.rows] == ["masks", "finetune"]


def test_a_thinned_network_keeps_its_linear_sites(finished, tmp_path):
    result, _ = finished
    plan = load_checkpoint(result.phase_checkpoint("pretrain")).plan
    for site in plan.sites[::2]:
        plan = plan.replace(site.name, "linear")
    thinned = plan.save(tmp_path / "thinned.json")
    run = train(small(f'plan.file="{thinned}"', "phase.*.epochs=2"), tmp_path / "run")
    assert [site.kind for site in run.plan] == ["linear", "mask"] * 8
    assert run.plan.drelus == 100
    thinned.unlink()  # a run that has begun does not need it
    assert train(load_recipe(tmp_path / "run" / "recipe.toml"), tmp_path / "run", resume=True).plan == run.plan


def test_a_plan_from_a_file_is_trained_and_its_counts_are_weights(finished, tmp_path):
    result, folder = finished
    file = tmp_path / "plan.toml"
    head, _, _ = load_recipe("demo-relu", ["model.width=2", "data.limit=64"]).to_toml().partition("[[phase]]")
    phase = '[[phase]]\nkind = "{}"\nepochs = 1\nbatch_size = 32\nlr = 0.05\ndistill = "{}"\n'
    file.write_text(head + phase.format("pretrain", "none") + phase.format("baseline", "pretrain"))
    recipe = load_recipe(file, ["plan.method=file", f'plan.file="{folder / "plan.json"}"'])
    run = train(recipe, tmp_path / "run")
    assert run.plan == result.plan
    assert {site.kind for site in load_checkpoint(run.phase_checkpoint("pretrain")).plan} == {"relu"}
    deepshare = load_recipe("demo-240", ["plan.method=weights", f'plan.weights_from="{folder / "plan.json"}"'])
    assert list(deepshare.plan.weights) == [site.drelus for site in result.plan]
    for changes, words in (
        (["model.width=4"], r"site 'layer1.0.relu1': the plan says shape \(2, 8, 8\), the model has \(4, 8, 8\)"),
        ([f'plan.file="{tmp_path / "nowhere"}"'], "nowhere"),
        ([f'plan.file="{file}"'], "not JSON"),
    ):
        with pytest.raises(RecipeError, match=words):
            train(
                load_recipe(file, ["plan.method=file", f'plan.file="{folder / "plan.json"}"', *changes]), tmp_path / "b"
            )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("budget", [960, 0, 10**6])
def test_a_budget_out_of_range_is_refused_before_anything_is_written(budget, tmp_path):
    with pytest.raises(RecipeError, match=r"budget"):
        train(small(f"plan.budget={budget}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_site_learns_a_mask_and_the_largest_values_stay(monkeypatch, tmp_path):
    values: dict[str, torch.Tensor] = {}
    end = mask_phase._end

    def spy(run, state, model, masks):
        kinds = [type(module) for module in model.modules() if isinstance(module, (LearnedMask, MaskedReLU2d))]
        assert kinds == [LearnedMask] * 16
        values.update({name: mask.detach().clone() for name, mask in masks.items()})
        end(run, state, model, masks)

    monkeypatch.setattr(mask_phase, "_end", spy)
    result = train(small("phase.*.epochs=1"), tmp_path / "run")
    kept = {site.name: site.mask.tensor() for site in result.plan}
    assert all(not torch.equal(value, torch.ones_like(value)) for value in values.values())
    inside = torch.cat([values[name][kept[name]] for name in kept])
    outside = torch.cat([values[name][~kept[name]] for name in kept])
    assert len(inside) == 100
    assert inside.min() >= outside.max()
