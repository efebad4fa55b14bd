"""One inference at one party: prepared before the input, run with it (docs/engine.md)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepshare.packed_gates import PackedGates, pack_gates
from deepshare.secure.engine import carry
from deepshare.secure.engine.comparison import dcf_carry, tree_carry
from deepshare.secure.engine.gated import GatedConstants, with_public, with_secret, with_unit
from deepshare.secure.engine.link import Link
from deepshare.secure.engine.material import Material
from deepshare.secure.engine.protocol import (
    CLIENT,
    SERVER,
    Action,
    Compare,
    Gated,
    Give,
    Linear,
    Local,
    Open,
    Operand,
    Reveal,
)
from deepshare.secure.engine.ring import LINEAR, apply_linear, bias_role, division, sum_windows, truncate
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Step

if TYPE_CHECKING:
    from deepshare.secure.engine.party import Party


@dataclass
class Spent:
    """What an action cost this party: rounds, payload bytes, seconds in all and of them waiting for the other."""

    rounds: int = 0
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class Inference:
    """One inference at one party, prepared; `run` once.

    Attributes:
        spent: per action of the protocol, what it cost online.
        prepared: what the preparation cost.
        values: after `run`, this party's share of every step's value.
    """

    party: "Party"
    material: Material
    link: Link
    on_action: Callable[[Action], None] | None = None
    spent: list[Spent] = field(default_factory=list)
    prepared: Spent = field(default_factory=Spent)
    values: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.protocol, self.rank = self.party.protocol, self.party.rank
        self._steps = self.protocol.program.steps
        self._last = len(self._steps) - 1
        self._masks: dict[Operand, Tensor] = {}  # this party's a_i
        self._others: dict[Operand, Tensor] = {}  # at the server: the client's halves that came early
        self._opened: dict[Operand, Tensor] = {}  # e; at the server of a Give x_1 - a_1
        self._products: dict[int, Tensor] = {}  # at the server, of linear steps: c_0 + bias
        self._flips: dict[int, Tensor] = {}  # r_i, by the number of the comparison's wire
        self._gates: dict[int, PackedGates] = {}  # z, likewise
        self._constants: dict[int, GatedConstants] = {}
        self._metered(self._prepare_all, self.prepared)

    # --- before the input

    def _prepare_all(self) -> None:
        for action in self.protocol.actions:
            self._prepare(action)
        self.material.close()

    def _prepare(self, action: Action) -> None:
        match action:
            case Open() | Give():
                self._prepare_opening(action)
            case Compare():
                self._flips[action.flip.number] = self._device(self.material.words(action.flip))
            case Linear():
                self._prepare_linear(action)
            case Gated():
                self._constants[action.step] = self._gated_constants(action)
            case Local() if self.rank == CLIENT and action.step in self.protocol.early_values:
                self.values[action.step] = self._local(action.step)

    def _prepare_opening(self, action: Open | Give) -> None:
        if isinstance(action, Open) or self.rank == CLIENT:
            self._masks[action.operand] = self._device(self.material.words(action.mask))
        if action.early and self.rank == CLIENT:
            self._send(self._operand(action.operand) - self._masks[action.operand])
        elif action.early:
            self._others[action.operand] = self._receive_words(action.mask.shape)

    def _prepare_linear(self, action: Linear) -> None:
        step = self._steps[action.step]
        product = self._device(self.material.words(action.product))
        if self.rank == CLIENT:
            mask = self._masks[action.source.operand]
            share = apply_linear(step, mask, self.party.operator(step)) + product
            self.values[action.step] = self._end_linear(action.step, share)
        else:
            self._products[action.step] = self._with_bias(step, product)

    def _with_bias(self, step: Step, share: Tensor) -> Tensor:
        """The server adds the bias, which has a product's fractional bits."""
        role = bias_role(step)
        return share + self.party.param(step, role) if role in step.params and self.rank == SERVER else share

    def _end_linear(self, index: int, share: Tensor) -> Tensor:
        """The last layer keeps its bits: Reveal rounds them under noise."""
        return share if index == self._last else truncate(share, SCALE_BITS, self.rank)

    def _gated_constants(self, action: Gated) -> GatedConstants:
        step, mask = self._steps[action.step], self._masks[action.opened.operand]
        flip = self._flips[action.compare.flip.number]
        products = [self._device(self.material.words(wire)) for wire in action.products]
        if step.op != "shared":
            return with_unit(mask, flip, products[0], self.rank)
        if not self.protocol.settings.secret_affine:
            alpha, beta = self.party.param(step, "alpha"), self.party.param(step, "beta")
            return with_public(alpha, beta, mask, flip, products[0], self.rank)
        own = (self.party.own_affine(step, "alpha"), self.party.own_affine(step, "beta"))
        masked = (self.party.masked(step, "alpha"), self.party.masked(step, "beta"))
        gathered = flip.index_select(1, self.party.channel_map(action.step).pi.to(torch.int64))
        return with_secret(own, masked, mask, gathered, products)

    # --- with the input

    def run(self, images: Tensor | None = None) -> Tensor | None:
        """The logits with 16 fractional bits, int64 [N, ...], at the client; None at the server.

        Args:
            images: int64 [N, C, H, W] with 16 fractional bits, at the client alone.

        Raises:
            SecureError: images of another shape or at the wrong party; a second run of one inference.
        """
        self._check_images(images)
        if self.spent:
            raise SecureError("secure: an inference is run once; prepare another with a fresh ticket")
        result: list[Tensor | None] = []
        for action in self.protocol.actions:
            if self.on_action is not None:
                self.on_action(action)
            self.spent.append(Spent())
            self._metered(lambda action=action: result.append(self._act(action, images)), self.spent[-1])  # type: ignore[misc]
        return result[-1]

    def _check_images(self, images: Tensor | None) -> None:
        wanted = self.protocol.shape(0)
        if self.rank == SERVER and images is not None:
            raise SecureError("secure: the images are the client's; the server runs without")
        if self.rank == CLIENT and (images is None or images.dtype != torch.int64 or tuple(images.shape) != wanted):
            got = "None" if images is None else f"{images.dtype} {list(images.shape)}"
            raise SecureError(f"secure: images must be int64 {list(wanted)} (got {got})")

    def _metered(self, work: Callable[[], object], spent: Spent) -> None:
        self._meter = spent
        sent, received, start = self.link.sent, self.link.received, time.perf_counter()
        work()
        spent.seconds = time.perf_counter() - start
        spent.sent, spent.received = self.link.sent - sent, self.link.received - received

    def _act(self, action: Action, images: Tensor | None) -> Tensor | None:
        match action:
            case Open():
                self._open(action)
            case Give():
                self._give(action)
            case Compare():
                self._gates[action.flip.number] = self._compare(action)
            case Linear() if self.rank == SERVER:
                self.values[action.step] = self._linear(action)
            case Gated():
                self.values[action.step] = self._gated(action)
            case Local() if action.step not in self.values:
                self.values[action.step] = self._local(action.step, images)
            case Reveal():
                return self._reveal(action)
        return None

    def _open(self, action: Open) -> None:
        """e = x - a. An early half is there already: the server knows e before it sends."""
        self._meter.rounds = 1
        half = self._operand(action.operand) - self._masks[action.operand]
        if not (action.early and self.rank == CLIENT):
            self._send(half)
        other = self._others.pop(action.operand, None)
        self._opened[action.operand] = half + (self._receive_words(action.mask.shape) if other is None else other)

    def _give(self, action: Give) -> None:
        if action.early:
            if self.rank == SERVER:
                self._opened[action.operand] = self._others.pop(action.operand)
            return
        self._meter.rounds = 1
        if self.rank == CLIENT:
            self._send(self._operand(action.operand) - self._masks[action.operand])
        else:
            self._opened[action.operand] = self._receive_words(action.mask.shape)

    def _linear(self, action: Linear) -> Tensor:
        """T(op(x - a_1, W) + bias + c_0) at the server; the client's share was made in the preparation."""
        step, operand = self._steps[action.step], action.source.operand
        own = self._masks[operand] if isinstance(action.source, Open) else self._operand(operand)
        product = apply_linear(step, self._opened[operand] + own, self.party.operator(step))
        return self._end_linear(action.step, product + self._products.pop(action.step))

    def _compare(self, action: Compare) -> PackedGates:
        """z = msb(e) ^ carry ^ noise, opened; packed in the order of the operand's channels."""
        opened = self._opened[action.operand][:, : action.prototypes].contiguous().cpu()
        flat, bits = opened.reshape(-1), self.protocol.settings.gate_bits
        own = self._carry(action, flat, bits) ^ self.material.bytes(action.noise)
        if self.rank == SERVER:
            own = own ^ carry.pack((flat >> (bits - 1) & 1).to(torch.uint8))
        gates = _packed_gates(own ^ self._exchange_bytes(own), opened)
        return gates._replace(bits=self._device(gates.bits))

    def _carry(self, action: Compare, opened: Tensor, bits: int) -> Tensor:
        material = [self.material.bytes(wire) for wire in action.material]
        if self.protocol.settings.gate == "tree":
            return tree_carry(opened, material, self._exchange_bytes, party=self.rank, bits=bits)
        return dcf_carry(opened, material, public_key=self.material.public_key, party=self.rank, bits=bits)

    def _gated(self, action: Gated) -> Tensor:
        """x * (alpha gate + beta), or for a mask step the ReLU of the kept elements, put back."""
        opened, gates = self._opened[action.opened.operand], self._gates[action.compare.flip.number]
        constants = self._constants.pop(action.step)
        product = constants.product(opened, gates, self.party.channel_map(action.step), self.rank)
        if action.opened.operand.kept is None:
            return product
        result = self._passed(action.step).flatten(1)
        result[:, self._index(action.step)] = product.flatten(1)
        return result.reshape(self.protocol.shape(action.step))

    def _passed(self, index: int) -> Tensor:
        """What a mask step leaves of the elements it does not keep: themselves, or 0."""
        x, step = self.values[self._steps[index].inputs[0]], self._steps[index]
        return torch.zeros_like(x) if step.options["zero_out"] else x.clone()

    def _local(self, index: int, images: Tensor | None = None) -> Tensor:
        step = self._steps[index]
        if step.op == "input":
            shape = self.protocol.shape(index)
            return self._device(torch.zeros(shape, dtype=torch.int64) if images is None else images)
        if step.op == "constant":
            return self._constant(index)
        x = self.values[step.inputs[0]]
        if step.op in LINEAR:
            product = apply_linear(step, x, self.party.operator(step))
            return self._end_linear(index, self._with_bias(step, product))
        match step.op:
            case "add":
                return x + self.values[step.inputs[1]]
            case "sub":
                return x - self.values[step.inputs[1]]
            case "mask":
                return self._passed(index)
            case "avg_pool2d":
                factor, bits = division(step)
                return truncate(sum_windows(step, x) * factor, bits, self.rank)
            case "reshape" | "flatten":
                return x.reshape(self.protocol.shape(index))
            case "gather":
                return x.flatten(1).index_select(1, self._index(index)).reshape(self.protocol.shape(index))
            case "narrow":
                return x.narrow(1, step.options["start"], step.options["length"])
            case "concat":
                return torch.cat([self.values[source] for source in step.inputs], 1)
            case "relu" | "shared" | "select":
                return x  # without elements
        raise AssertionError(f"unknown step {step.op}")

    def _constant(self, index: int) -> Tensor:
        """A public value: the server's share is the whole."""
        step = self._steps[index]
        value = self.protocol.program.public[step.public["value"]].reshape(step.shape)
        whole = self._device(value).expand(self.protocol.shape(index))
        return whole if self.rank == SERVER else torch.zeros_like(whole)

    def _reveal(self, action: Reveal) -> Tensor | None:
        """v + noise to the client, noise in [0, 2^bits): the logits, rounded up with their fraction's probability."""
        self._meter.rounds = 1
        share = self.values[action.step]
        if action.noise is not None:
            share = share + self._device(self.material.kept[action.noise.number])
        if self.rank == SERVER:
            self._send(share)
            return None
        return ((share + self._receive_words(tuple(share.shape))) >> action.bits).cpu()

    # --- small things

    def _operand(self, operand: Operand) -> Tensor:
        """This party's share of an operand."""
        share = self.values[operand.value]
        if operand.kept is None:
            return share
        return share.flatten(1).index_select(1, self._index(operand.kept)).unsqueeze(1)

    def _index(self, index: int) -> Tensor:
        return self.protocol.program.public[self._steps[index].public["index"]].to(self.party.device)

    def _device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.party.device)

    def _send(self, tensor: Tensor) -> None:
        self.link.send(tensor.contiguous().cpu().numpy().data.cast("B"))

    def _receive_bytes(self, count: int) -> Tensor:
        start = time.perf_counter()
        data = self.link.recv(count)
        self._meter.waited += time.perf_counter() - start
        return torch.frombuffer(data, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)

    def _receive_words(self, shape: tuple[int, ...]) -> Tensor:
        count = 8
        for size in shape:
            count *= size
        return self._device(self._receive_bytes(count).view(torch.int64).reshape(shape))

    def _exchange_bytes(self, own: Tensor) -> Tensor:
        self._meter.rounds += 1
        self._send(own)
        return self._receive_bytes(own.numel())


def _packed_gates(bits: Tensor, like: Tensor) -> PackedGates:
    """Bits in the order of `like` [N, P, *S], packed without regard to its runs, as PackedGates.

    Where a channel has whole bytes the two are the same bytes.
    """
    inner = like[0, 0].numel()
    if inner % 8:
        return pack_gates(carry.unpack(bits, like.numel()).reshape(like.shape).to(torch.bool))
    runs = bits.reshape(like.shape[0], like.shape[1], inner // 8)
    return PackedGates(runs, like.shape[1], tuple(like.shape), like.stride())
