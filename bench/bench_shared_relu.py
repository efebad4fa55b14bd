"""Forward and backward of shared_relu beside torch.relu, a clone, and the composition eager and compiled.

    python -m pytest bench/bench_shared_relu.py --benchmark-only --benchmark-json=out.json

The time of one round is that of a synchronised call (host and device). `extra_info` holds what a synchronised time
hides: device time per call alone (CUDA events around many calls), host time per call alone, peak memory, and GB/s of
the bytes that the pass must move (bench/shapes.py). Median and quartiles are in pytest-benchmark's record; the 20th
and 80th percentile stand in extra_info.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from implementations import NAMES, compared
from shapes import BACKWARD_TENSORS, FORWARD_TENSORS, LAYOUTS, ON_CPU, ON_GPU, Shape

from deepshare import ChannelMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ON_GPU if DEVICE == "cuda" else ON_CPU
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, WARMUP = 30, 5
CALLS_PER_EVENT = 50


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def tensors(shape: Shape, dtype: torch.dtype, layout: str) -> list[torch.Tensor]:
    """x, grad, alpha, beta."""
    torch.manual_seed(0)
    size = (shape.batch, shape.channels, shape.size, shape.size)
    x, grad = (torch.randn(size, device=DEVICE, dtype=dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    alpha, beta = (torch.rand(shape.channels, device=DEVICE) for _ in range(2))
    return [x, grad, alpha, beta]


def measure(benchmark, call: Callable[[], object], bytes_moved: int) -> None:
    """Times `call`, synchronised, and adds what the module docstring lists."""

    def synchronised() -> None:
        call()
        synchronise()

    benchmark.pedantic(synchronised, rounds=ROUNDS, warmup_rounds=WARMUP)
    seconds = sorted(benchmark.stats.stats.data)
    fifths = statistics.quantiles(seconds, n=5)
    per_call = statistics.median(seconds)
    benchmark.extra_info |= {"p20": fifths[0], "p80": fifths[3], "bytes": bytes_moved}
    if DEVICE == "cuda":
        per_call, host = device_and_host_time(call)
        benchmark.extra_info |= {"device_s": per_call, "host_s": host, "peak_bytes": peak_memory(call)}
    benchmark.extra_info["gb_per_s"] = bytes_moved / per_call / 1e9


def device_and_host_time(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds per call on the device, from events around a queue of calls, and on the host, to put one in the queue.

    Where the host is the slower side the device waits for it: device_s is then the host's time.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronise()
    started = time.perf_counter()
    begin.record()
    for _ in range(CALLS_PER_EVENT):
        call()
    end.record()
    host = (time.perf_counter() - started) / CALLS_PER_EVENT
    synchronise()
    return begin.elapsed_time(end) / 1e3 / CALLS_PER_EVENT, host


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that one call allocates at most, beyond what stood before."""
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronise()
    return torch.cuda.max_memory_allocated() - before


def activation(shape: Shape, name: str):
    channel_map = ChannelMap.balanced(shape.channels, shape.prototypes).to(DEVICE)
    found = dict(compared(channel_map, DEVICE))
    if name not in found:
        pytest.skip(f"{name} does not run on {DEVICE} here")
    return found[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_forward(benchmark, shape: Shape, dtype: torch.dtype, layout: str, name: str):
    benchmark.group = f"forward {shape.name} {dtype} {layout}"
    x, _, alpha, beta = tensors(shape, dtype, layout)
    activate = activation(shape, name)
    measure(benchmark, lambda: activate(x, alpha, beta), shape.bytes(dtype, FORWARD_TENSORS))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_backward(benchmark, shape: Shape, dtype: torch.dtype, layout: str, name: str):
    benchmark.group = f"backward {shape.name} {dtype} {layout}"
    x, grad, alpha, beta = tensors(shape, dtype, layout)
    leaves = [t.requires_grad_() for t in (x, alpha, beta)]
    y = activation(shape, name)(*leaves)

    def call() -> object:
        return torch.autograd.grad(y, leaves, grad, retain_graph=True, allow_unused=True)

    measure(benchmark, call, shape.bytes(dtype, BACKWARD_TENSORS))
