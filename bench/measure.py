"""What a benchmark writes down: pytest-benchmark's record of its own call, and in `extra_info` all that compares it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import interleave
import pytest
import torch
from interleave import DEVICE, ON_GPU, Call, Limits
from shapes import Case

from deepshare.raw_ops import backends


@dataclass(frozen=True)
class Measure:
    """The fixture `measure`. Fields of a record: docs/benchmarks.md."""

    benchmark: Any
    clock: Callable[[], float]
    limits: Limits

    @contextmanager
    def stream(self) -> Iterator[None]:
        """On a GPU a stream of its own: a backward pass runs on its forward's stream, and the default one cannot be
        captured."""
        if not ON_GPU:
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream()):
            yield

    def need(self, backend: str | None) -> None:
        """Skips the test, with the reason, where one of our backends does not run."""
        if backend is not None and backends()[backend] is not None:
            pytest.skip(f"{backend}: {backends()[backend]}")

    def __call__(
        self,
        call: Call,
        references: Mapping[str, Call],
        *,
        kind: str,  # op, module, model, step, host, memory
        name: str,  # what is done: "plain forward"
        provider: str,
        baseline: str,
        ours: bool,
        case: str | Case,
        bytes_moved: int | None = None,
        **more: Any,
    ) -> None:
        self.benchmark.group = f"{kind}: {name}, {case}"
        times = interleave.measure(self.benchmark, self.clock, call, references, self.limits)
        if times is None:
            return
        record = self.benchmark.extra_info
        record |= {"kind": kind, "name": name, "provider": provider, "baseline": baseline, "ours": ours}
        record |= {"case": str(case), "device": DEVICE, **times, **more}
        if isinstance(case, Case):
            record |= {"x_bytes": case.x_bytes, "dtype": str(case.dtype).removeprefix("torch."), "layout": case.layout}
        if bytes_moved is not None:
            record |= _bandwidth(bytes_moved, case, times)


def _bandwidth(bytes_moved: int, case: str | Case, times: Mapping[str, Any]) -> dict[str, Any]:
    """GB/s of the bytes counted, and as a share of what a clone of x, timed in the same rounds, reaches."""
    found = {"bytes": bytes_moved, "gb_per_s": bytes_moved / times["median"] / 1e9}
    if isinstance(case, Case) and "clone" in times["against"]:
        found["share_of_clone"] = bytes_moved / (2 * case.x_bytes) / times["against"]["clone"]["ratio"]
    return found
