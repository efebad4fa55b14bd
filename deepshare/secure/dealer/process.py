"""The dealer as a process of processes.py: sends each party the next ticket on request, over a socket of its own."""

import socket
import struct
import time
from typing import Any

from deepshare.secure.child import Signals
from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine.protocol import Protocol
from deepshare.secure.engine.ticket import Ticket


def work(given: dict[str, Any], signals: Signals, sockets: tuple[int, ...]) -> dict[str, Any]:
    """Deals `count` inferences. The parties are asked for in turn: each sends one byte and is sent its ticket.

    Args:
        given: protocol (its text), count.
        sockets: to the server, to the client.

    Returns:
        dealing: seconds of making each pair of tickets.
    """
    links = [socket.socket(fileno=descriptor) for descriptor in sockets]
    deal = Deal(Protocol.from_json(given["protocol"]))
    seconds = []
    links[0].sendall(deal.server_key)
    for number in range(given["count"]):
        signals.progress("dealing")
        asked = [link.recv(1) for link in links]
        if not all(asked):
            raise ConnectionError("the dealer lost the connection to a party")
        start = time.perf_counter()
        tickets = deal.tickets(number)
        seconds.append(time.perf_counter() - start)
        for link, ticket in zip(links, tickets, strict=True):
            _send(link, ticket)
    return {"dealing": seconds}


def _send(link: socket.socket, ticket: Ticket) -> None:
    content = ticket.to_bytes()
    link.sendall(struct.pack(">Q", len(content)))
    link.sendall(content)
