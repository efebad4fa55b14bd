"""Recipes that stand on others: what is merged, what is not inherited, which phases are meant, what is refused."""

from pathlib import Path

import pytest

from deepshare.train import RecipeError, load_recipe
from deepshare.train.recipe import first_difference
from deepshare.train.recipe_file import RECIPES

BASE = """
phases = ["teacher", "gelu", "switch"]
[data]
name = "digits"
[data.augment]
crop_padding = 1
[model]
name = "resnet18"
width = 4
[plan]
method = "weights"
budget = 240
group = 2
counts_of = "some-snl"
[distill]
temperature = 3.0
[[phase]]
kind = "gelu"
epochs = 2
batch_size = 32
lr = 0.1
lr_end = 0.01
schedule = "linear"
distill = "teacher"
[[phase]]
kind = "switch"
epochs = 3
batch_size = 32
lr = 0.1
distill = "gelu"
[[phase]]
kind = "baseline"
epochs = 5
batch_size = 32
lr = 0.1
distill = "teacher"
[[phase]]
kind = "teacher"
epochs = 2
batch_size = 32
lr = 0.1
distill = "none"
"""


@pytest.fixture
def child(tmp_path: Path):
    """Write a recipe on the base above, and say where it is."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "digits.toml").write_text(BASE)

    def write(text: str, base: str = "base/digits") -> Path:
        file = tmp_path / "child.toml"
        file.write_text(f'name = "child"\nbase = "{base}"\n{text}')
        return file

    return write


def test_tables_are_merged_by_key_and_phases_by_kind(child):
    recipe = load_recipe(child('[data.augment]\nflip = true\n[[phase]]\nkind = "gelu"\nlr = 0.2'))
    assert (recipe.name, recipe.data.augment.crop_padding, recipe.data.augment.flip) == ("child", 1, True)
    assert [phase.kind for phase in recipe.phase] == ["teacher", "gelu", "switch"]  # in the order in which they run
    gelu = recipe.phase[1]
    assert (gelu.epochs, gelu.lr, gelu.lr_end) == (2, 0.2, 0.01)
    assert recipe.plan.counts_of == "some-snl"


def test_a_nearer_file_lists_the_phases_that_are_meant(child):
    recipe = load_recipe(child('phases = ["baseline", "teacher"]\n[plan]\nmethod = "relu"'))
    assert [phase.kind for phase in recipe.phase] == ["teacher", "baseline"]
    more = '\n[[phase]]\nkind = "finetune"\nepochs = 1\nbatch_size = 9\nlr = 1\ndistill = "none"'
    recipe = load_recipe(child(f'phases = ["teacher", "baseline", "finetune"]\n[plan]\naffine = false{more}'))
    assert [phase.kind for phase in recipe.phase] == ["teacher", "baseline", "finetune"]


def test_another_method_or_schedule_inherits_nothing_of_the_old_one(child):
    recipe = load_recipe(child('[plan]\nmethod = "uniform"\n[[phase]]\nkind = "gelu"\nschedule = "constant"'))
    plan = recipe.plan
    assert (plan.method, plan.budget, plan.group, plan.counts_of) == ("uniform", 240, 2, None)
    assert recipe.phase[1].lr_end is None
    assert load_recipe(child(""), ["plan.method=uniform", "phase.gelu.schedule=constant"]) == recipe
    recipe = load_recipe(child(""), ["phase.*.schedule=cosine", "phase.*.lr_end=0"])
    assert {(phase.schedule, phase.lr_end) for phase in recipe.phase} == {("cosine", 0)}
    recipe = load_recipe(child('[distill]\nmethod = "dkd"\nbeta = 2'), ["distill.method=kd"])
    assert (recipe.distill.method, recipe.distill.beta) == ("kd", None)


def test_weights_replace_counts(child):
    recipe = load_recipe(child("[plan]\nweights = [1, 2]"))
    assert (recipe.plan.weights, recipe.plan.counts_of) == ((1, 2), None)
    recipe = load_recipe(child(""), ["plan.weights=[3, 4]"])
    assert (recipe.plan.weights, recipe.plan.counts_of) == ((3, 4), None)
    recipe = load_recipe(child("[plan]\nweights = [1, 2]"), ["plan.counts_of=other"])
    assert (recipe.plan.weights, recipe.plan.counts_of) == (None, "other")


def test_overrides_reach_inherited_phases_and_choose_among_them(child):
    recipe = load_recipe(child(""), ["phase.*.epochs=7", "phase.0.lr=0.3", "phase.switch.hold=1"])
    assert [(phase.epochs, phase.lr, phase.hold) for phase in recipe.phase] == [(7, 0.3, 0), (7, 0.1, 0), (7, 0.1, 1)]
    recipe = load_recipe(child(""), ["phase.0.lr=0.3", 'phases=["teacher"]', "plan.method=relu"])
    assert [(phase.kind, phase.lr) for phase in recipe.phase] == [("teacher", 0.3)]
    assert (recipe.plan.budget, recipe.plan.group) == (None, 2)
    with pytest.raises(RecipeError, match="no phase 'baseline'"):
        load_recipe(child(""), ["phase.baseline.lr=1"])


def test_a_resolved_recipe_stands_alone(child, tmp_path):
    recipe = load_recipe(
        child('[published]\npaper = "p"\ntable = "1"\nmethod = "m"\nnetwork = "n"\ndataset = "d"\nrelus_k = 6')
    )
    alone = tmp_path / "elsewhere" / "recipe.toml"
    alone.parent.mkdir()
    alone.write_text(recipe.to_toml())
    assert "base" not in recipe.to_toml()
    assert load_recipe(alone) == recipe
    assert load_recipe(alone).published.relus_k == 6
    assert first_difference(recipe, load_recipe(child(""))) is None  # what is published decides nothing


def test_a_recipe_is_for_a_published_row_only_if_it_says_so(child, tmp_path):
    (tmp_path / "base" / "digits.toml").write_text(f'{BASE}[published]\npaper = "p"\ntable = "1"\nmethod = "m"')
    assert load_recipe(child("")).published is None
    row = load_recipe(child('[published]\nnetwork = "n"\ndataset = "d"\nmethod = "mine"\nrelus_k = 1')).published
    assert (row.paper, row.table, row.method, row.relus_k) == ("p", "1", "mine", 1)
    with pytest.raises(RecipeError, match=r"published.network: missing"):
        load_recipe(child('[published]\nmethod = "mine"'))


def test_bases_are_found_beside_the_file_or_in_the_package(child, tmp_path):
    (tmp_path / "base" / "narrow.toml").write_text('base = "digits"\n[model]\nwidth = 2')
    assert load_recipe(child("", "base/narrow")).model.width == 2
    (tmp_path / "mine.toml").write_text('name = "mine"\nbase = "demo-relu"\nseed = 5')
    assert load_recipe(tmp_path / "mine.toml").phase == load_recipe("demo-relu").phase


def test_wrong_bases_are_refused_with_their_chain(child, tmp_path):
    with pytest.raises(RecipeError, match=r"child.toml: base: base/digit is no file beside child.toml"):
        load_recipe(child("", "base/digit"))
    (tmp_path / "base" / "one.toml").write_text('base = "two"')
    (tmp_path / "base" / "two.toml").write_text('base = "../child"')
    with pytest.raises(RecipeError, match=r"child.toml -> \S*one.toml -> \S*two.toml -> \S*child.toml goes round"):
        load_recipe(child("", "base/one"))
    (tmp_path / "base" / "two.toml").write_text('base = "three"')
    with pytest.raises(
        RecipeError, match=r"three is no file beside two.toml.*child.toml -> \S*one.toml -> \S*two.toml"
    ):
        load_recipe(child("", "base/one"))
    (tmp_path / "base" / "one.toml").write_text("= 3")
    with pytest.raises(RecipeError, match=r"child.toml -> \S*one.toml: Invalid"):
        load_recipe(child("", "base/one"))
    (tmp_path / "base" / "one.toml").write_text("base = 3")
    with pytest.raises(RecipeError, match=r"base: wanted the name of a recipe, got 3, in \S*child.toml -> \S*one.toml"):
        load_recipe(child("", "base/one"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("phases = 3", "phases: wanted a list of kinds, got 3"),
        ('phases = ["masks"]', "phases: wanted some of teacher, baseline, gelu, switch, got 'masks'"),
        ('[[phase]]\nkind = "gelu"\n[[phase]]\nkind = "gelu"', "phase: wanted each kind once at most, got gelu, gelu"),
        ("[[phase]]\nlr = 1", "phase.kind: wanted one of teacher, .*got None"),
        ("[plan]\nbudgets = 1", "plan.budgets: unknown key"),
        ('phases = ["teacher"]\n[plan]\nmethod = "relu"\n[teacher]\nname = "resnet20"', "teacher: wanted where phases"),
    ],
)
def test_wrong_children_are_refused(child, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(child(text))


def test_bases_of_the_package_are_no_recipes():
    assert not [path for path in (RECIPES / "base").glob("*.toml") if "\nname" in path.read_text().partition("[")[0]]
