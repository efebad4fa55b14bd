"""Connections between processes that know each other: address, TLS handshake, role."""

import hashlib
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deepshare.secure.errors import SecureError
from deepshare.secure.net import messages
from deepshare.secure.net.channel import Channel, explain
from deepshare.secure.net.keys import Identity, Role, role_of

CONNECT_SECONDS = 6.0  # for TCP, TLS and the first message together
REFUSAL_SECONDS = 0.5  # for the peer to read why


@dataclass(frozen=True)
class Address:
    """HOST:PORT, or [HOST]:PORT with an IPv6 address."""

    host: str
    port: int

    @classmethod
    def parse(cls, flag: str, text: str) -> "Address":
        """Raises SecureError that names `flag` if `text` is no address."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise SecureError(f"secure: {flag} must be HOST:PORT, as 10.0.0.1:5000 (got {text!r:.80})")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Party:
    """Who was found at the other end of a TLS connection.

    Attributes:
        role: as its certificate says.
        name: who it is, for logs and errors: "the client (10.0.0.2)".
        fingerprint: SHA-256 of its certificate, hex.
    """

    role: Role
    name: str
    fingerprint: str


def dial(address: Address, identity: Identity, role: Role, *, deadline: float) -> tuple[Channel, Party]:
    """A connection to the process at `address`, which must be a `role`.

    Raises:
        SecureError: nobody answers there within the deadline, it speaks no TLS 1.3, or its certificate is of another
            authority or role. A certificate of ours that the peer refuses shows at the first message: in TLS 1.3 the
            dialling side ends its handshake first.
    """
    name = f"the {role} ({address})"
    try:
        raw = socket.create_connection((address.host, address.port), timeout=_left(deadline))
    except OSError as error:
        raise SecureError(f"secure: {name} cannot be reached ({error.strerror or error})") from error
    return _shake_hands(raw, identity, name, (role,), deadline, listening=False)


def answer(
    raw: socket.socket, identity: Identity, roles: tuple[Role, ...], *, deadline: float
) -> tuple[Channel, Party]:
    """The listening side's handshake with whoever connected; it must be one of `roles`. Raises as `dial` does."""
    host = raw.getpeername()[0]
    return _shake_hands(raw, identity, f"who connected from {host}", roles, deadline, listening=True)


def _shake_hands(
    raw: socket.socket, identity: Identity, name: str, roles: tuple[Role, ...], deadline: float, *, listening: bool
) -> tuple[Channel, Party]:
    sock = _wrapped(raw, identity, deadline, listening=listening)
    try:
        sock.do_handshake()
    except TimeoutError as error:
        sock.close()
        raise SecureError(f"secure: {name} did not answer in time (stopped, or no deepshare is there)") from error
    except OSError as error:
        _end_refused(sock)
        raise SecureError(f"secure: {name} {explain(error)}") from error
    role = role_of(sock.getpeercert())
    if listening:
        name = f"the {_common_name(sock)} ({Address(*sock.getpeername()[:2])})"
    channel = Channel(sock, name, deadline=deadline)
    if role not in roles:
        why = f"secure: {name} must be a {' or '.join(roles)} by its certificate (it is a {role or 'nobody'})"
        if listening:
            messages.refuse(channel, why)
        channel.close()
        raise SecureError(why)
    return channel, Party(role, name, _fingerprint(sock))


def _wrapped(raw: socket.socket, identity: Identity, deadline: float, *, listening: bool) -> ssl.SSLSocket:
    try:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.settimeout(_left(deadline))
        context = identity.context(listening=listening)
        return context.wrap_socket(raw, server_side=listening, do_handshake_on_connect=False)
    except (OSError, SecureError) as error:
        raw.close()
        raise SecureError(str(error)) from error


def _end_refused(sock: ssl.SSLSocket) -> None:
    """Lets TLS's alert arrive: to close with bytes unread would reset the connection and may lose it."""
    with suppress(OSError):
        sock.settimeout(REFUSAL_SECONDS)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    sock.close()


def _common_name(sock: ssl.SSLSocket) -> str:
    """The folder its keys were made in, such as client-2: the authority wrote it."""
    subject: Any = (sock.getpeercert() or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return str(names[0])[:64] if names else "peer"


def _fingerprint(sock: ssl.SSLSocket) -> str:
    return hashlib.sha256(sock.getpeercert(binary_form=True) or b"").hexdigest()


def _left(deadline: float) -> float:
    return max(0.05, deadline - time.monotonic())
