"""Keys, connected channels and sessions for the tests of deepshare.secure.net."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deepshare.secure.net.channel import Channel
from deepshare.secure.net.connect import Address, Party, answer, dial
from deepshare.secure.net.keys import Identity, make_keys
from deepshare.secure.net.session import Listener, Session, open_session

HERE = "127.0.0.1"


def keys(folder: Path) -> Path:
    """A folder of keys with two clients."""
    for name, content in _made_once().items():
        path = folder / "keys" / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(content)
    return folder / "keys"


@cache
def _made_once() -> dict[Path, bytes]:
    """To make keys means to wait for the disk twenty times."""
    with TemporaryDirectory() as folder:
        made = Path(folder) / "keys"
        make_keys(made, clients=2)
        return {path.relative_to(made): path.read_bytes() for path in made.rglob("*.pem")}


def identity(folder: Path, name: str) -> Identity:
    return Identity.load(folder / name, name.split("-")[0])  # type: ignore[arg-type]


def plain_pair() -> tuple[Channel, Channel]:
    """Two ends of one TCP connection without TLS."""
    with socket.create_server((HERE, 0)) as listening:
        dialled = socket.create_connection(listening.getsockname())
        answered, _ = listening.accept()
    ends = []
    for sock, name in ((dialled, "the server (test)"), (answered, "the client (test)")):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends.append(Channel(sock, name))
    return ends[0], ends[1]


def tls_pair(folder: Path) -> tuple[Channel, Channel]:
    """(client's end, server's end) of one TLS connection; `folder` holds keys."""
    with socket.create_server((HERE, 0)) as listening:
        address = Address(HERE, listening.getsockname()[1])
        found: list[tuple[Channel, Party]] = []

        def take() -> None:
            raw, _ = listening.accept()
            found.append(answer(raw, identity(folder, "server"), ("client",), deadline=time.monotonic() + 8))

        with joined(take):
            channel, _ = dial(address, identity(folder, "client-1"), "server", deadline=time.monotonic() + 8)
    channel.deadline = found[0][0].deadline = None
    return channel, found[0][0]


@contextmanager
def joined(*works: Callable[[], Any]) -> Iterator[list[BaseException]]:
    """Runs `works` in threads of their own meanwhile; their errors, when they have all ended."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    yield errors
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"


class Server:
    """A Listener that keeps its sessions and its log."""

    def __init__(self, folder: Path, admit: Callable[[Party], None] = lambda party: None) -> None:
        self.sessions: list[Session] = []
        self.log: list[str] = []
        self._came = threading.Semaphore(0)
        self.listener = Listener(
            Address(HERE, 0),
            identity(folder, "server"),
            ("client",),
            admit=admit,
            on_session=self._take,
            log=self.log.append,
        )

    def _take(self, session: Session) -> None:
        self.sessions.append(session)
        self._came.release()

    def next(self) -> Session:
        assert self._came.acquire(timeout=10)
        return self.sessions[-1]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        for session in self.sessions:
            session.close("the test ended")
        self.listener.close()


def session_pair(server: Server, folder: Path, name: str = "client-1") -> tuple[Session, Session]:
    """(client's, server's) ends of one session."""
    ours = open_session(server.listener.address, identity(folder, name), "server")
    return ours, server.next()
