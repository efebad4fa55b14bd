"""Makes tickets: pairs of correlated material, from two independent keys (docs/engine.md).

Party 1's share of everything is drawn from its stream, party 0 is dealt the difference; so a dealt value is uniform to
party 0 by the stream of party 1, and party 1 is dealt nothing but comparison keys.
"""

import secrets
from math import prod

import torch
from torch import Tensor

from deepshare.ring import PackedWeight
from deepshare.secure.dealer import dcf_keys
from deepshare.secure.dealer.thermometer import thermometer
from deepshare.secure.engine import carry
from deepshare.secure.engine.protocol import Compare, Gated, Give, Linear, Open, Operand, Protocol, Wire
from deepshare.secure.engine.ring import LINEAR, apply_linear, packed, weight_role
from deepshare.secure.engine.streams import KEY_BYTES, Stream
from deepshare.secure.engine.ticket import Ticket


class Deal:
    """One protocol and model version: the server's weight masks, and tickets for any number of inferences.

    Attributes:
        version: names the masks (hex); another model, or the same one changed, needs another deal.
        server_key: of the stream of the weight masks; for the server.
    """

    def __init__(self, protocol: Protocol, version: str | None = None, server_key: bytes | None = None) -> None:
        self.protocol = protocol
        self.version = version or secrets.token_hex(16)
        self.server_key = server_key or secrets.token_bytes(KEY_BYTES)
        stream, params = Stream(self.server_key), protocol.program.params
        self._masks = {key: stream.words(number, params[key].shape) for key, number in protocol.masked_params().items()}
        self._operators = {
            step.params[weight_role(step)]: packed(step, self._masks[step.params[weight_role(step)]])
            for step in protocol.program.steps
            if step.op in LINEAR and protocol.settings.secret_weights
        }

    def tickets(self, number: int) -> tuple[Ticket, Ticket]:
        """The server's and the client's ticket of inference `number`; no number may be dealt twice."""
        keys = (secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES))
        public_key = secrets.token_bytes(KEY_BYTES)
        bodies = Dealing(self.protocol, self._masks, self._operators, keys, public_key).bodies()
        first, second = (
            Ticket(self.version, number, self.protocol.digest, party, keys[party], public_key, bodies[party])
            for party in (0, 1)
        )
        return first, second


