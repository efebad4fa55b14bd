"""masked_relu: SNL's partly linearised activation in one pass. The contract: docs/masked_relu.md."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deepshare.channel_map import ChannelMap
from deepshare.ops import shared_relu
from deepshare.raw_ops import IMPLEMENTATIONS, choose_backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _MaskedReLU(torch.autograd.Function):
    """Saves x and the mask: the gate is recomputed from x in backward."""

    @staticmethod
    def forward(ctx: Any, x, mask, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, mask)
        ctx.backend = backend
        return IMPLEMENTATIONS[backend]["masked_relu"](x, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def, override]
        dx, dmask = IMPLEMENTATIONS[ctx.backend]["masked_relu_backward"](grad, *ctx.saved_tensors)
        return dx, dmask, None


def masked_relu(
    x: Tensor,  # [N, C, *S]
    mask: Tensor,  # [C, *S] or [C]
    *,
    backend: str | None = None,
) -> Tensor:
    """ReLU where the mask is 1, the identity where it is 0 (SNL eq. 2; per channel: eq. 6).

        y = mask * relu(x) + (1 - mask) * x = x * (1 where x >= 0, else 1 - mask)
        dx = g * (1 where x >= 0, else 1 - mask);  dmask = -sum over n (and s, for [C]) of g * x where not x >= 0

    Equivalent PyTorch:

    >>> x, mask = torch.randn(2, 3, 4, 4), torch.rand(3, 4, 4)
    >>> torch.allclose(masked_relu(x, mask), mask * torch.relu(x) + (1 - mask) * x)
    True

    Args:
        x: pre-activation [N, C, *S]; float32, float16, bfloat16 or float64, any strides.
        mask: [C, *S], a weight per pixel, or [C], per channel; floating (any values) or bool, on x's device. Used in
            float32 (float64 for float64 x).
        backend: as in `shared_relu`.

    Returns:
        y: x's dtype, strides of `torch.empty_like(x)`. As in `shared_relu`, the gradient at 0 is that of a gate of 1.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or device than stated here.
        RuntimeError: the forced backend is not available; the message says why.
    """
    _check(x, mask)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = mask.to(dtype)
    name = choose_backend("masked_relu", backend, x.device.type)
    if (
        mask.dim() == 1 and x.dim() > 2
    ):  # per channel: shared_relu with alpha = mask, beta = 1 - mask, every gate its own
        own = _identity(mask.shape[0], x.device)
        return shared_relu(x, own, weight, 1 - weight, backend=backend)
    if torch.is_grad_enabled():
        return _MaskedReLU.apply(x, weight, name)
    return IMPLEMENTATIONS[name]["masked_relu"](x, weight)


@lru_cache(maxsize=64)
def _identity(channels: int, device: torch.device) -> ChannelMap:
    return ChannelMap.balanced(channels, channels).to(device)


def _check(x: Tensor, mask: Tensor) -> None:
    for name, value in (("x", x), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"masked_relu: {name} must be a tensor (got {type(value).__name__})")
    if x.dtype not in _DTYPES:
        raise TypeError(f"masked_relu: x must be float32, float16, bfloat16 or float64 (got {x.dtype})")
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise TypeError(f"masked_relu: mask must be floating point or bool (got {mask.dtype})")
    if x.dim() < 2 or mask.shape not in (x.shape[1:], x.shape[1:2]):
        raise ValueError(
            f"masked_relu: x must be [N, C, *S] and mask [C, *S] or [C] (got {list(x.shape)} and {list(mask.shape)})"
        )
    if mask.device != x.device:
        raise ValueError(f"masked_relu: mask must be on x's device {x.device} (got {mask.device})")
