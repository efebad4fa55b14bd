"""ReLU equalization (DeepReShape, Algorithm 1): the networks the paper prints, and a brute-force search."""

from fractions import Fraction
from itertools import pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepshare.methods.equalization import (
    EqualizationError,
    FirstFactors,
    equalize_depth,
    equalize_width,
    relative_relus,
    widths_as_depths,
)

PREVALENT = (1, 4, 2, 3)  # ResNet18 on CIFAR-100, Table 10: S3 > S2 > S4 > S1
ALTERED = (1, 2, 4, 3)  # appendix C


def test_resnet18_has_the_papers_pairs_and_ranges():
    """Section 4.1: (beta, gamma) is (5,2) & alpha>=7, (5,3) & alpha>=5, (6,2) & alpha>=6, (7,2) & alpha>=5."""
    assert equalize_width(PREVALENT).ranges() == (
        FirstFactors((5, 2), 7, None),
        FirstFactors((5, 3), 5, None),
        FirstFactors((6, 2), 6, None),
        FirstFactors((7, 2), 5, None),
    )
    assert equalize_width(PREVALENT).minimal == ((5, 5, 3), (5, 7, 2), (6, 6, 2), (7, 5, 2))


def test_the_altered_order_has_the_papers_networks():
    """Appendix C: at gamma 2, beta > 8 and alpha > 4; at gamma 3, beta > 5 and alpha > 4; HRN-5x6x3x and 5x9x2x."""
    found = equalize_width(ALTERED)
    assert found.minimal == ((5, 6, 3), (5, 9, 2))
    rows = found.ranges(largest=20)
    assert {row.least for row in rows} == {5}
    assert {row.most for row in rows} == {None}
    assert {row.others for row in rows} == {(beta, 2) for beta in range(9, 21)} | {(b, 3) for b in range(6, 21)}
    assert {row.others for row in found.ranges()} >= {(6, 3), (9, 2)}


def test_resnet34_has_the_papers_networks_among_its_narrowest():
    """Section 5: HRN-4x6x3x and 4x9x2x. They are the minimal ones with the smallest alpha and gamma < 4."""
    found = equalize_width(PREVALENT, (3, 4, 6, 3))
    assert [factors for factors in found.narrowest if factors[2] < 4] == [(4, 6, 3), (4, 9, 2)]
    assert found.narrowest == ((4, 3, 6), (4, 4, 5), (4, 5, 4), (4, 6, 3), (4, 9, 2))


def test_names_of_stages_serve_as_numbers():
    assert equalize_width(("S1", "S4", "S2", "S3")) == equalize_width(PREVALENT)
    assert equalize_depth(("S1", "S4", "S2", "S3")) == equalize_depth(PREVALENT)


def test_table_15_relative_relus():
    scaled = {
        factors: tuple(64 * share for share in relative_relus((1, 1, 1, 1), factors))
        for factors in [(2, 2, 2), (3, 3, 3), (4, 4, 4), (6, 6, 6), (5, 7, 2), (7, 5, 2), (6, 6, 2), (5, 5, 3)]
    }
    assert scaled == {
        (2, 2, 2): (64, 32, 16, 8),
        (3, 3, 3): (64, 48, 36, 27),
        (4, 4, 4): (64, 64, 64, 64),
        (6, 6, 6): (64, 96, 144, 216),
        (5, 7, 2): (64, 80, 140, 70),
        (7, 5, 2): (64, 112, 140, 70),
        (6, 6, 2): (64, 96, 144, 72),
        (5, 5, 3): (64, 80, 100, 75),
    }


def test_depth_solves_the_printed_inequality_with_the_fewest_blocks():
    """ICLR appendix B.1: phi3/4 > phi2/2 > phi4/8 > phi1."""
    best = equalize_depth(PREVALENT)
    assert best == (1, 3, 7, 9)
    box = [
        phi
        for phi in product(range(1, 11), repeat=4)
        if Fraction(phi[2], 4) > Fraction(phi[1], 2) > Fraction(phi[3], 8) > phi[0]
    ]
    assert best in box
    assert all(ours <= theirs for phi in box for ours, theirs in zip(best, phi, strict=True))


