"""Packed gates: one bit per prototype element, in runs along the innermost stored dimension.

With x stored as (outer, C, inner) (layout.py) the gates of P prototypes are uint8
    [outer, P, ceil(inner / 8)]   inner > 1: the gate at position i is bit i % 8 of byte i // 8 of its run
    [outer, ceil(P / 8)]          inner = 1: the gate of prototype p is bit p % 8 of byte p // 8
and the bits beyond a run are 0.
"""

import math

import torch
from torch import Tensor

from .layout import CHANNEL_DIM, geometry, memory_order


def packed_shape(like: Tensor, prototypes: int) -> tuple[int, ...]:
    """The shape of the packed gates of a dense tensor."""
    outer, _, inner = geometry(like)
    return (outer, (prototypes + 7) // 8) if inner == 1 else (outer, prototypes, (inner + 7) // 8)


def packed_prototypes(bits: Tensor) -> int:
    """P of packed gates; where prototypes lie in whole bytes, P rounded up to those."""
    return 8 * bits.shape[1] if bits.dim() == 2 else bits.shape[1]


def pack_bits(gates: Tensor, like: Tensor) -> Tensor:
    """Packs bool [N, P, *S] in the memory order of the dense tensor `like` [N, C, *S]."""
    order = memory_order(like)
    runs = _runs(gates.permute(order), order)
    padded = torch.nn.functional.pad(runs.to(torch.int32), (0, -runs.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=gates.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def unpack_bits(bits: Tensor, prototypes: int, like: Tensor) -> Tensor:
    """Bool [N, P, *S], dense in the memory order of the dense tensor `like` [N, C, *S], whose gates they are."""
    order = memory_order(like)
    stored = [prototypes if d == CHANNEL_DIM else like.shape[d] for d in order]
    run = _runs(torch.empty(stored, device="meta"), order).shape[-1]
    each = bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    flat = each.flatten(-2)[..., :run].bool()
    return flat.reshape(stored).permute([order.index(d) for d in range(len(order))])


def _runs(stored: Tensor, order: list[int]) -> Tensor:
    """A tensor with its dimensions in storage order as [outer, P, inner], or as [outer, P] where inner is 1."""
    at = order.index(CHANNEL_DIM)
    outer, inner = math.prod(stored.shape[:at]), math.prod(stored.shape[at + 1 :])
    channels = stored.shape[at]
    return stored.reshape(outer, channels) if inner == 1 else stored.reshape(outer, channels, inner)
