"""Recipes from TOML files: found, merged with their bases, changed from the command line, built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepshare.budget import weights_of
from deepshare.plan import Plan, PlanError
from deepshare.train.errors import RecipeError, require
from deepshare.train.fields import build
from deepshare.train.inherit import override, read_with_bases, select_phases
from deepshare.train.recipe import Recipe
from deepshare.train.toml_in import find_toml, toml_names

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the file `path_or_name`, or the one of that name that comes with the package, on its bases.

    overrides: `key=value` strings, see deepshare.train.overrides; `phases=[...]` counts before the others.
    Raises RecipeError naming file, key, what was wanted and what came.
    """
    path, changes = find_toml(path_or_name, RECIPES, "recipe"), list(overrides)
    chosen = [change for change in changes if change.partition("=")[0].strip() == "phases"]
    try:
        values = select_phases(override(read_with_bases(path, RECIPES), chosen))
        return build(Recipe, _with_weights(override(values, [change for change in changes if change not in chosen])))
    except (OSError, ValueError, RecipeError) as error:  # ValueError: not UTF-8, or not TOML
        raise RecipeError(f"{path}: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: lists or tables are nested too deep") from error


def _with_weights(values: dict[str, Any]) -> dict[str, Any]:
    """plan.weights_from, a plan's file, becomes plan.weights, its DReLUs per site: the recipe holds what decides."""
    plan = values.get("plan")
    if not isinstance(plan, dict) or "weights_from" not in plan:
        return values
    kept = {key: value for key, value in plan.items() if key != "weights_from"}
    return {**values, "plan": {**kept, "weights": _counts(plan["weights_from"])}}


def _counts(file: Any) -> list[int]:
    require(isinstance(file, str), f"plan.weights_from: wanted the path of a plan.json, got {file!r:.80}")
    try:
        return list(weights_of(Plan.load(file)).values())
    except (OSError, PlanError) as error:
        raise RecipeError(f"plan.weights_from: {error}") from error


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return toml_names(RECIPES)
