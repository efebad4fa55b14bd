"""A two-party run held against the emulation: step by step on the run's own inputs, and end to end with its flips.

A run's `values` are its reconstructed steps, v_0 + v_1 mod 2^64, int64 [N, *step.shape] each, in the program's order;
the last one is what the client learns, as a replay's `[*replayed.values[:-1], replayed.logits]`. One LSB is 2^-16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepshare.secure.emulate import GateBits, compared, gate_makers, gates_of, untruncated
from deepshare.secure.errors import SecureError
from deepshare.secure.program import Program

Run = Sequence[Tensor]


@dataclass(frozen=True)
class Violation:
    """A step of a run that is not what its own inputs give.

    Attributes:
        index, name, op: the step.
        what: "value" or "gate".
        elements: how many are wrong, of `of`.
        largest: largest |difference| to the value rounded down, in LSB; for gates the largest |x| decided wrongly.
        wraps: how many differ by 2^(64 - bits), as where a share wrapped in its truncation.
    """

    index: int
    name: str
    op: str
    what: str
    elements: int
    of: int
    largest: int
    wraps: int = 0

    def __str__(self) -> str:
        wrapped = f", {self.wraps} of them wrapped in truncation" if self.wraps else ""
        return (
            f"step {self.index} '{self.name}' ({self.op}): {self.elements} of {self.of} {self.what}s wrong{wrapped}, "
            f"largest {self.largest} LSB"
        )


@dataclass(frozen=True)
class Flips:
    """Gates of one comparison that differ between two runs.

    Attributes:
        index, name: the step that compares.
        gates: comparisons, over all images.
        magnitudes: int64, |x| in LSB of each gate that differs: the larger of x's two values.
    """

    index: int
    name: str
    gates: int
    magnitudes: Tensor

    @property
    def count(self) -> int:
        return self.magnitudes.numel()


@dataclass(frozen=True)
class StepDifference:
    """How far two runs are apart at one step: largest |difference| in LSB, elements, and flips if it compares."""

    index: int
    name: str
    op: str
    largest: int
    elements: int
    flips: Flips | None


def check_locally(
    program: Program,
    tensors: Mapping[str, Tensor],
    values: Run,
    *,
    gates: Mapping[int, Tensor] | None = None,
    gate_bits: GateBits = 64,
) -> tuple[Violation, ...]:
    """Every step against what the run's own inputs to it give; empty if all is right.

    With v the step's value before truncation, the run must have floor(v / 2^bits) or, where that is not exact, this
    plus 1: local truncation rounds to one of v's two neighbours. Steps that truncate nothing must be equal.

    Args:
        values: the run's steps.
        gates: the run's gates, bool, by index of the step that compares; without them a gate is seen in its
            effect alone, which is nothing where what it multiplies is 0.

    Raises:
        SecureError: values of another number, shape or dtype than the program's.
    """
    _check_run(program, values, "values")
    by_index = dict(enumerate(values))
    found = []
    for index, step in enumerate(program.steps):
        if step.op == "input":
            continue
        opens = gates_of(program, step, by_index, gate_bits)
        wide, bits = untruncated(program, tensors, step, by_index, opens)
        off = values[index] - (wide >> bits)
        inexact = wide & ((1 << bits) - 1) != 0
        wrong = (off != 0) & ~((off == 1) & inexact)
        if bool(wrong.any()):
            count, largest, wraps = int(wrong.sum()), _largest(off[wrong]), _wraps(off[wrong], bits)
            found.append(Violation(index, step.name, step.op, "value", count, wrong.numel(), largest, wraps))
        if gates is not None and index in gates and opens is not None:
            found.extend(_wrong_gates(program, index, by_index, opens, gates[index]))
    return tuple(found)


def compare_steps(program: Program, expected: Run, actual: Run) -> tuple[StepDifference, ...]:
    """Largest difference and gate flips of every step between two runs, `expected` being the emulation's values.

    A flip early in the network changes everything after it: `emulate(..., gates=run_gates(...))` follows the run's
    gates, and what is left between the two is truncation.
    """
    _check_run(program, expected, "expected")
    _check_run(program, actual, "actual")
    flipped = {flip.index: flip for flip in flips(program, expected, actual)}
    return tuple(
        StepDifference(index, step.name, step.op, _largest(a - e), e.numel(), flipped.get(index))
        for index, (step, e, a) in enumerate(zip(program.steps, expected, actual, strict=True))
    )


def flips(program: Program, expected: Run, actual: Run) -> tuple[Flips, ...]:
    """The gates that differ between two runs, one entry for each step that compares."""
    _check_run(program, expected, "expected")
    _check_run(program, actual, "actual")
    found = []
    for index in gate_makers(program):
        step = program.steps[index]
        one, other = (_compared(program, index, dict(enumerate(run))) for run in (expected, actual))
        differ = (one >= 0) != (other >= 0)
        magnitudes = torch.maximum(one[differ].abs(), other[differ].abs())
        found.append(Flips(index, step.name, differ.numel(), magnitudes))
    return tuple(found)


def run_gates(program: Program, values: Run) -> dict[int, Tensor]:
    """The gates a run's values imply, as `emulate` takes them: bool, by index of the step that compares."""
    by_index = dict(enumerate(values))
    return {index: _compared(program, index, by_index) >= 0 for index in gate_makers(program)}


def _wrong_gates(
    program: Program, index: int, values: dict[int, Tensor], expected: Tensor, actual: Tensor
) -> list[Violation]:
    differ = expected != actual
    if not bool(differ.any()):
        return []
    step, largest = program.steps[index], _largest(_compared(program, index, values)[differ])
    return [Violation(index, step.name, step.op, "gate", int(differ.sum()), differ.numel(), largest)]


def _compared(program: Program, index: int, values: dict[int, Tensor]) -> Tensor:
    x = compared(program, program.steps[index], values)
    assert x is not None  # a maker compares
    return x


def _wraps(off: Tensor, bits: int) -> int:
    """How many differ by a multiple of 2^(64 - bits), rounding aside: v_0 + v_1 left the range before the cut."""
    if bits == 0:
        return 0
    return int(((off & ((1 << (64 - bits)) - 1) <= 1) & (off != 1)).sum())


def _largest(differences: Tensor) -> int:
    """Largest magnitude, -2^63 included (its int64 abs is negative)."""
    if not differences.numel():
        return 0
    return max(abs(int(differences.max())), abs(int(differences.min())))


def _check_run(program: Program, values: Run, name: str) -> None:
    if len(values) != len(program.steps):
        raise SecureError(f"exactness: {name} must have {len(program.steps)} steps (got {len(values)})")
    for index, (step, value) in enumerate(zip(program.steps, values, strict=True)):
        if value.dtype != torch.int64 or tuple(value.shape[1:]) != step.shape or len(value) != len(values[0]):
            wanted = f"int64 {[len(values[0]), *step.shape]}"
            raise SecureError(
                f"exactness: {name}[{index}] ('{step.name}') must be {wanted} (got {value.dtype} {list(value.shape)})"
            )
