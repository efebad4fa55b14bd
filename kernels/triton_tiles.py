"""How the Triton kernels cut their work: access widths, tiles, chunks. Plain functions of shape and dtype.

The order of every sum, and with it every bit of a result, depends on nothing else: nothing is autotuned.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .layout import Geometry

# The widest access of a GPU.
ACCESS_BYTES = 16
# Two of these a thread (128 threads) of each tensor that a forward tile reads, more than hide the memory's latency.
TILE_BYTES = 4096
# Elements of a backward tile: 8 a thread (4 of float64) leave room in the registers for g, z, leaders and two sums.
BACKWARD_TILE, BACKWARD_TILE_DOUBLE = 1024, 512
# Registers a thread of a backward run kernel may take. Told so, ptxas does not spill a few bytes for the sake of more
# resident threads, as it did by itself with a residual on sm_80 and sm_100.
RUNS_REGISTERS = 128
# Columns of a column kernel's tile: what a column is computed from is used for the tile's other dimension, its rows.
COLUMNS = 256
# Partial sums per channel beyond which chunks grow instead, so that the second pass stays short.
MAX_CHUNKS = 1024
# Rows narrower than this many bytes an access are better taken as part of a whole sample block.
NARROW_ACCESS = 8
# Below this a column's number and its division are 32-bit arithmetic.
MAX_WIDTH = 2**31 - 1


class Tile(NamedTuple):
    """Rows and columns of a tile, and the elements of an access in it."""

    rows: int
    cols: int
    vec: int

    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"ROWS": self.rows, "COLS": self.cols, "VEC": self.vec}


def power_of_2(n: int, most: int) -> int:
    """The smallest power of two that is at least n, but no more than `most`."""
    return min(triton.next_power_of_2(max(n, 1)), most)


def access(*lengths: int, itemsize: int) -> int:
    """Elements of the widest access that divides all these lengths."""
    vec = ACCESS_BYTES // itemsize
    while any(length % vec for length in lengths):
        vec //= 2
    return vec


def takes_columns(shape: Geometry, leader_channels: int, itemsize: int) -> bool:
    """Whether rows are sample blocks (triton_columns.py) rather than one channel's run.

    So they are channels last, and where runs are odd: 7x7 positions of float16 would be read one by one.
    """
    width = shape.channels * shape.inner
    if shape.inner == 1:
        return True
    if max(shape.channels, leader_channels) * shape.inner > MAX_WIDTH:
        return False
    run = access(shape.inner, itemsize=itemsize)
    return run * itemsize < NARROW_ACCESS and access(width, leader_channels * shape.inner, itemsize=itemsize) > run


def tile_over(rows: int, cols: int, vec: int, elements: int, least_cols: int = 1) -> Tile:
    """A tile of at most `elements` over [rows, cols], as wide as it can be."""
    tile_cols = max(power_of_2(cols, elements), least_cols, vec)
    return Tile(power_of_2(rows, max(elements // tile_cols, 1)), tile_cols, vec)


def column_tile(rows: int, cols: int, vec: int, elements: int, least_cols: int = 1) -> Tile:
    """A tile of at most `elements` over [rows, cols], with several rows where there are any."""
    spare = power_of_2(rows, elements)
    most = max(COLUMNS, elements // spare)
    tile_cols = max(power_of_2(cols, min(most, elements)), least_cols, vec)
    return Tile(power_of_2(rows, max(elements // tile_cols, 1)), tile_cols, vec)


def forward_elements(itemsize: int) -> int:
    """Elements of a forward tile."""
    return TILE_BYTES // itemsize


def backward_elements(itemsize: int) -> int:
    """Elements of a backward tile."""
    return BACKWARD_TILE_DOUBLE if itemsize == 8 else BACKWARD_TILE


def chunking(tiles: int, programs_per_tile: int, wanted: int, least: int = 1) -> tuple[int, int]:
    """(tiles per chunk, chunks): `least` tiles each, more once there are `wanted` programs without."""
    per_chunk = max(least, tiles * programs_per_tile // wanted, triton.cdiv(tiles, MAX_CHUNKS))
    return per_chunk, triton.cdiv(tiles, per_chunk)


@contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            yield
    else:
        yield
