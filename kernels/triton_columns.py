"""Triton pieces of the column kernels: what a column knows of its channel and where its gate lies.

A tensor stored as (outer, C, inner) is a matrix [outer, C * inner]: a row is a sample block, whose columns are
contiguous whatever C and inner are. Column i belongs to channel i // inner, at position i % inner of its run; channels
last is inner = 1. What depends on the column alone is computed once for all rows of a tile, divisions included.
"""

import triton
import triton.language as tl

from .triton_gates import load_leader


@triton.jit
def columns_of(tile, tiles, width, COLS: tl.constexpr):
    """(columns of a tile, which of them exist), in 32 bits where the width is."""
    col = ((tile % tiles) * COLS).to(width.dtype) + tl.arange(0, COLS)
    return col, col < width


@triton.jit
def channel_of(col, inner, LAST: tl.constexpr):
    """(channel, position in its run) of columns; LAST: inner is 1."""
    if LAST:
        return col, tl.zeros_like(col)
    else:
        return col // inner, col % inner


@triton.jit
def bit_of(prototype, position, inner, LAST: tl.constexpr):
    """(byte in a row of packed gates, bit in it) of columns, by packing.py."""
    if LAST:
        return prototype // 8, prototype % 8
    else:
        return prototype * tl.cdiv(inner, 8) + position // 8, position % 8


@triton.jit
def in_step(leader_col, col, in_cols, COLS: tl.constexpr, VEC: tl.constexpr):
    """Whether all VEC columns that one access takes have VEC neighbours as leaders, on a boundary of VEC.

    So it is for the balanced map where P * inner is a multiple of VEC. One answer for a tile: the branch is uniform.
    """
    shift = tl.reshape(tl.where(in_cols, leader_col - col, 0), [COLS // VEC, VEC])
    least, most = tl.min(shift, 1), tl.max(shift, 1)
    return tl.max(((least != most) | (least % VEC != 0)).to(tl.int32), 0) == 0


@triton.jit
def hinted(leader_col, col, together, VEC: tl.constexpr):
    """leader_col where `together` (in_step) is true, with the alignment that it then has stated for the compiler.

    Elsewhere it is col, for which the statement is true as well: a false one would be a wrong access.
    """
    aligned = tl.where(together, leader_col, col)
    return tl.max_contiguous(tl.multiple_of(aligned, VEC), VEC)


@triton.jit
def load_leaders(
    x_ptr, residual_ptr, source_ptr, row_at, leader_col, aligned_col, together, mask, VEC: tl.constexpr
):  # fmt: skip
    """The leaders' values [ROWS, COLS]: by vectors where they lie together, else one by one."""
    # ".ca" is what a load does anyway. But two branches of the same instructions are merged by the compiler into one,
    # with the addresses as variables, of which nothing is known then: no vectors.
    if VEC == 1:
        s = load_leader(x_ptr, residual_ptr, source_ptr, row_at[:, None] + leader_col[None, :], mask)
    else:
        if together:
            s = load_leader(x_ptr, residual_ptr, source_ptr, row_at[:, None] + aligned_col[None, :], mask)
        else:
            s = load_leader(x_ptr, residual_ptr, source_ptr, row_at[:, None] + leader_col[None, :], mask, ".ca")
    return s
