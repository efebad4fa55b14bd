"""How critical each stage's ReLUs are, measured: one network per stage, with and without distillation (DeepReDuce)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch

from deepshare.compare.cells import as_begun
from deepshare.data import Dataset
from deepshare.files import write_whole
from deepshare.methods.deepreduce import criticality, culling_order, keep_only, stage_relus
from deepshare.models import STEM, shapes_only
from deepshare.plan import Plan
from deepshare.text_table import aligned
from deepshare.train import Recipe, RecipeError, TrainingError, TrainResult, load_recipe, train
from deepshare.train.fields import build, plain
from deepshare.train.networks import model_spec
from deepshare.train.plan_recipe import PlanRecipe
from deepshare.train.recipe_parts import MAX_SEED
from deepshare.train.trainer import check_run, check_teacher

Split = Literal["val", "test"]


@dataclass(frozen=True)
class StageAccuracy:
    """What the ReLUs of one stage alone achieve: accuracies in [0, 1], one per seed.

    relus: how many the stage has; plain: trained on labels; distilled: from the network with all ReLUs
    """

    stage: str
    relus: int
    plain: tuple[float, ...]
    distilled: tuple[float, ...]


@dataclass(frozen=True)
class Criticality:
    """A measurement of every stage: what `measure` returns and keeps in criticality.json.

    recipe: its name; split: whose images the accuracies are of; w: of equation 1; teacher: accuracy with all ReLUs,
    None where the teacher was given
    """

    recipe: str
    split: Split
    w: float
    stages: tuple[StageAccuracy, ...]
    teacher: float | None = None

    @property
    def values(self) -> dict[str, float]:
        """C_k by stage (`methods.deepreduce.criticality`), of the mean distilled accuracies."""
        accuracies = {one.stage: fmean(one.distilled) for one in self.stages}
        return criticality(accuracies, {one.stage: one.relus for one in self.stages}, self.w)

    @property
    def order(self) -> tuple[str, ...]:
        """Stages from least to most critical: what DeepReDuce's and DeepReShape's methods take."""
        return culling_order(self.values)

    def table(self) -> str:
        """The columns of the paper's Table 3, accuracies in percent (mean and, of several seeds, least to most)."""
        rows = [("stage", "#ReLUs", "w/o KD", "w/ KD", "C_k")]
        if self.teacher is not None:
            rows.append(("all", "", _percent((self.teacher,)), "", ""))
        for one in self.stages:
            value = f"{self.values[one.stage]:.2f}"
            rows.append((one.stage, f"{one.relus:,}", _percent(one.plain), _percent(one.distilled), value))
        order = " < ".join(self.order)
        return f"{aligned(rows)}\n{order} ({self.split} accuracy, w = {self.w:g}, {self.recipe})"

    def save(self, path: str | Path) -> Path:
        """Writes JSON to `path`, whole or not at all."""
        return write_whole(path, json.dumps(plain(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Criticality":
        """Raises TrainingError naming the file and what is wrong with it; OSError if it cannot be read."""
        try:
            return build(cls, json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecipeError) as error:
            raise TrainingError(f"{path}: {error}") from error


def measure(
    recipe: Recipe | str | Path,
    run_dir: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    teacher: str | Path | None = None,
    split: Split = "val",
    w: float = 0.07,
    data_root: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
) -> Criticality:
    """Train what equation 1 needs: the network with all ReLUs, then for each stage one with ReLUs only there, twice.

    Each is a run of its own in `run_dir`: `teacher`, `S1-plain-0`, `S1-distilled-0`, ... (stage, soft labels, seed),
    from fresh weights; plans are in `plans`, the outcome in `criticality.json`. The stem's ReLUs are dropped in all but
    the teacher (section 2.2). A run that has ended is not trained again.

    Args:
        recipe: of the network with all its ReLUs (plan.method "relu") with two phases: "pretrain" is the teacher's,
            "baseline", which distils from it, is every other network's (without its soft labels for the plain ones).
        seeds: train each stage once per seed, and take the mean; by default the recipe's own.
        teacher: the checkpoint of a network with all ReLUs, in place of training one.
        split: which images decide. The paper does not say; choosing on test images would make them training images.
        w: of equation 1.
        data_root, device, resume: as `train`'s.

    Raises:
        RecipeError: another kind of recipe, or no seeds. And what `train` raises.
    """
    full = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    each = (full.seed,) if seeds is None else tuple(seeds)
    _check(full, each, split)
    folder, dataset = Path(run_dir), full.data.load(data_root)
    plans = _stage_plans(full, dataset)
    check_run(full, dataset, device)
    if teacher is not None:  # what is wrong with it is known before the first network is trained
        check_teacher(full, dataset, Path(teacher), known=False)
    files = _save_plans(plans, folder / "plans")
    run = partial(train, data_root=data_root, device=device, resume=resume)
    own = None if teacher is not None else run(_teacher_recipe(full), folder / "teacher")
    given = Path(teacher) if own is None else own.phase_checkpoint("pretrain")  # type: ignore[arg-type]

    def alone(stage: str, labels: str, source: Path | None) -> tuple[float, ...]:
        """The accuracy of each seed's network with this stage's ReLUs alone."""
        found = []
        for seed in each:
            place = folder / f"{stage}-{labels}-{seed}"
            made = as_begun(_stage_recipe(full, stage, files[stage], labels, seed), place)
            found.append(_accuracy(run(made, place, teacher=source), split))
        return tuple(found)

    stages = tuple(
        StageAccuracy(stage, plan.drelus, alone(stage, "plain", None), alone(stage, "distilled", given))
        for stage, plan in plans.items()
    )
    measured = Criticality(full.name, split, w, stages, None if own is None else _accuracy(own, split))
    measured.save(folder / "criticality.json")
    return measured


def _check(recipe: Recipe, seeds: tuple[int, ...], split: str) -> None:
    """Raises RecipeError for what cannot be measured, before anything is trained."""
    here, kinds = f"recipe {recipe.name}", tuple(phase.kind for phase in recipe.phase)
    if recipe.plan.method != "relu":
        raise RecipeError(f'{here}: plan.method: wanted "relu", every ReLU to begin with, got "{recipe.plan.method}"')
    if kinds != ("pretrain", "baseline") or recipe.phase[1].distill != "pretrain":
        raise RecipeError(f"{here}: phase: wanted pretrain and a baseline that distils from it, got {', '.join(kinds)}")
    whole = all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise RecipeError(f"{here}: seeds: wanted different ones from 0 to 2^63 - 1, at least one, got {list(seeds)}")
    if split not in ("val", "test"):
        raise RecipeError(f'{here}: split: wanted "val" or "test", got {split!r}')
    if split == "val" and not recipe.data.val_fraction:
        raise RecipeError(f'{here}: data.val_fraction: wanted above 0 to measure on "val", got 0')


def _stage_plans(recipe: Recipe, dataset: Dataset) -> dict[str, Plan]:
    """By stage: the plan that keeps its ReLUs alone."""
    spec = model_spec(recipe.model, dataset.num_classes, dataset.input_size)
    full = Plan.of(shapes_only(spec), dataset.input_size)
    return {stage: keep_only(spec, full, [stage]) for stage in stage_relus(spec, full) if stage != STEM}


def _save_plans(plans: dict[str, Plan], folder: Path) -> dict[str, Path]:
    """The plans' files by stage. Raises TrainingError: those of another network are there; they stay."""
    files = {stage: folder / f"{stage}.json" for stage in plans}
    for stage, file in files.items():
        if file.exists() and Plan.load(file) != plans[stage]:
            raise TrainingError(f"{file}: a plan of another network is there; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for stage, file in files.items():
        plans[stage].save(file)
    return files


def _teacher_recipe(recipe: Recipe) -> Recipe:
    return replace(recipe, name=f"{recipe.name}-teacher", phase=recipe.phase[:1])


def _stage_recipe(recipe: Recipe, stage: str, plan: Path, labels: str, seed: int) -> Recipe:
    phase = recipe.phase[1] if labels == "distilled" else replace(recipe.phase[1], distill="none")
    return replace(
        recipe,
        name=f"{recipe.name}-{stage}-{labels}",
        seed=seed,
        plan=PlanRecipe("file", file=str(plan)),
        phase=(phase,),
    )


def _accuracy(result: TrainResult, split: Split) -> float:
    accuracy = result.val_accuracy if split == "val" else result.test_accuracy
    if accuracy is None:
        raise TrainingError(f"{result.run_dir}: there is no validation image to measure on")
    return accuracy


def _percent(accuracies: Sequence[float]) -> str:
    mean = f"{100 * fmean(accuracies):.2f}"
    return mean if len(accuracies) == 1 else f"{mean} ({100 * min(accuracies):.2f}-{100 * max(accuracies):.2f})"
