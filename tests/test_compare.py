"""deepshare compare: cells, their plans, resumption, table and picture, on a network that trains in a second."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from reproduce_cases import counted_steps

from deepshare.analysis.cost import cost
from deepshare.cli import main
from deepshare.compare import (
    Cell,
    CompareError,
    Result,
    cells,
    compare,
    compare_recipe_names,
    load_compare_recipe,
    report,
)
from deepshare.compare.cells import cell_recipe
from deepshare.compare.published import FILE, published_results
from deepshare.compare.recipe import ALL_RELU
from deepshare.compare.run import read_results
from deepshare.models import create
from deepshare.plan import Plan
from deepshare.train import ArtifactStore, networks

PHASE = 'epochs = 1\nbatch_size = 16\nlr = 0.01\ndistill = "pretrain"\n'
TINY = f"""
name = "tiny"
budgets = [240, 96]
seeds = [0, 1]
threads = 1
[data]
name = "digits"
limit = 48
val_fraction = 0.2
[model]
name = "resnet18"
width = 2
[distill]
[pretrain]
kind = "pretrain"
epochs = 1
batch_size = 16
lr = 0.01
distill = "none"
[[method]]
name = "SNL"
kind = "snl"
[method.snl]
lasso = 1.0
[[method.phase]]
kind = "masks"
{PHASE}
[[method]]
name = "DeepReDuce"
kind = "deepreduce"
order = ["S1", "S4", "S2", "S3"]
[[method.phase]]
kind = "baseline"
{PHASE}
[[method]]
name = "HybReNet + SNL"
kind = "deepreshape"
model = {{ name = "hrn-2x2x2x", width = 2 }}
thin = ["S1"]
[[method.phase]]
kind = "masks"
{PHASE}
[[method]]
name = "DeepShare"
kind = "deepshare"
counts = "SNL"
[[method.phase]]
kind = "gelu"
{PHASE}
[[method.phase]]
kind = "switch"
{PHASE}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """A comparison that was stopped after its third cell and went on."""
    folder = tmp_path_factory.mktemp("compare")
    path = folder / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    recipe = load_compare_recipe(path, ["seeds=[1]"])

    def stop_at_third(line: str) -> None:
        if line.startswith("[3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recipe, folder / "run", say=stop_at_third)
    assert len(read_results(folder / "run")) == 3
    return folder / "run", compare(recipe, folder / "run", say=lambda line: None)


def test_cells_train_a_teacher_of_each_seed_first(recipe_file: Path):
    found = cells(load_compare_recipe(recipe_file))
    assert len(found) == 2 * (1 + 4 * 2)
    assert found[0] == Cell(ALL_RELU, None, 0)
    assert [cell.seed for cell in found] == [0] * 9 + [1] * 9
    assert len({cell.folder for cell in found}) == len(found)


def test_a_methods_name_may_hold_what_a_recipes_may_not(recipe_file: Path, tmp_path: Path):
    recipe = load_compare_recipe(
        recipe_file, ["method.snl.name='SNL [w/o *]'", "method.deepshare.counts='SNL [w/o *]'"]
    )
    spec = networks.model_spec(recipe.model, 10, (1, 8, 8))
    made, _ = cell_recipe(recipe, Cell("SNL [w/o *]", 96, 0), spec, tmp_path, pretrained=True)
    assert made.name == "tiny SNL -w-o -- 96"


def test_thinning_before_snl_takes_the_stems_relu_too(recipe_file: Path, tmp_path: Path):
    recipe = load_compare_recipe(recipe_file, ["method.2.model.stem_relu=true"])
    spec = networks.model_spec(recipe.model, 10, (1, 8, 8))
    cell = Cell("HybReNet + SNL", 96, 0)
    _, plan = cell_recipe(recipe, cell, spec, tmp_path, pretrained=True)
    assert plan is not None
    linear = [site.name for site in plan if site.kind == "linear"]
    assert linear == ["stem_relu", "layer1.0.relu1", "layer1.1.relu1"]


def test_every_network_is_within_its_budget_and_masks_are_exactly_at_it(finished: tuple[Path, list[Result]]):
    _, results = finished
    assert len(results) == 9
    for result in results:
        if result.budget is None:
            assert result.drelus == 960  # ResNet18, width 2, 8x8
            assert result.flops == cost(create("resnet18", num_classes=10, width=2, in_channels=1), (1, 8, 8)).flops
        elif result.method in ("SNL", "HybReNet + SNL"):
            assert result.drelus == result.budget
        else:
            assert 0 < result.drelus <= result.budget


def test_counts_of_snl_weigh_deepshare(finished: tuple[Path, list[Result]]):
    folder, _ = finished
    shares = json.loads((folder / "DeepShare/96/seed-1/result.json").read_text())
    counted = Plan.load(folder / "SNL/96/seed-1/plan.json")
    recipe = (folder / "DeepShare/96/seed-1/recipe.toml").read_text()
    assert str([float(site.drelus) for site in counted]) in recipe
    assert shares["drelus"] <= 96


def test_what_has_ended_is_not_trained_again(finished: tuple[Path, list[Result]], recipe_file: Path):
    folder, results = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("final.safetensors")}
    assert len(before) == 9
    assert compare(load_compare_recipe(recipe_file, ["seeds=[1]"]), folder, say=lambda line: None) == results
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("final.safetensors")} == before


