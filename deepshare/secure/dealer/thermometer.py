"""What the carry tree's dealer shares of a mask: the thermometer code of each of its 4-bit blocks."""

import numpy as np
import torch
from torch import Tensor

from deepshare.secure.engine.carry import BLOCK_BITS, WIDTHS
from deepshare.secure.engine.operands import check_choice, check_tensor


def thermometer(masks: Tensor, *, bits: int) -> Tensor:
    """w = (2 << block) - 1, so bit t of w is [block >= t], of each 4-bit block of a' = a << 1 mod 2^bits.

    Args:
        masks: a, int64 [G]; secret: no branch and no memory access depends on it.
        bits: m, 64 or 32.

    Returns:
        int16 [m / 4, G], block 0 the lowest: plain, to be xor-shared.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
    """
    check_choice("thermometer", "bits", bits, WIDTHS)
    check_tensor("thermometer", "masks", masks, torch.int64, (None,))
    shifted = masks.contiguous().numpy().view(np.uint64) << np.uint64(1)
    words = np.empty((bits // BLOCK_BITS, len(shifted)), dtype=np.uint16)
    for block, word in enumerate(words):
        digit = (shifted >> np.uint64(BLOCK_BITS * block)).astype(np.uint16) & np.uint16(15)
        word[:] = (np.uint16(2) << digit) - np.uint16(1)  # 2 << 15 is 0 in 16 bits, so that 15 gives all ones
    return torch.from_numpy(words.view(np.int16))
