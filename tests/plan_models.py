"""Small models with every way of calling a ReLU that a plan must see, and plans for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepshare.nn import SharedReLU2d
from deepshare.plan import Plan

SIZE = (3, 6, 6)


def chain(channels: int = 8, depth: int = 3) -> nn.Sequential:
    """conv, relu, conv, relu, ...: `depth` sites named 1, 3, 5, ... of one shape."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class Functional(nn.Module):
    """Every functional form once, in a block that is called twice; then a linear head with a ReLU."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x))
            x = torch.relu(x + 1)
            return (x - 1).relu()

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        x = F.relu(input=x - 0.1)
        return torch.relu(self.fc(x.mean((2, 3))))


class InPlace(nn.Module):
    """Relies on in-place ReLUs whose result it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x.relu_()
        y = self.conv(x[:, :3] - 0.2)
        F.relu(y, inplace=True)
        z = y - 0.3
        torch.relu_(z)
        w = z - 0.1
        self.act(w)
        return x + y + z + w


class ShortcutOfOverwritten(nn.Module):
    """The known trap of in-place ReLUs: the shortcut carries what the ReLU has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x = self.conv(x)
        x = self.act1(x)
        return self.act2(self.conv(x) + shortcut)


class LeaderReadInPlace(nn.Module):
    """An in-place ReLU overwrites the first site's pre-activation after that site has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act1, self.overwriting, self.act2 = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.act1(x)
        return self.act2(2 * y - self.overwriting(x) - 0.2)


class Reused(nn.Module):
    """One ReLU for all, registered under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(3))
        self.relu = nn.ReLU()
        self.alias = self.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.convs[0](x))
        x = self.alias(self.convs[1](x))
        return self.relu(self.convs[2](x))


class Untraceable(nn.Module):
    """Control flow on values; a module called once, one called twice, and a functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.once, self.twice = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.once(self.conv(x)))
        if x.sum() < 0:
            x = -x
        return F.relu(self.twice(x))


class Extras(nn.Module):
    """Two sites; weights that forward never uses, a constant made in forward, batch norm, a hidden buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn(self.conv1(x)))
        return self.act2(self.conv2(x) * torch.tensor([0.5])) * self.scale


class OptionalArguments(nn.Module):
    """Takes more than an image, if one likes: a trace that knew no defaults would see a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 0.5, **more: Tensor) -> Tensor:
        x = self.act1(self.conv(x))
        if mask is not None:
            x = x * mask
        return self.act2(x - scale)


class AsksForATensor(OptionalArguments):
    """A trace's proxies are no tensors: it goes another way than a run."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv(x))
        if isinstance(x, Tensor):
            x = x - 1
        return self.act2(x)


class OwnReLU(nn.ReLU):
    """A subclass that is no ReLU, though it calls one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 0.5 * F.relu(input - 1)


class TrainingDependent(nn.Module):
    """Drops in train() and not in eval(), by an argument that a trace takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.act1(self.conv(x)), 0.5, self.training)
        return self.act2(x - 0.5)


class TrainingBranch(TrainingDependent):
    """Does more in train() than in eval()."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv(x))
        if self.training:
            x = x + torch.randn_like(x)
        return self.act2(x - 0.5)


class LeaderChangedInPlace(nn.Module):
    """The first site's pre-activation is overwritten before the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.act1(x)
        x.mul_(-1)
        return self.act2(x + y)


def image(size=SIZE, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


def led_by_first(plan: Plan, prototypes: int) -> Plan:
    """The first site leads, all others of its shape follow."""
    leader = plan.sites[0]
    plan = plan.replace(leader.name, "shared", prototypes=prototypes)
    for site in plan.sites[1:]:
        if site.shape == leader.shape:
            plan = plan.replace(site.name, "shared", leader=leader.name)
    return plan


def all_shared_in_full(plan: Plan) -> Plan:
    """P = C at every site: the same function as ReLU."""
    for site in plan.sites:
        plan = plan.replace(site.name, "shared", prototypes=site.channels)
    return plan


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Alphas and betas away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, SharedReLU2d):
            for parameter in (module.alpha, module.beta):
                parameter.data = torch.randn(parameter.shape, generator=generator)
    return model
