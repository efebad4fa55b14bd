"""One party's evaluation of a Program on CrypTen's ArithmeticSharedTensor.

Every share is kept as a plain integer (CrypTen encoder scale 1) and the scale is ours to track. CrypTen's comparison
returns scale 1 whatever went in, and its mixed products then truncate to integers without a word; with scale 1
everywhere CrypTen truncates nothing, and the one local truncation a layer needs stands in `_truncate`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Program, Step

SERVER, CLIENT = 0, 1
Shared = Any  # crypten.mpc.primitives.ArithmeticSharedTensor: CrypTen has no types


class Evaluator:
    """Holds the weights (public integers, or shares) and runs the program's steps on a shared input.

    Args:
        crypten: the initialised module.
        program: what both parties know.
        tensors: the weights as integers; None at the client when `secret`.
        secret: share the weights from the server instead of using them in the clear.
        on_step: called with the step's index before each step.
    """

    def __init__(
        self,
        crypten: ModuleType,
        program: Program,
        tensors: dict[str, Tensor] | None,
        *,
        secret: bool,
        on_step: Callable[[int], None],
    ) -> None:
        self._crypten = crypten
        self._program = program
        self._on_step = on_step
        self._secret = secret
        self._params = {
            key: self.share(None if tensors is None else tensors[key], param.shape, SERVER)
            if secret
            else _known(tensors, key)
            for key, param in program.params.items()
        }
        self._last_use = _last_uses(program)

    def share(self, value: Tensor | None, shape: tuple[int, ...], source: int) -> Shared:
        """Shares the integer tensor `value` of party `source`; the other party gives None."""
        arithmetic = self._crypten.mpc.primitives.ArithmeticSharedTensor
        return arithmetic(value, size=torch.Size(shape), precision=0, src=source)

    def run(self, x: Shared) -> tuple[Shared, list[tuple[int, int]]]:
        """Result of the last step, and (rounds, comm_bytes) of every step from CrypTen's counters."""
        values: dict[int, Shared] = {}
        gates: dict[tuple[int, int], Shared] = {}
        spent = []
        for index, step in enumerate(self._program.steps):
            self._on_step(index)
            before = self.counters()
            values[index] = x if step.op == "input" else self._step(step, values, gates)
            after = self.counters()
            spent.append((after[0] - before[0], after[1] - before[1]))
            self._forget(index, values, gates)
        return values[len(self._program.steps) - 1], spent

    def counters(self) -> tuple[int, int]:
        stats = self._crypten.communicator.get().get_communication_stats()
        return stats["rounds"], stats["bytes"]

    def open_to_client(self, x: Shared) -> Tensor | None:
        """The plain integers, at the client only: the server sends its share and receives nothing.

        Not CrypTen's `reveal(dst=)`: gloo's reduce adds up halves of the tensor at both ends, so the server would see
        them.
        """
        communicator = self._crypten.communicator.get()
        if x.rank == SERVER:
            communicator.send(x.share.contiguous(), CLIENT)
            return None
        return x.share + communicator.recv(torch.empty_like(x.share), SERVER)

    def _step(self, step: Step, values: dict[int, Shared], gates: dict[tuple[int, int], Shared]) -> Shared:
        x = values[step.inputs[0]]
        match step.op:
            case "conv2d":
                return self._affine_end(x.conv2d(self._param(step, "weight"), **step.options), step, "bias")
            case "linear":
                return self._affine_end(x.matmul(self._param(step, "weight")), step, "bias")
            case "affine":
                return self._affine_end(x.mul(self._param(step, "scale")), step, "shift")
            case "add":
                return x.add(values[step.inputs[1]])
            case "sub":
                return x.sub(values[step.inputs[1]])
            case "relu":
                return x.mul(self._drelu(x))
            case "shared":
                return self._shared(step, x, values, gates)
            case "mask":
                return self._mask(step, x)
            case "avg_pool2d":
                return self._average(x, step)
            case "gather":
                index = self._program.public[step.public["index"]]
                return x.flatten(start_dim=1).index_select(1, index).reshape((x.share.size(0), *step.shape))
            case "reshape":
                return x.reshape((x.share.size(0), *step.shape))
            case "narrow":
                return x[:, step.options["start"] : step.options["start"] + step.options["length"]]
            case "concat":
                joined = x.clone()
                joined.share = torch.cat([values[index].share for index in step.inputs], 1)
                return joined
        raise AssertionError(f"unknown step {step.op}")

    def _param(self, step: Step, role: str) -> Any:
        return self._params[step.params[role]]

    def _affine_end(self, product: Shared, step: Step, role: str) -> Shared:
        """(product + bias) / 2^16: the bias has the product's 32 fractional bits, so one truncation serves both."""
        if role in step.params:
            product = product.add(self._param(step, role))
        return _truncate(product)

    def _drelu(self, x: Shared) -> Shared:
        """Share of the integer 1[x >= 0], without x's encoder."""
        compared = self._crypten.mpc.MPCTensor.from_shares(x.share, precision=0) >= 0
        return compared._tensor

    def _shared(self, step: Step, x: Shared, values: dict[int, Shared], gates: dict[tuple[int, int], Shared]) -> Shared:
        """x * (alpha * gate + beta); the gate is compared once per leader and gathered by pi (DeepShare eq. 3, 6)."""
        assert step.gates is not None
        if step.gates not in gates:
            source, prototypes = step.gates
            gates[step.gates] = self._drelu(values[source][:, :prototypes])
        gate = gates[step.gates].index_select(1, self._program.public[step.public["pi"]])
        alpha, beta = self._param(step, "alpha"), self._param(step, "beta")
        if self._secret:
            return _truncate(x.mul(gate.mul(alpha).add(beta)))
        return _truncate(x.mul(gate).mul(alpha).add(x.mul(beta)))

    def _mask(self, step: Step, x: Shared) -> Shared:
        """ReLU on the masked elements, gathered into one call; the others pass (SNL eq. 2) or are 0 (eq. 7)."""
        index = self._program.public[step.public["index"]]
        flat = x.flatten(start_dim=1)
        result = flat.clone()
        if step.options["zero_out"]:
            result.share.zero_()  # both parties: 0 + 0
        if index.numel():
            kept = flat.index_select(1, index)
            result.share[:, index] = kept.mul(self._drelu(kept)).share
        return result.reshape(x.share.shape)

    def _average(self, x: Shared, step: Step) -> Shared:
        kernel = step.options["kernel"]
        pooled = x._sum_pool2d(kernel, stride=step.options["stride"], padding=step.options["padding"])
        return pooled.div(kernel[0] * kernel[1]).reshape((x.share.size(0), *step.shape))

    def _forget(self, index: int, values: dict[int, Shared], gates: dict[tuple[int, int], Shared]) -> None:
        """Drops values and gates nobody reads any more: a ResNet's shares at once would be hundreds of MB."""
        for done in [key for key in values if self._last_use.get(key, -1) <= index and key != index]:
            del values[done]
        for pair in [pair for pair in gates if self._last_use[pair] <= index]:
            del gates[pair]


def _truncate(x: Shared) -> Shared:
    """Drops 16 fractional bits, each party on its own share: right up to 1 unit, wrong with probability |x| / 2^64."""
    return x.div_(2**SCALE_BITS)


def _known(tensors: dict[str, Tensor] | None, key: str) -> Tensor:
    if tensors is None:
        raise ValueError(f"public weights must be known to both parties (got none for {key})")
    return tensors[key]


def _last_uses(program: Program) -> dict[Any, int]:
    """Index of the last step that reads each value (int key) and each set of gates (pair key)."""
    last: dict[Any, int] = {}
    for index, step in enumerate(program.steps):
        last.update(dict.fromkeys(step.inputs, index))
        if step.gates is not None:
            last[step.gates] = index
            if step.fresh:
                last[step.gates[0]] = index
    return last
