"""A comparison as cells: one training run each, with the plan its method makes for its budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepshare import models
from deepshare.budget import weights_of
from deepshare.compare.recipe import ALL_RELU, CompareError, CompareRecipe, MethodRecipe, folder_name
from deepshare.methods import deepreduce
from deepshare.methods.deepreshape_pipeline import thinned_plan
from deepshare.methods.variant import for_budget
from deepshare.plan import Plan
from deepshare.train import networks
from deepshare.train.plan_recipe import PlanRecipe
from deepshare.train.recipe import NOT_IN_NAMES, Recipe
from deepshare.train.recipe_file import load_recipe
from deepshare.train.recipe_parts import ModelRecipe


@dataclass(frozen=True)
class Cell:
    """One run. `method` is a MethodRecipe's name, or ALL_RELU (budget None), whose network teaches the others."""

    method: str
    budget: int | None
    seed: int

    @property
    def folder(self) -> str:
        """The run's folder within the comparison's: method/budget/seed-N, readable and safe as a path."""
        return f"{folder_name(self.method)}/{'all' if self.budget is None else self.budget}/seed-{self.seed}"


def cells(recipe: CompareRecipe) -> list[Cell]:
    """Every run of the comparison, in an order in which each finds what it needs: by seed, teachers first."""
    found: list[Cell] = []
    for seed in recipe.seeds:
        found.append(Cell(ALL_RELU, None, seed))
        for method in recipe.method:
            found += [Cell(method.name, budget, seed) for budget in recipe.budgets]
    return found


def all_relu_recipe(recipe: CompareRecipe, seed: int) -> Recipe:
    """The all-ReLU network of a seed."""
    name = f"{recipe.name} {ALL_RELU}"
    return Recipe(name, recipe.data, recipe.model, PlanRecipe("relu"), (recipe.pretrain,), seed, recipe.distill)


def cell_recipe(
    recipe: CompareRecipe, cell: Cell, spec: dict[str, Any], folder: Path, *, pretrained: bool, counted: bool = True
) -> tuple[Recipe, Plan | None]:
    """The training recipe of a method's cell, and the plan that must lie in the file it names (None: it names none).

    spec: `models.create`'s arguments of the comparison's network, with input_size.
    folder: of the comparison.
    pretrained: whether a checkpoint takes the place of the pretrain phase.
    counted: whether the method whose DReLUs weigh this one's sites has ended; if not, all weigh alike.

    Raises CompareError: the method has no network within the budget.
    """
    method = method_of(recipe, cell)
    model, plan, given = recipe.model, PlanRecipe("relu"), None
    if method.kind == "snl":
        plan = PlanRecipe("snl", cell.budget)
    elif method.kind == "deepreshape":
        assert method.model is not None  # MethodRecipe requires it
        model, given = method.model, _thinned(method, spec)
        plan = PlanRecipe("snl", cell.budget, file=str(_plan_file(folder, cell)))
    elif method.kind == "deepreduce":
        model, given = _reduced(recipe, method, cell, spec)
        plan = PlanRecipe("file", file=str(_plan_file(folder, cell)))
    else:
        plan = _shared(method, cell, folder, counted=counted)
    phases = method.phase if pretrained else (recipe.pretrain, *method.phase)
    # names of methods are for readers
    name = "".join("-" if letter in NOT_IN_NAMES else letter for letter in f"{recipe.name} {method.name} {cell.budget}")
    return Recipe(name, recipe.data, model, plan, phases, cell.seed, recipe.distill, method.snl), given


def as_begun(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe with the plan's path as the run in `run_dir` began with it: its folder may have moved since, or be
    named in another way. A run that has begun does not read that file again."""
    begun = run_dir / "recipe.toml"
    if not begun.is_file():
        return recipe
    return replace(recipe, plan=replace(recipe.plan, file=load_recipe(begun).plan.file))


def method_of(recipe: CompareRecipe, cell: Cell) -> MethodRecipe:
    """The method whose network the cell trains."""
    return next(method for method in recipe.method if method.name == cell.method)


def _plan_file(folder: Path, cell: Cell) -> Path:
    return folder / "plans" / f"{cell.folder.replace('/', '-')}.json"


def _shared(method: MethodRecipe, cell: Cell, folder: Path, *, counted: bool) -> PlanRecipe:
    if method.counts is None or not counted:
        return PlanRecipe("uniform", cell.budget, method.group)
    other = Plan.load(folder / replace(cell, method=method.counts).folder / "plan.json")
    weights = tuple(map(float, weights_of(other).values()))
    return PlanRecipe("weights", cell.budget, method.group, weights=weights)


def _reduced(recipe: CompareRecipe, method: MethodRecipe, cell: Cell, spec: dict[str, Any]) -> tuple[ModelRecipe, Plan]:
    assert method.order is not None  # MethodRecipe requires it
    assert cell.budget is not None
    try:
        chosen = for_budget(deepreduce.pipeline(spec, method.order), cell.budget)
    except ValueError as error:
        raise CompareError(f"method {method.name}: {error}") from error
    shaped = {key: chosen.spec[key] for key in ("width", "rho", "blocks") if key in chosen.spec}
    return replace(recipe.model, **shaped), chosen.plan


def _thinned(method: MethodRecipe, spec: dict[str, Any]) -> Plan:
    """What SNL starts from on a HybReNet: its ReLUs, those of alternate layers (and the stem) gone where it thins."""
    assert method.model is not None
    hybrid = networks.model_spec(method.model, spec["num_classes"], spec["input_size"])
    plan = Plan.of(models.shapes_only(hybrid), tuple(spec["input_size"]))
    return plan if method.thin is None else thinned_plan(hybrid, plan, method.thin)
