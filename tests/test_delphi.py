"""DELPHI estimates: SNL's latencies from its own two terms."""

import pytest

from deepshare.analysis.delphi import delphi, fitted_linear_seconds, gibibytes

# SNL, (thousands of ReLUs, online seconds): rows of one table and network
TABLE_2_RESNET18 = ((12.9, 0.291), (15.0, 0.334), (24.9, 0.542), (49.9, 1.066))
TABLE_2_WRN = ((120.0, 2.802), (150.0, 3.398), (180.0, 4.054))
TABLE_4_RESNET18 = ((59.1, 1.265), (99.6, 2.117), (198.1, 4.183), (298.2, 6.281))
TABLE_5_RESNET34 = (
    *((14.9, 0.339), (25.0, 0.551), (30.0, 0.656), (50.0, 1.075)),
    *((80.0, 1.705), (99.9, 2.122), (118.0, 2.502), (197.1, 4.161)),
)
TABLE_6_RESNET18 = ((29.0, 0.628), (39.3, 0.843), (49.8, 1.065))
TABLE_6_WRN = ((77.7, 1.650), (117.3, 2.481), (200.0, 4.216))


@pytest.mark.parametrize(
    ("rows", "linear"),
    [
        *((TABLE_2_RESNET18, 0.0191), (TABLE_2_WRN, 0.268), (TABLE_4_RESNET18, 0.0227)),
        *((TABLE_5_RESNET34, 0.0248), (TABLE_6_RESNET18, 0.0186), (TABLE_6_WRN, 0.0173)),
    ],
)
def test_snl_latencies_within_5_percent(rows: tuple[tuple[float, float], ...], linear: float):
    points = [(1000 * relus, seconds) for relus, seconds in rows]
    fitted = fitted_linear_seconds(points)
    assert fitted == pytest.approx(linear, abs=5e-5)
    for relus, seconds in points:
        assert delphi(relus, fitted) == pytest.approx(seconds, rel=0.05)


def test_table_2_and_table_6_disagree_on_one_network():
    """With WRN-22-8's linear time of Table 6, Table 2's three rows are 6 to 10 % above the sum."""
    fitted = fitted_linear_seconds([(1000 * relus, seconds) for relus, seconds in TABLE_6_WRN])
    errors = [seconds / delphi(1000 * relus, fitted) - 1 for relus, seconds in TABLE_2_WRN]
    assert all(0.06 < error < 0.11 for error in errors)


@pytest.mark.shared
def test_table_2_is_what_the_reference_says(shared_dir):
    rows = [line.split(",") for line in (shared_dir / "reference" / "published.csv").read_text().splitlines()]
    ours = [(float(row[5]), float(row[7])) for row in rows if row[:3] == ["snl", "2", "SNL"]]
    assert ours == [*TABLE_2_RESNET18, *TABLE_2_WRN]


def test_storage():
    assert gibibytes(2**16) * 2**30 == 2**16 * 18 * 1024
    assert gibibytes(491_520) == pytest.approx(8.4375)


def test_wrong_arguments_are_refused():
    for arguments in ((-1, 0.0), (1, -0.1), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match=r"delphi: (relus|linear_seconds) must be at least 0"):
            delphi(*arguments)
    with pytest.raises(ValueError, match="at least one"):
        fitted_linear_seconds([])
