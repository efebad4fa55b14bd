"""ReLU equalization (DeepReShape, Algorithm 1): which channel factors or depths put a network's stages in the order
of their criticality, so that the most critical stage has the most ReLUs.

Stage k of D has phi_k blocks, m * lambda_1 * ... * lambda_{k-1} channels and 1 / 4**(k-1) of the image's pixels, so its
ReLUs are in proportion to

    r_k = phi_k * (lambda_1 * ... * lambda_{k-1}) / 4**(k-1)

(Algorithm 1, line 5, prints 2**(k-1); the paper's own worked example and its Table 15 divide by 4, 16, 64, as halving
both sides of a feature map does.) All arithmetic is exact: integers and fractions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations, pairwise
from typing import NamedTuple

SHRINK = 4  # pixels of a stage to those of the next
Factors = tuple[int, ...]


class EqualizationError(ValueError):
    """An order that is no permutation of the stages, a bad size, or an order no network of the wanted kind can have."""


class FirstFactors(NamedTuple):
    """Which first factors (alpha) equalize, given the others: `least` to `most` (None: every larger one)."""

    others: Factors  # (beta, gamma, ...)
    least: int
    most: int | None


@dataclass(frozen=True)
class _Product:
    """least <= lambda_start * ... * lambda_{stop-1} <= most: one pair of stages in its order. most None: no bound."""

    start: int
    stop: int
    least: int
    most: int | None


@dataclass(frozen=True)
class Equalization:
    """The integer channel factors (lambda_1, ..., lambda_{D-1}), each at least `least`, that equalize a network.

    Attributes:
        order: stage numbers, 1 the first, from least to most critical.
        blocks: phi, blocks per stage.
        least: the smallest factor allowed.
    """

    order: tuple[int, ...]
    blocks: tuple[int, ...]
    least: int

    @cached_property
    def minimal(self) -> tuple[Factors, ...]:
        """Every solution of which no factor can be lowered while the others stay or fall: the paper's HybReNets.

        Lowering a factor breaks lower bounds alone, so a solution is minimal where lowering any one factor by 1 breaks
        one; that bounds each factor, and the list is complete. Sorted.
        """
        ends = tuple(self._largest_minimal(factor) for factor in range(1, len(self.blocks) - 1))
        rows = (self._first(others) for others in self._others(ends, minimal=True))
        found = [(row.least, *row.others) for row in rows if row is not None]
        return tuple(sorted(factors for factors in found if self._may_be_minimal(0, factors)))

    @property
    def narrowest(self) -> tuple[Factors, ...]:
        """Those of `minimal` with the smallest first factor: the fewest channels in stage 2."""
        return tuple(factors for factors in self.minimal if factors[0] == self.minimal[0][0])

    def ranges(self, largest: int | None = None) -> tuple[FirstFactors, ...]:
        """For each choice of the later factors (beta, gamma, ...), the range of the first (alpha), as the paper prints.

        Args:
            largest: how far to list factors that the order leaves unbounded; by default to where the last of `minimal`
                can lie. Bounded factors are listed in full.
        """
        ends = tuple(self._end(factor, largest) for factor in range(1, len(self.blocks) - 1))
        rows = (self._first(others) for others in sorted(self._others(ends)))
        return tuple(row for row in rows if row is not None)

    def holds(self, factors: Sequence[int]) -> bool:
        """Whether these factors put the stages' ReLUs in order, strictly."""
        counts = relative_relus(self.blocks, factors)
        ranked = [counts[stage - 1] for stage in self.order]
        return all(less < more for less, more in pairwise(ranked))

    @property
    def inequality(self) -> str:
        """The compound inequality over x1, x2, ... (alpha, beta, ...): "2*x1*x2/16 > 2*x1/4 > ..."."""
        return " > ".join(_share(self.blocks, stage) for stage in reversed(self.order))

    @cached_property
    def _products(self) -> tuple[_Product, ...]:
        """One bound per pair of stages; those of pairs that are not neighbours follow from the rest and prune early."""
        products = []
        for fewer, more in combinations(self.order, 2):
            first, last = sorted((more, fewer))
            ratio = Fraction(self.blocks[first - 1] * SHRINK ** (last - first), self.blocks[last - 1])
            if more > fewer:
                products.append(_Product(first - 1, last - 1, math.floor(ratio) + 1, None))
            else:
                products.append(_Product(first - 1, last - 1, 1, math.ceil(ratio) - 1))
        return tuple(products)

    def _largest_minimal(self, factor: int) -> int:
        """In a minimal solution a factor above `least` makes some product reach its bound, and would not if 1 less."""
        reached = [
            1 + (product.least - 1) // self.least ** (product.stop - product.start - 1)
            for product in self._products
            if product.start <= factor < product.stop
        ]
        return max(self.least, *reached)

    def _end(self, factor: int, largest: int | None) -> int:
        """The last value of a factor worth trying."""
        most = [
            product.most // self.least ** (product.stop - product.start - 1)
            for product in self._products
            if product.most is not None and product.start <= factor < product.stop
        ]
        return min(most) if most else self._largest_minimal(factor) if largest is None else largest

    def _others(self, ends: Factors, *, minimal: bool = False) -> Iterator[Factors]:
        """Later factors that some first factor may complete (to a minimal solution)."""
        position = len(self.blocks) - 1 - len(ends)  # of the first of these factors
        if not ends:
            yield ()
            return
        for rest in self._others(ends[1:], minimal=minimal):
            for value in range(self.least, ends[0] + 1):
                chosen = (value, *rest)
                if self._may(position, chosen) and (not minimal or self._may_be_minimal(position, chosen)):
                    yield chosen

    def _inside(self, product: _Product, position: int, chosen: Factors) -> tuple[Factors, int]:
        """Those of a product's factors that are chosen, and how many are not (they stand before `position`)."""
        inside = chosen[max(0, product.start - position) : max(0, product.stop - position)]
        return inside, product.stop - product.start - len(inside)

    def _may(self, position: int, chosen: Factors) -> bool:
        """Whether no product is broken already: whole ones within bounds, begun ones not above their most."""
        for product in self._products:
            inside, missing = self._inside(product, position, chosen)
            value = math.prod(inside) * self.least**missing
            if (product.most is not None and value > product.most) or (not missing and value < product.least):
                return False
        return True

    def _may_be_minimal(self, position: int, chosen: Factors) -> bool:
        """Whether every chosen factor above `least` has a product that would break if it were 1 less."""
        needed = [factor for factor, value in enumerate(chosen, position) if value > self.least]
        for product in self._products:
            inside, missing = self._inside(product, position, chosen)
            value = math.prod(inside) * self.least**missing
            for factor in [one for one in needed if product.start <= one < product.stop]:
                one = chosen[factor - position]
                if value // one * (one - 1) < product.least:
                    needed.remove(factor)
        return not needed

    def _first(self, others: Factors) -> FirstFactors | None:
        """The first factor's range, given the rest; None if it is empty."""
        least, most = self.least, None
        for product in self._products:
            if product.start == 0:
                rest = math.prod(others[: product.stop - 1])
                least = max(least, -(-product.least // rest))
                if product.most is not None:
                    most = product.most // rest if most is None else min(most, product.most // rest)
        return None if most is not None and most < least else FirstFactors(others, least, most)


def equalize_width(
    order: Sequence[int | str],
    blocks: Sequence[int] = (2, 2, 2, 2),
    *,
    least: int = 2,
) -> Equalization:
    """Channel factors that put the stages' ReLUs in their order of criticality (DeepReShape, Algorithm 1, by width).

    For ResNet18 and S3 > S2 > S4 > S1: alpha*beta/16 > alpha/4 > alpha*beta*gamma/64 > 1, so (beta, gamma) is (5, 2)
    with alpha >= 7, (5, 3) with alpha >= 5, (6, 2) with alpha >= 6 or (7, 2) with alpha >= 5 (section 4.1):

        >>> equalize_width((1, 4, 2, 3)).minimal
        ((5, 5, 3), (5, 7, 2), (6, 6, 2), (7, 5, 2))

    Args:
        order: stages from least to most critical, as numbers or names: (1, 4, 2, 3) or ("S1", "S4", "S2", "S3"). That
            is how a measurement gives it (`Criticality.order`) and the other methods take it; the paper's Algorithm 1
            lists stages the other way round, its Algorithm 2 this way.
        blocks: phi, blocks per stage, as many as stages.
        least: the smallest factor allowed.

    Raises:
        EqualizationError: the order is no permutation of the stages, blocks or least is no positive int, or no factors
            satisfy the inequality, which the message spells out.
    """
    sizes = _checked_sizes("equalize_width", "blocks", blocks)
    stages = checked_order("equalize_width", order, len(sizes))
    (floor,) = _checked_sizes("equalize_width", "least", (least,))
    result = Equalization(stages, sizes, floor)
    if not result.minimal:
        raise EqualizationError(
            f"equalize_width: no factors of at least {floor} give blocks {sizes} the order {_ranked(stages)}, "
            f"that is {result.inequality}"
        )
    return result


def equalize_depth(
    order: Sequence[int | str],
    factors: Sequence[int] = (2, 2, 2),
    *,
    most: int | None = None,
) -> tuple[int, ...]:
    """The fewest blocks per stage that put the stages' ReLUs in their order of criticality (Algorithm 1, by depth).

    With the factors fixed each neighbouring pair bounds one depth from below by another, so one solution has every
    stage at its smallest: 1 block in the least critical stage, and in each next one just enough. (The paper prints
    other depths, which do not satisfy its inequality: `widths_as_depths`.)

        >>> equalize_depth((1, 4, 2, 3))          # phi3/4 > phi2/2 > phi4/8 > phi1
        (1, 3, 7, 9)

    Args:
        order: stages from least to most critical, as in `equalize_width`.
        factors: channel factors between stages, one fewer than stages.
        most: the largest number of blocks a stage may get, if any.

    Raises:
        EqualizationError: as `equalize_width`; or a stage needs more than `most` blocks.
    """
    multipliers = _checked_sizes("equalize_depth", "factors", factors)
    stages = checked_order("equalize_depth", order, len(multipliers) + 1)
    if most is not None:
        _checked_sizes("equalize_depth", "most", (most,))
    per_block = relative_relus((1,) * len(stages), multipliers)
    blocks, below = [0] * len(stages), Fraction(0)
    for stage in stages:
        blocks[stage - 1] = math.floor(below / per_block[stage - 1]) + 1
        below = blocks[stage - 1] * per_block[stage - 1]
        if most is not None and blocks[stage - 1] > most:
            raise EqualizationError(
                f"equalize_depth: stage S{stage} needs {blocks[stage - 1]} blocks, more than {most}, "
                f"for the order {_ranked(stages)} with factors {multipliers}"
            )
    return tuple(blocks)


def widths_as_depths(order: Sequence[int | str], blocks: Sequence[int] = (2, 2, 2, 2)) -> tuple[tuple[int, ...], ...]:
    """The depths the paper prints for equalization by depth (TMLR appendix D): (1, alpha, beta, gamma) of each width.

    (1,5,5,3), (1,5,7,2), (1,6,6,2), (1,7,5,2) for ResNet18. They are the minimal width factors read as depths and do
    not satisfy phi3/4 > phi2/2 > phi4/8 > phi1, the inequality printed with them (ICLR, appendix B.1): with (1,5,5,3)
    stage 2 has twice the ReLUs of stage 3. Kept to rebuild the paper's networks; `equalize_depth` solves it.

    Raises:
        EqualizationError: as `equalize_width`.
    """
    return tuple((1, *factors) for factors in equalize_width(order, blocks).minimal)


def relative_relus(blocks: Sequence[int], factors: Sequence[int]) -> tuple[Fraction, ...]:
    """r_k of every stage: its ReLUs in units of those of one block in stage 1 (Table 15; the stem is not counted).

    Raises:
        EqualizationError: not one factor fewer than stages, or a size that is no positive int.
    """
    sizes = _checked_sizes("relative_relus", "blocks", blocks)
    multipliers = _checked_sizes("relative_relus", "factors", factors)
    if len(multipliers) != len(sizes) - 1:
        raise EqualizationError(
            f"relative_relus: {len(sizes)} stages need {len(sizes) - 1} factors (got {len(multipliers)})"
        )
    return tuple(Fraction(count * math.prod(multipliers[:stage]), SHRINK**stage) for stage, count in enumerate(sizes))


def _ranked(stages: Sequence[int]) -> str:
    """As the papers print an order, the most critical stage first."""
    return " > ".join(f"S{stage}" for stage in reversed(stages))


def _share(blocks: Sequence[int], stage: int) -> str:
    names = "".join(f"*x{factor}" for factor in range(1, stage))
    return f"{blocks[stage - 1]}{names}/{SHRINK ** (stage - 1)}" if stage > 1 else str(blocks[0])


def checked_order(here: str, order: Sequence[int | str], stages: int) -> tuple[int, ...]:
    """Stage numbers of an order of numbers or names ("S3"). Raises EqualizationError if it is no permutation."""
    if not isinstance(order, Sequence):
        raise EqualizationError(f"{here}: order must be a permutation of S1..S{stages} (got {order!r:.80})")
    numbers = [one.removeprefix("S") if isinstance(one, str) else one for one in order]
    found = [int(one) if isinstance(one, str) and one.isascii() and one.isdigit() else one for one in numbers]
    if sorted(map(repr, found)) != sorted(map(repr, range(1, stages + 1))):
        raise EqualizationError(f"{here}: order must be a permutation of S1..S{stages} (got {tuple(order)!r:.80})")
    return tuple(int(one) for one in found)


def _checked_sizes(here: str, argument: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(sizes, Sequence):
        raise EqualizationError(f"{here}: {argument} must be ints of at least 1 (got {sizes!r:.80})")
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise EqualizationError(f"{here}: {argument} must be ints of at least 1 (got {tuple(sizes)!r:.80})")
    return tuple(sizes)
