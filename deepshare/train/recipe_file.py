"""Recipes from TOML files: found, merged with their bases, changed from the command line, built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepshare.budget import weights_of
from deepshare.plan import Plan, PlanError
from deepshare.train.errors import RecipeError, require
from deepshare.train.fields import build
from deepshare.train.overrides import apply_overrides
from deepshare.train.recipe import Recipe
from deepshare.train.toml_in import find_toml, read_toml, toml_names

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the file `path_or_name`, or the one of that name that comes with the package.

    overrides: `key=value` strings, see deepshare.train.overrides.
    Raises RecipeError naming file, key, what was wanted and what came.
    """
    path = find_toml(path_or_name, RECIPES, "recipe")
    try:
        return build(Recipe, _with_weights(apply_overrides(read_toml(path), overrides)))
    except (OSError, ValueError, RecipeError) as error:  # ValueError: not UTF-8, or not TOML
        raise RecipeError(f"{path}: {error}") from error


def _with_weights(values: dict[str, Any]) -> dict[str, Any]:
    """plan.weights_from, a plan's file, becomes plan.weights, its DReLUs per site, in the place of others: the recipe
    holds what decides."""
    plan = values.get("plan")
    if not isinstance(plan, dict) or "weights_from" not in plan:
        return values
    file = plan["weights_from"]
    require(isinstance(file, str), f"plan.weights_from: wanted the path of a plan.json, got {file!r:.80}")
    try:
        weights = list(weights_of(Plan.load(file)).values())
    except (OSError, PlanError) as error:
        raise RecipeError(f"plan.weights_from: {error}") from error
    kept = {key: value for key, value in plan.items() if key != "weights_from"}
    return {**values, "plan": {**kept, "weights": weights}}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return toml_names(RECIPES)
