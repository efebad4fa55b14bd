"""shared_relu in plain PyTorch: the specification every other backend is held to.

    gate[n, c, s] = Phi(gamma * source[n, pi[c], s])   where c < soft_channels   (transitional GELU phase)
                    1[source[n, pi[c], s] >= 0]        elsewhere                 (DReLU, DeepShare eq. 1)
    y[n, c, s]    = x[n, c, s] * (alpha[c] * gate[n, c, s] + beta[c])            (DeepShare eq. 3 and 6)

Shapes: x, y, grad, dx [N, C, *S]; source, dsource [N, >=P, *S]; pi, members [C]; offsets [P+1]; alpha, beta and their
gradients [C]. Arithmetic and gradient sums are in alpha's dtype (float64 for float64 x, else float32). The contract:
docs/shared_relu.md.
"""

import math

import torch
from torch import Tensor

INV_SQRT2 = 1.0 / math.sqrt(2.0)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    """[C] as [1, C, 1, ...] with `ndim` dimensions."""
    return values.reshape((1, -1) + (1,) * (ndim - 2))


def _is_soft(channels: int, soft_channels: Tensor) -> Tensor:
    """Bool [C]: which channels still have the soft gate."""
    return torch.arange(channels, device=soft_channels.device) < soft_channels


def _gates(prototypes: Tensor, soft_channels: Tensor | None, gamma: Tensor | None) -> Tensor:
    """Gates [N, C, *S] of values already gathered by pi, in their dtype."""
    hard = (prototypes >= 0).to(prototypes.dtype)
    if soft_channels is None or gamma is None:
        return hard
    soft = 0.5 * (1.0 + torch.erf(gamma * prototypes * INV_SQRT2))
    return torch.where(_per_channel(_is_soft(prototypes.shape[1], soft_channels), prototypes.dim()), soft, hard)


def forward(
    x: Tensor,  # [N, C, *S]
    source: Tensor | None,  # [N, >=P, *S], None: x itself
    pi: Tensor,  # int32 [C]
    alpha: Tensor,  # [C]
    beta: Tensor,  # [C]
    soft_channels: Tensor | None,  # int32 [], None: all gates hard
    gamma: Tensor | None,  # [], None with soft_channels
) -> Tensor:
    """y of the module docstring, with x's dtype and the strides of `torch.empty_like(x)`."""
    dtype, rank = alpha.dtype, x.dim()
    prototypes = (x if source is None else source).index_select(1, pi).to(dtype)
    gate = _gates(prototypes, soft_channels, gamma)
    y = x.to(dtype) * (_per_channel(alpha, rank) * gate + _per_channel(beta, rank))
    return torch.empty_like(x).copy_(y)


def backward(
    grad: Tensor,  # [N, C, *S]
    x: Tensor,  # [N, C, *S]
    source: Tensor | None,  # [N, >=P, *S]
    pi: Tensor,  # int32 [C]
    members: Tensor,  # int32 [C]; unused here, kernels walk a prototype's channels with it
    offsets: Tensor,  # int32 [P+1]; likewise
    alpha: Tensor,  # [C]
    beta: Tensor,  # [C]
    soft_channels: Tensor | None,
    gamma: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dsource, dalpha, dbeta), with g = grad and s = source (or x):

        dx[c]      = g * (alpha[c] * gate + beta[c])
        dalpha[c]  = sum over n, s of g * x * gate            dbeta[c] = sum over n, s of g * x
        dsource[p] = sum over {c < soft_channels: pi[c] = p} of g * x * alpha[c] * gamma * phi(gamma * s[p])

    phi is the standard normal density. Without a source dsource is added to dx and returned empty; it is empty too when
    all gates are hard, whose derivative is 0 (DeepShare 3.3).
    """
    dtype, rank = alpha.dtype, x.dim()
    leader = x if source is None else source
    prototypes = leader.index_select(1, pi).to(dtype)
    gate = _gates(prototypes, soft_channels, gamma)
    wide_grad = grad.to(dtype)
    grad_x = wide_grad * x.to(dtype)
    positions = [d for d in range(rank) if d != 1]
    dalpha = (grad_x * gate).sum(positions)
    dbeta = grad_x.sum(positions)
    dx = wide_grad * (_per_channel(alpha, rank) * gate + _per_channel(beta, rank))
    dsource = x.new_empty(0)
    if soft_channels is not None and gamma is not None:
        density = torch.exp(-0.5 * (gamma * prototypes).square()) * INV_SQRT_2PI
        slope = _per_channel(alpha, rank) * gamma * density
        soft = _per_channel(_is_soft(x.shape[1], soft_channels), rank)
        through_gate = torch.where(soft, grad_x * slope, torch.zeros((), dtype=dtype, device=x.device))
        if source is None:
            dx = dx.index_add(1, pi, through_gate)
        else:
            total = torch.zeros(source.shape, dtype=dtype, device=x.device).index_add(1, pi, through_gate)
            dsource = torch.empty_like(source).copy_(total)
    return torch.empty_like(x).copy_(dx), dsource, dalpha, dbeta
