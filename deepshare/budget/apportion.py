"""Whole units of unlike cost for groups, in proportion to weights: largest remainders within bounds, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Group:
    """What shares one allotment: its weight, and what one unit of it costs; it takes 1 to `most` units."""

    weight: Fraction
    cost: int
    most: int


def apportion(groups: Sequence[Group], budget: int) -> list[int]:
    """Units per group, each in 1..most, together costing at most `budget` and as near to it as the costs allow.

    Shares are proportional to weights within the bounds (what a full group cannot take goes to the others) and rounded
    down; what is left goes unit by unit to the largest remainder that still fits, ties to the earlier group. If full
    groups leave more than a smallest unit unspent, one dearer unit is taken and paid for with cheaper ones.

    `budget` must be at least the sum of the costs.
    """
    shares = _bounded_shares(groups, budget)
    units = [int(share / group.cost) for share, group in zip(shares, groups, strict=True)]
    left = budget - _cost(groups, units)
    while True:
        fitting = [i for i, group in enumerate(groups) if group.cost <= left and units[i] < group.most]
        if not fitting:
            return _exchanged(groups, units, left)
        chosen = max(fitting, key=lambda i: (shares[i] / groups[i].cost - units[i], -i))
        units[chosen] += 1
        left -= groups[chosen].cost


def _bounded_shares(groups: Sequence[Group], budget: int) -> list[Fraction]:
    """Shares of the budget proportional to weights, each within its group's bounds.

    Groups out of bounds are settled at them, those on the side with the larger sum first, until no other is out.
    """
    shares = [Fraction(0)] * len(groups)
    open_groups, left = list(range(len(groups))), Fraction(budget)
    while open_groups:
        weights = [groups[i].weight for i in open_groups]
        if not any(weights):  # only groups of weight 0 can still take something: by size
            weights = [Fraction(groups[i].cost * groups[i].most) for i in open_groups]
        total = sum(weights)
        for i, weight in zip(open_groups, weights, strict=True):
            shares[i] = left * weight / total
        low = [i for i in open_groups if shares[i] < groups[i].cost]
        high = [i for i in open_groups if shares[i] > groups[i].cost * groups[i].most]
        lacking = sum(groups[i].cost - shares[i] for i in low)
        over = sum(shares[i] - groups[i].cost * groups[i].most for i in high)
        settled = low if lacking >= over else high
        if not settled:
            return shares
        for i in settled:
            shares[i] = Fraction(groups[i].cost * (1 if settled is low else groups[i].most))
            left -= shares[i]
        open_groups = [i for i in open_groups if i not in settled]
    return shares


def _exchanged(groups: Sequence[Group], units: list[int], left: int) -> list[int]:
    """`units`, or what comes nearer to the budget with one unit more of a dearer group and fewer of cheaper ones."""
    best, least = units, left
    for dear, group in enumerate(groups):
        if group.cost <= least or units[dear] == group.most:
            continue
        changed = list(units)
        changed[dear] += 1
        rest = _take_back(groups, changed, group.cost, group.cost - left)
        if rest is not None and rest < least:
            best, least = changed, rest
    return best


def _take_back(groups: Sequence[Group], units: list[int], below: int, debt: int) -> int | None:
    """Give back units cheaper than `below` until `debt` is paid, dearest first; what is over, None if it fails."""
    cheaper = sorted((i for i, group in enumerate(groups) if group.cost < below), key=lambda i: -groups[i].cost)
    for i in cheaper:
        taken = min(units[i] - 1, debt // groups[i].cost)
        units[i] -= taken
        debt -= taken * groups[i].cost
    for i in reversed(cheaper):  # what no whole unit pays exactly: the cheapest that covers it
        if debt > 0 and units[i] > 1 and groups[i].cost >= debt:
            units[i] -= 1
            debt -= groups[i].cost
    return -debt if debt <= 0 else None


def _cost(groups: Sequence[Group], units: Sequence[int]) -> int:
    return sum(group.cost * count for group, count in zip(groups, units, strict=True))
