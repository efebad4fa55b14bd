"""Every name of the registry: it builds, counts, trains a step, takes a plan, survives a checkpoint."""

import re

import pytest
import torch

from deepshare import cli, fuse, models
from deepshare.budget import allocate
from deepshare.checkpoint import load_checkpoint, save_checkpoint
from deepshare.plan import Plan, PlanError, apply_plan, count_drelus
from deepshare.secure.lower import lower

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# ReLUs of (conv1, S1, S2, ..., fc) at 32x32 with stem_relu, from the definition of each network
COUNTS = {
    "resnet6": (65_536, 65_536, 32_768, 16_384, 8_192),
    "resnet9": (65_536, 65_536, 65_536, 32_768, 16_384),
    "resnet10": (65_536, 131_072, 65_536, 32_768, 16_384),
    "resnet18": (65_536, 262_144, 131_072, 65_536, 32_768),
    "resnet34": (65_536, 393_216, 262_144, 196_608, 49_152),
    "resnet20": (16_384, 98_304, 49_152, 24_576),
    "resnet32": (16_384, 163_840, 81_920, 40_960),
    "resnet56": (16_384, 294_912, 147_456, 73_728),
    "wrn-16-8": (409_600, 327_680, 196_608),
    "wrn-22-4": (344_064, 229_376, 131_072),
    "wrn-22-8": (671_744, 458_752, 262_144),
    "wrn-28-10": (1_163_264, 737_280, 409_600),
    "vgg16-bn": (131_072, 65_536, 49_152, 24_576, 6_144),
    "vgg16-bn-fc": (131_072, 65_536, 49_152, 24_576, 6_144, 8_192),
    "mobilenetv1": (32_768, 98_304, 28_672, 14_336, 23_552, 3_584),
    "mobilenetv2": (65_536, 196_608, 95_232, 52_224, 49_152, 39_680),
    "hrn-5x5x3x": (16_384, 65_536, 81_920, 102_400, 76_800),
    "hrn-5x7x2x": (16_384, 65_536, 81_920, 143_360, 71_680),
    "hrn-6x6x2x": (16_384, 65_536, 98_304, 147_456, 73_728),
    "hrn-7x5x2x": (16_384, 65_536, 114_688, 143_360, 71_680),
    "hrn-2x5x3x": (16_384, 65_536, 32_768, 40_960, 30_720),
    "hrn-2x7x2x": (16_384, 65_536, 32_768, 57_344, 28_672),
    "hrn-2x6x2x": (16_384, 65_536, 32_768, 49_152, 24_576),
    "hrn-2x5x2x": (16_384, 65_536, 32_768, 40_960, 20_480),
    "hrn-2x6x3x": (16_384, 65_536, 32_768, 49_152, 36_864),
    "hrn-2x9x2x": (16_384, 65_536, 32_768, 73_728, 36_864),
    "hrn34-4x6x3x": (16_384, 98_304, 131_072, 294_912, 110_592),
    "hrn34-4x9x2x": (16_384, 98_304, 131_072, 442_368, 110_592),
    "hrn34-2x6x3x": (16_384, 98_304, 65_536, 147_456, 55_296),
}


def by_stage(spec: dict, size: tuple[int, ...] = (3, 32, 32)) -> dict[str, int]:
    """ReLUs of every stage, in the order of the stages."""
    model = models.shapes_only(spec)
    plan = Plan.of(model, size)
    sums: dict[str, int] = {}
    for site, stage in zip(plan, models.stages(model, plan), strict=True):
        sums[stage] = sums.get(stage, 0) + site.drelus
    return sums


def small(name: str) -> int:
    """A width that keeps the network's shape and takes little time."""
    return 4 if name.startswith("mobilenet") else 1 if name.startswith(("wrn", "hrn34")) else 2


def test_every_name_has_its_count():
    assert set(COUNTS) == set(models.names())
    assert all(models.is_name(name) for name in models.names())


