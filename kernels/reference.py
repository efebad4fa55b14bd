"""The operators in plain PyTorch: the specification every other backend is held to.

    z[n, c, s]    = x[n, c, s], or x + residual rounded to x's dtype
    gate[n, c, s] = Phi(gamma * source[n, pi[c], s])   where c < soft_channels   (transitional GELU phase)
                    1[source[n, pi[c], s] >= 0]        elsewhere                 (DReLU, DeepShare eq. 1)
    y[n, c, s]    = z[n, c, s] * (alpha[c] * gate[n, c, s] + beta[c])            (DeepShare eq. 3 and 6)

Shapes: x, residual, y, grad, dx [N, C, *S]; source, dsource [N, >=P, *S]; gates: packing.py; pi, members [C]; offsets
[P+1]; alpha, beta and their gradients [C]. Arithmetic and gradient sums are in alpha's dtype (float64 for float64 x,
else float32). The contract: docs/shared_relu.md.
"""

import math

import torch
from torch import Tensor

from .packing import pack_bits, packed_prototypes, unpack_bits

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


def _leader(x: Tensor, z: Tensor, source: Tensor | None, gates: Tensor | None) -> Tensor:
    """The tensor [N, >=P, *S] whose values or signs give the gates; packed ones lie as x does, z may lie otherwise."""
    if gates is not None:
        return unpack_bits(gates, packed_prototypes(gates), torch.empty_like(x)).to(z.dtype) - 0.5
    return z if source is None else source


def shared_relu(
    x: Tensor,  # [N, C, *S]
    residual: Tensor | None,  # [N, C, *S], None: z is x
    source: Tensor | None,  # [N, >=P, *S], None: z itself
    gates: Tensor | None,  # packed gates in place of a source, all of them hard
    pi: Tensor,  # int32 [C]
    alpha: Tensor,  # [C]
    beta: Tensor,  # [C]
    soft_channels: Tensor | None,  # int32 [], None: all gates hard
    gamma: Tensor | None,  # [], None with soft_channels
) -> Tensor:
    """y of the module docstring, with x's dtype and the strides of `torch.empty_like(x)`."""
    dtype, rank = alpha.dtype, x.dim()
    z = x if residual is None else x + residual
    prototypes = _leader(x, z, source, gates).index_select(1, pi).to(dtype)
    gate = _gates(prototypes, soft_channels, gamma)
    y = z.to(dtype) * (_per_channel(alpha, rank) * gate + _per_channel(beta, rank))
    return torch.empty_like(x).copy_(y)


def shared_relu_emit(
    x: Tensor, residual: Tensor | None, pi: Tensor, alpha: Tensor, beta: Tensor, prototypes: int
) -> tuple[Tensor, Tensor]:
    """(y for z's own hard gates, these gates packed in y's memory order)."""
    y = shared_relu(x, residual, None, None, pi, alpha, beta, None, None)
    z = x if residual is None else x + residual
    opens = torch.empty_like(y[:, :prototypes], dtype=torch.bool).copy_(z[:, :prototypes] >= 0)
    return y, pack_bits(opens, torch.empty_like(y))


