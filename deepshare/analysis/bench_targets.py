"""What the operator is held to, as ratios within one run, and which rows of a run speak about it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deepshare.analysis.bench_records import Interval, Row

_MIB = 2**20
_HARD_FORMS = ("plain forward", "residual forward", "masked forward", "follower forward")


@dataclass(frozen=True)
class Target:
    """A bound: `reached` takes a row's figure, or None where the row does not speak about it."""

    what: str
    at_most: bool
    unit: str
    bound: Callable[[Row], float]
    reached: Callable[[Row], Interval | None]


@dataclass(frozen=True)
class Verdict:
    """A target beside what one row reached."""

    target: Target
    row: Row
    bound: float
    reached: Interval

    @property
    def met(self) -> bool:
        if self.target.at_most:
            return self.reached.value <= self.bound
        return self.reached.value >= self.bound


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Every target with every row of ours that speaks about it."""
    for target in TARGETS:
        for row in rows:
            reached = target.reached(row) if row.ours else None
            if reached is not None:
                yield Verdict(target, row, target.bound(row), reached)


def _is_op(row: Row, name: str, device: str, least: float, most: float) -> bool:
    """Whether a row is that pass of the operator, on a tensor of `least` to `most` MiB."""
    place = (row.kind, row.name, row.device) == ("op", name, device)
    return place and row.x_bytes is not None and least <= row.x_bytes / _MIB <= most


def _cpu_ratio(name: str, reference: str, least: float, most: float, bound: float) -> Target:
    def reached(row: Row) -> Interval | None:
        fits = row.dtype == "float32" and _is_op(row, name, "cpu", least, most)
        return row.ratios.get(reference) if fits else None

    size = f"{least:g} MiB" if least == most else f"{least:g}-{most:g} MiB"
    return Target(f"CPU, {size}: {name} / {reference}", True, "", lambda row: bound, reached)


def _share_of_clone(name: str, what: str, bound: float) -> Target:
    """Counted bytes a second over a clone's, timed in turns: on a GPU, from 64 MiB on."""

    def reached(row: Row) -> Interval | None:
        clone = row.ratios.get("clone")
        if clone is None or row.share_of_clone is None or not _is_op(row, name, "cuda", 64, float("inf")):
            return None
        passes = row.share_of_clone * clone.value
        return Interval(row.share_of_clone, passes / clone.high, passes / clone.low)

    return Target(f"GPU, from 64 MiB: {what}", False, "", lambda row: bound, reached)


def _replayed(row: Row) -> Interval | None:
    return row.ratios.get("relu") if _is_op(row, "plain forward", "cuda", 0, 63.9) else None


def _host(name: str, bound: float) -> Target:
    def reached(row: Row) -> Interval | None:
        if (row.kind, row.name) != ("host", name):
            return None
        return Interval(1e6 * row.time.value, 1e6 * row.time.low, 1e6 * row.time.high)

    return Target(f"host, a call: {name}", True, " us", lambda row: bound, reached)


def _saved(row: Row) -> Interval | None:
    if row.kind != "memory" or row.name not in _HARD_FORMS or row.saved_beyond_inputs is None:
        return None
    return Interval(*3 * (float(row.saved_beyond_inputs),))


def _bits_of_a_follower(row: Row) -> float:
    return float(row.gate_bytes or 0) if row.name.startswith("follower") else 0.0


TARGETS = (
    _cpu_ratio("plain forward", "relu", 8, 8, 1.05),
    _cpu_ratio("plain forward", "relu", 98, 128, 0.90),
    _cpu_ratio("plain backward", "relu", 8, 8, 1.20),
    _cpu_ratio("plain backward", "relu", 98, 128, 1.00),
    *(
        _cpu_ratio(name, reference, least, most, bound)
        for reference, bound in (("eager", 0.20), ("compile", 1.00))
        for name in ("plain forward", "plain backward")
        for least, most in ((8, 8), (98, 128))
    ),
    _share_of_clone("plain forward", "forward, share of a clone's bandwidth", 0.95),
    _share_of_clone("plain backward", "backward, share of the three-pass floor", 0.90),
    Target("GPU, CIFAR-size, graph replay: plain forward / relu", True, "", lambda row: 1.10, _replayed),
    _host("plain forward", 10),
    _host("plain forward + backward", 50),
    Target("saved for backward beyond its inputs (a follower: its bits)", True, " B", _bits_of_a_follower, _saved),
)
