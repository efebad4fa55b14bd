"""What a party sends and receives through, whatever carries it."""

import queue
from typing import Protocol

from deepshare.secure.errors import SecureError

Bytes = bytes | bytearray | memoryview
MEMORY_SECONDS = 60.0  # a thread of one process that says nothing for so long has ended or hangs


class Link(Protocol):
    """A stream of bytes to the other party. Both may send any amount before they receive: `send` does not deadlock.

    Attributes:
        sent, received: payload bytes so far.
    """

    sent: int
    received: int

    def send(self, data: Bytes) -> None:
        """Hands over all of `data`, contiguous."""

    def recv(self, n: int) -> memoryview:
        """Exactly `n` bytes, writable, in memory of their own."""


class MemoryLink:
    """The link between two threads of one process; `pair` makes both ends."""

    def __init__(self, inbox: "queue.SimpleQueue[bytes]", outbox: "queue.SimpleQueue[bytes]") -> None:
        self.sent = 0
        self.received = 0
        self._inbox, self._outbox = inbox, outbox
        self._rest = memoryview(b"")

    @classmethod
    def pair(cls) -> tuple["MemoryLink", "MemoryLink"]:
        left: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        right: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        return cls(left, right), cls(right, left)

    def send(self, data: Bytes) -> None:
        copy = bytes(data)
        self.sent += len(copy)
        self._outbox.put(copy)

    def recv(self, n: int) -> memoryview:
        """Raises SecureError if the other thread sends nothing for `MEMORY_SECONDS`."""
        out = memoryview(bytearray(n))
        filled = 0
        while filled < n:
            if not self._rest:
                self._rest = memoryview(self._next(n - filled))
            part = self._rest[: n - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            self._rest = self._rest[len(part) :]
        self.received += n
        return out

    def _next(self, missing: int) -> bytes:
        try:
            return self._inbox.get(timeout=MEMORY_SECONDS)
        except queue.Empty:
            raise SecureError(
                f"secure: the other thread sent nothing for {MEMORY_SECONDS:g} s (wanted {missing} bytes)"
            ) from None
