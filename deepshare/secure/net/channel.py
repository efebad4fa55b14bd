"""A stream of bytes to one peer: TLS (or, for benchmarks, plain TCP) on a non-blocking socket that one thread drives.

Both parties may send megabytes at the same time: a `send` that cannot write reads what comes into a backlog, so neither
waits for the other to empty its buffers. A small exchange costs one write and one or two reads, no thread and no lock.
"""

import select
import socket
import ssl
import time
from typing import Protocol

from deepshare.secure.engine.link import Bytes
from deepshare.secure.errors import SecureError

TICK_SECONDS = 0.25  # how often a wait looks whether the peer is gone
MOST_BACKLOG = 1 << 32  # bytes a peer may have sent beyond what was asked for: more is no protocol of ours
_CHUNK = 1 << 18
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Watch(Protocol):
    """Who knows whether the peer lives (beats.py)."""

    def check(self) -> None:
        """Raises SecureError if it is gone."""

    def lost(self, how: str) -> SecureError:
        """The error for a connection that ended as `how` says, with the peer's last words if there are any."""


class Channel:
    """A Link over a connected socket.

    Attributes:
        peer: who is at the other end, as errors say it: "the server (10.0.0.1:5000)".
        sent, received: payload bytes that went out and that `recv` gave.
        arrived: payload bytes that came in, those in the backlog included.
        waiting: whether a `recv` waits right now.
        deadline: `time.monotonic()` after which a wait fails; None while a watch decides.
        watch: asked while waiting.
    """

    def __init__(self, sock: socket.socket, peer: str, *, deadline: float | None = None) -> None:
        sock.setblocking(False)
        self.peer = peer
        self.sent = 0
        self.received = 0
        self.arrived = 0
        self.waiting = False
        self.deadline = deadline
        self.watch: Watch | None = None
        self._sock = sock
        self._backlog = bytearray()
        self._chunk: memoryview | None = None  # what is read in a send goes through it
        self._for_reading, self._for_both = select.poll(), select.poll()
        self._for_reading.register(sock, select.POLLIN)
        self._for_both.register(sock, select.POLLIN | select.POLLOUT)

    def send(self, data: Bytes) -> None:
        """All of `data` (contiguous). Raises SecureError if the peer is gone or the deadline passed."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while view:
            try:
                count = self._sock.send(view)
            except _WOULD_BLOCK:
                if self._wait(self._for_both) & select.POLLIN:
                    self._drain()
                continue
            except OSError as error:
                self._drain()  # the peer's reason may have come: TLS's alert is raised here
                raise self._lost(explain(error)) from error
            self.sent += count
            view = view[count:]

    def recv(self, n: int) -> memoryview:
        """Exactly `n` bytes, writable, in memory of their own. Raises as `send` does."""
        out = memoryview(bytearray(n))
        filled = min(n, len(self._backlog))
        if filled:
            out[:filled] = memoryview(self._backlog)[:filled]
            del self._backlog[:filled]
        while filled < n:
            count = self._read_into(out[filled:])
            if count == 0:
                raise self._lost(f"ended the connection ({n} bytes were wanted, {filled} came)")
            if count is None:
                self._wait_to_read()
            else:
                filled += count
        self.received += n
        return out

    def readable(self, seconds: float, also: int) -> bool:
        """Whether bytes are there, now or within `seconds`; returns early when the descriptor `also` is readable."""
        if self._backlog or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
            return True
        both = select.poll()
        both.register(self._sock, select.POLLIN)
        both.register(also, select.POLLIN)
        return any(descriptor == self._sock.fileno() for descriptor, _ in both.poll(max(0.0, seconds) * 1000))

    def finish(self, seconds: float = 1.0) -> None:
        """Ends the connection so that what was sent arrives: says that no more comes, reads until the peer ends."""
        until = time.monotonic() + seconds
        try:
            self._sock.shutdown(socket.SHUT_WR)
            scratch = memoryview(bytearray(_CHUNK))
            while time.monotonic() < until:
                count = self._read_into(scratch)
                if count == 0:
                    break
                if count is None:
                    self._for_reading.poll(50)
        except (OSError, SecureError):
            pass  # the peer ended first
        self.close()

    def close(self) -> None:
        self._sock.close()

    def _read_into(self, view: memoryview) -> int | None:
        """Bytes read, 0 at the end, None if there are none yet."""
        try:
            count = self._sock.recv_into(view)
        except _WOULD_BLOCK:
            return None
        except OSError as error:
            raise self._lost(explain(error)) from error
        self.arrived += count
        return count

    def _drain(self) -> None:
        if self._chunk is None:
            self._chunk = memoryview(bytearray(_CHUNK))
        while count := self._read_into(self._chunk):
            self._backlog += self._chunk[:count]
            if len(self._backlog) > MOST_BACKLOG:
                raise SecureError(f"secure: {self.peer} sent more than {MOST_BACKLOG} bytes that nobody asked for")
        if count == 0:
            raise self._lost("ended the connection while it was being sent to")

    def _wait_to_read(self) -> None:
        self.waiting = True
        try:
            self._wait(self._for_reading)
        finally:
            self.waiting = False

    def _wait(self, poller: "select.poll") -> int:
        """Events of the socket; returns none after a tick, or raises because the peer is gone or the time is over."""
        for _, events in poller.poll(TICK_SECONDS * 1000):
            return events
        if self.watch is not None:
            self.watch.check()
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise SecureError(f"secure: {self.peer} sent nothing in time (stopped, or the network is cut)")
        return 0

    def _lost(self, how: str) -> SecureError:
        return self.watch.lost(how) if self.watch is not None else SecureError(f"secure: {self.peer} {how}")


_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "showed a certificate that is not valid here",
    "CERTIFICATE_REQUIRED": "wants a certificate, and none was shown",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "showed no certificate",
    "UNKNOWN_CA": "refused this certificate: another authority signed it",
    "DECRYPT_ERROR": "refused this certificate: another authority signed it",
    "BAD_CERTIFICATE": "refused this certificate",
    "CERTIFICATE_EXPIRED": "refused this certificate: it expired",
    "WRONG_VERSION_NUMBER": "does not speak TLS",
    "RECORD_LAYER_FAILURE": "does not speak TLS",
    "HTTP_REQUEST": "does not speak TLS but HTTP",
    "UNSUPPORTED_PROTOCOL": "does not speak TLS 1.3",
    "PROTOCOL_VERSION": "does not speak TLS 1.3",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "sent bytes that were changed on the way",
}


def explain(error: OSError) -> str:
    """What a socket's or TLS error says about the peer, as the end of a sentence that begins with its name."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"showed a certificate that is not valid here ({error.verify_message})"
    if isinstance(error, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError):
        return "ended the connection"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        found = next((words for name, words in _REASONS.items() if reason.endswith(name)), None)
        return found or f"failed in TLS ({reason or error})"
    return f"cannot be reached ({error.strerror or error})"
