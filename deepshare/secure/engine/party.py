"""The two parties of the engine: what each computes and sends (docs/engine.md)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepshare.channel_map import ChannelMap
from deepshare.packed_gates import PackedGates, pack_gates
from deepshare.ring import PackedWeight
from deepshare.secure.engine import carry, dcf
from deepshare.secure.engine.link import Link
from deepshare.secure.engine.material import Material
from deepshare.secure.engine.protocol import (
    Action,
    Compare,
    Gated,
    Give,
    Linear,
    Local,
    Open,
    Operand,
    Protocol,
    Reveal,
)
from deepshare.secure.engine.ring import (
    LINEAR,
    apply_linear,
    bias_role,
    division,
    packed,
    sum_windows,
    truncate,
    weight_role,
)
from deepshare.secure.engine.streams import Stream
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Step
from deepshare.share import shared_relu_share

SERVER, CLIENT = 0, 1


@dataclass
class Spent:
    """What an action cost this party: rounds, payload bytes, seconds in all and of them waiting for the other."""

    rounds: int = 0
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Party:
    """One party with what it knows of the weights; serves any number of inferences, one ticket each.

    Attributes:
        rank: 0, the server, or 1, the client.
        protocol: the other party's, and the dealer's, must be equal to it.
    """

    rank: int

    def __init__(self, protocol: Protocol, known: dict[str, Tensor], masked: dict[str, Tensor], device: str) -> None:
        self.protocol = protocol
        self.device = torch.device(device)
        self._known = _on(self.device, _named("public weights", known, protocol.known_params()))
        self._masked = _on(self.device, _named("masked weights", masked, list(protocol.masked_params())))
        self._operators: dict[str, PackedWeight | Tensor] = {}
        self._maps = {
            index: _channel_map(protocol, step).to(self.device)
            for index, step in enumerate(protocol.program.steps)
            if step.op in ("relu", "shared", "mask")
        }

    def prepare(self, ticket: Ticket, link: Link) -> "Inference":
        """Does everything that does not depend on the input; the ticket is used up.

        Raises:
            SecureError: the ticket was made for another protocol or party, or its body has another length.
        """
        return Inference(self, Material(ticket, self.protocol, self.rank), link)

    def param(self, step: Step, role: str) -> Tensor:
        """A weight this party knows in the clear."""
        return self._known[step.params[role]]

    def operator(self, step: Step) -> PackedWeight | Tensor:
        """A linear step's weight as this party uses it: W where it knows it, else F; packed at the first use."""
        key = step.params[weight_role(step)]
        if key not in self._operators:
            known = self.rank == SERVER or key in self._known
            weight = self.param(step, weight_role(step)) if known else self.masked(step, weight_role(step))
            self._operators[key] = packed(step, weight)
        return self._operators[key]

    def masked(self, step: Step, role: str) -> Tensor:
        """F = W - B of a weight that is the server's secret."""
        return self._masked[step.params[role]]

    def own_affine(self, step: Step, role: str) -> Tensor:
        """This party's share of alpha or beta, [C]: the server's is the whole, the client's 0."""
        raise NotImplementedError


class Server(Party):
    """Party 0: has the model.

    Args:
        tensors: every weight of the program, integers.
        mask_key: of the stream of the weight masks, from the dealer, one a model version; None: no weight is secret.
    """

    rank = SERVER

    def __init__(
        self, protocol: Protocol, tensors: dict[str, Tensor], mask_key: bytes | None, *, device: str = "cpu"
    ) -> None:
        masked = mask_weights(protocol, tensors, mask_key)
        super().__init__(protocol, {key: tensors[key] for key in protocol.known_params()}, masked, device)
        self._tensors = _on(self.device, tensors)

    def masked_weights(self) -> dict[str, Tensor]:
        """What the client is given, once a model version: secret weights under their masks, public ones as they are."""
        return {key: value.cpu() for key, value in (self._known | self._masked).items()}

    def param(self, step: Step, role: str) -> Tensor:
        return self._tensors[step.params[role]]

    def own_affine(self, step: Step, role: str) -> Tensor:
        return self.param(step, role).reshape(-1)


class Client(Party):
    """Party 1: has the images, learns the logits. `given` is what `Server.masked_weights` returned."""

    rank = CLIENT

    def __init__(self, protocol: Protocol, given: dict[str, Tensor], *, device: str = "cpu") -> None:
        known, masked = protocol.known_params(), protocol.masked_params()
        public = {key: given[key] for key in known if key in given}
        super().__init__(protocol, public, {key: given[key] for key in masked if key in given}, device)

    def own_affine(self, step: Step, role: str) -> Tensor:
        channels = self.protocol.program.params[step.params[role]].shape[0]
        return torch.zeros(channels, dtype=torch.int64, device=self.device)


def mask_weights(protocol: Protocol, tensors: dict[str, Tensor], mask_key: bytes | None) -> dict[str, Tensor]:
    """F = W - B of every weight that stays the server's, B from the stream of `mask_key`.

    Raises:
        SecureError: there are secret weights and no key.
    """
    secret = protocol.masked_params()
    if secret and mask_key is None:
        raise SecureError("secure: secret weights need the dealer's key of their masks (got None)")
    if not secret:
        return {}
    stream = Stream(mask_key or b"")
    return {key: tensors[key] - stream.words(number, tuple(tensors[key].shape)) for key, number in secret.items()}


@dataclass(frozen=True)
class _Constants:
    """What of a gated product does not depend on the input (docs/share.md)."""

    alpha: Tensor
    beta: Tensor
    flip: Tensor
    offset: Tensor
    toggle: Tensor
    scale: Tensor | None
    shift: int


