"""The tables of a report, as text: a paper's beside ours, and our own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepshare.report.gather import Gathered, Group, Row
from deepshare.report.slug import slugs
from deepshare.reproduce import Result, Statistics

NOT_RUN, NONE = "not run", "–"


@dataclass(frozen=True)
class Table:
    """name: in the page's ids; header: of each column; rows: as many cells each; left: that many columns are text, the
    others figures
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int


_PAPER = ("recipe", "method", "network", "data", "commit", "machine")
_FIGURES = ("kReLUs", "paper %", "ours %", "n", "last epoch %", "ours - paper", "DReLUs")


def paper_tables(gathered: Gathered) -> list[Table]:
    """One for each table of a paper: its accuracy beside ours, or "not run"."""
    header = (*_PAPER[:4], *_FIGURES, *_PAPER[4:])
    return [
        Table(name, group.title, header, tuple(map(_paper_row, group.rows)), 4)
        for name, group in _named(gathered.papers)
    ]


def _named(groups: Sequence[Group]) -> Iterable[tuple[str, Group]]:
    return zip(slugs(group.title for group in groups), groups, strict=True)


def _paper_row(row: Row) -> tuple[str, ...]:
    assert row.published is not None  # of a paper's table
    published, chosen, last = row.published, row.chosen, row.last
    difference = NONE if chosen is None or row.paper is None else f"{chosen.mean - row.paper:+.2f}"
    paper = NONE if row.paper is None else f"{row.paper:.2f}"
    about = (row.name, published.method, published.network, published.dataset)
    ours = (_ours(row, chosen), _count(chosen), _last(last), difference, _drelus(row.results))
    return *about, f"{published.relus_k:g}", paper, *ours, *_where(row.results)


def own_tables(gathered: Gathered) -> list[Table]:
    """One for each data set and network that no paper's row is for."""
    header = ("recipe", "plan", "DReLUs", "ours %", "n", "by seed %", "last epoch %", "epochs", "minutes", "commit")
    return [
        Table(name, one.title, (*header, "machine"), tuple(map(_own_row, one.rows)), 2)
        for name, one in _named(gathered.own)
    ]


def _own_row(row: Row) -> tuple[str, ...]:
    results, plan = row.results, (*row.results, *row.stale)[0].recipe["plan"]["method"]
    seeds = ", ".join(f"{100 * result.test_accuracy:.2f}" for result in results) or NONE
    ours = (_ours(row, row.chosen), _count(row.chosen), seeds, _last(row.last))
    epochs = _each(f"{len(result.rows):,}" for result in results)
    minutes = _each(f"{sum(result.seconds.values()) / 60:.1f}" for result in results)
    return row.name, str(plan), _drelus(results), *ours, epochs, minutes, *_where(results)


def _ours(row: Row, found: Statistics | None) -> str:
    stale = f" ({len(row.stale)} stale)" if row.stale else ""
    return (NOT_RUN if found is None else str(found)) + stale


def _last(found: Statistics | None) -> str:
    return NONE if found is None else str(found)


def _count(found: Statistics | None) -> str:
    return NONE if found is None else str(found.n)


def _drelus(results: Iterable[Result]) -> str:
    return _each(f"{result.drelus:,}" for result in results)


def _where(results: Iterable[Result]) -> tuple[str, str]:
    sessions = [result.session for result in results if result.session is not None]
    return _each(session.commit or NONE for session in sessions), _each(str(session.machine) for session in sessions)


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or NONE


def state(group: Group) -> str:
    """'2 of 9 rows run'."""
    return f"{sum(bool(row.results) for row in group.rows)} of {len(group.rows)} rows run"
