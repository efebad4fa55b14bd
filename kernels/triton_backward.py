"""Triton backward kernels of shared_relu with hard gates, and the second pass that ends the sums of both kinds.

dx = g * (alpha * gate + beta) is written in the pass that sums g*z*gate and g*z. A program owns a fixed run of
tiles (a chunk) and writes partial sums to [2, chunks, C, positions] (dalpha's, then dbeta's, `plane` apart; positions
is 1 but for the column kernel, which sums each column). `sum_partials` adds them up in a fixed order. No atomics: the
same bits on every run. The gradient is read once and evicted first, so that prototypes stay in the cache.
"""

import triton
import triton.language as tl

from .triton_columns import bit_of, channel_of, columns_of, hinted, in_step, load_leaders
from .triton_gates import gate_of, load_bit, load_leader, load_z, widened


@triton.jit(do_not_specialize=["outer", "channels", "run_vectors", "leader_channels", "tiles_per_chunk", "plane"])
def backward_hard_runs(
    grad_ptr, x_ptr, residual_ptr, source_ptr, gates_ptr, pi_ptr, alpha_ptr, beta_ptr, dx_ptr, partial_ptr,
    outer, channels, run_vectors, leader_channels, tiles_per_chunk, plane,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, c): tiles of ROWS samples by COLS positions of channel c."""
    wide = alpha_ptr.dtype.element_ty
    inner = run_vectors.to(tl.int64) * VEC
    program = tl.program_id(0).to(tl.int64)
    channel = program % channels
    chunk = program // channels
    prototype = tl.load(pi_ptr + channel)
    alpha = tl.load(alpha_ptr + channel)
    beta = tl.load(beta_ptr + channel)
    col_tiles = tl.cdiv(inner, COLS)
    sum_alpha = tl.zeros([ROWS, COLS], dtype=wide)
    sum_beta = tl.zeros([ROWS, COLS], dtype=wide)
    for step in range(tiles_per_chunk):
        tile = chunk * tiles_per_chunk + step
        n = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
        col = (tile % col_tiles) * COLS + tl.arange(0, COLS)
        mask = (n < outer)[:, None] & (col < inner)[None, :]
        at = ((n * channels + channel) * inner)[:, None] + col[None, :]
        leader_row = n * leader_channels + prototype
        g = widened(tl.load(grad_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first"))
        z = load_z(x_ptr, residual_ptr, at, mask)
        if gates_ptr is None:
            s = load_leader(x_ptr, residual_ptr, source_ptr, (leader_row * inner)[:, None] + col[None, :], mask)
            gate = gate_of(s, False, 1.0, False)
        else:
            byte_at = (leader_row * tl.cdiv(inner, 8))[:, None] + (col // 8)[None, :]
            gate = load_bit(gates_ptr, byte_at, (col % 8).to(tl.int32)[None, :], mask).to(wide)
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=mask)
        sum_alpha += g * z * gate
        sum_beta += g * z
    at = chunk * channels + channel
    tl.store(partial_ptr + at, tl.sum(tl.sum(sum_alpha, 1), 0))
    tl.store(partial_ptr + plane + at, tl.sum(tl.sum(sum_beta, 1), 0))


@triton.jit(do_not_specialize=["rows", "inner", "row_vectors", "leader_vectors", "tiles_per_chunk", "plane"])
def backward_hard_columns(
    grad_ptr, x_ptr, residual_ptr, source_ptr, gates_ptr, pi_ptr, alpha_ptr, beta_ptr, dx_ptr, partial_ptr,
    rows, inner, row_vectors, leader_vectors, tiles_per_chunk, plane,
    LAST: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, block of COLS columns): tiles of ROWS rows."""
    wide = alpha_ptr.dtype.element_ty
    width = row_vectors * VEC
    program = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(width, COLS)
    chunk = program // col_tiles
    col, in_cols = columns_of(program, col_tiles, width, COLS)
    channel, position = channel_of(col, inner, LAST)
    prototype = tl.load(pi_ptr + channel, mask=in_cols, other=0)
    alpha = tl.load(alpha_ptr + channel, mask=in_cols, other=0.0)[None, :]
    beta = tl.load(beta_ptr + channel, mask=in_cols, other=0.0)[None, :]
    if gates_ptr is None:
        leader_col = prototype * inner + position
        together = in_step(leader_col, col, in_cols, COLS, VEC)
        aligned_col = hinted(leader_col, col, together, VEC)
        leader_width = leader_vectors.to(tl.int64) * VEC
    else:
        byte, bit = bit_of(prototype, position, inner, LAST)
    sum_alpha = tl.zeros([ROWS, COLS], dtype=wide)
    sum_beta = tl.zeros([ROWS, COLS], dtype=wide)
    for step in range(tiles_per_chunk):
        row = (chunk * tiles_per_chunk + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & in_cols[None, :]
        at = row[:, None] * width + col[None, :]
        g = widened(tl.load(grad_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first"))
        z = load_z(x_ptr, residual_ptr, at, mask)
        if gates_ptr is None:
            leader_row = row * leader_width
            s = load_leaders(x_ptr, residual_ptr, source_ptr, leader_row, leader_col, aligned_col, together, mask, VEC)
            gate = gate_of(s, False, 1.0, False)
        else:
            gate = load_bit(gates_ptr, row[:, None] * leader_vectors + byte[None, :], bit[None, :], mask).to(wide)
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=mask)
        sum_alpha += g * z * gate
        sum_beta += g * z
    at = chunk * width + col
    tl.store(partial_ptr + at, tl.sum(sum_alpha, 0), mask=in_cols)
    tl.store(partial_ptr + plane + at, tl.sum(sum_beta, 0), mask=in_cols)


@triton.jit(do_not_specialize=["chunks", "channels", "plane"])
def sum_partials(
    partial_ptr, dalpha_ptr, dbeta_ptr, chunks, channels, positions, plane,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dalpha, dbeta [C] of partial [2, chunks, C, positions]: one program per block of COLS channels."""
    channel = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    in_cols = channel < channels
    sum_alpha = tl.zeros([ROWS, COLS], dtype=dalpha_ptr.dtype.element_ty)
    sum_beta = tl.zeros([ROWS, COLS], dtype=dalpha_ptr.dtype.element_ty)
    for first in range(0, chunks * positions, ROWS):
        term = first + tl.arange(0, ROWS)
        mask = (term < chunks * positions)[:, None] & in_cols[None, :]
        chunk, position = (term // positions).to(tl.int64), term % positions
        at = partial_ptr + (chunk[:, None] * channels + channel[None, :]) * positions + position[:, None]
        sum_alpha += tl.load(at, mask=mask, other=0.0)
        sum_beta += tl.load(at + plane, mask=mask, other=0.0)
    tl.store(dalpha_ptr + channel, tl.sum(sum_alpha, 0), mask=in_cols)
    tl.store(dbeta_ptr + channel, tl.sum(sum_beta, 0), mask=in_cols)
