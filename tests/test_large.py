"""More than 2^31 elements on the CPU: every index must be 64 bits wide. 16 GiB of memory, a minute a test."""

from pathlib import Path

import pytest
import torch
from operator_cases import backend_parameters
from torch import Tensor

from deepshare import ChannelMap, masked_relu, shared_relu

NEEDED = 17 * 2**30
EVERY = 4099  # a prime, so that the samples meet every residue of a kernel's blocks


def available_memory() -> int:
    """Bytes that can be had without swapping; 0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(available_memory() < NEEDED, reason=f"needs {NEEDED >> 30} GiB of free memory"),
]
CPU = [p for p in backend_parameters() if p.values[0] == "cpu"]


@pytest.fixture(autouse=True)
def plain_buffers(poisoned_buffers):
    """Filling 4 GiB with NaN before every call would double the time."""
    torch.use_deterministic_algorithms(False)


def small_integers(shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """-3..3 in a pattern of 7 * 2^18 + 7 elements, float16, with the dimensions stored in `order`."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-3, 4, (7 * 2**18 + 7,), generator=generator).half()
    flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float16)
    for piece in flat.split(len(pattern)):
        piece.copy_(pattern[: len(piece)])
    stored = flat.view([shape[d] for d in order])
    return stored.permute([order.index(d) for d in range(len(shape))])


def assert_slices_agree(whole: Tensor, sampled: Tensor, name: str) -> None:
    assert torch.equal(whole[..., ::EVERY], sampled), name


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("backend", CPU)
def test_shared_relu(backend: str, order: tuple[int, ...]):
    shape = (2, 8, 2**27 + 24)
    x = small_integers(shape, order)
    assert x.numel() > 2**31
    fewer = ChannelMap(torch.tensor([2, 1, 0, 0, 1, 2, 0, 1]), 3)
    alpha, beta = torch.arange(1.0, 9.0), torch.arange(-3.0, 5.0)
    y, gates = shared_relu(x, fewer, alpha, beta, return_gates=True, backend=backend)
    few = x[..., ::EVERY].contiguous().requires_grad_()
    affine = [t.clone().requires_grad_() for t in (alpha, beta)]
    expected = shared_relu(few, fewer, *affine, backend="reference")
    assert_slices_agree(y, expected.detach(), "y")
    for c in range(8):  # small integers: the sums are exact, and no element is left out of them
        leader, own = x[:, int(fewer.pi[c])], x[:, c]
        opened, all_of_it = torch.where(leader >= 0, own, 0).sum(dtype=torch.float64), own.sum(dtype=torch.float64)
        assert y[:, c].sum(dtype=torch.float64) == alpha[c] * opened + beta[c] * all_of_it
    again = shared_relu(x, fewer, alpha, beta, source=gates, backend=backend)
    assert torch.equal(again, y)
    del y, again
    # few terms, so that float32 sums of integers are exact
    grad = torch.zeros_like(x)
    grad[..., ::EVERY] = 1
    leaves = [t.requires_grad_() for t in (x, alpha, beta)]
    dx, *sums = torch.autograd.grad(
        shared_relu(*leaves[:1], fewer, *leaves[1:], source=gates, backend=backend), leaves, grad
    )
    wanted, *wanted_sums = torch.autograd.grad(expected, [few, *affine], torch.ones_like(few))
    assert_slices_agree(dx, wanted, "dx")
    assert dx.count_nonzero() == wanted.count_nonzero()
    for got, sum_of_few in zip(sums, wanted_sums, strict=True):
        assert torch.equal(got, sum_of_few)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("backend", CPU)
def test_masked_relu(backend: str, order: tuple[int, ...]):
    shape = (16, 8, 2**24 + 24)
    x = small_integers(shape, order)
    assert x.numel() > 2**31
    mask = (torch.arange(8 * shape[2]) % 3 == 0).view(shape[1:]).float()
    leaves = [x.requires_grad_(), mask.requires_grad_()]
    y = masked_relu(*leaves, backend=backend)
    few = [t.detach()[..., ::EVERY].contiguous().requires_grad_() for t in leaves]
    expected = masked_relu(*few, backend="reference")
    assert_slices_agree(y.detach(), expected.detach(), "y")
    for n in (0, 7, 15):
        sample = x.detach()[n].float()
        total = torch.where((sample >= 0) | (mask == 0), sample, 0).sum(dtype=torch.float64)
        assert y.detach()[n].sum(dtype=torch.float64) == total
    dx, dmask = torch.autograd.grad(y, leaves, torch.ones((), dtype=x.dtype).expand(shape))
    wanted = torch.autograd.grad(expected, few, torch.ones_like(expected))
    assert_slices_agree(dx, wanted[0], "dx")
    assert_slices_agree(dmask, wanted[1], "dmask")
    assert dmask.sum(dtype=torch.float64) == -sum(sample.clamp(max=0).sum(dtype=torch.float64) for sample in x.detach())
