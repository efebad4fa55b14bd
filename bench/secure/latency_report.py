"""Cells to the latency model and to tables per operation (deepshare.analysis)."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from deepshare.analysis import latency
from deepshare.analysis.latency import Latency, Sample, Variant
from deepshare.analysis.layer_costs import LayerCost, layer_table, plot_layers
from secure.cells import Cell, Found
from secure.table6 import NAMES

WAN_DELAY = latency.WAN.delay  # cells with it are held out: the model is asked for them before it is fitted to all
Cells = Mapping[Cell, Found]


def sample(cell: Cell, found: Found) -> Sample:
    name = f"{cell.network.slug}, {NAMES[cell.system]}, {cell.weights}"
    variant = Variant(name, found["flights"], found["path_bytes"])
    megabits = cell.link.megabits or latency.LOOPBACK.megabits
    return Sample(variant, latency.Link(cell.link.words, megabits, cell.link.delay), found.seconds)


def latency_report(found: Cells) -> str:
    """Markdown: a fit for each system that was measured on links with a delay; nothing where none was."""
    parts = []
    ordered = sorted(found.items(), key=lambda item: item[0].system)
    for system, group in groupby(ordered, key=lambda item: item[0].system):
        samples = _with_delays([sample(cell, figures) for cell, figures in group])
        if len({one.link.delay for one in samples}) > 1:
            parts.append(f"## Latency model: {NAMES[system]}\n\n{_fitted(samples)}")
    return "".join(f"\n{part}\n" for part in parts)


def _with_delays(samples: list[Sample]) -> list[Sample]:
    """Those of variants that were measured on a link with a delay, on all their links."""
    delayed = {one.variant for one in samples if one.link.delay}
    return [one for one in samples if one.variant in delayed]


def _fitted(samples: list[Sample]) -> str:
    model = latency.fit(samples)
    variants = list(dict.fromkeys(one.variant for one in samples))
    counts = ", ".join(f"{v.name}: {v.flights} flights, {v.path_bytes / 1e6:.2f} MB on the path" for v in variants)
    text = (
        f"seconds = compute + d * flights * delay + w * bytes / rate. {_factors(model)}\n{counts}.\n\n{model.table()}"
    )
    forecast = f"Extrapolated, ± twice the standard error:\n\n{latency.forecast(model, variants)}"
    return f"{text}\n\n{_held_out(samples)}{forecast}"


def _factors(model: Latency) -> str:
    d, w = (
        "1 (no link to fit it to)" if factor is None else f"{factor:.2f}"
        for factor in (model.flight_factor, model.wire_factor)
    )
    return f"d = {d}, w = {w}; scatter {100 * model.scatter:.1f} %."


def _held_out(samples: list[Sample]) -> str:
    """How far a fit to the other links is off at the longest delay."""
    longest = [one for one in samples if one.link.delay >= WAN_DELAY]
    others = [one for one in samples if one.link.delay < WAN_DELAY]
    if not longest or len({one.link.delay for one in others}) < 2:
        return ""
    model = latency.fit(others)
    off = [100 * (model.seconds(one.variant, one.link) / one.seconds - 1) for one in longest]
    return f"Fitted without the longest delay and asked for it: off by {', '.join(f'{x:+.1f} %' for x in off)}.\n\n"


def layers(found: Found, party: str) -> list[LayerCost]:
    """The costs per operation of the engine's last visit, at "server" or "client"."""
    visit = found.visits[-1]
    rows = zip(visit["steps"], visit["step_costs"][party], visit["step_offline"], strict=True)
    return [
        LayerCost(name, op, int(rounds), int(sent), offline, seconds - waited, waited)
        for (name, op), (rounds, sent, seconds, waited), offline in rows
    ]


def layers_report(found: Cells, folder: Path) -> str:
    """Markdown tables of the engine's cells at 6K or the least ReLUs there are, on the first link, and layers.png."""
    engine = {cell: figures for cell, figures in found.items() if cell.system != "crypten"}
    few = [cell for cell in engine if cell.network.relus_k is not None]
    if not few:
        return ""
    least = min(few, key=lambda cell: cell.network.relus_k or 0.0)
    chosen = [cell for cell in few if (cell.network, cell.link) == (least.network, least.link)]
    variants = {f"{NAMES[cell.system]}, {cell.weights} weights": layers(engine[cell], "client") for cell in chosen}
    try:
        plot_layers(variants, folder / "layers.png")
        where = ", and as a picture in layers.png"
    except ImportError:
        where = " (no picture: matplotlib is missing)"
    head = f"\n## Per operation: {least.network.name}, {least.link.words}\n\nAt the client, one inference{where}.\n"
    return head + "".join(f"\n### {name}\n\n{layer_table(rows)}\n" for name, rows in variants.items())
