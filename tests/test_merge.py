"""Merging the linear layers of whole models: the same outputs, fewer layers, and what is left alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepshare import models
from deepshare.methods.conv_algebra import BiasMapConv2d
from deepshare.methods.deepreduce import thin
from deepshare.methods.merge import merge_linear
from deepshare.plan import Plan, PlanError, apply_plan
from deepshare.secure.lower import lower

SIZE = (3, 12, 10)


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """As after training: no batch norm is the identity. In eval mode, fp64."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
    return model.eval().double()


def images(size=SIZE) -> Tensor:
    return torch.randn(4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """1x1, 3x3 padded, 1x1 around an identity; its two inner ReLUs are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(conv(3, 8, 1), nn.Identity(), conv(8, 8, 3, padding=1), nn.Dropout(), conv(8, 3, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.path(x) + x)


class RepVGG(nn.Module):
    """3x3 + 1x1 + identity."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.norm = conv(3, 3, 3, padding=1), conv(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        out += self.small(x)
        return F.relu(out + self.norm(x))


class PreActivation(nn.Module):
    """A WideResNet's block with its ReLUs dropped: the batch norm comes first, and before padding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.add(self.conv(self.norm(x))))


class Mlp(nn.Module):
    """Two linear layers without a ReLU, around them the value itself; 30 -> 4 -> 30 costs less apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 40), nn.Linear(40, 30)
        self.third, self.fourth = nn.Linear(30, 4), nn.Linear(4, 30)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = F.relu(x + self.second(self.first(x)))
        return self.fourth(self.third(x))


