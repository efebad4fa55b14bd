"""Where other methods left ReLUs, as weights: per-layer lists as published, and the counts of any plan."""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources

from deepshare.budget.errors import BudgetError
from deepshare.plan import Plan, Site, check_is_plan


@dataclass(frozen=True)
class PublishedList:
    """One list of published.csv.

    Attributes:
        label: as its authors call it: network, data set, ReLUs kept.
        stages: (C, H, W) and number of layers of equal size, in call order, an extra layer being a stage of its own.
        extra: index of the entry that only one counting convention has, 0 or -1; None if there is none.
        fractions: share of its ReLUs that each layer keeps.
    """

    label: str
    stages: tuple[tuple[tuple[int, ...], int], ...]
    extra: int | None
    fractions: tuple[Fraction, ...]

    @property
    def kept(self) -> Fraction:
        """ReLUs kept in the network of `stages`: what the label says, within 1.33 %."""
        sizes = [math.prod(shape) for shape, layers in self.stages for _ in range(layers)]
        return sum((f * size for f, size in zip(self.fractions, sizes, strict=True)), Fraction(0))

    def without_extra(self) -> "PublishedList":
        kept = slice(1, None) if self.extra == 0 else slice(None, -1)
        return PublishedList(self.label, self.stages[kept], None, self.fractions[kept])

    def fits(self, sites: tuple[Site, ...]) -> bool:
        """Whether the sites change shape where the list's layers do: no matter how wide, or for which image size."""
        apart = [layers for _, layers in self.stages]
        shapes = itertools.groupby(self.stages, key=lambda stage: stage[0])
        merged = [sum(layers for _, layers in group) for _, group in shapes]  # a stem joins the first stage
        runs = [len(list(group)) for _, group in itertools.groupby(sites, key=lambda site: site.shape)]
        return runs in (apart, merged)


def published_labels() -> tuple[str, ...]:
    """The labels `published` knows."""
    return tuple(_lists())


def published(label: str, plan: Plan) -> dict[str, Fraction]:
    """Weights for `allocate`: the list's fraction of every site, times the site's C*H*W.

    Lists for ResNets begin with the stem's ReLU, lists for WRN-22-8 end with the final one, which DeepShare's networks
    do not have (`models.create(..., stem_relu=)`): a plan without it gets the list without that entry. The plan must
    change shape where the list's layers do; width and image size are its own.

    The lists are SENet's (Kundu et al., ICLR 2023), as its public code has them; published.csv names source and sizes.

    Raises:
        BudgetError: an unknown label (the message lists the known ones), or a plan of another network.
    """
    found = _lists().get(label)
    if found is None:
        raise BudgetError(f"published: label must be one of {', '.join(published_labels())} (got {label!r:.80})")
    for chosen in (found,) if found.extra is None else (found, found.without_extra()):
        if chosen.fits(plan.sites):
            return {s.name: f * s.size for s, f in zip(plan.sites, chosen.fractions, strict=True)}
    stages = "+".join(str(layers) for _, layers in found.stages)
    other = "" if found.extra is None else f", or without the {'first' if found.extra == 0 else 'last'}"
    runs = "+".join(str(len(list(group))) for _, group in itertools.groupby(plan.sites, key=lambda site: site.shape))
    raise BudgetError(
        f"published: {label} is for a network of {stages} activations of equal shape{other} (the plan has {runs or 0})"
    )


def weights_of(plan: Plan) -> dict[str, int]:
    """Weights for `allocate`: the DReLUs that each site of `plan` pays, such as SNL's counts (DeepShare 3.2).

    The plan is of the same network, with masks (or anything else) at its sites. A mapping of site names to counts is
    weights as it is.
    """
    check_is_plan("weights_of", plan)
    return {site.name: site.drelus for site in plan.sites}


@cache
def _lists() -> dict[str, PublishedList]:
    text = resources.files("deepshare.budget").joinpath("published.csv").read_text(encoding="utf-8")
    rows = [line.split(",") for line in text.splitlines() if line and not line.startswith("#")]
    extras = {"first": 0, "last": -1, "": None}
    return {
        label: PublishedList(label, _stages(layers), extras[extra], tuple(map(Fraction, fractions.split())))
        for label, extra, layers, fractions in rows[1:]
    }


def _stages(layers: str) -> tuple[tuple[tuple[int, ...], int], ...]:
    """From "64x32x32*1 128x16x16*4"."""
    pairs = [stage.split("*") for stage in layers.split()]
    return tuple((tuple(map(int, shape.split("x"))), int(count)) for shape, count in pairs)
