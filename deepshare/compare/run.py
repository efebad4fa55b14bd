"""Run every cell of a comparison that has not ended yet, and keep what each ended with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepshare import models
from deepshare.analysis.cost import cost
from deepshare.checkpoint import load_checkpoint
from deepshare.compare.cells import Cell, all_relu_recipe, as_begun, cell_recipe, cells, method_of
from deepshare.compare.recipe import ALL_RELU, CompareError, CompareRecipe
from deepshare.files import write_whole
from deepshare.methods import snl
from deepshare.plan import PlanError
from deepshare.train import ArtifactStore, RecipeError, TrainResult, networks, train
from deepshare.train.trainer import check_run


@dataclass(frozen=True)
class Result:
    """What a cell's run ended with.

    drelus: of its network, at most the budget; flops: its multiply-accumulates (`analysis.cost`); accuracies: shares in
    [0, 1]; epochs: trained, of all phases, the teacher's not counted; seconds: spent in them
    """

    method: str
    budget: int | None
    seed: int
    drelus: int
    flops: int
    test_accuracy: float
    val_accuracy: float | None
    epochs: int
    seconds: float


def compare(
    recipe: CompareRecipe,
    folder: Path,
    *,
    data_root: Path | None = None,
    device: str | None = None,
    artifacts: ArtifactStore | None = None,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Train every cell of `recipe` in `folder`, one after the other; what has ended is not trained again.

    Writes folder/results.json after each cell. A killed comparison continues when called again. artifacts: as `train`
    takes them; comparisons that differ in budgets or methods alone then share their all-ReLU networks.

    Raises:
        CompareError: the folder holds another comparison, or a method has no network within a budget (before anything
            is trained). RecipeError, DataError, TrainingError: as `train` raises them.
    """
    settings = folder / "compare.json"
    claim = json.dumps(asdict(recipe), indent=1) + "\n"
    if settings.is_file() and settings.read_bytes() != claim.encode():
        raise CompareError(f"{folder}: holds another comparison (its {settings.name} differs); choose another folder")
    dataset = recipe.data.load(data_root)
    spec = networks.model_spec(recipe.model, dataset.num_classes, dataset.input_size)
    check_run(all_relu_recipe(recipe, recipe.seeds[0]), dataset, device)
    _check_budgets(recipe, spec)
    _check_cells(recipe, spec, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(settings, claim)
    results: list[Result] = []
    with _threads(recipe.threads):
        for cell in (todo := cells(recipe)):
            ended = _train(recipe, cell, spec, folder, data_root, device, artifacts)
            results.append(_result(cell, ended))
            write_whole(folder / "results.json", json.dumps([asdict(result) for result in results], indent=1) + "\n")
            say(_line(results[-1], len(results), len(todo)))
    return results


def _check_budgets(recipe: CompareRecipe, spec: dict[str, Any]) -> None:
    """Whether the all-ReLU network has the DReLUs that are asked for: some methods would give all they have."""
    most = networks.make_plan(all_relu_recipe(recipe, recipe.seeds[0]), spec).drelus
    if max(recipe.budgets) > most:
        raise CompareError(
            f"budgets: wanted at most the {most:,} ReLUs of the network, got {', '.join(map(str, recipe.budgets))}"
        )


def _check_cells(recipe: CompareRecipe, spec: dict[str, Any], folder: Path) -> None:
    """Make every recipe and plan, so that what cannot be met is said before hours of training."""
    for cell in cells(recipe):
        if cell.budget is None or cell.seed != recipe.seeds[0]:
            continue
        try:
            _check_cell(recipe, cell, spec, folder)
        except (PlanError, RecipeError, snl.SNLError) as error:
            raise CompareError(f"method {cell.method}: {error}") from error


def _check_cell(recipe: CompareRecipe, cell: Cell, spec: dict[str, Any], folder: Path) -> None:
    pretrained = _teacher(recipe, cell, folder) is not None
    made, given = cell_recipe(recipe, cell, spec, folder, pretrained=pretrained, counted=False)
    if made.needs != "pretrain":
        raise CompareError(f'method {cell.method}: phase: wanted one that begins with or distils from "pretrain"')
    made_spec = networks.model_spec(made.model, spec["num_classes"], spec["input_size"])
    plan = networks.make_plan(made, made_spec, given)
    if made.snl is not None and cell.budget is not None:
        snl.check_budget(plan, cell.budget, made.snl.granularity)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    recipe: CompareRecipe,
    cell: Cell,
    spec: dict[str, Any],
    folder: Path,
    data_root: Path | None,
    device: str | None,
    artifacts: ArtifactStore | None,
) -> TrainResult:
    run_dir = folder / cell.folder
    run = partial(train, run_dir=run_dir, data_root=data_root, device=device, resume=True, artifacts=artifacts)
    if cell.method == ALL_RELU:
        return run(all_relu_recipe(recipe, cell.seed))
    teacher = _teacher(recipe, cell, folder)
    made, plan = cell_recipe(recipe, cell, spec, folder, pretrained=teacher is not None)
    if plan is not None and made.plan.file is not None:
        Path(made.plan.file).parent.mkdir(exist_ok=True)
        plan.save(made.plan.file)
    made = as_begun(made, run_dir)
    return run(made, teacher=teacher)


def _teacher(recipe: CompareRecipe, cell: Cell, folder: Path) -> Path | None:
    """The all-ReLU network of the cell's seed; of a method with another model, the one its first budget trained."""
    method = method_of(recipe, cell)
    source = Cell(ALL_RELU, None, cell.seed)
    if method.model is not None:
        if cell.budget == recipe.budgets[0]:
            return None
        source = Cell(cell.method, recipe.budgets[0], cell.seed)
    return folder / source.folder / "pretrain.safetensors"


def _result(cell: Cell, ended: TrainResult) -> Result:
    rows = [row for row in ended.rows if cell.method == ALL_RELU or row["phase"] != "pretrain"]
    seconds = sum(float(row["seconds"] or 0) for row in rows)
    network = models.shapes_only(load_checkpoint(ended.checkpoint).spec)
    return Result(
        cell.method,
        cell.budget,
        cell.seed,
        ended.plan.drelus,
        cost(network, ended.plan.input_size).flops,
        ended.test_accuracy,
        ended.val_accuracy,
        len(rows),
        seconds,
    )


def _line(result: Result, done: int, of: int) -> str:
    asked = "" if result.budget is None else f" of {result.budget:,}"
    return (
        f"[{done}/{of}] {result.method}, seed {result.seed}: {result.drelus:,}{asked} DReLUs, "
        f"test {100 * result.test_accuracy:.2f} %"
    )


def read_results(folder: Path) -> list[Result]:
    """What `compare` wrote. Raises CompareError: there is none, or it is damaged."""
    path = folder / "results.json"
    try:
        return [Result(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise CompareError(f"{path}: {error}") from error