@dataclass
class Inference:
    """One inference at one party, prepared; `run` once.

    Attributes:
        spent: per action of the protocol, what it cost online.
        prepared: what the preparation cost.
        values: after `run`, this party's share of every step's value.
    """

    party: Party
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
        self._constants: dict[int, _Constants] = {}
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

    def _gated_constants(self, action: Gated) -> _Constants:
        step, mask = self._steps[action.step], self._masks[action.opened.operand]
        flip = self._flips[action.compare.flip.number]
        products = [self._device(self.material.words(wire)) for wire in action.products]
        if step.op != "shared":
            return self._unit_constants(mask, flip, products[0])
        own = [self.party.own_affine(step, role) for role in ("alpha", "beta")]
        if self.protocol.settings.secret_affine:
            return self._secret_constants(action, own, mask, flip, products)
        alpha, beta = self.party.param(step, "alpha"), self.party.param(step, "beta")
        scaled = alpha * products[0]
        zeros = torch.zeros_like(own[0])
        alpha_i, beta_i = own if self.rank == SERVER else (zeros, zeros)
        offset, toggle = beta * mask + scaled, alpha * mask - 2 * scaled
        return _Constants(alpha_i, beta_i, flip, offset, toggle, alpha.reshape(-1), SCALE_BITS)

    def _unit_constants(self, mask: Tensor, flip: Tensor, product: Tensor) -> _Constants:
        """ReLU: alpha = 1 and beta = 0 as integers, no truncation."""
        ones = torch.ones(mask.shape[1], dtype=torch.int64, device=mask.device)
        alpha = ones if self.rank == SERVER else torch.zeros_like(ones)
        return _Constants(alpha, torch.zeros_like(ones), flip, product, mask - 2 * product, ones, 0)

    def _secret_constants(
        self, action: Gated, own: list[Tensor], mask: Tensor, flip: Tensor, products: list[Tensor]
    ) -> _Constants:
        step = self._steps[action.step]
        alpha, beta = self.party.masked(step, "alpha"), self.party.masked(step, "beta")
        ar, masked_flip, offset, toggle = products
        gathered = flip.index_select(1, self.party._maps[action.step].pi.to(torch.int64))
        scaled = alpha * ar
        flips = alpha * gathered + masked_flip
        return _Constants(
            own[0], own[1], flips, beta * mask + scaled + offset, alpha * mask - 2 * scaled + toggle, None, SCALE_BITS
        )

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
        gates = carry.unpack(own ^ self._exchange_bytes(own), action.gates)
        return pack_gates(gates.reshape(opened.shape).to(self.party.device, torch.bool))

    def _carry(self, action: Compare, opened: Tensor, bits: int) -> Tensor:
        """Xor share of the carry into the top bit of e + a, packed."""
        if self.protocol.settings.gate == "tree":
            return self._tree(action, opened, bits)
        roots, keys = (self.material.bytes(wire) for wire in action.material)
        return dcf.evaluate(keys, roots, ~opened, public_key=self.material.public_key, party=self.rank, bits=bits - 1)

    def _tree(self, action: Compare, opened: Tensor, bits: int) -> Tensor:
        """(g, p)_hi o (g, p)_lo = (g_hi ^ p_hi g_lo, p_hi p_lo), level by level; node 0's p is never used."""
        words, *levels = (self.material.bytes(wire) for wire in action.material)
        g, p = carry.leaves(words.view(torch.int16).squeeze(-1), opened, bits=bits)
        while len(g) > 1:
            masks, dealt, levels = levels[0], levels[1], levels[2:]
            p_high, g_low, p_low = p[1::2], g[0::2], p[2::2]
            own = torch.cat([p_high, g_low, p_low]) ^ masks
            both = own ^ self._exchange_bytes(own).reshape(own.shape)
            with_g, with_p = self._ands(both, masks, dealt, len(p_high))
            g = g[1::2] ^ with_g
            p = torch.cat([torch.zeros_like(g[:1]), with_p])
        return g[0]

    def _ands(self, opened: Tensor, masks: Tensor, dealt: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """Xor shares of p_hi g_lo for every node, of p_hi p_lo for all but the first."""
        d, of_g, of_p = opened.split([nodes, nodes, nodes - 1])
        m, mask_g, mask_p = masks.split([nodes, nodes, nodes - 1])
        with_g, with_p = dealt.split([nodes, nodes - 1])
        with_g = with_g ^ (d & mask_g) ^ (m & of_g)
        with_p = with_p ^ (d[1:] & mask_p) ^ (m[1:] & of_p)
        return (with_g ^ (d & of_g), with_p ^ (d[1:] & of_p)) if self.rank == SERVER else (with_g, with_p)

    def _gated(self, action: Gated) -> Tensor:
        """x * (alpha gate + beta), or for a mask step the ReLU of the kept elements, put back."""
        known = self._constants.pop(action.step)
        product = shared_relu_share(
            self._opened[action.opened.operand],
            self._gates[action.compare.flip.number],
            self.party._maps[action.step],
            known.alpha,
            known.beta,
            known.flip,
            known.offset,
            known.toggle,
            party=self.rank,
            shift=known.shift,
            scale=known.scale,
        )
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
            case "relu" | "shared":
                return x  # without elements
        raise AssertionError(f"unknown step {step.op}")

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


def _named(what: str, tensors: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise SecureError(f"secure: {what} must hold {', '.join(missing)} (got {len(tensors)} tensors without them)")
    return tensors


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in tensors.items()}


def _channel_map(protocol: Protocol, step: Step) -> ChannelMap:
    """pi of a shared step; of a ReLU the identity, of a mask's kept elements one channel."""
    if step.op == "shared" and step.gates is not None:
        return ChannelMap(protocol.program.public[step.public["pi"]], step.gates[1])
    channels = step.shape[0] if step.op == "relu" else 1
    return ChannelMap.balanced(channels, channels)
