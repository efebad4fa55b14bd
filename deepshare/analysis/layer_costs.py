"""Where an inference's rounds, bytes and seconds go, operation by operation."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepshare.files import write_whole
from deepshare.text_table import markdown


@dataclass(frozen=True)
class LayerCost:
    """One operation at one party, for one batch.

    Attributes:
        bytes_online: what the party sends with the input known; bytes_offline: dealt to both for it, and sent early.
        compute, waiting: seconds; waiting is for the other party's message: the wire, and the other party's computing.
    """

    name: str
    op: str
    rounds: int
    bytes_online: int
    bytes_offline: int
    compute: float
    waiting: float


def layer_table(layers: Sequence[LayerCost]) -> str:
    """Markdown: the operations that cost rounds, bytes or 1 % of the seconds, the rest as one line, the total."""
    whole = sum(layer.compute + layer.waiting for layer in layers)
    shown = [layer for layer in layers if layer.rounds or layer.bytes_offline or layer.compute > 0.01 * whole]
    rest = [layer for layer in layers if layer not in shown]
    rows = [_cells(layer.name, layer.op, [layer]) for layer in shown]
    rows += [_cells("all others", f"{len(rest)}", rest)] if rest else []
    header = ("operation", "kind", "rounds", "kB online", "kB offline", "compute ms", "waiting ms")
    return markdown(header, [*rows, _cells("total", "", layers)])


def plot_layers(variants: Mapping[str, Sequence[LayerCost]], path: Path) -> Path:
    """PNG: for every variant a column of three panels over the operations in order: rounds, kB online and offline, ms.

    Raises:
        ValueError: no variant.
        ImportError: matplotlib is missing (`pip install 'deepshare[demo]'`).
    """
    if not variants:
        raise ValueError("plot_layers: variants must name at least one list of layers (got none)")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (1.5 + 5 * len(variants), 8)
    figure, axes = pyplot.subplots(3, len(variants), figsize=size, sharey="row", squeeze=False, constrained_layout=True)
    for column, (name, layers) in enumerate(variants.items()):
        _bars(axes[0][column], [("rounds", [float(layer.rounds) for layer in layers])])
        online, offline = ([getattr(x, f"bytes_{when}") / 1e3 for x in layers] for when in ("online", "offline"))
        _bars(axes[1][column], [("kB online", online), ("kB offline", offline)])
        compute, waiting = ([1e3 * getattr(x, what) for x in layers] for what in ("compute", "waiting"))
        _bars(axes[2][column], [("ms compute", compute), ("ms waiting", waiting)])
        axes[0][column].set_title(name)
        axes[2][column].set_xlabel("operation, in order")
    for row in axes:
        row[0].legend(loc="upper right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    pyplot.close(figure)
    return write_whole(path, picture.getvalue())


_COLOURS = ("#1f6f8b", "#c0562f")


def _bars(axes: Any, series: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Stacked, one bar an operation."""
    bottom = [0.0] * len(series[0][1])
    for (label, heights), colour in zip(series, _COLOURS, strict=False):
        axes.bar(range(len(heights)), heights, bottom=bottom, label=label, color=colour, width=1.0)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.grid(alpha=0.3, axis="y")


def _cells(name: str, op: str, layers: Sequence[LayerCost]) -> tuple[str, ...]:
    return (
        name,
        op,
        str(sum(layer.rounds for layer in layers)),
        f"{sum(layer.bytes_online for layer in layers) / 1e3:,.1f}",
        f"{sum(layer.bytes_offline for layer in layers) / 1e3:,.1f}",
        f"{1e3 * sum(layer.compute for layer in layers):.1f}",
        f"{1e3 * sum(layer.waiting for layer in layers):.1f}",
    )
