"""Accuracy over DReLUs: what is drawn where, read back from the axes."""

import pytest

from deepshare.analysis.drawing import literal, new_figure, png, styled
from deepshare.analysis.pareto import Point, Series, draw, legend, look_of
from deepshare.compare.published import Published
from deepshare.compare.series import series_of

pytest.importorskip("matplotlib")

OURS = Series("DeepShare (ours)", (Point(12900, (76.0, 77.0, 78.5)), Point(6000, (75.0,))))
THEIRS = Series("SNL", (Point(12900, (66.53,)),))


@styled
def drawn(ours, published=(), **keys):
    figure, ((axes,),) = new_figure(6, 4)
    draw(axes, ours, published, **keys)
    legend(figure)
    return figure, axes


def test_means_bars_and_published_points_stand_where_they_belong():
    _, axes = drawn([OURS], [THEIRS])
    (published,) = [line for line in axes.lines if line.get_label() == "SNL (published)"]
    assert (list(published.get_xdata()), list(published.get_ydata())) == ([12900], [66.53])
    (container,) = axes.containers
    line, _, (bars,) = container
    assert list(line.get_xdata()) == [6000, 12900]
    assert list(line.get_ydata()) == pytest.approx([75.0, 77.1666667])
    assert [pytest.approx(list(bar[:, 1])) for bar in bars.get_segments()] == [[75.0, 75.0], [76.0, 78.5]]
    assert axes.get_xscale() == "log"


def test_a_method_looks_alike_published_and_ours():
    assert look_of("DeepShare (ours)", 5) == look_of("DeepShare", 0)
    assert look_of("mine", 0) != look_of("mine too", 1)


def test_methods_of_equal_count_stand_beside_each_other():
    _, axes = drawn([Series(name, (Point(1000, (50.0,)),)) for name in "abc"], shift=0.1)
    assert [float(container[0].get_xdata()[0]) for container in axes.containers] == pytest.approx([900, 1000, 1100])


def test_the_same_figure_is_the_same_file():
    first, second = (styled(png)(drawn([OURS], [THEIRS])[0]) for _ in range(2))
    assert first == second
    assert first != styled(png)(drawn([OURS])[0])
    assert literal("$x$") == r"\$x\$"


def test_published_rows_become_a_series_a_method():
    rows = [
        Published("SNL", 12.9, 66.53, "deepshare", "1"),
        Published("SNL", 12.9, 66.53, "snl", "2"),
        Published("SNL", 15.0, 67.17, "snl", "2"),
        Published("S2RT+S3RT a=0.5", 49.15, 69.5, "deepreduce", "4"),
        Published("HRN-2x5x3x m=8 C1+RT", 26.1, 72.65, "deepreshape", "6"),
        Published("Baseline", 491.52, 78.23, "deepshare", "1"),
        Published("DeepShare no affine", 6, 73.51, "deepshare", "5"),
    ]
    found = {series.name: [(point.drelus, *point.percent) for point in series.points] for series in series_of(rows)}
    assert found == {
        "SNL": [(12900, 66.53), (15000, 67.17)],
        "DeepReDuce": [(49150, 69.5)],
        "HybReNet": [(26100, 72.65)],
        "all-ReLU": [(491520, 78.23)],
    }
