"""A Program on plain integers: no shares, no parties, exact arithmetic mod 2^64, one truncation a layer.

The reference a two-party run is held to (exactness.py), what ranges are measured on (calibrate.py) and what is compared
with the float model (agreement.py). Written apart from the engine and the baseline: it shares no code with either.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Program, Step

Rounding = Literal["floor", "nearest", "random"]
GateBits = Literal[32, 64]
Values = Mapping[int, Tensor]  # step index -> value, [N, *step.shape]


@dataclass(frozen=True)
class Emulation:
    """What `emulate` computed.

    Attributes:
        result: the last step's value, int64 [N, *shape]: logits with 16 fractional bits, or a label.
        values: every step's value in order, int64 [N, *step.shape], if they were kept.
    """

    result: Tensor
    values: tuple[Tensor, ...] | None


def emulate(
    program: Program,
    tensors: Mapping[str, Tensor],
    images: Tensor,  # int64 [N, *input shape], 16 fractional bits
    *,
    rounding: Rounding = "floor",
    gate_bits: GateBits = 64,
    keep: bool = False,
    overrides: Values | None = None,
    gates: Mapping[int, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Emulation:
    """Runs the program on integers of Z_2^64.

    Args:
        program, tensors: as `lower` gives them.
        images: as `encode` gives them.
        rounding: how a value v of 32 fractional bits loses 16 of them. "floor": v >> 16. "nearest": (v + 2^15) >> 16.
            "random": (v + u) >> 16, u uniform below 2^16, which is v / 2^16 rounded up with the probability of its
            fraction: exactly how two parties' local truncation is distributed (docs/exactness.md).
        gate_bits: 32 compares the low 32 bits alone, as 32-bit gates do: wrong where |x| >= 2^15.
        keep: keep every step's value.
        overrides: values to be taken for a step in place of the emulated ones.
        gates: bool, by index of the step that compares (`gate_makers`), in place of the sign of what is compared.
        generator: draws u; None: the operating system does.

    Raises:
        SecureError: images or a weight of another dtype or shape than the program's; a step that is not known.
    """
    _check(program, tensors, images, rounding, gate_bits)
    values: dict[int, Tensor] = {}
    last_reads = _last_reads(program)
    for index, step in enumerate(program.steps):
        if overrides is not None and index in overrides:
            values[index] = overrides[index]
        elif step.op == "input":
            values[index] = images
        else:
            forced = None if gates is None else gates.get(_maker(program, index))
            opens = gates_of(program, step, values, gate_bits) if forced is None else forced
            wide, bits = untruncated(program, tensors, step, values, opens)
            values[index] = truncate(wide, bits, rounding, generator)
        if not keep:
            values = {at: value for at, value in values.items() if last_reads.get(at, -1) > index or at == index}
    result = values[len(program.steps) - 1]
    return Emulation(result, tuple(values.values()) if keep else None)


def truncate(v: Tensor, bits: int, rounding: Rounding, generator: torch.Generator | None = None) -> Tensor:
    """v / 2^bits as `rounding` says (see `emulate`); bits 0 changes nothing."""
    if bits == 0 or rounding == "floor":
        return v >> bits
    if rounding == "nearest":
        return (v + (1 << (bits - 1))) >> bits
    if generator is not None:
        return (v + torch.randint(1 << bits, v.shape, generator=generator)) >> bits
    drawn = torch.frombuffer(bytearray(os.urandom(8 * v.numel() + 8)), dtype=torch.int64)[: v.numel()]
    return (v + (drawn & ((1 << bits) - 1)).reshape(v.shape)) >> bits


def gate_makers(program: Program) -> tuple[int, ...]:
    """Indices of the steps that compare, in order: relu, mask, and shared or select where they lead."""
    return tuple(i for i, step in enumerate(program.steps) if step.op in ("relu", "mask") or step.fresh)


def compared(program: Program, step: Step, values: Values) -> Tensor | None:
    """What decides the step's gates, None if it has none.

    relu: x [N, *S]; mask: its kept elements [N, K]; shared, select: the prototypes [N, P, *S] of the value they name.
    """
    if step.op == "relu":
        return values[step.inputs[0]]
    if step.op == "mask":
        return values[step.inputs[0]].flatten(1)[:, program.public[step.public["index"]]]
    if step.gates is not None:
        source, prototypes = step.gates
        return values[source][:, :prototypes]
    return None


def gates_of(program: Program, step: Step, values: Values, gate_bits: GateBits = 64) -> Tensor | None:
    """DReLU(x) = 1[x >= 0], bool, of what `compared` gives; on the low 32 bits alone if `gate_bits` is 32."""
    x = compared(program, step, values)
    if x is None:
        return None
    return x >= 0 if gate_bits == 64 else x & (1 << 31) == 0


def untruncated(
    program: Program, tensors: Mapping[str, Tensor], step: Step, values: Values, gates: Tensor | None
) -> tuple[Tensor, int]:
    """(v, bits): the step's value is v / 2^bits, truncated.

    On int64 everything wraps around mod 2^64. Real tensors and values work too: in units of 2^-16 they give v's true
    size (calibrate.py).

    Args:
        values: must hold what the step reads, and one value at least, whose batch a constant takes.
        gates: as `gates_of` gives them; None for steps that compare nothing.
    """
    operation = _OPERATIONS.get(step.op)
    if operation is None:
        raise SecureError(f"emulate: step '{step.name}' must be one of {', '.join(_OPERATIONS)} (got {step.op})")
    weights = {role: tensors[key] for role, key in step.params.items()}
    public = {role: program.public[key] for role, key in step.public.items()}
    rows = len(next(iter(values.values())))
    return operation(_Call(step, [values[index] for index in step.inputs], weights, public, gates, rows))


def window_sum(x: Tensor, step: Step) -> Tensor:
    """Sum over each window of an avg_pool2d step, [N, C, H, W] to [N, *step.shape]; padding adds zeros."""
    (rows, columns), (down, right) = step.options["kernel"], step.options["stride"]
    top, left = step.options["padding"]
    windows = F.pad(x, (left, left, top, top)).unfold(2, rows, down).unfold(3, columns, right)
    return windows.sum((-2, -1)).reshape(-1, *step.shape)


@dataclass(frozen=True)
class _Call:
    """One step with what it reads: inputs, weights and public tensors by role, gates; and the batch."""

    step: Step
    inputs: list[Tensor]
    weights: dict[str, Tensor]
    public: dict[str, Tensor]
    gates: Tensor | None
    rows: int

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    def opens(self, like: Tensor) -> Tensor:
        assert self.gates is not None
        return self.gates.to(like.dtype)


def _linear_end(call: _Call, product: Tensor, role: str) -> tuple[Tensor, int]:
    """The bias has the product's 32 fractional bits: one truncation serves both."""
    return (product + call.weights[role] if role in call.weights else product), SCALE_BITS


