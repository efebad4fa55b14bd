"""Recipes: what is read, what is refused and how, and that the shipped ones say what the paper's Table 7 says."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from deepshare import models
from deepshare.budget import published
from deepshare.methods.snl import SNLSettings
from deepshare.plan import Plan
from deepshare.train import Recipe, RecipeError, load_recipe, networks, recipe_names
from deepshare.train.recipe import first_difference, with_weights
from deepshare.train.recipe_parts import PublishedRow

GOOD = """
name = "small"
seed = 3
[data]
name = "digits"
limit = 100
[model]
name = "resnet18"
width = 4
[plan]
method = "uniform"
budget = 240
[[phase]]
kind = "teacher"
epochs = 2
batch_size = 32
lr = 0.1
distill = "none"
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
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(GOOD)
    return file


def test_what_the_file_says_is_what_the_recipe_holds(path):
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.model.width, recipe.data.limit) == ("small", 3, 4, 100)
    assert [phase.kind for phase in recipe.phase] == ["teacher", "gelu", "switch"]
    assert recipe.phase[0].lr == 0.1
    assert recipe.distill.temperature == 4
    with pytest.raises(AttributeError):
        recipe.seed = 4


@pytest.mark.parametrize("name", recipe_names())
def test_resolved_recipes_read_back_equal(name, tmp_path):
    recipe = load_recipe(name)
    file = tmp_path / "again.toml"
    file.write_text(recipe.to_toml())
    assert load_recipe(file) == recipe
    assert recipe.name == name


BAD = [
    ('name = "small"', "", ["name: missing", "wanted a string"]),
    ("seed = 3", 'seed = "3"', ["seed: wanted an integer", "got the string '3'"]),
    ("seed = 3", "seed = true", ["seed: wanted an integer", "got the boolean true"]),
    (
        "width = 4",
        "widht = 4",
        ["model.widht: unknown key", "wanted one of name, width, stem_relu, multipliers, blocks, rho"],
    ),
    ("width = 4", "width = 0", ["model.width: wanted 1 to 4096, got 0"]),
    ("limit = 100", "limit = 1.5", ["data.limit: wanted an integer", "got the number 1.5"]),
    ('"digits"', '"mnist"', ['data.name: wanted "digits" or', "got the string 'mnist'"]),
    ("lr_end = 0.01", "", ["phase.gelu.lr_end: wanted with schedule", "None"]),
    ("epochs = 3", "epochs = 3\nhold = 3", ["phase.switch.hold: wanted 0 to 2, got 3"]),
    ("epochs = 3", "", ["phase[2].epochs: missing; wanted an integer"]),
    ("budget = 240", "", ["plan.budget: wanted with every method but"]),
    ("budget = 240", "budget = 240\nweights = [1, 2]", ["plan.weights: wanted with method"]),
    ("budget = 240", 'budget = 240\nculled = ["S1"]', ["plan.culled, plan.thinned: one or both wanted with method"]),
    ('method = "uniform"\nbudget = 240', 'method = "stages"', ["plan.culled, plan.thinned: one or both wanted with"]),
    ('"uniform"', '"weights"', ["plan.weights: wanted with method", "given in 0 ways"]),
    ('"uniform"', '"weights"\nweights = [1, 2]\ncounts_of = "other"', ["plan.weights: wanted", "given in 2 ways"]),
    ("budget = 240", "budget = 240\ngroup = [1]", ['plan.group: wanted an integer or "auto", got the list [1]']),
    ('method = "uniform"\nbudget = 240', 'method = "relu"', ["phase: gelu softens shared gates"]),
    ('kind = "switch"', 'kind = "finetune"', ["phase: wanted gelu and switch, or neither"]),
    ('distill = "teacher"', 'distill = "gelu"', ["phase.gelu.distill: there is no gelu phase before it"]),
    ("[data]", "[data]\nval_fraction = 0", ['phase.teacher.keep: "best" needs a validation split']),
    ("[data]", "[data", ["small.toml"]),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD, ids=[words[0] for _, _, words in BAD])
def test_wrong_recipes_name_file_key_wanted_and_got(path, old, new, words):
    assert GOOD.count(old) >= 1
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_phases_in_another_order_are_refused(path):
    head, teacher, gelu, switch = GOOD.split("[[phase]]")
    path.write_text("[[phase]]".join((head, gelu, teacher, switch)))
    with pytest.raises(RecipeError, match="pretrain, baseline, gelu, switch, masks, finetune; got gelu, teacher"):
        load_recipe(path)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(RecipeError, match="demo-240, demo-960, "):
        load_recipe("demo-241")


