"""Compiles every Triton kernel ahead of time, as launched on a GPU, for architectures that need not be present."""

import inspect
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import sass
from build_check import Built

# Kernels from which two processes are worth importing torch twice.
POOL_FROM = 12
DTYPES = ("fp32", "fp16", "bf16", "fp64")
# The dtypes whose 16-byte accesses are demanded.
WIDE_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Variant:
    """One specialisation: a kernel, x's dtype, and its constants."""

    module: str
    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    wide: bool = False
    warps: int = 4

    @property
    def label(self) -> str:
        """The kernel with its flags, e.g. `forward_channels_first SOFT`."""
        flags = [name if value else f"not {name}" for name, value in self.constants if isinstance(value, bool)]
        return " ".join([self.kernel, *flags])


def missing() -> str | None:
    """Why the Triton kernels cannot be checked here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def _variants() -> Iterator[Variant]:
    """Every kernel with the tiles that triton_ops chooses for [128, 64, 32, 32] with 16 prototypes."""
    for dtype in DTYPES:
        wide = dtype in WIDE_DTYPES
        for soft in (False, True):
            first = (("SOFT", soft), ("ROWS", 1), ("COLS", 1024))
            last = (("SOFT", soft), ("ROWS", 16), ("COLS", 64))
            yield Variant("triton_forward", "forward_channels_first", dtype, first, wide)
            yield Variant("triton_forward", "forward_channels_last", dtype, last, wide)
        yield Variant("triton_backward", "backward_hard_channels_first", dtype, (("ROWS", 1), ("COLS", 1024)), wide)
        yield Variant("triton_backward", "backward_hard_channels_last", dtype, (("ROWS", 16), ("COLS", 64)), wide)
        for own in (False, True):
            first = (("OWN", own), ("ROWS", 1), ("COLS", 1024))
            rows, warps = (16, 4) if dtype == "fp64" else (64, 8)
            last = (("OWN", own), ("ROWS", rows), ("MEMBERS", 2), ("PROTOTYPES", 16))
            yield Variant("triton_backward_soft", "backward_soft_channels_first", dtype, first, wide)
            yield Variant("triton_backward_soft", "backward_soft_channels_last", dtype, last, warps=warps)
    for dtype in ("fp32", "fp64"):
        yield Variant("triton_backward", "sum_partials", dtype, (("ROWS", 256), ("COLS", 16)))


def _signature(variant: Variant, names: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """(type of every parameter, value of every constant), as the host code in triton_ops passes them."""
    wide = "fp64" if variant.dtype == "fp64" else "fp32"
    constants = dict(variant.constants)
    if constants.get("SOFT") is False:
        constants |= {"soft_ptr": None, "gamma_ptr": None}
    if constants.get("OWN") is True:
        constants |= {"dsource_ptr": None}
    pointers = {
        "x": variant.dtype,
        "source": variant.dtype,
        "grad": variant.dtype,
        "y": variant.dtype,
        "dx": variant.dtype,
    }
    pointers |= {"dsource": variant.dtype} | dict.fromkeys(("pi", "members", "offsets", "soft"), "i32")
    types = {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*" + pointers.get(name.removesuffix("_ptr"), wide)
        else:
            types[name] = "i32"
    return types, constants


def _compile(job: tuple[Variant, int]) -> Built:
    """One variant for one architecture; runs in a worker process."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant, architecture = job
    function = getattr(importlib.import_module(f"deepshare.kernels.{variant.module}"), variant.kernel)
    names = list(inspect.signature(function.fn).parameters)
    types, constants = _signature(variant, names)
    # As the launcher specialises them for allocations of torch and sizes that are multiples of 16.
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] != "constexpr"}
    source = ASTSource(function, types, {(names.index(name),): value for name, value in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": variant.warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = sass.kernels(cubin)
    return Built("triton", variant.label, variant.dtype, architecture, kernel, variant.wide)


def build(architectures: list[int], only: str = "") -> list[Built]:
    """Every variant whose kernel's name contains `only`, for every architecture; many of them in two processes."""
    jobs = [(variant, a) for variant in _variants() if only in variant.kernel for a in architectures]
    if len(jobs) < POOL_FROM:
        return [_compile(job) for job in jobs]
    # spawn: a forked child would inherit this process's threads' locks.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, jobs, chunksize=4))
