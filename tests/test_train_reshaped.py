"""DeepReShape's variants through the trainer: a recipe can name a network with ReLU-reuse and a plan for it."""

from dataclasses import replace
from pathlib import Path

import torch

from deepshare.checkpoint import load_checkpoint
from deepshare.methods.deepreshape import hybrid
from deepshare.methods.deepreshape_pipeline import algorithm2, reused
from deepshare.methods.thin_then_snl import thin_then_snl
from deepshare.methods.variant import Variant
from deepshare.models import shapes_only
from deepshare.plan import Plan
from deepshare.train import Recipe, load_recipe, networks, train
from deepshare.train.artifact_key import artifact_key
from deepshare.train.plan_recipe import PlanRecipe
from deepshare.train.recipe_parts import ModelRecipe, ReuseRecipe

IMAGE = (1, 8, 8)
SMALL = ("data.limit=256", "phase.*.epochs=2")


def model_of(variant: Variant) -> ModelRecipe:
    """The recipe's [model] of a variant."""
    reuse = variant.spec.get("reuse")
    made = reuse and ReuseRecipe(tuple(reuse["layers"]), reuse["factor"], reuse["form"], reuse["shortcuts"])
    return ModelRecipe(variant.spec["name"], variant.spec["width"], variant.spec["stem_relu"], reuse=made or None)


def test_a_network_with_reuse_is_trained_saved_and_resolved(tmp_path: Path):
    spec = hybrid("hrn-2x3x2x", m=8, num_classes=10, in_channels=1)
    variant = reused(algorithm2(spec, (1, 4, 2, 3), IMAGE, cull_least=True, factors=())[1], 4)
    assert networks.model_spec(model_of(variant), 10, IMAGE) == {**variant.spec, "input_size": list(IMAGE)}
    plan = PlanRecipe("file", file=str(variant.plan.save(tmp_path / "plan.json")))
    recipe: Recipe = replace(load_recipe("demo-relu", SMALL), model=model_of(variant), plan=plan)
    result = train(recipe, tmp_path / "run")
    assert result.plan == variant.plan
    assert result.plan.drelus == (16 * 16 + 48 * 4 + 96) * 2 // 4
    assert load_recipe(tmp_path / "run" / "recipe.toml").model == recipe.model
    checkpoint = load_checkpoint(result.checkpoint)
    assert checkpoint.spec["reuse"] == variant.spec["reuse"]
    fresh = shapes_only(variant.spec).state_dict()
    assert {name: tensor.shape for name, tensor in checkpoint.model.state_dict().items()} == {
        name: tensor.shape for name, tensor in fresh.items()
    }
    assert all(torch.isfinite(tensor.float()).all() for tensor in checkpoint.model.state_dict().values())


def test_a_network_of_any_channels_learns_from_another_model(tmp_path: Path):
    shape = ("model.channels=[1, 2, 3, 5]", "model.width=1", "plan.method=uniform", "plan.budget=111")
    wide = ("teacher.name=resnet18", "teacher.width=6", "data.limit=64", "phase.*.epochs=1")
    recipe = load_recipe("demo-240", (*shape, *wide))
    result = train(recipe, tmp_path / "run")
    assert result.plan.drelus == 111
    teacher, final = (load_checkpoint(file) for file in (result.phase_checkpoint("teacher"), result.checkpoint))
    assert (teacher.spec["width"], {site.kind for site in teacher.plan}) == (6, {"gelu"})
    assert (final.spec["channels"], load_recipe(tmp_path / "run" / "recipe.toml")) == ([1, 2, 3, 5], recipe)
    own = load_recipe("demo-relu", ("model.width=6", *wide[2:]))
    plan = networks.make_plan(own, networks.model_spec(own.model, 10, IMAGE))
    assert artifact_key(own, "teacher", plan, {}) == artifact_key(recipe, "teacher", result.plan, {})


def test_thinning_before_snl_ends_at_the_budget_among_the_thinned(tmp_path: Path):
    spec = hybrid("hrn-2x3x2x", m=8, num_classes=10, in_channels=1, stem_relu=False)
    start = thin_then_snl(spec, IMAGE, 300)
    file = str(start.variant.plan.save(tmp_path / "plan.json"))
    settings = (
        "data.limit=128",
        "phase.pretrain.epochs=1",
        "phase.finetune.epochs=1",
        "snl.lasso=0.2",
        "phase.masks.lr=0.05",
    )
    recipe = replace(
        load_recipe("demo-snl-960", settings),
        model=model_of(start.variant),
        plan=PlanRecipe("snl", budget=start.budget, file=file),
    )
    result = train(recipe, tmp_path / "run")
    assert result.plan.drelus == 300
    thinned = {site.name for site in start.variant.plan if site.kind == "linear"}
    assert thinned == {
        site.name for site in Plan.of(load_checkpoint(result.checkpoint).model, IMAGE) if site.kind == "linear"
    }
    assert all(name.endswith("relu1") for name in thinned)
