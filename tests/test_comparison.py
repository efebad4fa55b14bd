"""The comparison's table and picture, from reports with known figures."""

import struct
from dataclasses import replace
from pathlib import Path

from deepshare.analysis.comparison import NetworkResult, comparison_table, plot_comparison
from deepshare.secure import SecureReport

ALL_RELU = SecureReport(
    network="net", convention="", engine="CrypTen", weights="public", provider="TFP", device="CPU", batch=1,
    transport="loopback", images=20, drelus=7680, rounds=145, flights=145, server_bytes=2_000_000, early_bytes=0,
    client_bytes=1_500_000, dealer_bytes=3_000_000, setup_bytes=0, predicted_rounds=145, predicted_bytes=3_500_000,
    seconds_online=0.6, seconds_preparing=0.0, seconds_dealing=0.1, agreement=1.0, accuracy_secure=0.9,
    accuracy_plain=0.9, sites=(),
)  # fmt: skip
SHARED = replace(ALL_RELU, drelus=240, rounds=49, server_bytes=100_000, client_bytes=200_000, seconds_online=0.2)
RESULTS = [
    NetworkResult("all-ReLU", 0.9833, ALL_RELU),
    NetworkResult("DeepShare", 0.95, replace(SHARED, agreement=0.95)),
    NetworkResult("all-ReLU", 0.9833, replace(ALL_RELU, weights="secret", seconds_online=1.0)),
    NetworkResult("DeepShare", 0.95, replace(SHARED, weights="secret", seconds_online=0.8)),
]


def test_table_has_every_figure_and_ratios_within_a_weights_setting():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in comparison_table(RESULTS).splitlines()]
    first = ["all-ReLU", "7,680", "98.33 %", "CrypTen", "public", "145", "2.000", "3.000", "0.600", "1.00", "20 of 20"]
    second = ["DeepShare", "240", "95.00 %", "CrypTen", "public", "49", "0.200", "3.000", "0.200", "3.00", "19 of 20"]
    assert rows[2:4] == [first, second]
    assert rows[5][4:10] == ["secret", "49", "0.200", "3.000", "0.800", "1.25"]


def test_plot_is_a_png_of_two_panels(tmp_path: Path):
    path = plot_comparison(RESULTS, tmp_path / "comparison.png")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1500, 600)
    assert [entry.name for entry in tmp_path.iterdir()] == ["comparison.png"]
