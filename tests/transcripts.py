"""What two parties of the engine say to each other, taken apart by docs/engine.md, for the transcript tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from engine_cases import Ran, Setup, infer, setup
from secure_cases import shared
from torch import Tensor, nn

from deepshare.nn import MaskedReLU2d
from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine import carry
from deepshare.secure.engine.party import Client, Server
from deepshare.secure.engine.protocol import (
    Compare,
    Gated,
    Give,
    Linear,
    Open,
    Operand,
    Protocol,
    Reveal,
    Settings,
    Wire,
)
from deepshare.secure.engine.streams import Stream
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.label import with_label

SERVER, CLIENT = 0, 1
IMAGES, INFERENCES = 6, 3
PARTIES = {SERVER: "server", CLIENT: "client"}


class EveryMessage(nn.Module):
    """A small network that says everything: ReLU, leader, follower, mask; openings, one-way halves, early ones.

    One value has two linear readers, another is opened and read by a linear layer: one mask serves both.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.first, self.second, self.third, self.fourth = (
            nn.Conv2d(channels, 4, 3, padding=1) for channels in (1, 4, 4, 4)
        )
        self.beside, self.of_opened = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.leader, self.follower = shared(4, 2, generator), shared(4, 2, generator)
        self.masked = MaskedReLU2d(torch.rand(4, 8, 8, generator=generator) > 0.3)
        self.last = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.first(x))
        opened = self.second(active)
        inner = self.follower(self.leader(opened) + opened, source=opened)
        inner = inner + self.beside(active) + self.of_opened(opened)
        inner = self.masked(self.fourth(self.third(inner)))
        return self.last(F.avg_pool2d(inner, 2).flatten(1))


@dataclass(frozen=True)
class Message:
    """One message, as words (halves, logits) or bytes; `known` is the same less what its receiver knows of it.

    kind: "half", "early half", "one-way half", "early one-way half", "and", "z" or "logits".
    """

    kind: str
    sender: int
    action: int
    data: Tensor
    known: Tensor

    @property
    def label(self) -> str:
        return f"{PARTIES[self.sender]}'s {self.kind}"


@dataclass(frozen=True)
class Recorded:
    """Inferences of one network and one deal on the same images, with their tickets."""

    model: nn.Module
    parties: Setup
    images: Tensor
    tickets: tuple[tuple[Ticket, Ticket], ...]
    rans: tuple[Ran, ...]

    @property
    def protocol(self) -> Protocol:
        return self.parties.protocol

    @cached_property
    def messages(self) -> list[list[Message]]:
        """Of each inference."""
        return [list(_Reader(self, index).messages()) for index in range(len(self.rans))]

    def values(self, index: int) -> list[Tensor]:
        """Every step's value; the last one's as the client learns it."""
        server, client = self.rans[index].server.values, self.rans[index].client.values
        found = [server[step] + client[step] for step in range(len(self.protocol.program.steps))]
        return [*found[:-1], self.rans[index].logits]

    def share(self, index: int, party: int, operand: Operand) -> Tensor:
        """A party's share of an operand."""
        ran, program = self.rans[index], self.protocol.program
        share = (ran.server, ran.client)[party].values[operand.value]
        if operand.kept is None:
            return share
        kept = program.public[program.steps[operand.kept].public["index"]]
        return share.flatten(1)[:, kept].unsqueeze(1)

    def compared(self, index: int, action: Compare) -> Tensor:
        """x of a comparison, flat."""
        x = self.share(index, SERVER, action.operand) + self.share(index, CLIENT, action.operand)
        return x[:, : action.prototypes].reshape(-1)

    def top_bits(self, index: int, action: Compare) -> Tensor:
        """The top bits of e = x - a, packed, from the values and what the parties draw."""
        opens = (each for each in self.protocol.actions if isinstance(each, Open))
        wire = next(each.mask for each in opens if each.operand == action.operand)
        mask = self.drawn(index, SERVER, wire) + self.drawn(index, CLIENT, wire)
        e = self.compared(index, action) - mask[:, : action.prototypes].reshape(-1)
        return carry.pack((e >> (self.protocol.settings.gate_bits - 1) & 1).to(torch.uint8))

    def drawn(self, index: int, party: int, wire: Wire) -> Tensor:
        """What a party draws on a wire: words or bytes, of the wire's shape."""
        stream = Stream(self.tickets[index][party].key)
        if wire.kind in ("mask", "own", "product"):
            return stream.words(wire.number, wire.shape)
        return stream.bytes(wire.number, wire.bytes).reshape(wire.shape)

    def dealt(self, index: int, party: int, wire: Wire) -> Tensor:
        """What a party is dealt on a wire."""
        found = self.tickets[index][party].body[self.protocol.slices(party)[wire.number]]
        return (found.view(torch.int64) if wire.kind == "product" else found).reshape(wire.shape)


