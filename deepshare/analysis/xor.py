"""The 2x2 checkerboard with one gate: four networks trained side by side (DeepShare, section 5, Fig. 7, appendix B).

Label 1 where the signs of x1 and x2 differ. A network has one hidden layer with one DReLU; 800 points of [-1, 1]^2, SGD
with rate 0.1 and batch 32, 5,000 epochs. Only gate sharing can express the task, f(x) = x2 * (-2 DReLU(x1) + 1), eq. 4;
the GELU phase, whose gradient reaches the gate, is how it is found.

Every neuron of every network is y = x * (alpha * gate + beta), so all of them, of all methods and seeds, train in one
call of `shared_relu`: a network is two channels, and both take the gate of the first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepshare.channel_map import ChannelMap
from deepshare.ops import shared_relu

POINTS, BATCH, LEARNING_RATE, EPOCHS = 800, 32, 0.1, 5000  # DeepShare, appendix B
NEURONS = 2
SOLVED = 0.9  # share of the square; the best strip along the diagonal, found without sharing, has 5/6 (docs/report.md)


@dataclass(frozen=True)
class Method:
    """A network of one gate.

    affine: (alpha, beta) of its neurons at the start; learns_affine: whether they are learned; one_neuron: the second
    neuron reaches no output; gelu_phase: it trains with soft gates first
    """

    name: str
    affine: tuple[tuple[float, float], tuple[float, float]]
    learns_affine: bool = False
    one_neuron: bool = False
    gelu_phase: bool = False


# In the order of their channels: `soft_channels` counts from the first, so what has a GELU phase stands there. SNL's
# linear neurons are one here: their sum is a linear function of x, which one has as well.
METHODS = (
    Method("DeepShare with the GELU phase", ((1.0, 0.0), (1.0, 0.0)), learns_affine=True, gelu_phase=True),
    Method("one ReLU neuron", ((1.0, 0.0), (0.0, 0.0)), one_neuron=True),
    Method("SNL: a ReLU and a linear neuron", ((1.0, 0.0), (0.0, 1.0))),
    Method("DeepShare without the GELU phase", ((1.0, 0.0), (1.0, 0.0)), learns_affine=True),
)


@dataclass(frozen=True)
class Schedule:
    """The soft gates: their gamma, and the shares of the epochs with all of them, then with the prototype's alone.

    The paper gives none for this task. The shares are those of its phases for ResNet18 (Table 7: 100, 150 and 120
    epochs); as there, replicates turn hard before prototypes. gamma is its sharper one (appendix B, segmentation):
    points lie in [-1, 1], where Phi(x) is nearly a line (docs/report.md has what 1 and 2 give).
    """

    gamma: float = 4.0
    gelu: float = 100 / 370
    switch: float = 150 / 370

    def soft_neurons(self, progress: float) -> int:
        """Of each network with a GELU phase, when `progress` (0 to 1) of the epochs is done: 2, 1 or 0."""
        return NEURONS if progress < self.gelu else 1 if progress < self.gelu + self.switch else 0


def labels_of(points: Tensor) -> Tensor:
    """h(x1, x2) = 1 where sign(x1) != sign(x2), for points [..., 2]."""
    return ((points[..., 0] >= 0) != (points[..., 1] >= 0)).float()


class Networks(nn.Module):
    """A network of every method and seed; they share nothing but the calls.

    Parameters are [M, 2, S] (M methods, 2 neurons, S seeds), `out_bias` [M, S]. Networks of a seed begin with the same
    weights, whatever the other seeds are.
    """

    def __init__(self, methods: Sequence[Method], seeds: Sequence[int]) -> None:
        super().__init__()
        self.methods, self.seeds = tuple(methods), tuple(seeds)
        shape = (len(methods), NEURONS, len(seeds))
        drawn = torch.stack([_draw(seed) for seed in seeds], dim=-1)  # [9, S]
        first, second = drawn[:6].unflatten(0, (3, NEURONS)), drawn[6:8]
        self.weight_1, self.weight_2, self.bias = (nn.Parameter(t.expand(shape).clone()) for t in first)
        reaches = torch.tensor([[1.0, float(not method.one_neuron)] for method in methods])
        self.out = nn.Parameter(second.expand(shape) * reaches.unsqueeze(-1))
        self.out_bias = nn.Parameter(drawn[8].expand(len(methods), -1).clone())
        affine = torch.tensor([method.affine for method in methods]).unsqueeze(2).expand(*shape[:2], shape[2], 2)
        self.alpha, self.beta = (nn.Parameter(t.clone()) for t in affine.unbind(-1))
        learns = torch.tensor([float(method.learns_affine) for method in methods]).reshape(-1, 1, 1).expand(shape)
        # 1 where a gradient moves a number, 0 where it stays
        reached = reaches.unsqueeze(-1).expand(shape)
        self.learns: dict[Tensor, Tensor] = {self.alpha: learns, self.beta: learns, self.out: reached}
        channels = torch.arange(math.prod(shape)).reshape(shape)
        # channels that take a gate stand among those that give one: `prototypes` is here only the range of pi
        self.channel_map = ChannelMap(channels[:, :1].expand(shape).flatten(), math.prod(shape))

    def forward(
        self,
        points: Tensor,  # [B, S, 2]
        soft_neurons: int = 0,  # of each network with a GELU phase: 2 all soft, 1 the replicate hard, 0 all hard
        gamma: float = 1.0,
    ) -> Tensor:  # logits [B, M, S]
        x1, x2 = points[:, None, None].unbind(-1)
        hidden = torch.addcmul(torch.addcmul(self.bias, x1, self.weight_1), x2, self.weight_2)  # [B, M, 2, S]
        soft = soft_neurons * len(self.seeds) * sum(method.gelu_phase for method in self.methods)
        affine = self.alpha.flatten(), self.beta.flatten()
        gated = shared_relu(hidden.flatten(1), self.channel_map, *affine, soft_channels=soft, gamma=gamma)
        return (gated.view(hidden.shape) * self.out).sum(2) + self.out_bias

    def accuracies(self, side: int = 200) -> Tensor:
        """[M, S]: the share of a grid of side * side points each network labels right."""
        right = (self.decide(side) > 0) == (labels_of(grid(side)) > 0)[:, None, None]
        return right.double().mean(0)

    @torch.no_grad()
    def decide(self, side: int) -> Tensor:
        """Logits [side * side, M, S] on `grid(side)`, all gates hard."""
        return self(grid(side)[:, None].expand(-1, len(self.seeds), -1))


def _draw(seed: int) -> Tensor:
    """Of one network: w1 (2), w2 (2), b (2), out (2), its bias; uniform in +-1/sqrt(2), as nn.Linear with 2 inputs."""
    return (2 * torch.rand(9, generator=torch.Generator().manual_seed(seed)) - 1) / math.sqrt(2)


def points_of(seed: int) -> Tensor:
    """The 800 training points of a seed, uniform in [-1, 1]^2."""
    return 2 * torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(1_000_000 + seed)) - 1


def grid(side: int) -> Tensor:
    """[side * side, 2] points of [-1, 1]^2, x1 slowest; with an even side none on an axis."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.cartesian_prod(line, line)


