"""How long an inference between two parties takes on a link that was not at hand: a model fitted to measured ones.

    seconds = compute + d * flights * delay + w * bytes / rate

A **flight** is a message that waits for the one before it; flights is the longest chain of them. It is not the number
of rounds: a message that goes one way alone is one flight, an opening that both parties send at once is one too, and
what is sent early and received late may cost none. `delay` is the link's time one way, `rate` bytes a second, `bytes`
what stands one after another on the wire: what two parties send at once counts once, what they send in turns counts
both. `compute` (seconds, one number for each network and protocol), `d` (delays paid for a
counted flight, near 1 where the count is right; gloo's all_reduce takes two) and `w` (above 1 where less than the rate
arrives, below 1 where bytes travel while a party computes) are fitted by least squares on relative errors.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from deepshare.text_table import markdown


@dataclass(frozen=True)
class Link:
    """megabits a second each way (inf: bytes cost nothing), and seconds one way."""

    name: str
    megabits: float = math.inf
    delay: float = 0.0

    @property
    def seconds_per_byte(self) -> float:
        return 8 / (self.megabits * 1e6)


LOOPBACK = Link("loopback")
LAN = Link("LAN: 1 Gb/s, 0.2 ms round trip", 1000.0, 0.0001)
WAN = Link("WAN: 100 Mb/s, 40 ms round trip", 100.0, 0.020)


@dataclass(frozen=True)
class Variant:
    """A network under a protocol: what one inference's chain of messages is made of.

    Attributes:
        name: keeps apart what computes differently.
    """

    name: str
    flights: int
    path_bytes: int


@dataclass(frozen=True)
class Sample:
    """A measured cell."""

    variant: Variant
    link: Link
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Seconds, and their standard error from the fit's scatter (not from what the model leaves out)."""

    seconds: float
    error: float


@dataclass(frozen=True)
class Latency:
    """A fitted model.

    Attributes:
        compute: seconds of each variant, by name.
        flight_factor, wire_factor: d and w; None where no sample has a delay, or a rate, to fit it to. Then 1 is taken.
        scatter: root of the mean square of the relative residuals, over the degrees of freedom left.
        samples: what it was fitted to.
    """

    compute: dict[str, float]
    flight_factor: float | None
    wire_factor: float | None
    scatter: float
    samples: tuple[Sample, ...]
    covariance: np.ndarray  # of [compute..., d, w], the last two where they were fitted

    def seconds(self, variant: Variant, link: Link) -> float:
        """The model at any link, for a variant it was fitted to.

        Raises:
            KeyError: another variant.
        """
        flights, wire = _wire_columns(variant, link)
        return self.compute[variant.name] + _or_one(self.flight_factor) * flights + _or_one(self.wire_factor) * wire

    def predict(self, variant: Variant, link: Link) -> Prediction:
        """`seconds` with its standard error. Raises KeyError for a variant that was not fitted."""
        fitted = (self.flight_factor is not None, self.wire_factor is not None)
        row = _row(variant, link, list(self.compute), fitted)
        return Prediction(self.seconds(variant, link), float(np.sqrt(max(0.0, row @ self.covariance @ row))))

    def residuals(self) -> list[tuple[Sample, float, float]]:
        """(sample, seconds of the model, relative error of the model) of every sample."""
        rows = [(sample, self.seconds(sample.variant, sample.link)) for sample in self.samples]
        return [(sample, modelled, modelled / sample.seconds - 1) for sample, modelled in rows]

    def table(self) -> str:
        """Markdown: measured, modelled and their difference for every sample."""
        rows = [
            (sample.variant.name, sample.link.name, f"{sample.seconds:.3f}", f"{modelled:.3f}", f"{100 * error:+.1f} %")
            for sample, modelled, error in self.residuals()
        ]
        return markdown(("variant", "link", "measured s", "model s", "error"), rows)


def fit(samples: Iterable[Sample]) -> Latency:
    """The model whose relative errors on the samples have the least sum of squares.

    Raises:
        ValueError: no more samples than numbers to fit (a variant needs two links), or a sample without seconds.
    """
    samples = tuple(samples)
    for sample in samples:
        if not sample.seconds > 0:
            raise ValueError(f"latency.fit: seconds must be positive (got {sample.seconds} for {sample.variant.name})")
    names = list(dict.fromkeys(sample.variant.name for sample in samples))
    wires = [_wire_columns(sample.variant, sample.link) for sample in samples]
    fitted = (any(flights for flights, _ in wires), any(wire for _, wire in wires))
    unknown = len(names) + sum(fitted)
    if len(samples) <= unknown:
        raise ValueError(
            f"latency.fit: wanted more samples than the {unknown} numbers to fit, {len(names)} of them compute seconds "
            f"(got {len(samples)})"
        )
    measured = np.array([sample.seconds for sample in samples])
    columns = np.array([_row(sample.variant, sample.link, names, fitted) for sample in samples]) / measured[:, None]
    solution, _, rank, _ = np.linalg.lstsq(columns, np.ones(len(samples)), rcond=None)
    if rank < unknown:
        raise ValueError("latency.fit: the samples do not tell delay, rate and computing apart: measure on more links")
    scatter = math.sqrt(float(((columns @ solution - 1) ** 2).sum()) / (len(samples) - unknown))
    factors = iter(solution[len(names) :].tolist())
    flight, wire = (next(factors) if known else None for known in fitted)
    compute = dict(zip(names, solution[: len(names)].tolist(), strict=True))
    return Latency(compute, flight, wire, scatter, samples, scatter**2 * np.linalg.inv(columns.T @ columns))


def forecast(model: Latency, variants: Sequence[Variant], links: Sequence[Link] = (LAN, WAN)) -> str:
    """Markdown: seconds of each variant on each link, with twice the standard error of the fit."""
    rows = []
    for variant in variants:
        cells = [model.predict(variant, link) for link in links]
        rows.append((variant.name, *(f"{cell.seconds:.3f} ± {2 * cell.error:.3f}" for cell in cells)))
    return markdown(("variant", *(link.name for link in links)), rows)


def _wire_columns(variant: Variant, link: Link) -> tuple[float, float]:
    """What d and w multiply."""
    return variant.flights * link.delay, variant.path_bytes * link.seconds_per_byte


def _row(variant: Variant, link: Link, names: Sequence[str], fitted: tuple[bool, bool]) -> np.ndarray:
    if variant.name not in names:
        raise KeyError(variant.name)
    known = [value for value, use in zip(_wire_columns(variant, link), fitted, strict=True) if use]
    return np.array([*(float(name == variant.name) for name in names), *known])


def _or_one(factor: float | None) -> float:
    return 1.0 if factor is None else factor
