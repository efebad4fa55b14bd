"""The engine's channel between two processes over plain TCP: deepshare.secure.net's, without TLS, keys and watches."""

import socket
import time

from deepshare.secure.net.channel import Channel

CONNECT_SECONDS = 60.0
LIFE_SECONDS = 3600.0  # of a benchmark's party: a wait beyond it fails


def listen(address: str, port: int) -> Channel:
    """The server's end: waits for one connection."""
    with socket.create_server((address, port)) as server:
        server.settimeout(CONNECT_SECONDS)
        return _channel(server.accept()[0], "the client")


def connect(address: str, port: int) -> Channel:
    """The client's end: tries until the server listens."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return _channel(socket.create_connection((address, port), timeout=CONNECT_SECONDS), "the server")
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def barrier(channel: Channel) -> None:
    """Both parties are here."""
    channel.send(b"b")
    channel.recv(1)


def _channel(sock: socket.socket, peer: str) -> Channel:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(sock, peer, deadline=time.monotonic() + LIFE_SECONDS)
