"""DeepReDuce against every count and every criticality its tables print."""

import math
from fractions import Fraction
from functools import cache

import pytest

from deepshare import models
from deepshare.methods.conv_algebra import Geometry
from deepshare.methods.deepreduce import (
    criticality,
    cull,
    culling_order,
    keep_only,
    on,
    one_block,
    pipeline,
    reshape,
    stage_relus,
    thin,
)
from deepshare.models import shapes_only
from deepshare.plan import Plan, PlanError, apply_plan

CIFAR, TINY = (3, 32, 32), (3, 64, 64)
ORDERS = {CIFAR: ("S1", "S4", "S2", "S3"), TINY: ("S1", "S2", "S4", "S3")}  # section 3.1


def spec(name: str = "resnet18") -> dict:
    return {"name": name, "num_classes": 100, "stem_relu": True}


def plan_of(network: dict, size=CIFAR) -> Plan:
    return _plan_of(tuple(network.items()), size)


@cache
def _plan_of(network: tuple, size) -> Plan:
    return Plan.of(shapes_only(dict(network)), size)


# ---- equation 1

# (stages, accuracy with KD in %, #ReLUs in K as printed, C_k as printed, decimals)
TABLE_3_RESNET34 = ((39.4, 51.74, 60.83, 54.41), (1573, 1049, 786, 197), (0.0, 7.58, 13.44, 10.37), 2)
TABLE_10 = ((59.45, 67.97, 69.22), (311.3, 147.5, 73.73), (0.0, 6.0, 7.2), 1)
TABLE_12 = ((34.25, 46.93, 53.06, 57.28, 50.49), (196.6, 110.6, 58.4, 27.6, 32.4), (0.0, 9.12, 14.15, 18.26, 12.73), 2)
TABLE_3_RESNET18 = ((39.61, 49.44, 54.34, 51.46), (1049, 524, 262, 131), (0.0, 6.04, 9.50, 8.02), 2)
TABLE_11 = ((34.16, 50.65, 54.2, 61.1, 45.45), (131, 28.7, 14.3, 23.5, 3.6), (0.0, 12.55, 15.13, 20.29, 8.69), 2)
TABLE_11_WITHOUT_KD = (33.06, 49.64, 55.56, 57.37, 42.32)


def c(percent, thousands, **settings) -> list[float]:
    names = [f"S{number}" for number in range(1, len(percent) + 1)]
    accuracies = {name: value / 100 for name, value in zip(names, percent, strict=True)}
    relus = {name: round(1000 * value) for name, value in zip(names, thousands, strict=True)}
    return list(criticality(accuracies, relus, **settings).values())


@pytest.mark.parametrize("table", [TABLE_3_RESNET34, TABLE_10, TABLE_12])
def test_the_criticality_that_the_tables_print(table):
    percent, thousands, printed, decimals = table
    assert [round(value, decimals) for value in c(percent, thousands)] == list(printed)


def test_table_3_divides_resnet18_by_twice_its_relus():
    """Its C_k come out with the count of the stage before, twice the stage's own; equation 1 gives 5 % more."""
    percent, thousands, printed, _ = TABLE_3_RESNET18
    doubled = c(percent, [2 * value for value in thousands])
    assert max(abs(ours - theirs) for ours, theirs in zip(doubled, printed, strict=True)) < 0.0051
    assert [round(value, 2) for value in c(percent, thousands)] == [0.0, 6.34, 9.98, 8.42]


def test_table_11_divides_by_accuracies():
    """Its C_k come out with the accuracy without KD where equation 1 has #ReLU: a column taken for another."""
    percent, thousands, printed, _ = TABLE_11
    assert [round(value, 2) for value in c(percent, TABLE_11_WITHOUT_KD)] == list(printed)
    right = c(percent, thousands)
    assert [round(value, 2) for value in right] == [0.0, 13.04, 16.64, 21.6, 10.32]
    assert sorted(range(5), key=right.__getitem__) == sorted(range(5), key=printed.__getitem__)


