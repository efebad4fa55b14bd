"""The models: counts of the papers, shapes, names, initialisation."""

import pytest
import torch
from torch import nn

from deepshare import models
from deepshare.plan import Plan, PlanError, count_drelus

HUGE = {"num_classes": 10**12, "width": 10**12, "in_channels": 10**12}


@pytest.mark.parametrize(
    ("name", "size", "without_stem", "with_stem"),
    [
        ("resnet18", 32, 491_520, 557_056),
        ("resnet18", 64, 1_966_080, 2_228_224),
        ("resnet34", 32, 901_120, 966_656),
        ("resnet34", 64, 3_604_480, 3_866_624),
    ],
)
def test_published_counts(name, size, without_stem, with_stem):
    for stem_relu, expected in ((False, without_stem), (True, with_stem)):
        with torch.device("meta"):
            model = models.create(name, num_classes=2, stem_relu=stem_relu)
        assert count_drelus(model, (3, size, size)).total == expected


def test_resnet18_has_the_known_number_of_weights():
    """11,173,962 for 10 classes: the CIFAR ResNet18 of the literature."""
    model = models.create("resnet18", num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962


def test_site_names_are_readable():
    names = [
        site.name for site in Plan.of(models.create("resnet18", num_classes=2, width=4, stem_relu=True), (3, 8, 8))
    ]
    blocks = [f"layer{stage}.{block}.relu{i}" for stage in (1, 2, 3, 4) for block in (0, 1) for i in (1, 2)]
    assert names == ["stem_relu", *blocks]


def test_small_images_of_one_channel():
    model = models.create("resnet34", num_classes=7, width=4, in_channels=1)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 7)
    shapes = {site.shape for site in Plan.of(model, (1, 8, 8))}
    assert shapes == {(4, 8, 8), (8, 4, 4), (16, 2, 2), (32, 1, 1)}


def test_convolutions_start_with_kaiming_variance():
    conv = models.create("resnet18", num_classes=2).layer4[1].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert not any(
        m.bias is not None for m in models.create("resnet18", num_classes=2).modules() if type(m) is nn.Conv2d
    )


def test_every_convolution_gets_a_gradient():
    model = models.create("resnet18", num_classes=2, width=4)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.dim() == 4)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"name must be one of resnet6, .*, wrn-D-K, .*\(got 'resnet50'"):
        models.create("resnet50", num_classes=2)
    for argument, value in (("num_classes", 0), ("width", 1.5), ("in_channels", True), *HUGE.items()):
        with pytest.raises(ValueError, match=rf"{argument} must be an int in 1\.\."):
            models.create("resnet18", **{"num_classes": 2, argument: value})


def test_the_count_table_refuses_what_create_refuses_as_a_plan_error():
    for width, size in ((10**12, (3, 8, 8)), (4, (2**17, 8, 8))):
        with pytest.raises(PlanError, match=r"must be an int in 1\.\."):
            models.count_table("resnet18", size, width=width)
    with pytest.raises(PlanError, match="input_size must be at most"):
        models.count_table("resnet18", (3, 10**12, 10**12))


def test_the_count_table_names_its_convention():
    table = models.count_table("resnet18", (3, 32, 32), stem_relu=True)
    assert "557,056" in table
    assert "DeepReDuce" in table.splitlines()[0]
    assert "SNL" in models.count_table("resnet18", (3, 8, 8), width=2).splitlines()[0]


def test_the_count_table_shows_a_plan_that_fits():
    plan = Plan.of(models.create("resnet18", num_classes=2, width=4, in_channels=1), (1, 8, 8))
    plan = plan.replace("layer1.0.relu1", "shared", prototypes=3)
    assert "P=3" in models.count_table("resnet18", (1, 8, 8), plan=plan, width=4)
    with pytest.raises(PlanError, match=r"site 'layer1.0.relu1': the plan says shape \(4, 8, 8\), the model has \(8"):
        models.count_table("resnet18", (1, 8, 8), plan=plan, width=8)