def record(
    settings: Settings, *, inferences: int = INFERENCES, model: nn.Module | None = None, label: bool = False
) -> Recorded:
    """A fresh deal and so many inferences of the same images; with `label` the tournament of label.py at the end."""
    images = torch.randn(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = (model or EveryMessage()).eval()
    parties = setup(model, images, settings)
    parties = _with_label(parties) if label else parties
    tickets = tuple(parties.deal.tickets(number) for number in range(inferences))
    return Recorded(model, parties, images, tickets, tuple(infer(parties, pair, images) for pair in tickets))


def _with_label(parties: Setup) -> Setup:
    protocol = Protocol.compile(with_label(parties.protocol.program), parties.protocol.settings)
    deal = Deal(protocol)
    server = Server(protocol, parties.tensors, deal.server_key)
    return Setup(protocol, parties.tensors, deal, server, Client(protocol, server.masked_weights()))


class _Reader:
    """Reads the two sequences of messages of one inference in the order that docs/engine.md gives them."""

    def __init__(self, recorded: Recorded, index: int) -> None:
        self._recorded, self._index, self._ran = recorded, index, recorded.rans[index]
        self._left = [list(link.messages) for link in self._ran.links]

    def messages(self) -> Iterator[Message]:
        early: dict[int, Message] = {}
        for number, action in enumerate(self._recorded.protocol.actions):
            if isinstance(action, Open | Give) and action.early:
                early[number] = self._half(CLIENT, number, action)
        for number, action in enumerate(self._recorded.protocol.actions):
            match action:
                case Open() | Give():
                    yield early.get(number) or self._half(CLIENT, number, action)
                    if isinstance(action, Open):
                        yield self._half(SERVER, number, action)
                case Compare():
                    yield from self._ands(number, action)
                    yield from self._gates(number, action)
                case Reveal():
                    yield self._logits(number, action)
        assert self._left == [[], []], "a party said more than the protocol says"

    def _next(self, sender: int, shape: tuple[int, ...], words: bool) -> Tensor:
        message = torch.frombuffer(bytearray(self._left[sender].pop(0)), dtype=torch.uint8)
        return (message.view(torch.int64) if words else message).reshape(shape)

    def _half(self, sender: int, number: int, action: Open | Give) -> Message:
        data = self._next(sender, action.mask.shape, True)
        early = "early " if action.early and sender == CLIENT else ""
        kind = "half" if isinstance(action, Open) else "one-way half"
        return Message(
            early + kind, sender, number, data, data + self._recorded.share(self._index, 1 - sender, action.operand)
        )

    def _ands(self, number: int, action: Compare) -> Iterator[Message]:
        """Per level of the tree. A receiver takes off its own shares: its own message less its masks."""
        if self._recorded.protocol.settings.gate != "tree":
            return
        for wire in action.material[1::2]:
            said = [self._next(sender, wire.shape, False) for sender in (SERVER, CLIENT)]
            for sender in (SERVER, CLIENT):
                own = said[1 - sender] ^ self._recorded.drawn(self._index, 1 - sender, wire)
                yield Message("and", sender, number, said[sender], said[sender] ^ own)

    def _gates(self, number: int, action: Compare) -> Iterator[Message]:
        """A receiver takes the top bit of e and its own random bits off the opened z."""
        said = [self._next(sender, action.noise.shape, False) for sender in (SERVER, CLIENT)]
        top = self._recorded.top_bits(self._index, action)
        for sender in (SERVER, CLIENT):
            own = self._recorded.drawn(self._index, 1 - sender, action.noise)
            yield Message("z", sender, number, said[sender], said[0] ^ said[1] ^ top ^ own)

    def _logits(self, number: int, action: Reveal) -> Message:
        """The receiver takes off its own share; the value itself is taken off too, which leaves the noise."""
        server = self._ran.server.values[action.step]
        data = self._next(SERVER, tuple(server.shape), True)
        if action.noise is None:
            return Message("logits", SERVER, number, data, data - server)
        own = self._recorded.drawn(self._index, CLIENT, action.noise)
        return Message("logits", SERVER, number, data, data + own - server)


def roles(protocol: Protocol) -> dict[int, str]:
    """What each wire is for, by its number, in the names of docs/engine.md."""
    found: dict[int, str] = {}
    for action in protocol.actions:
        match action:
            case Open() | Give():
                found[action.mask.number] = "a" if isinstance(action, Open) else "a_1 alone"
            case Linear():
                found[action.product.number] = "c"
            case Compare():
                found |= {action.noise.number: "random bits", action.flip.number: "[r]"}
                names = ("roots", "keys") if protocol.settings.gate == "dcf" else ("thermometer", *_LEVELS)
                found |= {wire.number: name for wire, name in zip(action.material, names, strict=False)}
            case Gated():
                found |= {wire.number: name for wire, name in zip(action.products, _PRODUCTS, strict=False)}
            case Reveal():
                found |= {} if action.noise is None else {action.noise.number: "rho"}
    assert sorted(found) == [wire.number for wire in protocol.wires]
    return found


_LEVELS = ("AND masks", "AND products") * 4
_PRODUCTS = ("[ar]", "[Ar]", "[aB + aAr]", "[aA - 2aAr]")
