"""Mistakes to plant in the engine and the dealer: each leaves every value right and gives something away.

A mistake is a context manager; deal, parties and inferences are made inside it. Most change what a party draws, at the
party and at the dealer alike, so that the material still fits together and only its secrecy is gone.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from cryptography.hazmat.primitives import ciphers
from torch import Tensor
from transcripts import SERVER, roles

from deepshare.secure.dealer import deal
from deepshare.secure.dealer.deal import Deal, Dealing
from deepshare.secure.engine import carry
from deepshare.secure.engine.protocol import Compare, Protocol, Wire
from deepshare.secure.engine.streams import Stream

Plant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Draw:
    """Who draws which wire; `of(party, wire)` gives what a party of the same inference truly draws."""

    party: int
    protocol: Protocol
    wire: Wire
    of: Callable[[int, int], Tensor]

    @property
    def role(self) -> str:
        return roles(self.protocol)[self.wire.number]

    def first_of_role(self, least: int) -> Tensor:
        """What was drawn on the role's first wire of so many bytes."""
        found = roles(self.protocol)
        wires = (wire for wire in self.protocol.wires if found[wire.number] == self.role)
        return self.of(self.party, next(wire.number for wire in wires if wire.bytes >= least))[:least]


@contextmanager
def drawing(change: Callable[[Draw, Tensor], Tensor]) -> Iterator[None]:
    """`change` is given what a stream of an inference gives, uint8, and returns what it gives instead."""
    known: dict[bytes, tuple[int, tuple[bytes, bytes], Protocol]] = {}
    start, draw = Dealing.__init__, Stream.bytes

    def planted_start(self, protocol, masks, operators, keys, public_key):
        known.update({key: (party, keys, protocol) for party, key in enumerate(keys)})
        start(self, protocol, masks, operators, keys, public_key)

    def planted_draw(stream, number, count):
        drawn = draw(stream, number, count)
        if stream._key not in known:  # the weights' masks
            return drawn
        party, keys, protocol = known[stream._key]

        def of(party: int, wire: int) -> Tensor:
            return draw(Stream(keys[party]), wire, protocol.wires[wire].bytes)

        return change(Draw(party, protocol, protocol.wires[number], of), drawn)

    with patch.object(Dealing, "__init__", planted_start), patch.object(Stream, "bytes", planted_draw):
        yield


# what a party draws


def nothing_drawn(role: str, party: int) -> Plant:
    """A party's mask, bits or share of a dealt value is zero: the other's message or correction is the value itself."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        return torch.zeros_like(drawn) if draw.role == role and draw.party == party else drawn

    return lambda: drawing(change)


def short_masks() -> AbstractContextManager[None]:
    """Masks of 48 bits: as good as none for the high bytes of what they mask."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        words = drawn.view(torch.int64) & (1 << 48) - 1 if draw.wire.kind in ("mask", "own") else drawn
        return words.view(torch.uint8)

    return drawing(change)


def old_wire(role: str) -> Plant:
    """Every wire of a role is drawn under the name of the role's first that is as long."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        return draw.first_of_role(drawn.numel()) if draw.role == role else drawn

    return lambda: drawing(change)


def one_mask_a_batch() -> AbstractContextManager[None]:
    """Every image of a batch is masked as the first one is."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        if draw.wire.kind not in ("mask", "own"):
            return drawn
        return drawn.reshape(draw.wire.shape[0], -1)[:1].expand(draw.wire.shape[0], -1).reshape(-1)

    return drawing(change)


def one_mask_for_gates() -> AbstractContextManager[None]:
    """The masks of the carry tree's ANDs are drawn for eight gates and serve all."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        if draw.role != "AND masks":
            return drawn
        return drawn.reshape(draw.wire.shape)[:, :1].expand(draw.wire.shape).reshape(-1)

    return drawing(change)


def one_mask_for_nodes() -> AbstractContextManager[None]:
    """All ANDs of a level are masked alike."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        if draw.role != "AND masks":
            return drawn
        return drawn.reshape(draw.wire.shape)[:1].expand(draw.wire.shape).reshape(-1)

    return drawing(change)


