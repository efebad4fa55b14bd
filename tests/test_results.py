"""Results as files and as numbers: what is refused, what is averaged, what stands in the tables."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from reproduce_cases import write_recipes

from deepshare import cli, models
from deepshare.plan import Plan
from deepshare.reproduce import ReproduceError, Result, SiteAffine, listing, read_result, read_results, runs, statistics
from deepshare.reproduce.chain import Settings
from deepshare.reproduce.check import check_runs
from deepshare.reproduce.result import FORMAT, six_digits, write_result
from deepshare.reproduce.runs import content, load_with_counts, runs_of, with_counts
from deepshare.reproduce.table import end_table, standing
from deepshare.train import RecipeError
from deepshare.train.provenance import Machine, Session, Versions
from deepshare.train.run_folder import RunFolder

SESSION = Session(
    "2026-01-31T23:59:59Z", 1, Versions("0.6", "2.13.0", "3.11.9"), Machine("a CPU", 8, 4), "0123456789ab"
)


SMALL = {"name": "resnet18", "num_classes": 10, "in_channels": 1, "width": 2, "blocks": [1, 1, 1, 1]}
SMALL_PLAN = Plan.of(models.shapes_only(SMALL), (1, 8, 8))  # of the recipes' network on the digits


RECIPE = {"data": {"name": "digits"}, "model": {"name": "resnet18"}, "plan": {"method": "relu"}}


def result(seed: int = 0, accuracy: float = 0.75, its_content: str = "c" * 16, **changes) -> Result:
    made = Result(
        FORMAT,
        "share",
        seed,
        its_content,
        {"seed": seed, **RECIPE},
        {"finetune": "f" * 64},
        {"finetune": (SESSION,)},
        {"finetune": 1.5},
        ({"phase": "finetune", "epoch": 1, "val_accuracy": None},),
        5980,
        {"one": 5000, "two": 980},
        accuracy,
        accuracy - 0.01,
        affine={"one": SiteAffine((1.0, 2.0), (0.0, 1e-9), 1), "two": SiteAffine((1.0,), (0.5,), 0, "one")},
    )
    return replace(made, **changes)


def test_a_result_comes_back_as_it_was_written(tmp_path):
    written = result()
    path = write_result(tmp_path, written)
    assert path == tmp_path / "share" / "seed-0.json"
    assert read_result(path) == written
    write_result(tmp_path, result(seed=2))
    assert [found.seed for found in read_results(tmp_path)] == [0, 2]
    assert read_results(tmp_path, "other") == read_results(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": FORMAT + 1}, r"format: wanted 1, got 2; a newer deepshare wrote it"),
        ({"format": None}, r"format: wanted 1, got None$"),
        ({"name": "relu"}, r"wanted the result of share/seed-0, got that of relu/seed-0"),
        ({"seed": 1}, r"wanted the result of share/seed-0, got that of share/seed-1"),
        ({"seed": "0"}, r"seed: wanted an integer, got the string '0'"),
        ({"drelus": 6000}, r"drelus: wanted the sum of drelus_by_site, 5,980, got 6,000"),
        ({"test_accuracy": 75.0}, r"test_accuracy: wanted 0 to 1, got 75.0"),
        ({"seconds": {}}, r"seconds: wanted those of finetune, got"),
        ({"drelus_by_site": {"one": 5000.5}}, r"drelus_by_site.one: wanted an integer, got the number 5000.5"),
        ({"sessions": {"finetune": [{"began": 3}]}}, r"sessions.finetune\[0\]"),
        ({"affine": {"one": {"alpha": [1], "beta": [], "prototypes": 1}}}, r"affine.one: wanted as many alpha as beta"),
        ({"sessions": {}}, r"sessions: wanted those of finetune, got none"),
        ({"recipe": {}}, r"recipe\.data\.name: wanted a string, got None"),
        ({"recipe": {**RECIPE, "model": "resnet18"}}, r"recipe\.model\.name: wanted a string, got None"),
        ({"recipe": {**RECIPE, "data": {"name": "digits", "limit": "64"}}}, r"limit: wanted an integer, got '64'"),
        ({"colour": "red"}, r"colour: unknown key"),
    ],
)
def test_a_result_that_is_not_one_is_refused_with_file_wanted_and_got(tmp_path, change, words):
    path = write_result(tmp_path, result())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ReproduceError, match=rf"share/seed-0\.json: .*{words}"):
        read_result(path)


@pytest.mark.parametrize("text", ["", "[]", "\x00", '{"format": 1}', "[" * 10**5])
def test_a_damaged_result_is_refused(tmp_path, text):
    path = tmp_path / "share" / "seed-0.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ReproduceError, match=r"share/seed-0\.json: "):
        read_results(tmp_path)


def test_a_result_whose_fields_disagree_is_not_written(tmp_path):
    with pytest.raises(ReproduceError, match="drelus"):
        write_result(tmp_path, result(drelus=1))
    assert list(tmp_path.iterdir()) == []


def test_statistics_are_of_a_sample_and_of_one_recipe():
    found = statistics([result(0, 0.5), result(1, 0.625), result(2, 0.875)])
    assert found.mean == pytest.approx(100 * 2 / 3)
    assert found.sd == pytest.approx(stdev([50, 62.5, 87.5]))
    assert (found.n, found.low, found.high) == (3, 50, 87.5)
    assert str(found) == "66.67 ± 19.09"
    last = statistics([result(0, 0.5), result(1, 0.625)], last=True)
    assert last.mean == pytest.approx((49 + 61.5) / 2)
    one = statistics([result(0, 0.5)])
    assert (one.mean, one.sd, one.n, str(one)) == (50, None, 1, "50.00")
    for results, words in (
        ([], "at least one"),
        ([result(0), result(1, its_content="d" * 16)], "of one recipe, got 2 different ones"),
        ([result(0), result(0)], "each seed once"),
    ):
        with pytest.raises(ReproduceError, match=words):
            statistics(results)


def test_alpha_and_beta_keep_six_digits_and_must_be_finite():
    assert six_digits([0.123456789, -1.23456789e-7, 1234567.0]) == (0.123457, -1.23457e-07, 1234570.0)
    with pytest.raises(ReproduceError, match="finite"):
        six_digits([float("nan")])


def share(folder: Path) -> tuple[str, str]:
    """The recipe's file, and its content."""
    name = write_recipes(folder)["share"]
    return name, content(*load_with_counts(name))