CASES = {
    "unpadded": (lambda: nn.Sequential(conv(3, 4, 3, 2, 1), conv(4, 4, 3), conv(4, 5, 3), nn.ReLU()), SIZE, (3, 1)),
    "bottleneck": (Bottleneck, SIZE, (3, 1)),
    "repvgg": (RepVGG, SIZE, (2, 1)),
    "pre-activation": (PreActivation, SIZE, (1, 1)),
    "mlp": (Mlp, (3, 5, 2), (4, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_merges_keep_the_output(case, dtype):
    make, size, layers = CASES[case]
    model, x = with_statistics(make()).to(dtype), images(size).to(dtype)
    wanted = model(x)
    merged, report = merge_linear(model, size)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(merged(x), wanted, atol=tolerance, rtol=tolerance)
    assert (report.before.layers, report.after.layers) == layers
    assert report.exact
    assert report.after.multiplications <= report.before.multiplications
    assert Plan.of(merged, size).drelus == Plan.of(model, size).drelus


def test_the_bottleneck_costs_less_merged():
    _, report = merge_linear(with_statistics(Bottleneck()), SIZE)
    positions = 12 * 10
    assert report.before.multiplications == positions * (3 * 8 + 8 * 8 * 9 + 8 * 3)
    assert report.after.multiplications == positions * 3 * 3 * 9
    assert (report.before.depth, report.after.depth) == (3, 1)


def test_a_merge_that_costs_more_waits_for_max_cost():
    model, x = with_statistics(Mlp()), images((3, 5, 2))
    merged, report = merge_linear(model, (3, 5, 2))
    assert [(merge.layers, merge.why_not) for merge in report.apart] == [
        (("third", "fourth"), "it costs more (max_cost=1)")
    ]
    merged, report = merge_linear(model, (3, 5, 2), max_cost=math.inf)
    torch.testing.assert_close(merged(x), model(x), atol=1e-11, rtol=1e-11)
    assert report.after.layers == 2
    assert report.merges[-1].cost == 30 * 30 / (2 * 30 * 4)


def thinned_resnet(width: int = 8, *, culled: str = "layer1") -> tuple[nn.Module, Plan]:
    """S1 culled and the first ReLU of every block dropped, as DeepReDuce does; batch norms as after training."""
    model = with_statistics(models.create("resnet18", num_classes=5, width=width))
    plan = Plan.of(model, (3, 16, 16))
    for site in plan:
        if site.name.startswith(culled) or site.name.endswith("relu1"):
            plan = plan.replace(site.name, "linear")
    return apply_plan(model, plan), plan


def test_a_resnet_has_nothing_to_merge_exactly():
    """Every 3x3 pads: nothing is merged, and the report says why."""
    model, plan = thinned_resnet()
    merged, report = merge_linear(model, (3, 16, 16))
    assert report.merges == ()
    assert report.before == report.after
    assert {merge.why_not for merge in report.apart} == {"both pad, so the border would differ (inexact=False)"}
    assert len(report.apart) == 8
    torch.testing.assert_close(merged(images((3, 16, 16))), model(images((3, 16, 16))), atol=1e-9, rtol=1e-9)
    assert Plan.of(merged, (3, 16, 16)).drelus == plan.drelus


def test_a_resnet_merged_inexactly_has_fewer_layers_and_costs_more():
    model, plan = thinned_resnet()
    merged, report = merge_linear(model, (3, 16, 16), inexact=True, max_cost=math.inf)
    assert not report.exact
    assert (report.before.layers, report.before.depth) == (21, 18)
    assert (report.after.layers, report.after.depth) == (7, 7)
    assert report.after.multiplications > 1.3 * report.before.multiplications
    assert Plan.of(merged, (3, 16, 16)).drelus == plan.drelus
    assert "differs at the border" in report.table()
    assert not torch.allclose(merged(images((3, 16, 16))), model(images((3, 16, 16))))


@pytest.mark.parametrize(
    ("name", "width", "merges", "layers"),
    [("mobilenetv1", 4, 13, (28, 15)), ("wrn-16-8", 1, 3, (17, 17)), ("hrn-5x5x3x", 2, 0, (21, 21))],
)
def test_thinned_networks_of_the_papers_merge_exactly(name, width, merges, layers):
    """A MobileNet's depthwise 3x3 and the 1x1 behind it become a dense 3x3, a WideResNet's norms join convolutions."""
    spec = {"name": name, "num_classes": 5, "width": width}
    model = with_statistics(models.create(**spec))
    full = Plan.of(model, (3, 32, 32))
    thinned = apply_plan(model, thin(spec, full, models.stage_names(spec)))
    merged, report = merge_linear(thinned, (3, 32, 32), max_cost=math.inf)
    assert (len(report.merges), (report.before.layers, report.after.layers)) == (merges, layers)
    assert report.exact
    wanted = thinned(images((3, 32, 32))).detach()
    torch.testing.assert_close(merged(images((3, 32, 32))), wanted, atol=1e-11 * float(wanted.abs().max()), rtol=1e-11)


def test_without_max_cost_nothing_dearer_is_merged_inexactly():
    model, _ = thinned_resnet()
    _, report = merge_linear(model, (3, 16, 16), inexact=True)
    assert report.merges == ()
    assert {merge.why_not for merge in report.apart} == {"it costs more (max_cost=1)"}


def test_what_was_merged_inexactly_learns_to_do_what_it_did():
    """Finetuned on the outputs of the network before: that is what the form is for."""
    torch.manual_seed(0)
    before = with_statistics(nn.Sequential(conv(3, 4, 3, 1, 1), conv(4, 4, 3, 1, 1), nn.ReLU()))
    merged, _ = merge_linear(before, SIZE, inexact=True, max_cost=2)
    x = images()
    optimizer = torch.optim.Adam(merged.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(merged(x), before(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_block_of_one_convolution_merges_with_its_shortcut_and_projection():
    """`layer*.0` of a ResNet whose first convolution went: 3x3 + projection is one 3x3, exactly, stride and all."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.shortcut = conv(3, 6, 3, 2, 1), conv(3, 6, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(torch.add(self.main(x), self.shortcut(x)))

    model = with_statistics(Block())
    merged, report = merge_linear(model, SIZE)
    torch.testing.assert_close(merged(images()), model(images()), atol=1e-11, rtol=1e-11)
    assert (report.before.layers, report.after.layers) == (2, 1)
    assert report.merges[0].layers == ("main.0", "shortcut.0")
    assert report.merges[0].cost == 0.9


def test_bias_maps_can_be_declined_and_then_the_parties_can_run_it():
    model = with_statistics(Bottleneck()).float()
    merged, report = merge_linear(model, SIZE, bias_maps=False)
    assert not any(isinstance(module, BiasMapConv2d) for module in merged.modules())
    assert report.apart[0].why_not == "it takes a bias per position (bias_maps=False)"
    assert report.after.layers == 2
    program, _ = lower(merged, SIZE)
    assert [step.op for step in program.steps].count("conv2d") == 2
    torch.testing.assert_close(merged(images().float()), model(images().float()), atol=1e-5, rtol=1e-5)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.relu(self.second(y)) + y


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class SourceOverwritten(nn.Module):
    """x is another when the sum reads it than when the convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)) - 0.5
        y = self.conv(x)
        x.relu_()
        return F.relu(y + x)


class SumOverwritesShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)) - 0.5
        y = x
        x.add_(self.conv(x))
        return F.relu(x) + y


@pytest.mark.parametrize(
    "make",
    [
        TwoReaders,
        CalledTwice,
        SourceOverwritten,
        SumOverwritesShortcut,
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(10, 5)),
    ],
)
def test_what_is_no_one_layer_is_left_alone(make):
    model = with_statistics(make())
    wanted = model(images())
    merged, report = merge_linear(model, SIZE, inexact=True, max_cost=math.inf)
    assert report.merges == ()
    torch.testing.assert_close(merged(images()), wanted, atol=1e-12, rtol=1e-12)


def test_shared_gates_keep_their_leader():
    """The leader's pre-activation has two readers: what makes it may still be merged, it itself may not."""
    layers = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1), nn.ReLU()]
    model = nn.Sequential(*layers).double()
    plan = Plan.of(model, SIZE).replace("2", "shared", prototypes=2).replace("5", "shared", leader="2")
    shared = apply_plan(model, plan)
    with torch.no_grad():
        for name, value in shared.named_parameters():
            if name.endswith(("alpha", "beta")):
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    merged, report = merge_linear(shared, SIZE)
    assert [merge.layers for merge in report.merges] == [("0", "1"), ("3", "4")]
    torch.testing.assert_close(merged(images()), shared(images()), atol=1e-12, rtol=1e-12)
    assert Plan.of(merged, SIZE) == plan


