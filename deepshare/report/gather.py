"""What a report is made of: where every recipe stands, by paper's table or by network, and the XOR networks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from deepshare.compare.published import Published
from deepshare.compare.series import method_of
from deepshare.report.xor_file import XorFile, read_xor
from deepshare.reproduce import Result, Standing, read_results, standing
from deepshare.reproduce.runs import content, load_with_counts
from deepshare.reproduce.statistics import Statistics, last_statistics, statistics
from deepshare.reproduce.table import PAPERS
from deepshare.train import recipe_names
from deepshare.train.recipe_parts import PublishedRow


@dataclass(frozen=True)
class Row:
    """One recipe: the row of a paper it is for, if any, and our results of it, of one content.

    name: the recipe's, with its content's first digits where several have one name; published, paper: the row and its
        accuracy in percent; stale: results of what it was before
    """

    name: str
    results: tuple[Result, ...] = ()
    published: PublishedRow | None = None
    paper: float | None = None
    stale: tuple[Result, ...] = ()

    @property
    def chosen(self) -> Statistics | None:
        """Test accuracy in percent of the epoch validation chose, over seeds; None if it was not run."""
        return statistics(self.results) if self.results else None

    @property
    def last(self) -> Statistics | None:
        """Of the last epoch, the papers' practice; of the runs that kept its weights."""
        return last_statistics(self.results)

    @property
    def method(self) -> str:
        """The method's name in pictures."""
        row = self.published
        return self.name if row is None else method_of(Published(row.method, row.relus_k, 0.0, row.paper, row.table))


@dataclass(frozen=True)
class Group:
    """Rows under one heading."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Gathered:
    """papers: a group for each table of a paper that has recipes, whether run or not; own: the other results, by data
    set and network
    """

    papers: tuple[Group, ...]
    own: tuple[Group, ...]
    xor: XorFile | None

    @property
    def published(self) -> list[Row]:
        """The rows of every paper's table."""
        return [row for group in self.papers for row in group.rows]

    @property
    def rows(self) -> list[Row]:
        return [*self.published, *(row for group in self.own for row in group.rows)]


def gather(results: Path) -> Gathered:
    """Where every recipe of the package stands by what lies in `results`, and what else lies there.

    Raises ReproduceError, ReportError: a file there is damaged. RecipeError: a recipe of the package cannot be read.
    """
    packaged = [_standing(name, results) for name in recipe_names()]
    papers = [_row(one) for one in packaged if one.recipe.published is not None]
    known = {one.recipe.name for one in packaged}
    own = [_row(one) for one in packaged if one.recipe.published is None and (one.results or one.stale)]
    others = [result for result in read_results(results) if result.name not in known]
    return Gathered(_by_table(papers), _by_network([*own, *_by_content(others)]), read_xor(results))


def _standing(name: str, results: Path) -> Standing:
    recipe, counts = load_with_counts(name)
    return standing(recipe, content(recipe, counts), results)


def _row(one: Standing) -> Row:
    return Row(one.recipe.name, one.results, one.recipe.published, one.paper, one.stale)


def _by_content(results: Sequence[Result]) -> list[Row]:
    """Rows of results whose recipe is not in the package: one for each content, which is all that decides a run.

    Which is of the recipe as it is now nobody knows here: where there are several, each has its content in its name.
    """
    ordered = sorted(results, key=lambda result: (result.name, result.content, result.seed))
    rows = []
    for name, named in groupby(ordered, key=lambda result: result.name):
        grouped = [tuple(found) for _, found in groupby(named, key=lambda result: result.content)]
        several = len(grouped) > 1
        rows += [Row(f"{name} ({found[0].content[:8]})" if several else name, found) for found in grouped]
    return rows


def _by_table(rows: Sequence[Row]) -> tuple[Group, ...]:
    """Papers in the order of PAPERS, tables by number, rows from many ReLUs to few as the papers print them."""

    def key(row: Row) -> tuple[int, int, str]:
        assert row.published is not None  # of these rows
        paper, table = row.published.paper, row.published.table
        order = list(PAPERS).index(paper) if paper in PAPERS else len(PAPERS)
        return order, int(table) if table.isdigit() else 0, f"{PAPERS.get(paper, paper)}, Table {table}"

    def within(row: Row) -> tuple[str, str, float, float]:
        assert row.published is not None
        return row.published.dataset, row.published.network, -row.published.relus_k, -(row.paper or 0)

    ordered = sorted(rows, key=lambda row: (key(row), within(row)))
    return tuple(Group(title, tuple(found)) for (_, _, title), found in groupby(ordered, key=key))


def _by_network(rows: Sequence[Row]) -> tuple[Group, ...]:
    """Rows on one data set with one network stand together, the most DReLUs first."""
    ordered = sorted(rows, key=lambda row: (network_of(row), -_any(row).drelus, row.name))
    return tuple(Group(title, tuple(found)) for title, found in groupby(ordered, key=network_of))


def network_of(row: Row) -> str:
    """'resnet18, width 8, on cifar100 (10,000 images)': of a row that has results."""
    recipe = _any(row).recipe
    model, data = recipe["model"], recipe["data"]
    width = "" if model.get("width") is None else f", width {model['width']}"
    limit = "" if data.get("limit") is None else f" ({data['limit']:,} images)"
    return f"{model['name']}{width}, on {data['name']}{limit}"


def _any(row: Row) -> Result:
    return (*row.results, *row.stale)[0]