def test_overrides_are_typed_and_reach_phases_by_star_kind_and_position(path):
    changes = ["model.width=8", "phase.*.epochs=5", "phase.gelu.lr=1", "phase.0.keep=last", "data.augment.flip=true"]
    recipe = load_recipe(path, changes)
    assert recipe.model.width == 8
    assert [phase.epochs for phase in recipe.phase] == [5, 5, 5]
    assert [phase.lr for phase in recipe.phase] == [0.1, 1.0, 0.1]
    assert recipe.phase[0].keep == "last"
    assert recipe.data.augment.flip
    assert load_recipe(path) == load_recipe(path, [])


NO_FOLDERS = ("", ".", "..", "../x", "/x", "a/b", "x[1]", "x*", "x?", "x\\u0000", "x\\n", "x" * 201, "ä" * 101)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.width", "wanted key=value"),
        ("model.width=wide", "model.width: wanted an integer, got the string 'wide'"),
        ("model.depth=3", "model.depth: unknown key"),
        ("phase.finetune.lr=1", "no phase 'finetune'; wanted"),
        ("phase.gelu=1", "names a whole table"),
        ("phase=[]", "phase: wanted at least one"),
        ("phase=1", "phase: wanted a list"),
        pytest.param(f"name={'[' * 5000}{']' * 5000}", "small.toml: lists or tables are nested too deep", id="nested"),
        ("name.first=1", "nothing below 'first'"),
        (f"data.split_seed={10**26}", "data.split_seed: wanted 0 to "),
        ("name=\udcff", "name: wanted text that UTF-8 can hold"),
        *((f'name="{name}"', "name: wanted that of a folder, of 1 to 200 bytes, no") for name in NO_FOLDERS),
        ("data.split_seed=-1", "data.split_seed: wanted 0 to "),
        (f"model.width={10**12}", "model.width: wanted 1 to 4096, got 1000000000000"),
        ("data.limit=1", "data.limit: wanted at least 2, got 1"),
        ("phase.gelu.lr=1" + "0" * 400, r"phase\[1\].lr: wanted a finite number, got the integer 1000"),
        ("phase.gelu.lr=inf", r"phase\[1\].lr: wanted a finite number, got the number inf"),
        ("phase.gelu.weight_decay=nan", r"phase\[1\].weight_decay: wanted a finite number, got the number nan"),
        ("phase.gelu.lr_end=-1", "phase.gelu.lr_end: wanted at least 0 and finite, got -1.0"),
        ("phase.gelu.momentum=5", "phase.gelu.momentum: wanted 0 <= m < 1, got 5.0"),
        ("phase.gelu.momentum=1", "phase.gelu.momentum: wanted 0 <= m < 1, got 1.0"),
    ],
)
def test_wrong_overrides_are_refused(path, override, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(path, [override])


def test_first_difference_names_the_key_and_both_values(path):
    recipe = load_recipe(path)
    assert first_difference(recipe, load_recipe(path)) is None
    assert first_difference(recipe, load_recipe(path, ["phase.switch.lr=0.2"])) == "phase.switch.lr (0.1 against 0.2)"
    assert first_difference(recipe, load_recipe(path, ["data.limit=7"])) == "data.limit (100 against 7)"


CIFAR_PHASES = {  # Table 7: epochs, first and last learning rate
    "gelu": (100, 0.05, 5e-4),
    "switch": (150, 1e-3, 1e-3),
    "finetune": (120, 1e-3, 1e-5),
}
TABLE_7 = {  # of ResNet18 on CIFAR-100, WRN-22-8 on CIFAR-100, ResNet18 on Tiny-ImageNet; and the later rates' schedule
    "table1-49.9k": (CIFAR_PHASES, "linear"),
    "table1-12.9k": (CIFAR_PHASES, "linear"),
    "table1-6k": (CIFAR_PHASES, "linear"),
    "table2-60k": (CIFAR_PHASES, "linear"),
    "table3-30k": (
        {"gelu": (100, 0.05, 1e-5), "switch": (150, 1e-4, 1e-4), "finetune": (150, 1e-3, 1e-5)},
        "cosine",
    ),
}


@pytest.mark.parametrize("name", TABLE_7)
def test_shipped_recipes_are_table_7(name):
    recipe = load_recipe(f"deepshare-{name}")
    rows, schedule = TABLE_7[name]
    for phase in recipe.phase[1:]:
        rate = phase.learning_rate
        assert (phase.epochs, rate.at(0), rate.at(phase.epochs - 1)) == pytest.approx(rows[phase.kind])
        assert (phase.batch_size, phase.momentum, phase.weight_decay) == (128, 0.9, 0.001)
        assert phase.schedule == ("constant" if phase.kind == "switch" else schedule)


def test_toml_written_is_toml_read(path):
    recipe = load_recipe(path, ['name="a \\"quoted\\" näme\u2028 \U0001f600"'])
    assert isinstance(recipe, Recipe)
    assert tomllib.loads(recipe.to_toml())["name"] == 'a "quoted" näme\u2028 \U0001f600'
    assert load_recipe(path, ["name=" + "x" * 200]).name == "x" * 200


def test_every_character_survives_being_written(path):
    note = "".join(map(chr, range(0x100))) + "\u2028 \U0001f600"
    row = PublishedRow("paper", "1", "method", "network", "data", 6.0, note)
    recipe = replace(load_recipe(path), published=row)
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(path) == recipe


SNL = """
[[phase]]
kind = "pretrain"
epochs = 4
batch_size = 32
lr = 0.1
schedule = "step"
milestones = [1, 3]
factor = 0.1
distill = "none"
[[phase]]
kind = "masks"
epochs = 9
batch_size = 32
lr = 1e-3
distill = "pretrain"
[[phase]]
kind = "finetune"
epochs = 2
batch_size = 32
lr = 1e-3
distill = "pretrain"
"""


@pytest.fixture
def snl_path(tmp_path: Path) -> Path:
    file = tmp_path / "snl.toml"
    file.write_text(GOOD.partition("[[phase]]")[0].replace('"uniform"', '"snl"') + SNL)
    return file


def test_snl_defaults_are_the_papers_and_resolved(snl_path):
    recipe = load_recipe(snl_path)
    settings = recipe.snl
    assert (settings.lasso, settings.kappa, settings.epsilon, settings.granularity) == (1e-5, 1.1, 0.01, "pixel")
    assert settings.exact
    assert not settings.zero_out
    assert recipe.phase[1].start == "pretrain"
    assert recipe.needs == "pretrain"
    assert "[snl]" in recipe.to_toml()
    snl_path.write_text(recipe.to_toml())
    assert load_recipe(snl_path) == recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["snl.kappa=0.5"], "snl: snl: kappa must be finite and at least 1|snl.*kappa"),
        (["snl.granularity=layer"], 'snl.granularity: wanted "pixel" or "channel"'),
        (["snl.lambda=1"], "snl.lambda: unknown key"),
        (["plan.method=uniform"], 'phase: wanted masks with plan.method "snl" and no other'),
        (["phase.masks.kind=baseline"], 'phase: wanted masks with plan.method "snl"'),
        (["phase.finetune.start=fresh"], "phase.finetune.start: wanted in phase masks alone"),
        (["phase.masks.distill=teacher"], "some need a teacher phase, others a pretrain phase"),
        (["phase.pretrain.kind=teacher"], "some need a teacher phase, others a pretrain phase"),
        (["phase.pretrain.distill=teacher"], 'phase.pretrain.distill: wanted "none"'),
        (["phase.masks.distill=gelu"], "there is no gelu phase before it"),
        (["phase.pretrain.milestones=[3, 1]"], "wanted rising epochs from 1 on"),
        (["phase.pretrain.milestones=[0]"], "wanted rising epochs from 1 on"),
        (["phase.pretrain.schedule=linear"], 'lr_end: wanted with schedule "linear"'),
        (["phase.masks.milestones=[1]"], 'milestones: wanted with schedule "step"'),
        (["phase.pretrain.factor=2"], "factor: wanted 0 to 1"),
        (["phase.masks.lr_end=0.1"], "lr_end: wanted with schedule"),
        (["distill.beta=2"], 'distill.beta: wanted with method "dkd" alone'),
        (["distill.method=dkd", "distill.alpha=-1"], "distill.alpha: wanted at least 0"),
        (["plan.method=file"], 'plan.file: wanted with method "file"'),
        (["teacher.name=resnet20"], "teacher: masks start from pretrain, which must be of this model"),
        (["plan.weights_from=nowhere.json"], "plan.weights_from: .*nowhere.json"),
        (["plan.weights_from=3"], "plan.weights_from: wanted the path of a plan.json, got 3"),
    ],
)
def test_wrong_snl_recipes_are_refused(snl_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(snl_path, changes)


def test_snl_settings_belong_to_snl(path):
    with pytest.raises(RecipeError, match=r'snl: wanted with plan.method "snl" alone, it is .uniform.'):
        load_recipe(path, ["snl.lasso=1e-4"])


def test_dkd_has_its_papers_weights(path):
    assert load_recipe(path).distill.alpha is None
    distill = load_recipe(path, ["distill.method=dkd"]).distill
    assert (distill.alpha, distill.beta) == (1, 8)
    assert load_recipe(path, ["distill.method=dkd", "distill.beta=0.5"]).distill.beta == 0.5


def test_step_schedule_multiplies_after_each_milestone(snl_path):
    rate = load_recipe(snl_path).phase[0].learning_rate
    assert [rate.at(epoch) for epoch in range(4)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_a_published_list_may_stand_in_place_of_weights():
    spec = {"name": "resnet18", "num_classes": 100, "width": 64, "stem_relu": False, "in_channels": 3}
    spec["input_size"] = [3, 32, 32]
    numbers = published("ResNet18_c100_relu50k", Plan.of(models.shapes_only(spec), (3, 32, 32)))
    by_number = with_weights(load_recipe("deepshare-table1-12.9k"), list(numbers.values()))
    by_label = load_recipe("deepshare-table1-12.9k", ["plan.weights=ResNet18_c100_relu50k"])
    assert networks.make_plan(by_number, spec) == networks.make_plan(by_label, spec)
    with pytest.raises(RecipeError, match="nobody"):
        networks.make_plan(load_recipe("deepshare-table1-12.9k", ["plan.weights=nobody"]), spec)


def test_counts_of_another_recipe_need_reproduce():
    recipe = load_recipe("deepshare-table1-12.9k")
    assert recipe.plan.counts_of == "snl-table2-49.9k"
    with pytest.raises(RecipeError, match=r"counts_of: .* snl-table2-49.9k .*deepshare reproduce deepshare-table1"):
        networks.make_plan(recipe, networks.model_spec(recipe.model, 100, (3, 32, 32)))


def test_stages_are_culled_and_thinned(path):
    head, pretrain, *_ = (GOOD.partition("[[phase]]")[0].replace("budget = 240\n", "") + SNL).split("[[phase]]")
    path.write_text(f"{head}[[phase]]{pretrain}")
    changes = ["plan.method=stages", 'plan.culled=["conv1", "S1", "S4"]', 'plan.thinned=["S3"]', "model.stem_relu=true"]

    def plan_of(*changes: str) -> Plan:
        recipe = load_recipe(path, changes)
        return networks.make_plan(recipe, networks.model_spec(recipe.model, 10, (1, 8, 8)))

    whole = [f"layer2.{block}.relu{which}" for block in (0, 1) for which in (1, 2)]
    left = [site.name for site in plan_of(*changes) if site.kind == "relu"]
    assert left == [*whole, "layer3.0.relu2", "layer3.1.relu2"]
    with pytest.raises(RecipeError, match=r"stages must be of .*got 'S5'"):
        plan_of(*changes, 'plan.culled=["S5"]')


def test_models_are_as_published_unless_the_recipe_shapes_them(path):
    assert load_recipe(path, ["model.name=resnet20"]).model.width == 4
    path.write_text(GOOD.replace("width = 4\n", ""))
    assert load_recipe(path, ["model.name=resnet20"]).model.width == 16
    shaped = load_recipe(path, ["model.width=4", "model.multipliers=[3, 2, 2]", "model.rho=0.5"])
    assert networks.model_spec(shaped.model, 10, (1, 8, 8)) == {
        "name": "resnet18",
        "num_classes": 10,
        "width": 4,
        "stem_relu": False,
        "in_channels": 1,
        "input_size": [1, 8, 8],
        "multipliers": [3, 2, 2],
        "rho": 0.5,
    }


def test_the_snl_recipe_is_section_4():
    recipe = load_recipe("snl-table2-49.9k")
    pretrain, masks, finetune = recipe.phase
    rates = [pretrain.learning_rate.at(epoch) for epoch in (0, 79, 80, 119, 120)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    assert (pretrain.batch_size, pretrain.momentum, pretrain.weight_decay) == (256, 0.9, 5e-4)
    assert masks.lr == 1e-3
    assert (finetune.epochs, finetune.lr, finetune.momentum) == (100, 1e-3, 0.9)
    assert (recipe.distill.temperature, recipe.distill.weight) == (4, 0.5)
    assert recipe.snl == SNLSettings()
