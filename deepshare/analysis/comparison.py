"""One table and one picture of networks compared at their DReLU counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepshare.analysis.drawing import COLOURS, new_figure, png, styled
from deepshare.analysis.pareto import Point, Series, draw
from deepshare.files import write_whole
from deepshare.text_table import markdown

if TYPE_CHECKING:
    from deepshare.secure import SecureReport


@dataclass(frozen=True)
class NetworkResult:
    """What was measured of one network under one secure setting."""

    name: str
    accuracy: float  # fraction, plain, whole test set
    secure: "SecureReport"


_HEADER = (
    "network",
    "DReLUs",
    "test accuracy",
    "engine",
    "weights",
    "rounds",
    "MB one way",
    "MB dealt before",
    "seconds",
    "times faster than its all-ReLU",
    "argmax secure = plain",
)


def comparison_table(results: Sequence[NetworkResult]) -> str:
    """Markdown table; a speedup is over the first result with the same engine and weights (the all-ReLU network)."""
    rows = []
    for result in results:
        secure = result.secure
        baseline = next(other.secure for other in results if _setting(other) == _setting(result))
        cells = (
            result.name,
            f"{secure.drelus:,}",
            f"{100 * result.accuracy:.2f} %",
            _setting(result)[0],
            secure.weights,
            str(secure.rounds),
            f"{secure.megabytes:.3f}",
            f"{(secure.dealer_bytes + secure.early_bytes) / 1e6:.3f}",
            f"{secure.seconds_online:.3f}",
            f"{baseline.seconds_online / secure.seconds_online:.2f}",
            f"{round(secure.agreement * secure.images)} of {secure.images}",
        )
        rows.append(cells)
    return markdown(_HEADER, rows)


def _setting(result: NetworkResult) -> tuple[str, str]:
    """What a speedup and a line of the picture keep fixed: engine and weights."""
    return result.secure.engine.partition(" ")[0].rstrip(","), result.secure.weights


@styled
def plot_comparison(results: Sequence[NetworkResult], path: Path) -> Path:
    """PNG: accuracy (left) and secure latency, one line per engine and weights setting (right), over DReLUs.

    Raises:
        DrawingError: matplotlib is missing.
    """
    figure, ((left, right),) = new_figure(10, 4, 1, 2)
    settings = list(dict.fromkeys(_setting(result) for result in results))
    ordered = sorted(results, key=lambda result: result.secure.drelus)
    first = [result for result in ordered if _setting(result) == settings[0]]
    points = tuple(Point(result.secure.drelus, (100 * result.accuracy,)) for result in first)
    draw(left, [Series("accuracy", points)])
    left.set(title="Accuracy", ylim=(max(0, min(100 * result.accuracy for result in ordered) - 3), 100))
    for setting, colour in zip(settings, COLOURS, strict=False):
        secure = [result.secure for result in ordered if _setting(result) == setting]
        latencies = [s.drelus for s in secure], [s.seconds_online for s in secure]
        right.plot(*latencies, "o-", color=colour, label=f"{setting[0]}, weights {setting[1]}")
    right.set(ylabel="seconds an inference", yscale="log", title="Two-party inference, one machine")
    right.legend()
    for axes in (left, right):
        _label_networks(axes, first)
    return write_whole(path, png(figure))


def _label_networks(axes: Any, results: Sequence[NetworkResult]) -> None:
    """A logarithmic axis of DReLUs with one tick per network."""
    axes.set(xscale="log", xlabel="DReLUs")
    axes.set_xticks([], minor=True)
    axes.set_xticks([r.secure.drelus for r in results], [f"{r.secure.drelus:,}\n{r.name}" for r in results])
    axes.margins(x=0.15)
