"""deepshare.analysis: the latency model, costs per operation, the published speedups."""

import csv
import math
import random
from pathlib import Path

import pytest

from deepshare.analysis.latency import LAN, LOOPBACK, WAN, Link, Sample, Variant, fit, forecast
from deepshare.analysis.layer_costs import LayerCost, layer_table, plot_layers
from deepshare.analysis.published_latency import published_speedups

FEW, MANY = Variant("few", 34, 4_900_000), Variant("many", 166, 209_000_000)
COMPUTE = {"few": 0.09, "many": 1.3}
LINKS = (LOOPBACK, Link("1 Gb/s", 1000.0), Link("slow", 100.0, 0.002), Link("far", 100.0, 0.02))


def seconds(variant: Variant, link: Link, flight: float = 1.1, wire: float = 1.05) -> float:
    transfer = 8 * variant.path_bytes / (link.megabits * 1e6)
    return COMPUTE[variant.name] + flight * variant.flights * link.delay + wire * transfer


def samples(noise: float = 0.0, links: tuple[Link, ...] = LINKS) -> list[Sample]:
    chance = random.Random(3)
    return [
        Sample(variant, link, seconds(variant, link) * (1 + noise * chance.uniform(-1, 1)))
        for variant in (FEW, MANY)
        for link in links
    ]


def test_exact_measurements_give_the_parameters_back():
    model = fit(samples())
    assert model.flight_factor == pytest.approx(1.1)
    assert model.wire_factor == pytest.approx(1.05)
    assert model.compute == pytest.approx(COMPUTE)
    assert model.scatter < 1e-9
    for link in (LAN, WAN):
        found = model.predict(MANY, link)
        assert found.seconds == pytest.approx(seconds(MANY, link))
        assert found.error < 1e-6


def test_the_stated_error_covers_what_noise_does():
    model = fit(samples(noise=0.1))
    assert 0.01 < model.scatter < 0.15
    for variant in (FEW, MANY):
        found = model.predict(variant, WAN)
        assert 0 < found.error < 0.2 * found.seconds
        assert abs(found.seconds - seconds(variant, WAN)) < 3 * found.error


def test_what_no_link_tells_is_taken_as_one_and_said():
    model = fit(samples(links=LINKS[:2]))  # no delay
    assert model.flight_factor is None
    assert model.wire_factor == pytest.approx(1.05)
    wan = COMPUTE["few"] + FEW.flights * WAN.delay + 1.05 * FEW.path_bytes * WAN.seconds_per_byte
    assert model.seconds(FEW, WAN) == pytest.approx(wan)


def test_residuals_are_relative_and_in_the_table():
    made = samples()
    off = [Sample(made[0].variant, made[0].link, made[0].seconds * 2), *made[1:]]
    model = fit(off)
    (_, modelled, error) = model.residuals()[0]
    assert error == pytest.approx(modelled / off[0].seconds - 1)
    assert f"{100 * error:+.1f} %" in model.table().splitlines()[2]
    assert len(model.table().splitlines()) == 2 + len(made)


def test_a_forecast_names_the_links_and_the_error():
    lines = forecast(fit(samples(noise=0.05)), [FEW]).splitlines()
    assert LAN.name in lines[0]
    assert WAN.name in lines[0]
    assert lines[2].count("±") == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (samples(links=LINKS[:1]), "wanted more samples"),
        ([*samples(), Sample(FEW, LOOPBACK, 0.0)], "seconds must be positive"),
        ([Sample(FEW, Link("a", 100.0, 0.01), 1.0)] * 9, "do not tell"),
    ],
)
def test_what_cannot_be_fitted_is_refused(given: list[Sample], message: str):
    with pytest.raises(ValueError, match=message):
        fit(given)


def test_another_variant_is_refused():
    with pytest.raises(KeyError):
        fit(samples()).predict(Variant("other", 1, 1), LAN)


def test_loopback_bytes_are_free():
    assert LOOPBACK.seconds_per_byte == 0
    assert math.isclose(LAN.seconds_per_byte, 8e-9)


LAYERS = [
    LayerCost("conv1", "conv2d", 1, 1000, 5000, 0.010, 0.0),
    LayerCost("relu1", "shared", 2, 3000, 7000, 0.002, 0.030),
    LayerCost("flatten", "flatten", 0, 0, 0, 0.00001, 0.0),
]


def test_the_layer_table_adds_up():
    lines = layer_table(LAYERS).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["conv1", "relu1", "all others", "total"]
    assert [cell.strip() for cell in lines[-1].split("|")[3:-1]] == ["3", "4.0", "12.0", "12.0", "30.0"]


def test_the_picture_has_a_column_for_each_variant(tmp_path: Path):
    pytest.importorskip("matplotlib")
    one = plot_layers({"tree": LAYERS}, tmp_path / "one.png").read_bytes()
    two = plot_layers({"tree": LAYERS, "dcf": LAYERS}, tmp_path / "two.png").read_bytes()
    assert one[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(two[16:20], "big") > 1.5 * int.from_bytes(one[16:20], "big")  # width in pixels
    with pytest.raises(ValueError, match="at least one"):
        plot_layers({}, tmp_path / "none.png")


def test_the_published_table_has_its_seven_rows():
    rows = published_speedups()
    assert [(row.network, row.relus_k) for row in rows[:3]] == [("ResNet18", 50), ("ResNet18", 12.9), ("ResNet18", 6)]
    assert len(rows) == 7
    assert all(1 < row.deepshare < row.autorep for row in rows)  # "slightly worse than AutoReP for all cases"


@pytest.mark.shared
def test_the_published_table_is_the_transcribed_one(shared_dir: Path):
    text = (shared_dir / "reference" / "latency_speedup.csv").read_text()
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    wanted = [
        (row["dataset"], row["network"], *(float(row[k]) for k in ("relus_k", "autorep", "deepshare"))) for row in rows
    ]
    found = [(row.dataset, row.network, row.relus_k, row.autorep, row.deepshare) for row in published_speedups()]
    assert found == wanted
