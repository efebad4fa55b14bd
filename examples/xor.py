"""The 2x2 checkerboard with one gate (DeepShare, section 5, figures 5 to 7): python examples/xor.py --out xor.png

Label 1 where the signs of x1 and x2 differ. Four networks with one hidden layer and one DReLU each are trained on 800
points with SGD (learning rate 0.1, batch 32; DeepShare, appendix B), with several seeds. Only gate sharing can express
the task, f(x) = x2 * (-2 DReLU(x1) + 1) (eq. 4), and finds it through the GELU phase, whose gradient reaches the gate.

All networks are one expression, y = x * (alpha * gate + beta), and all seeds of a kind train in one call of
`shared_relu`: network s of S has channels s (prototype) and S + s (replicate), so that c mod S is the gate it takes.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepshare import ChannelMap, shared_relu

POINTS, BATCH, LEARNING_RATE = 800, 32, 0.1  # DeepShare, appendix B
EPOCHS, SEEDS = 300, 6  # the paper trains for 5,000 epochs; 300 take seconds and show the same
GELU_SHARE, SWITCH_SHARE = 0.75, 0.15  # of the epochs: all gates soft; replicates hard, prototypes still soft
# The points lie in [-1, 1], where Phi(x) is nearly linear. Of 24 seeds 7 exceed 0.96 with gamma 1, 8 with 2, 13 with 4.
GAMMA = 4.0


@dataclass(frozen=True)
class Kind:
    """A network of one gate: its neurons' (alpha, beta) at the start, whether they learn, and the GELU phase."""

    name: str
    affine: tuple[tuple[float, float], ...]
    learns_affine: bool = False
    gelu_phase: bool = False


# in the order of Fig. 7, by rows
KINDS = (
    Kind("one ReLU neuron", ((1.0, 0.0),)),
    Kind("SNL: one ReLU and one linear neuron", ((1.0, 0.0), (0.0, 1.0))),
    Kind("DeepShare with the GELU phase", ((1.0, 0.0), (1.0, 0.0)), learns_affine=True, gelu_phase=True),
    Kind("DeepShare without it", ((1.0, 0.0), (1.0, 0.0)), learns_affine=True),
)


def labels_of(points: Tensor) -> Tensor:
    """h(x1, x2) = 1 where sign(x1) != sign(x2), for points [..., 2]."""
    return ((points[..., 0] >= 0) != (points[..., 1] >= 0)).float()


