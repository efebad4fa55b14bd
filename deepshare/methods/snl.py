"""Selective Network Linearization (SNL, Cho et al. 2022): which ReLUs stay, from learned masks. docs/snl.md."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepshare.plan import Mask, Plan, Site, check_is_plan


class SNLError(ValueError):
    """Settings, masks or a budget that SNL cannot work with; names the argument, what was wanted and what came."""


@dataclass(frozen=True)
class SNLSettings:
    """What Algorithm 1 leaves to be chosen; the defaults are the paper's (section 4).

    granularity: a mask value per "pixel" (eq. 2) or per "channel" (eq. 6)
    zero_out: elements without a ReLU are 0 (eq. 7), not passed on (eq. 2)
    exact: the last step keeps the largest mask values, as many as the budget; False is the paper's stop below it, line
        11: every value above epsilon stays
    lasso: lambda of eq. 4 at the start; kappa: its factor after each epoch in which the count does not fall
    epsilon: mask values above it count as ReLUs
    """

    granularity: Literal["pixel", "channel"] = "pixel"
    zero_out: bool = False
    exact: bool = True
    lasso: float = 1e-5
    kappa: float = 1.1
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if self.granularity not in ("pixel", "channel"):
            raise SNLError(f'snl: granularity must be "pixel" or "channel" (got {self.granularity!r})')
        for name, least in (("lasso", 0.0), ("kappa", 1.0), ("epsilon", 0.0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= least):
                raise SNLError(f"snl: {name} must be finite and at least {least:g} (got {value!r:.80})")
        if self.epsilon >= 1:
            raise SNLError(f"snl: epsilon must be below 1, where masks start (got {self.epsilon})")

    def next_lasso(self, lasso: float, count: int, lowest: int) -> float:
        """Lines 7 to 9: kappa * lambda if the epoch's count is not below every earlier one, `lowest`."""
        return lasso if count < lowest else lasso * self.kappa


def mask_sites(plan: Plan) -> list[Site]:
    """The sites that get masks: every ReLU of the plan; linear sites stay linear.

    Raises SNLError: something else stands in the plan, or no ReLU.
    """
    check_is_plan("snl", plan)
    for site in plan:
        if site.kind not in ("relu", "linear"):
            raise SNLError(
                f"snl: the plan to start from must be relu or linear at site {site.name!r} (got {site.kind!r})"
            )
    sites = [site for site in plan if site.kind == "relu"]
    if not sites:
        raise SNLError("snl: the plan to start from has no ReLU")
    return sites


def mask_shape(site: Site, granularity: str) -> tuple[int, ...]:
    """(C, H, W), or (C,) for "channel"."""
    return site.shape if granularity == "pixel" else site.shape[:1]


