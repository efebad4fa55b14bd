"""The distributed comparison function of the DCF gate, the dealer's side: keys from thresholds and roots."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepshare.raw_ops import dcf_missing
from deepshare.secure.engine.aes import BLOCK_BYTES, BLOCK_WORDS, FixedKeyHash
from deepshare.secure.engine.dcf import (
    LEAF,
    LEAF_LEVELS,
    ONE,
    SEED,
    VALUE,
    Words,
    as_blocks,
    blocks_of_gates,
    check_key,
    key_bytes,
)
from deepshare.secure.engine.operands import check_tensor, is_native


def generate(
    alphas: Tensor,  # int64 [G]
    roots0: Tensor,  # uint8 [G, 16]
    roots1: Tensor,  # uint8 [G, 16]
    *,
    public_key: bytes,
    bits: int,
    backend: str | None = None,
) -> Tensor:  # uint8 [G, key_bytes(bits)]
    """The keys (correction words) of G gates, for both parties, with which `engine.dcf.evaluate` compares to alpha.

    Gen of Boyle et al. 2021, figure 1, in F_2 (see `evaluate`). On alpha's path the parties' control bits differ. With
    D_L, D_R the xor of both parties' left and right blocks H(s), H(s ^ 1), a the level's bit of alpha and V the xor of
    both parties' values so far, a correction word makes both agree in all on the child that alpha leaves:

        correction = (a ? D_L : D_R) with bit 0: D_L ^ a ^ 1,   bit 1: D_R ^ a,   bit 2: that child's ^ V ^ a
        leaf:        xor of both H(s ^ 2) ^ (V for all) ^ (bit j: [j < alpha mod 128])

    Every word is masked by blocks of the party that does not read it: alone it is uniform. No branch and no memory
    access depends on an alpha or a root.

    Args:
        alphas: thresholds, their low `bits` bits, unsigned.
        roots0, roots1: the parties' roots, uniform, drawn for this key alone.
        public_key: AES key of 16 bytes, fresh for each inference.
        bits: width of the comparison, 8..63.
        backend: as in `evaluate`.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    size = key_bytes(bits)
    check_key("dcf_keys.generate", public_key)
    check_tensor("dcf_keys.generate", "alphas", alphas, torch.int64, (None,))
    gates = alphas.shape[0]
    for name, roots in (("roots0", roots0), ("roots1", roots1)):
        check_tensor("dcf_keys.generate", name, roots, torch.uint8, (gates, BLOCK_BYTES))
    alphas, roots0, roots1 = alphas.contiguous(), roots0.contiguous(), roots1.contiguous()
    if is_native("dcf_keys.generate", backend, dcf_missing()):
        key = torch.frombuffer(bytearray(public_key), dtype=torch.uint8)
        return torch.ops.deepshare.dcf_generate_native(alphas, roots0, roots1, key, bits)
    digest = FixedKeyHash(public_key)
    keys = torch.empty((gates, size), dtype=torch.uint8)
    for some in blocks_of_gates(gates):
        roots_of_both = np.stack([as_blocks(roots[some])[:, 0] for roots in (roots0, roots1)])
        _descend(as_blocks(keys[some]), roots_of_both, alphas[some].numpy(), digest, bits)
    return keys


def _descend(corrections: Words, seeds: Words, alphas: NDArray[np.int64], digest: FixedKeyHash, bits: int) -> None:
    """Writes the correction words [G, levels + 1, 2] while both parties' blocks [2, G, 2] go down alpha's path."""
    alpha, levels = alphas.view(np.uint64), bits - LEAF_LEVELS
    taken = np.zeros_like(alpha)  # all ones where party 0's control bit is set; party 1's is the other
    value = np.zeros_like(alpha)
    children = np.empty((2, *seeds.shape), dtype=np.uint64)  # [left or right, party, G, 2]
    seeds[..., 0] &= SEED
    for level in range(levels):
        right = alpha >> np.uint64(bits - 1 - level) & ONE
        children[0] = children[1] = seeds
        children[1, ..., 0] |= ONE
        blocks = digest(children)
        kept = blocks[0] ^ (blocks[0] ^ blocks[1]) & -right[:, None]
        correction = _correction(blocks[:, 0] ^ blocks[:, 1], right, value)
        corrections[:, level] = correction
        seeds = kept
        seeds[0] ^= correction & taken[:, None]
        seeds[1] ^= correction & ~taken[:, None]
        value ^= seeds[0, :, 0] ^ seeds[1, :, 0]
        taken = -(seeds[0, :, 0] >> right & ONE)
        seeds[..., 0] &= SEED
    seeds[..., 0] |= LEAF
    leaves = digest(seeds)
    corrections[:, levels] = leaves[0] ^ leaves[1] ^ -(value >> VALUE & ONE)[:, None] ^ _below(alpha)


def _correction(difference: Words, right: Words, value: Words) -> Words:
    """A level's correction word [G, 2] from the xor of both parties' children [2, G, 2]."""
    left_child, right_child = difference
    lost = right_child ^ (left_child ^ right_child) & -right[:, None]
    low = lost[:, 0] & ~np.uint64(3) | left_child[:, 0] & ONE | right_child[:, 0] & np.uint64(2)
    lost[:, 0] = low ^ ONE ^ -right & np.uint64(7) ^ value & ONE << VALUE
    return lost


def _below(alpha: Words) -> Words:
    """Blocks whose bit j is [j < alpha mod 128]."""
    upper = -(alpha >> np.uint64(6) & ONE)
    part = (ONE << (alpha & np.uint64(63))) - ONE
    return np.stack([part | upper, part & upper], axis=-1).reshape(-1, BLOCK_WORDS)
