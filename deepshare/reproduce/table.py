"""What was reached beside what the papers print: the table at the end of a call, and the list of every recipe."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from deepshare.compare.published import published_accuracy
from deepshare.reproduce.errors import require
from deepshare.reproduce.result import Result, read_results
from deepshare.reproduce.runs import content, load_with_counts
from deepshare.reproduce.statistics import Statistics, last_statistics, of_content, statistics
from deepshare.text_table import aligned
from deepshare.train import Recipe, recipe_names

PAPERS = {"deepshare": "DeepShare", "snl": "SNL", "deepreduce": "DeepReDuce", "deepreshape": "DeepReShape"}
NOT_RUN = "not run"


@dataclass(frozen=True)
class Standing:
    """Where a recipe stands: what the paper prints for it (percent; None without [published]), and our results.

    results: of the recipe as it is now; stale: of what it was before, which count nowhere
    """

    recipe: Recipe
    paper: float | None
    results: tuple[Result, ...]
    stale: tuple[Result, ...]

    @property
    def chosen(self) -> Statistics | None:
        """Test accuracy of the epoch validation chose, over seeds."""
        return statistics(self.results) if self.results else None

    @property
    def last(self) -> Statistics | None:
        """Test accuracy of the last epoch, the papers' practice; of the runs that kept its weights."""
        return last_statistics(self.results)


def standing(recipe: Recipe, its_content: str, results: Path) -> Standing:
    """Where `recipe` stands by what lies in `results`. Raises ReproduceError: a result there is damaged."""
    paper = None if recipe.published is None else published_accuracy(recipe.published)
    ours, stale = of_content(read_results(results, recipe.name), its_content)
    return Standing(recipe, paper, tuple(ours), tuple(stale))


def end_table(standings: Sequence[Standing]) -> str:
    """A row a recipe: DReLUs, the paper's accuracy, ours (mean ± sample sd), n, of the last epoch, the difference."""
    rows: list[tuple[str, ...]] = [("recipe", "DReLUs", "paper", "ours", "n", "last epoch", "difference"), ()]
    for one in standings:
        chosen, last = one.chosen, one.last
        difference = "-" if chosen is None or one.paper is None else f"{chosen.mean - one.paper:+.2f}"
        rows.append((one.recipe.name, _drelus(one), _paper(one), _ours(chosen), _n(chosen), _ours(last), difference))
    notes = [f"{one.recipe.name}: {_stale(one)}, left out" for one in standings if one.stale]
    return "\n".join([aligned(rows, left=1), *notes])


def listing(results: Path, names: Iterable[str] | None = None) -> str:
    """Every recipe for a row of a paper's table, by paper and table: its figure beside ours, or "not run".

    names: only of these recipes, by name or file.

    Raises ReproduceError: a result is damaged, or none of `names` is for a row of a table.
    """
    found = []
    for name in recipe_names() if names is None else names:
        recipe, counts = load_with_counts(name)
        if recipe.published is not None:
            found.append(standing(recipe, content(recipe, counts), results))
    require(len(found) > 0, "reproduce: none of these recipes is for a row of a paper's table (published)")
    parts = [
        _part(*key, list(group)) for key, group in groupby(sorted(found, key=_by_row), key=lambda one: _by_row(one)[:2])
    ]
    return "\n\n".join(parts)


def _by_row(one: Standing) -> tuple[int, str, str, str, float, str]:
    row = one.recipe.published
    assert row is not None  # listing takes no other
    paper = list(PAPERS).index(row.paper) if row.paper in PAPERS else len(PAPERS)
    return (
        paper,
        f"{PAPERS.get(row.paper, row.paper)}, Table {row.table}",
        row.network,
        row.dataset,
        row.relus_k,
        one.recipe.name,
    )


def _part(_: int, title: str, standings: Sequence[Standing]) -> str:
    rows: list[tuple[str, ...]] = [
        ("recipe", "network", "data", "kReLUs", "paper", "ours", "n", "last epoch", "commit", "machine"),
        (),
    ]
    for one in standings:
        row = one.recipe.published
        assert row is not None  # listing takes no other
        sessions = [result.session for result in one.results if result.session is not None]
        commits = _each(session.commit or "-" for session in sessions)
        machines = _each(str(session.machine) for session in sessions)
        ours = _ours(one.chosen) + (f" ({_stale(one)})" if one.stale else "")
        figures = (_paper(one), ours, _n(one.chosen), _ours(one.last))
        rows.append((one.recipe.name, row.network, row.dataset, f"{row.relus_k:g}", *figures, commits, machines))
    return f"{title}\n{aligned(rows, left=3)}"


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or "-"


def _drelus(one: Standing) -> str:
    return _each(f"{result.drelus:,}" for result in one.results)


def _paper(one: Standing) -> str:
    return "-" if one.paper is None else f"{one.paper:.2f}"


def _ours(found: Statistics | None) -> str:
    return NOT_RUN if found is None else str(found)


def _n(found: Statistics | None) -> str:
    return "-" if found is None else str(found.n)


def _stale(one: Standing) -> str:
    count = len(one.stale)
    return f"{count} stale result{'s' if count > 1 else ''} of another recipe"
