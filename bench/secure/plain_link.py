"""The engine's Link over plain TCP, for benchmarks: without TLS, keys and watches."""

import select
import socket
import time

from deepshare.secure.engine.link import Bytes

CONNECT_SECONDS = 60.0
STALL_SECONDS = 300.0


class PlainLink:
    """One non-blocking socket, one thread. While its own data cannot leave, it reads, so two senders never deadlock.

    Attributes:
        sent, received: payload bytes handed over and asked for.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sent = self.received = 0
        self._socket = sock
        self._early = bytearray()  # what came while sending
        self._readable, self._either = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._either.register(sock, select.POLLIN | select.POLLOUT)

    def send(self, data: Bytes) -> None:
        view = memoryview(data).cast("B")
        self.sent += len(view)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                if any(event & select.POLLIN for _, event in self._wait(self._either)):
                    self._early += self._arrived()

    def recv(self, n: int) -> memoryview:
        out = memoryview(bytearray(n))
        self.received += n
        filled = min(n, len(self._early))
        out[:filled] = memoryview(self._early)[:filled]
        del self._early[:filled]
        while filled < n:
            try:
                count = self._socket.recv_into(out[filled:])
            except BlockingIOError:
                self._wait(self._readable)
                continue
            if not count:
                raise ConnectionError("the other party closed the connection")
            filled += count
        return out

    def barrier(self) -> None:
        """Both parties are here; counts nothing."""
        self.send(b"b")
        self.recv(1)
        self.sent -= 1
        self.received -= 1

    def _arrived(self) -> bytes:
        data = self._socket.recv(1 << 20)
        if not data:
            raise ConnectionError("the other party closed the connection")
        return data

    def _wait(self, poll: select.poll) -> list[tuple[int, int]]:
        ready = poll.poll(STALL_SECONDS * 1000)
        if not ready:
            raise TimeoutError(f"nothing from the other party for {STALL_SECONDS:g} s")
        return ready


def listen(address: str, port: int) -> PlainLink:
    """The server's end: waits for one connection."""
    with socket.create_server((address, port)) as server:
        server.settimeout(CONNECT_SECONDS)
        return PlainLink(server.accept()[0])


def connect(address: str, port: int) -> PlainLink:
    """The client's end: tries until the server listens."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return PlainLink(socket.create_connection((address, port), timeout=CONNECT_SECONDS))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
