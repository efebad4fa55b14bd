"""From a number of DReLUs to a plan: which sites share gates, and the prototypes of each leader (DeepShare 3.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from typing import Literal

from deepshare.budget.apportion import Group, apportion
from deepshare.budget.errors import BudgetError
from deepshare.budget.published import published, published_labels
from deepshare.plan import Plan, Site, check_is_plan

Weights = Mapping[str, float | Fraction] | Sequence[float | Fraction] | str


@dataclass(frozen=True)
class Allocation:
    """A plan for a budget.

    Attributes:
        plan: the sites as shared leaders and followers; linear sites as they were.
        reached: its DReLUs, at most `requested`.
        group: the longest run of sites that share one leader's gates; 1 is no layer sharing.
        requested: the budget asked for.
    """

    plan: Plan
    reached: int
    group: int
    requested: int

    def __str__(self) -> str:
        sharing = "no layer sharing" if self.group == 1 else f"layer groups of up to {self.group} sites"
        leaders = ", ".join(f"{site.name} P={site.prototypes}" for site in self.plan if site.prototypes is not None)
        return f"{self.reached:,} of {self.requested:,} DReLUs, {sharing}: {leaders}"


def allocate(
    plan: Plan,
    weights: Weights,
    budget: int,
    group: int | Literal["auto"] = "auto",
    *,
    layer_sharing: bool = True,
) -> Allocation:
    """Spread `budget` DReLUs over the plan's sites by weight, as prototypes of leaders whose gates followers share.

    A layer group is a run of consecutive sites of equal shape (DeepShare appendix C), cut to length `group`; its
    first site leads. A prototype costs H*W, so P per leader comes from largest remainders in units of H*W
    (`apportion`), with 1 <= P <= C and never above the budget. Every site but linear ones takes part, whatever stands
    there. A budget above what the groups can take gives P = C throughout; `reached` says what that is.

    Args:
        plan: usually `Plan.of(model, ...)`.
        weights: relative DReLUs per site, summed per group: by name; or one per site of the plan in call order (a
            linear site's counts nothing); "uniform", by size: every site keeps the same share; or the label of a
            published list (`published`). The paper takes SNL's counts: `weights_of` a plan with its masks.
        budget: DReLUs per image in total.
        group: sites per leader at most. "auto": the longest that reaches the budget, as the paper gives no rule.
        layer_sharing: False makes every site a leader (the paper's ablation "No Layer sharing"), as group=1 does.

    Raises:
        BudgetError: the budget is below the floor, one prototype per leader (the message names floor and group); or
            budget, group or weights are not what is stated here.
    """
    check_is_plan("allocate", plan)
    sites = [site for site in plan.sites if site.kind != "linear"]
    if not sites:
        raise BudgetError("allocate: the plan has no site that could have gates")
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"allocate: budget must be an int (got {budget!r})")
    share = _weight_of(plan, weights, sites)
    groups, length = _grouping(_runs(sites), budget, _check_group(group, layer_sharing))
    units = apportion([_sized(members, share) for members in groups], budget)
    shared = dict(_shared(groups, units))
    made = Plan(tuple(shared.get(site.name, site) for site in plan.sites), plan.input_size)
    return Allocation(made, made.drelus, length, budget)


def _check_group(group: int | Literal["auto"], layer_sharing: bool) -> int | None:
    """The length asked for, None for "auto"."""
    if group != "auto" and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise BudgetError(f'allocate: group must be "auto" or an int of at least 1 (got {group!r})')
    if layer_sharing:
        return None if group == "auto" else int(group)
    if group not in ("auto", 1):
        raise BudgetError(f"allocate: without layer sharing group is 1 (got {group!r})")
    return 1


def _weight_of(plan: Plan, weights: Weights, sites: list[Site]) -> dict[str, Fraction]:
    if weights == "uniform":
        return {site.name: Fraction(site.size) for site in sites}
    if isinstance(weights, str):
        if weights not in published_labels():
            raise BudgetError(
                f'allocate: weights must be numbers, "uniform" or a published label (got {weights!r:.80})'
            )
        weights = published(weights, plan)
    names = [site.name for site in plan.sites]
    if isinstance(weights, Mapping):
        unlike = sorted(weights.keys() - set(names), key=str)
        unlike = unlike or [site.name for site in sites if site.name not in weights]
        if unlike:
            raise BudgetError(f"allocate: weights must name the plan's sites, {unlike[0]!r} stands in one of them only")
        named = dict(weights)
    else:
        _check_is_sequence(weights)
        if len(weights) != len(names):
            raise BudgetError(f"allocate: weights must be {len(names)} numbers, one per site (got {len(weights)})")
        named = dict(zip(names, weights, strict=True))
    exact = {name: _exact_weight(name, weight) for name, weight in named.items()}
    if not any(exact[site.name] for site in sites):
        raise BudgetError("allocate: at least one weight must be above 0")
    return {site.name: exact[site.name] for site in sites}


def _check_is_sequence(weights: object) -> None:
    if not isinstance(weights, Sequence):
        got = f"{type(weights).__module__}.{type(weights).__qualname__}"
        raise BudgetError(f'allocate: weights must be a mapping, a list or tuple, or "uniform" (got {got})')


def _exact_weight(name: str, weight: object) -> Fraction:
    if not isinstance(weight, Real):
        raise BudgetError(f"allocate: the weight of site {name!r} must be a number (got {weight!r:.80})")
    try:
        exact = Fraction(weight) if isinstance(weight, Rational) else Fraction(float(weight))
    except (ValueError, OverflowError):  # NaN; infinite
        exact = Fraction(-1)
    if exact < 0:
        raise BudgetError(f"allocate: the weight of site {name!r} must be finite and at least 0 (got {weight!r:.80})")
    return exact


def _runs(sites: Sequence[Site]) -> list[list[Site]]:
    """Consecutive sites of equal shape."""
    runs: list[list[Site]] = []
    for site in sites:
        if runs and runs[-1][-1].shape == site.shape:
            runs[-1].append(site)
        else:
            runs.append([site])
    return runs


def _grouping(runs: list[list[Site]], budget: int, asked: int | None) -> tuple[list[list[Site]], int]:
    """(groups, their longest). For "auto" (None) the longest length that reaches the budget, or else comes nearest."""
    longest = max(map(len, runs))
    lengths = range(longest, 0, -1) if asked is None else [asked]
    best: tuple[int, list[list[Site]]] | None = None
    floors: dict[int, int] = {}
    for length in lengths:
        groups = [run[start : start + length] for run in runs for start in range(0, len(run), length)]
        capacity = sum(members[0].size for members in groups)
        floors[length] = sum(members[0].positions for members in groups)
        if floors[length] <= budget and (best is None or capacity > best[0]):
            best = (capacity, groups)
        if best is not None and best[0] >= budget:
            break
    if best is None:
        length = min(floors, key=lambda known: floors[known])
        raise BudgetError(
            f"allocate: budget must be at least {floors[length]:,} DReLUs, one prototype per leader with layer groups "
            f"of up to {length} sites (got {budget:,})"
        )
    return best[1], max(map(len, best[1]))


def _sized(members: list[Site], share: dict[str, Fraction]) -> Group:
    leader = members[0]
    return Group(sum((share[site.name] for site in members), Fraction(0)), leader.positions, leader.channels)


def _shared(groups: list[list[Site]], units: list[int]) -> list[tuple[str, Site]]:
    sites = []
    for (leader, *followers), prototypes in zip(groups, units, strict=True):
        sites.append(Site(leader.name, leader.shape, "shared", prototypes=prototypes))
        sites += [Site(site.name, site.shape, "shared", leader=leader.name) for site in followers]
    return [(site.name, site) for site in sites]