def check_budget(plan: Plan, budget: int, granularity: str) -> None:
    """Raises SNLError unless `budget` is below the plan's ReLUs and at least one unit, a pixel or the smallest H*W."""
    floor = min(site.size // math.prod(mask_shape(site, granularity)) for site in mask_sites(plan))
    if isinstance(budget, bool) or not isinstance(budget, int) or not floor <= budget < plan.drelus:
        raise SNLError(
            f"snl: budget must be an int of at least {floor:,}, one {granularity}, and below the {plan.drelus:,} ReLUs "
            f"of the network (got {budget!r})"
        )


def lasso_norm(masks: Sequence[Tensor]) -> Tensor:
    """sum_i ||c_i||_1 of eq. 4, which lambda weighs: scalar with gradient. Per channel a channel counts once."""
    return torch.stack([mask.abs().sum() for mask in masks]).sum()


def count_kept(plan: Plan, masks: Mapping[str, Tensor], epsilon: float) -> dict[str, int]:
    """Line 6 by site: DReLUs of the mask values above epsilon; a channel's value stands for its H*W.

    Raises SNLError: masks for another plan.
    """
    _check_masks(plan, masks)
    kept = {name: int((mask > epsilon).sum()) for name, mask in masks.items()}
    return {site.name: kept[site.name] * _cost(site, masks[site.name]) for site in mask_sites(plan)}


def threshold(plan: Plan, masks: Mapping[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """Line 11, C <- 1(C > epsilon), by site. Raises SNLError: masks for another plan."""
    _check_masks(plan, masks)
    return {site.name: masks[site.name].detach() > epsilon for site in mask_sites(plan)}


def binarise(plan: Plan, masks: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The largest mask values of all sites together, as many as cost `budget` DReLUs: a bool mask by site.

    Per pixel that is the budget exactly. A channel costs the H*W of its site, so the largest total within the budget
    that any choice of channels reaches: channels are taken from the largest value down, passing over what no longer
    fits; where that misses the largest total, the fewest of the dearest channels are exchanged that reach it. Of equal
    values the one earlier in call order, then in memory, is taken first.

    Args:
        plan: the network SNL started from: masks are for its relu sites.
        masks: values per site, [C, H, W] or [C].
        budget: DReLUs per image.

    Raises:
        SNLError: masks for another plan, a value that is not finite, a budget above the ReLUs or below the cheapest.
    """
    _check_masks(plan, masks)
    sites = mask_sites(plan)
    sizes = [masks[site.name].numel() for site in sites]
    values = torch.cat([masks[site.name].detach().reshape(-1).double().cpu() for site in sites])
    if not bool(values.isfinite().all()):
        raise SNLError("snl: masks must be finite")
    costs = torch.cat([torch.full((n,), _cost(s, masks[s.name])) for n, s in zip(sizes, sites, strict=True)])
    least, total = int(costs.min()), int(costs.sum())
    if isinstance(budget, bool) or not isinstance(budget, int) or not least <= budget <= total:
        raise SNLError(f"snl: budget must be an int in {least:,}..{total:,} for these masks (got {budget!r})")
    kept = torch.zeros(len(values), dtype=torch.bool)
    order = values.sort(descending=True, stable=True).indices
    for cost, count in _choose(costs[order].tolist(), budget).items():
        kept[order[costs[order] == cost][:count]] = True
    pieces = zip(sites, kept.split(sizes), strict=True)
    return {site.name: piece.reshape(masks[site.name].shape) for site, piece in pieces}


def plan_of(plan: Plan, masks: Mapping[str, Tensor | Mask], *, zero_out: bool = False) -> Plan:
    """`plan` with these masks (bool tensors or packed) at its relu sites.

    Raises SNLError: the masks are for another plan. PlanError: a tensor that is not bool.
    """
    sites = {site.name for site in mask_sites(plan)}
    _check_masks(plan, masks)
    made = [
        Site(s.name, s.shape, "mask", mask=masks[s.name], zero_out=zero_out) if s.name in sites else s  # type: ignore[arg-type]
        for s in plan
    ]
    return Plan(tuple(made), plan.input_size)


def _check_masks(plan: Plan, masks: Mapping[str, Tensor | Mask]) -> None:
    sites = {site.name: site for site in mask_sites(plan)}
    if not isinstance(masks, Mapping):
        raise SNLError(f"snl: masks must be a mapping of sites to tensors (got {masks!r:.80})")
    unlike = [name for name in sites if name not in masks] + [name for name in masks if name not in sites]
    if unlike:
        where = "the plan's ReLUs" if unlike[0] in sites else "the masks"
        raise SNLError(f"snl: masks must be for the plan's ReLUs; {unlike[0]!r} stands only among {where}")
    for name, site in sites.items():
        if not isinstance(masks[name], Tensor | Mask):
            raise SNLError(f"snl: the mask of site {name!r} must be a tensor (got {masks[name]!r:.80})")
        shape = tuple(masks[name].shape)
        if shape not in (site.shape, site.shape[:1]):
            raise SNLError(f"snl: the mask of site {name!r} must be {site.shape} or {site.shape[:1]} (got {shape})")


def _cost(site: Site, mask: Tensor) -> int:
    """DReLUs of one mask value."""
    return site.size // mask.numel()


def _choose(costs: Sequence[int], budget: int) -> dict[int, int]:
    """How many to keep of each cost, from costs sorted by falling value; per cost the first ones are kept."""
    available = dict.fromkeys(sorted(set(costs)), 0)
    taken = dict(available)
    left = budget
    for cost in costs:
        available[cost] += 1
        if cost <= left:
            taken[cost] += 1
            left -= cost
    return taken if left < math.gcd(*available) else _nearest(available, taken, budget)


def _nearest(available: Mapping[int, int], taken: Mapping[int, int], budget: int) -> dict[int, int]:
    """Counts whose cost is the largest reachable within the budget, as near to `taken` as that allows, dearest first.

    reachable[k] has bit t set where the k cheapest kinds together can cost t units.
    """
    unit = math.gcd(*available)
    order = sorted(available)
    reachable, within = [1], (1 << budget // unit + 1) - 1
    for cost in order:
        reachable.append(_up_to(reachable[-1], cost // unit, available[cost]) & within)
    total = reachable[-1].bit_length() - 1
    chosen = {}
    for k, cost in reversed(list(enumerate(order))):
        rest, step = reachable[k], cost // unit
        most = min(available[cost], total // step)
        chosen[cost] = min(
            (count for count in range(most + 1) if rest >> (total - count * step) & 1),
            key=lambda count, cost=cost: abs(count - taken[cost]),  # type: ignore[misc]
        )
        total -= chosen[cost] * step
    return chosen


def _up_to(totals: int, cost: int, most: int) -> int:
    """The set `totals` (bit t: t is in it) with 0 to `most` times `cost` added, by doubling."""
    done, result = 0, totals
    while done < most:
        more = min(done + 1, most - done)
        result |= result << more * cost
        done += more
    return result
