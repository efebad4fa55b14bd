"""Compiles every Triton kernel ahead of time, as launched on a GPU, for architectures that need not be present."""

import inspect
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import sass
from build_check import Built
from triton_variants import Variant, variants

# Kernels from which two processes are worth importing torch twice.
POOL_FROM = 12
# Pointers that a kernel may be given as None, in `Variant.given` under the name in the first place.
OPTIONAL = {
    "residual": ("residual_ptr",),
    "source": ("source_ptr", "dsource_ptr"),
    "gates": ("gates_ptr",),
    "soft": ("soft_ptr", "gamma_ptr"),
    "emitted": ("emitted_ptr",),
    "scale": ("scale_ptr",),
}
# Tensors of x's dtype, and those of a fixed one; all others are in the dtype of the arithmetic.
LIKE_X = ("x", "residual", "source", "grad", "y", "dx", "dsource")
FIXED = {"gates": "u8", "emitted": "u8", "pi": "i32", "members": "i32", "offsets": "i32", "soft": "i32"}


def missing() -> str | None:
    """Why the Triton kernels cannot be checked here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def _signature(variant: Variant, names: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """(type of every parameter, value of every constant), as the host code in kernels/ passes them."""
    wide = "fp32" if variant.dtype in ("fp16", "bf16") else variant.dtype
    constants = dict(variant.constants)
    always = {"gates"} if variant.module == "triton_share" else {"soft"} if "soft" in variant.module else set()
    for tensor, pointers in OPTIONAL.items():
        if tensor not in variant.given and tensor not in always:
            constants |= {name: None for name in pointers if name in names}
    types = {}
    for name in names:
        tensor = name.removesuffix("_ptr")
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*" + FIXED.get(tensor, variant.dtype if tensor in LIKE_X else wide)
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
    # As the launcher specialises them for allocations of torch; sizes are not specialised.
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*"}
    source = ASTSource(function, types, {(names.index(name),): value for name, value in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(variant.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = sass.kernels(cubin)
    return Built("triton", variant.label, variant.dtype, architecture, kernel, variant.wide)


def build(architectures: list[int], only: str = "") -> list[Built]:
    """Every variant whose label contains `only`, for every architecture; many of them in two processes."""
    jobs = [(variant, a) for variant in variants() if only in variant.label for a in architectures]
    if len(jobs) < POOL_FROM:
        return [_compile(job) for job in jobs]
    # spawn: a forked child would inherit this process's threads' locks.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, jobs, chunksize=4))