def test_the_given_model_stays_as_it_was():
    model = Bottleneck()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merged, _ = merge_linear(model, SIZE)
    assert model.training
    assert not merged.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    ours = {value.data_ptr() for value in model.state_dict().values()}
    assert not ours & {value.data_ptr() for value in merged.state_dict().values()}


def test_merging_again_changes_nothing():
    merged, _ = merge_linear(with_statistics(Bottleneck()), SIZE)
    again, report = merge_linear(merged, SIZE)
    assert report.merges == ()
    torch.testing.assert_close(again(images()), merged(images()), atol=0, rtol=0)


def test_a_resnet18_counts_what_the_papers_count():
    """555.4M multiply-accumulates in convolutions and 51,200 in the last layer, at 32x32 and 100 classes."""
    model = models.create("resnet18", num_classes=100)
    _, report = merge_linear(model, (3, 32, 32))
    stem, plain = 32 * 32 * 64 * 3 * 9, 32 * 32 * 64 * 64 * 9
    down = [plain // 2, plain // 18] * 3  # per stage: a 3x3 of stride 2, and its 1x1 projection
    assert report.before.multiplications == stem + 13 * plain + sum(down) + 512 * 100
    assert report.before.layers == 1 + 16 + 3 + 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="max_cost must be above 0"):
        merge_linear(Bottleneck(), SIZE, max_cost=0)
    with pytest.raises(ValueError, match="max_cost must be above 0"):
        merge_linear(Bottleneck(), SIZE, max_cost=math.nan)
    with pytest.raises(PlanError, match="merge_linear: input_size"):
        merge_linear(Bottleneck(), (3, 0, 4))
    with pytest.raises(PlanError, match="does not run on an image"):
        merge_linear(Bottleneck(), (4, 8, 8))

    class ControlFlow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(PlanError, match="merge_linear: ControlFlow cannot be traced"):
        merge_linear(ControlFlow(), SIZE)

    class AddsInPlace(SumOverwritesShortcut):
        """torch.fx sees no `+=`."""

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x)) - 0.5
            y = x
            x += self.conv(x)
            return F.relu(x) + y

    with pytest.raises(PlanError, match=r"AddsInPlace .* the trace returns other values than a run"):
        merge_linear(AddsInPlace(), SIZE)