def test_a_stopped_comparison_ends_as_one_that_was_not(finished: tuple[Path, list[Result]], tmp_path: Path):
    """The same cells of a comparison of fewer methods and budgets, in one go: a cell depends on its seed alone."""
    _, results = finished
    head, snl, _, _, shares = TINY.split("[[method]]")
    path = tmp_path / "fewer.toml"
    path.write_text("[[method]]".join([head.replace("240, ", ""), snl, shares]), encoding="utf-8")
    fewer, store = load_compare_recipe(path, ["seeds=[1]"]), ArtifactStore(tmp_path / "artifacts")
    alone = compare(fewer, tmp_path / "run", artifacts=store, say=lambda line: None)
    assert [cell.method for cell in alone] == [ALL_RELU, "SNL", "DeepShare"]
    same = [result for result in results if result.method in ("SNL", "DeepShare", ALL_RELU) and result.budget != 240]
    assert [replace(r, seconds=0) for r in alone] == [replace(r, seconds=0) for r in same]
    with counted_steps() as steps:
        assert compare(fewer, tmp_path / "again", artifacts=store, say=lambda line: None) == alone
    assert steps == [0]


def test_the_folder_of_another_comparison_is_refused(finished: tuple[Path, list[Result]], recipe_file: Path):
    folder, _ = finished
    other = load_compare_recipe(recipe_file, ["seeds=[5]"])
    with pytest.raises(CompareError, match="holds another comparison"):
        compare(other, folder)


def test_table_has_a_row_per_method_and_budget_with_mean_and_spread():
    results = [Result("A", 96, seed, 90 + seed, 2_170_000, 0.5 + seed / 10, None, 3, 60.0) for seed in (0, 1, 2)]
    results += [Result(ALL_RELU, None, 0, 960, 2_170_000, 0.75, None, 1, 6.0)]
    rows = report.table(results).splitlines()[2:]
    assert rows[0] == "| A | 96 | 90 - 92 | 2.17 | 60.00 % (10.00) | 50.00 - 70.00 | 3 | 3 | 1.0 |"
    assert rows[1] == f"| {ALL_RELU} | - | 960 | 2.17 | 75.00 % | 75.00 - 75.00 | 1 | 1 | 0.1 |"


def test_report_and_picture_come_whole(finished: tuple[Path, list[Result]], recipe_file: Path):
    pytest.importorskip("matplotlib")
    folder, results = finished
    page = report.write(load_compare_recipe(recipe_file), results, folder).read_text()
    assert "no figures for this network and data set" in page
    assert page.count("\n| ") == 3 + 4 * 2  # header and rule, all-ReLU, methods by budgets
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_published_figures_stand_behind_the_same_network(tmp_path: Path):
    pytest.importorskip("matplotlib")
    recipe = load_compare_recipe("compare-r18-c100")
    results = [Result("SNL", 12288, seed, 12288, 555_468_800, 0.6 + seed / 100, None, 3, 60.0) for seed in (0, 1)]
    page = report.write(recipe, results, tmp_path).read_text()
    assert "Faint points: published" in page
    plain = report.plot(replace(recipe, model=replace(recipe.model, width=16)), results, tmp_path / "plain.png")
    assert plain.read_bytes() != (tmp_path / "pareto.png").read_bytes()


def test_published_points_are_of_the_same_network_and_data_set_only():
    points = published_results("resnet18", None, "cifar100")
    assert any(point.method == "DeepShare" and point.relus_k == 12.9 and point.accuracy == 77.29 for point in points)
    assert published_results("resnet18", 16, "cifar100") == [] == published_results("resnet18", None, "digits")
    assert published_results("resnet56", None, "cifar100") == []


