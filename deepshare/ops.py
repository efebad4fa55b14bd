"""shared_relu: one operator, four implementations, one autograd function. The contract: docs/shared_relu.md."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from deepshare.channel_map import ChannelMap
from deepshare.packed_gates import PackedGates
from deepshare.raw_ops import IMPLEMENTATIONS, choose_backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Call(NamedTuple):
    """What a call needs beside the tensors that may have gradients; one argument, because each costs host time."""

    pi: Tensor
    members: Tensor
    offsets: Tensor
    soft_channels: Tensor | None
    gamma: Tensor | None
    emitted: int  # prototypes whose gates are wanted as bits
    handed: int  # prototypes whose pre-activations are wanted: what followers with soft gates take
    run: dict[str, Callable[..., Any]]  # raw op -> implementation


class _SharedReLU(torch.autograd.Function):
    """Saves x (and a residual, and a source or its gates) only: the gate is recomputed from it in backward.

    What is handed to followers is an output here, not a slice of x for autograd: its gradient is then added to dx in
    place, on P channels, where a slice's would be padded to C with zeros and added in another pass.
    """

    @staticmethod
    def forward(ctx: Any, x, residual, source, gates, alpha, beta, call: _Call):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, residual, source, gates, alpha, beta, call.soft_channels, call.gamma)
        ctx.call = call
        outputs = _forward(x, residual, source, gates, alpha, beta, call)
        if call.emitted:
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_gates: Any):  # type: ignore[no-untyped-def, override]
        # once_differentiable costs 3 us of host time, and is needed only where a graph of the backward pass is wanted
        return _backward_once(ctx, grad, *of_gates) if torch.is_grad_enabled() else _backward(ctx, grad, *of_gates)


def _backward(ctx: Any, grad: Tensor, of_handed: Tensor | None = None):  # type: ignore[no-untyped-def]
    x, residual, source, gates, alpha, beta, soft, gamma = ctx.saved_tensors
    call: _Call = ctx.call
    dx, dsource, dalpha, dbeta = call.run["shared_relu_backward"](
        grad, x, residual, source, gates, call.pi, call.members, call.offsets, alpha, beta, soft, gamma
    )
    if call.handed:
        dx[:, : call.handed].add_(of_handed)
    dsource = None if source is None or soft is None else dsource
    return dx, None if residual is None else dx, dsource, None, dalpha, dbeta, None


_backward_once = torch.autograd.function.once_differentiable(_backward)


def _forward(x, residual, source, gates, alpha, beta, call: _Call):  # type: ignore[no-untyped-def]
    """y; with `emitted` prototypes > 0 (y, their gates' bits), with `handed` (y, their z)."""
    if call.emitted:
        return call.run["shared_relu_emit"](x, residual, call.pi, alpha, beta, call.emitted)
    y = call.run["shared_relu"](x, residual, source, gates, call.pi, alpha, beta, call.soft_channels, call.gamma)
    return (y, _prototypes(x, residual, call.handed)) if call.handed else y


def _prototypes(x: Tensor, residual: Tensor | None, count: int) -> Tensor:
    """The first `count` channels of z, dense with the dimensions in x's order."""
    first = x[:, :count]
    return first.clone() if residual is None else torch.empty_like(first).copy_(first + residual[:, :count])


@overload
def shared_relu(
    x: Tensor,
    channel_map: ChannelMap,
    alpha: Tensor,
    beta: Tensor,
    *,
    source: Tensor | PackedGates | None = None,
    residual: Tensor | None = None,
    soft_channels: int | Tensor = 0,
    gamma: float | Tensor = 1.0,
    return_gates: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def shared_relu(
    x: Tensor,
    channel_map: ChannelMap,
    alpha: Tensor,
    beta: Tensor,
    *,
    source: Tensor | PackedGates | None = None,
    residual: Tensor | None = None,
    soft_channels: int | Tensor = 0,
    gamma: float | Tensor = 1.0,
    return_gates: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor | PackedGates]: ...


def shared_relu(
    x: Tensor,  # [N, C, *S]
    channel_map: ChannelMap,
    alpha: Tensor,  # [C]
    beta: Tensor,  # [C]
    *,
    source: Tensor | PackedGates | None = None,  # [N, >=P, *S]
    residual: Tensor | None = None,  # [N, C, *S]
    soft_channels: int | Tensor = 0,
    gamma: float | Tensor = 1.0,
    return_gates: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | PackedGates]:
    """ReLU with gates shared between channels (DeepShare eq. 3) and layers (eq. 6).

        y[n,c,s] = z[n,c,s] * (alpha[c] * gate[n,c,s] + beta[c]),  z = x, or x + residual in x's dtype
        gate[n,c,s] = Phi(gamma * v) where c < soft_channels, else 1[v >= 0]
        v = source[n, pi[c], s], source z by default

    Equivalent PyTorch, for hard gates:

    >>> x, fewer = torch.randn(2, 6, 4, 4), ChannelMap.balanced(6, 2)
    >>> alpha, beta = torch.randn(6), torch.randn(6)
    >>> gate = (x[:, fewer.pi] >= 0).float()
    >>> expected = x * (alpha.view(1, -1, 1, 1) * gate + beta.view(1, -1, 1, 1))
    >>> torch.equal(shared_relu(x, fewer, alpha, beta), expected)
    True

    Args:
        x: pre-activation [N, C, *S]; float32, float16, bfloat16 or float64, any strides.
        channel_map: pi and P, on x's device.
        alpha, beta: [C], any floating dtype; used in float32 (float64 for float64 x).
        source: where the gates come from (layer sharing), x's device: the leader's pre-activation [N, >=P, *S] in x's
            dtype, or its hard gates as PackedGates.
        residual: [N, C, *S], x's dtype and device, added to x first, in the same pass.
        soft_channels: how many channels, counted from the first, have the soft gate. An int32 0-dim tensor on x's
            device is read by the kernel, so that changing it neither recompiles nor recaptures; the int 0 selects the
            hard path.
        gamma: sharpness of the soft gate, a number or a 0-dim tensor on x's device.
        return_gates: return (y, what a follower takes as source): the gates packed in the same pass where all are hard,
            else the first P channels of z. Where a source is given, it is returned.
        backend: "reference", "cpu", "triton" or "cuda"; default: `default_backend(x.device.type)`.

    Returns:
        y: x's dtype, strides of `torch.empty_like(x)`. The gate is 1 at 0 and -0.0, 0 at NaN; NaN of x stays.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    _check_types(x, channel_map, alpha, beta)
    maps: dict[str, Any] = channel_map._buffers  # attribute access on a module costs 0.6 us each
    pi, members, offsets = maps["pi"], maps["members"], maps["offsets"]
    _check_tensors(x, channel_map, pi, alpha, beta)
    if source is not None:
        _check_source(x, channel_map.prototypes, source, soft_channels)
    if residual is not None:
        _check_residual(x, residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    soft, sharpness = _gate_state(soft_channels, gamma, x, channel_map.channels, dtype)
    run = IMPLEMENTATIONS[choose_backend("shared_relu", backend, x.device.type)]
    leads = return_gates and source is None
    emitted = channel_map.prototypes if leads and soft is None else 0
    whole = residual is None and channel_map.prototypes == channel_map.channels  # x itself is what followers take
    handed = channel_map.prototypes if leads and soft is not None and not whole else 0
    leader, bits = _gates_of(source, x)
    if alpha.dtype != dtype or not alpha.is_contiguous():
        alpha = alpha.to(dtype).contiguous()
    if beta.dtype != dtype or not beta.is_contiguous():
        beta = beta.to(dtype).contiguous()
    call = _Call(pi, members, offsets, soft, sharpness, emitted, handed, run)
    function = _SharedReLU.apply if torch.is_grad_enabled() else _forward
    outputs = function(x, residual, leader, bits, alpha, beta, call)
    if not return_gates:
        return outputs
    if handed:
        return outputs
    if not emitted:
        return outputs, x if source is None else source
    y, bits = outputs
    return y, PackedGates(bits, channel_map.prototypes, tuple(y.shape), y.stride())


def _gates_of(source: Tensor | PackedGates | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(source, bits) as the raw ops take them: at most one of the two."""
    if not isinstance(source, PackedGates):
        return source, None
    return None, source.bits if source.fits(x) else source.repack(x).bits


def _check_tensors(x: Tensor, channel_map: ChannelMap, pi: Tensor, alpha: Tensor, beta: Tensor) -> None:
    """Raises unless x, alpha and beta fit the channel map. One expression first: loops cost microseconds a call."""
    vector, device = (channel_map.channels,), x.device
    if not (
        x.dtype in _DTYPES
        and x.shape[1:2] == vector
        and alpha.shape == vector
        and beta.shape == vector
        and alpha.is_floating_point()
        and beta.is_floating_point()
        and pi.device == device
        and alpha.device == device
        and beta.device == device
    ):
        _say_what_is_wrong(x, channel_map, alpha, beta)


def _check_types(x: Tensor, channel_map: ChannelMap, alpha: Tensor, beta: Tensor) -> None:
    if not isinstance(channel_map, ChannelMap):
        raise TypeError(f"shared_relu: channel_map must be a ChannelMap (got {type(channel_map).__name__})")
    if isinstance(x, Tensor) and isinstance(alpha, Tensor) and isinstance(beta, Tensor):
        return
    for name, value in (("x", x), ("alpha", alpha), ("beta", beta)):
        if not isinstance(value, Tensor):
            raise TypeError(f"shared_relu: {name} must be a tensor (got {type(value).__name__})")


def _say_what_is_wrong(x: Tensor, channel_map: ChannelMap, alpha: Tensor, beta: Tensor) -> None:
    channels = channel_map.channels
    if x.dtype not in _DTYPES:
        raise TypeError(f"shared_relu: x must be float32, float16, bfloat16 or float64 (got {x.dtype})")
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"shared_relu: x must be [N, {channels}, *S] as channel_map says (got {list(x.shape)})")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value.shape != (channels,) or not value.is_floating_point():
            raise ValueError(
                f"shared_relu: {name} must be floating point [{channels}] (got {value.dtype} {list(value.shape)})"
            )
    for name, value in (("channel_map", channel_map.pi), ("alpha", alpha), ("beta", beta)):
        if value.device != x.device:
            raise ValueError(f"shared_relu: {name} must be on x's device {x.device} (got {value.device})")


def _check_source(x: Tensor, prototypes: int, source: Tensor | PackedGates, soft_channels: int | Tensor) -> None:
    if isinstance(source, PackedGates):
        return _check_packed(x, prototypes, source, soft_channels)
    if not isinstance(source, Tensor):
        raise TypeError(f"shared_relu: source must be a tensor or PackedGates (got {type(source).__name__})")
    if source.dtype != x.dtype or source.device != x.device:
        raise TypeError(
            f"shared_relu: source must be {x.dtype} on {x.device} like x (got {source.dtype} on {source.device})"
        )
    fits = source.dim() == x.dim() and source.shape[0] == x.shape[0] and source.shape[2:] == x.shape[2:]
    if not fits or source.shape[1] < prototypes:
        wanted = [x.shape[0], f">={prototypes}", *x.shape[2:]]
        raise ValueError(f"shared_relu: source must be {wanted} (got {list(source.shape)})")


def _check_packed(x: Tensor, prototypes: int, source: PackedGates, soft_channels: int | Tensor) -> None:
    if isinstance(soft_channels, Tensor) or soft_channels != 0:
        raise ValueError(
            "shared_relu: soft gates need the leader's pre-activation as source (got PackedGates, which are hard)"
        )
    if source.bits.device != x.device:
        raise TypeError(f"shared_relu: source must be on x's device {x.device} (got {source.bits.device})")
    shape = source.shape
    if len(shape) != x.dim() or shape[0] != x.shape[0] or tuple(shape[2:]) != tuple(x.shape[2:]):
        wanted = [x.shape[0], "C", *x.shape[2:]]
        raise ValueError(f"shared_relu: source must be packed gates of a tensor {wanted} (got {list(shape)})")
    if source.prototypes < prototypes:
        raise ValueError(f"shared_relu: source must have {prototypes} prototypes or more (got {source.prototypes})")


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"shared_relu: residual must be a tensor (got {type(residual).__name__})")
    if residual.dtype != x.dtype or residual.device != x.device:
        raise TypeError(
            f"shared_relu: residual must be {x.dtype} on {x.device} like x (got {residual.dtype} on {residual.device})"
        )
    if residual.shape != x.shape:
        raise ValueError(f"shared_relu: residual must be {list(x.shape)} like x (got {list(residual.shape)})")