def test_content_is_of_what_decides_the_recipe_of_its_counts_included(tmp_path):
    name, ours = share(tmp_path)
    again = write_recipes(tmp_path / "again")
    path, snl = Path(again["share"]), Path(again["snl"])
    path.write_text(
        path.read_text().replace('name = "share"', 'name = "other"\nseed = 7').replace("relus_k = 6", "relus_k = 12.9")
    )
    assert content(*load_with_counts(str(path))) == ours
    assert content(*load_with_counts(name, ["plan.gamma=2"])) != ours
    assert content(*load_with_counts(name, ["data.limit=63"])) != ours
    masks, _, after = snl.read_text().partition('kind = "finetune"')
    snl.write_text(masks + 'kind = "finetune"' + after.replace("epochs = 2", "epochs = 3"))  # after the masks
    assert content(*load_with_counts(str(path))) == ours
    snl.write_text(snl.read_text().replace("lasso = 0.1", "lasso = 0.2"))
    assert content(*load_with_counts(str(path))) != ours


def test_content_has_the_plan_in_a_file_and_the_version_of_artifacts(tmp_path, monkeypatch):
    name, file = write_recipes(tmp_path)["relu"], tmp_path / "plan.json"
    plain, words = content(*load_with_counts(name)), ["plan.method=file", f"plan.file={file}"]
    with pytest.raises(RecipeError, match=r"recipe relu: plan\.file: .*plan\.json"):
        runs_of([name], (0,), words)
    found = []
    for kind in ("relu", "linear"):
        SMALL_PLAN.replace("layer1.0.relu1", kind).save(file)
        found.append(content(*load_with_counts(name, words)))
    file.write_text(json.dumps(json.loads(file.read_text())))  # the same plan
    assert content(*load_with_counts(name, words)) == found[1]
    monkeypatch.setattr(runs, "VERSION", 2)
    found += [content(*load_with_counts(name, words)), content(*load_with_counts(name)), plain]
    assert len(set(found)) == 5


def test_a_run_that_has_begun_keeps_its_plan_whatever_became_of_the_file(tmp_path):
    name, file = write_recipes(tmp_path)["relu"], tmp_path / "plan.json"
    settings, words = Settings(tmp_path / "runs", tmp_path / "results"), ["plan.method=file", f"plan.file={file}"]
    SMALL_PLAN.save(file)
    (begun,) = runs_of([name], (0,), words, settings.plan_of)
    RunFolder(settings.folder(begun)).begin(begun.recipe, SMALL_PLAN, None)
    file.unlink()
    (again,) = runs_of([name], (0,), words, settings.plan_of)
    assert again == begun
    check_runs([again], settings)
    with pytest.raises(RecipeError, match=r"recipe relu: plan\.file: .*plan\.json"):
        runs_of([name], (0, 1), words, settings.plan_of)
    SMALL_PLAN.replace("layer1.0.relu1", "linear").save(file)
    changed = runs_of([name], (0, 1), words, settings.plan_of)
    with pytest.raises(ReproduceError, match=r"seed-0: holds a run of another recipe: plan\.file \(.*another plan"):
        check_runs(changed, settings)


