"""The recipes of the papers' tables: each has one row of published.csv, and makes that row's network and count."""

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from deepshare import models
from deepshare.budget import allocate
from deepshare.compare.published import FILE
from deepshare.plan import Plan, count_drelus
from deepshare.train import Recipe, load_recipe, networks, recipe_names
from deepshare.train.recipe import with_weights

SIZES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "tiny-imagenet": (3, 64, 64)}
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200}
DATA = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "Tiny-ImageNet": "tiny-imagenet"}
NETWORKS = {"resnet18": "ResNet18", "wrn-22-8": "WRN-22-8", "hrn-5x5x3x": "HRN", "hrn-2x5x3x": "HRN"}
METHODS = {"deepshare": ("DeepShare", "Baseline"), "snl": ("SNL",), "deepreduce": ("S",), "deepreshape": ("HRN",)}
GRANULARITY = {"cifar10": 16, "cifar100": 16, "tiny-imagenet": 64}  # DReLUs of a ResNet18's cheapest prototype
DOCS = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
OURS = ("demo-", "cpu-")  # experiments of our own, for no row
PAPERS = [name for name in recipe_names() if not name.startswith(OURS) and "criticality" not in name]


@cache
def rows() -> tuple[dict[str, str], ...]:
    with FILE.open(encoding="utf-8", newline="") as lines:
        return tuple(csv.DictReader(line for line in lines if not line.startswith("#")))


def row_of(recipe: Recipe) -> dict[str, str]:
    """The one row that [published] names."""
    wanted = recipe.published
    keys = ("paper", "table", "method", "network", "dataset")
    found = [
        row
        for row in rows()
        if all(row[key] == getattr(wanted, key) for key in keys) and float(row["relus_k"]) == wanted.relus_k
    ]
    assert len(found) == 1, wanted
    return found[0]


def spec_of(recipe: Recipe) -> dict:
    return networks.model_spec(recipe.model, CLASSES[recipe.data.name], SIZES[recipe.data.name])


@cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


@cache
def plan_of(recipe: Recipe) -> Plan:
    """As `make_plan`'s; with equal weights where the counts of another run are wanted, which changes no total."""
    if recipe.plan.counts_of is not None:
        recipe = with_weights(recipe, [1] * {"resnet18": 16, "wrn-22-8": 18}[recipe.model.name])
    return networks.make_plan(recipe, spec_of(recipe))


def test_every_training_row_of_the_tables_has_a_recipe():
    counts = {}
    for name in PAPERS:
        published = recipe_of(name).published
        key = f"{published.paper} {published.table}"
        counts[key] = counts.get(key, 0) + 1
        assert name.startswith(f"{published.paper}-table{published.table}-")
    ours = {f"{row['paper']} {row['table']}": [] for row in rows()}
    for row in rows():
        methods = {
            "deepshare": ("DeepShare", "Baseline"),
            "snl": ("SNL",),
            "deepreduce": ("S",),
            "deepreshape": ("HRN",),
        }
        if row["method"].startswith(methods[row["paper"]]) and row["method"] != "DeepShare full":
            ours[f"{row['paper']} {row['table']}"].append(row)
    tables = ("deepshare 1", "deepshare 2", "deepshare 3", "deepshare 5", "snl 2", "snl 3", "snl 4")
    assert counts == {table: len(ours[table]) for table in (*tables, "deepreduce 4", "deepreshape 6")}


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_is_for_one_row_and_makes_its_network(name):
    recipe = recipe_of(name)
    row = row_of(recipe)
    assert recipe.name == name
    assert DATA[row["dataset"]] == recipe.data.name
    assert NETWORKS[recipe.model.name] == row["network"]
    wanted = 1000 * float(row["relus_k"])
    if recipe.plan.method == "snl":
        assert recipe.plan.budget == round(wanted)
        networks.make_plan(recipe, spec_of(recipe))  # which refuses a budget that cannot be reached
        return
    reached = plan_of(recipe).drelus
    if recipe.plan.budget is not None:
        assert recipe.plan.budget == round(wanted)
        assert 0 <= wanted - reached < GRANULARITY[recipe.data.name] * (4 if recipe.model.name.startswith("wrn") else 1)
    else:  # printed with one or two digits, some rows cut off and 3,264 printed as 3.2K
        assert abs(wanted - reached) < {"deepreshape": 100, "deepreduce": 10, "deepshare": 10}[row["paper"]]


@pytest.mark.parametrize("name", PAPERS)
def test_the_docs_have_its_count_and_the_papers_accuracy(name):
    recipe, row = recipe_of(name), row_of(recipe_of(name))
    drelus = recipe.plan.budget if recipe.plan.method == "snl" else plan_of(recipe).drelus
    network = row["network"] if row["paper"] in ("deepshare", "snl") else row["method"]
    line = f"| `{name}` | {network}, {row['dataset']} | {drelus:,} | {row['metric']} |"
    assert line in DOCS.read_text(encoding="utf-8").splitlines()


def test_no_row_has_two_recipes():
    found = [row_of(recipe_of(name)) for name in PAPERS]
    assert len({tuple(row.values()) for row in found}) == len(found)


def test_counts_come_from_the_same_network_on_the_same_data():
    for name in PAPERS:
        recipe = recipe_of(name)
        if recipe.plan.counts_of is not None:
            source = recipe_of(recipe.plan.counts_of)
            assert source.plan.method == "snl"
            assert (source.data.name, source.model) == (recipe.data.name, recipe.model)


def test_the_networks_without_replicates_keep_the_prototypes_of_the_full_one():
    trimmed = load_recipe("deepshare-table5-no-replicates")
    full = load_recipe("deepshare-table1-6k")
    plan = allocate(Plan.of(models.shapes_only(spec_of(full)), (3, 32, 32)), "ResNet18_c100_relu50k", 6000).plan
    assert list(trimmed.model.channels) == [site.prototypes for site in plan if site.prototypes]
    assert all(site.leader or site.prototypes == site.channels for site in plan_of(trimmed))
    assert plan_of(trimmed).drelus == plan.drelus == 6000
    assert trimmed.teacher == full.model
    assert replace(trimmed, name="any", model=full.model, plan=full.plan, teacher=None, published=None) == replace(
        full, name="any", published=None
    )


def test_teachers_are_the_papers_whole_networks():
    teachers = {name.split("-")[0]: recipe_of(name).teacher for name in PAPERS if recipe_of(name).teacher}
    assert teachers.keys() == {"deepshare", "deepreduce", "deepreshape"}
    assert teachers["deepreduce"] == teachers["deepreshape"]
    recipe = recipe_of("deepshare-table5-no-replicates")
    for paper, relus in (("deepshare", 491_520), ("deepreduce", 557_056)):
        spec = networks.spec_of(replace(recipe, teacher=teachers[paper]), spec_of(recipe), "teacher")
        assert count_drelus(models.shapes_only(spec), (3, 32, 32)).total == relus


def test_plain_distillation_is_two_settings_away():
    recipe = load_recipe("deepreshape-table6-52.2k", ["distill.method=kd", "distill.weight=0.9"])
    assert (recipe.distill.method, recipe.distill.weight, recipe.distill.temperature) == ("kd", 0.9, 4)
