"""Two or three machines on one: network namespaces, joined by veth pairs whose rate tc's token bucket limits.

The kernel's delay queue (netem) is missing on many machines; for links with a delay see delay_line.py.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

PREFIX = "dshare"  # of every namespace made here: PREFIX-<process id>-<name>
BURST = "128kb"  # tbf's bucket: at 1 Gb/s 1 ms of traffic; TCP then reaches 0.957 Gb/s
QUEUE = "100ms"  # tbf's queue: nothing is dropped at these rates


class MissingError(RuntimeError):
    """This machine or user cannot make network namespaces; the message says what is missing and how to get it."""


@dataclass
class Host:
    """One namespace. `addresses` and `interfaces` are by the name of the host at the other end.

    Attributes:
        command: what a process's command line begins with to run in it.
        addresses: this host's own address on the link to each other one.
    """

    namespace: str
    addresses: dict[str, str] = field(default_factory=dict)
    interfaces: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)


def require() -> None:
    """Raises MissingError unless the user is root and iproute2 is there."""
    if os.geteuid() != 0:
        raise MissingError(
            "network namespaces need root (this is user "
            f"{os.geteuid()}): use sudo, or a container with CAP_NET_ADMIN and CAP_SYS_ADMIN, or --link loopback"
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise MissingError(
            f"network namespaces need {' and '.join(missing)}, of the package iproute2: apt-get install iproute2 "
            "(dnf install iproute iproute-tc), or --link loopback"
        )


@contextmanager
def hosts(names: Sequence[str], megabits: float | None) -> Iterator[dict[str, Host]]:
    """A namespace per name, every two joined by a veth pair of `megabits` per second each way (None: no limit).

    They are gone when the block is left, however it is left; those of a run that was killed go when the next begins.

    Raises:
        MissingError: no root, no iproute2, or a kernel without veth, tbf or namespaces.
    """
    require()
    remove_stale()
    made = {name: Host(f"{PREFIX}-{os.getpid()}-{name}") for name in names}
    try:
        for host in made.values():
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        for number, (left, right) in enumerate(combinations(names, 2)):
            _join(made, left, right, number, megabits)
        yield made
    finally:
        for host in made.values():
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def remove_stale() -> list[str]:
    """Deletes the namespaces of runs that no longer live; returns their names."""
    gone = []
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.split("-")[1] if name.startswith(f"{PREFIX}-") else ""
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            gone.append(name)
    return gone


def _join(made: dict[str, Host], left: str, right: str, number: int, megabits: float | None) -> None:
    ends = {left: f"ds{os.getpid()}l{number}", right: f"ds{os.getpid()}r{number}"}  # at most 15 characters
    other_end = ("peer", "name", ends[right], "netns", made[right].namespace)
    _ip("-n", made[left].namespace, "link", "add", ends[left], "type", "veth", *other_end)  # never outside the two
    for last, (name, other) in enumerate(((left, right), (right, left)), start=1):
        host, device, address = made[name], ends[name], f"10.77.{number}.{last}"
        _ip("-n", host.namespace, "addr", "add", f"{address}/24", "dev", device)
        _ip("-n", host.namespace, "link", "set", device, "up")
        if megabits is not None:
            bucket = ("rate", f"{megabits:g}mbit", "burst", BURST, "latency", QUEUE)
            _run(*host.command, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *bucket)
        host.addresses[other], host.interfaces[other] = address, device


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MissingError(f"`{' '.join(command)}` failed: {reason[0]}")
    return done.stdout
