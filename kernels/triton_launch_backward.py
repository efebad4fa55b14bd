"""Launches of shared_relu's backward kernels: what each is given, how many programs it takes, the second pass."""

from typing import Any

import triton
from torch import Tensor

from .layout import geometry
from .triton_backward import backward_hard_columns, backward_hard_runs, sum_partials
from .triton_backward_soft import backward_soft_last, backward_soft_runs
from .triton_tiles import (
    RUNS_REGISTERS,
    Tile,
    access,
    backward_elements,
    chunking,
    column_tile,
    power_of_2,
    takes_columns,
    tile_over,
)

# Rows that a chunk of a column kernel has at least: its two sums a column are then a tenth of what it moves.
CHUNK_ROWS = 16
# Programs beyond which a chunk takes more tiles: a few for each place that a big GPU has for a block of threads.
WANTED_PROGRAMS = 4096
# Channels in a row of the channels-last soft tile: 128 bytes of float32.
SOFT_LANES = 32
# Elements of that tile and warps for it: 64 positions (16 of float64) keep partial sums small beside dx; more
# elements a thread, or 8 warps for float64, spill (scripts/check-kernels).
SOFT_TILE, SOFT_WARPS = 2048, 8
SOFT_TILE_DOUBLE, SOFT_WARPS_DOUBLE = 512, 4
# The other soft kernel's tile is halved, down to the first, while it makes fewer programs than the second.
SOFT_TILE_LEAST, SOFT_PROGRAMS = 256, 1024
# Tile of the second pass: 32 bytes of a row of partial sums, many rows.
SUM_ROWS, SUM_COLS = 256, 8


def leader_row(gates: Tensor | None, vectors: int) -> int:
    """What a row of leaders is long: bytes of packed gates, else vectors."""
    return vectors if gates is None else gates[0].numel()


def hard_sums(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    source: Tensor | None,
    gates: Tensor | None,
    constants: tuple[Tensor, ...],
    dx: Tensor,
) -> Tensor:
    """Writes dx; returns the partial sums [2, chunks, C, positions] of dalpha and dbeta."""
    shape, itemsize = geometry(dx), x.element_size()
    outer, channels, inner = shape
    leaders = channels if source is None else source.shape[1]
    tensors = (grad, x, residual, source, gates, *constants, dx)
    elements = backward_elements(itemsize)
    if takes_columns(shape, leaders, itemsize):
        width = channels * inner
        vec = access(width, leaders * inner, itemsize=itemsize)
        tile = column_tile(outer, width, vec, elements)
        tiles, programs = triton.cdiv(outer, tile.rows), triton.cdiv(width, tile.cols)
        per_chunk, chunks = chunking(tiles, programs, WANTED_PROGRAMS, triton.cdiv(CHUNK_ROWS, tile.rows))
        partial = constants[1].new_empty((2, chunks, channels, inner))
        sizes = (outer, inner, width // vec, leader_row(gates, leaders * inner // vec), per_chunk, partial[0].numel())
        backward_hard_columns[(chunks * programs,)](
            *tensors, partial, *sizes, LAST=inner == 1, **tile.constants()
        )  # fmt: skip
    else:
        vec = access(inner, itemsize=itemsize)
        tile = tile_over(outer, inner, vec, elements)
        tiles = triton.cdiv(outer, tile.rows) * triton.cdiv(inner, tile.cols)
        per_chunk, chunks = chunking(tiles, channels, WANTED_PROGRAMS)
        partial = constants[1].new_empty((2, chunks, channels, 1))
        rows_of = leaders if gates is None else gates.shape[1]
        lengths = (outer, channels, inner // vec, rows_of, per_chunk, partial[0].numel())
        backward_hard_runs[(chunks * channels,)](
            *tensors, partial, *lengths, **tile.constants(), maxnreg=RUNS_REGISTERS
        )  # fmt: skip
    return partial


def soft_sums(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    source: Tensor | None,
    sharing: tuple[Tensor | None, ...],
    dx: Tensor,
    dsource: Tensor | None,
) -> Tensor:
    """Writes dx and, given a source, dsource's first P channels; returns the partial sums [2, chunks, C, 1]."""
    outer, channels, inner = geometry(dx)
    alpha, offsets = sharing[3], sharing[2]
    assert alpha is not None
    assert offsets is not None
    prototypes = offsets.shape[0] - 1
    leaders = channels if source is None else source.shape[1]
    kernel: Any
    sizes: tuple[int, ...]
    if inner > 1:
        tile = soft_runs_tile(outer, prototypes, inner, x.element_size())
        chunks, blocks = triton.cdiv(outer, tile.rows) * triton.cdiv(inner, tile.cols), prototypes
        kernel, sizes = backward_soft_runs, (outer, channels, inner // tile.vec)
        constants = tile.constants() | {"maxnreg": RUNS_REGISTERS}
    else:
        constants = soft_last_tile(outer, channels, prototypes, x.element_size())
        chunks, blocks = triton.cdiv(outer, constants["ROWS"]), triton.cdiv(prototypes, constants["PROTOTYPES"])
        kernel, sizes = backward_soft_last, (outer, channels)
    partial = alpha.new_empty((2, chunks, channels, 1))
    kernel[(chunks * blocks,)](
        grad, x, residual, source, *sharing, dx, dsource, partial,
        *sizes, leaders, prototypes, chunks * channels, **constants,
    )  # fmt: skip
    return partial


def soft_runs_tile(outer: int, prototypes: int, inner: int, itemsize: int) -> Tile:
    """Halved while there are few programs: one has all members of a prototype, and small maps make few tiles."""
    elements, vec = backward_elements(itemsize), access(inner, itemsize=itemsize)
    while elements > SOFT_TILE_LEAST and prototypes * triton.cdiv(outer * inner, elements) < SOFT_PROGRAMS:
        elements //= 2
    return tile_over(outer, inner, vec, elements)


def soft_last_tile(outer: int, channels: int, prototypes: int, itemsize: int) -> dict[str, int]:
    """Constants of backward_soft_last: prototypes side by side, as many members as fill a row of SOFT_LANES."""
    lanes = power_of_2(prototypes, SOFT_LANES)
    deep = power_of_2(triton.cdiv(channels, prototypes), SOFT_LANES // lanes)
    elements, warps = (SOFT_TILE_DOUBLE, SOFT_WARPS_DOUBLE) if itemsize == 8 else (SOFT_TILE, SOFT_WARPS)
    rows = power_of_2(outer, elements // (lanes * deep))
    return {"ROWS": rows, "MEMBERS": deep, "PROTOTYPES": lanes, "num_warps": warps}


def sum_up(partial: Tensor) -> tuple[Tensor, Tensor]:
    """(dalpha, dbeta) of their partial sums [2, chunks, C, positions], added in a fixed order."""
    _, chunks, channels, positions = partial.shape
    dalpha, dbeta = partial.new_empty(channels), partial.new_empty(channels)
    rows, cols = power_of_2(chunks * positions, SUM_ROWS), power_of_2(channels, SUM_COLS)
    sizes = (chunks, channels, positions, partial[0].numel())
    sum_partials[(triton.cdiv(channels, cols),)](partial, dalpha, dbeta, *sizes, ROWS=rows, COLS=cols)
    return dalpha, dbeta
