"""What carries the parties' messages, on loopback, to a process of its own: TLS 1.3 beside plain TCP.

A round is an exchange: both send, then both receive. Bulk is begun by one byte, so that neither is ahead of the clock.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from interleave import per_call, per_queued_call, queue
from measure import Measure

from deepshare.secure.errors import SecureError
from deepshare.secure.net.channel import Channel
from deepshare.secure.net.connect import Address, answer, dial
from deepshare.secure.net.keys import Identity, make_keys

HERE = "127.0.0.1"
SMALL = 64
BULK = 9_000_000  # what one party sends in a ResNet18 inference with secret weights
Pair = Callable[[str, int, int, bool], Channel]


def connect(kind: str, port: int, keys: Path) -> Channel:
    if kind == "tls":
        identity = Identity.load(keys / "client", "client")
        channel, _ = dial(Address(HERE, port), identity, "server", deadline=time.monotonic() + 8)
        channel.deadline = None
        return channel
    sock = socket.create_connection((HERE, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(sock, "the server (bench)")


def take(kind: str, listening: socket.socket, keys: Path) -> Channel:
    raw, _ = listening.accept()
    if kind == "tls":
        identity = Identity.load(keys / "server", "server")
        channel, _ = answer(raw, identity, ("client",), deadline=time.monotonic() + 8)
        channel.deadline = None
        return channel
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(raw, "the client (bench)")


def other_end(kind: str, port: str, keys: str, sends: str, receives: str, waits: str) -> None:
    """The child's work, until the parent ends the connection."""
    channel, data = connect(kind, int(port), Path(keys)), bytes(int(sends))
    try:
        while True:
            channel.recv(int(waits))
            channel.send(data)
            channel.recv(int(receives))
    except SecureError:
        channel.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Connects to a child that `sends` and `receives` so many bytes a call, after a byte if it `waits`."""
    make_keys(tmp_path / "keys")
    with ExitStack() as stack:

        def make(kind: str, sends: int, receives: int, waits: bool) -> Channel:
            listening = stack.enter_context(socket.create_server((HERE, 0)))
            listening.settimeout(60)  # a child that fails would else be waited for
            port = listening.getsockname()[1]
            arguments = [kind, port, tmp_path / "keys", sends, receives, int(waits)]
            path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            child = subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=os.environ | path)
            stack.callback(child.wait, 10)
            channel = take(kind, listening, tmp_path / "keys")
            stack.callback(channel.close)
            return channel

        yield make


def exchange(channel: Channel, sends: int, receives: int, begins: bool) -> Callable[[], object]:
    data, go = bytes(sends), bytes(int(begins))

    def call() -> None:
        channel.send(go)
        channel.send(data)
        channel.recv(receives)

    return call


@pytest.mark.quick
@pytest.mark.benchmark(timer=per_queued_call)
@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_small_round(measure: Measure, pair: Pair, kind: str):
    calls = {name: queue(exchange(pair(name, SMALL, SMALL, False), SMALL, SMALL, False)) for name in {"plain", kind}}
    record(measure, calls, kind, "round", f"{SMALL} bytes each way", None)


@pytest.mark.quick
@pytest.mark.benchmark(timer=per_call)
@pytest.mark.parametrize("both", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_bulk(measure: Measure, pair: Pair, kind: str, both: bool):
    back = BULK if both else 1
    calls = {name: exchange(pair(name, back, BULK, True), BULK, back, True) for name in {"plain", kind}}
    case = f"{BULK:,} bytes {'each' if both else 'one'} way"
    record(measure, calls, kind, "bulk", case, BULK + back)


def record(
    measure: Measure, calls: dict[str, Callable[[], object]], kind: str, name: str, case: str, moved: int | None
) -> None:
    others = {provider: call for provider, call in calls.items() if provider != kind}
    measure(
        calls[kind],
        others,
        kind="link",
        name=name,
        provider=kind,
        baseline="plain",
        ours=kind == "tls",
        case=case,
        bytes_moved=moved,
    )


if __name__ == "__main__":
    other_end(*sys.argv[1:])
