"""Where the two parties are: on one loopback, or in a network namespace each, with a rate and perhaps a delay."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from secure import delay_line, namespaces

DELAYED = ("10.78.0.1", "10.78.0.2")  # addresses of the devices of a delay line


@dataclass(frozen=True)
class End:
    """One party's place: how its command begins, its address, the interface that carries it (None: loopback)."""

    command: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str | None = None


@dataclass(frozen=True)
class Link:
    """megabits a second each way, and seconds one way; None is loopback. tls: the engine's parties use it."""

    slug: str
    words: str
    megabits: float | None = None
    delay: float = 0.0
    tls: bool = False

    @contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        """(server, client). Raises namespaces.MissingError where the link cannot be made."""
        if self.megabits is None:
            yield End(), End()
            return
        names = ("server", "client")
        with namespaces.hosts(names, None if self.delay else self.megabits) as made:
            if not self.delay:
                yield tuple(_end(made[name], other) for name, other in zip(names, names[::-1], strict=True))  # type: ignore[misc]
                return
            spaces = [made[name].namespace for name in names]
            with delay_line.line(spaces, DELAYED, self.megabits, self.delay) as device:
                yield tuple(  # type: ignore[misc]
                    End(made[name].command, address, device) for name, address in zip(names, DELAYED, strict=True)
                )


def _end(host: namespaces.Host, other: str) -> End:
    return End(host.command, host.addresses[other], host.interfaces[other])


TABLE = (Link("loopback", "loopback"), Link("1gbit", "1 Gb/s, two network namespaces", megabits=1000.0))
TLS = Link("1gbit-tls", "1 Gb/s, two network namespaces, TLS 1.3", megabits=1000.0, tls=True)
# For the fit of deepshare.analysis.latency: the delays are made by delay_line.py, which takes some of a core.
DELAYS = (
    Link("100mbit-2ms", "100 Mb/s, 2 ms one way, delay line", 100.0, 0.002),
    Link("100mbit-10ms", "100 Mb/s, 10 ms one way, delay line", 100.0, 0.010),
    Link("100mbit-20ms", "100 Mb/s, 20 ms one way, delay line", 100.0, 0.020),
)
LINKS = {link.slug: link for link in (*TABLE, TLS, *DELAYS)}