@pytest.mark.parametrize(
    ("percent", "thousands", "order"),
    [
        ((59.85, 68.79, 69.9, 63.16), (262, 131, 66, 33), ORDERS[CIFAR]),  # Table 1, ResNet18
        ((62.88, 70.93, 72.61, 64.23), (393, 262, 197, 49), ORDERS[CIFAR]),  # Table 1, ResNet34
        (*TABLE_3_RESNET18[:2], ORDERS[TINY]),
        (*TABLE_3_RESNET34[:2], ORDERS[TINY]),
    ],
)
def test_the_order_that_section_3_1_states(percent, thousands, order):
    values = c(percent, thousands)
    assert culling_order({f"S{number + 1}": value for number, value in enumerate(values)}) == order


def test_w_weighs_cost():
    assert c((50, 60, 60), (100, 200, 50), w=0) == pytest.approx([0, 10, 10])
    cheap, dear = c((50, 60, 60), (100, 200, 50), w=1)[1:]
    assert (cheap, dear) == pytest.approx((10 / 200, 10 / 50))
    assert culling_order({"S1": 1.0, "S2": 0.0, "S3": 1.0}) == ("S2", "S1", "S3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, {}), "relus must have the stages none"),
        (({"S1": 0.5}, {"S2": 3}), r"relus must have the stages S1 \(got S2\)"),
        (({"S1": 61.9}, {"S1": 3}), r"accuracies must be shares in \[0, 1\] \(got 61.9 for S1\)"),
        (({"S1": math.nan}, {"S1": 3}), r"accuracies must be shares in \[0, 1\]"),
        (({"S1": 0.5}, {"S1": 0}), r"relus must be at least 1 \(got 0 for S1\)"),
        (({"S1": 0.5}, {"S1": 3}, -1), "w must be a number from 0"),
        (({"S1": 0.5}, {"S1": 3}, math.nan), "w must be a number from 0"),
    ],
)
def test_bad_measurements_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"criticality: {message}"):
        criticality(*arguments)


# ---- counts


@pytest.mark.parametrize(
    ("name", "size", "stem", "stages"),
    [
        ("resnet18", CIFAR, 66, (262, 131, 66, 33)),  # Table 1
        ("resnet34", CIFAR, 66, (393, 262, 197, 49)),
        ("resnet18", TINY, 262, (1049, 524, 262, 131)),  # Table 3
        ("resnet34", TINY, 262, (1573, 1049, 786, 197)),
    ],
)
def test_stage_counts_of_tables_1_and_3(name, size, stem, stages):
    counts = stage_relus(spec(name), plan_of(spec(name), size))
    assert [round(count / 1000) for count in counts.values()] == [stem, *stages]
    for stage, count in counts.items():
        assert keep_only(spec(name), plan_of(spec(name), size), [stage]).drelus == count


def test_resnet56_counts_its_stem_in_s1():
    """Table 10; the ResNet34 of Tables 1 and 3 does not."""
    counts = stage_relus(spec("resnet56"), plan_of(spec("resnet56")))
    assert counts == {"conv1": 16_384, "S1": 294_912, "S2": 147_456, "S3": 73_728}
    assert counts["conv1"] + counts["S1"] == 311_296


@pytest.mark.parametrize(
    ("name", "alpha", "rho", "printed"),
    [
        ("resnet18", 1, 1, 557),
        ("resnet18", 0.25, 1, 139),
        ("resnet18", 1, 0.5, 139),
        ("resnet10", 1, 1, 311),
        ("resnet10", 0.25, 1, 78),
        ("resnet10", 1, 0.5, 78),
        ("resnet6", 1, 1, 188),
        ("resnet6", 0.25, 1, 47),
        ("resnet6", 1, 0.5, 47),
    ],
)
def test_counts_of_table_9(name, alpha, rho, printed):
    """All ReLUs, the stem's too: the baselines drop none."""
    assert round(plan_of(reshape(spec(name), alpha=alpha, rho=rho)).drelus / 1000) == printed