class Networks(nn.Module):
    """One network of a kind for each seed; they share nothing but the calls."""

    def __init__(self, kind: Kind, seeds: Sequence[int]) -> None:
        super().__init__()
        count, hidden = len(seeds), len(kind.affine)
        draws = [self._draw(hidden, seed) for seed in seeds]
        self.first, self.first_bias, self.second, self.second_bias = (
            nn.Parameter(torch.stack(tensors)) for tensors in zip(*draws, strict=True)
        )
        alpha, beta = torch.tensor(kind.affine).repeat_interleave(count, 0).unbind(1)
        self.alpha, self.beta = (nn.Parameter(t.clone(), requires_grad=kind.learns_affine) for t in (alpha, beta))
        self.channel_map = ChannelMap.balanced(count * hidden, count)

    @staticmethod
    def _draw(hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and biases of both layers, uniform in +-1/sqrt(inputs) as in nn.Linear."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(inputs: int, *shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)

        return uniform(2, 2, hidden), uniform(2, 1, hidden), uniform(hidden, hidden, 1), uniform(hidden, 1, 1)

    def forward(
        self,
        points: Tensor,  # [S, B, 2]
        soft_neurons: int = 0,  # of each network: 2 all soft, 1 the replicate hard, 0 all hard
    ) -> Tensor:  # logits [S, B]
        count, batch, _ = points.shape
        hidden = torch.baddbmm(self.first_bias, points, self.first).permute(1, 2, 0)  # [B, H, S]
        flat, soft = hidden.reshape(batch, -1), soft_neurons * count
        gated = shared_relu(flat, self.channel_map, self.alpha, self.beta, soft_channels=soft, gamma=GAMMA)
        return torch.baddbmm(self.second_bias, gated.reshape(hidden.shape).permute(2, 0, 1), self.second).squeeze(2)


def batches(points: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of [S, BATCH, 2]."""
    order = torch.randperm(points.shape[1], generator=generator)
    for chosen in order.split(BATCH):
        yield points[:, chosen]


def soft_neurons_at(kind: Kind, progress: float) -> int:
    """How many neurons of a network have the soft gate when `progress` (0 to 1) of the epochs is done."""
    if not kind.gelu_phase:
        return 0
    return 2 if progress < GELU_SHARE else 1 if progress < GELU_SHARE + SWITCH_SHARE else 0


def train(kind: Kind, seeds: Sequence[int], epochs: int) -> Networks:
    """Networks of `kind`, one for each seed, each on its own 800 points."""
    points = torch.stack([2 * torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(s)) - 1 for s in seeds])
    networks = Networks(kind, seeds)
    optimizer = torch.optim.SGD([p for p in networks.parameters() if p.requires_grad], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        soft = soft_neurons_at(kind, epoch / epochs)
        for batch in batches(points, generator):
            losses = F.binary_cross_entropy_with_logits(networks(batch, soft), labels_of(batch), reduction="none")
            optimizer.zero_grad()
            losses.mean(1).sum().backward()  # a sum over networks: each gets the gradient of its own mean
            optimizer.step()
    return networks


def grid(side: int) -> Tensor:
    """[side * side, 2] points of [-1, 1]^2, none on an axis: side is even."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.cartesian_prod(line, line)


def accuracies(networks: Networks, side: int = 200) -> list[float]:
    """Share of a grid each network labels right."""
    points = grid(side)
    with torch.no_grad():
        logits = networks(points.expand(networks.first.shape[0], -1, -1))
    return ((logits > 0).float() == labels_of(points)).float().mean(1).tolist()


def draw(results: Sequence[tuple[Kind, Networks]], path: Path) -> None:
    """The four decision boundaries of Fig. 7, each of its kind's best seed; written beside and renamed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(8.4, 8.9), sharex=True, sharey=True, layout="constrained")
    for axis, (kind, networks) in zip(axes.flat, results, strict=True):
        _draw_boundary(axis, kind, networks)
    figure.suptitle("The 2x2 checkerboard with a single gate (DeepShare, Fig. 7)\n", fontsize=13)
    figure.supxlabel("$x_1$")
    figure.supylabel("$x_2$")
    handles, names = axes[0, 0].get_legend_handles_labels()
    boundary = pyplot.Line2D([], [], color="black", linewidth=2)
    figure.legend(
        [*handles, boundary], [*names, "decision boundary"], loc="upper center", bbox_to_anchor=(0.5, 0.975), ncols=3,
        frameon=False,
    )  # fmt: skip
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, dpi=150, format=path.suffix.removeprefix(".") or "png")
    pyplot.close(figure)
    os.replace(partial, path)


def _draw_boundary(axis, kind: Kind, networks: Networks) -> None:  # type: ignore[no-untyped-def]
    side = 300
    scores = accuracies(networks)
    best = scores.index(max(scores))
    with torch.no_grad():
        logits = networks(grid(side).expand(len(scores), -1, -1))[best]
    image = torch.sigmoid(logits).reshape(side, side).T
    # a wider range than 0 to 1 keeps the colours pale behind the points
    axis.imshow(image.numpy(), origin="lower", extent=(-1, 1, -1, 1), cmap="RdBu_r", vmin=-0.7, vmax=1.7)
    line = torch.linspace(-1, 1, side)
    if 0 < (logits > 0).float().mean() < 1:
        axis.contour(line.numpy(), line.numpy(), image.numpy(), levels=[0.5], colors="black", linewidths=2)
    points = 2 * torch.rand(250, 2, generator=torch.Generator().manual_seed(1)) - 1
    for label, color in ((0, "#2166ac"), (1, "#b2182b")):
        chosen = points[labels_of(points) == label]
        axis.scatter(*chosen.T.numpy(), s=14, c=color, edgecolors="white", linewidths=0.4, label=f"label {label}")
    axis.set_title(f"{kind.name}\nbest of {len(scores)} seeds: {100 * max(scores):.1f} % right", fontsize=11)
    axis.set_xticks([-1, 0, 1])
    axis.set_yticks([-1, 0, 1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, help="picture of the four decision boundaries (needs matplotlib)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors hold a few hundred numbers
    results = []
    for kind in KINDS:
        begin = time.perf_counter()
        networks = train(kind, range(options.seeds), options.epochs)
        row = "  ".join(f"{accuracy:.3f}" for accuracy in accuracies(networks))
        print(f"{kind.name:<36} {row}   ({time.perf_counter() - begin:.1f} s)", flush=True)
        results.append((kind, networks))
    if options.out is not None:
        draw(results, options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
