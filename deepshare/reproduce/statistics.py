"""Several seeds of one recipe: mean and spread, and which results belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from deepshare.reproduce.errors import require
from deepshare.reproduce.result import Result


@dataclass(frozen=True)
class Statistics:
    """Accuracies in percent over n seeds: mean, sample standard deviation (n - 1; None of one seed), least, most."""

    mean: float
    sd: float | None
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


def statistics(results: Sequence[Result], *, last: bool = False) -> Statistics:
    """Test accuracy over the seeds of one recipe; of the epoch validation chose, or of the last one.

    Raises ReproduceError: no result, results of different recipes, or one seed twice.
    """
    require(len(results) > 0, "statistics: wanted at least one result")
    contents, seeds = {result.content for result in results}, [result.seed for result in results]
    names = ", ".join(sorted({result.name for result in results}))
    require(
        len(contents) == 1, f"statistics: wanted results of one recipe, got {len(contents)} different ones ({names})"
    )
    require(len(set(seeds)) == len(seeds), f"statistics: wanted each seed once, got {sorted(seeds)} ({names})")
    shares = [result.test_accuracy_last if last else result.test_accuracy for result in results]
    percent = [100 * share for share in shares if share is not None]
    require(len(percent) > 0, f"statistics: no run kept the weights of its last epoch ({names})")
    spread = stdev(percent) if len(percent) > 1 else None
    return Statistics(fmean(percent), spread, len(percent), min(percent), max(percent))


def last_statistics(results: Sequence[Result]) -> Statistics | None:
    """Of the last epoch, the papers' practice, over the runs that kept its weights; None if none did."""
    kept = [result for result in results if result.test_accuracy_last is not None]
    return statistics(kept, last=True) if kept else None


def of_content(results: Sequence[Result], content: str) -> tuple[list[Result], list[Result]]:
    """The results of the recipe as it is now, and the stale ones, whose recipe was another."""
    return (
        [result for result in results if result.content == content],
        [result for result in results if result.content != content],
    )
