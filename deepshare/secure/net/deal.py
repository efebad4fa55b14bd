"""The dealer's process: makes tickets ahead, to disk or for parties that ask over mutual TLS.

It is told the protocol (architecture and settings), never a weight or an image, and is on no connection between the
parties. A pair of tickets is made once; the server's half goes to the server that registered, the client's to the one
certificate the server named, each once.
"""

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from deepshare.files import write_whole
from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine.protocol import Protocol
from deepshare.secure.engine.ticket import Ticket, write_ticket
from deepshare.secure.errors import SecureError
from deepshare.secure.net import messages
from deepshare.secure.net.connect import Address, Party
from deepshare.secure.net.folders import appearing
from deepshare.secure.net.keys import Identity
from deepshare.secure.net.material import FORMAT, PARTIES
from deepshare.secure.net.session import Listener, Log, Session, last_words

MOST_PROTOCOL_BYTES = 1 << 28
MOST_SESSIONS = 64
WAIT_SECONDS = 0.25


def deal_to_disk(protocol: Protocol, count: int, out: Path) -> list[int]:
    """Writes OUT/server and OUT/client with `count` tickets each, whole or not at all.

    Returns:
        bytes of one ticket, the server's and the client's.

    Raises:
        SecureError: `out` is not empty, or `count` is below 1.
    """
    if count < 1:
        raise SecureError(f"secure: --count must be at least 1 (got {count})")
    with appearing(out, "material is") as beside:
        folders = [beside / name for name in PARTIES]
        for folder in folders:
            folder.mkdir(mode=0o700)
        deal = Deal(protocol)
        for number in range(1, count + 1):
            sizes = [
                write_ticket(folder, ticket).stat().st_size
                for folder, ticket in zip(folders, deal.tickets(number), strict=True)
            ]
        write_whole(folders[0] / "mask.key", deal.server_key, mode=0o600)
        for party, folder in enumerate(folders):
            write_whole(folder / "deal.json", _description(deal, party, count), mode=0o600)
    return sizes


def _description(deal: Deal, party: int, count: int) -> str:
    facts = {"format": FORMAT, "version": deal.version, "digest": deal.protocol.digest, "party": party, "count": count}
    return json.dumps({**facts, "settings": asdict(deal.protocol.settings)}, indent=1) + "\n"


@dataclass
class _Version:
    """What the dealer holds of one registered server, as long as it is connected."""

    deal: Deal
    made: "queue.Queue[tuple[Ticket, Ticket] | BaseException]"
    stop: threading.Event = field(default_factory=threading.Event)
    waiting: dict[int, tuple[str, Ticket]] = field(default_factory=dict)  # the client's halves: who may have them


class Dealer:
    """Serves any number of servers and their clients, each in a thread of its own.

    Attributes:
        address: where it listens.
    """

    def __init__(self, address: Address, identity: Identity, *, ahead: int, log: Log) -> None:
        if ahead < 1:
            raise SecureError(f"secure: --ahead must be at least 1 (got {ahead})")
        self._ahead, self._log = ahead, log
        self._versions: dict[str, _Version] = {}
        self._sessions: set[Session] = set()
        self._lock = threading.Lock()
        self._closed: str | None = None
        self._listener = Listener(
            address, identity, ("server", "client"), admit=self._admit, on_session=self._start, log=log
        )
        self.address = self._listener.address

    def close(self, why: str = "") -> None:
        """Ends every conversation with `why` as last words."""
        self._listener.close()
        with self._lock:
            self._closed, sessions = why, list(self._sessions)
        for session in sessions:
            session.close(why)

    def _admit(self, party: Party) -> None:
        if len(self._sessions) >= MOST_SESSIONS:
            raise SecureError(f"secure: busy: {MOST_SESSIONS} parties are connected, the most that are served")

    def _start(self, session: Session) -> None:
        with self._lock:
            closed = self._closed
            self._sessions.add(session)
        if closed is not None:
            session.close(closed)
            return
        self._log(f"connected: {session.party.name}")
        serve = self._serve_server if session.party.role == "server" else self._serve_client
        threading.Thread(target=self._guarded, args=(serve, session), name="dealing", daemon=True).start()

    def _guarded(self, serve: Callable[[Session], None], session: Session) -> None:
        torch.set_num_threads(1)
        why = "it failed"  # by a bug: its traceback goes to stderr
        try:
            serve(session)
        except SecureError as error:
            why = last_words(error)
            self._log(f"done with {session.party.name}: {str(error).removeprefix('secure: ')}")
        finally:
            with self._lock:
                self._sessions.discard(session)
            session.close(why)

    def _serve_server(self, session: Session) -> None:
        channel = session.channel
        _, text = messages.receive_bytes(channel, "register", MOST_PROTOCOL_BYTES)
        version = _Version(Deal(Protocol.from_json(str(text, "utf-8", "replace"))), queue.Queue(self._ahead))
        name = version.deal.version
        self._log(f"registered by {session.party.name}: version {name[:8]}, {version.deal.protocol.settings}")
        messages.send(channel, "registered", version=name)
        messages.send_bytes(channel, "mask_key", version.deal.server_key)
        self._versions[name] = version
        threading.Thread(target=_make, args=(version,), name="tickets", daemon=True).start()
        try:
            while True:
                _, content = messages.receive(channel, "take")
                self._hand_to_server(session, version, messages.text(channel, content, "client"))
        finally:
            version.stop.set()
            del self._versions[name]

    def _hand_to_server(self, session: Session, version: _Version, client: str) -> None:
        first, second = _next_pair(session, version)
        with self._lock:  # one inference at a time: an earlier half that nobody fetched is of one that was given up
            version.waiting = {second.number: (client, second)}
        self._log(f"ticket {first.number} of version {version.deal.version[:8]} to {session.party.name}")
        messages.send_bytes(session.channel, "ticket", first.to_bytes())

    def _serve_client(self, session: Session) -> None:
        channel = session.channel
        while True:
            _, content = messages.receive(channel, "collect")
            name, number = messages.text(channel, content, "version"), messages.number(channel, content, "number")
            ticket = self._for_client(session.party, name, number)
            self._log(f"ticket {number} of version {name[:8]} to {session.party.name}")
            messages.send_bytes(channel, "ticket", ticket.to_bytes())

    def _for_client(self, party: Party, name: str, number: int) -> Ticket:
        """The client's half, once; raises SecureError if it is not there for this certificate."""
        with self._lock:
            version = self._versions.get(name)
            if version is None:
                raise SecureError(f"secure: the dealer has no version {name[:8]}: is the server at another dealer?")
            fingerprint, ticket = version.waiting.get(number, ("", None))
            if ticket is None or fingerprint != party.fingerprint:
                raise SecureError(f"secure: the dealer has no ticket {number} for {party.name} (each is given once)")
            del version.waiting[number]
            return ticket


def _next_pair(session: Session, version: _Version) -> tuple[Ticket, Ticket]:
    while True:
        session.beats.check()
        try:
            made = version.made.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            continue
        if isinstance(made, BaseException):
            raise made
        return made


def _make(version: _Version) -> None:
    """Keeps the queue of pairs full until the server is gone."""
    torch.set_num_threads(1)
    number = 0
    while not version.stop.is_set():
        number += 1
        try:
            pair: tuple[Ticket, Ticket] | BaseException = version.deal.tickets(number)
        except BaseException as error:
            pair = error
        while not version.stop.is_set():
            try:
                version.made.put(pair, timeout=WAIT_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(pair, BaseException):
            return
