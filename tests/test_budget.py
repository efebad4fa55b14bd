"""allocate: the papers' numbers, and what must hold for every plan, weight and budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepshare.budget import BudgetError, allocate
from deepshare.plan import Plan, Site


def stages(*shapes: tuple[int, int, int], length: int) -> Plan:
    """`length` sites of each (C, H, W) in turn."""
    sites = [Site(f"{stage}.{i}", shape) for stage, shape in enumerate(shapes) for i in range(length)]
    return Plan(tuple(sites), (3, 32, 32))


def resnet18(scale: int = 1) -> Plan:
    """ResNet18's sites at 32x32 (scale 1) or 64x64 (scale 2), without the stem's."""
    return stages(*((64 << s, 32 * scale >> s, 32 * scale >> s) for s in range(4)), length=4)


def wide_resnet() -> Plan:
    """WRN-22-8's sites at 32x32: 1 + 6 + 6 + 5."""
    shapes = [(16, 32, 32), *[(128, 32, 32)] * 6, *[(256, 16, 16)] * 6, *[(512, 8, 8)] * 5]
    return Plan(tuple(Site(f"s{i}", shape) for i, shape in enumerate(shapes)), (3, 32, 32))


@pytest.mark.parametrize(
    ("plan", "budget", "reached"),
    [
        (resnet18(), 1_360, 1_360),
        (resnet18(), 6_000, 6_000),
        (resnet18(), 12_900, 12_896),
        (resnet18(), 49_900, 49_888),
        (resnet18(), 120_000, 120_000),
        (resnet18(), 122_880, 122_880),
        (resnet18(2), 5_440, 5_440),
        (resnet18(2), 30_000, 29_952),
        (wide_resnet(), 2_368, 2_368),
        (wide_resnet(), 245_760, 245_760),
    ],
)
def test_numbers_of_the_papers_with_one_group_per_stage(plan, budget, reached):
    allocation = allocate(plan, "uniform", budget)
    assert (allocation.reached, allocation.plan.drelus, allocation.requested) == (reached, reached, budget)
    assert sum(site.prototypes is not None for site in allocation.plan) == 4


@pytest.mark.parametrize(("plan", "floor"), [(resnet18(), 1_360), (resnet18(2), 5_440), (wide_resnet(), 2_368)])
def test_below_the_floor_is_an_error_that_names_it(plan, floor):
    longest = 6 if len(plan) == 18 else 4
    with pytest.raises(BudgetError, match=rf"at least {floor:,} DReLUs.*up to {longest} sites \(got {floor - 1:,}\)"):
        allocate(plan, "uniform", floor - 1)


def test_a_fixed_group_has_its_own_floor():
    with pytest.raises(BudgetError, match=r"at least 5,440 DReLUs.*groups of up to 1 "):
        allocate(resnet18(), "uniform", 5_439, group=1)
    assert allocate(resnet18(), "uniform", 5_440, layer_sharing=False).reached == 5_440


def test_longer_groups_give_way_where_they_cannot_reach_the_budget():
    groups = [allocate(resnet18(), "uniform", budget).group for budget in (122_880, 122_881, 245_761, 491_520)]
    assert groups == [4, 3, 1, 1]


def test_auto_stays_with_the_longest_where_shorter_ones_spend_no_more():
    """One channel: runs of 4 in pieces of 3 or of 2 both hold 20 DReLUs, single sites need 40."""
    allocation = allocate(stages((1, 5, 2), length=4), "uniform", 25)
    assert (allocation.group, allocation.reached) == (3, 20)


def test_a_budget_no_grouping_can_spend_gives_every_gate():
    allocation = allocate(resnet18(), "uniform", 600_000)
    assert (allocation.reached, allocation.group) == (491_520, 1)
    assert allocate(resnet18(), "uniform", 200_000, group=4).reached == 122_880


def test_followers_name_their_leader():
    plan = allocate(stages((8, 4, 4), (4, 2, 2), length=3), "uniform", 40, group=2).plan
    assert [site.leader for site in plan] == [None, "0.0", None, None, "1.0", None]


def test_a_run_is_cut_where_the_shape_changes_and_linear_sites_stay():
    plan = stages((8, 4, 4), length=4).replace("0.1", "linear")
    allocated = allocate(plan, [1, 100, 1, 1], 64).plan
    assert allocated["0.1"].kind == "linear"
    assert [site.leader for site in allocated] == [None, None, "0.0", "0.0"]
    sites = (Site("a", (4, 2, 2)), Site("b", (4, 4, 1)), Site("c", (4, 2, 2)))
    assert allocate(Plan(sites, (3, 4, 4)), "uniform", 12).group == 1