class Dealing:
    """The material of one inference, from both parties' keys.

    Args:
        masks: B of every secret weight.
        operators: those of the linear steps, packed.
        keys: of the two parties' streams.
        public_key: of the comparison functions' fixed-key AES.
    """

    def __init__(
        self,
        protocol: Protocol,
        masks: dict[str, Tensor],
        operators: dict[str, PackedWeight | Tensor],
        keys: tuple[bytes, bytes],
        public_key: bytes,
    ) -> None:
        self._protocol, self._weights, self._operators, self._public_key = protocol, masks, operators, public_key
        self._streams = (Stream(keys[0]), Stream(keys[1]))
        self._dealt: dict[int, Tensor] = {}  # by wire: uint8 [bytes]
        self._masks: dict[Operand, Tensor] = {}  # a
        self._client_masks: dict[Operand, Tensor] = {}  # a_1
        self._flips: dict[int, Tensor] = {}  # r, by the number of the comparison's wire

    def bodies(self) -> tuple[Tensor, Tensor]:
        """Both ticket bodies, uint8."""
        for action in self._protocol.actions:
            match action:
                case Open() | Give():
                    self._mask(action)
                case Linear():
                    self._linear(action)
                case Compare():
                    self._compare(action)
                case Gated():
                    self._gated(action)
        self._reveal()
        first, second = (self._body(party) for party in (0, 1))
        return first, second

    def _body(self, party: int) -> Tensor:
        body = torch.zeros(self._protocol.body_bytes(party), dtype=torch.uint8)
        for number, where in self._protocol.slices(party).items():
            body[where] = self._dealt[number]
        return body

    def _share(self, wire: Wire, value: Tensor) -> None:
        """Deals additive shares: value - stream_1 to party 0."""
        self._dealt[wire.number] = (
            (value - self._streams[1].words(wire.number, wire.shape)).reshape(-1).view(torch.uint8)
        )

    def _share_bits(self, wire: Wire, value: Tensor) -> None:
        """Deals xor shares of bytes: value ^ stream_1 to party 0."""
        self._dealt[wire.number] = value.reshape(-1) ^ self._streams[1].bytes(wire.number, wire.bytes)

    def _both_bits(self, wire: Wire) -> Tensor:
        drawn = (stream.bytes(wire.number, wire.bytes) for stream in self._streams)
        return (next(drawn) ^ next(drawn)).reshape(wire.shape)

    def _mask(self, action: Open | Give) -> None:
        wire, operand = action.mask, action.operand
        self._client_masks[operand] = self._streams[1].words(wire.number, wire.shape)
        if isinstance(action, Open):
            self._masks[operand] = self._client_masks[operand] + self._streams[0].words(wire.number, wire.shape)

    def _linear(self, action: Linear) -> None:
        """c = op(a_1, B)."""
        step = self._protocol.program.steps[action.step]
        weight = self._operators[step.params[weight_role(step)]]
        self._share(action.product, apply_linear(step, self._client_masks[action.source.operand], weight))

    def _compare(self, action: Compare) -> None:
        """r = c_0 ^ c_1 ^ msb(a) ^ 1, and the backend's material on a."""
        bits = self._protocol.settings.gate_bits
        masks = self._masks[action.operand][:, : action.prototypes].reshape(-1).contiguous()
        noise = carry.unpack(self._both_bits(action.noise), action.gates)
        flip = noise.to(torch.int64) ^ (masks >> (bits - 1) & 1) ^ 1
        self._flips[action.flip.number] = flip.reshape(action.flip.shape)
        self._share(action.flip, self._flips[action.flip.number])
        if self._protocol.settings.gate == "tree":
            self._tree(action, masks, bits)
        else:
            self._dcf(action, masks, bits)

    def _dcf(self, action: Compare, masks: Tensor, bits: int) -> None:
        roots, keys = action.material
        drawn = [stream.bytes(roots.number, roots.bytes).reshape(roots.shape) for stream in self._streams]
        made = dcf_keys.generate(masks, drawn[0], drawn[1], public_key=self._public_key, bits=bits - 1)
        self._dealt[keys.number] = made.reshape(-1)

    def _tree(self, action: Compare, masks: Tensor, bits: int) -> None:
        words, *levels = action.material
        self._share_bits(words, thermometer(masks, bits=bits).contiguous().view(torch.uint8))
        for inputs, products in zip(levels[0::2], levels[1::2], strict=True):
            nodes = (inputs.shape[0] + 1) // 3
            p_high, g_low, p_low = self._both_bits(inputs).split([nodes, nodes, nodes - 1])
            self._share_bits(products, torch.cat([p_high & g_low, p_high[1:] & p_low]))

    def _gated(self, action: Gated) -> None:
        """[ar]; with secret alpha and beta also [Ar], [aB + aAr], [aA - 2aAr]."""
        step = self._protocol.program.steps[action.step]
        mask, flip = self._masks[action.opened.operand], self._flips[action.compare.flip.number]
        if "pi" in step.public:
            flip = flip.index_select(1, self._protocol.program.public[step.public["pi"]])
        product = mask * flip
        self._share(action.products[0], product)
        if len(action.products) > 1:
            alpha, beta = (self._weights[step.params[role]] for role in ("alpha", "beta"))
            self._share(action.products[1], alpha * flip)
            self._share(action.products[2], mask * beta + alpha * product)
            self._share(action.products[3], mask * alpha - 2 * alpha * product)

    def _reveal(self) -> None:
        """Noise below 2^bits on the logits, from the operating system."""
        action = self._protocol.actions[-1]
        noise, bits = action.noise, action.bits  # type: ignore[union-attr]
        if noise is not None:
            drawn = torch.frombuffer(bytearray(secrets.token_bytes(8 * prod(noise.shape))), dtype=torch.int64)
            self._share(noise, (drawn & ((1 << bits) - 1)).reshape(noise.shape))
