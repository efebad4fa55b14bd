"""SNL without training: counts, the lasso, exact binarisation, plans, files of masks, weights for DeepShare."""

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from deepshare import models
from deepshare.budget import allocate
from deepshare.methods import snl
from deepshare.methods.mask_file import load_masks, save_masks
from deepshare.methods.snl import SNLError, SNLSettings
from deepshare.plan import Mask, Plan, Site, apply_plan, count_drelus

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def resnet18() -> Plan:
    with torch.device("meta"):
        return Plan.of(models.create("resnet18", num_classes=100), SIZE)


def random_masks(plan: Plan, granularity: str, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {site.name: snl.mask_shape(site, granularity) for site in snl.mask_sites(plan)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize("budget", random.Random(0).sample(range(1, 491_520), 5))
def test_five_random_budgets_are_hit_exactly_by_the_largest_masks(resnet18, budget):
    masks = random_masks(resnet18, "pixel", budget)
    kept = snl.binarise(resnet18, masks, budget)
    plan = snl.plan_of(resnet18, kept)
    assert plan.drelus == count_drelus(plan).total == budget
    smallest = min(masks[name][kept[name]].min() for name in kept if kept[name].any())
    largest = max(masks[name][~kept[name]].max() for name in kept if not kept[name].all())
    assert smallest >= largest


@pytest.mark.parametrize("budget", [16, 17, 1000, 12_900, 49_900, 200_001, 491_519])
def test_channels_reach_the_largest_total_within_the_budget(resnet18, budget):
    masks = random_masks(resnet18, "channel", budget)
    plan = snl.plan_of(resnet18, snl.binarise(resnet18, masks, budget))
    assert plan.drelus == budget // 16 * 16  # 4x4 channels are the cheapest, and there are enough of them


def toy(*shapes: tuple[int, int, int]) -> Plan:
    return Plan(tuple(Site(f"act{index}", shape) for index, shape in enumerate(shapes)), (1, 8, 8))


def every_choice(plan: Plan, budget: int) -> int:
    """The largest total within the budget, by trying every number of channels at every site."""
    counts = [range(site.channels + 1) for site in plan]
    totals = (sum(n * s.positions for n, s in zip(c, plan, strict=True)) for c in itertools.product(*counts))
    return max(total for total in totals if total <= budget)


@pytest.mark.parametrize("seed", range(8))
def test_channels_of_odd_sizes_reach_what_trying_all_choices_reaches(seed):
    plan = toy((3, 5, 5), (4, 3, 3), (2, 2, 2), (3, 5, 5))
    masks = random_masks(plan, "channel", seed)
    for budget in (4, 5, 8, 13, 24, 25, 31, 57, 100, 134, 193):
        kept = snl.binarise(plan, masks, budget)
        assert snl.plan_of(plan, kept).drelus == every_choice(plan, budget)
        for cost in (4, 9, 25):  # among channels of one cost the largest stay
            here = [(masks[s.name], kept[s.name]) for s in plan if s.positions == cost]
            inside = [float(v) for values, keep in here for v in values[keep]]
            outside = [float(v) for values, keep in here for v in values[~keep]]
            assert not inside or not outside or min(inside) > max(outside)


def test_channels_are_taken_by_value_where_the_budget_allows():
    plan = toy((2, 4, 4), (2, 2, 2))
    masks = {"act0": torch.tensor([0.9, 0.1]), "act1": torch.tensor([0.5, 0.8])}
    kept = snl.binarise(plan, masks, 20)
    assert kept["act0"].tolist() == [True, False]
    assert kept["act1"].tolist() == [False, True]


def test_ties_go_to_the_earlier_site_and_the_earlier_element():
    plan = toy((1, 2, 2), (1, 2, 2))
    kept = snl.binarise(plan, {"act0": torch.zeros(1, 2, 2), "act1": torch.zeros(1, 2, 2)}, 5)
    assert kept["act0"].flatten().tolist() == [True] * 4
    assert kept["act1"].flatten().tolist() == [True, False, False, False]


def test_counts_and_threshold_are_above_epsilon_and_negative_masks_are_none():
    plan = toy((2, 2, 2), (2, 1, 1))
    masks = {"act0": torch.tensor([0.011, 0.01]), "act1": torch.tensor([[[-3.0]], [[0.5]]])}
    assert snl.count_kept(plan, masks, 0.01) == {"act0": 4, "act1": 1}
    kept = snl.threshold(plan, masks, 0.01)
    assert [mask.flatten().tolist() for mask in kept.values()] == [[True, False], [False, True]]
    assert snl.plan_of(plan, kept).drelus == 5


def test_lasso_norm_is_the_sum_of_absolute_values_and_its_gradient_the_sign():
    masks = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)]
    norm = snl.lasso_norm(masks)
    norm.backward()
    assert norm.item() == 3.5
    assert masks[0].grad.tolist() == [1, -1]


