"""shared_relu: one operator, four implementations, one autograd function. The contract: docs/shared_relu.md."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deepshare.channel_map import ChannelMap
from deepshare.kernels import native, reference

_FORWARD = (
    "(Tensor x, Tensor? source, Tensor pi, Tensor alpha, Tensor beta, Tensor? soft_channels, Tensor? gamma) -> Tensor"
)
_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor? source, Tensor pi, Tensor members, Tensor offsets, Tensor alpha, Tensor beta, "
    "Tensor? soft_channels, Tensor? gamma) -> (Tensor dx, Tensor dsource, Tensor dalpha, Tensor dbeta)"
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _fake_forward(x, source, pi, alpha, beta, soft_channels, gamma):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _fake_backward(grad, x, source, pi, members, offsets, alpha, beta, soft_channels, gamma):  # type: ignore[no-untyped-def]
    no_source_gradient = source is None or soft_channels is None
    dsource = x.new_empty(0) if no_source_gradient else torch.empty_like(source)
    return torch.empty_like(x), dsource, torch.empty_like(alpha), torch.empty_like(beta)


def _define(suffix: str) -> None:
    for name, schema, fake in (
        (f"deepshare::shared_relu_{suffix}", _FORWARD, _fake_forward),
        (f"deepshare::shared_relu_backward_{suffix}", _BACKWARD, _fake_backward),
    ):
        torch.library.define(name, schema)
        torch.library.register_fake(name, fake)


_define("native")
_define("triton")


@dataclass(frozen=True)
class _Backend:
    """One implementation: its raw forward and backward, and the devices it takes."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    devices: tuple[str, ...]


# Triton is imported at the first call, not here: importing it costs more than the rest of deepshare together.
def _triton_forward(*arguments: Any) -> Tensor:
    from deepshare.kernels import triton_shared_relu

    return triton_shared_relu.forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from deepshare.kernels import triton_shared_relu

    return triton_shared_relu.backward(*arguments)


_TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
torch.library.impl("deepshare::shared_relu_triton", _TRITON_DEVICES, _triton_forward)
torch.library.impl("deepshare::shared_relu_backward_triton", _TRITON_DEVICES, _triton_backward)
native.load()  # gives shared_relu_native its implementations, where the extension was built

_OPS = torch.ops.deepshare
_IMPLEMENTATIONS = {
    "reference": _Backend(reference.forward, reference.backward, ("cpu", "cuda", "mps", "xpu", "meta")),
    "cpu": _Backend(_OPS.shared_relu_native, _OPS.shared_relu_backward_native, ("cpu",)),
    "triton": _Backend(_OPS.shared_relu_triton, _OPS.shared_relu_backward_triton, _TRITON_DEVICES),
    "cuda": _Backend(_OPS.shared_relu_native, _OPS.shared_relu_backward_native, ("cuda",)),
}


def _triton_missing() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if "cpu" not in _TRITON_DEVICES and not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 was not set before deepshare was imported"
    return None


def _cuda_missing() -> str | None:
    """Why the CUDA C++ kernels cannot run here, or None."""
    module = native.load()
    if module is None:
        return native.why_not()
    built = [int(architecture.removeprefix("sm_")) for architecture in module.build_info()["cuda_architectures"]]
    if not built:
        return "deepshare._C was built without CUDA (no nvcc at build time)"
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < min(built):
        return f"deepshare._C has code for sm_{min(built)} and newer, the GPU is sm_{major}{minor}"
    return None


@cache
def backends() -> dict[str, str | None]:
    """Every backend with None where it can run, else the reason why it cannot."""
    cpu = None if native.load() is not None else native.why_not()
    return {"reference": None, "cpu": cpu, "triton": _triton_missing(), "cuda": _cuda_missing()}


