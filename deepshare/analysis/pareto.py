"""Accuracy over DReLUs: points of ours by seed, what papers published behind them (DeepShare Fig. 1 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from deepshare.analysis.drawing import BLUE, COLOURS, GREEN, ORANGE, PURPLE, SKY, VERMILION, literal

# A method looks alike in every picture, published or ours.
_LOOKS = {
    "DeepShare": (BLUE, "o"),
    "SNL": (VERMILION, "s"),
    "SNL channel-wise": (VERMILION, "d"),
    "DeepReDuce": (GREEN, "^"),
    "HybReNet": (PURPLE, "D"),
    "DeepReShape": (PURPLE, "D"),
    "SENet": (ORANGE, "v"),
    "AutoReP": (SKY, "P"),
    "all-ReLU": ("#333333", "*"),
    "Sphynx": ("#777777", "X"),
    "CryptoNAS": ("#777777", "<"),
    "Seesaw": ("#777777", ">"),
    "Spatial sharing": ("#777777", "h"),
}
_MARKERS = "osD^vPX<>ph"
_FAINT = 0.5


@dataclass(frozen=True)
class Point:
    """One network at one budget. percent: test accuracies, one a seed; a published one is a single number."""

    drelus: float
    percent: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """One method's points."""

    name: str
    points: tuple[Point, ...]


def draw(axes: Any, ours: Sequence[Series], published: Sequence[Series] = (), *, shift: float = 0.0) -> None:
    """Ours as means with bars from lowest to highest seed, joined by lines; published points faint and unjoined.

    The x axis is logarithmic. A series' look goes by its name, "DeepShare" and "DeepShare (ours)" alike; what has no
    look of its own takes the next one.

    shift: part of x that each of our series is moved against the next one, where counts are equal and bars would cover
    one another.
    """
    from matplotlib.ticker import LogLocator

    for place, series in enumerate(published):
        colour, marker = look_of(series.name, place)
        x, y = [point.drelus for point in series.points], [fmean(point.percent) for point in series.points]
        label = literal(f"{series.name} (published)")
        axes.plot(x, y, marker, color=colour, alpha=_FAINT, markersize=5, markeredgewidth=0, label=label, zorder=1)
    for place, series in enumerate(ours):
        factor = 1 + shift * (place - (len(ours) - 1) / 2)
        _draw_ours(axes, series, *look_of(series.name, place), factor)
    axes.set(xscale="log", xlabel="DReLUs", ylabel="test accuracy [%]")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_thousands)
    axes.xaxis.set_minor_formatter("")


def legend(figure: Any) -> None:
    """The names of all series, under the axes."""
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, columnspacing=1.2, handletextpad=0.4)


def look_of(name: str, place: int) -> tuple[str, str]:
    """Colour and marker of a series; `place` among its kind decides where the name is none of the papers' methods."""
    known = _LOOKS.get(name.removesuffix(" (ours)"))
    return known or (COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)])


def _draw_ours(axes: Any, series: Series, colour: str, marker: str, factor: float) -> None:
    points = sorted(series.points, key=lambda point: point.drelus)
    x, means = [factor * point.drelus for point in points], [fmean(point.percent) for point in points]
    below = [mean - min(point.percent) for mean, point in zip(means, points, strict=True)]
    above = [max(point.percent) - mean for mean, point in zip(means, points, strict=True)]
    look = {"color": colour, "capsize": 3, "linewidth": 1.6, "markersize": 7, "zorder": 3}
    axes.errorbar(x, means, yerr=[below, above], fmt=f"{marker}-", label=literal(series.name), **look)


def _thousands(value: float, _place: int) -> str:
    """15000 as 15K."""
    return f"{value / 1000:g}K" if value >= 1000 else f"{value:g}"
