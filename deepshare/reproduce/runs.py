"""Which runs a call needs: a run per recipe and seed, and before them those whose masks weigh their sites."""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepshare.plan import Plan, PlanError
from deepshare.reproduce.errors import ReproduceError, require
from deepshare.train import Recipe, RecipeError, load_recipe, recipe_names
from deepshare.train.artifact_key import VERSION
from deepshare.train.recipe import first_difference
from deepshare.train.recipe_parts import MAX_SEED

MASKS = "-masks"  # ends the name of a run that stops after SNL's masks
SHARED_OVERRIDES = ("data.", "model.", "compute.", "phase.*.")  # what also changes the recipe named by plan.counts_of


@dataclass(frozen=True)
class Run:
    """One training run. Its folder is runs/<name>/seed-<n>, its result results/<name>/seed-<n>.json.

    recipe: with the run's seed; counts: the run whose masks weigh this one's sites (plan.counts_of)
    content: of the recipe as it was asked for, whatever its name and seed
    wanted: False for a run that only counts: it has no result
    """

    recipe: Recipe
    content: str
    counts: "Run | None" = None
    wanted: bool = True

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def place(self) -> str:
        """<name>/seed-<n>: in `runs`, in `results`, and before its lines."""
        return place_of(self.recipe)


def place_of(recipe: Recipe) -> str:
    """The place of a recipe's run with its seed."""
    return f"{recipe.name}/seed-{recipe.seed}"


PlanOf = Callable[[Recipe], Plan]  # what plan.file of a recipe holds


def plan_in_file(recipe: Recipe) -> Plan:
    """What the file holds that plan.file names now. Raises RecipeError: it cannot be read."""
    assert recipe.plan.file is not None
    try:
        return Plan.load(recipe.plan.file)
    except (OSError, PlanError) as error:
        raise RecipeError(f"recipe {recipe.name}: plan.file: {error}") from error


def runs_of(
    names: Sequence[str | Path], seeds: Sequence[int], overrides: Iterable[str] = (), plan_of: PlanOf = plan_in_file
) -> list[Run]:
    """A run for each recipe and seed, recipes in their order, seeds within.

    names: of recipes that come with the package, or TOML files; overrides: as `load_recipe` takes them. Those that
        begin with one of SHARED_OVERRIDES change the recipe named by plan.counts_of too; plan_of: as `content` takes it

    Raises ReproduceError: no recipe of that name, two of one name, seeds that are none. RecipeError: of a recipe.
    """
    changes = list(overrides)
    _check_seeds(seeds)
    require(len(names) > 0, "reproduce: wanted at least one recipe")
    found = [load_with_counts(name, changes) for name in dict.fromkeys(map(str, names))]
    known = [recipe.name for recipe, _ in found]
    twice = {name for name in known if known.count(name) > 1}
    require(not twice, f"reproduce: wanted recipes of different names, got {', '.join(twice)} twice")
    return [_run(recipe, counts, seed, plan_of) for recipe, counts in found for seed in seeds]


def with_counts(runs: Iterable[Run], begun: Callable[[Run], bool]) -> list[Run]:
    """`runs`, and before each the one that counts for it, unless it has begun: then it has its numbers. Each once.

    Raises ReproduceError: two different ones would have one folder.
    """
    found: dict[str, Run] = {}
    for run in runs:
        both = (run,) if run.counts is None or begun(run) else (run.counts, run)
        for one in both:
            _check_same(found.setdefault(one.place, one), one)
    return list(found.values())


def _check_same(known: Run, run: Run) -> None:
    if (known.content, known.wanted) != (run.content, run.wanted):
        counts = "one is asked for, one counts for another recipe (plan.counts_of)"
        difference = first_difference(known.recipe, run.recipe) if known.wanted == run.wanted else counts
        raise ReproduceError(f"reproduce: {run.place}: two different runs of one name: {difference}")


