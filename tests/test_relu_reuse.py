"""ReLU-reuse (DeepReShape, section 4.2): what the layer computes, its gradients, and the counts of Table 9."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepshare import models
from deepshare.methods.relu_reuse import convolutions, relu_reuse
from deepshare.models.reuse import ReuseConv2d, group_sizes, with_reuse
from deepshare.plan import Plan, PlanError, apply_plan

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return models.create("resnet18", num_classes=100, width=32, stem_relu=True)


def seconds(plan: Plan) -> list[str]:
    """The last ReLU of every block: what is left of a thinned ResNet."""
    return [site.name for site in plan if site.name.endswith("relu2")]


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def conv_bn(x: Tensor, pair: nn.Module) -> Tensor:
    assert isinstance(pair, nn.Sequential)
    conv, norm = pair
    return normalised(F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding), norm)


def shaken(module: nn.Module) -> nn.Module:
    """Batch norms that do something, so that leaving one out shows."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for values in (norm.running_mean, norm.bias):
                    assert values is not None
                    values.normal_()
                assert norm.running_var is not None
                norm.running_var.uniform_(0.5, 2)
    return module.eval()


def test_three_groups_compute_the_equations():
    """y1 = x1; y2 = bn conv x2; y3 = relu bn conv(x3 + bn conv1x1 y2); y = conv1x1 of all three."""
    torch.manual_seed(0)
    layer = shaken(ReuseConv2d(32, 32, (3, 3), factor=8)).double()
    assert isinstance(layer, ReuseConv2d)
    x = torch.randn(2, 32, 6, 5, dtype=torch.double)
    x1, x2, x3 = x[:, :8], x[:, 8:28], x[:, 28:]
    y2 = conv_bn(x2, layer.groups[1])
    y3 = conv_bn(x3 + conv_bn(y2, layer.carries[2]), layer.groups[2]).relu()
    expected = F.conv2d(torch.cat([x1, y2, y3], 1), layer.mix.weight)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shortcuts", [True, False])
def test_naive_groups_compute_the_equations(shortcuts: bool):
    """y_i = bn conv(x_i + y_{i-1}), a ReLU on the last alone."""
    torch.manual_seed(1)
    layer = shaken(ReuseConv2d(12, 12, (3, 3), factor=3, form="naive", shortcuts=shortcuts)).double()
    assert isinstance(layer, ReuseConv2d)
    x = torch.randn(2, 12, 4, 7, dtype=torch.double)
    y1 = conv_bn(x[:, :4], layer.groups[0])
    y2 = conv_bn(x[:, 4:8] + (y1 if shortcuts else 0), layer.groups[1])
    y3 = conv_bn(x[:, 8:] + (y2 if shortcuts else 0), layer.groups[2]).relu()
    torch.testing.assert_close(layer(x), F.conv2d(torch.cat([y1, y2, y3], 1), layer.mix.weight))


def test_three_groups_without_shortcuts_and_with_a_stride():
    torch.manual_seed(2)
    plain = shaken(ReuseConv2d(16, 16, (3, 3), factor=4, shortcuts=False)).double()
    strided = shaken(ReuseConv2d(16, 32, (3, 3), factor=4, stride=(2, 2), bias=True)).double()
    assert isinstance(plain, ReuseConv2d)
    assert isinstance(strided, ReuseConv2d)
    for layer, sizes in ((plain, (4, 8, 4)), (strided, (4, 8, 4))):
        x = torch.randn(2, 16, 7, 7, dtype=torch.double)
        parts = x.split(sizes, 1)
        first = parts[0] if layer is plain else conv_bn(parts[0], layer.groups[0])
        last = conv_bn(parts[2], layer.groups[2]).relu()
        whole = torch.cat([first, conv_bn(parts[1], layer.groups[1]), last], 1)
        torch.testing.assert_close(layer(x), F.conv2d(whole, layer.mix.weight, layer.mix.bias))
    assert strided(x).shape == (2, 32, 4, 4)


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "factor", "form", "shortcuts"),
    [
        (8, 8, 1, 4, "three", True),
        (8, 8, 1, 2, "three", False),
        (4, 8, 2, 2, "three", True),
        (8, 8, 1, 4, "naive", True),
        (8, 8, 1, 2, "naive", False),
        (4, 8, 2, 2, "naive", True),
    ],
)
def test_gradients(inputs: int, outputs: int, stride: int, factor: int, form, shortcuts: bool):
    """Against finite differences, for x and every weight; batch norms by their running statistics."""
    torch.manual_seed(3)
    made = ReuseConv2d(
        inputs, outputs, (3, 3), factor=factor, form=form, shortcuts=shortcuts, stride=(stride, stride), bias=True
    )
    layer = shaken(made).double()
    x = torch.randn(2, inputs, 4, 3, dtype=torch.double, requires_grad=True)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights))
    layer(x).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