@pytest.mark.parametrize(
    ("stages", "printed"),
    [(("S2", "S3", "S4"), (229, 115, 115)), (("S2", "S3"), (197, 98, 98)), (("S3", "S4"), (98, 49, 49))],
)
def test_counts_of_table_2(stages, printed):
    kept = keep_only(spec(), plan_of(spec()), stages)
    halved = on(reshape(spec(), alpha=0.5), kept)
    counts = (kept.drelus, thin(spec(), kept, stages).drelus, halved.drelus)
    assert tuple(round(count / 1000) for count in counts) == printed


# (stages with ReLUs, thinned, alpha, rho, one block, #ReLU in K as printed)
TABLE_4 = [
    ("S2 S3 S4", False, 1, 1, False, 229.38),
    ("S2 S3", False, 1, 1, False, 196.61),
    ("S2 S3 S4", True, 1, 1, False, 114.69),
    ("S2 S3 S4", True, 0.5, 1, False, 57.34),
    ("S2 S3", True, 0.5, 1, False, 49.15),
    ("S2 S3 S4", True, 1, 0.5, False, 28.67),
    ("S2 S3", True, 1, 0.5, False, 24.57),  # printed as alpha = 0.5 again
    ("S2 S3 S4", True, 0.5, 0.5, False, 14.33),
    ("S2 S3", True, 0.5, 0.5, False, 12.28),
    ("S2 S3 S4", True, 0.5, 0.5, True, 7.17),
]
TABLE_5 = [
    ("S2 S3 S4", False, 1, 1, False, 917.52),
    ("S2 S3 S4", True, 1, 1, False, 458.76),
    ("S3 S4", False, 1, 1, False, 393.24),
    ("S2 S3 S4", True, 0.5, 1, False, 229.38),
    ("S3 S4", True, 1, 1, False, 196.62),
    ("S2 S3 S4", True, 1, 0.5, False, 114.69),
    ("S3 S4", True, 0.5, 1, False, 98.31),
    ("S2 S3 S4", True, 0.5, 0.5, False, 57.35),
    ("S3 S4", True, 1, 0.5, False, 49.16),
    ("S2 S3 S4", True, 0.5, 0.5, True, 28.67),
    ("S3 S4", True, 0.5, 0.5, False, 24.58),
    ("S3 S4", True, 0.5, 0.5, True, 12.29),
]


def count(stages: str, thinned: bool, alpha: float, rho: float, single: bool, size) -> int:
    kept = stages.split()
    plan = keep_only(spec(), plan_of(spec(), size), kept)
    plan = thin(spec(), plan, kept) if thinned else plan
    shape = reshape(one_block(spec(), kept) if single else spec(), alpha=alpha, rho=rho)
    return on(shape, plan).drelus


def printed_alike(relus: Fraction | int, printed: float) -> bool:
    """Whether `relus` in thousands give the printed two decimals, rounded or, as the paper does too, cut off."""
    tens = Fraction(relus, 10)
    return round(100 * printed) in (math.floor(tens), math.floor(tens + Fraction(1, 2)))


@pytest.mark.parametrize("row", TABLE_4)
def test_counts_of_table_4_to_the_printed_digit(row):
    assert printed_alike(count(*row[:5], CIFAR), row[5])


@pytest.mark.parametrize("row", TABLE_5)
def test_counts_of_table_5_with_its_own_baseline(row):
    """Its baseline has 2,228.24K ReLUs, 16 more than the network (2,228,224; Table 3 has 2228K). Its rows come out,
    to the printed digit, as that less S1 and conv1 (1,310.72K) and S2 (524.28K, cut off), halved; ours are exact."""
    stages, ours = row[0].split(), count(*row[:5], TINY)
    exact = {"S2": 524_288, "S3": 262_144, "S4": 131_072}
    theirs = 2_228_240 - 1_310_720 - (0 if "S2" in stages else 524_280)
    factor = Fraction(sum(exact[stage] for stage in stages), ours)
    assert factor in (1, 2, 4, 8, 16, 32)
    assert printed_alike(theirs / factor, row[5])
    assert abs(ours - round(1000 * row[5])) <= 24


