"""Channels and messages: nothing hangs, nothing is taken that was not asked for."""

import os
import socket
import stat
import struct
import time
from pathlib import Path

import pytest
from net_cases import HERE, Server, identity, joined, keys, plain_pair, session_pair, tls_pair

from deepshare.secure.engine.link import MemoryLink
from deepshare.secure.errors import SecureError
from deepshare.secure.net import messages
from deepshare.secure.net.channel import Channel
from deepshare.secure.net.connect import Address
from deepshare.secure.net.keys import Identity, make_keys
from deepshare.secure.net.session import open_session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keys(tmp_path_factory.mktemp("net"))


@pytest.fixture(params=["memory", "plain", "tls"])
def ends(request: pytest.FixtureRequest, folder: Path):
    made = {"memory": MemoryLink.pair, "plain": plain_pair, "tls": lambda: tls_pair(folder)}[request.param]()
    yield made
    for end in made:
        if isinstance(end, Channel):
            end.close()


def test_what_is_sent_arrives_in_any_portions(ends):
    left, right = ends
    parts = [b"", b"a", os.urandom(64), os.urandom(70_001)]
    for part in parts:
        left.send(part)
    whole = b"".join(parts)
    taken = [bytes(right.recv(n)) for n in (0, 1, 65, 30_000, len(whole) - 30_066)]
    assert b"".join(taken) == whole
    assert (left.sent, right.received) == (len(whole), len(whole))
    assert (left.received, right.sent) == (0, 0)


def test_what_is_received_is_writable_and_apart(ends):
    left, right = ends
    left.send(memoryview(bytearray(b"abcd")))
    first, second = right.recv(2), right.recv(2)
    first[0] = 0
    assert bytes(second) == b"cd"
    assert not first.readonly


def test_both_may_send_large_before_they_receive(ends):
    data = os.urandom(24_000_000)  # beyond what two socket buffers hold

    def exchange(link) -> None:
        link.send(data)
        assert link.recv(len(data)) == data

    with joined(lambda: exchange(ends[0])) as errors:
        exchange(ends[1])
    assert errors == []


def test_a_thread_that_ended_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deepshare.secure.engine.link.MEMORY_SECONDS", 0.05)
    left, _ = MemoryLink.pair()
    with pytest.raises(SecureError, match=r"sent nothing for 0\.05 s \(wanted 3 bytes\)"):
        left.recv(3)


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_an_ended_connection_is_said_with_what_was_wanted(kind: str, folder: Path):
    left, right = plain_pair() if kind == "plain" else tls_pair(folder)
    left.send(b"abc")
    left.close()
    with pytest.raises(SecureError, match=r"the client.*ended the connection \(8 bytes were wanted, 3 came\)"):
        (right if "client" in right.peer else left).recv(8)
    with pytest.raises(SecureError, match="ended the connection"):
        right.send(bytes(100_000_000))
    right.close()


def test_a_deadline_ends_a_wait():
    left, right = plain_pair()
    left.deadline = time.monotonic() + 0.1
    with pytest.raises(SecureError, match="sent nothing in time"):
        left.recv(1)
    left.close()
    right.close()


# messages


def raw(version: int = messages.VERSION, kind: int = 0, body: bytes = b"{}", magic: bytes = b"dshr", length=None):
    return struct.pack(">4sHHI", magic, version, kind, len(body) if length is None else length) + body


BAD_MESSAGES = {
    "not ours": (raw(magic=b"GET "), r"no message of deepshare \(wanted 'hello'\)"),
    "version": (raw(version=9), r"speaks protocol version 9, this is version 1"),
    "kind": (raw(kind=2), r"a message 'beat', wanted 'hello'"),
    "unknown kind": (raw(kind=999), r"a message 'number 999', wanted 'hello'"),
    "too long": (raw(length=2**31), r"of 2147483648 bytes \(at most 65536 are taken\)"),
    "truncated": (raw(body=b'{"a": 1', length=8), r"ended the connection \(8 bytes were wanted, 7 came\)"),
    "truncated header": (raw()[:5], r"12 bytes were wanted, 5 came"),
    "not JSON": (raw(body=b"{'secret'"), r"'hello' that is no JSON object$"),
    "no object": (raw(body=b"[1]"), r"'hello' that is no JSON object$"),
    "deep": (raw(body=b"[" * 60_000), r"'hello' that is no JSON object$"),
    "refused": (raw(kind=1, body=b'{"why": "busy\\u001b[2J"}'), r"refused: busy\[2J$"),
}


