"""Xor shares of the carry into the top bit of e + a, by either backend (docs/engine.md, Comparison)."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepshare.secure.engine import carry, dcf

Exchange = Callable[[Tensor], Tensor]  # sends uint8 bytes and returns as many of the other party's


def dcf_carry(opened: Tensor, material: list[Tensor], *, public_key: bytes, party: int, bits: int) -> Tensor:
    """carry = [~e_low < a_low], evaluated locally; packed uint8 [ceil(G / 8)].

    Args:
        opened: e, int64 [G].
        material: roots [G, 16] and keys.
        bits: m; m - 1 of them are compared.
    """
    roots, keys = material
    return dcf.evaluate(keys, roots, ~opened, public_key=public_key, party=party, bits=bits - 1)


def tree_carry(opened: Tensor, material: list[Tensor], exchange: Exchange, *, party: int, bits: int) -> Tensor:
    """(g, p)_hi o (g, p)_lo = (g_hi ^ p_hi g_lo, p_hi p_lo) over the blocks, one exchange a level; node 0 needs no p.

    Args:
        opened: e, int64 [G].
        material: thermometer words [blocks, G, 2]; then per level the ANDs' masks and products.
        bits: m.
    """
    words, *levels = material
    g, p = carry.leaves(words.view(torch.int16).squeeze(-1), opened, bits=bits)
    for masks, dealt in zip(levels[0::2], levels[1::2], strict=True):
        own = torch.cat([p[1::2], g[0::2], p[2::2]]) ^ masks
        both = own ^ exchange(own).reshape(own.shape)
        with_g, with_p = _ands(both, masks, dealt, party)
        g = g[1::2] ^ with_g
        p = torch.cat([torch.zeros_like(g[:1]), with_p])
    return g[0]


def _ands(opened: Tensor, masks: Tensor, dealt: Tensor, party: int) -> tuple[Tensor, Tensor]:
    """Xor shares of p_hi g_lo for every node, of p_hi p_lo for all but the first: Beaver's, with one mask for p_hi."""
    nodes = (len(masks) + 1) // 3
    d, of_g, of_p = opened.split([nodes, nodes, nodes - 1])
    m, mask_g, mask_p = masks.split([nodes, nodes, nodes - 1])
    with_g, with_p = dealt.split([nodes, nodes - 1])
    with_g = with_g ^ (d & mask_g) ^ (m & of_g)
    with_p = with_p ^ (d[1:] & mask_p) ^ (m[1:] & of_p)
    return (with_g ^ (d & of_g), with_p ^ (d[1:] & of_p)) if party == 0 else (with_g, with_p)
