"""Triton forward kernels of shared_relu: every element of x read once, y written once.

A tile is [ROWS, COLS] with its columns contiguous in memory. Channels first (inner > 1): a row is one (n, c), its
columns are positions. Channels last (inner == 1): a row is one position, its columns are channels and the source
is gathered inside a row. One program per tile in a one-dimensional grid, whose limit of 2^31 - 1 programs is
beyond any tensor that fits a GPU.
"""

import triton
import triton.language as tl

from .triton_gates import gate_of, soft_state


@triton.jit
def forward_channels_first(
    x_ptr, source_ptr, pi_ptr, alpha_ptr, beta_ptr, soft_ptr, gamma_ptr, y_ptr,
    rows, channels, inner, source_channels,
    SOFT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y over x [outer * C, inner], source [outer * source_channels, inner]."""
    wide = alpha_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(inner, COLS)
    row = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    col = (tile % col_tiles) * COLS + tl.arange(0, COLS)
    in_rows = row < rows
    mask = in_rows[:, None] & (col < inner)[None, :]
    channel = row % channels
    prototype = tl.load(pi_ptr + channel, mask=in_rows, other=0)
    alpha = tl.load(alpha_ptr + channel, mask=in_rows, other=0.0)[:, None]
    beta = tl.load(beta_ptr + channel, mask=in_rows, other=0.0)[:, None]
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr, alpha_ptr, SOFT)

    at = row[:, None] * inner + col[None, :]
    source_row = (row // channels) * source_channels + prototype
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(wide)
    s = tl.load(source_ptr + source_row[:, None] * inner + col[None, :], mask=mask, other=0.0).to(wide)
    gate = gate_of(s, (channel < soft_channels)[:, None], gamma, SOFT)
    tl.store(y_ptr + at, (x * (alpha * gate + beta)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_channels_last(
    x_ptr, source_ptr, pi_ptr, alpha_ptr, beta_ptr, soft_ptr, gamma_ptr, y_ptr,
    rows, channels, source_channels,
    SOFT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y over x [rows, C], source [rows, source_channels]."""
    wide = alpha_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(channels, COLS)
    row = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    channel = (tile % col_tiles) * COLS + tl.arange(0, COLS)
    in_cols = channel < channels
    mask = (row < rows)[:, None] & in_cols[None, :]
    prototype = tl.load(pi_ptr + channel, mask=in_cols, other=0)
    alpha = tl.load(alpha_ptr + channel, mask=in_cols, other=0.0)[None, :]
    beta = tl.load(beta_ptr + channel, mask=in_cols, other=0.0)[None, :]
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr, alpha_ptr, SOFT)

    at = row[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(wide)
    s = tl.load(source_ptr + row[:, None] * source_channels + prototype[None, :], mask=mask, other=0.0).to(wide)
    gate = gate_of(s, (channel < soft_channels)[None, :], gamma, SOFT)
    tl.store(y_ptr + at, (x * (alpha * gate + beta)).to(y_ptr.dtype.element_ty), mask=mask)
