"""What every peer's party does around its own ReLU: arguments, inputs, clock, byte count, result.

A party is `python NAME_relu.py --rank R ...` in its library's own environment: here stand the standard library and
numpy alone. All parties know the inputs, to check the result.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SEED = 2026
RANGE = 8.0  # inputs are uniform in [-8, 8), on the grid of 2^-12: every library holds them exactly
GRID = 2.0**-12
LONG = 20.0  # seconds: where the first run takes longer, it is the only one
WRONG = 2.0**-10  # a result further than this from ReLU is counted as wrong: 64 units of 16 fractional bits


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--parties", type=int, default=2)
    parser.add_argument("--port", type=int, required=True, help="first of a few free ports")
    parser.add_argument("--elements", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--setting", default="", help="the library's protocol, where it has several")
    parser.add_argument("--folder", type=Path, required=True, help="of this run alone; the result goes there")
    return parser.parse_args()


def inputs(elements: int) -> np.ndarray:
    """[elements] float64; the first are 0, the smallest numbers either side of it, and the ends of the range."""
    steps = int(RANGE / GRID)
    values = np.random.default_rng(SEED).integers(-steps, steps, elements).astype(np.float64) * GRID
    edges = np.array([0.0, GRID, -GRID, RANGE - GRID, -RANGE])
    values[: len(edges)] = edges[:elements]
    return values


def loopback_bytes() -> int:
    """Bytes sent over the loopback interface of this network namespace, TCP and IP headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("bench-peers: this network namespace has no loopback interface")


def timed(options: argparse.Namespace, operation: Callable[[], Any], barrier: Callable[[], None]) -> dict[str, Any]:
    """Seconds and loopback bytes of `operation`, between barriers.

    The first run warms up, then come `repeats`; where it took longer than LONG at party 0 it stands alone (`warm` is
    False).
    """
    first = once(operation, barrier)
    decision = options.folder / "first_is_long"
    if options.rank == 0 and first[0] > LONG:
        decision.touch()
    barrier()
    if decision.exists():
        return {"seconds": [first[0]], "loopback_bytes": [first[1]], "warm": False}
    runs = [once(operation, barrier) for _ in range(options.repeats)]
    return {"seconds": [run[0] for run in runs], "loopback_bytes": [run[1] for run in runs], "warm": True}


def once(operation: Callable[[], Any], barrier: Callable[[], None]) -> tuple[float, int]:
    barrier()
    before = loopback_bytes()
    barrier()
    start = time.perf_counter()
    operation()
    barrier()
    seconds = time.perf_counter() - start
    moved = loopback_bytes() - before
    barrier()
    return seconds, moved


def finish(options: argparse.Namespace, measured: dict[str, Any], revealed: Any, packages: tuple[str, ...]) -> None:
    """Checks the revealed result against ReLU and writes this party's record; a party that learns none gives None."""
    error = np.zeros(1)
    if revealed is not None:
        error = np.abs(np.asarray(revealed, dtype=np.float64).reshape(-1) - np.maximum(inputs(options.elements), 0.0))
    record = {
        **measured,
        "worst_error": float(error.max()),
        "wrong": int((error > WRONG).sum()),
        "versions": {name: version(name) for name in packages},
    }
    (options.folder / f"party{options.rank}.json").write_text(json.dumps(record))
