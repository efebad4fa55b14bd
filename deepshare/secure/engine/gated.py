"""The gated product x * (alpha gate + beta) at one party: what of it does not depend on the input, and the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepshare.channel_map import ChannelMap
from deepshare.packed_gates import PackedGates
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.share import shared_relu_share


@dataclass(frozen=True)
class GatedConstants:
    """`shared_relu_share`'s arguments but for e and z (docs/share.md)."""

    alpha: Tensor
    beta: Tensor
    flip: Tensor
    offset: Tensor
    toggle: Tensor
    scale: Tensor | None
    shift: int

    def product(self, opened: Tensor, gates: PackedGates, channel_map: ChannelMap, party: int) -> Tensor:
        """This party's share of x * (alpha gate + beta)."""
        return shared_relu_share(
            opened,
            gates,
            channel_map,
            self.alpha,
            self.beta,
            self.flip,
            self.offset,
            self.toggle,
            party=party,
            shift=self.shift,
            scale=self.scale,
        )


def with_unit(mask: Tensor, flip: Tensor, product: Tensor, party: int) -> GatedConstants:
    """ReLU: alpha = 1 and beta = 0 as integers, no truncation.

    Args:
        mask: a_i [N, C, *S]; flip: r_i [N, P, *S]; product: [ar]_i.
    """
    ones = torch.ones(mask.shape[1], dtype=torch.int64, device=mask.device)
    zeros = torch.zeros_like(ones)
    return GatedConstants(ones if party == 0 else zeros, zeros, flip, product, mask - 2 * product, ones, 0)


def with_public(alpha: Tensor, beta: Tensor, mask: Tensor, flip: Tensor, product: Tensor, party: int) -> GatedConstants:
    """Both parties know alpha and beta [C, 1, 1]; party 0's shares of them are the whole."""
    scaled = alpha * product
    offset, toggle = beta * mask + scaled, alpha * mask - 2 * scaled
    scale, own = alpha.reshape(-1), (alpha.reshape(-1), beta.reshape(-1))
    zeros = torch.zeros_like(scale)
    return GatedConstants(*(own if party == 0 else (zeros, zeros)), flip, offset, toggle, scale, SCALE_BITS)


def with_secret(
    own: tuple[Tensor, Tensor], masked: tuple[Tensor, Tensor], mask: Tensor, flip: Tensor, products: list[Tensor]
) -> GatedConstants:
    """alpha = F_alpha + A and beta = F_beta + B with masks that the server alone knows.

    Args:
        own: this party's shares of alpha and beta [C]: the server's are the whole, the client's 0.
        masked: F_alpha, F_beta [C, 1, 1].
        flip: r_i gathered by pi, [N, C, *S].
        products: shares of [ar], [Ar], [aB + aAr], [aA - 2aAr].
    """
    alpha, beta = masked
    product, with_mask, of_offset, of_toggle = products
    scaled = alpha * product
    offset, toggle = beta * mask + scaled + of_offset, alpha * mask - 2 * scaled + of_toggle
    return GatedConstants(*own, alpha * flip + with_mask, offset, toggle, None, SCALE_BITS)