def test_lambda_grows_unless_the_count_falls_below_every_earlier_one():
    settings = SNLSettings()
    assert settings.next_lasso(1e-5, 99, 100) == 1e-5
    assert settings.next_lasso(1e-5, 100, 100) == pytest.approx(1.1e-5)
    assert settings.next_lasso(1e-5, 101, 100) == pytest.approx(1.1e-5)


def test_linear_sites_stay_linear_and_get_no_mask():
    plan = toy((1, 2, 2), (1, 2, 2), (1, 2, 2)).replace("act1", "linear")
    made = snl.plan_of(plan, snl.binarise(plan, random_masks(plan, "pixel"), 3))
    assert [site.kind for site in made] == ["mask", "linear", "mask"]
    assert made.drelus == 3


@pytest.mark.parametrize("zero_out", [False, True])
@pytest.mark.parametrize("granularity", ["pixel", "channel"])
def test_a_plan_of_masks_is_applied_saved_and_counted(granularity, zero_out, tmp_path):
    model = models.create("resnet18", num_classes=10, width=4, in_channels=1).eval()
    plan = Plan.of(model, (1, 8, 8))
    made = snl.plan_of(plan, snl.binarise(plan, random_masks(plan, granularity), 300), zero_out=zero_out)
    masked = apply_plan(model, made)
    assert Plan.of(masked, (1, 8, 8)) == made
    assert Plan.load(made.save(tmp_path / "plan.json")) == made
    everything = {site.name: torch.ones(snl.mask_shape(site, granularity), dtype=torch.bool) for site in plan}
    x = torch.randn(2, 1, 8, 8)
    whole = apply_plan(model, snl.plan_of(plan, everything, zero_out=zero_out))
    torch.testing.assert_close(whole(x), model(x))
    assert not torch.allclose(masked(x), model(x))


def test_a_zeroed_network_is_the_relu_network_times_its_masks():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU())
    plan = Plan.of(model, (1, 8, 8))
    kept = snl.binarise(plan, random_masks(plan, "pixel"), 40)
    zeroed = apply_plan(model, snl.plan_of(plan, kept, zero_out=True))
    x = torch.randn(2, 1, 8, 8)
    expected = torch.relu(model[2](torch.relu(model[0](x)) * kept["1"])) * kept["3"]
    torch.testing.assert_close(zeroed(x), expected)
    assert "else 0" in Plan.of(zeroed, (1, 8, 8)).table()


def test_files_of_masks_hold_a_bit_an_element_and_come_back(resnet18, tmp_path):
    made = snl.plan_of(resnet18, snl.binarise(resnet18, random_masks(resnet18, "pixel"), 49_900))
    file = save_masks(tmp_path / "masks.safetensors", made)
    assert file.stat().st_size < 491_520 / 8 + 4096
    again = load_masks(file)
    assert again == {site.name: site.mask for site in made}
    assert snl.plan_of(resnet18, again) == made


