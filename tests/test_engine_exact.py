"""The engine is exact: bit for bit its replay, the emulation but for truncation, its comparison on every edge."""

from itertools import product
from unittest.mock import patch

import planted
import pytest
import torch
import torch.nn.functional as F
from engine_cases import infer, setup
from exact_cases import opened_gates, run_against_both
from torch import Tensor, nn

from deepshare import data, models
from deepshare.budget import allocate
from deepshare.checkpoint import load_checkpoint
from deepshare.nn import SharedReLU2d
from deepshare.plan import Plan, apply_plan
from deepshare.secure.engine.protocol import Settings
from deepshare.train import load_recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")
SECRET, PUBLIC = Settings(), Settings("public", gate="tree")
EVERY_GATE = [Settings(gate=gate, gate_bits=bits) for gate, bits in product(("dcf", "tree"), (64, 32))]


def _name(value: object) -> str:
    return f"{value.weights}-{value.gate}{value.gate_bits}" if isinstance(value, Settings) else str(value)


class SmallNet(nn.Module):
    """A leader and its follower, a ReLU, three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.leader, self.follower = SharedReLU2d(8, 2), SharedReLU2d(8, 2)
        self.third, self.last = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.follower(self.second(self.leader(x)), source=x)
        x = F.relu(self.third(F.avg_pool2d(x, 2)))
        return self.last(F.avg_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """SmallNet after four epochs on the digits."""
    torch.manual_seed(0)
    dataset, net = data.load("digits"), SmallNet()
    images, labels = dataset.normalise(dataset.train.images), dataset.train.labels
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    net = net.eval().requires_grad_(False)
    right = net(dataset.normalise(dataset.test.images)).argmax(1) == dataset.test.labels
    assert right.double().mean() > 0.9
    return net


def digits(count: int) -> Tensor:
    """Test images, then training images, normalised."""
    dataset = data.load("digits")
    return dataset.normalise(torch.cat([dataset.test.images, dataset.train.images])[:count])


@pytest.mark.parametrize("settings", [SECRET, PUBLIC], ids=_name)
def test_a_trained_network_is_both_references(trained, settings):
    parties = setup(trained, digits(1), settings)
    tally = run_against_both(parties, digits(20), 20)
    assert tally.inferences == 20


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> nn.Module:
    """The demo's network of 240 DReLUs, trained as the demo trains it."""
    folder = tmp_path_factory.mktemp("demo")
    train(load_recipe("demo-240"), folder / "demo-240", device="cpu")
    return load_checkpoint(folder / "demo-240" / "final.safetensors").model.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("settings", [SECRET, PUBLIC], ids=_name)
def test_a_thousand_inferences_of_the_demo_are_both_references(demo, settings):
    parties = setup(demo, digits(1), settings)
    tally = run_against_both(parties, digits(1000), 1000)
    print(f"\ndemo-240, {_name(settings)}: {tally}")
    assert tally.inferences == 1000


@pytest.fixture(scope="module")
def resnet18() -> tuple[nn.Module, Tensor]:
    """ResNet18 at 6,800 DReLUs with layer sharing and 20 images: digits, enlarged to 3x32x32.

    The weights are random (He), the batch norms have the statistics of the digits.
    """
    torch.manual_seed(0)
    images = F.interpolate(digits(84), 32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    net = models.create("resnet18", num_classes=100, stem_relu=True)
    net = apply_plan(net, allocate(Plan.of(net, (3, 32, 32)), "uniform", 6800).plan)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # the mean over what comes
    with torch.no_grad():
        net.train()(images[20:])
    return net.eval().requires_grad_(False), images[:20]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("settings", [SECRET, PUBLIC], ids=_name)
def test_twenty_inferences_of_resnet18_are_both_references(resnet18, settings):
    net, images = resnet18
    tally = run_against_both(setup(net, images[:1], settings), images, 20)
    print(f"\nResNet18, {_name(settings)}: {tally}")
    assert tally.inferences == 20


# the comparison alone


def edges() -> list[int]:
    """0, the powers of two and their neighbours, of either sign, and the ends of the range."""
    powers = {sign * (2**k + step) for k in range(63) for step in (-1, 0, 1) for sign in (-1, 1)}
    return sorted(powers | {0, -(2**63), 2**63 - 1, -(2**63) + 1})


def compared(x: Tensor, settings: Settings, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(gates, ReLU) of integers, [elements] each, by two parties; under these masks a if they are given."""

    def chosen(draw: planted.Draw, drawn: Tensor) -> Tensor:
        if masks is None or draw.role != "a":
            return drawn
        client = draw.of(1, draw.wire.number).view(torch.int64)
        return client.view(torch.uint8) if draw.party == 1 else (masks - client).view(torch.uint8)

    images = x.reshape(1, 1, 1, -1)
    with planted.drawing(chosen), patch("engine_cases.encode", lambda integers: integers):
        parties = setup(nn.Sequential(nn.ReLU()), images, settings)
        ran = infer(parties, parties.deal.tickets(0), images)
    (gates,) = opened_gates(ran).values()
    return gates.flatten(), ran.logits.flatten()


@pytest.mark.parametrize("settings", EVERY_GATE, ids=_name)
def test_the_comparison_is_exact_on_every_edge_under_every_mask(settings):
    """Each edge value of x, or of its low 32 bits, under random masks and under each edge value of the mask."""
    limit = 2 ** (settings.gate_bits - 1)
    x = torch.tensor([edge for edge in edges() if -limit <= edge < limit])
    for _ in range(3):
        gates, relu = compared(x, settings)
        assert torch.equal(gates, x >= 0)
        assert torch.equal(relu, x.clamp(min=0))
    masks = torch.tensor(edges()[:: 1 if settings.gate == "tree" else 10])
    of_x, of_masks = x.repeat_interleave(len(masks)), masks.repeat(len(x))
    gates, relu = compared(of_x, settings, of_masks)
    assert torch.equal(gates, of_x >= 0)
    assert torch.equal(relu, of_x.clamp(min=0))
    gates, _ = compared(of_x, settings, of_x - of_masks)  # e on every edge
    assert torch.equal(gates, of_x >= 0)


@pytest.mark.parametrize("gate", ["dcf", "tree"])
def test_32_bits_are_wrong_beyond_their_range(gate):
    """Where bit 31 is not the sign: 2^31 looks negative, -2^31 - 1 does not, and 64 bits see both."""
    x = torch.tensor([2**31 - 1, 2**31, 3 * 2**31, 2**32, -(2**31), -(2**31) - 1, -(2**32) + 1, -(2**32)])
    narrow, _ = compared(x, Settings(gate=gate, gate_bits=32))
    wide, _ = compared(x, Settings(gate=gate, gate_bits=64))
    assert torch.equal(wide, x >= 0)
    assert torch.equal(narrow, x & 2**31 == 0)
    assert (narrow != wide).tolist() == [False, True, True, False, False, True, True, True]