def train(
    methods: Sequence[Method],
    seeds: Sequence[int],
    epochs: int = EPOCHS,
    *,
    schedule: Schedule = Schedule(),
    say: Callable[[str], None] | None = None,
) -> Networks:
    """Networks of every method and seed; those of a seed see the same points, all the same order.

    The methods with a GELU phase must come first. Each network gets the gradient of its own mean loss: the sum of all
    means is what is differentiated.
    """
    if sorted(methods, key=lambda method: not method.gelu_phase) != list(methods):
        raise ValueError("xor.train: methods with a GELU phase must come first")
    networks = Networks(methods, seeds)
    points = torch.stack([points_of(seed) for seed in seeds], dim=1)  # [800, S, 2]
    labels, order = labels_of(points), torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        soft, chosen = schedule.soft_neurons(epoch / epochs), torch.randperm(POINTS, generator=order)
        for x, y in zip(points[chosen].split(BATCH), labels[chosen].split(BATCH), strict=True):
            _step(networks, x, y, soft, schedule.gamma)
        if say is not None and (epoch + 1) % 500 == 0:
            say(f"xor: {epoch + 1:,} of {epochs:,} epochs")
    return networks


@dataclass(frozen=True)
class Trained:
    """One method's networks.

    accuracies: by seed, shares of the square; solved: seeds above SOLVED; decision: sigmoid(logit) of the best seed's
    network on `grid(side)`, to 3 digits
    """

    name: str
    accuracies: tuple[float, ...]
    solved: int
    best_seed: int
    decision: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What `measure` found, with its settings: plain values, for a file."""

    points: int
    batch: int
    learning_rate: float
    epochs: int
    gamma: float
    gelu: float
    switch: float
    seeds: tuple[int, ...]
    solved_above: float
    side: int
    methods: tuple[Trained, ...]

    def check(self) -> None:
        """Raises ValueError: a method is missing, or has not an accuracy a seed and a decision a point."""
        names = [method.name for method in self.methods]
        if names != [method.name for method in METHODS]:
            raise ValueError(f"methods: wanted {', '.join(method.name for method in METHODS)}; got {', '.join(names)}")
        for method in self.methods:
            got = len(method.accuracies), len(method.decision)
            if got != (wanted := (len(self.seeds), self.side**2)):
                raise ValueError(f"{method.name}: wanted {wanted} accuracies and decisions, got {got}")


def measure(
    seeds: Sequence[int],
    epochs: int = EPOCHS,
    *,
    schedule: Schedule = Schedule(),
    side: int = 60,
    say: Callable[[str], None] | None = None,
) -> Measured:
    """Train every method with every seed; settings, accuracies, and a coarse decision function."""
    networks = train(METHODS, seeds, epochs, schedule=schedule, say=say)
    accuracies, share = networks.accuracies(), torch.sigmoid(networks.decide(side))
    methods = []
    for place, method in enumerate(METHODS):
        best = int(accuracies[place].argmax())
        reached = tuple(round(value, 4) for value in accuracies[place].tolist())
        decision = tuple(round(value, 3) for value in share[:, place, best].tolist())
        methods.append(Trained(method.name, reached, sum(v > SOLVED for v in reached), seeds[best], decision))
    settings = (POINTS, BATCH, LEARNING_RATE, epochs, schedule.gamma, schedule.gelu, schedule.switch)
    return Measured(*settings, tuple(seeds), SOLVED, side, tuple(methods))


def _step(networks: Networks, points: Tensor, labels: Tensor, soft: int, gamma: float) -> None:
    """One step of plain SGD on the binary cross entropy, its gradient in closed form: sigmoid(logit) - label."""
    logits = networks(points, soft, gamma)
    parameters: list[Tensor] = list(networks.parameters())
    with torch.no_grad():
        slope = (torch.sigmoid(logits) - labels[:, None]) / len(points)
    gradients = list(torch.autograd.grad(logits, parameters, slope))
    with torch.no_grad():
        for place, parameter in enumerate(parameters):
            if parameter in networks.learns:
                gradients[place] = gradients[place] * networks.learns[parameter]
        torch._foreach_add_(parameters, gradients, alpha=-LEARNING_RATE)