def shared_relu_backward(
    grad: Tensor,  # [N, C, *S]
    x: Tensor,  # [N, C, *S]
    residual: Tensor | None,  # [N, C, *S]
    source: Tensor | None,  # [N, >=P, *S]
    gates: Tensor | None,
    pi: Tensor,  # int32 [C]
    members: Tensor,  # int32 [C]; unused here, kernels walk a prototype's channels with it
    offsets: Tensor,  # int32 [P+1]; likewise
    alpha: Tensor,  # [C]
    beta: Tensor,  # [C]
    soft_channels: Tensor | None,
    gamma: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dsource, dalpha, dbeta), with g = grad and s = source (or z); dx is the gradient of x and of residual:

        dx[c]      = g * (alpha[c] * gate + beta[c])
        dalpha[c]  = sum over n, s of g * z * gate            dbeta[c] = sum over n, s of g * z
        dsource[p] = sum over {c < soft_channels: pi[c] = p} of g * z * alpha[c] * gamma * phi(gamma * s[p])

    phi is the standard normal density. Without a source dsource is added to dx and returned empty; it is empty too when
    all gates are hard, whose derivative is 0 (DeepShare 3.3).
    """
    dtype, rank = alpha.dtype, x.dim()
    z = x if residual is None else x + residual
    leader = _leader(x, z, source, gates)
    prototypes = leader.index_select(1, pi).to(dtype)
    gate = _gates(prototypes, soft_channels, gamma)
    wide_grad = grad.to(dtype)
    grad_z = wide_grad * z.to(dtype)
    positions = [d for d in range(rank) if d != 1]
    dalpha = (grad_z * gate).sum(positions)
    dbeta = grad_z.sum(positions)
    dx = wide_grad * (_per_channel(alpha, rank) * gate + _per_channel(beta, rank))
    dsource = x.new_empty(0)
    if soft_channels is not None and gamma is not None:
        density = torch.exp(-0.5 * (gamma * prototypes).square()) * INV_SQRT_2PI
        slope = _per_channel(alpha, rank) * gamma * density
        soft = _per_channel(_is_soft(x.shape[1], soft_channels), rank)
        through_gate = torch.where(soft, grad_z * slope, torch.zeros((), dtype=dtype, device=x.device))
        if source is None:
            dx = dx.index_add(1, pi, through_gate)
        else:
            total = torch.zeros(source.shape, dtype=dtype, device=x.device).index_add(1, pi, through_gate)
            dsource = torch.empty_like(source).copy_(total)
    return torch.empty_like(x).copy_(dx), dsource, dalpha, dbeta


def masked_relu(
    x: Tensor,  # [N, C, *S]
    mask: Tensor,  # [C, *S], accumulation dtype
) -> Tensor:
    """y = mask * relu(x) + (1 - mask) * x (SNL eq. 2) = x * (1 where x >= 0, else 1 - mask)."""
    factor = torch.where(x >= 0, torch.ones_like(mask), 1 - mask)
    return torch.empty_like(x).copy_(x.to(mask.dtype) * factor)


def masked_relu_backward(grad: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dmask): dx = grad * (1 where x >= 0, else 1 - mask), dmask = -sum over n where not x >= 0 of grad * x."""
    opens = x >= 0
    wide_grad = grad.to(mask.dtype)
    dx = wide_grad * torch.where(opens, torch.ones_like(mask), 1 - mask)
    terms = torch.where(opens, torch.zeros_like(mask), -wide_grad * x.to(mask.dtype))
    return torch.empty_like(x).copy_(dx), torch.empty_like(mask).copy_(terms.sum(0))


def shared_relu_share(
    opened: Tensor,  # int64 [N, C, *S]
    gates: Tensor,  # packed, in the memory order of torch.empty_like(opened)
    pi: Tensor,  # int32 [C]
    alpha: Tensor,  # int64 [C]
    beta: Tensor,  # int64 [C]
    flip: Tensor,  # int64 [N, C, *S], with a scale [N, >=P, *S]
    scale: Tensor | None,  # int64 [C]
    offset: Tensor,  # int64 [N, C, *S]
    toggle: Tensor,  # int64 [N, C, *S]
    shift: int,
    party: int,
) -> Tensor:
    """One party's share of x * (alpha * gate + beta) in Z_2^64, truncated by `shift` bits (deepshare/share.py)."""
    rank = opened.dim()
    bits = unpack_bits(gates, packed_prototypes(gates), torch.empty_like(opened)).index_select(1, pi).to(torch.int64)
    f = flip if scale is None else _per_channel(scale, rank) * flip.index_select(1, pi)
    slope = _per_channel(beta, rank) + f + bits * (_per_channel(alpha, rank) - 2 * f)
    y = opened * slope + offset + bits * toggle
    return torch.empty_like(opened).copy_(y >> shift if party == 0 else -(-y >> shift))