@pytest.mark.parametrize("name", models.names())
def test_a_network_of_the_registry(name: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    assert tuple(by_stage({"name": name, "stem_relu": True}).values()) == COUNTS[name]
    torch.manual_seed(0)
    width = small(name)
    model = models.create(name, num_classes=5, width=width, stem_relu=True)
    plan = allocate(Plan.of(model, (3, 32, 32)), "uniform", Plan.of(model, (3, 32, 32)).drelus // 3).plan
    assert models.stages(model) == models.stages(model, plan)
    shared = apply_plan(model, plan)
    step(shared)

    spec = {"name": name, "num_classes": 5, "width": width, "stem_relu": True, "in_channels": 3}
    spec["input_size"] = [3, 32, 32]
    path = save_checkpoint(tmp_path / "net.safetensors", shared, spec, plan)
    loaded = load_checkpoint(path)
    assert (loaded.spec, loaded.plan) == (spec, plan)
    assert torch.equal(loaded.model(IMAGES), shared.eval()(IMAGES))

    for arguments, total in (([name, "--stem-relu"], sum(COUNTS[name])), ([str(path)], plan.drelus)):
        assert cli.main(["count", *arguments]) == 0
        assert re.search(rf"^total\s+{total:,}$", capsys.readouterr().out, re.MULTILINE)


def step(model: torch.nn.Module) -> None:
    """One step of SGD; every weight but those of dead channels moves, and none to NaN."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model.train()(IMAGES), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", models.names())
def test_the_other_convention_leaves_out_one_site(name: str):
    counted, left = (Plan.of(models.shapes_only({"name": name, "stem_relu": s}), (3, 32, 32)) for s in (True, False))
    missing = {site.name: site.drelus for site in counted if site.name not in {s.name for s in left}}
    width = models.default_width(name)
    if name.startswith("vgg"):
        assert missing == {}
    elif name.startswith("wrn"):
        assert missing == {"layer3.relu": 64 * 64 * int(name.split("-")[2])}
    else:
        assert list(missing.values()) == [1024 * width]
        assert missing.keys() <= {"stem_relu", "stem.relu"}
    assert counted.drelus - left.drelus == sum(missing.values())


def test_published_counts_of_deepshare_and_snl():
    """DESIGN, section 4; DeepShare Tables 1, 2."""
    for name, size, count in (("resnet18", 32, 491_520), ("wrn-22-8", 32, 1_359_872), ("wrn-22-8", 64, 5_439_488)):
        assert count_drelus(models.shapes_only({"name": name}), (3, size, size)).total == count
    model = models.shapes_only({"name": "wrn-22-8", "stem_relu": True})
    assert count_drelus(model, (3, 64, 64)).total == 5_570_560


def test_layer_groups_of_wrn_22_8():
    shapes = [site.shape for site in Plan.of(models.shapes_only({"name": "wrn-22-8"}), (3, 32, 32))]
    assert shapes == [(16, 32, 32)] + 6 * [(128, 32, 32)] + 6 * [(256, 16, 16)] + 5 * [(512, 8, 8)]


@pytest.mark.parametrize(
    ("name", "rho", "printed"),
    [
        *(("resnet18", 1, 557), ("resnet18", 0.5, 139), ("resnet10", 1, 311), ("resnet10", 0.5, 78)),
        *(("resnet6", 1, 188), ("resnet6", 0.5, 47)),
    ],
)
def test_table_9_of_deepreduce(name: str, rho: float, printed: int):
    spec = {"name": name, "stem_relu": True}
    assert round(sum(by_stage({**spec, "rho": rho}).values()) / 1000) == printed
    if rho == 0.5:  # printed beside a quarter of the channels, at equal ReLUs
        assert by_stage({**spec, "width": 16}) == by_stage({**spec, "rho": rho})


def test_table_7_of_deepreduce():
    """155.6K for ResNet10 at alpha = 0.5, 30.7K for ResNet9 at alpha = rho = 0.5 (its 47.1K belong to ResNet6)."""
    assert sum(by_stage({"name": "resnet10", "stem_relu": True, "width": 32}).values()) == 155_648
    assert sum(by_stage({"name": "resnet9", "stem_relu": True, "width": 32, "rho": 0.5}).values()) == 30_720


def test_tables_10_to_12_of_deepreduce():
    resnet56 = by_stage({"name": "resnet56", "stem_relu": True})
    assert (resnet56["conv1"] + resnet56["S1"], resnet56["S2"], resnet56["S3"]) == (311_296, 147_456, 73_728)
    first = by_stage({"name": "mobilenetv1", "stem_relu": True})
    printed = [first["conv1"] + first["S1"], *(first[stage] for stage in ("S2", "S3", "S4", "S5"))]
    assert [round(count / 1000, 1) for count in printed] == [
        131.1,
        28.7,
        14.3,
        23.6,
        3.6,
    ]  # the table cuts 23.55, 131.07
    second = by_stage({"name": "mobilenetv2", "stem_relu": True})
    assert second["S1"] == 196_608
    # the table's S2 to S4, 110.6K, 58.4K and 27.6K, are the same layers cut elsewhere (docs/models.md)
    sites = Plan.of(models.shapes_only({"name": "mobilenetv2", "stem_relu": True}), (3, 32, 32))
    counts = [site.drelus for site in sites if site.name.startswith(("layer2", "layer3", "layer4"))]
    assert (sum(counts[:8]), sum(counts[8:17]), sum(counts[17:])) == (110_592, 58_368, 27_648)


def test_table_3_of_deepreshape():
    totals = {"resnet32": 303, "resnet18": 557, "wrn-22-8": 1393, "vgg16-bn-fc": 285}
    assert {name: round(sum(COUNTS[name]) / 1000) for name in totals} == totals


SHARES = {  # DeepReShape Table 4: ReLUs in K, share of each stage in %, conv1 with the first
    (32, (2, 2, 2)): (279, (58.82, 23.53, 11.76, 5.88)),
    (16, (4, 4, 4)): (279, (29.41, 23.53, 23.53, 23.53)),
    (16, (3, 7, 2)): (260, (31.50, 18.90, 33.07, 16.54)),
}


@pytest.mark.parametrize(("width", "multipliers"), SHARES)
def test_table_4_of_deepreshape(width: int, multipliers: tuple[int, ...]):
    total, shares = SHARES[width, multipliers]
    conv1, first, *rest = by_stage(
        {"name": "resnet18", "stem_relu": True, "width": width, "multipliers": multipliers}
    ).values()
    sums = [conv1 + first, *rest]
    assert round(sum(sums) / 1000) == total
    assert tuple(round(100 * count / sum(sums), 2) for count in sums) == shares


@pytest.mark.parametrize(("name", "share"), [("resnet18", 58.8), ("wrn-22-8", 48.2), ("wrn-16-8", 43.9)])
def test_shares_of_the_first_stage(name: str, share: float):
    """DeepReShape, section 3.2 (its 47.7 % for WRN-22-4 is 48.8 %)."""
    sums = by_stage({"name": name, "stem_relu": True})
    assert round(100 * (sums.get("conv1", 0) + sums["S1"]) / sum(sums.values()), 1) == share


@pytest.mark.parametrize(
    ("width", "multipliers", "printed"),
    [
        (16, (2, 2, 2), (81.92, 32.77, 16.38, 8.19)),
        (128, (2, 2, 2), (655.36, 262.14, 131.07, 65.54)),
        (256, (2, 2, 2), (1310.72, 524.29, 262.14, 131.07)),
        (16, (3, 3, 3), (81.92, 49.15, 36.86, 27.65)),
        (16, (6, 6, 6), (81.92, 98.30, 147.46, 221.18)),
        (16, (7, 7, 7), (81.92, 114.69, 200.70, 351.23)),
        (16, (7, 7, 2), (81.92, 114.69, 200.70, 100.35)),
        (16, (3, 5, 2), (81.92, 49.15, 61.44, 30.72)),
    ],
)
def test_tables_10_11_of_deepreshape(width: int, multipliers: tuple[int, ...], printed: tuple[float, ...]):
    """BaseCh (m varies), StageCh and HRN: ReLUs per stage in K, conv1 with the first."""
    spec = {"name": "resnet18", "stem_relu": True, "width": width, "multipliers": multipliers}
    conv1, first, *rest = by_stage(spec).values()
    assert tuple(round(count / 1000, 2) for count in (conv1 + first, *rest)) == printed


@pytest.mark.parametrize(
    "name", ["resnet6", "resnet20", "wrn-10-1", "vgg16-bn", "vgg16-bn-fc", "mobilenetv1", "mobilenetv2"]
)
def test_every_family_is_fused_and_lowered(name: str):
    torch.manual_seed(0)
    model = models.create(name, num_classes=3, width=4, stem_relu=True)
    plan = Plan.of(model, (3, 32, 32))
    shared = apply_plan(model, allocate(plan, "uniform", plan.drelus // 3).plan).eval()
    assert torch.equal(fuse(shared, (3, 32, 32))(IMAGES), shared(IMAGES))
    program, _ = lower(shared, (3, 32, 32))
    assert program.steps


TOTALS = {  # Tables 16 and 17
    **{"wrn-22-8": 1393, "resnet18": 557, "hrn-5x5x3x": 343, "hrn-5x7x2x": 379, "hrn-6x6x2x": 401, "hrn-7x5x2x": 412},
    **{"hrn-2x5x3x": 186, "hrn-2x7x2x": 201, "hrn-2x6x2x": 188, "hrn-2x5x2x": 176},
}


def test_tables_16_17_of_deepreshape():
    assert {name: round(sum(COUNTS[name]) / 1000) for name in TOTALS} == TOTALS


def test_shapes_by_setting_are_shapes_by_name():
    by_name = models.shapes_only({"name": "hrn34-4x6x3x"}).state_dict()
    spec = {"name": "resnet18", "width": 16, "multipliers": [4, 6, 3], "blocks": (3, 4, 6, 3)}
    by_setting = models.shapes_only(spec).state_dict()
    assert {key: value.shape for key, value in by_name.items()} == {k: v.shape for k, v in by_setting.items()}


def test_shaped_networks_survive_a_checkpoint(tmp_path):
    spec = {"name": "resnet18", "num_classes": 3, "stem_relu": True, "in_channels": 3, "input_size": [3, 16, 16]}
    shape = {"width": 2, "multipliers": (3, 1, 2), "blocks": (1, 2, 1, 1), "rho": 0.5}
    model = models.create(**{k: v for k, v in spec.items() if k != "input_size"}, **shape)
    plan = Plan.of(model, (3, 16, 16))
    assert [site.shape for site in plan][:3] == [(2, 8, 8)] * 3
    loaded = load_checkpoint(save_checkpoint(tmp_path / "x", model, {**spec, **shape}, plan))
    assert loaded.spec == {**spec, **shape, "multipliers": [3, 1, 2], "blocks": [1, 2, 1, 1]}
    assert torch.equal(loaded.model(IMAGES[..., :16, :16]), model.eval()(IMAGES[..., :16, :16]))
    again = save_checkpoint(tmp_path / "y", loaded.model, loaded.spec, plan)
    assert load_checkpoint(again).spec == loaded.spec


def test_stages_may_have_any_channels(tmp_path):
    spec = {"name": "resnet18", "num_classes": 3, "stem_relu": False, "in_channels": 3, "input_size": [3, 16, 16]}
    shape = {"channels": (1, 3, 30, 5), "blocks": (1, 2, 1, 1)}
    plan = Plan.of(models.shapes_only({**spec, **shape}), (3, 16, 16))
    assert [site.channels for site in plan] == [1] * 2 + [3] * 4 + [30] * 2 + [5] * 2
    model = models.create(**{k: v for k, v in spec.items() if k != "input_size"}, **shape)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "x", model, {**spec, **shape}, plan))
    assert loaded.spec == {**spec, "width": 1, "channels": [1, 3, 30, 5], "blocks": [1, 2, 1, 1]}
    assert torch.equal(loaded.model(IMAGES[..., :16, :16]), model.eval()(IMAGES[..., :16, :16]))
    assert models.width_of({**spec, **shape}) == 1
    with pytest.raises(ValueError, match=r"models.shape_of: .*got channels \(1, 3, 30, 5\)"):
        models.shape_of({**spec, **shape})


def test_a_checkpoint_fills_in_the_published_width(tmp_path):
    model = models.create("resnet20", num_classes=2, in_channels=1)
    spec = {"name": "resnet20", "num_classes": 2, "stem_relu": False, "in_channels": 1, "input_size": [1, 8, 8]}
    path = save_checkpoint(tmp_path / "x", model, {**spec, "width": None, "rho": None}, Plan.of(model, (1, 8, 8)))
    assert load_checkpoint(path).spec == {**spec, "width": 16}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet18", {"multipliers": (2, 2)}, r"multipliers must be 3 ints \(got \(2, 2\)\)"),
        ("resnet18", {"multipliers": (2, 0, 2)}, r"multipliers must be an int in 1\.\.64 \(got 0\)"),
        ("resnet18", {"multipliers": 2}, "multipliers must be 3 ints"),
        ("resnet18", {"multipliers": (64, 64, 64)}, "give more than 262144 channels"),
        ("resnet18", {"channels": (2, 2, 3)}, r"channels must be 4 ints \(got \(2, 2, 3\)\)"),
        ("resnet18", {"channels": (2, 2, 3, 0)}, r"channels must be an int in 1\.\.262144 \(got 0\)"),
        (
            "resnet18",
            {"channels": (2, 2, 3, 4), "width": 3},
            r"width must be the first of channels .2, 2, 3, 4. .got 3",
        ),
        ("resnet18", {"channels": (2, 2, 3, 4), "multipliers": (2, 2, 2)}, "multipliers must not be given beside"),
        ("hrn-5x5x3x", {"channels": (2, 2, 3, 4)}, "channels must not be given for hrn-5x5x3x"),
        ("wrn-22-8", {"channels": (2, 2, 3)}, "channels must not be given for wrn-22-8"),
        ("resnet56", {"blocks": (9, 9, True)}, r"blocks must be an int in 1\.\.256 \(got True\)"),
        ("resnet18", {"rho": 0.25}, r"rho must be 1 or 0.5 \(got 0.25\)"),
        ("resnet18", {"rho": True}, "rho must be 1 or 0.5"),
        ("mobilenetv2", {"blocks": (1,)}, "blocks must not be given for mobilenetv2"),
        ("vgg16-bn", {"multipliers": (2, 2, 2, 1)}, "multipliers must not be given for vgg16-bn"),
        ("hrn-5x5x3x", {"multipliers": (5, 5, 2)}, r"multipliers must be \(5, 5, 3\) for hrn-5x5x3x"),
        *(
            (name, {}, "name must be one of")
            for name in ("wrn-21-8", "wrn-4-1", "hrn-5x5x3", "hrn-0x1x1x", "HRN-5x5x3x")
        ),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict, message: str):
    with pytest.raises(ValueError, match=f"models.create: .*{message}"):
        models.create(name, num_classes=2, **settings)


def test_stages_survive_a_plan():
    model = models.create("resnet20", num_classes=2, width=4, stem_relu=True)
    plan = allocate(Plan.of(model, (3, 16, 16)), "uniform", 600).plan
    assert any(site.leader for site in plan)
    expected = ("conv1", *("S1",) * 6, *("S2",) * 6, *("S3",) * 6)
    assert models.stages(apply_plan(model, plan), plan) == models.stages({"name": "resnet20"}, plan) == expected


def test_stages_by_name():
    spec = {"name": "resnet18"}
    names = ("stem_relu", "layer1.0.relu1", "layer4.1.relu2", "layer2.0.relu1@2", "fc")
    assert models.stages(spec, names) == ("conv1", "S1", "S4", "S2", "fc")
    model = apply_plan(
        models.create("resnet18", num_classes=2, width=2), Plan.of(models.shapes_only(spec | {"width": 2}), (3, 8, 8))
    )
    assert models.stage_of(model, "layer3.0.relu1") == "S3"
    for network, name in (
        (spec, "layer5.0.relu1"),
        (spec, "body.relu"),
        ({"name": "x"}, "fc"),
        (torch.nn.Linear(1, 1), "fc"),
    ):
        with pytest.raises(PlanError, match=f"'{name}' must be a site of a model of models.create"):
            models.stage_of(network, name)


def test_the_command_takes_shapes(capsys: pytest.CaptureFixture[str]):
    flags = ["--width", "16", "--multipliers", "4,4,4", "--stem-relu", "--blocks", "2,2,2,2"]
    assert cli.main(["count", "resnet18", *flags]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^total\s+278,528$", printed, re.MULTILINE)
    assert printed.startswith("resnet18, width 16, multipliers 4-4-4, blocks 2-2-2-2: stem ReLU counted")
    assert cli.main(["count", "resnet18", "--rho", "0.5"]) == 0
    assert "rho 0.5" in capsys.readouterr().out
    assert cli.main(["count", "resnet18", "--channels", "1,3,30,143"]) == 0
    assert "channels 1-3-30-143" in capsys.readouterr().out
    assert cli.main(["count", "--list"]) == 0
    assert capsys.readouterr().out.split() == [*models.names(), "wrn-D-K", "hrn-AxBxCx", "hrn34-AxBxCx"]
    for flags, message in ((["resnet18", "--blocks", "2;2"], "--blocks must be ints"), ([], "MODEL is missing")):
        assert cli.main(["count", *flags]) == 2
        assert message in capsys.readouterr().err
