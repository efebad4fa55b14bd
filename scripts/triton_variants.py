"""Which specialisations of the Triton kernels are compiled ahead of time: every kernel with every optional tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8, "i64": 8}
# The dtypes whose 16-byte accesses are demanded.
WIDE_DTYPES = ("fp32", "bf16", "i64")
# x of the row kernels, channels last, and channels first with odd runs; 16 prototypes (triton_tiles.py cuts these).
RUNS, LAST, ODD = (128, 64, 1024), (131072, 64, 1), (128, 512, 49)


@dataclass(frozen=True)
class Variant:
    """One specialisation: a kernel, x's dtype, the optional tensors it is given, and its constants."""

    module: str
    kernel: str
    dtype: str
    given: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    wide: bool = False
    options: tuple[tuple[str, int], ...] = ()

    @property
    def label(self) -> str:
        """The kernel with what it is given, e.g. `forward_columns residual gates`."""
        layout = {True: ["last"], False: ["odd"]}.get(dict(self.constants).get("LAST"), [])
        return " ".join([self.kernel, *layout, *self.given])


def variants() -> Iterator[Variant]:
    """All of them, with the tiles that are launched for the shapes above."""
    for dtype in ("fp32", "bf16"):
        yield from _forward(dtype, ["", "source residual soft", "gates residual", "residual emitted"])
        yield from _hard(dtype, ["", "residual", "source", "gates residual"])
        yield from _soft(dtype, ["", "residual", "residual source"])
        yield from _masked(dtype)
    # float64 has the fullest registers: its largest kernels. float16 is compiled like bfloat16: its plain ones.
    yield from _forward("fp64", ["source residual soft", "residual emitted"])
    yield from _hard("fp64", ["residual", "gates residual"])
    yield from _soft("fp64", ["residual", "residual source"])
    yield from _masked("fp64")
    yield from _forward("fp16", [""])
    yield from _hard("fp16", [""])
    yield from _soft("fp16", [""])
    yield from _share()
    for dtype in ("fp32", "fp64"):
        tile = {"ROWS": 256, "COLS": 8}
        yield _variant("triton_backward", "sum_partials", dtype, "", tile | {"positions": 1}, narrow=True)
        yield _variant("triton_backward", "sum_partials", dtype, "positions", tile, narrow=True)


def _variant(
    module: str, kernel: str, dtype: str, given: str, constants: dict[str, Any], *, narrow: bool = False
) -> Variant:
    options = tuple((name, value) for name, value in constants.items() if name in ("num_warps", "maxnreg"))
    known = tuple(item for item in constants.items() if item not in options)
    wide = dtype in WIDE_DTYPES and not narrow
    return Variant(module, kernel, dtype, tuple(given.split()), known, wide, options)


def _forward(dtype: str, given: list[str]) -> Iterator[Variant]:
    from deepshare.kernels.triton_tiles import access, column_tile, forward_elements, tile_over

    size = ITEMSIZE[dtype]
    elements = forward_elements(size)
    for tensors in given:
        runs = tile_over(RUNS[0] * RUNS[1], RUNS[2], access(RUNS[2], itemsize=size), elements)
        yield _variant("triton_forward", "forward_runs", dtype, tensors, runs.constants())
        for outer, channels, inner in (LAST, ODD):
            if inner > 1 and "emitted" in tensors:
                continue
            tile = column_tile(outer, channels * inner, access(channels * inner, itemsize=size), elements)
            constants = tile.constants() | {"LAST": inner == 1}
            yield _variant("triton_forward", "forward_columns", dtype, tensors, constants)


def _hard(dtype: str, given: list[str]) -> Iterator[Variant]:
    from deepshare.kernels.triton_tiles import RUNS_REGISTERS, access, backward_elements, column_tile, tile_over

    size, limit = ITEMSIZE[dtype], {"maxnreg": RUNS_REGISTERS}
    elements = backward_elements(size)
    for tensors in given:
        runs = tile_over(RUNS[0], RUNS[2], access(RUNS[2], itemsize=size), elements)
        yield _variant("triton_backward", "backward_hard_runs", dtype, tensors, runs.constants() | limit)
        for outer, channels, inner in (LAST, ODD):
            tile = column_tile(outer, channels * inner, access(channels * inner, itemsize=size), elements)
            constants = tile.constants() | {"LAST": inner == 1}
            yield _variant("triton_backward", "backward_hard_columns", dtype, tensors, constants)


def _soft(dtype: str, given: list[str]) -> Iterator[Variant]:
    from deepshare.kernels.triton_launch_backward import soft_last_tile, soft_runs_tile
    from deepshare.kernels.triton_tiles import RUNS_REGISTERS

    size = ITEMSIZE[dtype]
    for tensors in given:
        runs = soft_runs_tile(RUNS[0], 16, RUNS[2], size).constants() | {"maxnreg": RUNS_REGISTERS}
        last = soft_last_tile(LAST[0], LAST[1], 16, size)
        yield _variant("triton_backward_soft", "backward_soft_runs", dtype, tensors, runs)
        yield _variant("triton_backward_soft", "backward_soft_last", dtype, tensors, last, narrow=True)


def _masked(dtype: str) -> Iterator[Variant]:
    from deepshare.kernels.triton_tiles import access, backward_elements, column_tile, forward_elements

    size, elements = ITEMSIZE[dtype], RUNS[1] * RUNS[2]
    vec = access(elements, itemsize=size)
    forward = column_tile(RUNS[0], elements, vec, forward_elements(size))
    backward = column_tile(RUNS[0], elements, vec, backward_elements(size))
    second = {"VEC": vec, "COLS": backward.cols}
    yield _variant("triton_masked", "masked_forward", dtype, "", forward.constants())
    yield _variant("triton_masked", "masked_backward", dtype, "", backward.constants())
    yield _variant("triton_masked", "masked_sum", dtype, "", second, narrow=True)


def _share() -> Iterator[Variant]:
    from deepshare.kernels.triton_tiles import access, column_tile, forward_elements

    for outer, channels, inner in (LAST, RUNS):
        tile = column_tile(outer, channels * inner, access(channels * inner, itemsize=8), forward_elements(8))
        for given in ("", "scale"):
            constants = tile.constants() | {"LAST": inner == 1, "PARTY": 1}
            yield _variant("triton_share", "share_columns", "i64", given, constants)
