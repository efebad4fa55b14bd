"""Published per-layer lists and counts of plans as weights."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from deepshare import models
from deepshare.budget import BudgetError, allocate, published, published_labels, weights_of
from deepshare.budget.published import _lists
from deepshare.plan import Plan, Site


def plan_of(name: str, size: int = 32, **settings) -> Plan:
    with torch.device("meta"):
        return Plan.of(models.create(name, num_classes=10, **settings), (3, size, size))


def of_stages(stages) -> Plan:
    sites = [Site(f"{s}.{i}", shape) for s, (shape, layers) in enumerate(stages) for i in range(layers)]
    return Plan(tuple(sites), (3, 32, 32))


def kept_by_label(label: str) -> int:
    """50,000 from "ResNet18_c100_relu50k"."""
    return round(1000 * float(label.rpartition("relu")[2].removesuffix("k")))


def test_the_package_has_lists_of_every_network_they_are_published_for():
    assert len(published_labels()) == len(set(published_labels())) == 19
    assert {label.split("_")[0] for label in published_labels()} == {"ResNet18", "ResNet34", "VGG16bn", "WRN22"}


@pytest.mark.parametrize("label", published_labels())
def test_a_list_times_its_layers_is_its_label(label):
    found = _lists()[label]
    assert abs(found.kept / kept_by_label(label) - 1) < Fraction("0.0133")
    assert all(0 < fraction <= 1 for fraction in found.fractions)
    plan = of_stages(found.stages)
    assert sum(published(label, plan).values()) == found.kept
    assert allocate(plan, label, 100_000) == allocate(plan, published(label, plan), 100_000)


def test_the_sums_our_notes_state():
    kept = {"ResNet18_c100_relu50k": 49_971, "ResNet18_c100_relu25k": 25_330, "ResNet18_c100_relu100k": 99_988}
    kept |= {"ResNet34_C100_relu80k": 79_978, "WRN22_8_C100_relu240k": 239_436}
    kept |= {"ResNet18_tiny_imagenet_relu150k": 150_000, "VGG16bn_C10_relu29k": 28_803}
    assert {label: round(_lists()[label].kept) for label in kept} == kept


@pytest.mark.shared
def test_the_packaged_lists_are_the_published_ones(shared_dir):
    lines = (shared_dir / "reference" / "layer_budgets.csv").read_text().splitlines()
    rows = dict(line.split(",") for line in lines[1:] if not line.startswith(("#", "label,")))
    assert set(rows) - set(published_labels()) == {"VGG16bn_C10_relu12.5k"}
    for label in published_labels():
        assert list(_lists()[label].fractions) == [Fraction(text) for text in rows[label].split()]


def test_the_list_left_out_fits_a_resnet_and_no_vgg():
    """Why published.csv has no VGG16bn_C10_relu12.5k."""
    text = "0.004 0.004 0.0056 0.0081 0.011 0.029 0.031 0.038 0.042 0.087 0.087 0.089 0.089"
    fractions = list(map(float, text.split()))

    def kept(found) -> float:
        sizes = [math.prod(shape) for shape, layers in found.stages for _ in range(layers)]
        return sum(f * size for f, size in zip(fractions, sizes, strict=False))

    assert round(kept(_lists()["ResNet18_C10_relu82k"])) == 12_498
    assert kept(_lists()["VGG16bn_C10_relu29k"]) < 6_000


@pytest.mark.parametrize("stem", [False, True])
def test_a_list_fits_resnets_with_and_without_the_stems_relu(stem):
    plan = plan_of("resnet18", stem_relu=stem)
    weights = published("ResNet18_c100_relu50k", plan)
    assert list(weights) == [site.name for site in plan]
    assert weights[plan.sites[-1].name] == Fraction("0.6") * 512 * 16
    assert weights[plan.sites[0].name] == Fraction("0.02" if stem else "0.025") * 64 * 1024
    assert sum(weights.values()) == Fraction("49971.2") - (0 if stem else Fraction("0.02") * 64 * 1024)


def test_a_label_is_weights():
    allocation = allocate(plan_of("resnet18"), "ResNet18_c100_relu50k", 6_000)
    assert [site.prototypes for site in allocation.plan if site.prototypes] == [1, 3, 30, 143]


@pytest.mark.parametrize(
    ("label", "name", "size"),
    [
        ("ResNet18_c100_relu50k", "resnet18", 32),
        ("ResNet18_tiny_imagenet_relu150k", "resnet18", 64),
        ("ResNet34_C100_relu80k", "resnet34", 32),
        ("WRN22_8_C100_relu240k", "wrn-22-8", 32),
    ],
)
def test_our_networks_have_the_layers_the_lists_are_for(label, name, size):
    whole = published(label, plan_of(name, size, stem_relu=True))
    assert sum(whole.values()) == _lists()[label].kept
    extra = list(whole.values())[_lists()[label].extra]
    assert sum(published(label, plan_of(name, size)).values()) == _lists()[label].kept - extra


def test_our_vgg16_ends_smaller_than_the_lists():
    """4 times fewer positions in the last stage than the labels presume (docs/models.md): the weights still fit."""
    plan = plan_of("vgg16-bn")
    weights = published("VGG16bn_C10_relu29k", plan)
    assert round(sum(weights.values())) == 21_307
    assert allocate(plan, weights, 12_900).reached == 12_900


def test_a_list_fits_any_width_and_image_size():
    plan = plan_of("resnet34", 64, width=8)
    weights = published("ResNet34_C100_relu80k", plan)
    assert weights[plan.sites[-1].name] == Fraction("0.49") * 64 * 64


def test_the_final_relu_of_a_wrn_is_the_one_that_may_be_missing():
    found = _lists()["WRN22_8_C100_relu240k"]
    whole = of_stages(found.stages)
    without = Plan(whole.sites[:-1], whole.input_size)
    weights = published(found.label, without)
    assert len(weights) == 18
    assert list(weights.items()) == list(published(found.label, whole).items())[:18]
    assert round(sum(weights.values())) == 220_758


@pytest.mark.parametrize(
    ("label", "plan", "message"),
    [
        (
            "ResNet18_c100_relu50k",
            plan_of("resnet34"),
            r"1\+4\+4\+4\+4 act.*without the first .the plan has 6\+8\+12\+6",
        ),
        ("WRN22_8_C100_relu240k", plan_of("resnet18"), r"1\+6\+6\+5\+1 act.*without the last .the plan has 4\+4\+4\+4"),
        ("VGG16bn_C10_relu29k", plan_of("resnet18"), r"2\+2\+3\+3\+3 activations of equal shape .the plan has"),
        ("ResNet18_c100_relu50k", Plan((), (3, 32, 32)), "the plan has 0"),
        ("resnet18", plan_of("resnet18"), "label must be one of ResNet18_c100_relu82k, .*got 'resnet18'"),
    ],
)
def test_a_list_for_another_network_is_refused(label, plan, message):
    with pytest.raises(BudgetError, match=message):
        published(label, plan)


def test_counts_of_a_plan_are_weights():
    """SNL's masks say how much a layer needs (DeepShare 3.2): a quarter, nothing and all of three equal layers."""
    sites = [Site(name, (8, 4, 4)) for name in "abc"]
    plan = Plan(tuple(sites), (3, 4, 4))
    quarter = torch.zeros(8, 4, 4, dtype=torch.bool)
    quarter[:2] = True
    snl = plan.replace("a", "mask", mask=quarter).replace("b", "mask", mask=torch.zeros(8, dtype=torch.bool))
    assert weights_of(snl) == {"a": 32, "b": 0, "c": 128}
    allocated = allocate(plan, weights_of(snl), 16 * 11, layer_sharing=False).plan
    assert [site.prototypes for site in allocated] == [2, 1, 8]
    assert allocate(snl, weights_of(snl), 16 * 11, layer_sharing=False).plan == allocated


