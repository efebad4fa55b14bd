"""Activation modules: what a plan puts at a model's activation sites."""

from typing import Any

import torch
from torch import Tensor, nn

from deepshare.channel_map import ChannelMap
from deepshare.masked import masked_relu
from deepshare.ops import shared_relu
from deepshare.packed_gates import PackedGates


class SharedReLU2d(nn.Module):
    """Drop-in for nn.ReLU whose gates are computed on P prototype channels and shared by all C (DeepShare eq. 3 and 6).

        y[n,c,h,w] = x[n,c,h,w] * (alpha[c] * gate[n,c,h,w] + beta[c])
        gate[n,c,h,w] = DReLU(source[n, c mod P, h, w]), source x by default

    A follower (layer sharing, eq. 6) is the same module called with its leader's pre-activation: `act(x, source=s)`.
    Sharing is data that flows along the graph, never state between modules. With P = C, alpha = 1 and beta = 0 the
    module is nn.ReLU: in value on every finite input, in gradient away from 0.

    `act(x, residual=r)` is act(x + r) in one pass. `y, gates = act(x, return_gates=True)` gives what a follower takes
    as source: once all gates are hard one bit for each, before that its prototypes' channels of the pre-activation.

    Args:
        channels: C of the input [N, C, H, W] (any [N, C, *S] works).
        prototypes: P, in 1..C. For a follower the leader's P.
        affine: learn alpha and beta (start at 1 and 0); otherwise they stay there.
        gamma: sharpness of the soft gate Phi(gamma * x): 1 for classification, 4 for segmentation (DeepShare app. B).

    Attributes:
        alpha, beta: parameters [C] (buffers if not affine).
        channel_map: the ChannelMap; its `pi` stands in checkpoints.
        soft_channels: int, settable; channels below it have the soft gate, 0 means all hard. Kept as the int32 buffer
            `soft_switch`, so that it goes into checkpoints and changing it recompiles nothing (but reaching 0, where
            the hard path begins).

    Whether `soft_switch` is 0 is mirrored in a Python attribute, because reading the buffer at every call would make
    the host wait for the device. The setter and `load_state_dict` keep the mirror right; what replaces the buffer
    behind the module's back (`torch.func.functional_call` with another state dict) changes the number of soft channels
    of a soft module, but does not make a hard one soft.

    Raises:
        ValueError: prototypes is not in 1..channels, soft_channels not in 0..channels, a loaded state is for another
            P; and as `shared_relu`.
    """

    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    soft_switch: Tensor

    def __init__(self, channels: int, prototypes: int, *, affine: bool = True, gamma: float = 1.0) -> None:
        super().__init__()
        self.channel_map = ChannelMap.balanced(channels, prototypes)
        self.affine = affine
        for name, value in (("alpha", torch.ones(channels)), ("beta", torch.zeros(channels))):
            if affine:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer("gamma", torch.tensor(float(gamma)))
        self.register_buffer("soft_switch", torch.zeros((), dtype=torch.int32))
        self._hard = True

    @property
    def channels(self) -> int:
        return self.channel_map.channels

    @property
    def prototypes(self) -> int:
        return self.channel_map.prototypes

    @property
    def is_hard(self) -> bool:
        """Whether no channel has a soft gate; asking does not wait for the device."""
        return self._hard

    @property
    def soft_channels(self) -> int:
        return 0 if self._hard else int(self.soft_switch)

    @soft_channels.setter
    def soft_channels(self, count: int) -> None:
        self._check_soft_channels(count)
        self.soft_switch.fill_(count)
        self._hard = count == 0

    def _check_soft_channels(self, count: object) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= self.channels:
            raise ValueError(f"SharedReLU2d: soft_channels must be an int in 0..{self.channels} (got {count!r})")

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
        source: Tensor | PackedGates | None = None,  # [N, >=P, H, W], the leader's pre-activation, or its gates
        *,
        residual: Tensor | None = None,  # [N, C, H, W], added to x first
        return_gates: bool = False,  # (y, what a follower takes as source)
    ) -> Any:
        return shared_relu(  # type: ignore[call-overload]  # a bool that is not known
            x,
            self.channel_map,
            self.alpha,
            self.beta,
            source=source,
            residual=residual,
            soft_channels=0 if self._hard else self.soft_switch,
            gamma=1.0 if self._hard else self.gamma,
            return_gates=return_gates,
        )

    def extra_repr(self) -> str:
        plain = f"{self.channels}, {self.prototypes}, affine={self.affine}"
        if self.gamma.is_meta:  # no values to show
            return plain
        state = "" if self._hard else f", soft_channels={self.soft_channels}"
        return f"{plain}, gamma={float(self.gamma):g}{state}"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[no-untyped-def]
        incoming = state_dict.get(prefix + "soft_switch")
        if incoming is not None and not incoming.is_meta:
            self._check_soft_channels(incoming.item())
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.soft_switch.is_meta:
            self.soft_channels = int(self.soft_switch)