def _conv2d(call: _Call) -> tuple[Tensor, int]:
    return _linear_end(call, F.conv2d(call.x, call.weights["weight"], **call.step.options), "bias")


def _linear(call: _Call) -> tuple[Tensor, int]:
    return _linear_end(call, call.x @ call.weights["weight"], "bias")


def _affine(call: _Call) -> tuple[Tensor, int]:
    return _linear_end(call, call.x * call.weights["scale"], "shift")


def _shared(call: _Call) -> tuple[Tensor, int]:
    """x * (alpha * gate[pi] + beta): DeepShare eq. 3 and 6."""
    gate = call.opens(call.x)[:, call.public["pi"]]
    return call.x * (call.weights["alpha"] * gate + call.weights["beta"]), SCALE_BITS


def _select(call: _Call) -> tuple[Tensor, int]:
    """x * gate[pi], nothing truncated."""
    return call.x * call.opens(call.x)[:, call.public["pi"]], 0


def _constant(call: _Call) -> tuple[Tensor, int]:
    return call.public["value"].reshape(1, *call.step.shape).expand(call.rows, *call.step.shape), 0


def _mask(call: _Call) -> tuple[Tensor, int]:
    """ReLU on the kept elements; the others pass (SNL eq. 2) or are 0 (eq. 7)."""
    flat, index = call.x.flatten(1), call.public["index"]
    y = torch.zeros_like(flat) if call.step.options["zero_out"] else flat.clone()
    y[:, index] = flat[:, index] * call.opens(flat)
    return y.reshape(call.x.shape), 0


