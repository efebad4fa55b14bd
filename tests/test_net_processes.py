"""The commands as processes: exit codes, one clear line, and whoever dies or stops, the others end and say who."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from net_cases import HERE
from test_cli import checkpoint

from deepshare.secure.net.keys import make_keys

ROOT = Path(__file__).resolve().parents[1]
GONE_SECONDS = 10.0  # within which the others must have given up, as docs/parties.md promises
PIXELS = ("--mean", "0.5", "--std", "0.25")


@dataclass
class Process:
    """A command of deepshare that runs; stdout and stderr go to files."""

    name: str
    running: subprocess.Popen
    out: Path
    err: Path

    def says(self, text: str, times: int = 1, seconds: float = 60) -> str:
        """Waits until its output holds `text` so often; gives the output."""
        until = time.monotonic() + seconds
        while (said := self.out.read_text() + self.err.read_text()).count(text) < times:
            assert self.running.poll() is None, f"{self.name} ended: {said}"
            assert time.monotonic() < until, f"{self.name} never said {text!r}: {said}"
            time.sleep(0.01)
        return said

    def ends(self, seconds: float = 60) -> tuple[int, str]:
        """(exit code, last line of stderr)"""
        code = self.running.wait(seconds)
        return code, (self.err.read_text().splitlines() or [""])[-1]

    def gives_up(self, seconds: float) -> tuple[int, str]:
        """Like `ends`, for a process that must say why within so many seconds; Python may take its time to end."""
        until = time.monotonic() + seconds
        while "deepshare: " not in (said := self.err.read_text()):
            assert time.monotonic() < until, f"{self.name} did not give up: {said}"
            time.sleep(0.01)
        return self.ends()

    def kill(self, number: int) -> None:
        os.kill(self.running.pid, number)


@dataclass
class Machine:
    """A folder with keys, a network and images, and the processes started in it."""

    folder: Path
    processes: list[Process] = field(default_factory=list)

    def command(self) -> list[str]:
        return [sys.executable]

    def start(self, name: str, *arguments: str | Path) -> Process:
        out, err = (self.folder / f"{name}{len(self.processes)}.{kind}" for kind in ("out", "err"))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.folder / "cache")}
        command = [*self.command(), "-m", "deepshare", "secure", name, *map(str, arguments)]
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            running = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, cwd=self.folder)
        self.processes.append(Process(name, running, out, err))
        return self.processes[-1]

    def dealer(self) -> tuple[Process, str]:
        process = self.start("deal", "--listen", f"{HERE}:0", "--keys", "keys/dealer")
        return process, address_of(process)

    def server(self, *tickets: str, more: tuple[str, ...] = ()) -> tuple[Process, str]:
        options = ("--model", "net.safetensors", "--listen", f"{HERE}:0", "--keys", "keys/server", *PIXELS)
        process = self.start("serve", *options, *tickets, *more)
        return process, address_of(process)

    def client(self, server: str, *tickets: str, image: str = "one.npy") -> Process:
        return self.start("query", image, "--connect", server, "--keys", "keys/client", *tickets)


def address_of(process: Process) -> str:
    return process.says("ready: ").split("ready: ")[1].split()[0]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    make_keys(tmp_path / "keys")
    checkpoint(tmp_path / "net.safetensors")
    generator = np.random.default_rng(0)
    for name, count in (("one", 1), ("many", 400)):
        np.save(tmp_path / f"{name}.npy", generator.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))
    found = Machine(tmp_path)
    yield found
    for process in found.processes:
        process.running.kill()
        process.running.wait()


def left_behind(machine: Machine) -> set[str]:
    """Files beyond those the test put there, the processes' own output, and what docs/parties.md says stays."""
    known = ("*.npy", "*.png", "net.*", "*.out", "*.err", "keys/*/*.pem", "cache/deepshare/*.masked")
    known = (
        *known,
        "keys/server/weights.json",
        "keys/*/ledger.json",
        "keys/*/ledger.lock",
        "deal/*/deal.json",
        "deal/server/mask.key",
    )
    files = {path for path in machine.folder.rglob("*") if path.is_file()}
    return {str(path) for path in files - {path for pattern in known for path in machine.folder.glob(pattern)}}