@pytest.mark.parametrize("form", ["three", "naive"])
@pytest.mark.parametrize(("factor", "printed"), [(2, 434.18), (4, 372.74), (8, 342.02), (16, 326.66)])
def test_table_9_relus(form, factor: int, printed: float):
    """Alternate layers of ResNet18 reuse ReLUs; by the count the other layers and the stem keep all of theirs."""
    with torch.device("meta"):
        model = models.create("resnet18", num_classes=100, stem_relu=True)
    plan = Plan.of(model, SIZE)
    reused = relu_reuse(model, plan, factor, form=form, sites=seconds(plan))
    assert round(reused.plan.drelus / 1000, 2) == printed
    assert Plan.of(apply_plan(reused.model, reused.plan), SIZE) == reused.plan
    assert plan.drelus == 557_056


def test_only_the_wanted_layers_change(resnet18: nn.Module):
    plan = Plan.of(resnet18, SIZE).replace("layer4.1.relu1", "linear")
    reused = relu_reuse(resnet18, plan, 4, sites=["layer2.0.relu2", "layer3.1.relu1"])
    inner = [site for site in reused.plan if site.name not in {old.name for old in plan}]
    assert [(site.name, site.shape, site.kind) for site in inner] == [
        ("layer2.0.conv2.relu", (16, 16, 16), "relu"),
        ("layer3.1.conv1.relu", (32, 8, 8), "relu"),
    ]
    kinds = {site.name: site.kind for site in reused.plan}
    assert {name for name, kind in kinds.items() if kind == "linear"} == {
        *("layer2.0.relu2", "layer3.1.relu1", "layer4.1.relu1"),
    }
    before, after = resnet18.state_dict(), reused.model.state_dict()
    kept = [name for name in before if name in after]
    assert len(before) - len(kept) == 2, "more than two convolutions were replaced"
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert isinstance(resnet18.get_submodule("layer2.0.conv2"), nn.Conv2d), "the given model was changed"


def test_a_network_with_reuse_trains_and_is_rebuilt(resnet18: nn.Module):
    torch.manual_seed(4)
    plan = Plan.of(resnet18, SIZE)
    reused = relu_reuse(resnet18, plan, 8, sites=seconds(plan))
    network = apply_plan(reused.model, reused.plan).train()
    optimiser = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    images, labels = torch.randn(16, *SIZE), torch.randint(0, 10, (16,))
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    again = apply_plan(with_reuse(resnet18, reused.settings), Plan.from_json(reused.plan.to_json()))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(images), network.eval()(images))


def test_a_network_with_reuse_can_be_rewritten(resnet18: nn.Module):
    """torch.fx traces it: layers that share gates stand beside layers that reuse ReLUs."""
    torch.manual_seed(5)
    plan = Plan.of(resnet18, SIZE)
    reused = relu_reuse(resnet18, plan, 4, sites=["layer3.0.relu2", "layer3.1.relu2"])
    sharing = reused.plan.replace("layer1.0.relu1", "shared", prototypes=2)
    sharing = sharing.replace("layer1.0.relu2", "shared", leader="layer1.0.relu1")
    network = apply_plan(reused.model, sharing).eval()
    assert Plan.of(network, SIZE) == sharing
    again = apply_plan(network, reused.plan).eval()
    assert Plan.of(again, SIZE) == reused.plan
    images = torch.randn(2, *SIZE)
    assert torch.equal(again(images), apply_plan(reused.model, reused.plan).eval()(images))


