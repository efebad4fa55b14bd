"""shared_relu in Triton, with the contract of the raw ops (docs/design.md, section 3), and all other raw ops by name.

Runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1. Equations: reference.py. How work is cut:
triton_tiles.py.
"""

import torch
import triton
from torch import Tensor

from .layout import geometry, in_order_of
from .packing import packed_shape
from .triton_forward import forward_columns, forward_runs
from .triton_launch_backward import hard_sums, leader_row, soft_sums, sum_up
from .triton_masked import masked_relu, masked_relu_backward
from .triton_share import shared_relu_share
from .triton_tiles import access, column_tile, forward_elements, on_device_of, takes_columns, tile_over

__all__ = [
    "masked_relu",
    "masked_relu_backward",
    "shared_relu",
    "shared_relu_backward",
    "shared_relu_emit",
    "shared_relu_share",
]


def shared_relu(
    x: Tensor,  # [N, C, *S], any strides
    residual: Tensor | None,  # [N, C, *S], None: z is x
    source: Tensor | None,  # [N, >=P, *S], None: z itself
    gates: Tensor | None,  # packed gates in place of a source
    pi: Tensor,  # int32 [C]
    alpha: Tensor,  # [C], accumulation dtype
    beta: Tensor,  # [C], accumulation dtype
    soft_channels: Tensor | None,  # int32 [], None: all gates hard
    gamma: Tensor | None,  # [], accumulation dtype
) -> Tensor:
    """y = z * (alpha * gate + beta), with the strides of `torch.empty_like(x)`."""
    y = torch.empty_like(x)
    if x.numel() > 0:
        _forward(x, residual, source, gates, (pi, alpha, beta, soft_channels, gamma), y, None, 0)
    return y


def shared_relu_emit(
    x: Tensor, residual: Tensor | None, pi: Tensor, alpha: Tensor, beta: Tensor, prototypes: int
) -> tuple[Tensor, Tensor]:
    """(y for z's own hard gates, these gates packed in y's memory order)."""
    y = torch.empty_like(x)
    emitted = x.new_empty(packed_shape(y, prototypes), dtype=torch.uint8)
    if x.numel() > 0:
        _forward(x, residual, None, None, (pi, alpha, beta, None, None), y, emitted, prototypes)
    return y, emitted


def _forward(
    x: Tensor,
    residual: Tensor | None,
    source: Tensor | None,
    gates: Tensor | None,
    constants: tuple[Tensor | None, ...],
    y: Tensor,
    emitted: Tensor | None,
    prototypes: int,
) -> None:
    """Writes y, and with `emitted` the first prototypes' gates; a channel's run of these begins on a byte."""
    shape, itemsize = geometry(y), x.element_size()
    outer, channels, inner = shape
    x, residual, source = _in_order(y, x, residual, source)
    leaders = channels if source is None else source.shape[1]
    tensors = (x, residual, source, gates, *constants, y, emitted)
    elements, least = forward_elements(itemsize), 8 if emitted is not None else 1
    with on_device_of(x):
        if inner == 1 or (emitted is None and takes_columns(shape, leaders, itemsize)):
            width = channels * inner
            vec = access(width, leaders * inner, itemsize=itemsize)
            tile = column_tile(outer, width, vec, elements, least)
            grid = triton.cdiv(outer, tile.rows) * triton.cdiv(width, tile.cols)
            sizes = (outer, inner, width // vec, leader_row(gates, leaders * inner // vec), prototypes)
            forward_columns[(grid,)](*tensors, *sizes, LAST=inner == 1, **tile.constants())
        else:
            vec = access(inner, itemsize=itemsize)
            tile = tile_over(outer * channels, inner, vec, elements, least)
            grid = triton.cdiv(outer * channels, tile.rows) * triton.cdiv(inner, tile.cols)
            rows_of = leaders if gates is None else gates.shape[1]
            lengths = (outer * channels, channels, inner // vec, rows_of, prototypes)
            forward_runs[(grid,)](*tensors, *lengths, **tile.constants())


def _in_order(y: Tensor, x: Tensor, residual: Tensor | None, source: Tensor | None) -> tuple[Tensor, ...]:
    """x, residual, source in dense y's order of dimensions; None stays."""
    return tuple(t if t is None else in_order_of(t, y) for t in (x, residual, source))  # type: ignore[misc, return-value]


def shared_relu_backward(
    grad: Tensor,  # [N, C, *S], any strides
    x: Tensor,  # [N, C, *S], any strides
    residual: Tensor | None,
    source: Tensor | None,
    gates: Tensor | None,
    pi: Tensor,
    members: Tensor,  # int32 [C]
    offsets: Tensor,  # int32 [P+1]
    alpha: Tensor,
    beta: Tensor,
    soft_channels: Tensor | None,
    gamma: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.shared_relu_backward; dsource is empty without a source or with hard gates only."""
    dx = torch.empty_like(x)
    soft = soft_channels is not None
    dsource = torch.empty_like(source) if source is not None and soft else x.new_empty(0)
    if x.numel() == 0:
        return dx, dsource.zero_(), torch.zeros_like(alpha), torch.zeros_like(beta)
    grad = in_order_of(grad, dx)
    x, residual, leader = _in_order(dx, x, residual, source)
    with on_device_of(x):
        if not soft:
            partial = hard_sums(grad, x, residual, leader, gates, (pi, alpha, beta), dx)
        else:
            sharing = (pi, members, offsets, alpha, beta, soft_channels, gamma)
            dleader = None if source is None else dsource if leader is source else torch.empty_like(leader)
            partial = soft_sums(grad, x, residual, leader, sharing, dx, dleader)
            if dleader is not None:
                dleader[:, offsets.shape[0] - 1 :].zero_()
                if dleader is not dsource:
                    dsource.copy_(dleader)
        dalpha, dbeta = sum_up(partial)
    return dx, dsource, dalpha, dbeta
