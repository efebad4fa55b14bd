"""One table and one picture of networks compared at their DReLU counts."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "weights",
    "rounds",
    "MB sent by a party",
    "seconds",
    "times faster than all-ReLU",
    "argmax secure = plain",
)


def comparison_table(results: Sequence[NetworkResult]) -> str:
    """Markdown table; a speedup is over the first result with the same weights setting (the all-ReLU network)."""
    rows = []
    for result in results:
        secure = result.secure
        baseline = next(other.secure for other in results if other.secure.weights == secure.weights)
        cells = (
            result.name,
            f"{secure.drelus:,}",
            f"{100 * result.accuracy:.2f} %",
            secure.weights,
            str(secure.rounds),
            f"{secure.megabytes:.3f}",
            f"{secure.seconds_online:.3f}",
            f"{baseline.seconds_online / secure.seconds_online:.2f}",
            f"{round(secure.agreement * secure.images)} of {secure.images}",
        )
        rows.append(cells)
    return markdown(_HEADER, rows)


_COLOURS = ("#c0562f", "#5b4a8a")


def plot_comparison(results: Sequence[NetworkResult], path: Path) -> Path:
    """PNG: accuracy (left) and secure latency, one line per weights setting (right), over DReLUs.

    Raises:
        ImportError: matplotlib is missing (`pip install 'deepshare[demo]'`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    settings = list(dict.fromkeys(result.secure.weights for result in results))
    ordered = sorted(results, key=lambda result: result.secure.drelus)
    accuracies = [100 * result.accuracy for result in ordered]
    first = [result for result in ordered if result.secure.weights == settings[0]]
    left.plot([r.secure.drelus for r in first], [100 * r.accuracy for r in first], "o-", color="#1f6f8b")
    left.set(ylabel="test accuracy [%]", title="Accuracy", ylim=(max(0, min(accuracies) - 3), 100))
    for setting, colour in zip(settings, _COLOURS, strict=False):
        secure = [result.secure for result in ordered if result.secure.weights == setting]
        points = [s.drelus for s in secure], [s.seconds_online for s in secure]
        right.plot(*points, "o-", color=colour, label=f"weights {setting}")
    right.set(ylabel="seconds an inference", title="Two-party inference, one machine", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        _label_networks(axes, first)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    pyplot.close(figure)
    return write_whole(path, picture.getvalue())


def _label_networks(axes: Any, results: Sequence[NetworkResult]) -> None:
    """A logarithmic axis of DReLUs with one tick per network."""
    axes.set(xscale="log", xlabel="DReLUs")
    axes.set_xticks([], minor=True)
    axes.set_xticks([r.secure.drelus for r in results], [f"{r.secure.drelus:,}\n{r.name}" for r in results])
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
