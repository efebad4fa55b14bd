"""Random streams of an inference: AES-128 in counter mode under a key of the operating system's, one stream a wire."""

import numpy as np
import torch
from torch import Tensor

KEY_BYTES = 16
_BLOCK_BYTES = 16


class Stream:
    """Everything one party draws for one inference, by wire number.

    The counter block of wire w begins with w in 64 bits, then counts from 0: streams of two wires never meet, and two
    inferences never share a key. A wire is drawn once: drawn twice, it would mask two secrets alike.

    Args:
        key: 16 uniform bytes.

    Raises:
        ValueError: a key of another length; a wire drawn for the second time.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Stream: key must have {KEY_BYTES} bytes (got {len(key)})")
        self._key = bytes(key)
        self._drawn: set[int] = set()

    def bytes(self, wire: int, count: int) -> Tensor:
        """`count` uniform bytes, uint8 [count]."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        if wire in self._drawn:
            raise ValueError(f"Stream: wire {wire} was drawn before; each is drawn once")
        self._drawn.add(wire)
        counter = modes.CTR(wire.to_bytes(8, "big") + bytes(_BLOCK_BYTES - 8))
        drawn = np.empty(count + _BLOCK_BYTES - 1, dtype=np.uint8)
        Cipher(algorithms.AES128(self._key), counter).encryptor().update_into(
            np.zeros(count, np.uint8).data, drawn.data
        )
        return torch.from_numpy(drawn[:count])

    def words(self, wire: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform elements of Z_2^64, int64 of this shape."""
        count = int(np.prod(shape, dtype=np.int64))
        return self.bytes(wire, 8 * count).view(torch.int64).reshape(shape)
