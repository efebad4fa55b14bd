"""The integer twin of shared_relu: what one party of a secret-shared inference computes after the openings."""

from collections.abc import Sequence

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
    vectors = {"alpha": alpha, "beta": beta} if scale is None else {"alpha": alpha, "beta": beta, "scale": scale}
    elements = {"opened": opened, "flip": flip, "offset": offset, "toggle": toggle}
    _check_types(gates, channel_map, {**elements, **vectors})
    _check_shapes(gates, channel_map, elements, vectors)
    for name, value in (*elements.items(), *vectors.items(), ("channel_map", channel_map.pi), ("gates", gates.bits)):
        if value.device != opened.device:
            raise ValueError(
                f"shared_relu_share: {name} must be on opened's device {opened.device} (got {value.device})"
            )
    for name, number, most in (("party", party, 1), ("shift", shift, 63)):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
            raise ValueError(f"shared_relu_share: {name} must be an int in 0..{most} (got {number!r})")
    bits = gates.bits if gates.fits(opened) else gates.repack(opened).bits
    dense = {name: vector.contiguous() for name, vector in vectors.items()}
    affine = (dense["alpha"], dense["beta"])
    run = IMPLEMENTATIONS[choose_backend("shared_relu_share", backend, opened.device.type)]["shared_relu_share"]
    return run(opened, bits, channel_map.pi, *affine, flip, dense.get("scale"), offset, toggle, shift, party)


def _check_types(gates: PackedGates, channel_map: ChannelMap, tensors: dict[str, Tensor]) -> None:
    if not isinstance(channel_map, ChannelMap):
        raise TypeError(f"shared_relu_share: channel_map must be a ChannelMap (got {type(channel_map).__name__})")
    if not isinstance(gates, PackedGates):
        raise TypeError(f"shared_relu_share: gates must be PackedGates (got {type(gates).__name__})")
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"shared_relu_share: {name} must be an int64 tensor (got {got})")


def _check_shapes(
    gates: PackedGates, channel_map: ChannelMap, elements: dict[str, Tensor], vectors: dict[str, Tensor]
) -> None:
    channels, prototypes, shape = channel_map.channels, channel_map.prototypes, elements["opened"].shape
    if len(shape) < 2 or shape[1] != channels:
        raise ValueError(
            f"shared_relu_share: opened must be [N, {channels}, *S] as channel_map says (got {list(shape)})"
        )
    for name, value in vectors.items():
        if value.shape != (channels,):
            raise ValueError(f"shared_relu_share: {name} must be [{channels}] (got {list(value.shape)})")
    narrow = [shape[0], f">={prototypes}", *shape[2:]]
    if not _has_prototypes(gates.shape, gates.prototypes, shape, prototypes):
        got = f"{gates.prototypes} prototypes of {list(gates.shape)}"
        raise ValueError(f"shared_relu_share: gates must be of {narrow} (got {got})")
    for name in ("flip", "offset", "toggle"):
        value = elements[name]
        if name == "flip" and "scale" in vectors:
            if not _has_prototypes(value.shape, value.shape[1] if value.dim() > 1 else 0, shape, prototypes):
                raise ValueError(f"shared_relu_share: flip must be {narrow} (got {list(value.shape)})")
        elif value.shape != shape:
            raise ValueError(f"shared_relu_share: {name} must be {list(shape)} (got {list(value.shape)})")


def _has_prototypes(got: Sequence[int], channels: int, wanted: Sequence[int], prototypes: int) -> bool:
    """Whether a shape of so many channels is [N, >=P, *S] for the wanted [N, C, *S]."""
    fits = len(got) == len(wanted) and got[0] == wanted[0] and tuple(got[2:]) == tuple(wanted[2:])
    return fits and channels >= prototypes
