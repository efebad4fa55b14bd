#!/usr/bin/env python3
"""A link with a delay, for kernels without netem: a process that carries packets between two namespaces' TUN devices.

    delay_line.py NAMESPACE_A ADDRESS_A NAMESPACE_B ADDRESS_B MEGABITS DELAY_SECONDS

Each packet waits its turn at the rate, then the delay, one way. Prints "ready" once both devices are up; ends with its
standard input. What it takes of a core (a few microseconds a packet) is part of what is measured: for rates of 1 Gb/s
without a delay use namespaces.py's veth pairs.
"""

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DEVICE = "dsline"
MTU = 1500
JUMBO = 9000  # from 500 Mb/s on: fewer packets for the same bytes
BACKLOG_SECONDS = 0.05  # packets that wait for their turn longer than this are left in the kernel's queue
QUEUE_PACKETS = 10_000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000


class Direction:
    """Packets read from one device, to be written to the other."""

    def __init__(self, source: int, target: int, bytes_per_second: float, delay: float) -> None:
        self.source, self._target = source, target
        self._rate, self._delay = bytes_per_second, delay
        self._free = 0.0  # when the line has sent what it took so far
        self._waiting: deque[tuple[float, bytes]] = deque()  # (when to deliver, packet)

    def takes(self, now: float) -> bool:
        return self._free - now < BACKLOG_SECONDS

    def take(self, now: float) -> None:
        """Reads what is there, as long as the line takes more."""
        while self.takes(now):
            try:
                packet = os.read(self.source, 65536)
            except BlockingIOError:
                return
            self._free = max(now, self._free) + len(packet) / self._rate
            self._waiting.append((self._free + self._delay, packet))

    def deliver(self, now: float) -> None:
        while self._waiting and self._waiting[0][0] <= now:
            try:
                os.write(self._target, self._waiting[0][1])
            except BlockingIOError:
                return
            self._waiting.popleft()

    def next_event(self) -> float:
        return self._waiting[0][0] if self._waiting else float("inf")


def forward(left: int, right: int, bytes_per_second: float, delay: float) -> None:
    """Until standard input ends."""
    directions = [Direction(*pair, bytes_per_second, delay) for pair in ((left, right), (right, left))]
    while True:
        now = time.monotonic()
        sources = [direction.source for direction in directions if direction.takes(now)]
        until = min(direction.next_event() for direction in directions) - now
        ready, _, _ = select.select([0, *sources], [], [], min(max(until, 0.0), 0.001 if len(sources) < 2 else 1.0))
        if 0 in ready and not os.read(0, 1):
            return
        now = time.monotonic()
        for direction in directions:
            if direction.source in ready:
                direction.take(now)
            direction.deliver(now)


def open_tun(namespace: str, address: str, mtu: int) -> int:
    """Descriptor of a new device in `namespace`. The process is in that namespace afterwards."""
    with open(f"/run/netns/{namespace}", "rb") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        ("addr", "add", f"{address}/24", "dev", DEVICE),
        ("link", "set", DEVICE, "mtu", str(mtu), "txqueuelen", str(QUEUE_PACKETS), "up"),
    ):
        subprocess.run(["ip", *command], check=True)
    return descriptor


@contextmanager
def line(namespaces: Sequence[str], addresses: Sequence[str], megabits: float, delay: float) -> Iterator[str]:
    """Runs the process while the block lasts; gives the devices' name, the same in both namespaces."""
    pairs = [text for pair in zip(namespaces, addresses, strict=True) for text in pair]
    command = [sys.executable, str(Path(__file__)), *pairs, str(megabits), str(delay)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"delay line between {' and '.join(namespaces)} did not start (is there /dev/net/tun?)")
        yield DEVICE
    finally:
        process.kill()
        process.wait()


def main() -> None:
    left, left_address, right, right_address, megabits, delay = sys.argv[1:]
    mtu = MTU if float(megabits) < 500 else JUMBO
    ends = [open_tun(left, left_address, mtu), open_tun(right, right_address, mtu)]
    print("ready", flush=True)
    forward(ends[0], ends[1], float(megabits) * 1e6 / 8, float(delay))


if __name__ == "__main__":
    main()
