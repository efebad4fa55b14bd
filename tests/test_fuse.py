"""fuse: the same values and gradients bit for bit, in fewer passes."""

import operator
from collections.abc import Callable

import pytest
import torch
from plan_models import led_by_first, randomise
from torch import Tensor, fx, nn

from deepshare import Plan, SharedReLU2d, apply_plan, count_drelus, fuse, models
from deepshare.budget import allocate
from deepshare.plan import PlanError

SIZE = (3, 16, 16)


def resnet(budget: int = 1_200, group: int | str = "auto") -> tuple[nn.Module, Plan]:
    """A narrow ResNet18 with shared gates in layer groups."""
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=5, width=8)
    plan = Plan.of(model, SIZE)
    plan = allocate(plan, {site.name: 1.0 for site in plan.sites}, budget, group=group).plan
    return randomise(apply_plan(model, plan)), plan


def step(model: nn.Module, forward: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits, and the gradient of every parameter of `model`, of one pass through `forward`."""
    logits = forward(images)
    weight = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    return [logits.detach(), *torch.autograd.grad((logits * weight).sum(), list(model.parameters()))]


def images() -> Tensor:
    return torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(3))


def soften(model: nn.Module, share: float) -> None:
    for module in model.modules():
        if isinstance(module, SharedReLU2d):
            module.soft_channels = int(share * module.channels)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("group", ["auto", 2])
def test_values_and_gradients_are_the_same_bits(group, share: float, memory_format):
    model, _ = resnet(group=group)
    soften(model, share)
    model.eval()  # batch norms do not move between the two passes
    fused = fuse(model, SIZE)
    x = images().contiguous(memory_format=memory_format)
    for ours, expected in zip(step(model, fused, x), step(model, model, x), strict=True):
        assert torch.equal(ours, expected)


def nodes(model: nn.Module, choose: Callable[[fx.Node], bool]) -> list[fx.Node]:
    assert isinstance(model, fx.GraphModule)
    return [node for node in model.graph.nodes if choose(node)]


def test_every_addition_of_a_resnet_goes_into_its_activation():
    model, plan = resnet()
    fused = fuse(model, SIZE)
    assert nodes(fused, lambda n: n.target in (operator.add, torch.add)) == []
    assert len(nodes(fused, lambda n: "residual" in n.kwargs)) == 8
    leaders = [site for site in plan.sites if site.prototypes]
    followed = {site.leader for site in plan.sites if site.leader}
    assert len(nodes(fused, lambda n: n.kwargs.get("return_gates", False))) == len(followed) <= len(leaders)


def test_modules_parameters_and_names_are_shared():
    model, plan = resnet()
    fused = fuse(model, SIZE)
    assert {id(p) for p in fused.parameters()} == {id(p) for p in model.parameters()}
    assert list(fused.state_dict()) == list(model.state_dict())
    fused.train()
    assert all(module.training for module in model.modules() if not isinstance(module, fx.GraphModule))
    assert count_drelus(fused, SIZE).total == plan.drelus
    assert Plan.of(fused, SIZE).sites == plan.sites


def test_the_switch_goes_on_working():
    model, _ = resnet()
    model.eval()
    fused = fuse(model, SIZE)
    for share in (1.0, 0.5, 0.0, 0.3):
        soften(model, share)
        assert torch.equal(fused(images()), model(images()))


class Kept(nn.Module):
    """Sums that must stay: read twice, of unequal shapes, of a number, of other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bias = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.read_twice, self.broadcast, self.number, self.doubled = (nn.ReLU() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        both = x + x.flip(2)
        y = self.read_twice(both) + both
        y = y * self.broadcast(y + self.bias)
        y = y * self.number(y + 1)
        return y * self.doubled(torch.add(y, x, alpha=2))


def test_sums_that_something_else_needs_stay():
    model = Kept()
    plan = Plan.of(model, SIZE)
    for site in plan.sites:
        plan = plan.replace(site.name, "shared", prototypes=2)
    shared = randomise(apply_plan(model, plan))
    fused = fuse(shared, SIZE)
    assert nodes(fused, lambda n: "residual" in n.kwargs) == []
    assert torch.equal(fused(images()), shared(images()))


class InPlaceSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.act, self.again = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += self.second(x)
        z = self.second(x)
        z.add_(self.first(x))
        return self.act(y) * self.again(z)


def test_sums_in_place_are_absorbed_where_nobody_reads_the_summand():
    model = InPlaceSum()
    shared = randomise(apply_plan(model, led_by_first(Plan.of(model, SIZE), 1)))
    fused = fuse(shared, SIZE)
    assert len(nodes(fused, lambda n: "residual" in n.kwargs)) >= 1
    for ours, expected in zip(step(shared, fused, images()), step(shared, shared, images()), strict=True):
        assert torch.equal(ours, expected)


def test_a_model_without_shared_gates_is_returned():
    model = models.create("resnet18", num_classes=5, width=8)
    assert fuse(model, SIZE) is model


def test_an_untraceable_model_is_refused_by_name():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = SharedReLU2d(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) if x.sum() > 0 else x

    with pytest.raises(PlanError, match=r"^fuse: Branching cannot be traced by torch.fx: "):
        fuse(Branching(), SIZE)