def test_damaged_files_of_masks_are_refused(resnet18, tmp_path):
    import safetensors.torch

    with pytest.raises(SNLError, match=r"nowhere.*not a readable"):
        load_masks(tmp_path / "nowhere")
    (tmp_path / "cut").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(SNLError, match="cut: not a readable"):
        load_masks(tmp_path / "cut")
    bits = {"act": torch.tensor([7], dtype=torch.uint8)}
    for header, words in (
        ({}, "does not say so"),
        ({"format": "deepshare masks"}, "damaged.*shapes"),
        ({"format": "deepshare masks", "shapes": '{"act": [5]}'}, "bits after the last of 5"),
        ({"format": "deepshare masks", "shapes": '{"tac": [8]}'}, "shapes for tac, bits for act"),
        ({"format": "deepshare masks", "shapes": "[8]"}, "damaged"),
        ({"format": "deepshare masks", "shapes": '{"act": ["8"]}'}, "damaged.*positive ints"),
    ):
        (tmp_path / "bad").write_bytes(safetensors.torch.save(bits, header))
        with pytest.raises(SNLError, match=words):
            load_masks(tmp_path / "bad")
    with pytest.raises(SNLError, match="no mask site"):
        save_masks(tmp_path / "none", resnet18)
    assert not (tmp_path / "none").exists()


def test_masks_of_another_model_are_refused(resnet18):
    masks = random_masks(resnet18, "pixel")
    first, last = "layer1.0.relu1", "layer4.1.relu2"
    other = {**masks, first: torch.ones(64, 16, 16)}
    with pytest.raises(SNLError, match=r"'layer1.0.relu1' must be \(64, 32, 32\) or \(64,\) \(got \(64, 16, 16\)\)"):
        snl.binarise(resnet18, other, 100)
    missing = {name: mask for name, mask in masks.items() if name != last}
    with pytest.raises(SNLError, match=f"'{last}' stands only among the plan's ReLUs"):
        snl.count_kept(resnet18, missing, 0.01)
    with pytest.raises(SNLError, match="'stem' stands only among the masks"):
        snl.plan_of(resnet18, {**{name: mask > 0 for name, mask in masks.items()}, "stem": Mask((8,), b"\0")})
    with pytest.raises(SNLError, match="finite"):
        snl.binarise(resnet18, {**masks, last: masks[last] * torch.nan}, 100)


@pytest.mark.parametrize("budget", [0, -1, 491_521, 10.0, True])
def test_budgets_out_of_range_are_refused(resnet18, budget):
    with pytest.raises(SNLError, match=r"budget must be an int in 1..491,520"):
        snl.binarise(resnet18, random_masks(resnet18, "pixel"), budget)


def test_budgets_to_train_towards_are_checked_with_their_floor(resnet18):
    snl.check_budget(resnet18, 1, "pixel")
    snl.check_budget(resnet18, 16, "channel")
    for budget, granularity, words in (
        (15, "channel", "at least 16, one channel"),
        (491_520, "pixel", "below the 491,520"),
    ):
        with pytest.raises(SNLError, match=words):
            snl.check_budget(resnet18, budget, granularity)
    with pytest.raises(SNLError, match=r"must be relu or linear at site 'layer1.0.relu1' \(got 'gelu'\)"):
        snl.check_budget(resnet18.replace_all("gelu"), 10, "pixel")
    with pytest.raises(SNLError, match="has no ReLU"):
        snl.mask_sites(resnet18.replace_all("linear"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"granularity": "layer"}, "granularity must be"),
        ({"lasso": -1e-5}, "lasso must be finite and at least 0"),
        ({"kappa": 0.9}, "kappa must be finite and at least 1"),
        ({"epsilon": 1.0}, "epsilon must be below 1"),
        ({"epsilon": float("nan")}, "epsilon must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(setting, words):
    with pytest.raises(SNLError, match=words):
        SNLSettings(**setting)


def test_counts_of_snl_are_weights_for_deepshare_with_layer_groups(resnet18):
    made = snl.plan_of(resnet18, snl.binarise(resnet18, random_masks(resnet18, "pixel"), 49_900))
    counts = count_drelus(made).per_site
    allocation = allocate(resnet18, counts, 12_900)
    assert allocation.reached == 12_896
    assert allocation.group == 4
    leaders = [site for site in allocation.plan if site.prototypes is not None]
    for number, leader in enumerate(leaders):
        share = sum(counts[site.name] for site in resnet18.sites[4 * number : 4 * number + 4]) / 49_900
        assert abs(leader.drelus - share * 12_900) < 1024  # one prototype of the first group, the dearest