def test_masks_of_another_model_are_refused():
    with pytest.raises(BudgetError, match="stands in one of them only"):
        allocate(plan_of("resnet18"), weights_of(plan_of("resnet34")), 6_000)


def resnet18(size: int) -> Plan:
    return plan_of("resnet18", size)


def wide_resnet(size: int) -> Plan:
    return plan_of("wrn-22-8", size)


def mobilenet_deeplab(size: int) -> Plan:
    """MobileNetV2 at output stride 8 under DeepLabV3 with 512 channels: the published 85,262K at 512x512."""
    half, stages = size // 2, []
    stages += [((32, half, half), 2)]  # the stem, and the depthwise layer of the first block
    channels, side = 16, half
    for out, blocks, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 1), (96, 3, 1), (160, 3, 1), (320, 1, 1)):
        for block in range(blocks):
            wide = 6 * channels
            after = side // stride if block == 0 else side
            stages += [((wide, side, side), 1), ((wide, after, after), 1)]
            channels, side = out, after
    return of_stages([*stages, ((512, side, side), 4), ((512, 1, 1), 1), ((512, side, side), 1)])


def test_published_relu_counts_take_a_relu6_once():
    """DeepShare Table 4's baseline: every element of MobileNetV2's ReLU6 layers, and of the head's ReLUs, once."""
    assert mobilenet_deeplab(512).drelus == 85_262_848


