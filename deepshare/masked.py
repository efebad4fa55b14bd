"""masked_relu: SNL's partly linearised activation in one pass. The contract: docs/masked_relu.md."""

from typing import Any

import torch
from torch import Tensor

from deepshare.raw_ops import IMPLEMENTATIONS, choose_backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _MaskedReLU(torch.autograd.Function):
    """Saves x and the mask: the gate is recomputed from x in backward."""

    @staticmethod
    def forward(ctx: Any, x, mask, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, mask)
        ctx.backend = backend
        return _forward(x, mask, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def, override]
        # once_differentiable costs 3 us of host time, and is needed only where a graph of the backward pass is wanted
        return _backward_once(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)


def _forward(x: Tensor, mask: Tensor, backend: str) -> Tensor:
    run = IMPLEMENTATIONS[backend]
    if mask.dim() == x.dim() - 1:
        return run["masked_relu"](x, mask)
    return run["shared_relu"](x, None, None, None, _every_channel(mask), mask, 1 - mask, None, None)


def _backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
    x, mask = ctx.saved_tensors
    run = IMPLEMENTATIONS[ctx.backend]
    if mask.dim() == x.dim() - 1:
        return *run["masked_relu_backward"](grad, x, mask), None
    own = _every_channel(mask)
    offsets = torch.arange(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    affine = (mask, 1 - mask)
    dx, _, dalpha, dbeta = run["shared_relu_backward"](
        grad, x, None, None, None, own, own, offsets, *affine, None, None
    )
    return dx, dalpha - dbeta, None


_backward_once = torch.autograd.function.once_differentiable(_backward)


def _every_channel(mask: Tensor) -> Tensor:
    """The channel map of a mask [C]: each channel is its own prototype. Not kept: that would take a cache which
    torch.compile, inference mode and other devices have to see through, to save 2 us."""
    return torch.arange(mask.shape[0], dtype=torch.int32, device=mask.device)


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
    backend = choose_backend("masked_relu", backend, x.device.type)
    weight = mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if mask.dim() == 1:
        weight = weight.contiguous()
    return _MaskedReLU.apply(x, weight, backend) if torch.is_grad_enabled() else _forward(x, weight, backend)


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
