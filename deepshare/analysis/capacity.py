"""Upper bounds on the memorisation capacity of networks with two hidden layers (SNL, section 5 and appendix A).

The capacity is the largest N such that any N inputs can be given any N targets (Definition 1). The networks are fully
connected, with hidden widths d1 and d2, an activation of `pieces` linear pieces (2 for a ReLU), and one output. Where
the paper has fractions alpha_l of neurons that keep their activation, we take their numbers k_l = alpha_l d_l.
docs/costs.md says what we checked in the proofs.
"""

from dataclasses import dataclass


def capacity(d1: int, d2: int, *, pieces: int = 2) -> int:
    """Theorem 1 (Yun et al. 2019): p (p - 1) d1 d2 + (p - 1) d2 + 2; with ReLU 2 d1 d2 + d2 + 2.

    Raises:
        ValueError: a width below 1, or fewer than 2 pieces.
    """
    return capacity_linearized(d1, d2, d1, d2, pieces=pieces)


def capacity_linearized(d1: int, d2: int, k1: int, k2: int, *, pieces: int = 2) -> int:
    """Corollary 1: k1 and k2 neurons keep their activation, the others are linear.

    k1 k2 p (p - 1) + k2 (p - 1) + k1 (d2 - k2) (p - 1) + 2; with ReLU k1 k2 + k1 d2 + k2 + 2.

    Raises:
        ValueError: a width below 1, k1 not in 0..d1, k2 not in 0..d2, or fewer than 2 pieces.
    """
    _check("capacity_linearized", d1, d2, k1, k2, pieces)
    steps = pieces - 1
    return k1 * k2 * pieces * steps + k2 * steps + k1 * (d2 - k2) * steps + 2


def capacity_pruned(d1: int, d2: int, k1: int, k2: int, *, pieces: int = 2) -> int:
    """Corollary 2: only k1 and k2 neurons are left, as Theorem 1 with these widths; with ReLU 2 k1 k2 + k2 + 2.

    Raises:
        ValueError: as `capacity_linearized`.
    """
    _check("capacity_pruned", d1, d2, k1, k2, pieces)
    return k1 * k2 * pieces * (pieces - 1) + k2 * (pieces - 1) + 2


@dataclass(frozen=True)
class Split:
    """ReLUs kept in the first and second hidden layer, as numbers and as fractions of the widths."""

    k1: int
    k2: int
    alpha1: float
    alpha2: float


def best_split(d1: int, d2: int, budget: int) -> Split:
    """Theorem 2: the split of `budget` ReLUs over two hidden layers whose bound by Corollary 1 is largest.

    On k1 + k2 = B the bound is a parabola in k1 with its top at (B + d2 - 1) / 2: alpha1 = (B + d2 - 1) / (2 d1),
    alpha2 = (B - d2 + 1) / (2 d2). Of two equal integers beside it the larger k1 is taken. The theorem asks for B > d2
    alone; its alpha2 is above 1 for B > 3 d2 - 1, its alpha1 for B > 2 d1 - d2 + 1. There we keep to the widths.

    Raises:
        ValueError: a width below 1, or a budget not in 0..d1 + d2.
    """
    _check("best_split", d1, d2, 0, 0, 2)
    if type(budget) is not int or not 0 <= budget <= d1 + d2:
        raise ValueError(f"best_split: budget must be in 0..{d1 + d2} (got {budget!r:.80})")
    k1 = min(max((budget + d2) // 2, budget - d2, 0), d1, budget)
    return Split(k1, budget - k1, k1 / d1, (budget - k1) / d2)


def _check(name: str, d1: int, d2: int, k1: int, k2: int, pieces: int) -> None:
    for argument, value, least, most in (
        ("d1", d1, 1, None),
        ("d2", d2, 1, None),
        ("k1", k1, 0, d1),
        ("k2", k2, 0, d2),
        ("pieces", pieces, 2, None),
    ):
        if type(value) is not int:
            raise ValueError(f"{name}: {argument} must be an int (got {value!r:.80})")
        if not least <= value or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"in {least}..{most}"
            raise ValueError(f"{name}: {argument} must be {wanted} (got {value})")
