"""Triton kernel of shared_relu_share: one party's share of the sharing layer in Z_2^64 (deepshare/share.py).

Integers wrap around, as int64 does. Columns as in triton_columns.py; every tensor is moved once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import geometry, in_order_of
from .triton_columns import bit_of, channel_of, columns_of
from .triton_gates import load_bit
from .triton_tiles import access, column_tile, forward_elements, on_device_of


@triton.jit(do_not_specialize=["rows", "inner", "row_vectors", "gate_bytes", "flip_width", "shift"])
def share_columns(
    opened_ptr, gates_ptr, pi_ptr, alpha_ptr, beta_ptr, flip_ptr, scale_ptr, offset_ptr, toggle_ptr, y_ptr,
    rows, inner, row_vectors, gate_bytes, flip_width, shift,
    PARTY: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = T(e * (beta + f + z * (alpha - 2 f)) + offset + z * toggle) over e = opened [outer, C * inner].

    f is the flip's own element, or scale[c] * flip[pi[c]] of flip [outer, flip_width].
    """
    width = row_vectors.to(tl.int64) * VEC
    tile = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(width, COLS)
    row = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    col, in_cols = columns_of(tile, col_tiles, width, COLS)
    mask = (row < rows)[:, None] & in_cols[None, :]
    channel, position = channel_of(col, inner, LAST)
    prototype = tl.load(pi_ptr + channel, mask=in_cols, other=0)
    alpha = tl.load(alpha_ptr + channel, mask=in_cols, other=0)[None, :]
    beta = tl.load(beta_ptr + channel, mask=in_cols, other=0)[None, :]

    at = row[:, None] * width + col[None, :]
    if scale_ptr is None:
        f = tl.load(flip_ptr + at, mask=mask, other=0)
    else:
        flip_col = prototype * tl.cast(inner, tl.int64) + position
        flip = tl.load(flip_ptr + row[:, None] * flip_width + flip_col[None, :], mask=mask, other=0)
        f = tl.load(scale_ptr + channel, mask=in_cols, other=0)[None, :] * flip
    byte, bit = bit_of(prototype, position, inner, LAST)
    z = load_bit(gates_ptr, row[:, None] * gate_bytes + byte[None, :], bit[None, :], mask)
    e = tl.load(opened_ptr + at, mask=mask, other=0)
    # A product with z, 0 or 1, as a choice: 64-bit multiplications are several instructions each.
    slope = beta + tl.where(z != 0, alpha - f, f)
    toggle = tl.where(z != 0, tl.load(toggle_ptr + at, mask=mask, other=0), 0)
    y = e * slope + tl.load(offset_ptr + at, mask=mask, other=0) + toggle
    sign = 1 if PARTY == 0 else -1
    tl.store(y_ptr + at, sign * ((sign * y) >> shift), mask=mask)


def shared_relu_share(
    opened: Tensor,  # int64 [N, C, *S], any strides
    gates: Tensor,  # packed, in the memory order of torch.empty_like(opened)
    pi: Tensor,  # int32 [C]
    alpha: Tensor,  # int64 [C]
    beta: Tensor,  # int64 [C]
    flip: Tensor,  # int64 [N, C, *S], with a scale [N, >=P, *S]
    scale: Tensor | None,  # int64 [C]
    offset: Tensor,  # int64 [N, C, *S]
    toggle: Tensor,  # int64 [N, C, *S]
    shift: int,
    party: int,
) -> Tensor:
    """As reference.shared_relu_share, with the strides of `torch.empty_like(opened)`."""
    y = torch.empty_like(opened)
    if opened.numel() == 0:
        return y
    opened, flip, offset, toggle = (in_order_of(t, y) for t in (opened, flip, offset, toggle))
    outer, channels, inner = geometry(y)
    itemsize = opened.element_size()
    width, last = channels * inner, inner == 1
    tile = column_tile(outer, width, access(width, itemsize=itemsize), forward_elements(itemsize))
    grid = triton.cdiv(outer, tile.rows) * triton.cdiv(width, tile.cols)
    sizes = (outer, inner, width // tile.vec, gates[0].numel(), flip.shape[1] * inner, shift)
    scale = None if scale is None else scale.contiguous()
    tensors = (opened, gates, pi, alpha, beta, flip, scale, offset, toggle, y)
    with on_device_of(opened):
        share_columns[(grid,)](*tensors, *sizes, PARTY=party, LAST=last, **tile.constants())
    return y
