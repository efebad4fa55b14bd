"""How far local truncation can carry a run of the engine from the floor emulation that follows the run's gates."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepshare.secure.emulate import gate_makers, untruncated
from deepshare.secure.program import Program, Step


def error_bounds(
    program: Program, tensors: Mapping[str, Tensor], gates: Mapping[int, Tensor], rows: int
) -> list[Tensor]:
    """Largest |run - emulation| of every element of every step, in LSB: int64 [rows, *step.shape], step by step.

    With E the bound of a step's inputs: linear layers |W| E, gated ones |alpha gate + beta| E, sums and differences the
    sum of both; then division by 2^bits rounded up, and 1 for the truncation itself. Both runs have the same gates.
    """
    found: dict[int, Tensor] = {}
    for index, step in enumerate(program.steps):
        if step.op in ("input", "constant"):
            found[index] = torch.zeros(rows, *step.shape, dtype=torch.int64)
        elif step.op == "sub":
            found[index] = found[step.inputs[0]] + found[step.inputs[1]]
        else:
            opened = gates.get(_maker(program, index)) if step.op in ("relu", "shared", "mask", "select") else None
            wide, bits = untruncated(program, _magnitudes(step, tensors), step, found, opened)
            found[index] = (wide + (1 << bits) - 1 >> bits) + 1 if bits else wide
    return list(found.values())


def _magnitudes(step: Step, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|W|, no bias; of a gated step alpha and beta such that alpha gate + beta is its magnitude for either gate."""
    if step.op == "shared":
        alpha, beta = (tensors[step.params[role]] for role in ("alpha", "beta"))
        return {step.params["alpha"]: (alpha + beta).abs() - beta.abs(), step.params["beta"]: beta.abs()}
    roles = {key: role for role, key in step.params.items()}
    return {
        key: torch.zeros_like(tensors[key]) if role in ("bias", "shift") else tensors[key].abs()
        for key, role in roles.items()
    }


def _maker(program: Program, index: int) -> int:
    """The step that makes the gates this one uses."""
    step, makers = program.steps[index], gate_makers(program)
    if index in makers:
        return index
    return next(maker for maker in makers if program.steps[maker].gates == step.gates)
