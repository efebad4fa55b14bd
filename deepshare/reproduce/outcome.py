"""How an attempt at a run ended: done, paused, or failed with what to say about it."""

import traceback
from dataclasses import dataclass
from typing import Literal

from deepshare.budget import BudgetError
from deepshare.checkpoint import CheckpointError
from deepshare.data import DataError
from deepshare.methods.snl import SNLError
from deepshare.plan import PlanError
from deepshare.reproduce.chain import Settings, train_run
from deepshare.reproduce.errors import ReproduceError
from deepshare.reproduce.runs import Run
from deepshare.train import RecipeError, TrainingError, TrainingPaused
from deepshare.train.distributed import Ranks

State = Literal["done", "paused", "failed"]
STATUS: dict[State, int] = {"done": 0, "paused": 75, "failed": 2}  # 75: sysexits.h's "temporary failure, try again"
_EXPECTED = (
    *(BudgetError, CheckpointError, DataError, PlanError, SNLError, ReproduceError, RecipeError, TrainingError),
    OSError,
)


ALONE = Ranks()


@dataclass(frozen=True)
class Outcome:
    """How a run ended; message: why it failed."""

    run: Run
    state: State
    message: str = ""

    @property
    def status(self) -> int:
        """An exit status."""
        return STATUS[self.state]


def attempt(run: Run, settings: Settings, minutes: float | None, ranks: Ranks = ALONE) -> Outcome:
    """`train_run` for at most `minutes`; whatever it fails of becomes an outcome, so that the next run has its turn.

    A bug's traceback goes to stderr. Among several ranks a bug ends the process: the others would wait for it.
    """
    try:
        train_run(run, settings, minutes, ranks)
    except TrainingPaused:
        return Outcome(run, "paused")
    except _EXPECTED as error:
        return Outcome(run, "failed", str(error))
    except Exception as error:
        if ranks.world > 1:
            raise
        traceback.print_exc()
        return Outcome(run, "failed", f"{type(error).__name__}: {error}")
    return Outcome(run, "done")


def worst(outcomes: list[Outcome]) -> int:
    """The exit status of several attempts: a failure above a pause above none."""
    states = {outcome.state for outcome in outcomes}
    return STATUS["failed" if "failed" in states else "paused" if "paused" in states else "done"]
