"""Both parties' shares in one process, from the same material and without a network: the reference of the engine.

Independent of what a party runs (inference.py, gated.py, comparison.py and below): gates come from comparing the values
themselves, the server's share of a product is the product of the values less the client's share. Shared with it are the
schedule, the material and ring.py's local arithmetic, which the emulation holds. What a run of two parties computes
must be equal to this bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepshare.secure.engine.material import Material
from deepshare.secure.engine.party import mask_weights
from deepshare.secure.engine.protocol import Compare, Gated, Give, Linear, Local, Open, Operand, Protocol, Reveal
from deepshare.secure.engine.ring import (
    LINEAR,
    apply_linear,
    bias_role,
    division,
    sum_windows,
    truncate,
    weight_role,
)
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Step

Pair = tuple[Tensor, Tensor]  # the server's and the client's share


@dataclass(frozen=True)
class Replayed:
    """Attributes:
    shares: of every step's value, the last linear layer's with 32 fractional bits.
    logits: what the client learns, int64 with 16 fractional bits.
    """

    shares: list[Pair]
    logits: Tensor

    @property
    def values(self) -> list[Tensor]:
        """Every step's value, the sum of its shares."""
        return [first + second for first, second in self.shares]


def replay(
    protocol: Protocol,
    tensors: dict[str, Tensor],
    mask_key: bytes | None,
    tickets: tuple[Ticket, Ticket],
    images: Tensor,
) -> Replayed:
    """What the two parties compute with these tickets on `images` (int64 [N, C, H, W], 16 fractional bits).

    Args:
        tensors: every weight, integers, as the server has them.
        mask_key: of the weight masks, as the server has it.
    """
    return _Replay(protocol, tensors, mask_key, tickets).run(images)


