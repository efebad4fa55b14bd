"""The carry tree's local steps: generate and propagate bits of e + a from the opened e and shares of a's blocks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepshare.raw_ops import carry_missing
from deepshare.secure.engine.operands import check_choice, check_tensor, is_native

BLOCK_BITS = 4
WIDTHS = (32, 64)


def leaves(
    words: Tensor,  # int16 [m / 4, G]
    opened: Tensor,  # int64 [G]
    *,
    bits: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One party's xor shares of the generate and propagate bits of each 4-bit block of e' + a', packed.

    e' = (e << 1) | 1 and a' = a << 1 mod 2^m: the carry out of m bits of e' + a' is that out of the low m - 1 of e + a.
    With s a block's value in e' and w the share of its thermometer code in a' (bit t is [block >= t]):

        generate = bit (16 - s) of w = [block + s >= 16]  (0 for s = 0),   propagate = generate ^ bit (15 - s) of w

    Linear in w over F_2, so that both parties do the same. Only the public e chooses which bit is read.

    Args:
        words: this party's share, as `dealer.thermometer.thermometer` orders it.
        opened: e, public.
        bits: m, 64 or 32.
        backend: "native", "reference" (numpy), or None: native where it was built. The same bytes.

    Returns:
        (generate, propagate), each uint8 [m / 4, ceil(G / 8)] as by `pack`, block 0 the lowest.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    check_choice("carry.leaves", "bits", bits, WIDTHS)
    check_tensor("carry.leaves", "opened", opened, torch.int64, (None,))
    check_tensor("carry.leaves", "words", words, torch.int16, (bits // BLOCK_BITS, opened.shape[0]))
    words, opened = words.contiguous(), opened.contiguous()
    if is_native("carry.leaves", backend, carry_missing()):
        return torch.ops.deepshare.carry_leaves_native(words, opened)
    generate, propagate = _leaves(words.numpy().view(np.uint16), opened.numpy().view(np.uint64))
    return torch.from_numpy(generate), torch.from_numpy(propagate)


def _leaves(words: NDArray[np.uint16], opened: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    raised = opened << np.uint64(1) | np.uint64(1)
    generate = np.empty((len(words), (len(opened) + 7) // 8), dtype=np.uint8)
    propagate = np.empty_like(generate)
    for block, word in enumerate(words):
        digit = (raised >> np.uint64(BLOCK_BITS * block)).astype(np.uint16) & np.uint16(15)
        read = word >> (np.uint16(15) - digit)  # bit 15 - s of w, now the lowest, and bit 16 - s above it
        above = read >> np.uint16(1) & np.uint16(1)
        generate[block] = np.packbits(above.astype(np.uint8), bitorder="little")
        propagate[block] = np.packbits(((read ^ above) & np.uint16(1)).astype(np.uint8), bitorder="little")
    return generate, propagate


def pack(bits: Tensor) -> Tensor:
    """uint8 [..., ceil(G / 8)] of uint8 (0 or 1) or bool [..., G]: gate g is bit g % 8 of byte g // 8, spare bits 0.

    Raises:
        TypeError: bits is no CPU tensor of uint8 or bool.
    """
    if not isinstance(bits, Tensor) or bits.dtype not in (torch.uint8, torch.bool) or bits.device.type != "cpu":
        got = f"{bits.dtype} on {bits.device}" if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"carry.pack: bits must be a uint8 or bool CPU tensor (got {got})")
    return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))


def unpack(packed: Tensor, gates: int) -> Tensor:
    """uint8 [..., G], 0 or 1, of packed uint8 [..., ceil(G / 8)].

    Raises:
        TypeError: packed is no uint8 CPU tensor.
        ValueError: its last size is not ceil(G / 8).
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.device.type != "cpu":
        got = f"{packed.dtype} on {packed.device}" if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"carry.unpack: packed must be a uint8 CPU tensor (got {got})")
    if packed.dim() == 0 or packed.shape[-1] != (gates + 7) // 8:
        raise ValueError(f"carry.unpack: packed must be [..., {(gates + 7) // 8}] (got {list(packed.shape)})")
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=gates, bitorder="little"))