def test_changes_of_data_model_and_all_phases_reach_what_counts(tmp_path):
    changes = ["model.width=3", "data.limit=63", "phase.*.batch_size=16", "phase.gelu.lr=0.1", "plan.budget=100"]
    recipe, counts = load_with_counts(write_recipes(tmp_path)["share"], changes)
    assert counts.model.width == recipe.model.width == 3
    assert counts.data.limit == 63
    assert {phase.batch_size for phase in counts.phase} == {16}
    assert (recipe.plan.budget, counts.plan.budget) == (100, 150)
    assert recipe.published is None  # it is another recipe than the one for that row


def test_what_counts_runs_once_a_seed_and_not_for_a_run_that_has_begun(tmp_path):
    recipes = write_recipes(tmp_path)
    other = tmp_path / "wide.toml"
    other.write_text(Path(recipes["share"]).read_text().replace('name = "share"', 'name = "wide"'))
    runs = runs_of([recipes["share"], str(other)], (0, 1))
    wanted = ["snl-masks/seed-0", "share/seed-0", "snl-masks/seed-1", "share/seed-1", "wide/seed-0", "wide/seed-1"]
    assert [run.place for run in with_counts(runs, lambda run: False)] == wanted
    assert [run.place for run in with_counts(runs, lambda run: run.recipe.seed == 1)] == [*wanted[:2], *wanted[3:]]


def test_two_different_runs_of_one_name_are_refused(tmp_path):
    recipes, others = write_recipes(tmp_path / "p"), write_recipes(tmp_path / "q")
    for name, old, new in (("share", 'name = "share"', 'name = "wide"'), ("snl", "lasso = 0.1", "lasso = 0.2")):
        Path(others[name]).write_text(Path(others[name]).read_text().replace(old, new))
    both = runs_of([recipes["share"], others["share"]], (0,))
    with pytest.raises(ReproduceError, match=r"snl-masks/seed-0: two different .*: snl\.lasso \(0\.1 against 0\.2\)"):
        with_counts(both, lambda run: False)
    assert with_counts(both, lambda run: True) == both
    masks = tmp_path / "masks.toml"
    masks.write_text(Path(recipes["relu"]).read_text().replace('name = "relu"', 'name = "snl-masks"'))
    with pytest.raises(ReproduceError, match=r"snl-masks/seed-0: .*one is asked for, one counts"):
        with_counts(runs_of([recipes["share"], masks], (0,)), lambda run: False)


def test_the_list_has_paper_and_ours_or_not_run_and_leaves_stale_results_out(tmp_path, capsys):
    name, current = share(tmp_path / "recipes")
    results = tmp_path / "results"
    command = ["reproduce", "--list", name, "--results", str(results)]
    assert cli.main(command) == 0
    head, columns, _, row = capsys.readouterr().out.splitlines()
    assert head == "DeepShare, Table 1"
    assert columns.split() == [
        "recipe",
        "network",
        "data",
        "kReLUs",
        "paper",
        "ours",
        "n",
        "last",
        "epoch",
        "commit",
        "machine",
    ]
    assert row.split() == ["share", "ResNet18", "CIFAR-100", "6", "76.13", "not", "run", "-", "not", "run", "-", "-"]
    for seed, accuracy in ((0, 0.76), (1, 0.77)):
        write_result(results, result(seed, accuracy, current))
    write_result(results, result(5, 0.5, "an older recipe"))
    assert cli.main(command) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert "76.13  76.50 ± 0.71 (1 stale result of another recipe)  2  75.50 ± 0.71" in row
    assert row.endswith("0123456789ab  a CPU, 4 of 8 cores")


def test_the_table_at_the_end_has_the_difference_and_says_what_is_stale(tmp_path):
    name, current = share(tmp_path / "recipes")
    recipe, _ = load_with_counts(name)
    lines = end_table([standing(recipe, current, tmp_path)]).splitlines()
    assert lines[-1].split() == ["share", "-", "76.13", "not", "run", "-", "not", "run", "-"]
    write_result(tmp_path, result(0, 0.77, current))
    write_result(tmp_path, result(1, 0.5, "an older recipe"))
    *_, row, note = end_table([standing(recipe, current, tmp_path)]).splitlines()
    assert row.split() == ["share", "5,980", "76.13", "77.00", "1", "76.00", "+0.87"]
    assert note == "share: 1 stale result of another recipe, left out"


def test_every_packaged_recipe_for_a_row_finds_its_row(tmp_path):
    text = listing(tmp_path)
    assert "DeepShare, Table 1" in text
    assert text.count("not run") >= 2 * text.count("deepshare-table1-")
    with pytest.raises(ReproduceError, match="none of these recipes"):
        listing(tmp_path, ["demo-240"])
