"""Triton backward kernels of shared_relu with soft gates: dx, the source's gradient and partial sums in one pass.

    ds[p] = sum over {c < soft_channels: pi[c] = p} of g * x * alpha[c] * gamma * phi(gamma * s[p])

A program owns prototypes and positions, walks the prototypes' members (all c with pi[c] = p, through `members`
and `offsets`), keeps ds in registers and so needs no atomics. With a foreign source ds goes to dsource. With OWN
gates it is part of dx[p]: members below P are therefore left out of the walk's stores and written at the end, from
p's own gate, that of s[pi[p]] (pi need not map a prototype to itself), plus ds[p].
"""

import triton
import triton.language as tl

from .triton_gates import gate_of, gate_slope, soft_state


@triton.jit
def backward_soft_channels_first(
    grad_ptr, x_ptr, source_ptr, pi_ptr, members_ptr, offsets_ptr, alpha_ptr, beta_ptr, soft_ptr, gamma_ptr,
    dx_ptr, dsource_ptr, partial_ptr,
    outer, channels, inner, source_channels, prototypes, plane,
    OWN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (tile, p): ROWS samples by COLS positions; a tile is a chunk of partial sums."""
    wide = alpha_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    p = program % prototypes
    tile = program // prototypes
    col_tiles = tl.cdiv(inner, COLS)
    n = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    col = (tile % col_tiles) * COLS + tl.arange(0, COLS)
    mask = (n < outer)[:, None] & (col < inner)[None, :]
    source_row = n * source_channels
    source_at = ((source_row + p) * inner)[:, None] + col[None, :]
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr, alpha_ptr, True)

    s = tl.load(source_ptr + source_at, mask=mask, other=0.0).to(wide)
    slope = gate_slope(s, gamma)
    ds = tl.zeros([ROWS, COLS], dtype=wide)
    for k in range(tl.load(offsets_ptr + p), tl.load(offsets_ptr + p + 1)):
        channel = tl.load(members_ptr + k).to(tl.int64)
        alpha = tl.load(alpha_ptr + channel)
        beta = tl.load(beta_ptr + channel)
        at = ((n * channels + channel) * inner)[:, None] + col[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(wide)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(wide)
        is_soft = channel < soft_channels
        gate = gate_of(s, is_soft, gamma, True)
        ds += tl.where(is_soft, g * x * (alpha * slope), 0.0)
        writes = (channel >= prototypes) | (not OWN)
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=mask & writes)
        sum_at = tile * channels + channel
        tl.store(partial_ptr + sum_at, tl.sum(tl.sum(g * x * gate, 1), 0))
        tl.store(partial_ptr + plane + sum_at, tl.sum(tl.sum(g * x, 1), 0))

    if OWN:
        leader = tl.load(pi_ptr + p)
        own_s = tl.load(source_ptr + ((source_row + leader) * inner)[:, None] + col[None, :], mask=mask, other=0.0)
        gate = gate_of(own_s.to(wide), p < soft_channels, gamma, True)
        at = ((n * channels + p) * inner)[:, None] + col[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(wide)
        dx = g * (tl.load(alpha_ptr + p) * gate + tl.load(beta_ptr + p)) + ds
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(dsource_ptr + source_at, ds.to(dsource_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_soft_channels_last(
    grad_ptr, x_ptr, source_ptr, pi_ptr, members_ptr, offsets_ptr, alpha_ptr, beta_ptr, soft_ptr, gamma_ptr,
    dx_ptr, dsource_ptr, partial_ptr,
    rows, channels, source_channels, prototypes, plane,
    OWN: tl.constexpr, ROWS: tl.constexpr, MEMBERS: tl.constexpr, PROTOTYPES: tl.constexpr,
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
    soft_channels, gamma = soft_state(soft_ptr, gamma_ptr, alpha_ptr, True)

    block_mask = in_rows[:, None] & in_block[None, :]
    source_at = row[:, None] * source_channels + p[None, :]
    s = tl.load(source_ptr + source_at, mask=block_mask, other=0.0).to(wide)
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
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(wide)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(wide)
        is_soft = (channel < soft_channels)[None, :, :]
        gate = gate_of(s[:, None, :], is_soft, gamma, True)
        # is_member too: the slope of a lane without a member may be NaN.
        ds += tl.sum(tl.where(is_soft & is_member[None, :, :], g * x * (alpha * slope[:, None, :]), 0.0), 1)
        writes = mask & ((channel >= prototypes) | (not OWN))[None, :, :]
        tl.store(dx_ptr + at, (g * (alpha * gate + beta)).to(dx_ptr.dtype.element_ty), mask=writes)
        sum_at = chunk * channels + channel
        # A lane beyond the rows has s = 0 and so a finite gate; its g and x are 0.
        tl.store(partial_ptr + sum_at, tl.sum(g * x * gate, 0), mask=is_member)
        tl.store(partial_ptr + plane + sum_at, tl.sum(g * x, 0), mask=is_member)

    if OWN:
        leader = tl.load(pi_ptr + p, mask=in_block, other=0)
        own_s = tl.load(source_ptr + row[:, None] * source_channels + leader[None, :], mask=block_mask, other=0.0)
        gate = gate_of(own_s.to(wide), (p < soft_channels)[None, :], gamma, True)
        at = row[:, None] * channels + p[None, :]
        g = tl.load(grad_ptr + at, mask=block_mask, other=0.0).to(wide)
        alpha = tl.load(alpha_ptr + p, mask=in_block, other=0.0)[None, :]
        beta = tl.load(beta_ptr + p, mask=in_block, other=0.0)[None, :]
        tl.store(dx_ptr + at, (g * (alpha * gate + beta) + ds).to(dx_ptr.dtype.element_ty), mask=block_mask)
    else:
        tl.store(dsource_ptr + source_at, ds.to(dsource_ptr.dtype.element_ty), mask=block_mask)