@pytest.mark.parametrize(("data", "message"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_a_bad_message_is_refused_at_once(data: bytes, message: str):
    left, right = plain_pair()
    left.send(data)
    left.close()
    with pytest.raises(SecureError, match=message):
        messages.receive(right, "hello")
    right.close()


def test_messages_and_bytes_arrive():
    left, right = plain_pair()
    messages.send(left, "offer", number=3, values=[1, 2.5], name="x")
    messages.send_bytes(left, "ticket", b"abc", number=4)
    kind, content = messages.receive(right, "offer", "end")
    assert (kind, messages.number(right, content, "number")) == ("offer", 3)
    assert messages.numbers(right, content, "values") == [1.0, 2.5]
    content, data = messages.receive_bytes(right, "ticket", most=3)
    assert (content["number"], bytes(data)) == (4, b"abc")
    for end in (left, right):
        end.close()


@pytest.mark.parametrize(
    ("content", "take", "message"),
    [
        ({}, "number", "whose number is no int"),
        ({"number": -1}, "number", r"number out of range \(wanted 0"),
        ({"number": True}, "number", "number out of range"),
        ({"numbers": [1, "2"]}, "numbers", "no list of numbers"),
        ({"text": 1}, "text", "whose text is no str"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(content: dict, take: str, message: str):
    left, right = plain_pair()
    with pytest.raises(SecureError, match=message):
        getattr(messages, take)(left, content, take)
    left.close()
    right.close()


@pytest.mark.parametrize(("most", "changed", "message"), [(2, False, "3 bytes .at most 2"), (3, True, "SHA-256")])
def test_bytes_too_many_or_changed_are_refused(most: int, changed: bool, message: str):
    left, right = plain_pair()
    if changed:
        messages.send(left, "ticket", bytes=3, sha256="0" * 64)
        left.send(b"abc")
    else:
        messages.send_bytes(left, "ticket", b"abc")
    with pytest.raises(SecureError, match=message):
        messages.receive_bytes(right, "ticket", most)
    left.close()
    right.close()


def test_a_message_too_long_is_not_sent():
    left, right = plain_pair()
    with pytest.raises(SecureError, match="must be at most 65536 bytes"):
        messages.send(left, "hello", text="x" * 70_000)
    assert left.sent == 0
    left.close()
    right.close()


# keys


def test_keys_are_private_whole_and_for_one_role(tmp_path: Path):
    folders = make_keys(tmp_path / "keys", clients=2)
    assert [path.name for path in folders] == ["server", "dealer", "client-1", "client-2"]
    for path in (tmp_path / "keys").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
    assert Identity.load(folders[3], "client").role == "client"
    with pytest.raises(SecureError, match=r"client-1 must be a server's \(got client\)"):
        Identity.load(folders[2], "server")


def test_keys_are_never_overwritten(tmp_path: Path):
    make_keys(tmp_path / "keys")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    with pytest.raises(SecureError, match="keys are never overwritten"):
        make_keys(tmp_path / "keys")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


@pytest.mark.parametrize(("clients", "days"), [(0, 1), (1001, 1), (1, 0), (1, 4000)])
def test_keys_in_numbers_out_of_range(clients: int, days: int, tmp_path: Path):
    with pytest.raises(SecureError, match=f"got {clients} and {days}"):
        make_keys(tmp_path / "keys", clients=clients, days=days)
    assert list(tmp_path.iterdir()) == []


def test_keys_open_to_others_missing_or_broken(tmp_path: Path):
    server = make_keys(tmp_path / "keys")[0]
    (server / "key.pem").chmod(0o640)
    with pytest.raises(SecureError, match=r"key\.pem can be read by others"):
        Identity.load(server, "server")
    (server / "key.pem").chmod(0o600)
    (server / "cert.pem").write_text("nothing")
    with pytest.raises(SecureError, match=r"cert\.pem is no readable certificate"):
        Identity.load(server, "server")
    (server / "cert.pem").unlink()
    with pytest.raises(SecureError, match=r"cert\.pem is missing"):
        Identity.load(server, "server")


def test_expired_keys_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from datetime import UTC, datetime, timedelta

    from deepshare.secure.net import keys as module

    class Past(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) - timedelta(days=10)

    monkeypatch.setattr(module, "datetime", Past)
    server = make_keys(tmp_path / "keys", days=1)[0]
    monkeypatch.undo()
    with pytest.raises(SecureError, match="expired on"):
        Identity.load(server, "server")


# mutual TLS


def test_a_session_between_two_roles(folder: Path):
    with Server(folder) as server:
        ours, theirs = session_pair(server, folder)
        assert (ours.party.role, theirs.party.role) == ("server", "client")
        assert theirs.party.name.startswith("the client-1 (127.0.0.1:")
        messages.send(ours.channel, "infer")
        assert messages.receive(theirs.channel, "infer")[0] == "infer"
        ours.close()


def refused_by(server: Server, message: str) -> None:
    until = time.monotonic() + 10
    while not server.log and time.monotonic() < until:
        time.sleep(0.01)
    assert message in server.log[0]
    assert server.sessions == []


@pytest.mark.parametrize(
    ("name", "wanted", "message", "logged"),
    [
        ("dealer", "server", "must be a client by its certificate .it is a dealer.", "must be a client"),
        ("client-1", "dealer", "must be a dealer by its certificate .it is a server.", "ended the connection"),
    ],
)
def test_a_wrong_role_is_refused(name: str, wanted, message: str, logged: str, folder: Path):
    with Server(folder) as server:
        with pytest.raises(SecureError, match=message):
            open_session(server.listener.address, identity(folder, name), wanted)
        refused_by(server, logged)


def test_another_authoritys_certificate_is_refused(folder: Path, tmp_path: Path):
    others = make_keys(tmp_path / "others")[2]
    with Server(folder) as server:
        with pytest.raises(SecureError, match="showed a certificate that is not valid here"):
            open_session(server.listener.address, Identity.load(others, "client"), "server")
        refused_by(server, "refused this certificate")
    (others / "ca.pem").write_bytes((folder / "client-1" / "ca.pem").read_bytes())
    with Server(folder) as server:
        with pytest.raises(SecureError, match="refused this certificate: another authority signed it"):
            open_session(server.listener.address, Identity.load(others, "client"), "server")
        refused_by(server, "showed a certificate that is not valid here")


def test_no_certificate_is_refused(folder: Path):
    import ssl

    context = ssl.create_default_context(cafile=folder / "client-1" / "ca.pem")
    context.check_hostname = False
    with Server(folder) as server:
        address = (server.listener.address.host, server.listener.address.port)
        with socket.create_connection(address) as raw, context.wrap_socket(raw) as sock:
            channel = Channel(sock, "the server (test)", deadline=time.monotonic() + 8)
            messages.send(channel, "hello")
            with pytest.raises(SecureError, match="wants a certificate, and none was shown"):
                channel.recv(1)
        refused_by(server, "showed no certificate")


def test_who_speaks_no_tls_is_refused(folder: Path):
    with Server(folder) as server:
        address = (server.listener.address.host, server.listener.address.port)
        with socket.create_connection(address, timeout=8) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        refused_by(server, "does not speak TLS")


def test_a_server_without_tls_is_refused(folder: Path):
    with socket.create_server((HERE, 0)) as listening:

        def answer_in_plain() -> None:
            sock, _ = listening.accept()
            sock.recv(1000)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            sock.close()

        with joined(answer_in_plain), pytest.raises(SecureError, match="does not speak TLS"):
            open_session(Address(HERE, listening.getsockname()[1]), identity(folder, "client-1"), "server")


def test_nobody_there_and_nobody_who_answers(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deepshare.secure.net.session.CONNECT_SECONDS", 0.3)
    with socket.create_server((HERE, 0)) as listening:
        address = Address(HERE, listening.getsockname()[1])
        with pytest.raises(SecureError, match="did not answer in time"):  # it accepts, and says nothing
            open_session(address, identity(folder, "client-1"), "server")
    with pytest.raises(SecureError, match=rf"the server \({address}\) cannot be reached"):
        open_session(address, identity(folder, "client-1"), "server")


def test_another_protocol_version_is_refused_on_both_sides(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with Server(folder) as server:
        send = messages.send

        def newer(channel: Channel, kind: str, **content) -> None:
            if kind == "hello":
                channel.send(raw(version=2, body=b"{}"))
            else:
                send(channel, kind, **content)

        monkeypatch.setattr(messages, "send", newer)
        with pytest.raises(SecureError, match=r"refused: .*speaks protocol version 2, this is version 1"):
            open_session(server.listener.address, identity(folder, "client-1"), "server")
        refused_by(server, "speaks protocol version 2")


def test_who_is_not_admitted_is_told_why(folder: Path):
    def admit(party) -> None:
        raise SecureError("secure: busy: 8 queries wait")

    with Server(folder, admit) as server:
        with pytest.raises(SecureError, match="refused: busy: 8 queries wait"):
            open_session(server.listener.address, identity(folder, "client-1"), "server")
        refused_by(server, "busy")


def test_a_bad_handshake_leaves_the_server_serving(folder: Path):
    with Server(folder) as server:
        address = (server.listener.address.host, server.listener.address.port)
        for junk in (b"", b"\x16\x03\x01", os.urandom(200)):
            with socket.create_connection(address) as sock:
                sock.sendall(junk)
        ours, theirs = session_pair(server, folder, "client-2")
        assert theirs.party.name.startswith("the client-2 (")
        ours.close()


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:port", "host:99999", "host:-1"])
def test_no_address(text: str):
    with pytest.raises(SecureError, match="--connect must be HOST:PORT"):
        Address.parse("--connect", text)


def test_addresses():
    assert Address.parse("--listen", "10.0.0.1:0") == Address("10.0.0.1", 0)
    assert str(Address.parse("--listen", "[::1]:5000")) == "[::1]:5000"
