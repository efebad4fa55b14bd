"""SNL's bounds on memorisation capacity: the paper's forms, its worked example, and every small case by search."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepshare.analysis.capacity import best_split, capacity, capacity_linearized, capacity_pruned

widths = st.integers(1, 40)


def test_the_worked_example():
    """d1 = 50,000, d2 = 5,000, B = 10,000: alpha1 = 14,999 / 100,000, alpha2 = 5,001 / 10,000."""
    split = best_split(50_000, 5_000, 10_000)
    assert split.alpha1 == pytest.approx(14_999 / 100_000, abs=1e-4)
    assert split.alpha2 == pytest.approx(5_001 / 10_000, abs=1e-3)
    assert (split.k1, split.k2) == (7_500, 2_500)
    assert 50_000 - split.k1 == 42_500  # "linearizing 42,500 neurons in the first layer"; the 7,500 ReLUs are its too


@given(widths, widths, st.data())
def test_corollaries_as_the_paper_writes_them(d1: int, d2: int, data):
    k1, k2, p = data.draw(st.integers(0, d1)), data.draw(st.integers(0, d2)), data.draw(st.integers(2, 5))
    a1, a2 = Fraction(k1, d1), Fraction(k2, d2)
    linearized = a1 * a2 * d1 * d2 * p * (p - 1) + a2 * d2 * (p - 1) + a1 * (1 - a2) * d1 * d2 * (p - 1) + 2
    assert capacity_linearized(d1, d2, k1, k2, pieces=p) == linearized
    assert capacity_linearized(d1, d2, k1, k2) == a1 * (1 + a2) * d1 * d2 + a2 * d2 + 2
    assert capacity_pruned(d1, d2, k1, k2) == 2 * a1 * a2 * d1 * d2 + a2 * d2 + 2
    gap = capacity_linearized(d1, d2, k1, k2) - capacity_pruned(d1, d2, k1, k2)
    assert gap == a1 * (1 - a2) * d1 * d2
    assert capacity(d1, d2) == 2 * d1 * d2 + d2 + 2 == capacity_linearized(d1, d2, d1, d2)
    if k1 and k2:
        assert capacity_pruned(d1, d2, k1, k2, pieces=p) == capacity(k1, k2, pieces=p)
    if k1 < d1 or k2 < d2:
        assert capacity_linearized(d1, d2, k1, k2) < capacity(d1, d2)


@given(st.integers(1, 15), st.integers(1, 15), st.data())
def test_no_split_is_better(d1: int, d2: int, data):
    budget = data.draw(st.integers(0, d1 + d2))
    best = best_split(d1, d2, budget)
    assert best.k1 + best.k2 == budget
    every = [capacity_linearized(d1, d2, k, budget - k) for k in range(d1 + 1) if 0 <= budget - k <= d2]
    assert capacity_linearized(d1, d2, best.k1, best.k2) == max(every)


def test_theorem_2_leaves_the_unit_interval():
    """B > d2 holds, and the paper's alpha2 = (B - d2 + 1) / (2 d2) is 1.5001; the bound is largest at alpha2 = 1."""
    assert best_split(50_000, 5_000, 20_000).alpha2 == 1
    assert best_split(100, 90, 150).alpha1 == 1


def pieces(d1: int, d2: int, k1: int, k2: int, seed: int) -> int:
    """Linear pieces along a line, of a random network in which all but k1 and k2 neurons are linear."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t = torch.linspace(-40, 40, 400_001, dtype=torch.float64)[:, None]
    z1 = t @ draw(1, d1) + draw(d1) * 3
    first = torch.cat([z1[:, :k1].relu(), z1[:, k1:]], 1)
    z2 = first @ draw(d1, d2) + draw(d2) * 3
    patterns = torch.cat([z1[:, :k1] > 0, z2[:, :k2] > 0], 1)
    return 1 + int((patterns[1:] != patterns[:-1]).any(1).sum())


@pytest.mark.parametrize(
    ("d1", "d2", "k1", "k2"), [(6, 5, 6, 5), (6, 5, 3, 2), (8, 4, 5, 0), (8, 4, 2, 4), (3, 9, 3, 1)]
)
def test_counted_once_the_pieces_need_no_gap(d1: int, d2: int, k1: int, k2: int):
    """k1 + k2 (k1 + 1) breakpoints bound linearised and pruned networks alike (docs/costs.md)."""
    most = k1 + k2 * (k1 + 1) + 1
    seen = max(pieces(d1, d2, k1, k2, seed) for seed in range(20))
    assert 1 < seen <= most <= capacity_linearized(d1, d2, k1, k2) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0, 0), "d1 must be at least 1"),
        ((2, 2, 3, 0), r"k1 must be in 0\.\.2"),
        ((2, 2, 0, -1), r"k2 must be in"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[int, ...], message: str):
    for function in (capacity_linearized, capacity_pruned):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(*arguments)
    with pytest.raises(ValueError, match=r"best_split: budget must be in 0\.\.7 .got 8"):
        best_split(3, 4, 8)
    with pytest.raises(ValueError, match="pieces must be at least 2"):
        capacity(1, 1, pieces=1)