def _avg_pool2d(call: _Call) -> tuple[Tensor, int]:
    """Sum, then division by k elements: k = 2^b drops b bits, other k multiply by round(2^16 / k) and drop 16."""
    total, k = window_sum(call.x, call.step), prod(call.step.options["kernel"])
    if k & (k - 1) == 0:
        return total, k.bit_length() - 1
    return total * round(2**SCALE_BITS / k), SCALE_BITS


def _narrow(call: _Call) -> tuple[Tensor, int]:
    return call.x.narrow(1, call.step.options["start"], call.step.options["length"]), 0


def _gather(call: _Call) -> tuple[Tensor, int]:
    """Elements of each image by flat index, repeated as often as the index says."""
    return call.x.flatten(1)[:, call.public["index"]].reshape(-1, *call.step.shape), 0


def _reshape(call: _Call) -> tuple[Tensor, int]:
    return call.x.reshape(-1, *call.step.shape), 0


_OPERATIONS: dict[str, Callable[[_Call], tuple[Tensor, int]]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "affine": _affine,
    "add": lambda call: (call.inputs[0] + call.inputs[1], 0),
    "sub": lambda call: (call.inputs[0] - call.inputs[1], 0),
    "relu": lambda call: (call.x * call.opens(call.x), 0),
    "shared": _shared,
    "select": _select,
    "mask": _mask,
    "avg_pool2d": _avg_pool2d,
    "constant": _constant,
    "gather": _gather,
    "narrow": _narrow,
    "concat": lambda call: (torch.cat(call.inputs, 1), 0),
    "reshape": _reshape,
}


def _maker(program: Program, index: int) -> int:
    """The step that makes the gates this one uses: itself, or the leader of its (source, P)."""
    step = program.steps[index]
    if step.gates is None or step.fresh:
        return index
    return next(i for i, leader in enumerate(program.steps) if leader.fresh and leader.gates == step.gates)


def _last_reads(program: Program) -> dict[int, int]:
    """Index of the last step that reads each step's value, as operand or to compare it."""
    last: dict[int, int] = {}
    for index, step in enumerate(program.steps):
        last.update(dict.fromkeys(step.inputs if step.gates is None else (*step.inputs, step.gates[0]), index))
    return last


def _check(program: Program, tensors: Mapping[str, Tensor], images: Tensor, rounding: str, gate_bits: int) -> None:
    if rounding not in ("floor", "nearest", "random"):
        raise SecureError(f"emulate: rounding must be 'floor', 'nearest' or 'random' (got {rounding!r})")
    if gate_bits not in (32, 64):
        raise SecureError(f"emulate: gate_bits must be 32 or 64 (got {gate_bits!r})")
    shape = program.steps[0].shape
    if images.dtype != torch.int64 or tuple(images.shape[1:]) != shape or images.dim() != len(shape) + 1:
        wanted = f"int64 {['N', *shape]}"
        raise SecureError(f"emulate: images must be {wanted} (got {images.dtype} {list(images.shape)})")
    for key, param in program.params.items():
        got = tensors.get(key)
        if got is None or got.dtype != torch.int64 or tuple(got.shape) != param.shape:
            came = "none" if got is None else f"{got.dtype} {list(got.shape)}"
            raise SecureError(f"emulate: tensors['{key}'] must be int64 {list(param.shape)} (got {came})")