@pytest.mark.shared
def test_the_published_figures_are_the_transcribed_ones(shared_dir: Path):
    def rows(path: Path) -> list[str]:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]

    theirs = [line for line in rows(shared_dir / "reference" / "published.csv") if "ADE20K" not in line]
    assert rows(FILE) == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name='a/b'", "name: wanted that of a folder"),
        pytest.param(f"name={'[' * 5000}{']' * 5000}", "lists or tables are nested too deep", id="nested"),
        ("budgets=[]", "budgets: wanted at least one"),
        ("budgets=[0]", "budgets: wanted at least 1, got 0"),
        ("seeds=[1, 1]", "seeds: wanted each once, got 1, 1"),
        ("method.snl.order=['S1']", "method SNL: order belongs to deepreduce, not snl"),
        ("method.deepshare.counts='Nobody'", "counts must name a method before it"),
        ("pretrain.kind='teacher'", 'pretrain.kind: wanted "pretrain"'),
        ("colour='red'", "colour: unknown key"),
        ("method.snl.phase.0.kind='pretrain'", "wanted no teacher and no pretrain phase"),
        ("threads=99999999999", "threads: wanted 1 to 1024, got 99999999999"),
        ("method.deepreduce.name='..'", "method.name: wanted a letter or digit, then 59 printable"),
        ("method.deepreduce.name='a|b'", "printable characters at most, no |; got 'a|b'"),
        ("method.deepreduce.name='all-ReLU'", "method.name: wanted none of all-ReLU"),
        ("method.deepreduce.name='HybReNet - SNL'", "wanted names that differ in letters"),
    ],
)
def test_bad_comparisons_name_the_key(recipe_file: Path, change: str, message: str):
    with pytest.raises(CompareError, match=r"tiny\.toml") as caught:
        load_compare_recipe(recipe_file, [change])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("budgets=[5]", "budget must be at least"),  # below DeepReDuce's smallest and DeepShare's floor
        ("budgets=[2000]", "960"),  # above the network's ReLUs
        ("budgets=[720]", "HybReNet + SNL: snl: budget must be"),  # above the thinned HybReNet's 704
        ("method.deepreduce.order=['S1', 'S1']", "S1"),
        ("method.deepreshape.thin=['S9']", "method HybReNet + SNL: thin: stages must be of S1, S2, S3, S4"),
        ("method.deepshare.phase=[]", "method DeepShare: phase: wanted at least one"),
        ("method.deepreduce.phase.baseline.distill=none", "method DeepReDuce: phase: wanted one that begins with or"),
        ("data.augment.crop_padding=1000000", "cannot be applied"),
    ],
)
def test_what_cannot_be_met_is_said_before_anything_is_written(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
):
    folder = tmp_path / "run"
    assert main(["compare", str(recipe_file), "--out", str(folder), "--set", change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("deepshare: ")
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("kept", ["deepreduce", "deepshare"])
def test_a_budget_above_the_relus_is_refused_by_methods_that_would_give_all(
    recipe_file: Path, tmp_path: Path, kept: str
):
    recipe = load_compare_recipe(recipe_file, ["budgets=[961]"])
    (alone,) = (replace(method, counts=None) for method in recipe.method if method.kind == kept)
    with pytest.raises(CompareError, match="budgets: wanted at most the 960 ReLUs of the network, got 961"):
        compare(replace(recipe, method=(alone,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_said_before_anything_is_written(recipe_file: Path, tmp_path: Path, capsys):
    assert main(["compare", str(recipe_file), "--out", str(tmp_path / "run"), "--device", "nowhere"]) == 2
    assert "device 'nowhere' cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_matplotlib_is_said_before_anything_is_trained(
    recipe_file: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", str(recipe_file), "--out", str(tmp_path / "run")]) == 2
    assert "the pictures need matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_moved_comparison_goes_on(finished: tuple[Path, list[Result]], recipe_file: Path, tmp_path: Path):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "moved")
    for path in (tmp_path / "moved/DeepReDuce").rglob("result.json"):
        path.unlink()
    assert results == compare(
        load_compare_recipe(recipe_file, ["seeds=[1]"]), tmp_path / "moved", say=lambda line: None
    )


def test_names_are_no_formulas(finished: tuple[Path, list[Result]], recipe_file: Path, tmp_path: Path):
    _, results = finished
    named = [replace(result, method=result.method.replace("SNL", r"$\frac$")) for result in results]
    recipe = replace(load_compare_recipe(recipe_file), name=r"$\frac$")
    assert report.plot(recipe, named, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", compare_recipe_names())
def test_the_comparisons_of_the_package_load(name: str):
    recipe = load_compare_recipe(name)
    assert recipe.name == name
    assert {method.kind for method in recipe.method} == {"snl", "deepreduce", "deepreshape", "deepshare"}


def test_the_command_lists_and_names_what_there_is(capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "--list"]) == 0
    assert "compare-digits" in capsys.readouterr().out.split()
    assert main(["compare", "nothing"]) == 2
    assert "no such file and no such comparison; there are" in capsys.readouterr().err
