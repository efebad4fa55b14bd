"""The specification itself: hand-made cases, autograd of its forward, gradcheck, finite differences."""

import math

import pytest
import torch
from torch import Tensor

from deepshare import ChannelMap, shared_relu
from deepshare.kernels import reference

NAN, INF = math.nan, math.inf


def column(*values: float) -> Tensor:
    """[1, C, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


def call(x: Tensor, fewer: ChannelMap, alpha: list[float], beta: list[float], **options) -> Tensor:
    a, b = (torch.tensor(v, dtype=x.dtype) for v in (alpha, beta))
    return shared_relu(x, fewer, a, b, backend="reference", **options)


def test_replicates_take_their_prototypes_gate():
    y = call(column(1, -1, 5, 7, -2, -3), ChannelMap.balanced(6, 2), [1] * 6, [0] * 6)
    assert torch.equal(y, column(1, 0, 5, 0, -2, 0))


def test_affine_turns_the_gate_into_a_sign():
    # DeepShare eq. 4: x2 * (-2 DReLU(x1) + 1) = -sign(x1) x2
    for x1, x2 in [(1, 1), (1, -1), (-1, 1), (-1, -1)]:
        y = call(column(x1, x2), ChannelMap.balanced(2, 1), [1, -2], [0, 1])
        assert y[0, 1, 0] == -math.copysign(1, x1) * x2


@pytest.mark.parametrize(
    ("value", "gate"), [(0.0, 1), (-0.0, 1), (NAN, 0), (INF, 1), (-INF, 0), (5e-324, 1), (-5e-324, 0)]
)
def test_gate_at_the_edges(value: float, gate: int):
    y = call(column(value, 3.0), ChannelMap.balanced(2, 1), [1, 1], [0, 0])
    assert y[0, 1, 0] == 3.0 * gate


def test_nan_of_x_stays():
    y = call(column(1.0, NAN), ChannelMap.balanced(2, 1), [1, 1], [0, 0])
    assert y[0, 0, 0] == 1
    assert y[0, 1, 0].isnan()


def test_soft_gate_is_phi_below_soft_channels_and_hard_above():
    y = call(column(-1.0, 2.0, 3.0), ChannelMap.balanced(3, 1), [1] * 3, [0] * 3, soft_channels=2, gamma=2.0)
    phi = 0.5 * math.erfc(2.0 / math.sqrt(2))  # Phi(-2)
    assert torch.allclose(y, column(-1.0 * phi, 2.0 * phi, 0.0), rtol=1e-15, atol=0)


def test_all_soft_identity_map_is_gelu():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    y = call(x, ChannelMap.balanced(5, 5), [1] * 5, [0] * 5, soft_channels=5)
    assert torch.allclose(y, torch.nn.functional.gelu(x), rtol=1e-14, atol=1e-16)


def test_source_gives_the_gates():
    y = call(column(1, -2, 3), ChannelMap.balanced(3, 2), [1] * 3, [0] * 3, source=column(-1, 1))
    assert torch.equal(y, column(0, -2, 0))


def test_hard_gradients_by_hand():
    x = column(2.0, -3.0, 4.0, 5.0).requires_grad_()
    alpha = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64, requires_grad=True)
    y = shared_relu(x, ChannelMap.balanced(4, 2), alpha, beta, backend="reference")
    y.backward(column(1.0, 10.0, 100.0, 1000.0))  # gates 1 0 1 0
    assert torch.equal(x.grad, column(1.5, 2.5, 312.5, 62.5))
    assert alpha.grad.tolist() == [2.0, 0.0, 400.0, 0.0]
    assert beta.grad.tolist() == [2.0, -30.0, 400.0, 5000.0]


@pytest.mark.parametrize("soft", [0, 1, 3, 6])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("random_map", [False, True])
def test_backward_is_the_gradient_of_forward(soft: int, foreign: bool, random_map: bool):
    torch.manual_seed(0)
    pi = torch.randint(0, 3, (6,)) if random_map else torch.arange(6) % 3
    fewer = ChannelMap(pi, 3)
    x, alpha, beta = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 6, 4), (6,), (6,)])
    source = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) if foreign else None
    state = (torch.tensor(soft, dtype=torch.int32), torch.tensor(1.7, dtype=torch.float64))
    grad = torch.randn(2, 6, 4, dtype=torch.float64)
    y = _differentiable_forward(x, source, fewer.pi, alpha, beta, *state)
    inputs = [x, alpha, beta] + ([source] if foreign else [])
    expected = torch.autograd.grad(y, inputs, grad, allow_unused=True)
    leader = None if source is None else source.detach()
    maps, affine = (fewer.pi, fewer.members, fewer.offsets), (alpha.detach(), beta.detach())
    dx, dsource, dalpha, dbeta = reference.shared_relu_backward(
        grad, x.detach(), None, leader, None, *maps, *affine, *state
    )
    for ours, theirs in zip((dx, dalpha, dbeta), expected, strict=False):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    if foreign:
        wanted = torch.zeros_like(source) if expected[3] is None else expected[3]
        assert torch.allclose(dsource, wanted, rtol=1e-12, atol=1e-12)


def _differentiable_forward(x, source, pi, alpha, beta, soft_channels, gamma):
    """The operator written once more, with torch's own Normal distribution, for autograd to differentiate."""
    leader = (x if source is None else source)[:, pi.long()]
    soft = torch.distributions.Normal(0.0, 1.0).cdf(gamma * leader)
    is_soft = (torch.arange(len(pi)) < soft_channels).reshape(1, -1, 1)
    gate = torch.where(is_soft, soft, (leader >= 0).double())
    return x * (alpha.reshape(1, -1, 1) * gate + beta.reshape(1, -1, 1))


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("soft", [2, 4])
def test_gradcheck_of_soft_gates(foreign: bool, soft: int):
    torch.manual_seed(1)
    fewer = ChannelMap(torch.tensor([0, 1, 1, 0]), 2)
    x, alpha, beta = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 4, 3), (4,), (4,)])
    source = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) if foreign else None

    def run(x, alpha, beta, source):
        return shared_relu(x, fewer, alpha, beta, source=source, soft_channels=soft, gamma=1.3, backend="reference")

    # gradcheck's finite differences never cross a hard gate: every |v| is far above its step of 1e-6
    assert (x if source is None else source).detach().abs().min() > 1e-4
    torch.use_deterministic_algorithms(False)
    assert torch.autograd.gradcheck(run, (x, alpha, beta, source))


def test_finite_differences_of_hard_gates_away_from_zero():
    torch.manual_seed(2)
    fewer = ChannelMap.balanced(5, 2)
    x, alpha, beta = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 5, 2), (5,), (5,)])
    direction = torch.randn_like(x)
    step = 1e-4 * x.detach().abs().min()
    weight = torch.randn_like(x)

    def loss(x):
        return (weight * shared_relu(x, fewer, alpha, beta, backend="reference")).sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert torch.allclose(slope, (gradient * direction).sum(), rtol=1e-6)
