"""Programs small enough to follow, and runs of them as two parties would have them."""

import torch
from secure_cases import cases
from torch import Tensor

from deepshare.secure.emulate import (
    gates_of,
    untruncated,
)
from deepshare.secure.fixed_point import encode
from deepshare.secure.lower import lower
from deepshare.secure.program import Param, Program, Step

CASES = cases()
ROUNDINGS = ("floor", "nearest", "random")
WORD = 2**64


def signed(value: int) -> int:
    """The representative of value mod 2^64 in [-2^63, 2^63)."""
    return (value + WORD // 2) % WORD - WORD // 2


def words(*shape: int, seed: int, magnitude: int = 2**63) -> Tensor:
    return torch.randint(-magnitude, magnitude - 1, shape, generator=torch.Generator().manual_seed(seed))


def program_of(*steps: Step, public: dict[str, Tensor] | None = None, **params: tuple[tuple[int, ...], int]) -> Program:
    return Program(steps, {key: Param(*param) for key, param in params.items()}, public or {})


def case(name: str) -> tuple[Program, dict[str, Tensor], Tensor]:
    program, tensors = lower(CASES[name].model, tuple(CASES[name].images.shape[1:]))
    return program, tensors, encode(CASES[name].images)


def two_party_values(program: Program, tensors: dict[str, Tensor], images: Tensor, seed: int = 0) -> list[Tensor]:
    """A run's steps as two parties would reconstruct them: every truncation on fresh random shares, each on its own."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[int, Tensor] = {0: images}
    for index, step in enumerate(program.steps[1:], 1):
        wide, bits = untruncated(program, tensors, step, values, gates_of(program, step, values))
        v_0 = torch.randint(-(2**63), 2**63 - 1, wide.shape, generator=generator)
        values[index] = (v_0 >> bits) - (-(wide - v_0) >> bits) if bits else wide
    return list(values.values())
