"""The pictures of a report, each with its caption and a description for those who do not see it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from deepshare.analysis import pareto
from deepshare.analysis.drawing import BLUE, ORANGE, literal, new_figure, png, styled
from deepshare.analysis.pareto import Point, Series
from deepshare.compare.published import published_on
from deepshare.compare.series import series_of
from deepshare.models import stage_of
from deepshare.plan import PlanError
from deepshare.report.gather import Gathered, Group, Row
from deepshare.report.slug import slugs
from deepshare.report.xor_file import XorFile
from deepshare.reproduce import Result


@dataclass(frozen=True)
class Figure:
    """name: of its file, without .png, and its id in the page; number: DeepShare's, as "Fig. 1", or ""; content: of the
    file
    """

    name: str
    number: str
    title: str
    caption: str
    description: str
    content: bytes


# DeepShare's Table 1 and 3 compare these: its ResNet18 and what others built for as many ReLUs.
NETWORKS = ("ResNet18", "novel", "HRN")
PARETO = (("fig1-cifar100", "Fig. 1", "CIFAR-100"), ("fig9-tiny-imagenet", "Fig. 9", "Tiny-ImageNet"))


def figures(gathered: Gathered) -> list[Figure]:
    """Every picture there are data for, all of different names. Raises DrawingError: matplotlib is missing."""
    found = [_pareto(gathered, *which) for which in PARETO]
    found += [_dimensions(row) for row in gathered.rows if row.results and row.results[0].gate_dimensions]
    if gathered.xor is not None:
        found.append(_xor(gathered.xor))
    found += [_affine(row) for row in gathered.rows if row.results and _learned(row.results[0])]
    found += [_dots(place, group) for place, group in enumerate(gathered.own, 1) if any(r.results for r in group.rows)]
    names = slugs(one.name for one in found)
    return [replace(one, name=name) for one, name in zip(found, names, strict=True)]


@styled
def _pareto(gathered: Gathered, name: str, number: str, dataset: str) -> Figure:
    rows = [row for row in gathered.published if row.results and _is_compared(row, dataset)]
    methods = list(dict.fromkeys(row.method for row in rows))
    ours = [Series(f"{one} (ours)", tuple(_point(row) for row in rows if row.method == one)) for one in methods]
    figure, ((axes,),) = new_figure(7.2, 5)
    pareto.draw(axes, ours, series_of(published_on(dataset, NETWORKS)))
    axes.set(title=f"{dataset}: test accuracy over DReLUs")
    pareto.legend(figure)
    seen = f"ours: {', '.join(row.name for row in rows)}" if rows else "ours: none has been run"
    caption = (
        f"ResNet18 and networks made for as few ReLUs on {dataset}. Faint: published by the papers. Strong: ours, "
        f"means over seeds with bars from lowest to highest, of the epoch that validation chose; {seen}."
    )
    description = f"Scatter plot of test accuracy over DReLUs, logarithmic, on {dataset}; {len(rows)} recipes of ours."
    return Figure(name, number, f"accuracy over DReLUs, {dataset}", caption, description, png(figure))


def _is_compared(row: Row, dataset: str) -> bool:
    """Whether a row belongs into the comparison on `dataset`; the ablations (Table 5) are no methods."""
    row_of = row.published
    if row_of is None or (row_of.paper, row_of.table) == ("deepshare", "5"):
        return False
    return row_of.dataset == dataset and row_of.network in NETWORKS


def _point(row: Row) -> Point:
    return Point(fmean(one.drelus for one in row.results), tuple(100 * one.test_accuracy for one in row.results))


@styled
def _dimensions(row: Row) -> Figure:
    """Boxes over positions, of the last ReLU of every stage."""
    result = row.results[0]
    assert result.gate_dimensions is not None  # of these rows
    sites = result.gate_dimensions.sites
    shown = _last_of_stages(list(sites), result.recipe["model"])
    figure, ((axes,),) = new_figure(6.4, 3.8)
    for shift, colour, kind in ((-0.19, BLUE, "real"), (0.19, ORANGE, "shuffled")):
        values = [getattr(sites[site], kind) for site in shown.values()]
        _boxes(axes, values, shift, colour)
        axes.plot([], [], "s", color=colour, label={"real": "corresponding positions"}.get(kind, "shuffled positions"))
    labels = [f"{stage}\n{literal(site)}\n{sites[site].channels} channels" for stage, site in shown.items()]
    axes.set_xticks(range(len(shown)), labels)
    axes.set(ylabel="effective dimension / channels", ylim=(0, 1.02), title=f"{literal(row.name)}, seed {result.seed}")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=2)
    caption = (
        f"Effective dimension of the ReLU gates across channels, over the number of channels: {row.name}, seed "
        f"{result.seed}, {result.gate_dimensions.images:,} test images; a value a position, the last ReLU of each "
        "stage (the paper shows four layers and does not name them). Orange: positions shuffled within each channel. "
        "Boxes: quartiles; whiskers: 5 to 95 %. A site of one position has nothing to shuffle."
    )
    description = "Box plots for each stage: " + "; ".join(
        f"{stage} median {median(sites[site].real):.2f} real, {median(sites[site].shuffled):.2f} shuffled"
        for stage, site in shown.items()
    )
    return Figure(
        f"fig2-{row.name}", "Fig. 2", f"gates' effective dimension, {row.name}", caption, description, png(figure)
    )


def _last_of_stages(sites: Sequence[str], model: dict[str, Any]) -> dict[str, str]:
    """The last site of each stage; every site by its own name where the network has no stages we know."""
    try:
        return {stage_of({"name": model["name"]}, site): site for site in sites}
    except PlanError:
        return {site: site for site in sites}


def _boxes(axes: Any, values: list[Any], shift: float, colour: str) -> None:
    places = [place + shift for place in range(len(values))]
    look = {"patch_artist": True, "showfliers": False, "whis": (5, 95), "widths": 0.32, "manage_ticks": False}
    edges = {name: {"color": colour} for name in ("whiskerprops", "capprops")}
    filled = {"facecolor": colour, "edgecolor": colour, "linewidth": 1.5}  # a box as thin as a line keeps its colour
    axes.boxplot(values, positions=places, medianprops={"color": "black"}, boxprops=filled, **edges, **look)


def _learned(result: Result) -> bool:
    """Whether its alpha and beta were learned."""
    return result.affine is not None and result.recipe["plan"].get("affine", True) is not False


@styled
def _affine(row: Row) -> Figure:
    """A panel a site: beta to the right, alpha upwards, as in the paper."""
    result = row.results[0]
    assert result.affine is not None  # of these rows
    columns = 4
    lines = -(-len(result.affine) // columns)
    figure, panels = new_figure(7.2, 0.7 + 1.75 * lines, lines, columns)
    for axes in panels.flat[len(result.affine) :]:
        axes.axis("off")
    for axes, (site, found) in zip(panels.flat, result.affine.items(), strict=False):
        kinds = ((found.prototypes, None, BLUE, 5), (0, found.prototypes, ORANGE, 12))
        for begin, end, colour, size in kinds:
            axes.scatter(found.beta[begin:end], found.alpha[begin:end], s=size, color=colour, alpha=0.7, linewidths=0)
        axes.set_title(literal(site), fontsize=7)
        axes.tick_params(labelsize=6)
    figure.supxlabel("beta", fontsize=9)
    figure.supylabel("alpha", fontsize=9)
    for colour, label in ((ORANGE, "prototypes"), (BLUE, "replicates")):
        panels.flat[0].plot([], [], "o", color=colour, label=label)
    figure.legend(loc="outside upper center", ncols=2)
    prototypes = sum(found.prototypes for found in result.affine.values())
    channels = sum(len(found.alpha) for found in result.affine.values())
    caption = (
        f"alpha and beta of every channel by site, {row.name}, seed {result.seed}: {prototypes:,} prototypes, "
        f"{channels - prototypes:,} replicates. Sites without prototypes take the gates of an earlier one."
    )
    description = f"Scatter plots of alpha over beta, one for each of {len(result.affine)} sites of {row.name}."
    return Figure(f"fig10-{row.name}", "Fig. 10", f"alpha and beta, {row.name}", caption, description, png(figure, 120))


@styled
def _xor(file: XorFile) -> Figure:
    """The four decision regions, in the paper's places."""
    found = file.xor
    figure, panels = new_figure(6.2, 6.6, 2, 2, sharex=True, sharey=True)
    for axes, method in zip(panels.flat, (found.methods[place] for place in (1, 2, 0, 3)), strict=True):
        image = image_of(method.decision, found.side)
        extent = (-1, 1, -1, 1)
        axes.imshow(
            image, origin="lower", extent=extent, cmap="RdBu_r", vmin=-0.25, vmax=1.25, interpolation="bilinear"
        )
        if any(value > 0.5 for value in method.decision) and any(value < 0.5 for value in method.decision):
            axes.contour(image, levels=[0.5], colors="black", linewidths=1.6, extent=extent)
        best = max(method.accuracies)
        axes.set_title(f"{method.name}\nsolved by {method.solved} of {len(found.seeds)} seeds, best {100 * best:.1f} %")
        axes.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axes.grid(visible=False)
    figure.supxlabel("x1", fontsize=9)
    figure.supylabel("x2", fontsize=9)
    shares = "; ".join(f"{method.name}: {method.solved} of {len(found.seeds)}" for method in found.methods)
    caption = (
        "Four networks with one gate on the checkerboard, label 1 where the signs of x1 and x2 differ; each its best "
        "seed. Colour: probability of label 1, line: the decision boundary. Solved is what labels more than "
        f"{100 * found.solved_above:.0f} % of the square right: {shares}. {found.points} points, {found.epochs:,} "
        f"epochs, gamma {found.gamma:g}; trained at commit {file.session.commit or 'unknown'}."
    )
    description = f"Decision regions of four networks on the square. Solved: {shares}."
    return Figure("fig7-xor", "Fig. 7", "the checkerboard with one gate", caption, description, png(figure))


