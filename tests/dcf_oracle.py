"""The distributed comparison function again, a gate at a time on Python's integers: figure 1 of Boyle et al. 2021.

A seed, its control bit t and its value v are kept apart here, as the paper keeps them (packed: docs/gates.md).
"""

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

LEFT, RIGHT, LEAF = 0, 1, 2
ALL = 2**128 - 1


class Oracle:
    """Gates under one public key."""

    def __init__(self, public_key: bytes, bits: int) -> None:
        self._cipher = Cipher(AES(public_key), ECB()).encryptor()
        self._levels = bits - 7

    def _hash(self, block: int) -> int:
        return int.from_bytes(self._cipher.update(block.to_bytes(16, "little")), "little") ^ block

    def _child(self, seed: int, side: int) -> tuple[int, int, int]:
        """(seed, t, v): the upper 125 bits, bit 0 of a left or bit 1 of a right child, bit 2."""
        block = self._hash(seed << 3 | side)
        return block >> 3, block >> side & 1, block >> 2 & 1

    def generate(self, alpha: int, roots: tuple[bytes, bytes]) -> bytes:
        """The correction words."""
        s, t, offset = [int.from_bytes(root, "little") >> 3 for root in roots], [0, 1], 0
        key = b""
        for level in range(self._levels):
            keep = alpha >> (6 + self._levels - level) & 1
            lose = 1 - keep
            child = [[self._child(seed, side) for side in (LEFT, RIGHT)] for seed in s]
            s_word = child[0][lose][0] ^ child[1][lose][0]
            v_word = child[0][lose][2] ^ child[1][lose][2] ^ offset ^ (lose == LEFT)
            t_words = [child[0][side][1] ^ child[1][side][1] ^ keep ^ (side == LEFT) for side in (LEFT, RIGHT)]
            offset ^= child[0][keep][2] ^ child[1][keep][2] ^ v_word
            s, t = (
                [child[b][keep][0] ^ t[b] * s_word for b in range(2)],
                [child[b][keep][1] ^ t[b] * t_words[keep] for b in range(2)],
            )
            key += (s_word << 3 | v_word << 2 | t_words[RIGHT] << 1 | t_words[LEFT]).to_bytes(16, "little")
        step = (1 << alpha % 128) - 1
        leaf = self._hash(s[0] << 3 | LEAF) ^ self._hash(s[1] << 3 | LEAF) ^ step ^ offset * ALL
        return key + leaf.to_bytes(16, "little")

    def evaluate(self, party: int, key: bytes, root: bytes, point: int) -> int:
        """The party's share of [point < alpha]."""
        words = [int.from_bytes(key[at : at + 16], "little") for at in range(0, len(key), 16)]
        s, t, share = int.from_bytes(root, "little") >> 3, party, 0
        for level in range(self._levels):
            side, word = point >> (6 + self._levels - level) & 1, words[level]
            child = self._child(s, side)
            share ^= child[2] ^ t * (word >> 2 & 1)
            s, t = child[0] ^ t * (word >> 3), child[1] ^ t * (word >> side & 1)
        return share ^ (self._hash(s << 3 | LEAF) ^ t * words[-1]) >> point % 128 & 1