class MaskedReLU2d(nn.Module):
    """SNL's partly linearised activation, y = mask * relu(x) + (1 - mask) * x (SNL eq. 2; per channel: eq. 6).

    One pass of `masked_relu`, whose numbers it has: the gradient at 0 is 1. With `zero_out` it is y = mask * relu(x)
    (SNL eq. 7): what keeps no ReLU is 0, and costs no DReLU either.

    Args:
        mask: bool [C, H, W] (a gate per pixel) or [C] (per channel), True where the ReLU stays. DReLUs: the ones of
            the mask, H*W each if per channel.
        zero_out: the other elements are 0, not passed on.

    Raises:
        TypeError: mask is not a bool tensor. ValueError: it has neither shape, or x does not fit it.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, *, zero_out: bool = False) -> None:
        super().__init__()
        if mask.dtype != torch.bool:
            raise TypeError(f"MaskedReLU2d: mask must be bool (got {mask.dtype})")
        if mask.dim() not in (1, 3):
            raise ValueError(f"MaskedReLU2d: mask must be [C, H, W] or [C] (got {list(mask.shape)})")
        self.register_buffer("mask", mask.clone())
        self.zero_out = zero_out

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        if self.mask.shape not in (x.shape[1:], x.shape[1:2]):
            raise ValueError(f"MaskedReLU2d: x must fit the mask {list(self.mask.shape)} (got {list(x.shape)})")
        if self.zero_out:  # where, not a product: 0 * inf would be NaN
            return torch.where(_per_element(self.mask, x), torch.relu(x), x.new_zeros(()))
        return masked_relu(x, self.mask)

    def extra_repr(self) -> str:
        shape = str(list(self.mask.shape)) + (", zero_out=True" if self.zero_out else "")
        return shape if self.mask.is_meta else f"{shape}, kept={int(self.mask.sum())}"


class LearnedMask(nn.Module):
    """MaskedReLU2d while its mask is learned (SNL Algorithm 1, lines 2 to 10): a real weight per pixel or channel.

        y = mask * relu(x) + (1 - mask) * x      SNL eq. 2, per channel eq. 6: one pass of `masked_relu`
        y = mask * relu(x)                       with zero_out, eq. 7

    The mask starts at 1, where the module is nn.ReLU, and is not held in 0..1, as in the paper: the penalty draws it
    to 0 and over it. It is a phase of training, no activation of a plan: `Plan.of` does not count it.

    Args:
        shape: (C, H, W), a weight per pixel, or (C,), per channel.
        zero_out: eq. 7 in place of eq. 2.

    Raises:
        ValueError: the shape is neither.
    """

    def __init__(self, shape: tuple[int, ...], *, zero_out: bool = False) -> None:
        super().__init__()
        if len(shape) not in (1, 3):
            raise ValueError(f"LearnedMask: shape must be (C, H, W) or (C,) (got {tuple(shape)})")
        self.mask = nn.Parameter(torch.ones(shape))
        self.zero_out = zero_out

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        if self.zero_out:  # multiplied in the mask's precision, whatever x's is
            return (_per_element(self.mask, x) * torch.relu(x)).to(x.dtype)
        return masked_relu(x, self.mask)

    def extra_repr(self) -> str:
        return str(list(self.mask.shape)) + (", zero_out=True" if self.zero_out else "")


def _per_element(mask: Tensor, x: Tensor) -> Tensor:
    """A mask [C] of x [N, C, *S] with a dimension of 1 for each of S; a mask [C, *S] as it is."""
    return mask.reshape(-1, *(1,) * (x.dim() - 2)) if mask.dim() == 1 else mask