def test_largest_remainders_by_hand():
    """Weights 5:3:2 of 14 units of 4: shares 7, 4.2, 2.8, so the last unit is the third's."""
    plan = Plan((Site("a", (16, 2, 2)), Site("b", (15, 2, 2)), Site("c", (14, 2, 2))), (3, 4, 4))
    allocation = allocate(plan, {"a": 5, "b": 3, "c": 2}, 56)
    assert [site.prototypes for site in allocation.plan] == [7, 4, 3]
    assert str(allocation) == "56 of 56 DReLUs, no layer sharing: a P=7, b P=4, c P=3"


def test_what_a_full_leader_cannot_take_goes_to_the_others():
    plan = Plan((Site("a", (2, 2, 2)), Site("b", (15, 2, 2)), Site("c", (14, 2, 2))), (3, 4, 4))
    allocation = allocate(plan, [98, 1, 1], 4 * 12)
    assert [site.prototypes for site in allocation.plan] == [2, 5, 5]
    starving = allocate(plan, [1, 0, 0], 4 * 12)
    assert (starving.reached, starving.plan["a"].prototypes) == (48, 2)


def test_weights_are_summed_within_a_group():
    plan = stages((64, 2, 2), (65, 2, 2), length=2)
    allocation = allocate(plan, [1, 2, 4, 5], 4 * 24)
    assert [site.prototypes for site in allocation.plan] == [6, None, 18, None]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 3, "weights must be 4 numbers, one per site .got 3"),
        ({"0.0": 1, "0.1": 1, "0.2": 1}, "'0.3' stands in one of them only"),
        ({"0.0": 1, "0.1": 1, "0.2": 1, "0.3": 1, "9": 1}, "'9' stands in one of them only"),
        ([1, 1, -1, 1], "weight of site '0.2' must be finite and at least 0 .got -1"),
        ([1, 1, math.nan, 1], "weight of site '0.2' must be finite"),
        ([0, 0, 0, 0], "at least one weight"),
        ("even", 'numbers, "uniform" or a published label .got .even.'),
        (None, "weights must be a mapping, a list or tuple, or .*got builtins.NoneType"),
        (3.0, "weights must be a mapping.*got builtins.float"),
        (torch.ones(4), "weights must be a mapping.*got torch.Tensor"),
        (["1", "1", "1", "1"], "weight of site '0.0' must be a number .got '1'"),
        ([1, None, 1, 1], "weight of site '0.1' must be a number .got None"),
        ([1, 1, 1, torch.ones(())], "weight of site '0.3' must be a number"),
        ([1, math.inf, 1, 1], "weight of site '0.1' must be finite"),
        ({"0.0": 1, "0.1": 1, "0.2": 1, "0.3": 1, "9": 1, 9: 1}, "stands in one of them only"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(BudgetError, match=message):
        allocate(stages((8, 4, 4), length=4), weights, 64)


def test_whole_numbers_beyond_floats_are_weights():
    plan = stages((8, 4, 4), length=4)
    assert allocate(plan, [10**400] * 4, 64) == allocate(plan, [1] * 4, 64)


def test_wrong_groups_and_budgets_are_refused():
    plan = stages((8, 4, 4), length=4)
    for group in (0, True, "long", 1.0):
        with pytest.raises(BudgetError, match="group must be"):
            allocate(plan, "uniform", 64, group=group)
    with pytest.raises(BudgetError, match="without layer sharing group is 1"):
        allocate(plan, "uniform", 64, group=2, layer_sharing=False)
    with pytest.raises(BudgetError, match="budget must be an int"):
        allocate(plan, "uniform", 64.0)
    with pytest.raises(BudgetError, match="no site"):
        allocate(plan.replace_all("linear"), "uniform", 64)


STAGES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=4)
WEIGHT = st.floats(0, 1e6, allow_subnormal=False)


@st.composite
def problems(draw):
    """(plan, weights, group): stages of 1-4 sites; H*W falls by four from stage to stage, or as it likes."""
    drawn = draw(STAGES)
    sides = draw(st.sampled_from([(8, 4, 2, 1), (7, 5, 3, 2)]))
    shapes = [(channels, sides[s], sides[s]) for s, (channels, _) in enumerate(drawn)]
    sites = [Site(f"{s}.{i}", shape) for s, shape in enumerate(shapes) for i in range(drawn[s][1])]
    plan = Plan(tuple(sites), (3, 32, 32))
    weights = draw(st.lists(WEIGHT, min_size=len(plan), max_size=len(plan)).filter(any))
    return plan, weights, draw(st.sampled_from(["auto", 1, 2, 3]))


