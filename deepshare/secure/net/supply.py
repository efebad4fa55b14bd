"""Where a party's tickets come from: a folder, or the dealer while it is asked. Both parties agree on each number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol as TypingProtocol

from torch import Tensor

from deepshare.secure.engine.protocol import CLIENT, SERVER, Protocol
from deepshare.secure.engine.streams import KEY_BYTES
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.errors import SecureError
from deepshare.secure.net import messages
from deepshare.secure.net.channel import Channel
from deepshare.secure.net.connect import Address, Party
from deepshare.secure.net.keys import Identity
from deepshare.secure.net.material import Material
from deepshare.secure.net.session import Session, last_words, open_session

MOST_TICKET_BYTES = 1 << 34  # far above any network's


class Supply(TypingProtocol):
    """Tickets of one model version for one party."""

    live: bool  # whether the dealer is asked
    version: str

    def check(self) -> None:
        """Raises SecureError if the dealer is gone."""

    def begin(self, client: Party | None) -> None:
        """At the server: the tickets to come are for this client."""

    def smallest(self, least: int) -> int | None:
        """The smallest number from `least` on that this party can use."""

    def take(self, number: int) -> Ticket:
        """That ticket, which is used up by this."""

    def close(self, why: str = "") -> None:
        """Ends the conversation with the dealer."""


class FromDisk:
    """Tickets that were carried here."""

    live = False

    def __init__(self, material: Material) -> None:
        self.version = material.version
        self._material = material

    def check(self) -> None:
        pass

    def begin(self, client: Party | None) -> None:
        pass

    def smallest(self, least: int) -> int | None:
        return self._material.smallest(least)

    def take(self, number: int) -> Ticket:
        return self._material.take(number)

    def close(self, why: str = "") -> None:
        pass


class FromDealer:
    """Tickets that the dealer hands out. It makes each number once, and each part goes to one certificate once."""

    live = True

    def __init__(self, session: Session, protocol: Protocol, version: str, party: int) -> None:
        self.version = version
        self._session, self._protocol, self._party = session, protocol, party
        self._client = ""
        self._held: Ticket | None = None
        self._last = 0

    @classmethod
    def register(cls, session: Session, protocol: Protocol) -> tuple["FromDealer", bytes]:
        """The server tells the dealer what to deal for; (supply, key of the weight masks)."""
        channel = session.channel
        messages.send_bytes(channel, "register", protocol.to_json().encode())
        _, content = messages.receive(channel, "registered")
        version = messages.text(channel, content, "version")
        _, key = messages.receive_bytes(channel, "mask_key", KEY_BYTES)
        return cls(session, protocol, version, SERVER), bytes(key)

    def check(self) -> None:
        self._session.beats.check()

    def begin(self, client: Party | None) -> None:
        self._client, self._held = "" if client is None else client.fingerprint, None

    def smallest(self, least: int) -> int | None:
        """At the server the next number that the dealer made; at the client what the server says."""
        if self._party == CLIENT:
            return least if least > self._last else None
        if self._held is None:
            messages.send(self._session.channel, "take", client=self._client)
            self._held = self._receive(None)
        return self._held.number if self._held.number >= least else None

    def take(self, number: int) -> Ticket:
        """Raises SecureError if the dealer sent another number, version, protocol or party than asked for."""
        if self._party == CLIENT:
            messages.send(self._session.channel, "collect", version=self.version, number=number)
            ticket = self._receive(number)
        else:
            assert self._held is not None, "the number was agreed on"
            ticket, self._held = self._held, None
        self._last = number
        return ticket

    def close(self, why: str = "") -> None:
        self._session.close(why)

    def _receive(self, number: int | None) -> Ticket:
        channel = self._session.channel
        _, content = messages.receive_bytes(channel, "ticket", MOST_TICKET_BYTES)
        ticket = Ticket.from_bytes(content.obj, f"a ticket of {channel.peer}")  # type: ignore[arg-type]
        wanted = (self.version, self._protocol.digest, self._party)
        if (ticket.version, ticket.digest, ticket.party) != wanted or ticket.number <= self._last:
            raise SecureError(f"secure: {channel.peer} sent a ticket of another version, model, party or a used number")
        if number is not None and ticket.number != number:
            raise SecureError(f"secure: {channel.peer} sent ticket {ticket.number}, asked for was {number}")
        return ticket


def disk_supply(folder: Path, party: int, keys: Path, protocol: Protocol, version: str | None) -> FromDisk:
    """Raises SecureError if the folder's tickets are not this party's for this protocol and version."""
    material = Material.open(folder, party, keys)
    material.check_fits(protocol.digest, version)
    material.remove_used()
    return FromDisk(material)


def server_supply(
    identity: Identity,
    protocol: Protocol,
    tensors: Mapping[str, Tensor],
    dealer: Address | None,
    material: Path | None,
) -> tuple[Supply, bytes]:
    """The server's tickets, from the dealer or from a folder, and its key of the masks of `tensors`' secret weights.

    Raises:
        SecureError: neither is given, the dealer is not there, or the folder is for another network or was used for
            other weights.
    """
    if material is not None:
        supply = disk_supply(material, SERVER, identity.folder, protocol, None)
        secret = {key: tensors[key] for key in protocol.masked_params()}
        return supply, Material.open(material, SERVER, identity.folder).mask_key(secret)
    if dealer is None:
        raise SecureError("secure serve: needs --dealer HOST:PORT or --material DIR")
    session = open_session(dealer, identity, "dealer")
    try:
        return FromDealer.register(session, protocol)
    except BaseException as error:
        session.close(last_words(error))
        raise


def agree_at_server(channel: Channel, supply: Supply) -> int:
    """The smallest number both still have: the server offers one, the client answers with it or its next.

    Raises:
        SecureError: there is none; the client is told.
    """
    least = 1
    while True:
        mine = supply.smallest(least) or 0
        messages.send(channel, "offer", number=mine)
        if not mine:
            raise SecureError("secure: the server has no unused ticket that the client has too: deal new ones")
        _, content = messages.receive(channel, "offer")
        theirs = messages.number(channel, content, "number")
        if theirs == mine:
            return mine
        if theirs < mine:
            raise SecureError(f"secure: {channel.peer} has no unused ticket that the server has too: deal new ones")
        least = theirs


def agree_at_client(channel: Channel, supply: Supply) -> int:
    """The client's side of `agree_at_server`."""
    while True:
        _, content = messages.receive(channel, "offer")
        theirs = messages.number(channel, content, "number")
        mine = supply.smallest(theirs) or 0 if theirs else 0
        if theirs:
            messages.send(channel, "offer", number=mine)
        if not mine:
            whom = "the server has no unused ticket" if not theirs else "no unused ticket is here"
            raise SecureError(f"secure: {whom} that both parties have: deal new ones")
        if mine == theirs:
            return mine