def test_a_query_and_a_dealer_that_is_killed(machine: Machine):
    dealer, dealing = machine.dealer()
    server, serving = machine.server("--dealer", dealing)
    client = machine.client(serving, "--dealer", dealing)
    code, last = client.ends()
    assert (code, last.split()[1:]) == (0, ["ticket", "1"])
    label, summary = client.out.read_text().splitlines()
    assert label.split(": ")[0] == "one.npy"
    assert 0 <= int(label.split(": ")[1]) < 10
    assert summary.startswith("1 inferences: 50 rounds, ")
    dealer.kill(signal.SIGKILL)
    code, last = server.gives_up(GONE_SECONDS)
    assert code == 2
    assert last.startswith(f"deepshare: secure: the dealer ({dealing}) is gone")
    assert left_behind(machine) == set()


def on_tickets(machine: Machine, count: int = 3) -> tuple[str, ...]:
    """Disk material for the tests that need it."""
    machine.start("serve", "--model", "net.safetensors", "--describe", "net.protocol").ends()
    code, _ = machine.start("deal", "--protocol", "net.protocol", "--count", str(count), "--out", "deal").ends()
    assert code == 0
    return ("--material", "deal/server")


@pytest.mark.slow
def test_from_disk_and_from_png(machine: Machine):
    from PIL import Image

    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB").save(machine.folder / "a.png")
    server, serving = machine.server(*on_tickets(machine), more=("--queries", "1"))
    client = machine.client(serving, "--material", "deal/client", image="a.png")
    assert client.ends()[0] == server.ends()[0] == 0
    assert left_behind(machine) == {str(machine.folder / "deal" / name / f"0000000{number}.ticket")
                                    for name in ("server", "client") for number in (2, 3)}  # fmt: skip


@pytest.mark.slow
def test_a_torn_ticket_is_one_line_and_exit_code_2(machine: Machine):
    tickets = on_tickets(machine)
    (machine.folder / "deal" / "client" / "00000001.ticket").write_bytes(b"deepshare ticket 1\n torn")
    server, serving = machine.server(*tickets, more=("--queries", "1"))
    code, last = machine.client(serving, "--material", "deal/client").ends()
    assert (code, "00000001.ticket is torn" in last) == (2, True)
    code, last = server.ends()
    assert (code, "the client (" in last and "ended: it failed on its own side" in last) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["introduced", "first", "seventh"])
@pytest.mark.parametrize("how", ["KILL", "STOP"])
@pytest.mark.parametrize("who", ["dealer", "server", "client"])
def test_whoever_dies_or_stops_the_others_end_and_say_who(who: str, how: str, point: str, machine: Machine):
    dealer, dealing = machine.dealer()
    server, serving = machine.server("--dealer", dealing, more=("--queries", "1"))
    client = machine.client(serving, "--dealer", dealing, image="many.npy")
    {
        "introduced": lambda: server.says("serving: the client"),
        "first": lambda: client.says("ticket 1"),
        "seventh": lambda: client.says("ticket 7\n"),
    }[point]()
    parties = {"dealer": (dealer, dealing), "server": (server, serving), "client": (client, HERE)}
    parties[who][0].kill(getattr(signal, f"SIG{how}"))
    began = time.monotonic()
    for other in {"dealer": (server, client), "server": (client,), "client": (server,)}[who]:
        code, last = other.gives_up(GONE_SECONDS - (time.monotonic() - began))
        assert code == 2, other.name
        assert last.startswith("deepshare: secure: "), other.name
        assert f"the {who} ({parties[who][1]}" in last, other.name
        assert ("(stopped" in last) == (how == "STOP"), other.name
    if who != "dealer":
        dealer.says("done with the server")  # and it lives, with nothing kept of that version
        assert dealer.running.poll() is None
    assert left_behind(machine) == set()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["server", "client"])