def _constant_when_traced(function: Callable[..., str]) -> Callable[..., str]:
    """torch.compiler.assume_constant_result, but its import of torch._dynamo takes about as long as `import torch`.

    Dynamo must not trace into the search for a backend: its answer is a constant of the process.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_traced
def default_backend(device_type: str) -> str:
    """The backend used for tensors on `device_type` ("cpu", "cuda", ...) when none is forced."""
    order = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device_type, ())
    return next((name for name in order if backends()[name] is None), "reference")


@_constant_when_traced
def _forced_backend(name: str, device_type: str) -> str:
    if name not in backends():
        raise ValueError(f"shared_relu: backend must be one of {', '.join(backends())} (got {name!r})")
    if backends()[name] is not None:
        raise RuntimeError(f"shared_relu: backend {name!r} is not available: {backends()[name]}")
    if device_type not in _IMPLEMENTATIONS[name].devices:
        wanted = " or ".join(_IMPLEMENTATIONS[name].devices)
        raise ValueError(f"shared_relu: backend {name!r} takes tensors on {wanted} (got {device_type})")
    return name


class _SharedReLU(torch.autograd.Function):
    """Saves x (and a source) only: the gate is recomputed from it in backward."""

    @staticmethod
    def forward(ctx: Any, x, source, pi, members, offsets, alpha, beta, soft_channels, gamma, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, source, pi, members, offsets, alpha, beta, soft_channels, gamma)
        ctx.backend = backend
        return _IMPLEMENTATIONS[backend].forward(x, source, pi, alpha, beta, soft_channels, gamma)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def, override]
        x, source, *rest = ctx.saved_tensors
        dx, dsource, dalpha, dbeta = _IMPLEMENTATIONS[ctx.backend].backward(grad, x, source, *rest)
        has_source_gradient = source is not None and rest[-2] is not None
        return dx, dsource if has_source_gradient else None, None, None, None, dalpha, dbeta, None, None, None


def shared_relu(
    x: Tensor,  # [N, C, *S]
    channel_map: ChannelMap,
    alpha: Tensor,  # [C]
    beta: Tensor,  # [C]
    *,
    source: Tensor | None = None,  # [N, >=P, *S]
    soft_channels: int | Tensor = 0,
    gamma: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """ReLU with gates shared between channels (DeepShare eq. 3) and layers (eq. 6).

        y[n,c,s] = x[n,c,s] * (alpha[c] * gate[n,c,s] + beta[c])
        gate[n,c,s] = Phi(gamma * v) where c < soft_channels, else 1[v >= 0]
        v = source[n, pi[c], s], source x by default

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
        source: [N, >=P, *S], x's dtype and device: the leader's pre-activation, whose first P channels give the gates.
        soft_channels: how many channels, counted from the first, have the soft gate. An int32 0-dim tensor on x's
            device is read by the kernel, so that changing it neither recompiles nor recaptures; the int 0 selects the
            hard path.
        gamma: sharpness of the soft gate, a number or a 0-dim tensor on x's device.
        backend: "reference", "cpu", "triton" or "cuda"; default: `default_backend(x.device.type)`.

    Returns:
        y: x's dtype, strides of `torch.empty_like(x)`. The gate is 1 at 0 and -0.0, 0 at NaN; NaN of x stays.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or range than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    _check_tensors(x, channel_map, alpha, beta, source)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    soft, sharpness = _gate_state(soft_channels, gamma, x, channel_map.channels, dtype)
    device = x.device.type
    name = default_backend(device) if backend is None else _forced_backend(backend, device)
    maps = (channel_map.pi, channel_map.members, channel_map.offsets)
    return _SharedReLU.apply(x, source, *maps, alpha.to(dtype), beta.to(dtype), soft, sharpness, name)


def _check_tensors(x: Tensor, channel_map: ChannelMap, alpha: Tensor, beta: Tensor, source: Tensor | None) -> None:
    if not isinstance(channel_map, ChannelMap):
        raise TypeError(f"shared_relu: channel_map must be a ChannelMap (got {type(channel_map).__name__})")
    for name, value in (("x", x), ("alpha", alpha), ("beta", beta), ("source", source)):
        if not isinstance(value, Tensor) and not (name == "source" and value is None):
            raise TypeError(f"shared_relu: {name} must be a tensor (got {type(value).__name__})")
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
    if source is not None:
        _check_source(x, channel_map.prototypes, source)


def _check_source(x: Tensor, prototypes: int, source: Tensor) -> None:
    if source.dtype != x.dtype or source.device != x.device:
        raise TypeError(
            f"shared_relu: source must be {x.dtype} on {x.device} like x (got {source.dtype} on {source.device})"
        )
    fits = source.dim() == x.dim() and source.shape[0] == x.shape[0] and source.shape[2:] == x.shape[2:]
    if not fits or source.shape[1] < prototypes:
        wanted = [x.shape[0], f">={prototypes}", *x.shape[2:]]
        raise ValueError(f"shared_relu: source must be {wanted} (got {list(source.shape)})")


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
