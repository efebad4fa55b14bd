"""Times a call and what it is compared with in turns, so that a busy machine slows both alike.

A round calls every reference once and then what is measured, each between two readings of the same clock. The rounds
are pytest-benchmark's own (`pedantic` with a `setup`): its record holds the call that is measured, ratios to the
references stand in `extra_info`. docs/benchmarks.md says how to read them.
"""

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# A kernel of 10 us cannot be timed by itself from the host: on a GPU a round is a replayed graph of this many calls.
CALLS_OF_A_REPLAY = 50 if ON_GPU else 1
# What a call costs the host is seen in as many, put in the queue one after another: few enough to end within a time
# slice of the system.
CALLS_OF_A_QUEUE = 20
MOST_ROUNDS = 200
WARMUP = 2  # rounds; the last of them says how many follow


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def per_call() -> float:
    """Clock for one call a round: seconds, the device's work done."""
    synchronise()
    return time.perf_counter()


def per_replayed_call() -> float:
    """Clock for `replay`: the difference of two readings is the seconds of one call."""
    return per_call() / CALLS_OF_A_REPLAY


def per_queued_call() -> float:
    """Clock for `queue`: seconds of the host alone, for one call."""
    return time.perf_counter() / CALLS_OF_A_QUEUE


def replay(call: Call) -> Call:
    """On a GPU a CUDA graph of CALLS_OF_A_REPLAY calls, so that the host's time is none of the result; else `call`."""
    if not ON_GPU:
        return call
    for _ in range(2):  # what is made at a first call cannot be made in a capture
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS_OF_A_REPLAY):
            call()

    def replays(tensors_of: Call = call) -> None:  # the graph reads and writes them, it does not keep them alive
        graph.replay()

    return replays


def queue(call: Call) -> Call:
    """CALLS_OF_A_QUEUE calls."""

    def calls() -> None:
        for _ in range(CALLS_OF_A_QUEUE):
            call()

    return calls


@dataclass(frozen=True)
class Limits:
    """How long one benchmark may take, warm-up aside."""

    seconds: float
    least_rounds: int

    def rounds(self, seconds_of_a_round: float) -> int:
        return max(self.least_rounds, min(MOST_ROUNDS, math.ceil(self.seconds / seconds_of_a_round)))


def measure(
    benchmark: Any,  # pytest-benchmark's fixture, whose test carries `clock` as its timer
    clock: Callable[[], float],
    call: Call,
    references: Mapping[str, Call],
    limits: Limits,
) -> dict[str, Any] | None:
    """Rounds of `call`, each after one of every reference; None where benchmarks are disabled.

    A round in which the system took a core from this process is left out of the figures, as long as
    `limits.least_rounds` others remain.

    Returns:
        median, p20, p80: of the call's seconds; against: reference -> median seconds of the reference, ratio of the
        medians, p20 and p80 of the ratio within a round; kept: the rounds these figures are of; disturbed: the share
        of rounds in which a core was taken.
    """
    seconds: dict[str, list[float]] = {name: [] for name in references}
    switches: list[int] = []

    def turns() -> None:
        switches.append(_taken_cores())
        for name, reference in references.items():
            synchronise()
            started = clock()
            reference()
            seconds[name].append(clock() - started)
        synchronise()

    for _ in range(WARMUP):
        started = time.perf_counter()
        turns()
        call()
        synchronise()
    rounds = limits.rounds(time.perf_counter() - started)
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(call, setup=turns, rounds=rounds)
    finally:
        gc.enable()
    if not benchmark.enabled:
        return None
    switches.append(_taken_cores())
    own = list(benchmark.stats.stats.data)
    quiet = [i for i in range(rounds) if switches[i - rounds - 1] == switches[i - rounds]]
    kept = quiet if len(quiet) >= limits.least_rounds else range(rounds)
    low, high = fifths([own[i] for i in kept])
    return {
        "median": statistics.median(own[i] for i in kept),
        "p20": low,
        "p80": high,
        "against": {
            name: _compared([own[i] for i in kept], [times[i - rounds] for i in kept])
            for name, times in seconds.items()
        },
        "kept": len(kept),
        "disturbed": 1 - len(quiet) / rounds,
    }


def _taken_cores() -> int:
    """How often the system has taken a core from a running thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def fifths(values: list[float]) -> tuple[float, float]:
    """The 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], cuts[3]


def _compared(own: list[float], reference: list[float]) -> dict[str, float]:
    low, high = fifths([ours / theirs for ours, theirs in zip(own, reference, strict=True)])
    median = statistics.median(reference)
    return {"median": median, "ratio": statistics.median(own) / median, "p20": low, "p80": high}
