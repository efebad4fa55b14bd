"""Pictures: one style, no screen, PNG bytes. matplotlib is imported when something is drawn."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito's colours, which the colour-blind can tell apart (jfly.uni-koeln.de/color); yellow is too pale on white.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


class DrawingError(ImportError):
    """matplotlib is missing."""


def check_can_draw() -> None:
    """Raises DrawingError: matplotlib is missing. Asked before work that ends in a picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DrawingError("the pictures need matplotlib, which is missing: pip install 'deepshare[demo]'") from error


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """`draw` under the style of our pictures. Its call raises DrawingError where matplotlib is missing."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **keys: P.kwargs) -> R:
        check_can_draw()
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **keys)

    return drawn


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **keys: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes [rows, columns]; no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **keys)


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file's content: the same bytes for the same figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi, metadata={"Software": None})
    return picture.getvalue()


def literal(text: str) -> str:
    """matplotlib sets what stands between two $ as a formula."""
    return text.replace("$", r"\$")
