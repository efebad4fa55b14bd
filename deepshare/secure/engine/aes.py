"""Fixed-key AES-128 as a hash of 16-byte blocks, on arrays of them."""

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
BLOCK_BYTES = 16
BLOCK_WORDS = 2  # a block as two little-endian 64-bit words, the low one first


class FixedKeyHash:
    """H(x) = AES-128(K, x) ^ x, the Matyas-Meyer-Oseas form with a fixed, public key K.

    H(s), H(s ^ 1), ... is a pseudo-random generator of the seed s if AES under K is an ideal permutation (Guo, Katz,
    Wang, Yu 2020, "Efficient and secure multiparty computation from fixed-key block ciphers"). One attack by table
    works on all seeds hashed under one K at once, so K is drawn afresh for every inference.

    AES is that of the `cryptography` package (OpenSSL): table-free, in constant time on processors with AES
    instructions.
    """

    def __init__(self, public_key: bytes) -> None:
        # here, because the native form does without the package
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import ECB

        self._cipher = Cipher(AES(public_key), ECB()).encryptor()

    def __call__(self, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """H of each block of a C-contiguous uint64 [..., 2]."""
        # OpenSSL wants room for a block more, less a byte
        encrypted = np.empty(blocks.size + BLOCK_WORDS, dtype=np.uint64)
        self._cipher.update_into(blocks.data.cast("B"), encrypted.data.cast("B"))
        return encrypted[: blocks.size].reshape(blocks.shape) ^ blocks