def image_of(decision: Sequence[float], side: int) -> list[Sequence[float]]:
    """Rows of equal x2 from below, x1 within, of values on `analysis.xor.grid(side)`, where x1 is slowest."""
    return [decision[row::side] for row in range(side)]


@styled
def _dots(place: int, group: Group) -> Figure:
    """A line a recipe: a dot a seed, a bar for the mean."""
    rows = [row for row in group.rows if row.results]
    figure, ((axes,),) = new_figure(7.2, 1.3 + 0.42 * len(rows))
    for line, row in enumerate(reversed(rows)):
        percent = _point(row).percent
        axes.plot(percent, [line] * len(percent), "o", color=BLUE, alpha=0.55, markersize=6, markeredgewidth=0)
        axes.plot([fmean(percent)], [line], "|", color="black", markersize=16, markeredgewidth=1.8)
    labels = [f"{literal(row.name)}\n{row.results[0].drelus:,} DReLUs" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set(xlabel="test accuracy [%]", ylim=(-0.6, len(rows) - 0.4))
    axes.margins(x=0.08)
    means = "; ".join(f"{row.name} {row.chosen} %" for row in rows)
    caption = f"{group.title}: test accuracy of the epoch that validation chose. A dot a seed, a bar the mean."
    return Figure(f"own-{place}", "", group.title, caption, f"Dot plot of test accuracies: {means}.", png(figure))


def missing(gathered: Gathered) -> Iterator[tuple[str, str]]:
    """Pictures there are no data for: (name, what makes them)."""
    if not any(row.results and row.results[0].gate_dimensions for row in gathered.rows):
        yield "Fig. 2 (effective dimension of gates)", "any result of an all-ReLU recipe, as deepshare-table1-baseline"
    if gathered.xor is None:
        yield "Fig. 7 (XOR)", "deepshare xor"
    if not any(row.results and _learned(row.results[0]) for row in gathered.rows):
        yield "Fig. 10 (alpha and beta)", "any result of a DeepShare recipe, as deepshare-table1-6k"
