"""The engine's channel between two processes (deepshare.secure.net), over plain TCP or, with keys, under TLS 1.3."""

import socket
import time
from pathlib import Path

from deepshare.secure.errors import SecureError
from deepshare.secure.net.channel import Channel
from deepshare.secure.net.connect import Address, answer, dial
from deepshare.secure.net.keys import Identity

CONNECT_SECONDS = 60.0
LIFE_SECONDS = 3600.0  # of a benchmark's party: a wait beyond it fails


def listen(address: str, port: int, keys: Path | None = None) -> Channel:
    """The server's end: waits for one connection. keys: the server's folder."""
    with socket.create_server((address, port)) as server:
        server.settimeout(CONNECT_SECONDS)
        accepted, _ = server.accept()
    if keys is None:
        return _plain(accepted, "the client")
    return answer(accepted, Identity.load(keys, "server"), ("client",), deadline=_deadline())[0]


def connect(address: str, port: int, keys: Path | None = None) -> Channel:
    """The client's end: tries until the server listens. keys: the client's folder."""
    last = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            if keys is not None:
                return dial(Address(address, port), Identity.load(keys, "client"), "server", deadline=_deadline())[0]
            return _plain(socket.create_connection((address, port), timeout=CONNECT_SECONDS), "the server")
        except (OSError, SecureError):
            if time.monotonic() > last:
                raise
            time.sleep(0.05)


def barrier(channel: Channel) -> None:
    """Both parties are here."""
    channel.send(b"b")
    channel.recv(1)


def _plain(sock: socket.socket, peer: str) -> Channel:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(sock, peer, deadline=_deadline())


def _deadline() -> float:
    return time.monotonic() + LIFE_SECONDS
