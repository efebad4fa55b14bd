"""Whether every run of a call can be made, asked before anything is trained or written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepshare import models
from deepshare.data import Dataset
from deepshare.plan import Plan
from deepshare.reproduce.chain import ASKED, Settings
from deepshare.reproduce.errors import ReproduceError, require
from deepshare.reproduce.result import read_results, result_path
from deepshare.reproduce.runs import Run, plan_in_file
from deepshare.train import Recipe, load_recipe
from deepshare.train.networks import make_plan, model_spec
from deepshare.train.recipe import first_difference, with_weights
from deepshare.train.recipe_parts import DataRecipe
from deepshare.train.trainer import check_run, check_teacher


def check_runs(runs: Sequence[Run], settings: Settings) -> None:
    """Raises ReproduceError: the folder or the result of another recipe is in a run's place, a result of one of the
    recipes, of whatever seed, is damaged, or a file is where a folder must be. And what `train` raises of a recipe with
    this data and device."""
    _check_results([run for run in runs if run.wanted], settings)
    loaded: dict[DataRecipe, Dataset] = {}
    for run in runs:
        _check_folder(run, settings)
        data = run.recipe.data
        if data not in loaded:
            loaded[data] = data.load(settings.data_root)
        _check_recipe(run, loaded[data], settings)


def _check_recipe(run: Run, dataset: Dataset, settings: Settings) -> None:
    recipe = run.recipe
    spec = model_spec(recipe.model, dataset.num_classes, dataset.input_size)
    make_plan(recipe if run.counts is None else _evenly(recipe, spec), spec, settings.began_with(recipe))
    check_teacher(recipe, dataset, None, known=False)
    check_run(recipe, dataset, settings.device)


def _evenly(recipe: Recipe, spec: dict[str, Any]) -> Recipe:
    """The recipe before its counts are known: what budgets can be reached does not depend on them."""
    sites = Plan.of(models.shapes_only(spec), tuple(spec["input_size"])).sites
    return with_weights(recipe, [site.size for site in sites])


def _check_folder(run: Run, settings: Settings) -> None:
    folder = settings.folder(run)
    _check_way(folder)
    if settings.begun(run):
        difference = _difference(run, folder, settings)
        advice = f"move {folder} away, or give the recipe another name"
        require(difference is None, f"{folder}: holds a run of another recipe: {difference}; {advice}")


def _check_results(runs: Sequence[Run], settings: Settings) -> None:
    """Results of other seeds, which the table at the end reads, must be whole; they may be stale."""
    found = {
        name: {result.seed: result.content for result in read_results(settings.results, name)}
        for name in {run.name for run in runs}
    }
    for run in runs:
        path = result_path(settings.results, run.name, run.recipe.seed)
        _check_way(path.parent)
        known = found[run.name].get(run.recipe.seed, run.content)
        other = f"{path}: holds the result of another recipe ({known}, not {run.content})"
        require(known == run.content, f"{other}; move {path} away, or give the recipe another name")


def _check_way(folder: Path) -> None:
    """Whether `folder` is one, or can be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    require(there.is_dir(), f"{there}: wanted a folder, or nothing yet, got a file")


def _difference(run: Run, folder: Path, settings: Settings) -> str | None:
    """What the run in `folder` began with and `run` has not, None if nothing."""
    began = load_recipe(folder / "recipe.toml")
    if run.counts is None:
        return first_difference(began, run.recipe) or _changed_file(run, settings)
    weights = began.plan.weights
    if not isinstance(weights, tuple):
        return f"plan.weights (wanted numbers, got {weights!r})"
    content = _asked_content(folder)
    if content is not None and content == run.content:
        return None
    return first_difference(began, with_weights(run.recipe, weights)) or (
        f"plan.counts_of (the numbers are not those of {run.counts.recipe.name} as it is now)"
    )


def _changed_file(run: Run, settings: Settings) -> str | None:
    """What to say if plan.file holds another plan than the run began with; it may be gone."""
    file = run.recipe.plan.file
    if file is None or not Path(file).is_file() or plan_in_file(run.recipe) == settings.began_with(run.recipe):
        return None
    return f"plan.file ({file} holds another plan than the run began with)"


def _asked_content(folder: Path) -> str | None:
    path = folder / ASKED
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["content"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ReproduceError(f"{path}: wanted an object with content and counts, got {error!r}") from error
