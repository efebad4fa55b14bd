"""What DELPHI would take for a network, as SNL (section 4) estimates it: measured costs of a ReLU, times ReLUs."""

from collections.abc import Iterable

SECONDS_PER_RELU = 21e-6  # SNL: 0.021 s for 1,000 ReLUs, measured; from DeepReDuce's Table 4 they fit 0.019
BYTES_PER_RELU = 18 * 1024  # of garbled circuit the client stores (DeepReShape, section 1, of DELPHI)


def seconds_of_relus(relus: float) -> float:
    """Online seconds of garbled circuits."""
    return relus * SECONDS_PER_RELU


def gibibytes(relus: float) -> float:
    """GiB of garbled circuits that wait for one inference."""
    return relus * BYTES_PER_RELU / 2**30


def delphi(relus: float, linear_seconds: float) -> float:
    """Online seconds of one private inference: 21 us a ReLU plus the linear layers' time.

    DELPHI moves the ciphertext work of linear layers to the offline phase; online they take what one inference in the
    clear takes (SNL, section 4). The seconds depend on the machine: measure them, or take `fitted_linear_seconds`.

    Raises:
        ValueError: a negative argument.
    """
    for name, value in (("relus", relus), ("linear_seconds", linear_seconds)):
        if not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"delphi: {name} must be at least 0 (got {value!r})")
    return seconds_of_relus(relus) + linear_seconds


def fitted_linear_seconds(points: Iterable[tuple[float, float]]) -> float:
    """The linear time behind published (ReLUs, seconds) of one network: the mean of what 21 us a ReLU leaves.

    Raises:
        ValueError: no points.
    """
    rest = [seconds - seconds_of_relus(relus) for relus, seconds in points]
    if not rest:
        raise ValueError("fitted_linear_seconds: points must have at least one (ReLUs, seconds)")
    return sum(rest) / len(rest)
