"""Hard gates as bits: what a leader hands its followers (DeepShare eq. 6), one bit per prototype element.

The bits' layout stands in kernels/packing.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deepshare.kernels.layout import memory_order
from deepshare.kernels.packing import pack_bits, unpack_bits


class PackedGates(NamedTuple):
    """The gates of P prototype channels, packed in the memory order of the tensor they were computed from.

    Attributes:
        bits: uint8 [outer, P, ceil(inner / 8)] or [outer, ceil(P / 8)] (kernels/packing.py).
        prototypes: P.
        shape: of the tensor they were computed from, [N, C, *S].
        strides: of its dense form, `torch.empty_like(it)`.
    """

    bits: Tensor
    prototypes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def unpack(self) -> Tensor:
        """The gates as a bool tensor [N, P, *S], dense in the memory order they were packed in."""
        return unpack_bits(self.bits, self.prototypes, self._like())

    def fits(self, x: Tensor) -> bool:
        """Whether x, or its dense form, is stored in the order the gates were packed in."""
        if x.stride() == self.strides and x.shape == self.shape:
            return True
        return memory_order(torch.empty_like(x, device="meta")) == memory_order(self._like())

    def repack(self, x: Tensor) -> "PackedGates":
        """The same gates in the memory order of `torch.empty_like(x)`, x [N, C, *S] of the same N and S."""
        like = torch.empty_like(x, device="meta")
        return PackedGates(pack_bits(self.unpack(), like), self.prototypes, tuple(x.shape), like.stride())

    def _like(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, device="meta")


def pack_gates(gates: Tensor) -> PackedGates:
    """A bool tensor [N, P, *S] as PackedGates, in the memory order of `torch.empty_like(gates)`.

    Raises:
        TypeError: gates is not a bool tensor. ValueError: it has fewer than two dimensions.
    """
    if not isinstance(gates, Tensor) or gates.dtype != torch.bool:
        got = gates.dtype if isinstance(gates, Tensor) else type(gates).__name__
        raise TypeError(f"pack_gates: gates must be a bool tensor [N, P, *S] (got {got})")
    if gates.dim() < 2:
        raise ValueError(f"pack_gates: gates must be [N, P, *S] (got {list(gates.shape)})")
    like = torch.empty_like(gates, device="meta")
    return PackedGates(pack_bits(gates, like), gates.shape[1], tuple(gates.shape), like.stride())