@pytest.mark.parametrize(
    ("name", "alpha", "rho", "printed"),
    [("resnet10", 0.5, 1, 155.6), ("resnet6", 1, 0.5, 47.1), ("resnet9", 0.5, 0.5, 30.7)],
)
def test_counts_of_the_small_networks_of_table_7(name, alpha, rho, printed):
    """The row printed as "ResNet10, rho=0.5" is Table 9's ResNet6: its count, and its accuracy."""
    assert round(plan_of(reshape(spec(name), alpha=alpha, rho=rho)).drelus / 1000, 1) == printed


def test_counts_of_the_resnet56_rows_of_table_8():
    """S2 + S3 is 221.2K; 147.5K is S2 thinned + S3 (and, as it happens, S2 alone)."""
    network = spec("resnet56")
    kept = keep_only(network, plan_of(network), ["S2", "S3"])
    assert (kept.drelus, thin(network, kept, ["S2"]).drelus) == (221_184, 147_456)


def test_table_8_counts_a_merged_pair_as_one_3x3():
    """ResNet56 has 125.49M multiplications (shortcuts without any, He et al.); 87.7M are left if 16 of the 18 equal
    convolutions of S1 cost nothing, 66.5M if one of each of S2's 9 pairs does too. As 5x5 the pairs would cost more."""
    wide = [Geometry(c, c, (3, 3), padding=(1, 1)) for c in (16, 32, 64)]
    each = [layer.multiplications((32 // 2**stage) ** 2) for stage, layer in enumerate(wide)]
    stem, halving = 3 * 16 * 9 * 32**2, [value // 2 for value in each[1:]]
    total = stem + 18 * each[0] + sum(halving) + 17 * (each[1] + each[2]) + 64 * 10
    assert round(total / 1e6, 2) == 125.49
    assert round((total - 16 * each[0]) / 1e6, 1) == 87.7
    assert round((total - 16 * each[0] - 9 * each[1]) / 1e6, 1) == 66.5
    assert wide[1].after(wide[1]).multiplications(256) * 18 == 25 * 2 * each[1]


# ---- the pipeline


@pytest.mark.parametrize("size", [CIFAR, TINY])
def test_the_pipeline_has_five_networks_per_iteration(size):
    variants = pipeline(spec(), ORDERS[size], size)
    assert len(variants) == 5 * 3
    assert len({variant.name for variant in variants}) == 15
    for variant in variants:
        Plan.of(shapes_only(variant.spec), size)
        variant.plan.check_fits(Plan.of(shapes_only(variant.spec), size))
    counts = [variant.plan.drelus for variant in variants]
    for first in range(0, 15, 5):
        assert [counts[first] / value for value in counts[first : first + 5]] == [1, 2, 4, 8, 16]
    rows = TABLE_4 if size is CIFAR else TABLE_5
    without_star = {count(*row[:5], size) for row in rows if not row[4]}
    assert without_star <= set(counts)


def test_the_pipeline_names_networks_as_the_paper_does():
    names = [variant.name for variant in pipeline({**spec(), "input_size": [3, 32, 32]}, ORDERS[CIFAR])]
    assert names[:5] == [
        "S2+S3+S4",
        "S2RT+S3RT+S4RT",
        "S2RT+S3RT+S4RT a=0.5",
        "S2RT+S3RT+S4RT r=0.5",
        "S2RT+S3RT+S4RT a=0.5 r=0.5",
    ]
    assert names[5] == "S2+S3"
    assert names[10] == "S3"


def test_a_variant_is_a_network():
    variants = pipeline({"name": "resnet18", "num_classes": 3, "width": 8, "in_channels": 1}, ORDERS[CIFAR], (1, 8, 8))
    for variant in variants:
        model = apply_plan(models.create(**variant.spec), variant.plan)
        assert Plan.of(model, (1, 8, 8)) == variant.plan
        assert {site.kind for site in variant.plan} == {"relu", "linear"}


def test_thinning_drops_the_relu_inside_each_block():
    plan = thin(spec(), plan_of(spec()), ["S2"])
    dropped = [site.name for site in plan if site.kind == "linear"]
    assert dropped == ["layer2.0.relu1", "layer2.1.relu1"]
    again = thin(spec(), plan, ["S2"])
    assert [site.name for site in again if site.kind == "linear"] == [*dropped[:1], "layer2.0.relu2", *dropped[1:]]
    with pytest.raises(PlanError, match=r"thin: stage S2 must have at least 2 activations left \(got 1\)"):
        thin(spec(), again, ["S2"])


def test_thinning_begins_anew_in_each_stage():
    """WRN-22-8's first stage has an odd number of sites."""
    network = spec("wrn-22-8")
    full = plan_of(network)
    plan = thin(network, full, ["S1", "S2"])
    for stage in ("S1", "S2"):
        sites = [site.name for site in full if models.stage_of(network, site.name) == stage]
        assert [name for name in sites if plan[name].kind == "linear"] == sites[::2]


def test_culling_compounds_and_leaves_the_rest():
    full = plan_of(spec())
    plan = cull(spec(), cull(spec(), full, ["S1"]), ["S4", "conv1"])
    assert stage_relus(spec(), plan) == {"conv1": 0, "S1": 0, "S2": 131_072, "S3": 65_536, "S4": 0}
    assert plan == keep_only(spec(), full, ["S2", "S3"])
    assert cull(spec(), full, "S1") == cull(spec(), full, ["S1"])


def test_bad_stages_are_refused():
    full = plan_of(spec())
    for method in (cull, keep_only, thin):
        with pytest.raises(PlanError, match=rf"{method.__name__}: stages must be of conv1, S1, .* \(got 'S5'\)"):
            method(spec(), full, ["S1", "S5"])
    with pytest.raises(PlanError, match=r"must be a site of a model of models\.create"):
        cull({"name": "mine"}, full, ["S1"])


@pytest.mark.parametrize(
    ("order", "size", "message"),
    [
        (("S1", "S2", "S3"), CIFAR, "order must be a permutation of S1, S2, S3, S4"),
        (("S1", "S2", "S3", "S3"), CIFAR, "order must be a permutation"),
        (("S1", "S2", "S3", "S5"), CIFAR, "order must be a permutation"),
        (ORDERS[CIFAR], None, "input_size must be given"),
    ],
)
def test_a_bad_order_is_refused(order, size, message):
    with pytest.raises(PlanError, match=f"pipeline: {message}"):
        pipeline(spec(), order, size)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="alpha must leave a whole number of the 64 channels"):
        reshape(spec(), alpha=0.3)
    with pytest.raises(ValueError, match="alpha must leave a whole number"):
        reshape(spec(), alpha=0)
    with pytest.raises(ValueError, match=r"rho must be 1 or 0\.5"):
        reshape(reshape(spec(), rho=0.5), rho=0.5)
    with pytest.raises(ValueError, match="name must be one of"):
        reshape({"name": "mine"}, alpha=0.5)
    with pytest.raises(ValueError, match="must be a ResNet, WideResNet or HybReNet"):
        one_block(spec("mobilenetv1"), ["S1"])
    with pytest.raises(ValueError, match=r"one_block: stages must be of S1, S2, S3, S4 \(got S9\)"):
        one_block(spec(), ["S9"])
    with pytest.raises(PlanError, match=r"on: site 'layer1.2.relu1' must be relu or linear in the plan \(got None\)"):
        on(spec("resnet34"), plan_of(spec()))


def test_the_pipeline_keeps_a_heads_own_relus():
    network = {"name": "vgg16-bn-fc", "num_classes": 10}
    variants = pipeline(network, ("S1", "S2", "S5", "S4", "S3"), CIFAR)
    assert len(variants) == 20
    assert all(stage_relus(variant.spec, variant.plan)["fc"] > 0 for variant in variants)
