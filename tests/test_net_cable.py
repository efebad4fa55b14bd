"""A pulled cable: the parties stand in network namespaces of their own, and the link between them goes down."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_cli import checkpoint
from test_net_processes import GONE_SECONDS, PIXELS, Machine, Process, on_tickets

from deepshare.secure.net.keys import make_keys

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip (network namespaces)"
    ),
]
SERVER = "10.77.31.1"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces with a veth pair between them, 10.77.31.1 and 10.77.31.2."""
    names = (f"dsA{os.getpid()}", f"dsB{os.getpid()}")
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "dsveA", "netns", names[0], "type", "veth", "peer", "name", "dsveB", "netns", names[1])
        for name, link, address in zip(names, ("dsveA", "dsveB"), (SERVER, "10.77.31.2"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


class Apart(Machine):
    """A Machine whose processes stand in the namespace `where`."""

    where = ""

    def command(self) -> list[str]:
        return ["ip", "netns", "exec", self.where, sys.executable] if self.where else [sys.executable]


def test_a_pulled_cable_is_noticed_at_both_ends(tmp_path: Path, namespaces: tuple[str, str]):
    make_keys(tmp_path / "keys")
    checkpoint(tmp_path / "net.safetensors")
    np.save(tmp_path / "many.npy", np.zeros((400, 1, 8, 8), np.uint8))
    machine = Apart(tmp_path)
    tickets = on_tickets(machine, 60)
    machine.where = namespaces[0]
    options = ("--model", "net.safetensors", "--keys", "keys/server", *PIXELS, *tickets, "--queries", "1")
    server = machine.start("serve", *options, "--listen", f"{SERVER}:5000")
    server.says("ready: ")
    machine.where = namespaces[1]
    client = machine.client(f"{SERVER}:5000", "--material", "deal/client", image="many.npy")
    client.says("ticket 5\n")
    ip("-n", namespaces[0], "link", "set", "dsveA", "down")
    ends: list[tuple[Process, str]] = [(server, "the client (10.77.31.2:"), (client, f"the server ({SERVER}:5000)")]
    for process, peer in ends:
        code, last = process.gives_up(GONE_SECONDS)
        assert code == 2
        assert peer in last
        assert "gave no sign of life for 6." in last