def test_the_convolution_in_front_is_found(resnet18: nn.Module):
    found = convolutions(resnet18, ["stem_relu", "layer2.0.relu1", "layer2.0.relu2"])
    assert found == {"stem_relu": "conv1", "layer2.0.relu1": "layer2.0.conv1", "layer2.0.relu2": "layer2.0.conv2"}


def test_group_sizes_of_the_papers_networks():
    assert group_sizes(32, 16, "three") == (8, 22, 2)
    assert group_sizes(480, 8, "three") == (120, 300, 60)
    assert group_sizes(64, 2, "three") == (16, 16, 32)
    assert group_sizes(64, 4, "naive") == (16, 16, 16, 16)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.left(x) + self.right(x))


def chain(**settings) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, **settings), nn.ReLU())


@pytest.mark.parametrize(
    ("model", "factor", "message"),
    [
        (TwoBranches(), 4, r"site 'relu' must have one convolution .*left, right"),
        (nn.Sequential(nn.Flatten(), nn.Linear(512, 8), nn.ReLU()), 4, r"site '2' must have one convolution .*none"),
        (chain(padding=1), 3, r"multiple of 3 .*\(got 8\), at layer '0'"),
        (chain(padding=1), 16, r"multiple of 16"),
        (chain(padding=1), 1, r"factor must be an int in 2\.\."),
        (chain(padding=1, groups=2), 4, "neither groups nor dilation"),
        (chain(padding=0), 4, "half of an odd kernel"),
        (chain(padding=2, dilation=2), 4, "neither groups nor dilation"),
        (chain(padding=1, padding_mode="circular"), 4, "zeros around it"),
    ],
)
def test_what_cannot_be_split_is_refused(model: nn.Module, factor: int, message: str):
    plan = Plan.of(model, (8, 8, 8))
    with pytest.raises(PlanError, match=message):
        relu_reuse(model, plan, factor)


def test_wrong_sites_and_settings_are_refused(resnet18: nn.Module):
    plan = Plan.of(resnet18, SIZE)
    with pytest.raises(PlanError, match=r"got 3\), at layer 'conv1'"):
        relu_reuse(resnet18, plan, 4)  # the stem's three input channels
    with pytest.raises(PlanError, match="no site 'nowhere'"):
        relu_reuse(resnet18, plan, 4, sites=["nowhere"])
    with pytest.raises(PlanError, match="must be a ReLU"):
        relu_reuse(resnet18, plan.replace("layer1.0.relu1", "linear"), 4, sites=["layer1.0.relu1"])
    with pytest.raises(PlanError, match=r"missing|the model calls"):
        relu_reuse(models.create("resnet34", num_classes=2, width=32), plan, 4)
    good = {"layers": ["layer1.0.conv1"], "factor": 4}
    for bad, message in [
        ({**good, "layers": ["layer1.0.bn1"]}, "must be a convolution"),
        ({**good, "layers": ["layer1.0.conv1"] * 2}, "different module paths"),
        ({**good, "layers": "layer1.0.conv1"}, "must be a list"),
        ({**good, "form": "four"}, "one of three, naive"),
        ({**good, "shortcuts": 1}, "shortcuts must be a bool"),
        ({**good, "factor": True}, "factor must be an int"),
        ({**good, "extra": 1}, "settings must have layers and factor"),
        ({"layers": []}, "settings must have layers and factor"),
        (None, "settings must have layers and factor"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_reuse(resnet18, bad)  # type: ignore[arg-type]