class _Replay:
    def __init__(
        self, protocol: Protocol, tensors: dict[str, Tensor], mask_key: bytes | None, tickets: tuple[Ticket, Ticket]
    ) -> None:
        self._protocol, self._tensors = protocol, tensors
        self._masked = mask_weights(protocol, tensors, mask_key)
        self._material = [Material(ticket, protocol, party) for party, ticket in enumerate(tickets)]
        self._shares: list[Pair] = []
        self._masks: dict[Operand, Pair] = {}
        self._client_masks: dict[Operand, Tensor] = {}
        self._compared: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # gate, r, r_1: by the comparison's wire

    def run(self, images: Tensor) -> Replayed:
        logits = images
        for action in self._protocol.actions:
            match action:
                case Open():
                    first, second = (material.words(action.mask) for material in self._material)
                    self._masks[action.operand] = (first, second)
                    self._client_masks[action.operand] = second
                case Give():
                    self._client_masks[action.operand] = self._material[1].words(action.mask)
                case Compare():
                    self._compare(action)
                case Linear():
                    self._shares.append(self._linear(action))
                case Gated():
                    self._shares.append(self._gated(action))
                case Local():
                    self._shares.append(self._local(action.step, images))
                case Reveal():
                    logits = self._reveal(action)
        return Replayed(self._shares, logits)

    def _value(self, operand: Operand) -> Tensor:
        first, second = self._shares[operand.value]
        value = first + second
        if operand.kept is None:
            return value
        return value.flatten(1)[:, self._index(operand.kept)].unsqueeze(1)

    def _index(self, step: int) -> Tensor:
        return self._protocol.program.public[self._protocol.program.steps[step].public["index"]]

    def _weight(self, step: Step, role: str) -> Tensor:
        return self._tensors[step.params[role]]

    def _truncated(self, index: int, first: Tensor, second: Tensor) -> Pair:
        if index == len(self._protocol.program.steps) - 1:
            return first, second
        return truncate(first, SCALE_BITS, 0), truncate(second, SCALE_BITS, 1)

    def _linear(self, action: Linear) -> Pair:
        step, operand = self._protocol.program.steps[action.step], action.source.operand
        product = apply_linear(step, self._value(operand), self._weight(step, weight_role(step)))
        product = product + (self._weight(step, bias_role(step)) if bias_role(step) in step.params else 0)
        masked = self._masked[step.params[weight_role(step)]]
        second = apply_linear(step, self._client_masks[operand], masked) + self._material[1].words(action.product)
        return self._truncated(action.step, product - second, second)

    def _compare(self, action: Compare) -> None:
        bits = self._protocol.settings.gate_bits
        x = self._value(action.operand)[:, : action.prototypes]
        first, second = self._masks[action.operand]
        mask = (first + second)[:, : action.prototypes]
        noise = self._material[0].bytes(action.noise) ^ self._material[1].bytes(action.noise)
        unpacked = noise.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
        random = unpacked.reshape(-1)[: action.gates].reshape(x.shape).to(torch.int64)
        flip = random ^ (mask >> (bits - 1) & 1) ^ 1
        low = x << (64 - bits) >> (64 - bits)  # the word mod 2^m, signed
        self._compared[action.flip.number] = ((low >= 0).to(torch.int64), flip, self._material[1].words(action.flip))

    def _gated(self, action: Gated) -> Pair:
        step, operand = self._protocol.program.steps[action.step], action.opened.operand
        gate, flip, second_flip = self._compared[action.compare.flip.number]
        if "pi" in step.public:
            channels = self._protocol.program.public[step.public["pi"]]
            gate, flip, second_flip = (each[:, channels] for each in (gate, flip, second_flip))
        x, second_mask = self._value(operand), self._masks[operand][1]
        opened = x - sum(self._masks[operand])
        second = self._second_product(action, opened, gate ^ flip, second_mask, second_flip)
        if step.op != "shared":
            return self._put_back(action, x * gate - second, second)
        alpha, beta = self._weight(step, "alpha"), self._weight(step, "beta")
        first = x * (alpha * gate + beta) - second
        return truncate(first, SCALE_BITS, 0), truncate(second, SCALE_BITS, 1)

    def _second_product(self, action: Gated, opened: Tensor, toggled: Tensor, mask: Tensor, flip: Tensor) -> Tensor:
        """The client's share of x * (alpha gate + beta), by docs/share.md's equation with alpha_1 = beta_1 = 0."""
        step = self._protocol.program.steps[action.step]
        products = [self._material[1].words(wire) for wire in action.products]
        if len(products) > 1:
            alpha, beta = (self._masked[step.params[role]] for role in ("alpha", "beta"))
            flip = alpha * flip + products[1]
            offset = beta * mask + alpha * products[0] + products[2]
            toggle = alpha * mask - 2 * alpha * products[0] + products[3]
        else:
            one, zero = torch.ones_like(mask[:1, :1]), torch.zeros_like(mask[:1, :1])
            shared = step.op == "shared"
            alpha, beta = (self._weight(step, "alpha"), self._weight(step, "beta")) if shared else (one, zero)
            flip, offset = alpha * flip, beta * mask + alpha * products[0]
            toggle = alpha * mask - 2 * alpha * products[0]
        return opened * (flip - 2 * toggled * flip) + offset + toggled * toggle

    def _put_back(self, action: Gated, first: Tensor, second: Tensor) -> Pair:
        """A mask step's kept elements among the others."""
        if action.opened.operand.kept is None:
            return first, second
        pair = []
        for whole, part in zip(self._passed(action.step), (first, second), strict=True):
            whole.flatten(1)[:, self._index(action.step)] = part.flatten(1)
            pair.append(whole)
        return pair[0], pair[1]

    def _passed(self, index: int) -> Pair:
        step = self._protocol.program.steps[index]
        first, second = (share.clone() for share in self._shares[step.inputs[0]])
        return (first.zero_(), second.zero_()) if step.options["zero_out"] else (first, second)

    def _local(self, index: int, images: Tensor) -> Pair:
        step = self._protocol.program.steps[index]
        if step.op == "input":
            return torch.zeros_like(images), images
        if step.op == "mask":
            return self._passed(index)
        if step.op == "constant":
            value = self._protocol.program.public[step.public["value"]].reshape(step.shape)
            return value.expand(self._protocol.shape(index)), torch.zeros(
                self._protocol.shape(index), dtype=torch.int64
            )
        first, second = (self._one_share(index, step, party) for party in (0, 1))
        return first, second

    def _one_share(self, index: int, step: Step, party: int) -> Tensor:
        inputs = [self._shares[source][party] for source in step.inputs]
        if step.op in LINEAR:
            product = apply_linear(step, inputs[0], self._weight(step, weight_role(step)))
            if party == 0 and bias_role(step) in step.params:
                product = product + self._weight(step, bias_role(step))
            return self._truncated(index, product, product)[party]
        match step.op:
            case "add":
                return inputs[0] + inputs[1]
            case "sub":
                return inputs[0] - inputs[1]
            case "avg_pool2d":
                factor, bits = division(step)
                return truncate(sum_windows(step, inputs[0]) * factor, bits, party)
            case "gather":
                return inputs[0].flatten(1)[:, self._index(index)].reshape(self._protocol.shape(index))
            case "narrow":
                return inputs[0].narrow(1, step.options["start"], step.options["length"])
            case "concat":
                return torch.cat(inputs, 1)
        return inputs[0].reshape(self._protocol.shape(index))

    def _reveal(self, action: Reveal) -> Tensor:
        first, second = self._shares[action.step]
        value = first + second
        if action.noise is not None:
            for material in self._material:
                value = value + material.kept[action.noise.number]
        return value >> action.bits
