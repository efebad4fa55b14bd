"""Small networks for the secure tests, and what fixed-point arithmetic allows them to give."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepshare import models
from deepshare.channel_map import ChannelMap
from deepshare.methods.conv_algebra import BiasMapConv2d
from deepshare.models.reuse import ReuseConv2d
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.plan import Plan, Site, apply_plan
from deepshare.secure.program import Program

UNIT = 2.0**-16
EDGES = torch.tensor([0.0, -0.0, UNIT, -UNIT, UNIT / 4, -UNIT / 4, 1.0, -1.0, 127.5, -127.5, 32767.0, -32767.0])


@dataclass(frozen=True)
class Case:
    """A network in eval mode and its images [N, C, H, W]."""

    model: nn.Module
    images: Tensor


def cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)
    edges = EDGES.repeat(4, 1).reshape(1, 4, 3, 4)
    noise = torch.randn(2, 4, 3, 4, generator=generator)
    image = torch.randn(2, 1, 8, 8, generator=generator)
    odd = torch.tensor([[1, 0], [0, 1]]).repeat(2, 2)[:3].expand(4, 3, 4) > 0
    return {
        "relu": Case(nn.Sequential(nn.ReLU()), edges),
        "max_pool": Case(nn.Sequential(nn.MaxPool2d(3, 2, 1)), torch.cat([edges, noise[:1]])),
        "gate": Case(nn.Sequential(shared(4, 2, generator)), gate_edges()),
        "leader": Case(nn.Sequential(shared(4, 2, generator)), torch.cat([edges, noise])),
        "odd_map": Case(nn.Sequential(odd_map(generator)), noise),
        "follower": Case(LeaderFollower(generator), noise),
        "mask": Case(nn.Sequential(MaskedReLU2d(torch.rand(4, 3, 4, generator=generator) > 0.5)), noise),
        "checkered_mask": Case(nn.Sequential(MaskedReLU2d(odd)), noise),
        "channel_mask": Case(nn.Sequential(MaskedReLU2d(torch.tensor([True, False, False, True]))), noise),
        "zeroing_mask": Case(nn.Sequential(MaskedReLU2d(torch.tensor([True, False] * 2), zero_out=True)), noise),
        "no_mask": Case(nn.Sequential(MaskedReLU2d(torch.zeros(4, dtype=torch.bool), zero_out=True)), noise),
        "layers": Case(layers(generator), noise),
        "convolutions": Case(convolutions(generator), noise),
        "reuse": Case(reuse(generator), noise),
        "resnet": Case(tiny_resnet(None), image),
        "shared_resnet": Case(tiny_resnet(2), image),
    }


def gate_edges() -> Tensor:
    """Edge values in the two prototypes, 1 in their replicates."""
    edges = EDGES.reshape(1, 1, 3, 4).repeat(1, 2, 1, 1)
    return torch.cat([edges, torch.ones(1, 2, 3, 4)], dim=1)


def shared(channels: int, prototypes: int, generator: torch.Generator) -> SharedReLU2d:
    act = SharedReLU2d(channels, prototypes).requires_grad_(False)
    act.alpha.uniform_(-2, 2, generator=generator)
    act.beta.uniform_(-1, 1, generator=generator)
    return act


def odd_map(generator: torch.Generator) -> SharedReLU2d:
    """A map in which no prototype gives itself its gate."""
    act = shared(4, 2, generator)
    act.channel_map = ChannelMap(torch.tensor([1, 0, 0, 0]), 2)
    return act


class LeaderFollower(nn.Module):
    """A leader, a follower of it on other values, and a second follower with a map of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.leader = shared(4, 2, generator)
        self.follower = shared(4, 2, generator)
        self.second = odd_map(generator)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.leader(x)
        return self.second(self.follower(inner + x, source=x) + inner, x)


