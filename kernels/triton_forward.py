"""Triton forward kernels of shared_relu: every element of x read once, y written once.

`forward_runs` takes a row of its tile from one run of a channel (triton_tiles.py says when), `forward_columns` from
a sample block (triton_columns.py). Sizes that an access's width hangs on come divided by VEC, the elements of one
access: so the compiler knows them as multiples of it. Optional tensors are None, and then leave no code.
One program per tile in a one-dimensional grid, whose limit of 2^31 - 1 programs is beyond any tensor that fits a GPU.
"""

import triton
import triton.language as tl

from .triton_columns import bit_of, channel_of, columns_of, hinted, in_step, load_leaders
from .triton_gates import gate_of, load_bit, load_leader, load_z, packed, soft_state


@triton.jit(do_not_specialize=["rows", "channels", "run_vectors", "leader_channels", "prototypes"])
def forward_runs(
    x_ptr, residual_ptr, source_ptr, gates_ptr, pi_ptr, alpha_ptr, beta_ptr, soft_ptr, gamma_ptr, y_ptr, emitted_ptr,
    rows, channels, run_vectors, leader_channels, prototypes,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y over x [outer * C, inner]; source [outer * leader_channels, inner], or gates [.., ceil(inner / 8)].

    With emitted_ptr the gates of the first `prototypes` channels are packed to it, every byte by one lane.
    """
    inner = run_vectors.to(tl.int64) * VEC
    tile = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(inner, COLS)
    row = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    col = (tile % col_tiles) * COLS + tl.arange(0, COLS)
    in_rows = row < rows
    mask = in_rows[:, None] & (col < inner)[None, :]
    n, channel = row // channels, row % channels
    leader_row = n * leader_channels + tl.load(pi_ptr + channel, mask=in_rows, other=0)
    alpha = tl.load(alpha_ptr + channel, mask=in_rows, other=0.0)[:, None]
    beta = tl.load(beta_ptr + channel, mask=in_rows, other=0.0)[:, None]
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr)

    at = row[:, None] * inner + col[None, :]
    z = load_z(x_ptr, residual_ptr, at, mask)
    if gates_ptr is None:
        s = load_leader(x_ptr, residual_ptr, source_ptr, leader_row[:, None] * inner + col[None, :], mask)
        gate = gate_of(s, (channel < soft_channels)[:, None], gamma, soft_ptr is not None)
    else:
        byte_at = leader_row[:, None] * tl.cdiv(inner, 8) + (col // 8)[None, :]
        gate = load_bit(gates_ptr, byte_at, (col % 8).to(tl.int32)[None, :], mask).to(z.dtype)
    tl.store(y_ptr + at, (z * (alpha * gate + beta)).to(y_ptr.dtype.element_ty), mask=mask)

    if emitted_ptr is not None:
        run_bytes = tl.cdiv(inner, 8)
        byte = (tile % col_tiles) * (COLS // 8) + tl.arange(0, COLS // 8)
        owns = in_rows & (channel < prototypes)
        byte_at = (n * prototypes + channel)[:, None] * run_bytes + byte[None, :]
        bits = packed((z >= 0.0) & mask, ROWS, COLS)
        tl.store(emitted_ptr + byte_at, bits, mask=owns[:, None] & (byte < run_bytes)[None, :])


@triton.jit(do_not_specialize=["rows", "inner", "row_vectors", "leader_vectors", "prototypes"])
def forward_columns(
    x_ptr, residual_ptr, source_ptr, gates_ptr, pi_ptr, alpha_ptr, beta_ptr, soft_ptr, gamma_ptr, y_ptr, emitted_ptr,
    rows, inner, row_vectors, leader_vectors, prototypes,
    LAST: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y over x [outer, C * inner]; source [outer, leader_channels * inner] = VEC * leader_vectors columns.

    With gates a row has leader_vectors bytes. emitted_ptr, for LAST only, as in forward_runs.
    """
    width = row_vectors * VEC
    tile = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(width, COLS)
    row = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    col, in_cols = columns_of(tile, col_tiles, width, COLS)
    mask = (row < rows)[:, None] & in_cols[None, :]
    channel, position = channel_of(col, inner, LAST)
    prototype = tl.load(pi_ptr + channel, mask=in_cols, other=0)
    alpha = tl.load(alpha_ptr + channel, mask=in_cols, other=0.0)[None, :]
    beta = tl.load(beta_ptr + channel, mask=in_cols, other=0.0)[None, :]
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr)

    at = row[:, None] * width + col[None, :]
    z = load_z(x_ptr, residual_ptr, at, mask)
    if gates_ptr is None:
        leader_col = prototype * inner + position
        together = in_step(leader_col, col, in_cols, COLS, VEC)
        aligned_col = hinted(leader_col, col, together, VEC)
        leader_row = row * (leader_vectors.to(tl.int64) * VEC)
        s = load_leaders(x_ptr, residual_ptr, source_ptr, leader_row, leader_col, aligned_col, together, mask, VEC)
        gate = gate_of(s, (channel < soft_channels)[None, :], gamma, soft_ptr is not None)
    else:
        byte, bit = bit_of(prototype, position, inner, LAST)
        gate = load_bit(gates_ptr, row[:, None] * leader_vectors + byte[None, :], bit[None, :], mask).to(z.dtype)
    tl.store(y_ptr + at, (z * (alpha * gate + beta)).to(y_ptr.dtype.element_ty), mask=mask)

    if emitted_ptr is not None:
        row_bytes = tl.cdiv(prototypes, 8)
        byte = (tile % col_tiles) * (COLS // 8) + tl.arange(0, COLS // 8)
        bits = packed((z >= 0.0) & (col < prototypes)[None, :], ROWS, COLS)
        writes = (row < rows)[:, None] & (byte < row_bytes)[None, :]
        tl.store(emitted_ptr + row[:, None] * row_bytes + byte[None, :], bits, mask=writes)