def test_the_papers_depths_are_its_widths_and_break_its_inequality():
    depths = widths_as_depths(PREVALENT)
    assert depths == ((1, 5, 5, 3), (1, 5, 7, 2), (1, 6, 6, 2), (1, 7, 5, 2))
    assert [sum(phi) for phi in depths] == [14, 15, 15, 15]  # the paper says 14 of all four
    for phi in depths:
        shares = relative_relus(phi, (2, 2, 2))
        assert not shares[2] > shares[1]
        assert not shares[3] > shares[0]


sizes = st.integers(1, 5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_minimal_and_ranges_equal_a_search_of_every_network(data: st.DataObject):
    stages = data.draw(st.integers(2, 4))
    order = data.draw(st.permutations(range(1, stages + 1)))
    blocks = data.draw(st.tuples(*[sizes] * stages))
    least = data.draw(st.integers(1, 3))
    largest = {2: 60, 3: 30, 4: 10}[stages]

    def equalized(factors: tuple[int, ...]) -> bool:
        share = [Fraction(blocks[0])]
        for stage, factor in enumerate(factors, 1):
            share.append(share[-1] * factor * blocks[stage] / (4 * blocks[stage - 1]))
        return all(share[a - 1] < share[b - 1] for a, b in pairwise(order))

    box = {factors for factors in product(range(least, largest + 1), repeat=stages - 1) if equalized(factors)}
    try:
        found = equalize_width(order, blocks, least=least)
    except EqualizationError:
        assert not box
        return
    assert all(equalized(factors) and found.holds(factors) for factors in found.minimal)
    below = {f for f in box if any(all(a <= b for a, b in zip(m, f, strict=True)) for m in found.minimal)}
    assert below == box, "a network with no minimal one below it"
    for one, other in permutations(found.minimal, 2):
        assert any(a < b for a, b in zip(one, other, strict=True)), "one minimal network lies above another"
    listed = {
        (alpha, *row.others)
        for row in found.ranges(largest)
        for alpha in range(row.least, min(largest, row.most or largest) + 1)
        if all(factor <= largest for factor in row.others)
    }
    assert listed == box


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_depths_are_in_order_and_no_stage_can_lose_a_block(data: st.DataObject):
    stages = data.draw(st.integers(2, 6))
    order = data.draw(st.permutations(range(1, stages + 1)))
    factors = data.draw(st.tuples(*[st.integers(1, 6)] * (stages - 1)))
    blocks = equalize_depth(order, factors)

    def in_order(phi: tuple[int, ...]) -> bool:
        shares = relative_relus(phi, factors)
        return all(shares[a - 1] < shares[b - 1] for a, b in pairwise(order))

    assert in_order(blocks)
    for stage, count in enumerate(blocks):
        fewer = (*blocks[:stage], count - 1, *blocks[stage + 1 :])
        assert count == 1 or not in_order(fewer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equalize_width((4, 3, 2, 1), (1, 4, 2, 2)), r"no factors of at least 2 .* S1 > S2 > S3 > S4.*4\*x1/4"),
        (lambda: equalize_width((1, 2, 2, 4)), r"permutation of S1..S4 \(got \(1, 2, 2, 4\)\)"),
        (lambda: equalize_width((3, 2, 1)), "permutation of S1..S4"),
        (lambda: equalize_width(("S3", "S2", "S4", "conv1")), "permutation of S1..S4"),
        (lambda: equalize_width((3, 2, 4, 1.0)), "permutation of S1..S4"),
        (lambda: equalize_width((True, 2, 3, 4)), "permutation of S1..S4"),
        (lambda: equalize_width(PREVALENT, (2, 2, 0, 2)), "blocks must be ints of at least 1"),
        (lambda: equalize_width(PREVALENT, least=0), "least must be ints of at least 1"),
        (lambda: equalize_depth((3, 2, 4, 4)), "permutation of S1..S4"),
        (lambda: equalize_depth(PREVALENT, (2, 0, 2)), "factors must be ints of at least 1"),
        (lambda: equalize_depth(PREVALENT, most=8), "stage S4 needs 9 blocks, more than 8"),
        (lambda: relative_relus((2, 2), (2, 2)), "2 stages need 1 factors"),
        (lambda: relative_relus((), ()), "blocks must be ints"),
    ],
)
def test_what_cannot_be_is_refused(call, message: str):
    with pytest.raises(EqualizationError, match=message):
        call()
