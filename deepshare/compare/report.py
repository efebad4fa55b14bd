"""The table and the picture of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from deepshare.analysis.drawing import literal, new_figure, png, styled
from deepshare.analysis.pareto import Point, Series, draw, legend
from deepshare.compare.published import Published, published_results
from deepshare.compare.recipe import ALL_RELU, CompareRecipe
from deepshare.compare.run import Result
from deepshare.compare.series import series_of
from deepshare.files import write_whole
from deepshare.text_table import markdown

_HEADER = (
    *("method", "budget", "DReLUs", "million FLOPs", "test accuracy, mean (sd)", "lowest - highest"),
    *("seeds", "epochs", "minutes"),
)
SHIFT = 0.02  # of one method's points against the next one's: where counts are equal, bars would cover one another


def table(results: Sequence[Result]) -> str:
    """Markdown: a row per method and budget.

    FLOPs are multiply-accumulates; sd over seeds (n - 1); epochs and minutes a run, beyond the teacher's.
    """
    return markdown(_HEADER, (_row(group) for group in groups(results)))


def groups(results: Sequence[Result]) -> list[list[Result]]:
    """Results of equal method and budget together, in order of first appearance."""
    found: dict[tuple[str, int | None], list[Result]] = {}
    for result in results:
        found.setdefault((result.method, result.budget), []).append(result)
    return list(found.values())


def _row(group: list[Result]) -> tuple[str, ...]:
    first, accuracies = group[0], [100 * result.test_accuracy for result in group]
    spread = f" ({stdev(accuracies):.2f})" if len(group) > 1 else ""
    return (
        first.method,
        "-" if first.budget is None else f"{first.budget:,}",
        _span([result.drelus for result in group], "{:,}"),
        _span([round(result.flops / 1e6, 2) for result in group], "{:,}"),
        f"{fmean(accuracies):.2f} %{spread}",
        f"{min(accuracies):.2f} - {max(accuracies):.2f}",
        str(len(group)),
        _span([result.epochs for result in group], "{}"),
        f"{fmean(result.seconds for result in group) / 60:.1f}",
    )


def _span(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return form.format(low) if low == high else f"{form.format(low)} - {form.format(high)}"


def report(recipe: CompareRecipe, results: Sequence[Result], picture: str) -> str:
    """The Markdown page: what was compared, the table, the picture."""
    layer = "The papers have no figures for this network and data set."
    if _published(recipe):
        layer = "Faint points: published by the papers, for this network and data set."
    seeds, loss = ", ".join(map(str, recipe.seeds)), recipe.distill
    return f"""# {recipe.name}: methods at equal DReLU count

{recipe.model.name}, width {recipe.model.width}, on {recipe.data.name}; seeds {seeds}.

- Every method of a seed learns from the same all-ReLU network, by one loss (temperature {loss.temperature:g}, weight
  {loss.weight:g}); a method with another network learns from that network's own.
- Test accuracy is measured once, on the whole test split, at the end.

{table(results)}

![accuracy over DReLUs]({picture})

Points: means over seeds, methods shifted by {100 * SHIFT:g} % against one another; bars: lowest to highest. {layer}
"""


def _published(recipe: CompareRecipe) -> list[Published]:
    return published_results(recipe.model.name, recipe.model.width, recipe.data.name)


def write(recipe: CompareRecipe, results: Sequence[Result], folder: Path) -> Path:
    """folder/report.md and folder/pareto.png. Raises DrawingError: matplotlib is missing."""
    plot(recipe, results, folder / "pareto.png")
    return write_whole(folder / "report.md", report(recipe, results, "pareto.png"))


@styled
def plot(recipe: CompareRecipe, results: Sequence[Result], path: Path) -> Path:
    """PNG: test accuracy over DReLUs, a line per method, the all-ReLU network as a level.

    Raises DrawingError: matplotlib is missing.
    """
    figure, ((axes,),) = new_figure(7, 5)
    methods = list(dict.fromkeys(result.method for result in results if result.method != ALL_RELU))
    found = {method: [group for group in groups(results) if group[0].method == method] for method in methods}
    ours = [Series(method, _points(found[method])) for method in methods]
    known = _published(recipe)
    draw(axes, ours, series_of(known), shift=SHIFT)
    _draw_level(axes, [result for result in results if result.method == ALL_RELU])
    axes.set(title=literal(recipe.name))
    if not known:
        axes.set_xticks(recipe.budgets, [f"{budget:,}" for budget in recipe.budgets])
    legend(figure)
    return write_whole(path, png(figure))


def _points(found: list[list[Result]]) -> tuple[Point, ...]:
    return tuple(
        Point(fmean(result.drelus for result in group), tuple(100 * result.test_accuracy for result in group))
        for group in found
    )


def _draw_level(axes: Any, results: list[Result]) -> None:
    if not results:
        return
    percent = [100 * result.test_accuracy for result in results]
    axes.axhspan(min(percent), max(percent), color="0.85", zorder=0)
    label = f"all-ReLU, {results[0].drelus:,} DReLUs"
    axes.axhline(fmean(percent), color="0.4", linestyle="--", linewidth=1, label=label)
