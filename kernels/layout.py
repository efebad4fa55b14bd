"""How a tensor [N, C, *S] lies in memory, as the kernels see it: (outer, channels, inner).

A dense tensor with its dimensions stored in any order is (outer, C, inner), outer and inner the products of
the sizes stored before and after the channel dimension: NCHW is (N, C, H*W), channels_last is (N*H*W, C, 1).
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

CHANNEL_DIM = 1


class Geometry(NamedTuple):
    """Sizes of a dense tensor around its channel dimension, in memory order."""

    outer: int
    channels: int
    inner: int


def memory_order(x: Tensor) -> list[int]:
    """x's dimensions from the outermost stored to the innermost; equal strides (of sizes 1) keep their order."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: (-strides[d], d))


def is_stored_in(x: Tensor, order: list[int]) -> bool:
    """Whether x is dense with its dimensions stored in `order`."""
    expected = 1
    for d in reversed(order):
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return True


def dense(x: Tensor) -> Tensor:
    """x itself if it is dense in any order, else a copy with the strides of `torch.empty_like(x)`."""
    if x.is_contiguous() or x.numel() == 0 or is_stored_in(x, memory_order(x)):
        return x
    return torch.empty_like(x).copy_(x)


def stored_in(tensor: Tensor, order: list[int]) -> Tensor:
    """tensor itself if it is dense with its dimensions stored in `order`, else a copy that is."""
    return tensor if is_stored_in(tensor, order) else empty_in(tensor, order).copy_(tensor)


def empty_in(like: Tensor, order: list[int]) -> Tensor:
    """An uninitialised tensor of like's shape, dtype and device, dense with its dimensions stored in `order`."""
    return torch.empty_permuted(like.shape, order, dtype=like.dtype, device=like.device)


def in_order_of(tensor: Tensor, x: Tensor) -> Tensor:
    """tensor itself if it is dense in dense x's order of dimensions, else a copy of it in that order."""
    if tensor.stride() == x.stride() and tensor.shape == x.shape:  # the usual case, without sorting
        return tensor
    return stored_in(tensor, memory_order(x))


def geometry(x: Tensor) -> Geometry:
    """(outer, channels, inner) of a dense x."""
    order = memory_order(x)
    at = order.index(CHANNEL_DIM)
    return Geometry(
        prod(x.shape[d] for d in order[:at]), x.shape[CHANNEL_DIM], prod(x.shape[d] for d in order[at + 1 :])
    )
