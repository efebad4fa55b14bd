"""Who is gone is noticed and named: killed, stopped, cut off, or waiting for what will not come."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from net_cases import Server, identity, joined, keys, plain_pair, session_pair

from deepshare.secure.errors import SecureError
from deepshare.secure.net import beats, messages
from deepshare.secure.net.beats import Beats
from deepshare.secure.net.session import open_session

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keys(tmp_path_factory.mktemp("net"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the usual times."""
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(beats, "SILENCE_SECONDS", 0.6)


def error_of(work) -> str:
    with pytest.raises(SecureError) as caught:
        work()
    return str(caught.value)


def test_a_living_peer_may_take_its_time(folder: Path, quick: None):
    with Server(folder) as server:
        ours, theirs = session_pair(server, folder)

        def slow() -> None:
            time.sleep(1.5)  # more than twice the bound on silence
            theirs.channel.send(b"x")

        with joined(slow):
            assert ours.channel.recv(1) == b"x"
        ours.close()


def test_silence_ends_a_wait_and_names_the_peer(quick: None):
    data, other_data = plain_pair()
    channel, other = plain_pair()  # `other` never beats
    watch = Beats(channel, data)
    said = error_of(lambda: data.recv(1))
    assert "the server (test) gave no sign of life for 0." in said
    assert "(stopped, or the network is cut)" in said
    assert not watch.alive
    while messages.receive(other, "beat", "bye")[0] == "beat":
        pass  # it is also told, should it be stopped only for a while
    watch.close()
    other.close()
    other_data.close()


def test_silence_ends_a_blocked_send_too(quick: None):
    data, other_data = plain_pair()
    channel, other = plain_pair()
    watch = Beats(channel, data)
    assert "gave no sign of life" in error_of(lambda: data.send(bytes(100_000_000)))
    watch.close()
    other.close()
    other_data.close()


def test_last_words_name_the_culprit(folder: Path):
    with Server(folder) as server:
        ours, theirs = session_pair(server, folder)
        with joined(lambda: theirs.close("secure: the dealer (10.0.0.3:1) gave no sign of life for 6.2 s")):
            said = error_of(lambda: ours.channel.recv(1))
        assert said.startswith("secure: the server (127.0.0.1:")
        assert said.endswith("ended: the dealer (10.0.0.3:1) gave no sign of life for 6.2 s")
        ours.close()


def test_notes_travel_with_the_beats(folder: Path, quick: None):
    heard: list[dict] = []
    with Server(folder) as server:
        ours = open_session(server.listener.address, identity(folder, "client-1"), "server", on_note=heard.append)
        server.next().beats.note = {"place": 3}
        until = time.monotonic() + 10
        while {"place": 3} not in heard and time.monotonic() < until:
            time.sleep(0.02)
        ours.close()
    assert {"place": 3} in heard


def test_two_that_wait_for_each_other_are_told(folder: Path, quick: None):
    """Such as after a message that is shorter than what the other expects."""
    with Server(folder) as server:
        ours, theirs = session_pair(server, folder)
        ours.channel.send(b"abc")
        found: list[str] = []
        with joined(lambda: found.append(error_of(lambda: theirs.channel.recv(4)))):
            said = error_of(lambda: ours.channel.recv(1))
        assert all("wait for each other" in words or "ended" in words for words in (said, *found))
        assert any("wait for each other" in words for words in (said, *found))
        ours.close()


PEER = """
import sys, time
from net_cases import identity
from deepshare.secure.net.connect import Address
from deepshare.secure.net.session import open_session
from pathlib import Path
session = open_session(Address("127.0.0.1", int(sys.argv[2])), identity(Path(sys.argv[1]), "client-1"), "server")
print("ready", flush=True)
try:
    session.channel.recv(1)
except Exception as error:
    print(error, flush=True)
session.close()
"""


@pytest.fixture
def peer(folder: Path):
    """(process, server, its session with the process)"""
    with Server(folder) as server:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        process = subprocess.Popen(
            [sys.executable, "-c", PEER, str(folder), str(server.listener.address.port)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process, server.next()
        process.kill()
        process.communicate()


def test_a_killed_peer_is_noticed_at_once(peer):
    process, session = peer
    os.kill(process.pid, signal.SIGKILL)
    assert "the client-1 (127.0.0.1:" in (said := error_of(lambda: session.channel.recv(1)))
    assert "is gone without a word (killed?)" in said


@pytest.mark.slow
def test_a_stopped_peer_is_noticed_and_notices_when_it_goes_on(peer):
    process, session = peer
    os.kill(process.pid, signal.SIGSTOP)
    said = error_of(lambda: session.channel.recv(1))
    assert "gave no sign of life for 6." in said
    session.close(said)
    os.kill(process.pid, signal.SIGCONT)
    last = process.communicate(timeout=10)[0]
    assert "the server (127.0.0.1:" in last
    assert "heard nothing from this process" in last


@pytest.mark.slow
def test_a_short_stop_is_survived(peer):
    process, session = peer
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.5)
    session.beats.check()
    session.channel.send(b"x")
    assert process.communicate(timeout=10)[0] == ""
