"""The integer twin of shared_relu: what one party of a secret-shared inference computes after the openings."""

import torch
from torch import Tensor

from deepshare.channel_map import ChannelMap
from deepshare.packed_gates import PackedGates
from deepshare.raw_ops import IMPLEMENTATIONS, choose_backend


def shared_relu_share(
    opened: Tensor,  # int64 [N, C, *S]
    gates: PackedGates,
    channel_map: ChannelMap,
    alpha: Tensor,  # int64 [C]
    beta: Tensor,  # int64 [C]
    flip: Tensor,  # int64 [N, C, *S], with a scale [N, >=P, *S]
    offset: Tensor,  # int64 [N, C, *S]
    toggle: Tensor,  # int64 [N, C, *S]
    *,
    party: int,
    shift: int,
    scale: Tensor | None = None,  # int64 [C]
    backend: str | None = None,
) -> Tensor:
    """One party's additive share, in Z_2^64, of y[c] = x[c] * (alpha[c] * DReLU(x[pi[c]]) + beta[c]), one pass.

    e = x - a and z = DReLU(x) xor r are public (opened under the dealer's masks a and r), so that
    DReLU(x) = z + (1 - 2z) r. With this party's shares of alpha and beta and of three products made before the input,

        flip = alpha * r,   offset = a * beta + a * alpha * r,   toggle = a * alpha - 2 * a * alpha * r

    y is linear in what is shared, and everything wraps around:

        y = T(e * (beta[c] + flip + z * (alpha[c] - 2 flip)) + offset + z * toggle),   z = gates[pi[c]]
        T(v) = v >> shift at party 0, -(-v >> shift) at party 1          (local truncation, off by at most 1)

    Public alpha and beta: one party passes them, the other zeros. The two results add up to y.

    Args:
        opened: e, any strides; every other tensor on its device.
        gates: z of the P prototypes.
        channel_map: pi and P.
        alpha, beta: this party's shares [C].
        flip: [N, C, *S]; or, with a `scale`, shares of r alone [N, >=P, *S]: flip is then scale[c] * flip[pi[c]].
        offset, toggle: [N, C, *S].
        party: 0 or 1.
        shift: bits of the truncation, 0..63.
        scale: public alpha [C].
        backend: as in `shared_relu`.

    Returns:
        int64, strides of `torch.empty_like(opened)`.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    _check(opened, gates, channel_map, alpha, beta, flip, offset, toggle, scale)
    for name, value, most in (("party", party, 1), ("shift", shift, 63)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"shared_relu_share: {name} must be an int in 0..{most} (got {value!r})")
    bits = gates.bits if gates.fits(opened) else gates.repack(opened).bits
    name = choose_backend("shared_relu_share", backend, opened.device.type)
    run = IMPLEMENTATIONS[name]["shared_relu_share"]
    affine = (alpha.contiguous(), beta.contiguous())
    return run(opened, bits, channel_map.pi, *affine, flip, scale, offset, toggle, shift, party)


def _check(
    opened: Tensor,
    gates: PackedGates,
    channel_map: ChannelMap,
    alpha: Tensor,
    beta: Tensor,
    flip: Tensor,
    offset: Tensor,
    toggle: Tensor,
    scale: Tensor | None,
) -> None:
    op = "shared_relu_share"
    if not isinstance(channel_map, ChannelMap):
        raise TypeError(f"{op}: channel_map must be a ChannelMap (got {type(channel_map).__name__})")
    if not isinstance(gates, PackedGates):
        raise TypeError(f"{op}: gates must be PackedGates (got {type(gates).__name__})")
    given = {"opened": opened, "alpha": alpha, "beta": beta, "flip": flip, "offset": offset, "toggle": toggle}
    if scale is not None:
        given["scale"] = scale
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{op}: {name} must be an int64 tensor (got {got})")
    channels, prototypes = channel_map.channels, channel_map.prototypes
    if opened.dim() < 2 or opened.shape[1] != channels:
        raise ValueError(f"{op}: opened must be [N, {channels}, *S] as channel_map says (got {list(opened.shape)})")
    batch, *rest = opened.shape[:1] + opened.shape[2:]
    if (gates.shape[0], *gates.shape[2:]) != (batch, *rest) or gates.prototypes < prototypes:
        wanted = [batch, f">={prototypes}", *rest]
        raise ValueError(f"{op}: gates must be of {wanted} (got {gates.prototypes} of {list(gates.shape)})")
    for name in ("alpha", "beta", "scale"):
        if name in given and given[name].shape != (channels,):
            raise ValueError(f"{op}: {name} must be [{channels}] (got {list(given[name].shape)})")
    for name in ("offset", "toggle", "flip")[: 3 if scale is None else 2]:
        if given[name].shape != opened.shape:
            raise ValueError(f"{op}: {name} must be {list(opened.shape)} (got {list(given[name].shape)})")
    flip_fits = (*flip.shape[:1], *flip.shape[2:]) == (batch, *rest) and flip.shape[1] >= prototypes
    if scale is not None and (flip.dim() != opened.dim() or not flip_fits):
        raise ValueError(f"{op}: flip must be {[batch, f'>={prototypes}', *rest]} (got {list(flip.shape)})")
    for name, value in (*given.items(), ("channel_map", channel_map.pi), ("gates", gates.bits)):
        if value.device != opened.device:
            raise ValueError(f"{op}: {name} must be on opened's device {opened.device} (got {value.device})")
