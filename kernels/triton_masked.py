"""Triton kernels of masked_relu with a mask per pixel (SNL eq. 2): every element of x read once, y or dx written once.

x is [batch, elements] in memory, the mask [elements]: a tile's mask is loaded once for all its samples. Backward, a
program owns columns and walks the samples of its chunk, so that the mask's gradient is summed in the same pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import empty_in, is_stored_in, memory_order, stored_in
from .triton_columns import columns_of
from .triton_gates import widened
from .triton_tiles import Tile, access, backward_elements, chunking, column_tile, forward_elements, on_device_of

BATCH_DIM = 0
# Programs with which a GPU is busy: below this the batch is split, although that costs a second pass.
WANTED_BLOCKS = 1024


@triton.jit(do_not_specialize=["batch", "vectors"])
def masked_forward(
    x_ptr, mask_ptr, y_ptr, batch, vectors,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = x * (1 where x >= 0, else 1 - mask) over x [batch, VEC * vectors]."""
    elements = vectors.to(tl.int64) * VEC
    tile = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(elements, COLS)
    n = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    col, in_cols = columns_of(tile, col_tiles, elements, COLS)
    closed = 1.0 - tl.load(mask_ptr + col, mask=in_cols, other=0.0)[None, :]
    inside = (n < batch)[:, None] & in_cols[None, :]
    at = n[:, None] * elements + col[None, :]
    x = widened(tl.load(x_ptr + at, mask=inside, other=0.0))
    tl.store(y_ptr + at, (x * tl.where(x >= 0.0, 1.0, closed)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "vectors", "tiles_per_chunk"])
def masked_backward(
    grad_ptr, x_ptr, mask_ptr, dx_ptr, partial_ptr, batch, vectors, tiles_per_chunk,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, block of COLS columns): dx, and its chunk's sums of dmask in partial [chunks, elements]."""
    elements = vectors.to(tl.int64) * VEC
    program = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(elements, COLS)
    chunk = program // col_tiles
    col, in_cols = columns_of(program, col_tiles, elements, COLS)
    closed = 1.0 - tl.load(mask_ptr + col, mask=in_cols, other=0.0)[None, :]
    dmask = tl.zeros([ROWS, COLS], dtype=mask_ptr.dtype.element_ty)
    for step in range(tiles_per_chunk):
        n = (chunk * tiles_per_chunk + step) * ROWS + tl.arange(0, ROWS)
        inside = (n < batch)[:, None] & in_cols[None, :]
        at = n[:, None] * elements + col[None, :]
        g = widened(tl.load(grad_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first"))
        x = widened(tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first"))
        opens = x >= 0.0
        tl.store(dx_ptr + at, (g * tl.where(opens, 1.0, closed)).to(dx_ptr.dtype.element_ty), mask=inside)
        dmask -= tl.where(opens, 0.0, g * x)
    tl.store(partial_ptr + chunk * elements + col, tl.sum(dmask, 0), mask=in_cols)


@triton.jit(do_not_specialize=["chunks", "vectors"])
def masked_sum(partial_ptr, dmask_ptr, chunks, vectors, VEC: tl.constexpr, COLS: tl.constexpr):
    """dmask [elements] of partial [chunks, elements], chunks added one after the other."""
    elements = vectors.to(tl.int64) * VEC
    col, in_cols = columns_of(tl.program_id(0).to(tl.int64), tl.cdiv(elements, COLS), elements, COLS)
    dmask = tl.zeros([COLS], dtype=dmask_ptr.dtype.element_ty)
    for chunk in range(chunks):
        at = tl.cast(chunk, tl.int64) * elements + col
        dmask += tl.load(partial_ptr + at, mask=in_cols, other=0.0)
    tl.store(dmask_ptr + col, dmask, mask=in_cols)


def masked_relu(
    x: Tensor,  # [N, C, *S], any strides
    mask: Tensor,  # [C, *S], accumulation dtype, any strides
) -> Tensor:
    """y = mask * relu(x) + (1 - mask) * x, with the strides of `torch.empty_like(x)`."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    order = samples_first(y)
    x, mask = stored_in(x, order), stored_in(mask, _within_sample(order))
    written = y if is_stored_in(y, order) else empty_in(y, order)
    tile = _tile(x, mask, forward_elements(x.element_size()))
    grid = triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(mask.numel(), tile.cols)
    with on_device_of(x):
        masked_forward[(grid,)](x, mask, written, x.shape[0], mask.numel() // tile.vec, **tile.constants())
    return y if written is y else y.copy_(written)


def masked_relu_backward(grad: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dmask): dx = grad * (1 where x >= 0, else 1 - mask), dmask = -sum over n where not x >= 0 of grad * x."""
    dx, dmask = torch.empty_like(x), torch.empty_like(mask)
    if x.numel() == 0:
        return dx, dmask.zero_()
    order = samples_first(dx)
    inside = _within_sample(order)
    x, grad, mask = stored_in(x, order), stored_in(grad, order), stored_in(mask, inside)
    written = dx if is_stored_in(dx, order) else empty_in(dx, order)
    sums = dmask if is_stored_in(dmask, inside) else empty_in(dmask, inside)
    with on_device_of(x):
        _backward(grad, x, mask, written, sums)
    return dx if written is dx else dx.copy_(written), dmask if sums is dmask else dmask.copy_(sums)


def _backward(grad: Tensor, x: Tensor, mask: Tensor, dx: Tensor, dmask: Tensor) -> None:
    """Writes dx and dmask; the batch is split into chunks only where columns alone make too few programs."""
    batch, elements = x.shape[0], mask.numel()
    tile = _tile(x, mask, backward_elements(x.element_size()))
    blocks = triton.cdiv(elements, tile.cols)
    per_chunk, chunks = chunking(triton.cdiv(batch, tile.rows), blocks, WANTED_BLOCKS)
    partial = dmask if chunks == 1 else mask.new_empty((chunks, elements))
    sizes = (batch, elements // tile.vec)
    masked_backward[(chunks * blocks,)](grad, x, mask, dx, partial, *sizes, per_chunk, **tile.constants())
    if chunks > 1:
        masked_sum[(blocks,)](partial, dmask, chunks, sizes[1], VEC=tile.vec, COLS=tile.cols)


def _tile(x: Tensor, mask: Tensor, elements: int) -> Tile:
    return column_tile(x.shape[0], mask.numel(), access(mask.numel(), itemsize=x.element_size()), elements)


def samples_first(y: Tensor) -> list[int]:
    """Dense y's order of dimensions where samples lie one after the other in it, else the contiguous one."""
    order = memory_order(y)
    outside = order[: order.index(BATCH_DIM)]
    return order if all(y.shape[d] == 1 for d in outside) else list(range(y.dim()))


def _within_sample(order: list[int]) -> list[int]:
    """The order of a sample's dimensions [C, *S] within an order of [N, C, *S]."""
    return [d - 1 for d in order if d != BATCH_DIM]