def leaders_of(plan: Plan) -> list[Site]:
    return [site for site in plan if site.prototypes is not None]


def floor_of(plan: Plan, group) -> int:
    longest = 4 if group == "auto" else group
    return sum(site.positions for site in leaders_of(allocate(plan, "uniform", 10**9, group=longest).plan))


def nearest(leaders: list[Site], budget: int) -> int:
    """The largest sum of P*H*W within the budget, by trying all."""
    totals = {0}
    for site in leaders:
        totals = {total + p * site.positions for total in totals for p in range(1, site.channels + 1)}
    return max(total for total in totals if total <= budget)


@settings(max_examples=80, deadline=None)
@given(problems(), st.floats(0, 1.2))
def test_an_allocation_keeps_every_bound(problem, fraction):
    plan, weights, group = problem
    floor = floor_of(plan, group)
    budget = floor + int(fraction * (plan.drelus - floor))
    allocation = allocate(plan, weights, budget, group=group)
    assert all(1 <= site.prototypes <= site.channels for site in leaders_of(allocation.plan))
    assert allocation.reached == allocation.plan.drelus <= budget
    assert allocation.reached == nearest(leaders_of(allocation.plan), budget)


@settings(max_examples=50, deadline=None)
@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_more_budget_never_reaches_less(problem, one, other):
    plan, weights, _ = problem
    group = len(plan)  # a shorter one has another floor
    floor = floor_of(plan, group)
    low, high = sorted(floor + int(fraction * (plan.drelus - floor)) for fraction in (one, other))
    assert allocate(plan, weights, low, group=group).reached <= allocate(plan, weights, high, group=group).reached


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(1, 50), st.randoms(use_true_random=False))
def test_equal_units_and_inner_shares_miss_the_ideal_by_less_than_one(channels, positions, units, random):
    """The quota rule of largest remainders, where neither bound binds."""
    plan = stages((channels, positions, 1), (channels + 1, positions, 1), (channels + 2, positions, 1), length=1)
    weights = [random.randint(1, 9) for _ in range(3)]
    ideals = [units * weight / sum(weights) for weight in weights]
    if units < 3 or not all(1 <= ideal <= channels for ideal in ideals):
        return
    prototypes = [site.prototypes for site in allocate(plan, weights, units * positions).plan]
    assert sum(prototypes) == units
    assert all(abs(p - ideal) < 1 for p, ideal in zip(prototypes, ideals, strict=True))


def test_odd_unit_costs_stay_below_the_budget():
    generator = torch.Generator().manual_seed(0)
    plan = Plan((Site("a", (5, 7, 7)), Site("b", (9, 5, 5)), Site("c", (11, 3, 3)), Site("d", (6,))), (3, 7, 7))
    for budget in range(84, plan.drelus + 5):
        weights = torch.rand(4, generator=generator).tolist()
        allocation = allocate(plan, weights, budget)
        assert budget - 49 < allocation.reached <= budget
        assert all(1 <= site.prototypes <= site.channels for site in allocation.plan)


@pytest.mark.shared
@pytest.mark.parametrize("budget", [6_000, 12_896, 49_888, 120_000])
def test_published_layer_budgets_are_reached_exactly(shared_dir, budget):
    """SENet's lists for ResNet18 on CIFAR-100: fractions of each layer, the stem's first."""
    lines = (shared_dir / "reference" / "layer_budgets.csv").read_text().splitlines()
    lists = [line.split(",")[1] for line in lines if line.startswith("ResNet18_c100")]
    assert len(lists) >= 4
    plan = resnet18()
    for fractions in lists:
        weights = [float(f) * site.size for f, site in zip(fractions.split()[1:], plan, strict=True)]
        allocation = allocate(plan, weights, budget)
        assert (allocation.reached, allocation.group) == (budget, 4)
        if budget == 6_000:  # far from every bound: the shares are the list's, to one prototype
            ideal = [budget * sum(weights[4 * s : 4 * s + 4]) / sum(weights) for s in range(4)]
            pairs = zip(leaders_of(allocation.plan), ideal, strict=True)
            assert all(abs(site.drelus - share) <= 2 * 1024 for site, share in pairs)