@pytest.mark.parametrize("how", ["KILL", "STOP"])
def test_a_death_leaves_tickets_whole_or_used(who: str, how: str, machine: Machine):
    """And the next query takes the next number that both have."""
    tickets = on_tickets(machine, 60)
    server, serving = machine.server(*tickets, more=("--queries", "1"))
    client = machine.client(serving, "--material", "deal/client", image="many.npy")
    client.says("ticket 5\n")
    (server if who == "server" else client).kill(getattr(signal, f"SIG{how}"))
    (client if who == "server" else server).gives_up(GONE_SECONDS)
    for process in (server, client):
        process.running.kill()
        process.running.wait()
    server, serving = machine.server(*tickets, more=("--queries", "1"))
    assert machine.client(serving, "--material", "deal/client").ends()[0] == 0
    first, second = (sorted((machine.folder / "deal" / name).glob("*.ticket")) for name in ("server", "client"))
    assert [path.name for path in first] == [path.name for path in second]
    assert 5 < int(first[0].stem) < 60
    assert left_behind(machine) == {str(path) for path in (*first, *second)}


@pytest.mark.slow
def test_a_stopped_client_that_goes_on_says_that_it_was_given_up(machine: Machine):
    _, dealing = machine.dealer()
    server, serving = machine.server("--dealer", dealing, more=("--queries", "1"))
    client = machine.client(serving, "--dealer", dealing, image="many.npy")
    client.says("ticket 3\n")
    client.kill(signal.SIGSTOP)
    server.gives_up(GONE_SECONDS)
    client.kill(signal.SIGCONT)
    code, last = client.gives_up(GONE_SECONDS)
    assert (code, last.startswith("deepshare: secure: the ")) == (2, True)


BAD = {
    "no keys": (("query", "one.npy", "--connect", "h:1"), "--keys is needed"),
    "no image": (("query", "absent.png", "--connect", "h:1", "--keys", "keys/client"), "absent.png does not exist"),
    "another role": (("query", "one.npy", "--connect", "h:1", "--keys", "keys/server"), "must be a client's"),
    "address": (("query", "one.npy", "--connect", "h", "--keys", "keys/client"), "--connect must be HOST:PORT"),
    "nobody": (("query", "one.npy", "--connect", f"{HERE}:1", "--keys", "keys/client"), "cannot be reached"),
    "dealer": (("deal", "--keys", "keys/dealer"), "needs either --listen"),
    "ahead": (("deal", "--keys", "keys/dealer", "--listen", f"{HERE}:0", "--ahead", "0"), "--ahead must be at least 1"),
    "count": (("deal", "--protocol", "net.protocol", "--out", "deal", "--count", "0"), "--count must be at least 1"),
    "protocol": (("deal", "--protocol", "one.npy", "--out", "deal"), "description is damaged"),
    "no listen": (("serve", "--model", "net.safetensors"), "--listen is needed"),
    "no tickets": (
        ("serve", "--model", "net.safetensors", "--listen", f"{HERE}:0", "--keys", "keys/server"),
        "needs --dealer HOST:PORT or --material DIR",
    ),
    "keys there": (("keys", "keys"), "keys are never overwritten"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    from deepshare import cli
    from deepshare.secure.net import guard

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guard, "forbid_dealer", lambda: None)  # this process has the dealer, and keeps it
    make_keys(tmp_path / "keys")
    checkpoint(tmp_path / "net.safetensors")
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    if "net.protocol" in arguments:
        assert cli.main(["secure", "serve", "--model", "net.safetensors", "--describe", "net.protocol"]) == 0
        capsys.readouterr()
    assert cli.main(["secure", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
