"""Triton backward kernels of shared_relu with soft gates: dx, the source's gradient and partial sums in one pass.

    ds[p] = sum over {c < soft_channels: pi[c] = p} of g * z * alpha[c] * gamma * phi(gamma * s[p])

A program owns prototypes and positions, walks the prototypes' members (all c with pi[c] = p, through `members`
and `offsets`), keeps ds in registers and so needs no atomics. With a foreign source ds goes to dsource. Without
a source it is part of dx[p]: members below P are therefore left out of the walk's stores and written at the end, from
p's own gate, that of s[pi[p]] (pi need not map a prototype to itself), plus ds[p].
"""

import triton
import triton.language as tl

from .triton_gates import gate_of, gate_slope, load_leader, load_z, soft_state, widened


@triton.jit(do_not_specialize=["outer", "channels", "run_vectors", "leader_channels", "prototypes", "plane"])
def backward_soft_runs(
    grad_ptr, x_ptr, residual_ptr, source_ptr, pi_ptr, members_ptr, offsets_ptr, alpha_ptr, beta_ptr,
    soft_ptr, gamma_ptr, dx_ptr, dsource_ptr, partial_ptr,
    outer, channels, run_vectors, leader_channels, prototypes, plane,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (tile, p): ROWS samples by COLS positions; a tile is a chunk of partial sums."""
    wide = alpha_ptr.dtype.element_ty
    inner = run_vectors.to(tl.int64) * VEC
    program = tl.program_id(0).to(tl.int64)
    p = program % prototypes
    tile = program // prototypes
    col_tiles = tl.cdiv(inner, COLS)
    n = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    col = (tile % col_tiles) * COLS + tl.arange(0, COLS)
    mask = (n < outer)[:, None] & (col < inner)[None, :]
    leader_row = n * leader_channels
    leader_at = ((leader_row + p) * inner)[:, None] + col[None, :]
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr)

    s = load_leader(x_ptr, residual_ptr, source_ptr, leader_at, mask)
    slope = gate_slope(s, gamma)
    ds = tl.zeros([ROWS, COLS], dtype=wide)
    for k in range(tl.load(offsets_ptr + p), tl.load(offsets_ptr + p + 1)):
        channel = tl.load(members_ptr + k).to(tl.int64)
        alpha = tl.load(alpha_ptr + channel)
        beta = tl.load(beta_ptr + channel)
        at = ((n * channels + channel) * inner)[:, None] + col[None, :]
        g = widened(tl.load(grad_ptr + at, mask=mask, other=0.0))
        z = load_z(x_ptr, residual_ptr, at, mask)
        is_soft = channel < soft_channels
        gate = gate_of(s, is_soft, gamma, True)
        ds += tl.where(is_soft, g * z * (alpha * slope), 0.0)
        writes = (channel >= prototypes) | (source_ptr is not None)
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=mask & writes)
        sum_at = tile * channels + channel
        tl.store(partial_ptr + sum_at, tl.sum(tl.sum(g * z * gate, 1), 0))
        tl.store(partial_ptr + plane + sum_at, tl.sum(tl.sum(g * z, 1), 0))

    if source_ptr is None:
        leader = tl.load(pi_ptr + p)
        own_s = load_z(x_ptr, residual_ptr, ((leader_row + leader) * inner)[:, None] + col[None, :], mask)
        gate = gate_of(own_s, p < soft_channels, gamma, True)
        at = ((n * channels + p) * inner)[:, None] + col[None, :]
        g = widened(tl.load(grad_ptr + at, mask=mask, other=0.0))
        dx = g * (tl.load(alpha_ptr + p) * gate + tl.load(beta_ptr + p)) + ds
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(dsource_ptr + leader_at, ds.to(dsource_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "channels", "leader_channels", "prototypes", "plane"])
def backward_soft_last(
    grad_ptr, x_ptr, residual_ptr, source_ptr, pi_ptr, members_ptr, offsets_ptr, alpha_ptr, beta_ptr,
    soft_ptr, gamma_ptr, dx_ptr, dsource_ptr, partial_ptr,
    rows, channels, leader_channels, prototypes, plane,
    ROWS: tl.constexpr, MEMBERS: tl.constexpr, PROTOTYPES: tl.constexpr,
):  # fmt: skip
    """Program (chunk of ROWS positions, block of prototypes): tiles [ROWS, MEMBERS, PROTOTYPES] along the members.

    The balanced map's k-th members of neighbouring prototypes are neighbouring channels, so that [MEMBERS,
    PROTOTYPES] is one contiguous run of channels for every P that is a power of two.
    """
    wide = alpha_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(prototypes, PROTOTYPES)
    chunk = program // blocks
    row = chunk * ROWS + tl.arange(0, ROWS)
    p = (program % blocks) * PROTOTYPES + tl.arange(0, PROTOTYPES)
    in_rows, in_block = row < rows, p < prototypes
    first = tl.load(offsets_ptr + p, mask=in_block, other=0)
    last = tl.load(offsets_ptr + p + 1, mask=in_block, other=0)
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr)

    block_mask = in_rows[:, None] & in_block[None, :]
    leader_at = row[:, None] * leader_channels + p[None, :]
    s = load_leader(x_ptr, residual_ptr, source_ptr, leader_at, block_mask)
    slope = gate_slope(s, gamma)
    ds = tl.zeros([ROWS, PROTOTYPES], dtype=wide)
    for step in range(0, tl.max(last - first, 0), MEMBERS):
        k = first[None, :] + (step + tl.arange(0, MEMBERS))[:, None]
        is_member = k < last[None, :]
        channel = tl.load(members_ptr + k, mask=is_member, other=0).to(tl.int64)
        alpha = tl.load(alpha_ptr + channel, mask=is_member, other=0.0)[None, :, :]
        beta = tl.load(beta_ptr + channel, mask=is_member, other=0.0)[None, :, :]
        mask = in_rows[:, None, None] & is_member[None, :, :]
        at = row[:, None, None] * channels + channel[None, :, :]
        g = widened(tl.load(grad_ptr + at, mask=mask, other=0.0))
        z = load_z(x_ptr, residual_ptr, at, mask)
        is_soft = (channel < soft_channels)[None, :, :]
        gate = gate_of(s[:, None, :], is_soft, gamma, True)
        # is_member too: the slope of a lane without a member may be NaN.
        ds += tl.sum(tl.where(is_soft & is_member[None, :, :], g * z * (alpha * slope[:, None, :]), 0.0), 1)
        writes = mask & ((channel >= prototypes) | (source_ptr is not None))[None, :, :]
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=writes)
        sum_at = chunk * channels + channel
        # A lane beyond the rows has s = 0 and so a finite gate; its g and z are 0.
        tl.store(partial_ptr + sum_at, tl.sum(g * z * gate, 0), mask=is_member)
        tl.store(partial_ptr + plane + sum_at, tl.sum(g * z, 0), mask=is_member)

    if source_ptr is None:
        leader = tl.load(pi_ptr + p, mask=in_block, other=0)
        own_s = load_z(x_ptr, residual_ptr, row[:, None] * leader_channels + leader[None, :], block_mask)
        gate = gate_of(own_s, (p < soft_channels)[None, :], gamma, True)
        at = row[:, None] * channels + p[None, :]
        g = widened(tl.load(grad_ptr + at, mask=block_mask, other=0.0))
        alpha = tl.load(alpha_ptr + p, mask=in_block, other=0.0)[None, :]
        beta = tl.load(beta_ptr + p, mask=in_block, other=0.0)[None, :]
        tl.store(dx_ptr + at, (g * (alpha * gate + beta) + ds).to(dx_ptr.dtype.element_ty), mask=block_mask)
    else:
        tl.store(dsource_ptr + leader_at, ds.to(dsource_ptr.dtype.element_ty), mask=block_mask)