def _gate_state(
    soft_channels: int | Tensor, gamma: float | Tensor, x: Tensor, channels: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(soft_channels, gamma) as the raw ops take them: 0-dim tensors on x's device, or None twice for hard gates."""
    if not isinstance(soft_channels, Tensor):
        if isinstance(soft_channels, bool) or not isinstance(soft_channels, int | torch.SymInt):
            raise TypeError(f"shared_relu: soft_channels must be an int or a tensor (got {soft_channels!r})")
        if not 0 <= soft_channels <= channels:
            raise ValueError(f"shared_relu: soft_channels must be an int in 0..{channels} (got {soft_channels!r})")
        if soft_channels == 0:
            return None, None
        soft_channels = torch.full((), soft_channels, dtype=torch.int32, device=x.device)
    elif soft_channels.dtype != torch.int32 or soft_channels.dim() != 0 or soft_channels.device != x.device:
        got = f"{soft_channels.dtype} {list(soft_channels.shape)} on {soft_channels.device}"
        raise ValueError(
            f"shared_relu: soft_channels must be an int or an int32 0-dim tensor on {x.device} (got {got})"
        )
    if not isinstance(gamma, Tensor):
        if isinstance(gamma, bool) or not isinstance(gamma, int | float | torch.SymInt | torch.SymFloat):
            raise TypeError(f"shared_relu: gamma must be a number or a tensor (got {gamma!r})")
        return soft_channels, torch.full((), gamma, dtype=dtype, device=x.device)
    if gamma.dim() != 0 or not gamma.is_floating_point() or gamma.device != x.device:
        got = f"{gamma.dtype} {list(gamma.shape)} on {gamma.device}"
        raise ValueError(f"shared_relu: gamma must be a number or a floating 0-dim tensor on {x.device} (got {got})")
    return soft_channels, gamma.to(dtype)