def same_root_for_gates() -> AbstractContextManager[None]:
    """One root for all comparison functions of a party."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        if draw.role != "roots":
            return drawn
        return drawn.reshape(draw.wire.shape)[:1].expand(draw.wire.shape).reshape(-1)

    return drawing(change)


def equal_roots() -> AbstractContextManager[None]:
    """Both parties' comparison functions start from the server's roots: every seed correction is zero."""

    def change(draw: Draw, drawn: Tensor) -> Tensor:
        return draw.of(SERVER, draw.wire.number) if draw.role == "roots" else drawn

    return drawing(change)


@contextmanager
def overlapping_counters() -> Iterator[None]:
    """The wire's number counts in the counter block's low end: each wire's second block is the next one's first."""

    def draw(self, wire, count):
        drawn = torch.empty(count + 15, dtype=torch.uint8)
        counter = ciphers.modes.CTR(wire.to_bytes(16, "big"))
        cipher = ciphers.Cipher(ciphers.algorithms.AES128(self._key), counter)
        cipher.encryptor().update_into(bytes(count), drawn.numpy().data)
        return drawn[:count]

    with patch.object(Stream, "bytes", draw):
        yield


# what the dealer does


@contextmanager
def tickets_again() -> Iterator[None]:
    """Every inference gets the first one's material under a number of its own."""
    made = Deal.tickets

    def tickets(self, number):
        if not hasattr(self, "first"):
            self.first = made(self, number)
        return tuple(replace(ticket, number=number) for ticket in self.first)

    with patch.object(Deal, "tickets", tickets):
        yield


@contextmanager
def shared_seed() -> Iterator[None]:
    """Both parties draw from one key."""
    start, tickets = Dealing.__init__, Deal.tickets

    def planted_start(self, protocol, masks, operators, keys, public_key):
        start(self, protocol, masks, operators, (keys[0], keys[0]), public_key)

    def planted_tickets(self, number):
        server, client = tickets(self, number)
        return server, replace(client, key=server.key)

    with patch.object(Dealing, "__init__", planted_start), patch.object(Deal, "tickets", planted_tickets):
        yield


@contextmanager
def gates_in_the_clear() -> Iterator[None]:
    """The dealer shares msb(a) ^ 1 where random bits belong: r = 0, so that what is opened is the gate itself."""
    compare, instead = Dealing._compare, {}

    def planted_compare(self, action: Compare):
        bits = self._protocol.settings.gate_bits
        mask = self._masks[action.operand][:, : action.prototypes].reshape(-1)
        client = Stream(self._streams[1]._key).bytes(action.noise.number, action.noise.bytes)
        wanted = carry.pack(((mask >> (bits - 1) & 1) ^ 1).to(torch.uint8)) ^ client
        instead[self._streams[0]._key, action.noise.number] = wanted
        compare(self, action)

    draw = Stream.bytes

    def planted_draw(stream, wire, count):
        drawn = draw(stream, wire, count)
        return instead.get((stream._key, wire), drawn)

    with patch.object(Dealing, "_compare", planted_compare), patch.object(Stream, "bytes", planted_draw):
        yield


@contextmanager
def logits_noise(value: int) -> Iterator[None]:
    """The noise on the logits is a constant."""
    share = Dealing._share

    def planted(self, wire: Wire, words: Tensor):
        rho = roles(self._protocol)[wire.number] == "rho"
        share(self, wire, torch.full_like(words, value) if rho else words)

    with patch.object(Dealing, "_share", planted):
        yield


@contextmanager
def one_server_key() -> Iterator[None]:
    """Every model version has the same weight masks."""
    start = Deal.__init__

    def planted(self, protocol, version=None, server_key=None):
        start(self, protocol, version, bytes(range(16)))

    with patch.object(Deal, "__init__", planted):
        yield


@contextmanager
def weights_masked_by(mask: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Weights are masked by what `mask` makes of their own stream and of the beginning of stream 0."""
    draw, deals, start = Stream.bytes, set(), Deal.__init__

    def planted_start(self, protocol, version=None, server_key=None):
        key = deal.secrets.token_bytes(16)
        deals.add(key)
        start(self, protocol, version, key)

    def planted_draw(stream, wire, count):
        drawn = draw(stream, wire, count)
        return mask(drawn, draw(Stream(stream._key), 0, count)) if stream._key in deals else drawn

    with patch.object(Deal, "__init__", planted_start), patch.object(Stream, "bytes", planted_draw):
        yield


@contextmanager
def one_public_key() -> Iterator[None]:
    """The comparison functions of all inferences hash under one AES key."""
    tickets, start = Deal.tickets, Dealing.__init__

    def planted_start(self, protocol, masks, operators, keys, public_key):
        start(self, protocol, masks, operators, keys, bytes(16))

    def planted_tickets(self, number):
        server, client = tickets(self, number)
        return replace(server, public_key=bytes(16)), replace(client, public_key=bytes(16))

    with patch.object(Dealing, "__init__", planted_start), patch.object(Deal, "tickets", planted_tickets):
        yield
