"""DeepShare's Table 6: how many times faster the paper's networks were than their all-ReLU models."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class PublishedSpeedup:
    """One row: thousands of ReLUs, and seconds of the all-ReLU model over seconds of this one, by either paper."""

    dataset: str
    network: str
    relus_k: float
    autorep: float
    deepshare: float


@cache
def published_speedups() -> tuple[PublishedSpeedup, ...]:
    """The table's rows, in its order; source and what the paper leaves open are in latency_speedup.csv."""
    text = resources.files("deepshare.analysis").joinpath("latency_speedup.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple(
        PublishedSpeedup(
            row["dataset"], row["network"], float(row["relus_k"]), float(row["autorep"]), float(row["deepshare"])
        )
        for row in rows
    )
