"""Triton backward kernels of shared_relu with hard gates, and the second pass that ends the sums of both kinds.

dx = g * (alpha * gate + beta) is written in the pass that sums g*x*gate and g*x. A program owns a fixed run of
tiles (a chunk) and writes one partial sum per channel to [2, chunks, C] (dalpha's, then dbeta's, `plane` apart);
`sum_partials` adds the chunks in a fixed order. No atomics: the same bits on every run.
"""

import triton
import triton.language as tl

from .triton_gates import gate_of


@triton.jit
def backward_hard_channels_first(
    grad_ptr, x_ptr, source_ptr, pi_ptr, alpha_ptr, beta_ptr, dx_ptr, partial_ptr,
    outer, channels, inner, source_channels, tiles_per_chunk, plane,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, c): tiles of ROWS samples by COLS positions of channel c."""
    wide = alpha_ptr.dtype.element_ty
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
        source_at = ((n * source_channels + prototype) * inner)[:, None] + col[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(wide)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(wide)
        s = tl.load(source_ptr + source_at, mask=mask, other=0.0).to(wide)
        gate = gate_of(s, False, 1.0, False)
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=mask)
        sum_alpha += g * x * gate
        sum_beta += g * x
    at = chunk * channels + channel
    tl.store(partial_ptr + at, tl.sum(tl.sum(sum_alpha, 1), 0))
    tl.store(partial_ptr + plane + at, tl.sum(tl.sum(sum_beta, 1), 0))


@triton.jit
def backward_hard_channels_last(
    grad_ptr, x_ptr, source_ptr, pi_ptr, alpha_ptr, beta_ptr, dx_ptr, partial_ptr,
    rows, channels, source_channels, tiles_per_chunk, plane,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, block of COLS channels): tiles of ROWS positions."""
    wide = alpha_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(channels, COLS)
    chunk = program // col_tiles
    channel = (program % col_tiles) * COLS + tl.arange(0, COLS)
    in_cols = channel < channels
    prototype = tl.load(pi_ptr + channel, mask=in_cols, other=0)
    alpha = tl.load(alpha_ptr + channel, mask=in_cols, other=0.0)[None, :]
    beta = tl.load(beta_ptr + channel, mask=in_cols, other=0.0)[None, :]
    sum_alpha = tl.zeros([ROWS, COLS], dtype=wide)
    sum_beta = tl.zeros([ROWS, COLS], dtype=wide)
    for step in range(tiles_per_chunk):
        row = (chunk * tiles_per_chunk + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & in_cols[None, :]
        at = row[:, None] * channels + channel[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(wide)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(wide)
        s = tl.load(source_ptr + row[:, None] * source_channels + prototype[None, :], mask=mask, other=0.0).to(wide)
        gate = gate_of(s, False, 1.0, False)
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=mask)
        sum_alpha += g * x * gate
        sum_beta += g * x
    at = chunk * channels + channel
    tl.store(partial_ptr + at, tl.sum(sum_alpha, 0), mask=in_cols)
    tl.store(partial_ptr + plane + at, tl.sum(sum_beta, 0), mask=in_cols)


@triton.jit
def sum_partials(
    partial_ptr, dalpha_ptr, dbeta_ptr, chunks, channels, plane,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dalpha, dbeta [C] of partial [2, chunks, C]: one program per block of COLS channels."""
    channel = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    in_cols = channel < channels
    sum_alpha = tl.zeros([ROWS, COLS], dtype=dalpha_ptr.dtype.element_ty)
    sum_beta = tl.zeros([ROWS, COLS], dtype=dalpha_ptr.dtype.element_ty)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & in_cols[None, :]
        at = partial_ptr + chunk.to(tl.int64)[:, None] * channels + channel[None, :]
        sum_alpha += tl.load(at, mask=mask, other=0.0)
        sum_beta += tl.load(at + plane, mask=mask, other=0.0)
    tl.store(dalpha_ptr + channel, tl.sum(sum_alpha, 0), mask=in_cols)
    tl.store(dbeta_ptr + channel, tl.sum(sum_beta, 0), mask=in_cols)
