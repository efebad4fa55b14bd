"""Layer sharing is data along the graph: a follower survives what hidden state would not."""

import copy
import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepshare import SharedReLU2d

SOFT_PHASES = [0, 5, 8]


class Pair(nn.Module):
    """A leader with 3 prototypes among 8 channels, and a follower."""

    def __init__(self, soft: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.leader, self.follower = SharedReLU2d(8, 3), SharedReLU2d(8, 3)
        self.head = nn.Linear(8, 5)
        self.set_soft(soft)

    def set_soft(self, soft: int) -> None:
        self.leader.soft_channels = self.follower.soft_channels = soft

    def block(self, x: Tensor) -> Tensor:
        before = self.first(x)
        return self.follower(self.second(self.leader(before)), source=before)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean((2, 3)))


class Checkpointed(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False).mean((2, 3)))


def pair(soft: int, kind: type[Pair] = Pair) -> Pair:
    torch.manual_seed(0)
    net = kind(soft)
    with torch.no_grad():
        for act in (net.leader, net.follower):
            act.alpha.uniform_(-1, 2)
            act.beta.uniform_(-1, 1)
    return net


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 7, 9, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in net.named_parameters()}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def test_the_follower_takes_the_leaders_gates():
    net, x = pair(0), images()
    before = net.first(x)
    after = net.second(net.leader(before))
    gate = (before[:, torch.arange(8) % 3] >= 0).float()
    alpha, beta = (t.reshape(1, -1, 1, 1) for t in (net.follower.alpha, net.follower.beta))
    torch.testing.assert_close(net.block(x), after * (alpha * gate + beta))


@pytest.mark.parametrize("soft", SOFT_PHASES)
def test_deepcopy(soft: int):
    net, x = pair(soft), images()
    expected = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), expected)
    twin.set_soft(2)
    with torch.no_grad():
        twin.leader.alpha.zero_()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(net(x), expected)
    assert (net.leader.soft_channels, twin.leader.soft_channels) == (soft, 2)


@pytest.mark.parametrize("soft", SOFT_PHASES)
def test_pickle_and_torch_save(soft: int):
    net, x = pair(soft), images()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert twin.follower.soft_channels == soft
        assert torch.equal(twin(x), net(x))


@pytest.mark.parametrize("soft", SOFT_PHASES)
def test_state_dict_into_a_fresh_network(soft: int):
    net, x = pair(soft), images()
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = Pair(soft=1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.follower.soft_channels == soft
    assert torch.equal(other(x), net(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("soft", [0, 5])
def test_inductor(soft: int):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # Inductor fills no buffers; poisoned ones serve the eager tests
    net, x = pair(soft), images().requires_grad_()
    leaves = [x, *net.leader.parameters(), *net.follower.parameters()]

    def scaled(x: Tensor) -> Tensor:  # one fused kernel beside the convolutions: the C++ compiler is slow
        return net.block(x) * 0.5

    ours, expected = torch.compile(scaled, fullgraph=True)(x), scaled(x)
    torch.testing.assert_close(ours, expected)
    gradient = torch.randn(expected.shape)
    for found, wanted in zip(*(torch.autograd.grad(y, leaves, gradient) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("soft", SOFT_PHASES)
def test_autocast(soft: int):
    net, x = pair(soft), images()
    seen: list[Tensor] = []
    net.follower.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert seen[0].dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert net.follower.alpha.grad.dtype == torch.float32
    # 5 layers of bfloat16 roundings of 2^-8; a gate that flips near 0 changes little
    torch.testing.assert_close(y.float(), net(x), rtol=0.05, atol=0.02)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for soft in SOFT_PHASES:
        replica = nn.parallel.DistributedDataParallel(pair(soft))
        torch.save(gradients(replica, images().chunk(2)[rank]), f"{folder}/{soft}-{rank}.pt")
    dist.destroy_process_group()


def test_distributed_gradients_are_those_of_the_whole_batch(tmp_path: Path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    for soft in SOFT_PHASES:
        expected = gradients(pair(soft), images())
        for rank in range(2):
            found = torch.load(tmp_path / f"{soft}-{rank}.pt")
            assert_same_gradients({name.removeprefix("module."): g for name, g in found.items()}, expected)


@pytest.mark.parametrize("soft", SOFT_PHASES)
def test_activation_checkpointing(soft: int):
    x = images()
    ours, expected = gradients(pair(soft, Checkpointed), x), gradients(pair(soft), x)
    assert_same_gradients(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("soft", SOFT_PHASES)
def test_export(soft: int):
    net = pair(soft).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for count in (4, 7):
        for each in (program, loaded):
            torch.testing.assert_close(each.module()(images(count)), net(images(count)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("soft", SOFT_PHASES)
def test_other_dtypes(soft: int, dtype: torch.dtype):
    act = pair(soft).follower
    expected = act(images(8).reshape(1, 8, 21, 9), source=-images(8).reshape(1, 8, 21, 9))
    narrow = copy.deepcopy(act).to(dtype)
    assert narrow.channel_map.pi.dtype == narrow.soft_switch.dtype == torch.int32
    x = images(8).reshape(1, 8, 21, 9).to(dtype).requires_grad_()
    y = narrow(x, source=-x.detach())
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == narrow.alpha.grad.dtype == dtype
    unit = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
    # x, alpha, beta and y are each rounded once: 4 units of |x| (|alpha| + |beta|) <= 4 * 4 * 3
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=4 * unit * 12)


def test_half_and_bfloat16_methods():
    for net in (pair(5).half(), pair(5).bfloat16()):
        dtype = net.first.weight.dtype
        y = net(images().to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()


def test_the_edge_carries_the_gradient_in_the_soft_phase_only():
    for soft, flows in ((8, True), (0, False)):
        net, x = pair(soft), images()
        before = net.first(x).detach().requires_grad_()
        after = net.second(net.leader(before.detach()))
        net.follower(after, source=before).sum().backward()
        assert (before.grad is not None) == flows


def test_functional_use_inside_no_grad_and_inference_mode():
    net, x = pair(5), images()
    expected = F.relu(net(x))
    with torch.inference_mode():
        assert torch.equal(F.relu(net(x)), expected)
    with torch.no_grad():
        assert torch.equal(F.relu(net(x)), expected)
