"""One run from what it needs to its result: the masks that weigh its sites, its phases, the file in `results`."""

import json
from dataclasses import dataclass
from pathlib import Path

from deepshare import models
from deepshare.budget import weights_of
from deepshare.checkpoint import load_checkpoint
from deepshare.files import write_whole
from deepshare.plan import Plan
from deepshare.reproduce.record import trained_by, with_network
from deepshare.reproduce.result import read_result, result_path, write_result
from deepshare.reproduce.runs import Run, place_of, plan_in_file
from deepshare.train import ArtifactStore, Recipe, TrainResult, load_recipe, train
from deepshare.train.distributed import Ranks
from deepshare.train.networks import model_spec
from deepshare.train.recipe import with_weights
from deepshare.train.run_folder import RunFolder
from deepshare.train.trainer import check_run

ASKED = "asked.json"  # in the folder of a run with plan.counts_of: what the numbers in its recipe.toml are from


@dataclass(frozen=True)
class Settings:
    """Where and on what to run: folders of runs and of results, data files, device, as `reproduce` takes them."""

    runs: Path
    results: Path
    data_root: Path | None = None
    device: str | None = None

    def folder(self, run: Run) -> Path:
        return self.runs / run.place

    def begun(self, run: Run) -> bool:
        return (self.folder(run) / "recipe.toml").is_file()

    def plan_of(self, recipe: Recipe) -> Plan:
        """What plan.file holds, of a run that has begun what it held then: the file is no longer needed.

        Raises RecipeError, TrainingError: the file, or the run's folder, cannot be read.
        """
        return self.began_with(recipe) or plan_in_file(recipe)

    def began_with(self, recipe: Recipe) -> Plan | None:
        """The plan that the recipe's run began with, None if it has not. Raises TrainingError: a damaged folder."""
        folder = RunFolder(self.runs / place_of(recipe))
        return folder.beginning().plan if folder.begun else None

    def ended(self, run: Run) -> bool:
        return (self.folder(run) / "result.json").is_file()


def train_run(run: Run, settings: Settings, minutes: float | None, ranks: Ranks) -> None:
    """Train `run` on from where it is, and write its result; what is in the artifact store is not trained.

    minutes: for this run; ranks: this process among those that train it together, of which the first writes

    Raises TrainingPaused: `minutes` were not enough. And what `train` raises.
    """
    store = ArtifactStore(settings.runs / "artifacts")
    recipe = ranks.from_writer(lambda: _begin(run, settings, store))
    ended = train(
        recipe,
        settings.folder(run),
        data_root=settings.data_root,
        device=settings.device,
        resume=True,
        artifacts=store,
        max_minutes=minutes,
    )
    if run.wanted:
        ranks.from_writer(lambda: _keep_result(run, ended, settings))


def _begin(run: Run, settings: Settings, store: ArtifactStore) -> Recipe:
    """The recipe to train. What has ended in the run's folder, perhaps on another machine, is taken into the store."""
    folder, recipe = settings.folder(run), resolved(run, settings)
    if settings.begun(run):
        store.adopt(folder)
    elif run.counts is not None:
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"content": run.content, "counts": run.counts.recipe.to_dict()}
        write_whole(folder / ASKED, json.dumps(asked, indent=1) + "\n")
    return recipe


def _keep_result(run: Run, ended: TrainResult, settings: Settings) -> None:
    """Write the run's result, unless it lies there already."""
    path = result_path(settings.results, run.name, run.recipe.seed)
    found = trained_by(run, ended)
    known = read_result(path) if path.is_file() else None
    if known is None or (known.artifacts, known.sessions) != (found.artifacts, found.sessions):
        data = run.recipe.data.load(settings.data_root)
        place = check_run(run.recipe, data, settings.device)
        write_result(settings.results, with_network(found, ended, data, place))


def resolved(run: Run, settings: Settings) -> Recipe:
    """The run's recipe with numbers in the place of plan.counts_of: those it began with, else those of the masks."""
    if run.counts is None:
        return run.recipe
    if settings.begun(run):
        began = load_recipe(settings.folder(run) / "recipe.toml").plan.weights
        return with_weights(run.recipe, began if isinstance(began, tuple) else ())
    masks = load_checkpoint(settings.folder(run.counts) / "masks.safetensors")
    spec = model_spec(run.recipe.model, masks.spec["num_classes"], masks.spec["input_size"])
    counted = weights_of(masks.plan)  # SNL's network may have a site more, the stem's
    sites = Plan.of(models.shapes_only(spec), masks.plan.input_size).sites
    return with_weights(run.recipe, [counted[site.name] for site in sites])
