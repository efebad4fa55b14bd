"""Whole units of unlike cost for groups, in proportion to weights: largest remainders within bounds, exactly."""

import math
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
    """Units per group, each in 1..most, together costing at most `budget` and as near to it as any choice does.

    Shares are proportional to weights within the bounds (what a full group cannot take goes to the others) and rounded
    down; what is left goes unit by unit to the largest remainder that still fits, ties to the earlier group. Where full
    groups keep this from the nearest total, the fewest dear units are moved that reach it.

    `budget` must be at least the sum of the costs.
    """
    unit = math.gcd(*(group.cost for group in groups))
    groups = [Group(g.weight, g.cost // unit, g.most) for g in groups]
    budget = min(budget // unit, sum(group.cost * group.most for group in groups))
    shares = _bounded_shares(groups, budget)
    units = [int(share / group.cost) for share, group in zip(shares, groups, strict=True)]
    left = budget - sum(group.cost * count for group, count in zip(groups, units, strict=True))
    while True:
        fitting = [i for i, group in enumerate(groups) if group.cost <= left and units[i] < group.most]
        if not fitting:
            return _exact(groups, units, budget)
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


def _exact(groups: Sequence[Group], units: Sequence[int], budget: int) -> list[int]:
    """`units` if no other choice costs more within the budget; else the nearest to it that does, dearest groups first.

    reachable[k] has bit t set where the k cheapest groups together can cost t.
    """
    chosen = list(units)
    order = sorted(range(len(groups)), key=lambda i: groups[i].cost)
    reachable, within = [1], (1 << budget + 1) - 1
    for i in order:
        reachable.append(_any_units(reachable[-1], groups[i]) & within)
    total = reachable[-1].bit_length() - 1
    if total == sum(group.cost * count for group, count in zip(groups, units, strict=True)):
        return chosen
    for k, i in reversed(list(enumerate(order))):
        cost, rest = groups[i].cost, reachable[k]
        possible = [u for u in range(1, min(groups[i].most, total // cost) + 1) if rest >> (total - u * cost) & 1]
        chosen[i] = min(possible, key=lambda u: abs(u - units[i]))
        total -= chosen[i] * cost
    return chosen


def _any_units(costs: int, group: Group) -> int:
    """The set `costs` (bit t: t is in it) with 1 to `most` units of the group added, by doubling."""
    result, most = costs << group.cost, 1
    while most < group.most:
        more = min(most, group.most - most)
        result |= result << more * group.cost
        most += more
    return result
