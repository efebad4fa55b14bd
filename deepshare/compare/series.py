"""Published rows as series of a picture: one for each method, whatever a paper calls its variants."""

from collections.abc import Iterable

from deepshare.analysis.pareto import Point, Series
from deepshare.compare.published import Published


def series_of(rows: Iterable[Published]) -> list[Series]:
    """A series for each method, in order of first appearance; a point that several papers print stands once.

    DeepShare's ablations (its Table 5) are left out: they are no methods.
    """
    found: dict[str, dict[Point, None]] = {}
    for row in rows:
        if (row.paper, row.table) == ("deepshare", "5"):
            continue
        found.setdefault(method_of(row), {})[Point(1000 * row.relus_k, (row.accuracy,))] = None
    return [Series(name, tuple(points)) for name, points in found.items()]


def method_of(row: Published) -> str:
    """The method of a row; DeepReDuce and DeepReShape print the names of their networks in its place."""
    if row.method.lower() == "baseline":
        return "all-ReLU"
    if row.method.startswith("HRN"):
        return "HybReNet"
    if row.paper == "deepreduce" and row.method.startswith("S"):  # S2RT+S3RT a=0.5: stages
        return "DeepReDuce"
    return row.method
