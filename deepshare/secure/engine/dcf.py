"""The distributed comparison function of the DCF gate, a party's side: its share of [u < alpha] from its key."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepshare.raw_ops import dcf_missing
from deepshare.secure.engine.aes import BLOCK_BYTES, BLOCK_WORDS, KEY_BYTES, FixedKeyHash
from deepshare.secure.engine.operands import check_choice, check_tensor, is_native

LEAF_LEVELS = 7  # the last levels of the tree stand in one leaf of 2^7 bits, a block
FEWEST_BITS, MOST_BITS = LEAF_LEVELS + 1, 63
# The low three bits of a block are no part of the seed: the control bit of a left child, of a right child, the value.
SEED = ~np.uint64(7)
VALUE = np.uint64(2)  # place of the value bit
LEAF = np.uint64(2)  # what is added to a seed to hash it to its leaf; 0 and 1 hash it to its children
_GATES_AT_ONCE = 8192  # arrays of a level then fit into the second-level cache: 1.4 times faster at 557,056 gates
ONE = np.uint64(1)

Words = NDArray[np.uint64]


def key_bytes(bits: int) -> int:
    """Bytes of a gate's key: a correction word of 16 bytes for each of bits - 7 levels and for the leaf.

    The same key goes to both parties. The 16 bytes of a root are not in it: each party draws its own.

    Raises:
        ValueError: bits is not an int in 8..63.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not FEWEST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"dcf: bits must be an int in {FEWEST_BITS}..{MOST_BITS} (got {bits!r})")
    return BLOCK_BYTES * (bits - LEAF_LEVELS + 1)


def evaluate(
    keys: Tensor,  # uint8 [G, key_bytes(bits)]
    roots: Tensor,  # uint8 [G, 16]
    points: Tensor,  # int64 [G]
    *,
    public_key: bytes,
    party: int,
    bits: int,
    backend: str | None = None,
) -> Tensor:  # uint8 [ceil(G / 8)]
    """One party's xor share of [u < alpha] for each of G gates, u the low `bits` bits of its point, unsigned.

    The DCF of Boyle, Chandran, Gilboa, Gupta, Ishai, Kumar, Rathee 2021 ("Function secret sharing for mixed-mode and
    fixed-point secure computation", figure 1) with payload 1 in F_2, ended 7 levels early in one 128-bit leaf. A party
    walks from its root (seed s, control bit t = party) along the bits c of u, the highest first, with H of `aes.py`:

        B = H(s ^ c) ^ t * correction[level];   s, t, v = B without its low 3 bits, bit c of B, v ^ bit 2 of B

    and ends with v ^ bit (u mod 128) of H(s ^ 2) ^ t * correction[leaf]. The two parties' results differ (xor) by
    [u < alpha]. One AES call a level; no branch and no memory access depends on anything but the public point.

    Args:
        keys: the correction words, as `dealer.dcf_keys.generate` made them; the same at both parties.
        roots: this party's, uniform; the low three bits of byte 0 are not used.
        points: public, the same at both parties.
        public_key: AES key of 16 bytes, that of the keys' generation.
        party: 0 or 1.
        bits: width of the comparison, 8..63.
        backend: "native" (AES instructions), "reference" (numpy), or None: native where it runs. The same bytes.

    Returns:
        Packed: gate g is bit g % 8 of byte g // 8, spare bits are 0.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    size = key_bytes(bits)
    check_key("dcf.evaluate", public_key)
    check_choice("dcf.evaluate", "party", party, (0, 1))
    check_tensor("dcf.evaluate", "points", points, torch.int64, (None,))
    gates = points.shape[0]
    check_tensor("dcf.evaluate", "keys", keys, torch.uint8, (gates, size))
    check_tensor("dcf.evaluate", "roots", roots, torch.uint8, (gates, BLOCK_BYTES))
    keys, roots, points = keys.contiguous(), roots.contiguous(), points.contiguous()
    if is_native("dcf.evaluate", backend, dcf_missing()):
        key = torch.frombuffer(bytearray(public_key), dtype=torch.uint8)
        return torch.ops.deepshare.dcf_evaluate_native(keys, roots, points, key, party, bits)
    digest = FixedKeyHash(public_key)
    shares = np.zeros(gates, dtype=np.uint8)
    for some in blocks_of_gates(gates):
        shares[some] = _walk(as_blocks(keys[some]), as_blocks(roots[some]), points[some].numpy(), digest, party, bits)
    return torch.from_numpy(np.packbits(shares, bitorder="little"))


def _walk(
    corrections: Words, roots: Words, points: NDArray[np.int64], digest: FixedKeyHash, party: int, bits: int
) -> Words:
    """This party's share of each gate, unpacked; corrections [G, levels + 1, 2], roots [G, 1, 2]."""
    block, levels = roots[:, 0].copy(), bits - LEAF_LEVELS
    u = points.view(np.uint64)
    taken = np.full(len(u), -party, dtype=np.int64).view(np.uint64)  # all ones where the control bit is set
    value = np.zeros_like(u)
    for level in range(levels):
        right = u >> np.uint64(bits - 1 - level) & ONE
        block[:, 0] = block[:, 0] & SEED | right
        block = digest(block)
        block ^= corrections[:, level] & taken[:, None]
        value ^= block[:, 0]
        taken = -(block[:, 0] >> right & ONE)
    block[:, 0] = block[:, 0] & SEED | LEAF
    leaf = digest(block) ^ corrections[:, levels] & taken[:, None]
    half = np.where(u >> np.uint64(6) & ONE, leaf[:, 1], leaf[:, 0])
    return (value >> VALUE ^ half >> (u & np.uint64(63))) & ONE


def as_blocks(tensor: Tensor) -> Words:
    """Uint64 [G, blocks, 2] on the memory of a contiguous uint8 [G, 16 * blocks]."""
    return tensor.numpy().view("<u8").reshape(tensor.shape[0], -1, BLOCK_WORDS)


def blocks_of_gates(gates: int) -> list[slice]:
    """[0, G) in pieces for numpy to work on."""
    return [slice(first, min(first + _GATES_AT_ONCE, gates)) for first in range(0, gates, _GATES_AT_ONCE)]


def check_key(function: str, public_key: bytes) -> None:
    """Passes an AES key of 16 bytes; else TypeError or ValueError."""
    if not isinstance(public_key, bytes):
        raise TypeError(f"{function}: public_key must be bytes (got {type(public_key).__name__})")
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"{function}: public_key must be {KEY_BYTES} bytes (got {len(public_key)})")