def layers(generator: torch.Generator) -> nn.Module:
    """Every linear operation: grouped and strided convolutions, batch norms that fold or cannot, pools, linear."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(2, stride=1, padding=1),
        nn.Conv2d(6, 4, (1, 3), stride=(1, 2), dilation=(1, 1)),
        nn.AdaptiveAvgPool2d((2, 2)),  # from 4x2: a kernel that is not square
        nn.Flatten(),
        nn.Identity(),
        nn.Linear(16, 5),
    )
    return with_statistics(net, generator)


def convolutions(generator: torch.Generator) -> nn.Module:
    """Depthwise with a stride, grouped with a dilation; a bias for each position; the largest of what is left."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=(1, 2), groups=4),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, (1, 2), padding=(0, 1), dilation=(1, 2), groups=2, bias=False),
        BiasMapConv2d(nn.Conv2d(4, 6, 1, bias=False), torch.randn(6, 3, 2, generator=generator)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return with_statistics(net, generator)


def reuse(generator: torch.Generator) -> nn.Module:
    """DeepReShape's ReLU-reuse: channels taken apart, one group compared, channels joined."""
    torch.manual_seed(4)
    return with_statistics(nn.Sequential(ReuseConv2d(4, 4, (3, 3), factor=4), nn.BatchNorm2d(4)), generator)


def with_statistics(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Batch norms as after training; eval mode, no gradients."""
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.2, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.1, generator=generator)
    return net.eval().requires_grad_(False)


def tiny_resnet(prototypes: int | None, name: str = "resnet10") -> nn.Module:
    """A ResNet of width 4 on 1x8x8; with `prototypes`, one group per stage, its first site leading."""
    torch.manual_seed(2)
    net = models.create(name, num_classes=10, width=4, stem_relu=True, in_channels=1)
    plan = Plan.of(net, (1, 8, 8))
    if prototypes is not None:
        plan = grouped(plan, prototypes)
    return with_statistics(apply_plan(net, plan), torch.Generator().manual_seed(3))


def grouped(plan: Plan, prototypes: int) -> Plan:
    leaders: dict[tuple[int, ...], str] = {}
    sites = []
    for site in plan.sites:
        leader = leaders.get(site.shape)
        leaders.setdefault(site.shape, site.name)
        own = prototypes if leader is None else None
        sites.append(Site(site.name, site.shape, "shared", prototypes=own, leader=leader))
    return Plan(tuple(sites), plan.input_size)


@dataclass(frozen=True)
class Interval:
    """Integers (in units of 2^-16) that lie within `radius` of `centre`."""

    centre: Tensor
    radius: Tensor

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.centre + other.centre, self.radius + other.radius)

    def scaled(self, factor: Tensor) -> "Interval":
        return Interval(self.centre * factor, self.radius * factor.abs())

    def widened(self, units: float) -> "Interval":
        return Interval(self.centre, self.radius + units)

    def relu(self) -> "Interval":
        return _between(F.relu(self.centre - self.radius), F.relu(self.centre + self.radius))

    def gate(self, on: "Interval", off: "Interval") -> "Interval":
        """`on` where self >= 0 for certain, `off` where self < 0 for certain, else the hull of both."""
        low = torch.minimum(on.centre - on.radius, off.centre - off.radius)
        high = torch.maximum(on.centre + on.radius, off.centre + off.radius)
        hull = _between(low, high)
        certain_on, certain_off = self.centre - self.radius >= 0, self.centre + self.radius < 0
        return Interval(
            torch.where(certain_on, on.centre, torch.where(certain_off, off.centre, hull.centre)),
            torch.where(certain_on, on.radius, torch.where(certain_off, off.radius, hull.radius)),
        )

    def reshape(self, shape: tuple[int, ...]) -> "Interval":
        """Of every image."""
        return Interval(*(part.reshape(len(part), *shape) for part in (self.centre, self.radius)))

    def channels(self, index: Tensor) -> "Interval":
        return Interval(self.centre[:, index], self.radius[:, index])


def _between(low: Tensor, high: Tensor) -> Interval:
    return Interval((low + high) / 2, (high - low) / 2)


TRUNCATES = ("conv2d", "linear", "affine", "shared", "avg_pool2d")


def exactly(program: Program, tensors: dict[str, Tensor], images: Tensor) -> Tensor:  # images in units of 2^-16
    """The program's result in real arithmetic."""
    return bounds(program, tensors, images, truncation=0).centre * UNIT


def bounds(program: Program, tensors: dict[str, Tensor], images: Tensor, *, truncation: float = 1) -> Interval:
    """Where the program's integer result must lie, whatever the shares: exact arithmetic, one unit per truncation.

    A local truncation gives one of the two neighbouring integers: off by less than one unit.

    A comparison whose operand may have either sign within its bound counts for both outcomes. Written apart from the
    evaluator, on plain numbers.
    """
    values: list[Interval] = []
    for step in program.steps:
        weights = {role: tensors[key].double() * UNIT for role, key in step.params.items()}
        inputs = [values[index] for index in step.inputs]
        value = _step(program, step, inputs, values, weights, images)
        values.append(value.widened(truncation if step.op in TRUNCATES else 0))
    return values[-1]


def _step(program, step, inputs, values, weights, images) -> Interval:  # type: ignore[no-untyped-def]
    match step.op:
        case "input":
            return Interval(images.double(), torch.zeros_like(images, dtype=torch.float64))
        case "add":
            return inputs[0] + inputs[1]
        case "sub":
            return Interval(inputs[0].centre - inputs[1].centre, inputs[0].radius + inputs[1].radius)
        case "relu":
            return inputs[0].relu()
        case "reshape":
            return inputs[0].reshape(step.shape)
        case "gather":
            flat = inputs[0].reshape((-1,)).channels(program.public[step.public["index"]])
            return flat.reshape(step.shape)
        case "narrow":
            first = step.options["start"]
            return inputs[0].channels(torch.arange(first, first + step.options["length"]))
        case "concat":
            return Interval(torch.cat([x.centre for x in inputs], 1), torch.cat([x.radius for x in inputs], 1))
        case "mask":
            kept = torch.zeros(inputs[0].centre[0].numel(), dtype=torch.bool)
            kept[program.public[step.public["index"]]] = True
            kept, active = kept.reshape(step.shape), inputs[0].relu()
            passed = 0 if step.options["zero_out"] else 1
            return Interval(
                torch.where(kept, active.centre, passed * inputs[0].centre),
                torch.where(kept, active.radius, passed * inputs[0].radius),
            )
        case "shared":
            source = values[step.gates[0]].channels(program.public[step.public["pi"]])
            on, off = inputs[0].scaled(weights["alpha"] + weights["beta"]), inputs[0].scaled(weights["beta"])
            return source.gate(on, off)
    return _linear_step(step, inputs[0], weights)


def _linear_step(step, x: Interval, weights) -> Interval:  # type: ignore[no-untyped-def]
    options = dict(step.options)
    if step.op == "avg_pool2d":
        pool = lambda t: F.avg_pool2d(t, options["kernel"], options["stride"], options["padding"])  # noqa: E731
        return Interval(pool(x.centre).reshape(-1, *step.shape), pool(x.radius).reshape(-1, *step.shape))
    if step.op == "affine":
        return Interval(x.centre * weights["scale"] + weights["shift"], x.radius * weights["scale"].abs())
    apply = {"conv2d": lambda t, w: F.conv2d(t, w, **options), "linear": lambda t, w: t @ w}[step.op]
    centre = apply(x.centre, weights["weight"]) + weights.get("bias", torch.zeros(()))
    return Interval(centre, apply(x.radius, weights["weight"].abs()))