def content(recipe: Recipe, counts: Recipe | None = None, plan_of: PlanOf = plan_in_file) -> str:
    """16 hexadecimal digits of all that decides the runs of a recipe but their seed.

    Its name and the row it is for decide nothing; the recipe whose masks weigh its sites stands by its own content. So
    does the plan in plan.file, and from 2 on the version of artifacts: what an older one trained counts no longer.

    plan_of: what a recipe's plan.file holds. Raises what it raises.
    """
    values = _decisive(recipe, plan_of)
    if counts is not None:
        values["plan"] = {**values["plan"], "counts_of": _decisive(counts, plan_of)}
    if VERSION > 1:
        values["version"] = VERSION
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _decisive(recipe: Recipe, plan_of: PlanOf) -> dict[str, Any]:
    values = {key: value for key, value in recipe.to_dict().items() if key not in ("name", "seed", "published")}
    if recipe.plan.file is not None:
        digest = hashlib.sha256(plan_of(recipe).to_json().encode()).hexdigest()
        values["plan"] = {**values["plan"], "file": digest}
    return values


def find(name: str) -> str:
    """`name` if it is a file or a recipe that comes with the package. Raises ReproduceError naming those near to it."""
    if Path(name).is_file() or name in recipe_names():
        return name
    near = difflib.get_close_matches(name, recipe_names(), n=4, cutoff=0.5)
    nearest = f"; near to it are {', '.join(near)}" if near else ""
    raise ReproduceError(f"{name}: no such recipe and no such file{nearest} (deepshare reproduce --list names all)")


def load_with_counts(name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Recipe | None]:
    """The recipe, and the one that plan.counts_of names (beside it or in the package), cut after its masks.

    A recipe that `overrides` change is no longer the one for a row of a paper's table.

    Raises ReproduceError: one of them is not there, or the other is of another network or has no masks. RecipeError.
    """
    recipe = load_recipe(find(name), overrides)
    if first_difference(recipe, load_recipe(find(name))) is not None:
        recipe = replace(recipe, published=None)
    if recipe.plan.counts_of is None:
        return recipe, None
    shared = [change for change in overrides if change.lstrip().startswith(SHARED_OVERRIDES)]
    return recipe, _until_masks(recipe, load_recipe(_beside(name, recipe.plan.counts_of), shared))


def _beside(name: str, counts_of: str) -> str:
    """plan.counts_of as a file beside the recipe's own, where there is one; else by its name."""
    beside = Path(name).parent / f"{counts_of}.toml"
    return str(beside) if Path(name).is_file() and beside.is_file() else find(counts_of)


def _until_masks(recipe: Recipe, counts: Recipe) -> Recipe:
    kinds = [phase.kind for phase in counts.phase]
    here = f"recipe {recipe.name}: plan.counts_of"
    require("masks" in kinds, f"{here}: wanted a recipe with the phase masks, {counts.name} has {', '.join(kinds)}")
    require(
        replace(counts.model, stem_relu=recipe.model.stem_relu) == recipe.model,
        f"{here}: wanted a recipe of the same network, {counts.name} trains another",
    )
    require(
        counts.model.stem_relu or not recipe.model.stem_relu,
        f"{here}: wanted counts of every site, {counts.name} has none of the stem's",
    )
    return replace(counts, name=f"{counts.name}{MASKS}", phase=counts.phase[: kinds.index("masks") + 1])


def _run(recipe: Recipe, counts: Recipe | None, seed: int, plan_of: PlanOf) -> Run:
    recipe, counts = replace(recipe, seed=seed), None if counts is None else replace(counts, seed=seed)
    counted = None if counts is None else Run(counts, content(counts, plan_of=plan_of), wanted=False)
    return Run(recipe, content(recipe, counts, plan_of), counted)


def _check_seeds(seeds: Sequence[int]) -> None:
    whole = all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in seeds)
    fits = whole and len(seeds) > 0 and len(set(seeds)) == len(seeds)
    require(fits, f"reproduce: seeds: wanted different ones from 0 to 2^63 - 1, at least one, got {list(seeds)}")
