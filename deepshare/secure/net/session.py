"""Two processes in conversation: a data connection and one of beats, tied together by a number the caller chose."""

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from deepshare.secure.errors import SecureError
from deepshare.secure.net import messages
from deepshare.secure.net.beats import Beats
from deepshare.secure.net.channel import Channel
from deepshare.secure.net.connect import CONNECT_SECONDS, Address, Party, answer, dial
from deepshare.secure.net.keys import ROLES, Identity, Role

MOST_HANDSHAKES = 64  # at the same time; more wait in the system's queue

Log = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """A peer, the data connection to it and its signs of life."""

    party: Party
    channel: Channel
    beats: Beats

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Waits on the data connection fail after so many seconds, even if the peer lives."""
        self.channel.deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self.channel.deadline = None

    def close(self, why: str = "") -> None:
        """Ends both connections; `why` are the last words the peer gets."""
        self.beats.close(why)


def last_words(error: BaseException) -> str:
    """What the peer is told of an error here: which party is gone or was refused; no path or input of this machine."""
    text = str(error)
    about_a_party = isinstance(error, SecureError) and text.startswith(tuple(f"secure: the {role}" for role in ROLES))
    return text if about_a_party else "it failed on its own side, its log says why"


def open_session(
    address: Address, identity: Identity, role: Role, *, on_note: Callable[[dict[str, Any]], None] | None = None
) -> Session:
    """Connects to the `role` at `address`, within CONNECT_SECONDS.

    Raises:
        SecureError: as `dial`; it speaks another protocol version, or refuses (busy, an unknown certificate).
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    name = secrets.token_hex(16)
    opened: list[Channel] = []
    try:
        for use in ("data", "beats"):
            channel, party = dial(address, identity, role, deadline=deadline)
            opened.append(channel)
            messages.send(channel, "hello", use=use, session=name)
            messages.receive(opened[0], "hello")  # to the first half: known; to the second: admitted
    except BaseException:
        for channel in opened:
            channel.close()
        raise
    return Session(party, opened[0], Beats(opened[1], opened[0], on_note=on_note))


class Listener:
    """Takes connections at `address` and hands over each session of one of `roles` whose two halves have come.

    Every handshake has a thread and CONNECT_SECONDS; one that fails is refused, logged and forgotten.

    Attributes:
        address: where it listens; with port 0 the one the system chose.
    """

    def __init__(
        self,
        address: Address,
        identity: Identity,
        roles: tuple[Role, ...],
        *,
        admit: Callable[[Party], None],
        on_session: Callable[[Session], None],
        log: Log,
    ) -> None:
        """`admit` and then `on_session` are called in a handshake's thread, for one session at a time.

        A SecureError of `admit` is told to the peer as a refusal; `on_session` owns the session and raises nothing.
        """
        try:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            self._sock = socket.create_server((address.host, address.port), family=family, backlog=128)
        except OSError as error:
            raise SecureError(f"secure: cannot listen at {address} ({error.strerror or error})") from error
        self.address = Address(address.host, self._sock.getsockname()[1])
        self._identity, self._roles, self._log = identity, roles, log
        self._admit, self._on_session = admit, on_session
        self._halves: dict[tuple[str, str], tuple[Channel, Party, float]] = {}  # by certificate and session
        self._lock, self._admission = threading.Lock(), threading.Lock()
        self._room = threading.BoundedSemaphore(MOST_HANDSHAKES)
        self._closed = False
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._sock.close()
        with self._lock:
            for channel, _, _ in self._halves.values():
                channel.close()
            self._halves.clear()

    def _accept(self) -> None:
        while not self._closed:
            self._room.acquire()
            try:
                raw, _ = self._sock.accept()
            except OSError as error:
                self._room.release()
                if not self._closed:
                    self._log(f"cannot accept a connection: {error.strerror or error}")
                    time.sleep(0.1)  # out of descriptors, for instance: others may be closed meanwhile
                continue
            threading.Thread(target=self._welcome, args=(raw,), name="handshake", daemon=True).start()

    def _welcome(self, raw: socket.socket) -> None:
        channel = None
        try:
            deadline = time.monotonic() + CONNECT_SECONDS
            channel, party = answer(raw, self._identity, self._roles, deadline=deadline)
            self._pair(channel, party, deadline)
        except SecureError as error:
            self._log(f"refused: {str(error).removeprefix('secure: ')}")
            if channel is not None:
                messages.refuse(channel, str(error))
        finally:
            self._room.release()

    def _pair(self, channel: Channel, party: Party, deadline: float) -> None:
        """Keeps the first half of a session, and begins the session with its second."""
        _, hello = messages.receive(channel, "hello")
        key = (party.fingerprint, messages.text(channel, hello, "session"))
        with self._lock:
            self._forget_the_late()
            if messages.text(channel, hello, "use") == "data" and len(self._halves) < MOST_HANDSHAKES:
                self._halves[key] = (channel, party, deadline)
                messages.send(channel, "hello")
                return
            data = self._halves.pop(key, None)
        if data is None:
            raise SecureError(f"secure: {party.name} opened connections that do not belong together")
        with self._admission:
            self._begin(data[1], data[0], channel)

    def _begin(self, party: Party, data: Channel, beats: Channel) -> None:
        try:
            self._admit(party)
            messages.send(data, "hello")
        except SecureError as error:
            self._log(f"refused: {str(error).removeprefix('secure: ')}")
            messages.refuse(data, str(error))
            beats.close()
        else:
            self._on_session(Session(party, data, Beats(beats, data)))

    def _forget_the_late(self) -> None:
        now = time.monotonic()
        for key in [key for key, (*_, deadline) in self._halves.items() if now > deadline]:
            self._halves.pop(key)[0].close()