TABLES = [  # network, image side, ReLUs as printed, reached with layer sharing by default, by channels alone
    (resnet18, 32, 49_900, 49_888, 49_888),
    (resnet18, 32, 12_900, 12_896, 12_896),
    (resnet18, 32, 6_000, 6_000, 6_000),
    (resnet18, 32, 50_000, 50_000, 50_000),
    (resnet18, 64, 190_000, 189_952, 189_952),
    (resnet18, 64, 55_000, 54_976, 54_976),
    (resnet18, 64, 30_000, 29_952, 29_952),
    (wide_resnet, 32, 150_000, 149_952, 149_952),
    (wide_resnet, 32, 120_000, 120_000, 120_000),
    (wide_resnet, 32, 60_000, 59_968, 59_968),
    (mobilenet_deeplab, 512, 2_556_000, 2_556_000, 2_556_000),
]
LISTS = {resnet18: ["ResNet18_c100_relu50k", "ResNet18_tiny_imagenet_relu150k"], wide_resnet: ["WRN22_8_C100_relu240k"]}


@pytest.mark.parametrize(("network", "size", "budget", "layers", "channels"), TABLES)
def test_every_budget_of_deepshares_tables_is_reached(network, size, budget, layers, channels):
    """Tables 1 to 6 (the ablations are ResNet18's 6K): by any weights, to less than the cheapest prototype."""
    plan = network(size)
    for weights, sharing in itertools.product(["uniform", *LISTS.get(network, [])], [True, False]):
        allocation = allocate(plan, weights, budget, layer_sharing=sharing)
        assert allocation.reached == allocation.plan.drelus == (layers if sharing else channels)
        assert (allocation.group > 1) is sharing


@pytest.mark.parametrize(
    ("network", "size", "sharing", "floor"),
    [
        (resnet18, 32, True, 1_360),
        (resnet18, 32, False, 5_440),
        (resnet18, 64, True, 5_440),
        (resnet18, 64, False, 21_760),
        (wide_resnet, 32, True, 2_368),
        (wide_resnet, 32, False, 9_024),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_floor(network, size, sharing, floor):
    plan = network(size)
    assert allocate(plan, "uniform", floor, layer_sharing=sharing).reached == floor
    with pytest.raises(BudgetError, match=f"at least {floor:,} DReLUs.*got {floor - 1:,}"):
        allocate(plan, "uniform", floor - 1, layer_sharing=sharing)
