"""One table and one picture of networks compared at their DReLU counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepshare.files import write_whole


@dataclass(frozen=True)
class NetworkResult:
    """What was measured of one network: plain accuracy on the test set, secure costs per inference."""

    name: str
    drelus: int
    accuracy: float  # fraction, plain, whole test set
    rounds: int
    megabytes: float  # sent by one party, one inference
    seconds: float  # median of one inference
    agreement: float  # fraction of images with secure argmax == plain argmax
    images: int  # images behind `seconds` and `agreement`


_HEADER = (
    "network",
    "DReLUs",
    "test accuracy",
    "rounds",
    "MB sent by a party",
    "seconds",
    "speedup over all-ReLU",
    "argmax secure = plain",
)


def comparison_table(results: Sequence[NetworkResult]) -> str:
    """Markdown table of the results; the first one is the all-ReLU network the speedups are taken over."""
    lines = ["| " + " | ".join(_HEADER) + " |", "| --- " + "| ---: " * (len(_HEADER) - 1) + "|"]
    for result in results:
        cells = (
            result.name,
            f"{result.drelus:,}",
            f"{100 * result.accuracy:.2f} %",
            str(result.rounds),
            f"{result.megabytes:.3f}",
            f"{result.seconds:.3f}",
            f"{results[0].seconds / result.seconds:.2f}",
            f"{round(result.agreement * result.images)} of {result.images}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_comparison(results: Sequence[NetworkResult], path: Path) -> Path:
    """PNG: accuracy (left) and secure latency (right) over DReLUs, one labelled point per network.

    Raises:
        ImportError: matplotlib is missing (`pip install 'deepshare[demo]'`).
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    ordered = sorted(results, key=lambda result: result.drelus)
    drelus = [result.drelus for result in ordered]
    left.plot(drelus, [100 * result.accuracy for result in ordered], "o-", color="#1f6f8b")
    left.set(ylabel="test accuracy [%]", title="Accuracy")
    right.plot(drelus, [result.seconds for result in ordered], "o-", color="#c0562f")
    right.set(ylabel="seconds per image, two parties on one machine", title="Secure latency", ylim=(0, None))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="DReLUs")
        axes.grid(alpha=0.3, which="both")
        axes.margins(x=0.15, y=0.2)
    for result in ordered:
        label = f"{result.name}\n{result.drelus:,}"
        _annotate(left, label, result.drelus, 100 * result.accuracy)
        _annotate(right, label, result.drelus, result.seconds)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    pyplot.close(figure)
    return write_whole(path, picture.getvalue())


def _annotate(axes, label: str, x: float, y: float) -> None:  # type: ignore[no-untyped-def]
    axes.annotate(label, (x, y), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
