"""`reproduce`: recipes and seeds in, runs and results out."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepshare.reproduce.chain import Settings
from deepshare.reproduce.check import check_runs
from deepshare.reproduce.errors import require
from deepshare.reproduce.jobs import Deadline, run_all
from deepshare.reproduce.outcome import Outcome, worst
from deepshare.reproduce.runs import Run, runs_of, with_counts
from deepshare.reproduce.table import Standing, end_table, standing
from deepshare.train.distributed import joined

MAX_JOBS = 1024


@dataclass(frozen=True)
class Reproduction:
    """How a call of `reproduce` ended.

    outcomes: of each run, those that only count among them; standings: of each recipe, with all results that lie there
    """

    outcomes: tuple[Outcome, ...]
    standings: tuple[Standing, ...]

    @property
    def status(self) -> int:
        """0: every run has its result. 75: time was up, call again. 2: a run failed."""
        return worst(list(self.outcomes))

    def __str__(self) -> str:
        """The table, and under it what is not done."""
        open_ = [
            f"{one.run.place} {one.state}{one.message and ': '}{one.message}" for one in self.outcomes if one.status
        ]
        return "\n".join([end_table(self.standings), *open_])


def reproduce(
    names: Sequence[str | Path],
    *,
    seeds: Sequence[int] = (0,),
    runs: str | Path = "runs",
    results: str | Path = "results",
    data_root: str | Path | None = None,
    device: str | None = None,
    jobs: int = 1,
    max_minutes: float | None = None,
    overrides: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> Reproduction:
    """Train every recipe with every seed, and before each what it needs; write a result for each.

    A run is `train` in runs/<recipe>/seed-<n>, with the artifact store runs/artifacts; what has ended there is not
    trained again, what was stopped goes on, a folder copied there from another machine counts. Results are
    results/<recipe>/seed-<n>.json. One run that fails does not stop the others.

    names: of recipes that come with the package, or TOML files
    jobs: runs side by side, each in a process of its own with its share of the cores; under torchrun 1
    max_minutes: of the whole call: runs are paused after an epoch with which the next one would not end in time
    overrides: changes to every recipe, as `load_recipe` takes them; those of data, model, compute and phase.* change
        the recipe that counts for it (plan.counts_of) too
    say: gets the lines of runs side by side; a run alone prints its own

    Raises ReproduceError, RecipeError, DataError, TrainingError: what can be known before anything is trained.
    """
    _check(jobs, max_minutes)
    deadline = Deadline(max_minutes)
    settings = Settings(Path(runs), Path(results), None if data_root is None else Path(data_root), device)
    with joined(device) as ranks:
        wanted = ranks.agree(lambda: runs_of(names, seeds, overrides, settings.plan_of))
        todo = ranks.from_writer(lambda: _checked(wanted, settings))
        outcomes = run_all(todo, settings, ranks, jobs=jobs, deadline=deadline, say=say)
        standings = ranks.from_writer(lambda: _standings(wanted, settings))
    return Reproduction(tuple(outcomes), standings)


def _checked(wanted: Sequence[Run], settings: Settings) -> list[Run]:
    """The runs and those that count for them, against which nothing speaks."""
    todo = with_counts(wanted, settings.begun)
    check_runs(todo, settings)
    return todo


def _standings(wanted: Sequence[Run], settings: Settings) -> tuple[Standing, ...]:
    recipes = {run.name: run for run in wanted}
    return tuple(standing(run.recipe, run.content, settings.results) for run in recipes.values())


def _check(jobs: int, max_minutes: float | None) -> None:
    require(type(jobs) is int and 0 < jobs <= MAX_JOBS, f"reproduce: jobs: wanted 1 to {MAX_JOBS}, got {jobs!r}")
    world = os.environ.get("WORLD_SIZE", "1")
    wanted = f"wanted 1 under torchrun, whose {world} processes train one run together"
    require(jobs == 1 or world == "1", f"reproduce: jobs: {wanted}; got {jobs}")
    fits = max_minutes is None or 0 < max_minutes < math.inf
    require(fits, f"reproduce: max_minutes: wanted above 0 and finite, got {max_minutes}")
