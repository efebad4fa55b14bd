"""The operators in Triton, with the contract of the raw ops (docs/design.md, section 3).

Runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1. Equations: reference.py. Tile sizes are plain
functions of shape and dtype: the order of every sum, and with it every bit of the result, depends on nothing else.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .layout import dense, geometry, in_order_of
from .triton_backward import backward_hard_channels_first, backward_hard_channels_last, sum_partials
from .triton_backward_soft import backward_soft_channels_first, backward_soft_channels_last
from .triton_forward import forward_channels_first, forward_channels_last

# 128 threads with 8 elements each: one 16-byte access of bfloat16, two of float32.
TILE = 1024
# Programs below which a chunk is one tile: a few for each multiprocessor of a big GPU.
WANTED_PROGRAMS = 4096
MAX_TILES_PER_CHUNK = 8
# Partial sums per channel beyond which chunks grow instead, so that the second pass stays short.
MAX_CHUNKS = 8192
# Channels in a row of the channels-last soft tile: 128 bytes of float32.
SOFT_LANES = 32
# Elements of that tile and warps for it: 64 positions (16 of float64) keep partial sums small beside dx; more
# elements a thread, or 8 warps for float64, spill (scripts/check-kernels).
SOFT_TILE, SOFT_WARPS = 2048, 8
SOFT_TILE_DOUBLE, SOFT_WARPS_DOUBLE = 512, 4
# Tile of the second pass: 64 bytes of a row of partial sums, many rows.
SUM_ROWS, SUM_COLS = 256, 16


def _power_of_2(n: int, most: int) -> int:
    """The smallest power of two that is at least n, but no more than `most`."""
    return min(triton.next_power_of_2(max(n, 1)), most)


def _tile(rows: int, cols: int) -> tuple[int, int]:
    """(rows, columns) of a tile of at most TILE elements over [rows, cols], as wide as it can be."""
    tile_cols = _power_of_2(cols, TILE)
    return _power_of_2(rows, TILE // tile_cols), tile_cols


def _chunking(tiles: int, programs_per_tile: int) -> tuple[int, int]:
    """(tiles per chunk, chunks): one tile each, more once there are programs enough without."""
    per_chunk = min(MAX_TILES_PER_CHUNK, max(1, tiles * programs_per_tile // WANTED_PROGRAMS))
    per_chunk = max(per_chunk, triton.cdiv(tiles, MAX_CHUNKS))
    return per_chunk, triton.cdiv(tiles, per_chunk)


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


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
    if residual is not None or gates is not None:
        raise NotImplementedError("not in Triton yet")
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    x = dense(x)
    shape = geometry(x)
    leader = x if source is None else in_order_of(source, x)
    tensors = (x, leader, pi, alpha, beta, soft_channels, gamma, y)
    soft = soft_channels is not None
    with _on_device_of(x):
        if shape.inner == 1:
            rows, cols = _tile(shape.outer, shape.channels)
            grid = triton.cdiv(shape.outer, rows) * triton.cdiv(shape.channels, cols)
            sizes = (shape.outer, shape.channels, leader.shape[1])
            forward_channels_last[(grid,)](*tensors, *sizes, SOFT=soft, ROWS=rows, COLS=cols)
        else:
            lines = shape.outer * shape.channels
            rows, cols = _tile(lines, shape.inner)
            grid = triton.cdiv(lines, rows) * triton.cdiv(shape.inner, cols)
            lengths = (lines, shape.channels, shape.inner, leader.shape[1])
            forward_channels_first[(grid,)](*tensors, *lengths, SOFT=soft, ROWS=rows, COLS=cols)
    return y


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
    if residual is not None or gates is not None:
        raise NotImplementedError("not in Triton yet")
    dx = torch.empty_like(x)
    soft = soft_channels is not None and gamma is not None
    dsource = torch.empty_like(source) if source is not None and soft else x.new_empty(0)
    if x.numel() == 0:
        return dx, dsource.zero_(), torch.zeros_like(alpha), torch.zeros_like(beta)
    x = dense(x)
    grad = in_order_of(grad, x)
    leader = x if source is None else in_order_of(source, x)
    with _on_device_of(x):
        if not soft:
            partial = _backward_hard(grad, x, leader, pi, alpha, beta, dx)
        elif source is None:
            sharing = (pi, members, offsets, alpha, beta, soft_channels, gamma)
            partial = _backward_soft(grad, x, leader, sharing, dx, None)
        else:
            sharing = (pi, members, offsets, alpha, beta, soft_channels, gamma)
            dleader = dsource if leader is source else torch.empty_like(leader)
            partial = _backward_soft(grad, x, leader, sharing, dx, dleader)
            dleader[:, offsets.shape[0] - 1 :].zero_()
            if leader is not source:
                dsource.copy_(dleader)
        dalpha, dbeta = _sum(partial)
    return dx, dsource, dalpha, dbeta


def _backward_hard(
    grad: Tensor, x: Tensor, leader: Tensor, pi: Tensor, alpha: Tensor, beta: Tensor, dx: Tensor
) -> Tensor:
    """Writes dx; returns the partial sums [2, chunks, C] of dalpha and dbeta."""
    outer, channels, inner = geometry(x)
    if inner == 1:
        rows, cols = _tile(outer, channels)
        tiles, programs = triton.cdiv(outer, rows), triton.cdiv(channels, cols)
    else:
        rows, cols = _tile(outer, inner)
        tiles, programs = triton.cdiv(outer, rows) * triton.cdiv(inner, cols), channels
    per_chunk, chunks = _chunking(tiles, programs)
    partial = alpha.new_empty((2, chunks, channels))
    kernel, sizes = (
        (backward_hard_channels_last, (outer, channels))
        if inner == 1
        else (backward_hard_channels_first, (outer, channels, inner))
    )
    kernel[(chunks * programs,)](
        grad, x, leader, pi, alpha, beta, dx, partial,
        *sizes, leader.shape[1], per_chunk, chunks * channels, ROWS=rows, COLS=cols,
    )  # fmt: skip
    return partial


def _backward_soft(
    grad: Tensor, x: Tensor, leader: Tensor, gates: tuple[Tensor | None, ...], dx: Tensor, dleader: Tensor | None
) -> Tensor:
    """Writes dx and, given dleader, its first P channels; returns the partial sums [2, chunks, C]."""
    outer, channels, inner = geometry(x)
    offsets = gates[2]
    assert offsets is not None
    prototypes = offsets.shape[0] - 1
    kernel: Any
    sizes: tuple[int, ...]
    if inner > 1:
        rows, cols = _tile(outer, inner)
        chunks, blocks = triton.cdiv(outer, rows) * triton.cdiv(inner, cols), prototypes
        kernel, sizes, tile = backward_soft_channels_first, (outer, channels, inner), {"ROWS": rows, "COLS": cols}
    else:
        lanes = _power_of_2(prototypes, SOFT_LANES)
        deep = _power_of_2(triton.cdiv(channels, prototypes), SOFT_LANES // lanes)
        double = x.dtype == torch.float64
        elements, warps = (SOFT_TILE_DOUBLE, SOFT_WARPS_DOUBLE) if double else (SOFT_TILE, SOFT_WARPS)
        rows = _power_of_2(outer, elements // (lanes * deep))
        chunks, blocks = triton.cdiv(outer, rows), triton.cdiv(prototypes, lanes)
        kernel, sizes = backward_soft_channels_last, (outer, channels)
        tile = {"ROWS": rows, "MEMBERS": deep, "PROTOTYPES": lanes, "num_warps": warps}
    partial = gates[3].new_empty((2, chunks, channels))  # type: ignore[union-attr]
    kernel[(chunks * blocks,)](
        grad, x, leader, *gates, dx, dleader, partial,
        *sizes, leader.shape[1], prototypes, chunks * channels, OWN=dleader is None, **tile,
    )  # fmt: skip
    return partial


def _sum(partial: Tensor) -> tuple[Tensor, Tensor]:
    """(dalpha, dbeta) of their partial sums [2, chunks, C], chunks added in a fixed order."""
    _, chunks, channels = partial.shape
    dalpha, dbeta = partial.new_empty(channels), partial.new_empty(channels)
    rows, cols = _power_of_2(chunks, SUM_ROWS), _power_of_2(channels, SUM_COLS)
    sizes = (chunks, channels, chunks * channels)
    sum_partials[(triton.cdiv(channels, cols),)](partial, dalpha, dbeta, *sizes, ROWS=rows, COLS=cols)
    return dalpha, dbeta
