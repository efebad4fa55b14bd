"""What only a GPU can show: captured graphs, streams, devices, very large tensors, autocast and Inductor there."""

import pytest
import torch
from operator_cases import Case, inputs
from torch import Tensor, nn

from deepshare import ChannelMap, SharedReLU2d, masked_relu, shared_relu
from deepshare.raw_ops import backends

pytestmark = pytest.mark.gpu
BACKENDS = [
    pytest.param(name, marks=[] if backends()[name] is None else pytest.mark.skip(reason=str(backends()[name])))
    for name in ("cuda", "triton")
]
CASE = Case(1, (8, 12, 9, 7), 4, "random", source_channels=None)


@pytest.fixture(autouse=True)
def plain_buffers(poisoned_buffers):
    """Filling buffers is forbidden while a graph is captured, and would double the memory of the large cases."""
    torch.use_deterministic_algorithms(False)


def step(given, leaves: list[Tensor], soft: Tensor, gamma: Tensor, backend: str) -> list[Tensor]:
    """y, dx, dalpha, dbeta."""
    x, alpha, beta = leaves
    y = shared_relu(x, given.channel_map, alpha, beta, soft_channels=soft, gamma=gamma, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, given.grad)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_sees_the_switch_and_gamma(backend: str):
    given = inputs(CASE, "cuda")
    leaves = [t.detach().requires_grad_() for t in (given.x, given.alpha, given.beta)]
    soft, gamma = torch.tensor(12, dtype=torch.int32, device="cuda"), torch.tensor(1.0, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(given, leaves, soft, gamma, backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(given, leaves, soft, gamma, backend)
    for channels, sharpness in [(12, 1.0), (5, 4.0), (0, 2.0)]:
        soft.fill_(channels)
        gamma.fill_(sharpness)
        graph.replay()
        torch.cuda.synchronize()
        for ours, expected in zip(captured, step(given, leaves, soft, gamma, backend), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_side_stream_is_used(backend: str):
    given = inputs(Case(2, (16, 64, 64, 64), 8), "cuda")
    expected = shared_relu(given.x, given.channel_map, given.alpha, given.beta, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on the default stream would read x before it is written
        x = torch.empty_like(given.x).copy_(given.x)
        y = shared_relu(x, given.channel_map, given.alpha, given.beta, backend=backend)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_on_another_device_than_the_current_one(backend: str):
    given = inputs(CASE, "cuda:1")
    with torch.cuda.device(0):
        y = shared_relu(given.x, given.channel_map, given.alpha, given.beta, backend=backend)
    expected = shared_relu(given.x, given.channel_map, given.alpha, given.beta, backend="reference")
    assert y.device == given.x.device
    assert torch.equal(y, expected)


LARGE = (2, 8, 2**27 + 24)  # more than 2^31 elements, 4 GiB of float16


def large(channels_last: bool) -> Tensor:
    x = torch.randint(-2, 3, LARGE, dtype=torch.int8, device="cuda").half()
    return torch.empty_permuted(LARGE, (0, 2, 1), dtype=x.dtype, device="cuda").copy_(x) if channels_last else x


def enough_memory() -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 40 * 2**30


@pytest.mark.skipif(not enough_memory(), reason="needs 40 GiB of free GPU memory")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_31_elements(backend: str, channels_last: bool):
    x = large(channels_last).requires_grad_()
    channel_map = ChannelMap.balanced(8, 3).to("cuda")
    alpha = torch.arange(1.0, 9.0, device="cuda").requires_grad_()
    beta = torch.arange(-3.0, 5.0, device="cuda").requires_grad_()
    y, gates = shared_relu(x, channel_map, alpha, beta, return_gates=True, backend=backend)
    again = shared_relu(x.detach(), channel_map, alpha.detach(), beta.detach(), source=gates, backend=backend)
    grad = torch.zeros_like(x)
    grad[-1, :, -50:] = 1  # a sum of few terms is exact; they lie beyond 2^31 elements
    dx, dalpha, dbeta = torch.autograd.grad(y, [x, alpha, beta], grad)
    for part in (slice(0, 99), slice(-99, None)):
        piece = x.detach()[..., part].contiguous().requires_grad_()
        expected = shared_relu(piece, channel_map, alpha, beta, backend="reference")
        assert torch.equal(y.detach()[..., part], expected.detach())
        assert torch.equal(again[..., part], expected.detach())
        wanted = torch.autograd.grad(expected, [piece, alpha, beta], grad[..., part])
        assert torch.equal(dx[..., part], wanted[0])
    assert torch.equal(dalpha, wanted[1])
    assert torch.equal(dbeta, wanted[2])


@pytest.mark.skipif(not enough_memory(), reason="needs 40 GiB of free GPU memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_over_more_than_2_31_elements(backend: str):
    x = large(False).requires_grad_()
    mask = (torch.arange(8 * LARGE[2], device="cuda").reshape(LARGE[1:]) % 3 == 0).float().requires_grad_()
    y = masked_relu(x, mask, backend=backend)
    dx, dmask = torch.autograd.grad(y, [x, mask], torch.ones_like(x))
    for part in (slice(0, 99), slice(-99, None)):
        pieces = [t.detach()[..., part].contiguous().requires_grad_() for t in (x, mask)]
        expected = masked_relu(*pieces, backend="reference")
        wanted = torch.autograd.grad(expected, pieces, torch.ones_like(expected))
        assert torch.equal(y.detach()[..., part], expected.detach())
        assert torch.equal(dx[..., part], wanted[0])
        assert torch.equal(dmask[..., part], wanted[1])


@pytest.mark.parametrize("soft", [0, 5])
def test_autocast_and_inductor(soft: int):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), SharedReLU2d(8, 3), nn.Conv2d(8, 4, 3)).cuda()
    net[1].soft_channels = soft
    x = torch.randn(2, 3, 12, 12, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert net[:2](x).dtype == torch.bfloat16
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-3, atol=1e-4)  # TF32 may differ between the two
